"""Ranks that make different calls: told before the launch with TDCCL_DEBUG, else within the timeout; and whatever they
call, nothing is written but what each rank gave to be written."""

import contextlib
import itertools
import random
import sys
from collections.abc import Callable
from typing import NamedTuple

import pool
import pytest
import torch
from test_collectives import only
from test_process_group import CHECKOUT, run
from test_training import LONG
from waiting import settle

import tdccl
from tdccl.collectives import ALGORITHMS
from tdccl.communicator import Communicator
from tdccl.decisions import layout


def worlds(*sizes):
    lacking = {size: pytest.mark.skipif(size > pool.LARGEST_WORLD, reason=f"needs {size} ranks") for size in sizes}
    params = [pytest.param(size, id=f"world{size}", marks=lacking[size]) for size in sizes]
    return pytest.mark.parametrize("members", params)


@contextlib.contextmanager
def another(comm, timeout, debug=False):
    """A communicator over the same ranks, which may fail; at the end all ranks have left it."""
    comm._splits += 1
    bootstrap = comm._bootstrap.subgroup(list(range(comm.size)), f"another{comm._splits}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TDCCL_DEBUG", str(int(debug)))
        other = Communicator(bootstrap, comm.device, timeout)
    try:
        yield other
    finally:
        if any(comm._bootstrap.exchange(other._abort_word.value)):
            other._abort_word.value = layout.ABORTED  # destroying it waits for nobody, on no rank
        other.destroy()


# ---- every kind of mismatch, with and without TDCCL_DEBUG ------------------------------------------------------------


class Kind(NamedTuple):
    """A call that the last rank makes in another way.

    differs  what TDCCL_DEBUG must name
    fails    on some rank without it; else it may pass, for the ranks send each other as much as they expect
    """

    differs: str
    fails: bool
    call: Callable


def kinds_of(comm) -> list[Kind]:
    odd, size = comm.rank == comm.size - 1, comm.size
    symmetric = comm.empty(4096)

    def make(count=1000, dtype=torch.float32):
        return torch.ones(count, dtype=dtype, device=comm.device)

    def in_order(*calls):
        for call in reversed(calls) if odd else calls:
            call()

    return [
        Kind("count", True, lambda: comm.all_reduce(make(1000 + 100 * odd))),
        Kind("count", True, lambda: comm.broadcast(make(0 if odd else 10))),
        Kind("dtype", False, lambda: comm.all_reduce(make(1000, torch.int32 if odd else torch.float32))),
        Kind("op", False, lambda: comm.all_reduce(make(), op="max" if odd else "sum")),
        Kind("root", True, lambda: comm.reduce(make(), root=int(odd))),
        Kind("root", False, lambda: comm.broadcast(make(), root=int(odd))),
        Kind("root", False, lambda: comm.gather(make(10), root=int(odd))),
        Kind("collective", True, lambda: comm.barrier() if odd else comm.reduce_scatter(make(size * 100))),
        Kind("collective", True, lambda: in_order(comm.barrier, lambda: comm.all_gather(make(70_000)))),
        Kind("recv", True, lambda: comm.all_gather(make(500), symmetric[16 * odd :][: size * 500])),
        Kind("send", False, lambda: comm.all_reduce(make() if odd else symmetric[:1000], make())),
        Kind(
            "splits",
            False,
            lambda: comm.all_to_all(make(4 * size + odd), None, [4 + odd] + [4] * (size - 1), [4] * size),
        ),
        Kind(
            f"count: 4 on {'rank 0' if size == 2 else 'ranks 0, 1'}, by splits on rank {size - 1}",
            False,
            lambda: comm.all_to_all(make(4 * size), None, *[[4] * size] * 2 * odd),
        ),
        Kind("no collective", True, lambda: comm.empty(4) if odd else comm.barrier()),
    ]


def check_debug(comm):
    with another(comm, 30, debug=True) as other:
        for kind in kinds_of(other):
            stranger = kind.differs == "no collective" and comm.rank == comm.size - 1
            with pytest.raises(tdccl.ArgumentError if stranger else tdccl.Mismatch) as raised:
                kind.call()
            message = str(raised.value)
            assert stranger or f"\n  {kind.differs}" in message, f"{kind.differs} not in: {message}"
            assert stranger or f"\n  rank {comm.size - 1}: " in message, message
            assert other.all_reduce(torch.ones(7, device=comm.device)).tolist() == [comm.size] * 7


@worlds(2, 3)
def test_debug_tells_all_ranks_what_differs(ranks, members):
    ranks.run(check_debug, members)


