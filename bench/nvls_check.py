"""Checks and times every NVLS algorithm on a host with NVLink multicast, in one go.

    mpirun -n 8 python -m bench.nvls_check           # on GPUs; in emulation it checks the emulated switch
    TDCCL_NVLS=unicast mpirun -n 4 python -m bench.nvls_check    # the unicast twins, on any GPUs

First it asks whether multicast is permitted and there: without it nothing is run, and the exit status is 2. Then each
algorithm that the switch takes part in is run in plain or in symmetric memory, eagerly and in a CUDA graph, and every
element is checked; its time stands beside that of what the tuning table takes without multicast. The exit status is 1
if any element was wrong.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

import tdccl
from bench import data
from bench.collectives import COLLECTIVES, Buffers, Case
from bench.compiling import call_of, compile_all
from tdccl import aot, environment, tuning
from tdccl.decisions import ALGORITHMS, context_for, table_for
from tdccl.runtime.algorithm import Algorithm
from tdccl.runtime.plan import choose
from tdccl.timing import Effort, clock_for, slowest
from tdccl.transport.bootstrap import Bootstrap, discover
from tdccl.tuning.table import PLACEMENTS

# (element type, operation): the first at all sizes, the others at the smallest and the largest; all ragged, too.
_KINDS = [("bfloat16", "sum"), ("float", "sum"), ("half", "sum"), ("double", "avg"), ("int64", "max"), ("int32", "min")]


class Task(NamedTuple):
    """One algorithm on one case; `symmetric` says in which memory."""

    algorithm: Algorithm
    case: Case
    symmetric: bool


def tasks(comm: tdccl.Communicator, sizes: list[int]) -> Iterator[Task]:
    """Every NVLS algorithm of the collectives that move or reduce data, from one root after the other."""
    ends = sorted({sizes[0], sizes[-1]})
    ragged = [size - 6 for size in ends]  # the last 16 bytes are not whole: 10 of 2-byte elements, 8 of larger ones
    for name, collective in COLLECTIVES.items():
        algorithms = [algorithm for algorithm in ALGORITHMS[name] if algorithm.multimem is not None]
        kinds = 1 if not collective.reduces else 2 if environment.emulated() else len(_KINDS)
        for algorithm, number in itertools.product(algorithms, range(kinds)):
            dtype, op = _KINDS[number]
            for place, size in enumerate([*(sizes if number == 0 else ends), *ragged]):
                for in_place in collective.variants:
                    if not in_place or algorithm.in_place:
                        root = (place + 1) % comm.size if collective.rooted else -1
                        reduced_by = op if collective.reduces else None
                        case = Case(collective, size, dtype, reduced_by, root, comm.rank, comm.size, in_place)
                        yield Task(algorithm, case, bool(algorithm.symmetric))


def jobs(comm: tdccl.Communicator, sizes: list[int]) -> list[aot.Job]:
    """The kernels of all tasks, and of what they are compared with."""
    context = context_for(comm.size, comm.multiprocessors)._replace(multicast=comm.multicast)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(comm.device))
    without, distinct = table_for(comm.gpu, comm.size), {}
    for task in tasks(comm, sizes):
        call, among = call_of(task.case, task.symmetric), ALGORITHMS[task.case.collective.name]
        for choice in (
            choose(among, call, context, without, task.algorithm.name),
            choose(among, call, context, without),
        ):
            key = aot.key_of(choice.algorithm, choice.geometry, call.op, context)
            distinct[key] = aot.Job(arch, comm.size, call.collective, choice.algorithm.name, choice.geometry, call.op)
    return [*distinct.values()]


class Checker:
    """Runs tasks one after another; every method is collective."""

    def __init__(self, comm: tdccl.Communicator, bootstrap: Bootstrap, largest: int):
        self._comm, self._bootstrap = comm, bootstrap
        self._without = table_for(comm.gpu, comm.size)
        graphs = [False] if environment.emulated() else [False, True]
        self._clocks = [clock_for(comm, bootstrap, graph) for graph in graphs]
        self._effort = Effort(1, 0, 1) if environment.emulated() else Effort(10, 2, 5)
        plain = [torch.empty(largest, dtype=torch.uint8, device=comm.device) for _ in range(2)]
        self._memory = {False: Buffers(*plain), True: Buffers(*(comm.empty(largest, torch.uint8) for _ in range(2)))}

    def run(self, task: Task) -> tuple[int, float, float, str]:
        """(wrong elements on all ranks, microseconds, microseconds of what is taken without multicast, its name)."""
        case, comm = task.case, self._comm
        send, recv = self._memory[task.symmetric].views(case)
        collective = case.collective.name
        arguments = {"op": case.op} if case.collective.reduces else {}

        def call():
            if collective == "broadcast":
                comm.broadcast(recv, case.root)
            else:
                getattr(comm, collective)(send, recv, **arguments)

        def chosen():
            return comm.explain(collective, send, recv, case.op or "sum", max(case.root, 0)).algorithm

        row = tuning.Row(None, task.algorithm.name, {})
        comm.use_table(tuning.Table("the check", {collective: {placement: [row] for placement in PLACEMENTS}}))
        assert chosen() == task.algorithm.name, f"{collective}: {task.algorithm.name} cannot take {case}"
        wrong = 0
        for seed, clock in enumerate(self._clocks):
            once = clock.repeated(call, 1)
            for again in range(2):
                data.prepare(case, send, recv, 2 * seed + again)
                once()
                wrong += sum(self._bootstrap.exchange(data.count_wrong(case, recv, 2 * seed + again)))
        ours = self._time(case, send, recv, call)
        comm.use_table(self._without)
        return wrong, ours, self._time(case, send, recv, call), chosen()

    def _time(self, case: Case, send: torch.Tensor, recv: torch.Tensor, call) -> float:
        return slowest(self._clocks[-1], self._bootstrap, call, lambda: data.prepare(case, send, recv, 9), self._effort)

    def barriers(self) -> tuple[float, float]:
        """(microseconds through the switch, and without it), after enough of them for every count to wrap around."""
        times = []
        for name in ("nvls_red", "signal_all"):
            row = tuning.Row(None, name, {})
            self._comm.use_table(tuning.Table("the check", {"barrier": {"plain": [row]}}))
            for _ in range(2 if environment.emulated() else 1000):
                self._comm.barrier()
            times.append(slowest(self._clocks[-1], self._bootstrap, self._comm.barrier, lambda: None, self._effort))
        self._comm.check()
        return times[0], times[1]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.nvls_check", description=__doc__.partition("\n")[0])
    smallest, largest = (14, 16) if environment.emulated() else (14, 28)
    parser.add_argument("-b", "--smallest", type=int, default=smallest, help="log2 of bytes (default %(default)s)")
    parser.add_argument("-e", "--largest", type=int, default=largest, help="log2 of bytes (default %(default)s)")
    options = parser.parse_args(words)
    if options.largest < options.smallest:
        parser.error(f"-b is {options.smallest}, -e is {options.largest}: expected -b <= -e")
    comm = tdccl.init(timeout=120)  # a wait that lasts longer is a fault of what is checked here
    say = print if comm.rank == 0 else lambda *_, **__: None
    say(f"# {comm.size} x {comm.gpu}; multimem: {comm.multicast.kind or 'no'} ({comm.multicast.reason})", flush=True)
    if comm.multicast.kind is None:
        say("# nothing to check: TDCCL_NVLS=unicast checks the same kernels without multicast")
        comm.destroy()
        return 2
    bootstrap = discover(timeout=comm.timeout)
    bootstrap.interrupt = comm.raise_fault  # nobody waits for a rank that has ended
    sizes = [1 << power for power in range(options.smallest, options.largest + 1, 2)]
    if comm.rank == 0 and not environment.emulated():
        say(f"# {compile_all(jobs(comm, sizes))}", flush=True)
    bootstrap.barrier()
    checker, wrong = Checker(comm, bootstrap, sizes[-1]), 0
    for task in tasks(comm, sizes):
        errors, ours, others, other = checker.run(task)
        wrong += errors
        case = task.case
        head = f"{case.collective.name:15}{task.algorithm.name:22}{case.dtype_name:9} {case.op or '':4}"
        say(f"{head}{case.nbytes:>11} B {'in ' if case.in_place else 'out'} {errors:>6} wrong", end="")
        say(f"{ours:10.2f} us  {others:10.2f} us {other}", flush=True)
    ours, others = checker.barriers()
    say(f"{'barrier':15}{'nvls_red':62}{ours:10.2f} us  {others:10.2f} us signal_all")
    say(f"# wrong elements: {wrong}")
    comm.destroy()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
