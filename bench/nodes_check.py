"""Checks and times every algorithm across nodes, on nodes that are drawn inside one host, in one go.

    TDCCL_NODE_SIZE=2 torchrun --nproc-per-node 4 -m bench.nodes_check
    TDCCL_NODE_SIZE=1 mpirun -n 2 python -m bench.nodes_check -J FILE

It says what of NVSHMEM is installed, compiles the kernels on all cores (with NVSHMEM's bitcode each takes seconds),
and then goes through parts, each of which ends in "ok" or in what went wrong, on every rank where it did: every
algorithm on messages of all kinds, eagerly and in CUDA graphs, every element checked, and timed; subgroups;
torch.distributed; a peer that does not come. The exit status is the number of parts that failed. Between drawn nodes
NVSHMEM goes over NVLink: the times are not those of a network. `python -m bench ep` does so for expert parallelism.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import tdccl
from bench import data
from bench.collectives import COLLECTIVES, Buffers, Case
from bench.compiling import call_of, compile_all
from bench.output import Result, describe, given
from tdccl import aot, environment, torch_entry, tuning
from tdccl.decisions import ACROSS_NODES, context_for
from tdccl.runtime.algorithm import Algorithm, Call
from tdccl.timing import Effort, clock_for, slowest
from tdccl.transport import nvshmem
from tdccl.transport.bootstrap import Bootstrap, discover

# (element type, operation): the first at all sizes and timed, the others at two.
_KINDS = [("bfloat16", "sum"), ("float", "sum"), ("half", "avg"), ("int64", "min")]
_SIZES = [16, 1 << 16] if environment.emulated() else [16, 1 << 10, 1 << 16, 1 << 20, 1 << 26]
# What the other parts call: collective, elements, element type, operation, alignment, whether by split lists.
_OTHERS = [
    ("all_reduce", 1000, "fp32", "sum", 16, False), ("all_reduce", 10_000, "fp32", "sum", 16, False),
    ("all_reduce", 9, "fp32", "sum", 16, False), ("all_gather", 28, "u8", None, 16, False),
    ("barrier", 0, "u8", None, 16, False), ("send_recv", 0, "u8", None, 16, False),
    ("send_recv", 0, "u8", None, 4, False), ("all_gather", 0, "u8", None, 4, True),
    ("all_to_all", 0, "u8", None, 4, True), ("all_to_all", 0, "u8", None, 16, True),
    ("all_to_all_vdev", 0, "u8", None, 16, False),
]  # fmt: skip


def cases(name: str, rank: int, ranks: int) -> Iterator[Case]:
    """The calls of a collective that are checked."""
    collective = COLLECTIVES[name]
    for dtype, op in _KINDS if collective.reduces and not environment.emulated() else _KINDS[:1]:
        for size in _SIZES if dtype == _KINDS[0][0] else (_SIZES[1], _SIZES[-1]):
            root = size // 16 % ranks if collective.rooted else -1
            for in_place in collective.variants:
                yield Case(collective, size, dtype, op if collective.reduces else None, root, rank, ranks, in_place)


def jobs(nodes: int, width: int, arch: str, most_blocks: int) -> list[aot.Job]:
    """The kernels of all parts."""
    context, distinct = context_for(width, most_blocks, nodes=nodes), {}
    calls = [_other(nodes * width, *other) for other in _OTHERS]
    for name in ACROSS_NODES.keys() & COLLECTIVES.keys():
        calls += [call_of(case) for case in cases(name, 0, nodes * width) if case.count]
    for call in calls:
        for algorithm in ACROSS_NODES[call.collective]:
            if algorithm.unfit(call, context) is None:
                geometry = algorithm.geometry(call, context)
                job = aot.Job(arch, width, call.collective, algorithm.name, geometry, call.op, nodes)
                distinct[aot.key_of(algorithm, geometry, call.op, context)] = job
    return [*distinct.values()]


def _other(ranks: int, name: str, count: int, dtype: str, op: str | None, alignment: int, uneven: bool) -> Call:
    splits = (((alignment,) * ranks,) * 2) if uneven else None
    on_device = (0, 0, 16, 16, 16) if name == "all_to_all_vdev" else None
    return Call(name, count, dtype, op, 0, alignment, splits, (None, None), False, on_device)


def installed(comm: tdccl.Communicator) -> str:
    """What of NVSHMEM there is, for the first line."""
    if environment.emulated():
        return "emulated"
    from nvshmem import core

    major, minor = torch.cuda.get_device_capability(comm.device)
    return f"{core.get_version()}, bitcode {nvshmem.version()} {nvshmem.device_library(10 * major + minor)}"


class Checker:
    """The parts of the check; every method is collective, and raises what goes wrong on this rank."""

    def __init__(self, comm: tdccl.Communicator, bootstrap: Bootstrap):
        self._comm, self._bootstrap = comm, bootstrap
        graphs = [False] if environment.emulated() else [False, True]
        self._clocks = [clock_for(comm, bootstrap, graph) for graph in graphs]
        self._effort = Effort(1, 0, 1) if environment.emulated() else Effort(10, 2, 3)
        room = [torch.empty(_SIZES[-1], dtype=torch.uint8, device=comm.device) for _ in range(2)]
        self._memory = Buffers(*room)
        self.results: list[Result] = []

    def algorithm(self, algorithm: Algorithm, name: str) -> list[str]:
        """Every kind and size of message by one algorithm; returns lines with the times."""
        comm, table, lines = self._comm, self._comm.table, []
        row = tuning.Row(None, algorithm.name, {})
        comm.use_table(tuning.Table("the check", {name: {"plain": [row]}}))
        try:
            for case in cases(name, comm.rank, comm.size):
                times = self._case(case, algorithm.name)
                if times and case.dtype_name == _KINDS[0][0]:
                    listed = ", ".join(f"{microseconds:.1f}" for microseconds in times)
                    lines.append(f"    {case.nbytes:>10} B {'in ' if case.in_place else 'out'} {listed} us")
        finally:
            comm.use_table(table)
        return lines

    def _case(self, case: Case, algorithm: str) -> list[float]:
        """One case, eagerly and in a graph, checked; returns the times, none if the algorithm does not take it."""
        comm, name = self._comm, case.collective.name
        send, recv = self._memory.views(case)
        if (
            case.count == 0
            or comm.explain(name, send, recv, case.op or "sum", max(0, case.root)).algorithm != algorithm
        ):
            return []

        def call():
            if name == "broadcast":
                comm.broadcast(recv, case.root)
            elif case.op is not None:
                getattr(comm, name)(send, recv, op=case.op)
            else:
                getattr(comm, name)(send, recv)

        times = []
        for clock in self._clocks:
            once = clock.repeated(call, 1)
            for seed in range(1 if environment.emulated() else 3):
                data.prepare(case, send, recv, seed)
                self._agree(f"{case}, seed {seed}, {clock.mode}", self._fault(once, partial(_wrong, case, recv, seed)))
            times.append(slowest(clock, self._bootstrap, call, lambda: data.prepare(case, send, recv, 9), self._effort))
            self.results.append(Result(case, "tdccl", algorithm, clock.mode, "plain", None, times[-1], 0))
        return times

    def _fault(self, run, look) -> str | None:
        """What goes wrong on this rank when it calls run(), or what look() then says of the result."""
        try:
            run()
            if self._comm.device.type == "cuda":
                torch.cuda.synchronize()
            self._comm.check()
            return look()
        except (tdccl.TdcclError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"

    def _agree(self, where: str, fault: str | None) -> None:
        """Raises on all ranks if one had a fault, so that they stay together."""
        faults = self._bootstrap.exchange(fault)
        if any(faults):
            raise AssertionError(f"{where}\n" + "\n".join(f"rank {rank}: {what}" for rank, what in enumerate(faults)))

    def barriers(self) -> list[str]:
        """Many barriers, and the time of one."""

        def many():
            for _ in range(3 if environment.emulated() else 300):
                self._comm.barrier()

        self._agree("many barriers", self._fault(many, lambda: None))
        times = [
            slowest(clock, self._bootstrap, self._comm.barrier, lambda: None, self._effort) for clock in self._clocks
        ]
        return [f"    {', '.join(f'{microseconds:.1f}' for microseconds in times)} us"]

    def pairs(self) -> list[str]:
        """Messages, roots and pieces of uneven sizes, checked; a ring of messages timed."""
        comm, lines = self._comm, []
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        for nbytes in [64, 1 << 16] if environment.emulated() else [64, 1 << 16, 1 << 20, 1 << 26]:
            x, y = (torch.full((nbytes // 4,), value, device=comm.device) for value in (comm.rank + 0.5, -1.0))

            def ring(x=x, y=y):
                comm.send_recv([(x, right)], [(y, left)])

            for clock in self._clocks:
                y.fill_(-1)
                once = clock.repeated(ring, 1)
                self._agree(
                    f"a ring of {nbytes} bytes, {clock.mode}", self._fault(once, lambda y=y: _all(y, left + 0.5))
                )
            times = [slowest(clock, self._bootstrap, ring, lambda: None, self._effort) for clock in self._clocks]
            lines.append(f"    {nbytes:>10} B     {', '.join(f'{microseconds:.1f}' for microseconds in times)} us")
        for unit in (1, 4):  # of 4 bytes, and of 16
            self._agree(f"pieces of {4 * unit} bytes", self._fault(partial(self._pieces, unit), lambda: None))
        return lines

    def _pieces(self, unit: int) -> None:
        """Piece j of rank i has (2 i + j) % 5 rows of `unit` words, whose value says whose they are."""
        comm, ranks = self._comm, range(self._comm.size)
        counts = [[(2 * i + j) % 5 * 301 for j in ranks] for i in ranks]
        sent, received = counts[comm.rank], [row[comm.rank] for row in counts]

        def rows(source: int, count: int):
            return torch.full((count, unit), source + 0.25, device=comm.device)

        expected = torch.cat([rows(source, count) for source, count in enumerate(received)])
        send = rows(comm.rank, sum(sent))
        assert torch.equal(comm.all_to_all(send, None, sent, received), expected), "all_to_all"
        recv = torch.zeros(sum(received) + 3, 4, device=comm.device)
        answer = torch.zeros(2, comm.size, dtype=torch.int64, device=comm.device)
        on_device = torch.tensor(sent, device=comm.device)
        comm.all_to_all_vdev(send.repeat(1, 4 // unit), recv, on_device, answer)
        assert answer[0].tolist() == received and torch.equal(recv[:-3, :unit], expected), "all_to_all_vdev"
        rising = [301 * (source + 1) for source in ranks]
        gathered = comm.all_gather(rows(comm.rank, rising[comm.rank]), None, rising)
        assert torch.equal(gathered, torch.cat([rows(*each) for each in enumerate(rising)])), "all_gather"
        root = comm.size - 1
        gathered = comm.gather(rows(comm.rank, 77), None, root)
        whole = torch.cat([rows(source, 77) for source in ranks])
        assert gathered is None or torch.equal(gathered, whole), "gather"
        mine = comm.scatter(whole if comm.rank == root else None, torch.empty(77, unit, device=comm.device), root)
        assert torch.equal(mine, rows(comm.rank, 77)), "scatter"
        total = comm.reduce(rows(comm.rank, 77), None, "sum", root)
        assert total is None or _all(total, sum(ranks) + 0.25 * comm.size) is None, "reduce"

    def subgroups(self) -> list[str]:
        """One rank of each node; the ranks of each node; all in another order; each with its own memory."""
        comm = self._comm
        width = comm.topology.width
        parts = [comm.split(comm.rank % width), comm.split(comm.rank // width), comm.split(0, -comm.rank)]
        for part in parts:
            total = part.all_reduce(torch.full((1000,), float(comm.rank), device=comm.device))
            ranks = sum(part._bootstrap.exchange(comm.rank))
            assert total.eq(ranks).all(), f"{part}: {total[0].item()}, expected {ranks}"
        for part in parts:
            part.destroy()
        return []

    def timeout(self) -> list[str]:
        """A call that rank 0 alone makes fails on rank 0, and names a rank; the communicator is of no use after it."""
        comm = self._comm
        lonely = comm.split(0)
        start, lines = time.monotonic(), []
        try:
            if comm.rank == 0:
                lonely.all_reduce(torch.ones(9, device=comm.device), timeout=1)
                torch.cuda.synchronize() if comm.device.type == "cuda" else None
                lonely.check()
                raise AssertionError("a call that the others did not make ended well")
        except tdccl.Timeout as error:
            lines = [f"    after {time.monotonic() - start:.1f} s: {str(error).partition(chr(10))[0]}"]
        self._bootstrap.barrier()
        lonely.destroy()
        return lines


def _all(tensor: torch.Tensor, value: float) -> str | None:
    wrong = int((tensor != value).sum())
    return f"{wrong} of {tensor.numel()} elements are not {value}" if wrong else None


def _wrong(case: Case, recv: torch.Tensor, seed: int) -> str | None:
    wrong = data.count_wrong(case, recv, seed)
    return f"{wrong} of {recv.numel()} elements wrong, {recv[:4].tolist()}..." if wrong else None


def torch_face() -> list[str]:
    """The same through torch.distributed."""
    torch_entry.register()
    dist.init_process_group("tdccl")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.full((10_000,), float(rank), device=device)
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert x.eq(sum(range(size))).all(), x[:3]
    listed = [torch.empty(7, device=device) for _ in range(size)]
    dist.all_gather(listed, torch.full((7,), float(rank), device=device))
    assert [part[0].item() for part in listed] == list(range(size)), listed
    y, right, left = torch.empty(301, device=device), (rank + 1) % size, (rank - 1) % size
    mine = torch.full_like(y, float(rank))
    for each in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, right), dist.P2POp(dist.irecv, y, left)]):
        each.wait()
    assert y.eq(left).all(), y[:3]
    sent, received = [rank + j for j in range(size)], [i + rank for i in range(size)]
    y = torch.empty(sum(received), device=device)
    dist.all_to_all_single(y, torch.full((sum(sent),), float(rank), device=device), received, sent)
    assert y.tolist() == [float(i) for i, count in enumerate(received) for _ in range(count)], y
    listed = [torch.empty_like(mine) for _ in range(size)] if rank == 0 else None
    dist.gather(mine, listed)
    assert rank or [part[0].item() for part in listed] == list(range(size)), listed
    dist.scatter(mine, [part + 0.5 for part in listed] if rank == 0 else None)
    assert mine.eq(rank + 0.5).all(), mine[:3]
    dist.reduce(mine, size - 1)
    assert rank != size - 1 or mine.eq(sum(range(size)) + 0.5 * size).all(), mine[:3]
    dist.barrier()
    dist.destroy_process_group()
    return []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.nodes_check", description=__doc__.partition("\n")[0])
    parser.add_argument("-J", "--json", metavar="FILE", type=Path, help="also write the times to FILE")
    options = parser.parse_args()
    bootstrap = discover(timeout=300)
    say = partial(print, flush=True) if bootstrap.rank == 0 else lambda *_, **__: None
    with tdccl.init(timeout=60) as comm:
        say(f"# {comm.size} x {comm.gpu} as nodes {comm.topology.nodes}; NVSHMEM: {installed(comm)}")
        if len(comm.topology.nodes) == 1:
            raise SystemExit("all ranks are on one node: draw a boundary, by TDCCL_NODE_SIZE=1 on 2 ranks, 2 on 4")
        topology, blocks = comm.topology, comm.multiprocessors
        described = describe(comm.size, comm.device, f"python -m bench.nodes_check {given()}", topology)
    if bootstrap.rank == 0 and not environment.emulated():
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        say(f"# {compile_all(jobs(len(topology.nodes), topology.width, arch, blocks))}")
    bootstrap.barrier()
    parts = [
        (f"{name} by {algorithm.name}", partial(Checker.algorithm, algorithm=algorithm, name=name))
        for name, algorithms in ACROSS_NODES.items()
        if name in COLLECTIVES
        for algorithm in algorithms
        if not algorithm.pairs  # which are for other calls
    ]
    parts += [
        ("barrier", Checker.barriers),
        ("pairs", Checker.pairs),
        ("subgroups", Checker.subgroups),
        ("timeout", Checker.timeout),
    ]
    parts += [("torch.distributed", lambda _: torch_face())]
    failed, results = 0, []
    for name, part in parts:
        start, complaint, lines = time.monotonic(), None, []
        try:
            with tdccl.init(timeout=60) as comm:  # a part that fails takes its communicator with it
                checker = Checker(comm, bootstrap)
                lines = part(checker)
                results += checker.results
        except Exception as error:
            complaint = f"{error}\n{traceback.format_exc()}"
        complaints = bootstrap.exchange(complaint)
        failed += any(complaints)
        say(f"{name}: {'FAILED' if any(complaints) else 'ok'} ({time.monotonic() - start:.1f} s)", *lines, sep="\n")
        for rank, what in enumerate(complaints):
            if what:
                say(f"--- rank {rank}: {what}")
        if options.json and bootstrap.rank == 0:  # as far as it has come
            report = {**described, "rows": [], "nodes": [result.as_json() for result in results]}
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    say(f"# parts that failed: {failed}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
