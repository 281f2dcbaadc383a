"""Measures a tuning table for this kind of GPU and number of ranks: `mpirun -n 4 python -m tdccl.tune`.

Each collective is timed in a CUDA graph, in plain and in symmetric memory, at each size, by each algorithm, in each
shape worth a try. What was the fastest makes the rows; the best time of each algorithm is kept for the cost model.

`python -m tdccl.tune products` measures tiles of products instead, on one GPU.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
import triton

import tdccl
from tdccl import aot, environment, tune_products, tuning
from tdccl.decisions import ALGORITHMS
from tdccl.runtime.algorithm import Algorithm, Geometry
from tdccl.timing import Effort, clock_for, slowest
from tdccl.transport.bootstrap import discover
from tdccl.tuning.table import PLACEMENTS, dumped, merged

# These take one algorithm at all sizes: the last that fits.
_UNTUNED = ("barrier", "all_to_all_vdev", "send_recv")
COLLECTIVES = [name for name in ALGORITHMS if name not in _UNTUNED]
# Chunk, not message, is what tables go by; these have a chunk a rank.
_CHUNKED = ("all_gather", "reduce_scatter", "all_to_all")
# A new choice has to beat the one before by this much, so that rows stay few and curves smooth.
_WORTH = 0.98
# Of those that are as fast but for this much, the one on the fewest blocks is chosen: others compute beside it.
_AS_GOOD = 0.99
# Packets this many times slower than the best are not tried at larger sizes.
_HOPELESS = 3.0
# log2 of message sizes in bytes: from a chunk of 16 bytes for each of 8 ranks, to what grids and offsets were made for.
_SMALLEST, _LARGEST = 7, 36
# Under a cap messages are tuned from this size on.
_LARGE = 1 << 20


def shapes(algorithm: Algorithm, cap: int | None = None) -> list[dict[str, int]]:
    """What is tried of the rules: on few blocks and on many, in short tiles and in long; under a cap in longer ones."""
    if algorithm.path == "packets":
        tried = [(32, 1), (64, 1), (128, 2), (256, 4), (512, 8), (1024, 8), (1024, 16), (2048, 16), (4096, 16)]
        return [{"packet_tile": tile, "packet_warps": warps} for tile, warps in tried]
    tiles = [(4, 8), (8, 8), (16, 16), (32, 16), (64, 16)]
    if cap is not None:
        tiles = [(16, 16), (32, 16), (32, 32), (64, 16), (64, 32), (128, 32)]
    found = [
        {"tile": tile << 10, "warps": warps, "blocks": blocks}
        for (tile, warps), blocks in itertools.product(tiles, (32, 64, 128) if cap is None else (cap,))
    ]
    if algorithm.path == "symmetric":
        return found
    pipelines = [{"whole_from": 1 << 40}, {"whole_from": 0, "steps": 3}, {"whole_from": 0, "steps": 8}]
    return [{**shape, **pipeline} for shape, pipeline in itertools.product(found, pipelines)]


class Measured(NamedTuple):
    """The time of one algorithm in one shape."""

    algorithm: str
    changes: dict[str, int]
    sent: float
    time_us: float


@dataclass(frozen=True)
class Task:
    """One collective in one placement at one size, on at most `cap` blocks; `nbytes` is what tables go by."""

    cap: int | None
    collective: str
    placement: str
    nbytes: int
    send: torch.Tensor
    recv: torch.Tensor

    def call(self, comm: tdccl.Communicator) -> Callable[[], object]:
        if self.collective == "broadcast":
            return lambda: comm.broadcast(self.recv)
        return lambda: getattr(comm, self.collective)(self.send, self.recv)

    def table(self, algorithm: str, changes: dict[str, int]) -> tuning.Table:
        """A table that leaves no choice."""
        row = tuning.Row(None, algorithm, changes)
        return tuning.Table("tried", {self.collective: {placement: [row] for placement in PLACEMENTS}})


def tasks(comm: tdccl.Communicator, collectives: list[str], sizes: list[int], caps: list[int]) -> Iterator[Task]:
    """Every task, sizes growing; under the caps only large ones, for small ones take few blocks anyway."""
    memory = {
        "plain": [torch.zeros(sizes[-1], dtype=torch.uint8, device=comm.device) for _ in range(2)],
        "symmetric": [comm.empty(sizes[-1], torch.uint8) for _ in range(2)],
    }
    large = [size for size in sizes if size >= _LARGE][::-2][::-1]
    rounds = [(None, size) for size in sizes] + [(cap, size) for cap in caps for size in large]
    for (cap, size), collective, placement in itertools.product(rounds, collectives, PLACEMENTS):
        send, recv = (buffer[:size].view(torch.bfloat16) for buffer in memory[placement])
        chunk = size
        if collective in _CHUNKED:
            chunk = size // comm.size // 16 * 16
            send, recv = (buffer[: chunk * comm.size // 2] for buffer in (send, recv))
        if collective == "all_gather":
            send = send[: chunk // 2]
        if collective == "reduce_scatter":
            recv = recv[: chunk // 2]
        yield Task(cap, collective, placement, chunk, send, recv)


class Candidate(NamedTuple):
    """One way to do a task."""

    algorithm: Algorithm
    changes: dict[str, int]
    geometry: Geometry


class Tuner:
    """Measures tasks one after another; every method is collective."""

    def __init__(self, comm: tdccl.Communicator, bootstrap):
        self._comm, self._bootstrap = comm, bootstrap
        self._clock = clock_for(comm, bootstrap, graph=True)
        self._given = comm.table
        self._hopeless: set[tuple[str, str, str]] = set()

    def candidates(self, task: Task) -> list[Candidate]:
        """The present choice, then all else that fits, each geometry once."""
        self._comm.use_table(self._given)
        self._comm.limit_blocks(task.cap)
        present = self._comm.explain(task.collective, task.send, task.recv).choice
        row = self._given.row(task.collective, task.placement, task.nbytes, task.cap)
        changes = row.changes if row is not None and row.algorithm == present.algorithm.name else {}
        found = [Candidate(present.algorithm, changes, present.geometry)]
        for algorithm in ALGORITHMS[task.collective]:
            if algorithm.path == "symmetric" and task.placement == "plain":
                continue
            if algorithm.multimem is not None and self._comm.multicast.kind == "unicast":
                continue  # a stand-in for tests
            for shape in shapes(algorithm, task.cap):
                self._comm.use_table(task.table(algorithm.name, shape))
                choice = self._comm.explain(task.collective, task.send, task.recv).choice
                known = any((each.algorithm, each.geometry) == (algorithm, choice.geometry) for each in found)
                if choice.algorithm is algorithm and not known:
                    found.append(Candidate(algorithm, shape, choice.geometry))
        return found

    def compile(self, everything: list[tuple[Task, list[Candidate]]]) -> int:
        """Compiles all kernels on all cores, each rank its share; returns how many there are."""
        if environment.emulated():
            return 0
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(self._comm.device))
        distinct = {}
        for task, candidates in everything:
            op = "sum" if "reduce" in task.collective else None
            for algorithm, _, geometry in candidates:
                key = aot.key_of(algorithm, geometry, op, self._comm._context)
                job = aot.Job(arch, self._comm.size, task.collective, algorithm.name, geometry, op)
                distinct.setdefault(key, job)
        share = list(distinct.values())[self._comm.rank :: self._comm.size]
        cores = max(1, len(os.sched_getaffinity(0)) // self._comm.size)
        with multiprocessing.get_context("spawn").Pool(cores) as workers:
            workers.map(aot.warm, share, chunksize=1)
        self._bootstrap.barrier()
        return len(distinct)

    def measure(self, task: Task, candidates: list[Candidate]) -> list[Measured]:
        """The times of the candidates, the present choice first, less those that have become hopeless."""
        found: list[Measured] = []
        self._comm.limit_blocks(task.cap)
        for algorithm, changes, _ in candidates:
            if found and (task.collective, task.placement, algorithm.name) in self._hopeless:
                continue
            self._comm.use_table(task.table(algorithm.name, changes))
            time = slowest(self._clock, self._bootstrap, task.call(self._comm), lambda: None, self._effort(found))
            sent = algorithm.sent(self._comm.size) * task.nbytes
            found.append(Measured(algorithm.name, changes, sent, round(time, 3)))
        best = min(each.time_us for each in found)
        for algorithm in {each.algorithm for each in candidates if each.algorithm.path == "packets"}:
            times = [each.time_us for each in found if each.algorithm == algorithm.name]
            if times and min(times) > _HOPELESS * best:
                self._hopeless.add((task.collective, task.placement, algorithm.name))
        return found

    def _effort(self, found: list[Measured]) -> Effort:
        """Calls enough for a millisecond or so, but two at least."""
        if environment.emulated():
            return Effort(iters=1, warmup=1, repetitions=1)
        expected = found[-1].time_us if found else 100.0
        return Effort(iters=int(min(20, max(2, 1000 / expected))), warmup=1, repetitions=5)


# What was measured, sizes growing, by cap, collective and placement.
Points = dict[tuple[int | None, str, str], list[tuple[int, list[Measured]]]]


def rows_of(points: list[tuple[int, list[Measured]]]) -> list[tuning.Row]:
    """The rows for one collective and placement, from what was measured at growing sizes."""
    rows: list[tuning.Row] = []
    for i, (nbytes, found) in enumerate(points):
        fastest = min(each.time_us for each in found)
        best = min((each for each in found if each.time_us * _AS_GOOD <= fastest), key=_blocks_and_time)
        if rows:
            last = rows[-1]
            same = [each for each in found if (each.algorithm, each.changes) == (last.algorithm, last.changes)]
            if same and same[0].time_us * _WORTH <= best.time_us:
                best = same[0]
        following = points[i + 1][0] if i + 1 < len(points) else nbytes
        rows.append(tuning.Row(int((nbytes * following) ** 0.5), best.algorithm, best.changes))
    return merged(rows)


def _blocks_and_time(each: Measured) -> tuple[int, float]:
    return each.changes.get("blocks", tuning.GPU.blocks), each.time_us


def _parse(arguments: list[str]) -> argparse.Namespace:
    first, _, others = __doc__.partition("\n")
    last = others.rstrip().rpartition("\n")[2]
    parser = argparse.ArgumentParser(prog="python -m tdccl.tune", description=first, epilog=last)
    add = parser.add_argument
    add("collectives", nargs="*", default=COLLECTIVES, metavar="COLLECTIVE", help=f"default: {', '.join(COLLECTIVES)}")
    add("-b", "--smallest", type=int, default=10, help="log2 of the smallest message in bytes (default 10)")
    add("-e", "--largest", type=int, default=30, help="log2 of the largest message in bytes (default 30)")
    add("-f", "--factor", type=int, default=1, help="log2 of the step from one size to the next (default 1)")
    add("-c", "--caps", type=_numbers, default="16,32", help="also tune for at most so many blocks (default 16,32)")
    add("-o", "--output", type=Path, help="the file to write (default: GPU-RANKS.json here)")
    options = parser.parse_args(arguments)
    if unknown := set(options.collectives) - set(COLLECTIVES):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(COLLECTIVES)}")
    if not _SMALLEST <= options.smallest <= options.largest <= _LARGEST or options.factor < 1 or 0 in options.caps:
        parser.error(
            f"-b {options.smallest} -e {options.largest} -f {options.factor} -c {options.caps}: expected "
            f"{_SMALLEST} <= -b <= -e <= {_LARGEST}, -f and -c of 1 or more"
        )
    if options.output and (options.output.is_dir() or not options.output.parent.is_dir()):
        parser.error(f"-o is {options.output}: expected a file in a folder that exists")
    return options


def main(arguments: list[str]) -> None:
    """Measures, writes the table, and says what it changes; collective."""
    if arguments[:1] == ["products"]:
        tune_products.main(arguments[1:])
        return
    options = _parse(arguments)
    comm = tdccl.init()
    if len(comm.topology.nodes) > 1:
        raise SystemExit("tables are for the ranks of one node: start as many as there are on one")
    bootstrap = discover(timeout=comm.timeout)
    bootstrap.interrupt = comm.raise_fault  # nobody waits for a rank that has ended
    sizes = [1 << power for power in range(options.smallest, options.largest + 1, options.factor)]
    log = print if comm.rank == 0 else lambda *_, **__: None
    tuner = Tuner(comm, bootstrap)
    everything = [(task, tuner.candidates(task)) for task in tasks(comm, options.collectives, sizes, options.caps)]
    log(f"compiled {tuner.compile(everything)} kernels", flush=True)
    points: Points = {}
    for task, candidates in everything:
        found = tuner.measure(task, candidates)
        points.setdefault((task.cap, task.collective, task.placement), []).append((task.nbytes, found))
        log(_line(task, found), flush=True)
    if comm.rank == 0:
        output = options.output or Path(f"{comm.gpu.replace(' ', '-')}-{comm.size}.json")
        output.write_text(_dumped(comm, points, arguments))
        log(f"wrote {output}; use it by TDCCL_TUNING={output}")
    comm.destroy()


def _line(task: Task, found: list[Measured]) -> str:
    """What was found at one size, and what it changes."""
    before, best = found[0], min(found, key=lambda each: each.time_us)
    head = f"{task.cap or 'any':>3} blocks  " if task.cap else ""
    head += f"{task.collective:15}{task.placement:10}{task.nbytes:>12} B  {best.time_us:9.2f} us  {best.algorithm:22}"
    head += " ".join(f"{name}={value}" for name, value in best.changes.items())
    if best.time_us < before.time_us * _WORTH:
        head += f"  (was {before.algorithm}, {before.time_us:.2f} us)"
    return head


def _dumped(comm: tdccl.Communicator, points: Points, arguments: list[str]) -> str:
    """The table as JSON, a row a line."""
    measured = []
    for (cap, collective, placement), found in points.items():
        for nbytes, each in found if cap is None else ():
            for name in dict.fromkeys(one.algorithm for one in each):
                best = min((one for one in each if one.algorithm == name), key=lambda one: one.time_us)
                point = {"collective": collective, "placement": placement, "algorithm": name, "bytes": nbytes}
                measured.append({**point, "sent": best.sent, "time_us": best.time_us})
    caps = dict.fromkeys(cap for cap, _, _ in points if cap is not None)
    made = {
        "gpu": comm.gpu,
        "world": comm.size,
        "multicast": comm.multicast.kind == "switch",
        "versions": {"tdccl": tdccl.__version__, "torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([f"mpirun -n {comm.size} python -m tdccl.tune", *_without_path(arguments)]),
        "rows": _section(points, None),
        "capped": {str(cap): _section(points, cap) for cap in caps},
        "measured": measured,
    }
    return dumped(made)


def _section(points: Points, cap: int | None) -> dict[str, dict[str, list]]:
    """The rows under a cap; at sizes that were not tuned under it, those without one."""
    rows: dict[str, dict[str, list]] = {}
    for collective, placement in [(collective, placement) for any, collective, placement in points if any is None]:
        found = points[None, collective, placement]
        capped = points.get((cap, collective, placement), found)
        smaller = [point for point in found if point[0] < capped[0][0]]
        listed = [row._asdict() for row in rows_of([*smaller, *capped])]
        rows.setdefault(collective, {})[placement] = listed
    return rows


def _without_path(arguments: list[str]) -> list[str]:
    """The arguments with the output's bare name: folders are of no interest to others."""
    return [Path(argument).name if "/" in argument else argument for argument in arguments]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


if __name__ == "__main__":
    main(sys.argv[1:])
