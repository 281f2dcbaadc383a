"""Every collective against a reference: dtypes, ops, sizes, worlds, algorithms, placements, in place and not."""

import contextlib
import time

import cases
import pytest
import reference
import torch
from waiting import settle_all

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@contextlib.contextmanager
def only(comm, collective, algorithm):
    """Calls of `collective` take this algorithm."""
    comm._forced[collective] = algorithm
    comm.use_table(comm.table)  # forgets what was planned
    try:
        yield
    finally:
        del comm._forced[collective]
        comm.use_table(comm.table)


class Buffers:
    """Poisoned buffers, plain or symmetric, that are made once for each name and grow."""

    def __init__(self, comm, symmetric):
        self.comm, self.symmetric, self._made = comm, symmetric, {}

    def new(self, name, count, dtype, shift=0):
        """A poisoned tensor that starts `shift` elements into its buffer."""
        nbytes = (count + shift) * dtype.itemsize
        room = self._made.get(name)
        if room is None or room.numel() < nbytes:
            size = max(nbytes, 1 << 16)
            make = self.comm.empty if self.symmetric else lambda n, d: torch.empty(n, dtype=d, device=self.comm.device)
            room = self._made[name] = make(size, torch.uint8)
        room[:nbytes].fill_(0x5A)
        return room[:nbytes].view(dtype)[shift:]


def check_reduction(comm, collective, dtype, symmetric):
    buffers, chunks = Buffers(comm, symmetric), comm.size if collective == "reduce_scatter" else 1
    for algorithm in cases.algorithms_of(collective, symmetric):
        for op in cases.ops_of(dtype):
            first = op == cases.ops_of(dtype)[0]
            counts = cases.counts_of(dtype, algorithm, chunks) if first else cases.few_counts(dtype)
            for seed, count in enumerate(counts):
                in_place = (seed + dtype.itemsize) % 2 == 1
                with only(comm, collective, algorithm):
                    reduce_once(comm, buffers, collective, algorithm, op, dtype, count, seed, in_place)


def reduce_once(comm, buffers, collective, algorithm, op, dtype, count, seed, in_place):
    scatter = collective == "reduce_scatter"
    everyone = reference.inputs(seed, comm.size, count * (comm.size if scatter else 1), dtype, comm.device)
    mine = slice(comm.rank * count, (comm.rank + 1) * count) if scatter else slice(None)
    # Ranks need not agree on alignment, but symmetric buffers lie at the same place on all.
    shift = (seed if buffers.symmetric else seed + comm.rank) % 2
    send = buffers.new("send", everyone[0].numel(), dtype, shift=shift)
    send.copy_(everyone[comm.rank])
    recv = send[mine] if in_place else buffers.new("recv", count, dtype, shift=seed % 3)
    settle_all(comm)
    getattr(comm, collective)(send, recv, op)
    settle_all(comm)
    pieces = [values[mine] for values in everyone]
    where = f"{collective} {algorithm} {op} {dtype} count {count} seed {seed} in_place {in_place}"
    result = recv
    expected = reference.ordered(pieces, op)
    wrong = (result != expected).sum().item()
    assert reference.same_bits(result, expected), f"{where}: {wrong} wrong, {result[:4]} for {expected[:4]}"
    if dtype.is_floating_point and count:
        exact = reference.exact(pieces, op)
        assert torch.allclose(result.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 8), where
    settle_all(comm)


@pytest.mark.parametrize("dtype", cases.REDUCED, ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["plain", "symmetric"])
@pytest.mark.parametrize("collective", cases.REDUCTIONS)
def test_reduction_gives_the_ordered_bits(ranks, collective, symmetric, dtype, world):
    ranks.run(check_reduction, world, collective=collective, dtype=dtype, symmetric=symmetric)


def check_movement(comm, collective, dtype, symmetric):
    buffers, chunks = Buffers(comm, symmetric), 1 if collective == "broadcast" else comm.size
    for algorithm in cases.algorithms_of(collective, symmetric):
        for seed, count in enumerate(cases.counts_of(dtype, algorithm, chunks)):
            # all_to_all's `push` is not for calls in place: it writes where the peers still read
            in_place = (seed + dtype.itemsize) % 2 == 1 and not (collective == "all_to_all" and symmetric)
            with only(comm, collective, algorithm):
                move_once(comm, buffers, collective, algorithm, dtype, count, seed, in_place)


def move_once(comm, buffers, collective, algorithm, dtype, count, seed, in_place):
    size, rank, root = comm.size, comm.rank, seed % comm.size
    pieces = size if collective == "all_to_all" else 1
    everyone = reference.inputs(seed, size, count * pieces, torch.uint8 if dtype.itemsize == 1 else dtype, comm.device)
    everyone = [values.view(dtype) if dtype is not torch.bool else (values % 2).bool() for values in everyone]
    mine = slice(rank * count, (rank + 1) * count)
    recv = buffers.new("recv", count * (1 if collective == "broadcast" else size), dtype, shift=seed % 2)
    if collective == "broadcast":
        send, expected = recv, everyone[root]
    elif collective == "all_gather":
        send = recv[mine] if in_place else buffers.new("send", count, dtype)
        expected = torch.cat(everyone)
    else:
        send = recv if in_place else buffers.new("send", count * size, dtype)
        expected = torch.cat([values[mine] for values in everyone])
    if collective != "broadcast" or rank == root:
        send.copy_(everyone[rank])
    settle_all(comm)
    if collective == "broadcast":
        comm.broadcast(recv, root)
    else:
        getattr(comm, collective)(send, recv)
    settle_all(comm)
    where = f"{collective} {algorithm} {dtype} count {count} seed {seed} in_place {in_place} root {root}"
    assert reference.same_bits(recv, expected), where
    settle_all(comm)


