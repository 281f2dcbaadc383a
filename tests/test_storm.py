"""A storm: random calls of every kind on overlapping groups, with random delays, each verified bit by bit."""

import random
import time

import cases
import pool
import pytest
import reference
import torch
from test_training import LONG

COUNTS = [1, 5, 64, 64, 1000, 1000, 1000, 4096, 4099, 4099, 20_000, 70_001]
ROOM = 1 << 20  # bytes of a rank's symmetric buffer; what does not fit is in plain memory


class Weather:
    """The calls of one storm on one rank. All ranks draw the same calls, and each its own delays."""

    def __init__(self, comm, seed):
        self.seed, self.own = seed, random.Random(f"{seed} on {comm.rank}")
        groups = [
            comm,
            comm.split(0, key=-comm.rank),
            comm.split(comm.rank % 2),
            comm.split(0 if comm.rank < 2 else None),
        ]
        self.groups = [(group, group and [group.empty(ROOM, torch.uint8) for _ in range(2)]) for group in groups]
        self.results = []

    def run(self, calls):
        for number in range(calls):
            draw = random.Random(f"{self.seed}/{number}")
            group, memory = draw.choice(self.groups)
            if group is not None:
                self.call(group, memory, draw, number)
                self.delay(group.device)
            if len(self.results) > 20:
                self.verify()
        self.verify()
        for group, _ in self.groups[1:]:
            if group is not None:
                group.destroy()

    def delay(self, device):
        if self.own.random() < 0.1:
            time.sleep(self.own.random() * 0.02)
        if self.own.random() < 0.1 and device.type == "cuda":
            torch.cuda._sleep(self.own.randrange(2_000_000))

    def call(self, group, memory, draw, number):
        collective = draw.choice([
            "all_reduce", "reduce_scatter", "reduce", "all_gather", "broadcast", "all_to_all", "gather", "scatter",
            "send_recv", "barrier",
        ])  # fmt: skip
        dtype, count = draw.choice(cases.REDUCED), draw.choice(COUNTS)
        op, root = draw.choice(cases.ops_of(dtype)), draw.randrange(group.size)
        placement, in_place, shift = draw.choice(["plain", "recv", "both"]), draw.random() < 0.3, draw.randrange(3)
        size, rank = group.size, group.rank
        everyone = reference.inputs(draw.randrange(1 << 20), size, count * size, dtype, group.device)
        whole, mine = slice(0, count), slice(rank * count, (rank + 1) * count)

        def buffer(index, length):
            nbytes, symmetric = (
                (length + shift) * dtype.itemsize,
                placement == "both" or (placement == "recv" and index),
            )
            fits = symmetric and nbytes <= ROOM
            room = memory[index][:nbytes] if fits else torch.empty(nbytes, dtype=torch.uint8, device=group.device)
            return room.view(dtype)[shift:]

        def filled(index, values):
            made = buffer(index, len(values))
            made.copy_(values)
            return made

        left = (rank - 1) % size
        first = [values[whole] for values in everyone]
        own = [values[mine] for values in everyone]
        given, expected = {
            "all_reduce": lambda: (first[rank], reference.ordered(first, op)),
            "reduce_scatter": lambda: (everyone[rank], reference.ordered(own, op)),
            "reduce": lambda: (first[rank], reference.ordered(first, op)),
            "all_gather": lambda: (first[rank], torch.cat(first)),
            "broadcast": lambda: (first[rank], first[root]),
            "all_to_all": lambda: (everyone[rank], torch.cat(own)),
            "gather": lambda: (first[rank], torch.cat(first)),
            "scatter": lambda: (everyone[rank], everyone[root][mine]),
            "send_recv": lambda: (first[rank], first[left]),
            "barrier": lambda: (first[rank], first[rank]),
        }[collective]()  # fmt: skip
        in_place = (in_place and collective in ("all_reduce", "reduce")) or collective in ("broadcast", "barrier")
        send = filled(1 if in_place else 0, given)
        recv = send if in_place else buffer(1, len(expected))
        {
            "all_reduce": lambda: group.all_reduce(send, recv, op),
            "reduce_scatter": lambda: group.reduce_scatter(send, recv, op),
            "reduce": lambda: group.reduce(send, recv, op, root),
            "all_gather": lambda: group.all_gather(send, recv),
            "broadcast": lambda: group.broadcast(recv, root),
            "all_to_all": lambda: group.all_to_all(send, recv),
            "gather": lambda: group.gather(send, recv, root),
            "scatter": lambda: group.scatter(send, recv, root),
            "send_recv": lambda: group.send_recv([(send, (rank + 1) % size)], [(recv, left)]),
            "barrier": group.barrier,
        }[collective]()
        if rank == root or collective not in ("reduce", "gather"):
            told = f"seed {self.seed}, call {number}: {collective} {op} root {root} of {count} {dtype}, {size} ranks, "
            told += f"{placement}, in place {in_place}, shift {shift}"
            self.results.append((told, recv.clone(), expected))

    def verify(self):
        for told, result, expected in self.results:
            wrong = (result != expected).nonzero().view(-1)[:1].tolist()
            assert reference.same_bits(result, expected), f"{told}: wrong from element {wrong} on"
        self.results.clear()


def storm(comm, seed, calls):
    Weather(comm, seed).run(calls)


@pytest.mark.parametrize("seed, calls", [(1, 150), pytest.param(2, 10_000, marks=LONG)], ids=["short", "long"])
@pytest.mark.timeout(20_000)
def test_storm(ranks, seed, calls):
    ranks.run(storm, min(3, pool.LARGEST_WORLD), seconds=240 + calls, seed=seed, calls=calls)
