"""Checks and times every algorithm across nodes, on nodes that are drawn inside one host, in one go.

    TDCCL_NODE_SIZE=2 torchrun --nproc-per-node 4 -m bench.nodes_check
    TDCCL_NODE_SIZE=1 mpirun -n 2 python -m bench.nodes_check

It says what of NVSHMEM is installed, starts it, and then goes through parts, each of which ends in "ok" or in what went
wrong, on every rank where it did: every algorithm on messages of all kinds, eagerly and in CUDA graphs, every element
checked, and timed; subgroups; torch.distributed; a peer that does not come. The exit status is the number of parts that
failed. Between drawn nodes NVSHMEM goes over NVLink: the times are not those of a network.
"""

import sys
import time
import traceback
from functools import partial

import torch
import torch.distributed as dist

import tdccl
from bench import data
from bench.collectives import COLLECTIVES, Buffers, Case
from tdccl import environment, torch_entry, tuning
from tdccl.decisions import ACROSS_NODES
from tdccl.timing import Effort, clock_for, slowest
from tdccl.transport import nvshmem
from tdccl.transport.bootstrap import Bootstrap, discover

# (element type, operation): the first at all sizes and timed, the others at two.
_KINDS = [("bfloat16", "sum"), ("float", "sum"), ("half", "avg"), ("int64", "min")]
_SIZES = [16, 1 << 16] if environment.emulated() else [16, 1 << 10, 1 << 16, 1 << 20, 1 << 26]


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

    def algorithm(self, name: str, algorithm) -> list[str]:
        """Every kind and size of message by one algorithm; returns lines with the times."""
        comm, collective = self._comm, COLLECTIVES[name]
        table = comm.table
        row = tuning.Row(None, algorithm.name, {})
        comm.use_table(tuning.Table("the check", {name: {"plain": [row]}}))
        lines = []
        try:
            for dtype, op in _KINDS if collective.reduces and not environment.emulated() else _KINDS[:1]:
                for size in _SIZES if dtype == _KINDS[0][0] else (_SIZES[1], _SIZES[-1]):
                    root = size // 16 % comm.size if collective.rooted else -1
                    for in_place in collective.variants:
                        case = Case(
                            collective, size, dtype, op if collective.reduces else None, root, comm.rank, comm.size,
                            in_place,
                        )  # fmt: skip
                        times = self._case(name, case, algorithm.name)
                        if times and dtype == _KINDS[0][0]:
                            listed = ", ".join(f"{microseconds:.1f}" for microseconds in times)
                            lines.append(f"    {case.nbytes:>10} B {'in ' if in_place else 'out'} {listed} us")
        finally:
            comm.use_table(table)
        return lines

    def _case(self, name: str, case: Case, algorithm: str) -> list[float]:
        """One case, eagerly and in a graph, checked; returns the times, none if the algorithm does not take it."""
        comm = self._comm
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
    dist.barrier()
    dist.destroy_process_group()
    return []


def main() -> int:
    bootstrap = discover(timeout=120)
    say = print if bootstrap.rank == 0 else lambda *_, **__: None
    with tdccl.init(timeout=60) as comm:
        say(f"# {comm.size} x {comm.gpu} as nodes {comm.topology.nodes}; NVSHMEM: {installed(comm)}", flush=True)
        if len(comm.topology.nodes) == 1:
            raise SystemExit("all ranks are on one node: draw a boundary, by TDCCL_NODE_SIZE=1 on 2 ranks, 2 on 4")
    parts = [
        (
            f"{name} by {algorithm.name}",
            lambda checker, name=name, algorithm=algorithm: checker.algorithm(name, algorithm),
        )
        for name, algorithms in ACROSS_NODES.items()
        if name in COLLECTIVES
        for algorithm in algorithms
    ]
    parts += [("barrier", Checker.barriers), ("subgroups", Checker.subgroups), ("timeout", Checker.timeout)]
    parts += [("torch.distributed", lambda _: torch_face())]
    failed = 0
    for name, part in parts:
        start, complaint, lines = time.monotonic(), None, []
        try:
            with tdccl.init(timeout=60) as comm:  # a part that fails takes its communicator with it
                lines = part(Checker(comm, bootstrap))
        except Exception as error:
            complaint = f"{error}\n{traceback.format_exc()}"
        complaints = bootstrap.exchange(complaint)
        failed += any(complaints)
        say(f"{name}: {'FAILED' if any(complaints) else 'ok'} ({time.monotonic() - start:.1f} s)", *lines, sep="\n")
        for rank, what in enumerate(complaints):
            if what:
                say(f"--- rank {rank}: {what}", flush=True)
    say(f"# parts that failed: {failed}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