def check_without_debug(comm):
    outcomes = []
    for number in range(len(kinds_of(comm)) - 1):  # but the last, for which hosts wait for each other
        with another(comm, 0.6) as other:
            kind = kinds_of(other)[number]
            message = None
            try:
                with only(other, "all_gather", "push") if kind.differs == "recv" else contextlib.nullcontext():
                    kind.call()
                    settle(other)
            except tdccl.Timeout as error:
                message = str(error)
            outcomes.append((kind.differs, kind.fails, message))
    assert comm.all_reduce(torch.ones(7, device=comm.device)).tolist() == [comm.size] * 7
    return outcomes


@worlds(2, 3)
def test_without_debug_a_timeout_shows_both_sides(ranks, members):
    for row in zip(*ranks.run(check_without_debug, members)):
        (differs, fails, _), messages = row[0], [message for *_, message in row if message]
        assert messages or not fails, f"{differs}: nobody noticed"
        for message in messages:
            assert "waited 0.6 s for rank" in message, message
            assert all(f"\n  rank {rank} " in message for rank in range(members)), message
            assert "the ranks differ in call 1:" in message or "has not come to call" in message, message


def check_in_place(comm):
    """A rank's piece of a buffer lies elsewhere on every rank, which is no mismatch."""
    with another(comm, 30, debug=True) as other:
        x = other.empty(4 * other.size)
        x.fill_(other.rank + 1)
        piece = x.view(other.size, 4)[other.rank]
        other.all_gather(piece, x)
        assert x.tolist() == [rank + 1 for rank in range(other.size) for _ in range(4)]
        other.reduce_scatter(x, piece)
        settle(other)
        assert piece.tolist() == [other.size * (other.rank + 1)] * 4


@worlds(2)
def test_debug_lets_pass_what_is_in_place(ranks, members):
    ranks.run(check_in_place, members)


def check_late(comm, given):
    with another(comm, 30 if given else 1, debug=True) as other:
        if comm.rank:
            with pytest.raises(tdccl.Timeout) as raised:
                other.barrier(timeout=given)
            message = "rank 1 waited 1 s for rank 0: to compare call 1\n  rank 0 has made no call"
            assert message in str(raised.value), raised.value
            with pytest.raises(tdccl.Timeout):
                other.barrier()


@worlds(2)
@pytest.mark.parametrize("given", [None, 1], ids=["communicator's_timeout", "call's_timeout"])
def test_debug_names_a_rank_that_does_not_come(ranks, members, given):
    ranks.run(check_late, members, given=given)