@pytest.mark.parametrize("dtype", cases.MOVED, ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["plain", "symmetric"])
@pytest.mark.parametrize("collective", cases.MOVEMENTS)
def test_movement_moves_every_byte(ranks, collective, symmetric, dtype, world):
    ranks.run(check_movement, world, collective=collective, dtype=dtype, symmetric=symmetric)


def check_splits(comm, seed):
    everyone = range(comm.size)
    generator = torch.Generator().manual_seed(seed)
    for dtype, scale in ((torch.float32, 40), (torch.uint8, 3000), (torch.bfloat16, 9000)):
        matrix = torch.randint(0, scale, (comm.size, comm.size), generator=generator)
        matrix[torch.rand(comm.size, comm.size, generator=generator) < 0.3] = 0
        if seed == 0:
            matrix[:, 0] = 0  # nobody sends to rank 0
        if seed == 1:
            matrix = torch.zeros_like(matrix)  # nobody sends at all
        rows = matrix.tolist()
        sends = [
            reference.inputs(seed + rank, 1, sum(rows[rank]) * 3, dtype)[0].view(-1, 3) for rank in range(comm.size)
        ]
        pieces = [values.split(rows[rank]) for rank, values in enumerate(sends)]
        expected = torch.cat([pieces[rank][comm.rank] for rank in everyone])
        send_splits, recv_splits = rows[comm.rank], matrix[:, comm.rank].tolist()
        result = comm.all_to_all(sends[comm.rank].to(comm.device), None, send_splits, recv_splits)
        settle_all(comm)
        assert reference.same_bits(result.cpu(), expected), f"splits {rows} {dtype} seed {seed}"


def check_device_splits(comm, seed):
    """Random splits, changed between calls without the host's knowledge; more than fits into send and recv too."""
    generator = torch.Generator().manual_seed(seed)
    width, dtype = [(3, torch.float32), (16, torch.bfloat16), (5, torch.uint8), (2, torch.complex128)][seed]
    room, shift = 4000, comm.rank % 2  # ranks need not agree on alignment
    recv = torch.empty(room, width, dtype=dtype, device=comm.device)
    splits = torch.zeros(comm.size, dtype=torch.int64, device=comm.device)
    answer = torch.full((2, comm.size), -7, dtype=torch.int64, device=comm.device)
    for scale in (40, 900, 1, 3000):
        matrix = torch.randint(0, scale, (comm.size, comm.size), generator=generator)
        matrix[torch.rand(comm.size, comm.size, generator=generator) < 0.3] = 0
        asked = matrix.tolist()
        if scale == 1:
            asked = [[-3] * comm.size] * comm.size  # nonsense is nothing
        rows = torch.zeros_like(matrix).tolist()
        for source, counts in enumerate(asked):
            left = room
            for rank, count in enumerate(counts):
                rows[source][rank] = max(0, min(count, left))
                left -= rows[source][rank]
        sends = [reference.inputs(seed + rank, 1, room * width, dtype)[0].view(-1, width) for rank in range(comm.size)]
        pieces = [values[: sum(rows[rank])].split(rows[rank]) for rank, values in enumerate(sends)]
        expected = torch.cat([pieces[rank][comm.rank] for rank in range(comm.size)])[:room]
        recv.view(torch.uint8).fill_(0x5A)
        splits.copy_(torch.tensor(asked[comm.rank]))
        settle_all(comm)
        send = torch.empty(room * width + shift, dtype=dtype, device=comm.device)[shift:].view(-1, width)
        send.copy_(sends[comm.rank])
        if comm.rank == (seed + scale) % comm.size:
            time.sleep(0.01)  # the others look at their packets many times
        comm.all_to_all_vdev(send, recv, splits, answer)
        settle_all(comm)
        where = f"splits {asked} {dtype} seed {seed}"
        counts = [rows[rank][comm.rank] for rank in range(comm.size)]
        assert answer[0].tolist() == counts, where
        assert answer[1].tolist() == [sum(counts[:rank]) for rank in range(comm.size)], where
        assert reference.same_bits(recv[: len(expected)].cpu(), expected), where
        assert (recv[len(expected) :].view(torch.uint8) == 0x5A).all(), where


@pytest.mark.parametrize("seed", range(4))
def test_all_to_all_with_splits_on_the_device(ranks, seed, world):
    ranks.run(check_device_splits, world, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_all_to_all_with_splits(ranks, seed, world):
    ranks.run(check_splits, world, seed=seed)


def check_new_results(comm):
    x = torch.arange(6 * comm.size, dtype=torch.float32, device=comm.device).view(2 * comm.size, 3) + comm.rank
    assert comm.all_reduce(x).shape == x.shape
    assert comm.all_gather(x).shape == (2 * comm.size**2, 3)
    assert comm.all_gather(x[0, 0]).shape == (comm.size,)
    assert comm.reduce_scatter(x).shape == (2, 3)
    assert comm.all_to_all(x).shape == x.shape
    assert comm.broadcast(x) is x


def test_recv_is_made_when_not_given(ranks, world):
    ranks.run(check_new_results, world)