def check_capture(comm):
    with another(comm, 30, debug=True) as other:
        x = torch.ones(1000, device=comm.device)
        other.all_reduce(x, x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            with pytest.raises(tdccl.Mismatch):
                other.all_reduce(x[comm.rank :])
            other.all_reduce(x, x)
        graph.replay()
        settle(other)
        assert (x == comm.size**2).all()


@worlds(2)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_debug_under_capture(ranks, members):
    ranks.run(check_capture, members)


TORCH = """
import os, torch, torch.distributed as dist
import tdccl
from torch.profiler import ProfilerActivity, profile

dist.init_process_group("tdccl")
rank = dist.get_rank()
gpus = torch.cuda.device_count()
device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
x = torch.ones(10, device=device)
for call in (
    lambda: dist.all_reduce(x[rank:]),
    lambda: dist.broadcast(x, src=rank),
    lambda: dist.all_reduce(x) if rank else dist.barrier(),
):
    try:
        call()
        raise SystemExit("no error")
    except tdccl.Mismatch as error:
        assert "rank 0: call 1, " in str(error) and "rank 1: call 1, " in str(error), error
with profile(activities=[ProfilerActivity.CPU]) as shown:
    dist.all_reduce(x, async_op=True).wait()
assert "tdccl:all_reduce" in {event.key for event in shown.key_averages()}
assert x.tolist() == [2] * 10
path = dist.group.WORLD.communicator.dump(os.environ["FOLDER"])
dist.destroy_process_group()
print(f"rank {rank}: ok")
"""


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs two ranks")
def test_torchs_detail_is_debug(installed):
    program = installed / "program.py"
    program.write_text(TORCH)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    path = (CHECKOUT, installed)
    told = run(*launcher, path=path, TORCH_DISTRIBUTED_DEBUG="DETAIL", FOLDER=str(installed / "traces"))
    assert told.count(": ok") == 2 and len([*(installed / "traces").iterdir()]) == 2


# ---- nothing is written but what each rank gave to be written --------------------------------------------------------

PATIENCE = 2 if torch.cuda.is_available() else 0.2  # seconds; a GPU's kernels are compiled on the way
ROOM = 1 << 20
POISON = 0x5A


class Given(NamedTuple):
    """A call by one algorithm. count: elements of one rank's piece; shift: where in its memory the call's begins."""

    collective: str
    algorithm: str
    count: int
    dtype: torch.dtype = torch.float32
    op: str = "sum"
    root: int = 0
    shift: int = 0


def everything_given() -> list[Given]:
    """Each algorithm with few and many elements, and each that reaches into symmetric memory at two places in it."""
    listed = []
    for collective, table in ALGORITHMS.items():
        for algorithm in table:
            large = 600 if algorithm.path == "packets" else 40_000
            for count, dtype, shift in ((10, torch.float64, 0), (large, torch.float32, 0), (large, torch.float32, 64)):
                if shift == 0 or algorithm.symmetric:
                    listed.append(Given(collective, algorithm.name, count, dtype, "sum", shift % 3 % 2, shift))
    return listed


def prepare(comm, given: Given):
    """(call, memory that it may read, memory of which it may write part, first and last byte of that part)."""
    symmetric = next(a for a in ALGORITHMS[given.collective] if a.name == given.algorithm).symmetric
    made = [comm.empty(ROOM, torch.uint8) for _ in range(2)]
    plain = [torch.empty(ROOM, dtype=torch.uint8, device=comm.device) for _ in range(2)]
    memory = [made[i] if name in symmetric else plain[i] for i, name in enumerate(("send", "recv"))]
    for each in memory:
        each.fill_(POISON)
    chunked = {"all_gather": (1, comm.size), "reduce_scatter": (comm.size, 1), "all_to_all": (comm.size, comm.size)}
    pieces = chunked.get(given.collective, (1, 1))
    itemsize = given.dtype.itemsize
    begin = 4096 + given.shift * itemsize
    ends = [begin + given.count * piece * itemsize for piece in pieces]
    send, recv = (each[begin:end].view(given.dtype) for each, end in zip(memory, ends))
    peers = ((comm.rank + step) % comm.size for step in (1, -1))
    splits = torch.tensor([given.count * 8 // comm.size] * comm.size, device=comm.device)  # more than there are
    answer = torch.zeros(2, comm.size, dtype=torch.int64, device=comm.device)
    calls = {
        "all_reduce": lambda: comm.all_reduce(send, recv, given.op),
        "reduce_scatter": lambda: comm.reduce_scatter(send, recv, given.op),
        "all_gather": lambda: comm.all_gather(send, recv),
        "broadcast": lambda: comm.broadcast(recv, given.root),
        "all_to_all": lambda: comm.all_to_all(send, recv),
        "all_to_all_vdev": lambda: comm.all_to_all_vdev(send, recv, splits, answer),
        "reduce": lambda: comm.reduce(send, recv, given.op, given.root),
        "send_recv": lambda: comm.send_recv([(send, next(peers))], [(recv, next(peers))]),
        "barrier": comm.barrier,
    }
    writes = given.collective != "barrier" and (given.collective != "reduce" or comm.rank == given.root)
    return calls[given.collective], memory, (begin, ends[1] if writes else begin)


def check_guards(comm, pairs):
    """The last rank makes the second call of each pair, all others the first."""
    noticed = 0
    for pair in pairs:
        mine = pair[comm.rank == comm.size - 1]
        with another(comm, PATIENCE) as other, only(other, mine.collective, mine.algorithm):
            call, (send, recv), (begin, end) = prepare(other, mine)
            comm._bootstrap.barrier()
            try:
                call()
                settle(other)
            except tdccl.Timeout:
                noticed += 1
            comm._bootstrap.barrier()  # nobody writes any more
            where = f"rank {comm.rank} of {comm.size} called {mine} of {pair}"
            for name, guard in (("send", send), ("before recv", recv[:begin]), ("after recv", recv[end:])):
                written = (guard != POISON).nonzero()
                assert not len(written), f"{where}: {len(written)} bytes written in {name}, from {written[0].item()} on"
    assert comm.all_reduce(torch.ones(7, device=comm.device)).tolist() == [comm.size] * 7
    return noticed


def pairs_of(seed: int | None) -> list[tuple[Given, Given]]:
    """All pairs of calls that differ; or those of one algorithm that reaches into peers' memory, and some others."""
    pairs = list(itertools.permutations(everything_given(), 2))
    if seed is None:
        return pairs
    reaching = {given.algorithm for given in everything_given() if given.shift}
    alike = [pair for pair in pairs if pair[0][:2] == pair[1][:2] and pair[0].algorithm in reaching]
    return [pair for pair in alike if pair[1].shift] + random.Random(seed).sample(pairs, 16)


@worlds(2, 3)
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[LONG] if seed is None else []) for seed in (1, None)])
@pytest.mark.timeout(20_000)
def test_nothing_but_recv_is_written(ranks, seed, members):
    pairs = pairs_of(seed)
    noticed = ranks.run(check_guards, members, seconds=3600 if seed is None else 240, pairs=pairs)
    assert max(noticed) > len(pairs) // 4
