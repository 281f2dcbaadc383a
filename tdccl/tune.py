"""Measures a tuning table for this kind of GPU and number of ranks: `mpirun -n 4 python -m tdccl.tune`.

Each collective is timed in a CUDA graph, in plain and in symmetric memory, at each size, by each algorithm, in each
shape worth a try. What was the fastest makes the rows; the best time of each algorithm is kept for the cost model.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
import triton

import tdccl
from tdccl import environment, tuning
from tdccl.collectives import ALGORITHMS
from tdccl.runtime.algorithm import Algorithm
from tdccl.timing import Effort, clock_for, slowest
from tdccl.transport.bootstrap import discover
from tdccl.tuning.table import PLACEMENTS, dumped, merged

COLLECTIVES = [name for name in ALGORITHMS if name != "barrier"]
# Chunk, not message, is what tables go by; these have a chunk a rank.
_CHUNKED = ("all_gather", "reduce_scatter", "all_to_all")
# A new choice has to beat the one before by this much, so that rows stay few and curves smooth.
_WORTH = 0.98
# An algorithm this many times slower than the best is not tried at larger sizes.
_HOPELESS = 3.0


def shapes(algorithm: Algorithm) -> list[dict[str, int]]:
    """What is tried of the rules: on few blocks and on many, in short tiles and in long."""
    if algorithm.path == "packets":
        tried = [(64, 1), (128, 2), (256, 2), (256, 4), (512, 4), (512, 8), (1024, 8), (1024, 16)]
        return [{"packet_tile": tile, "packet_warps": warps} for tile, warps in tried]
    tiles = [(8, 8), (16, 8), (16, 16), (32, 16), (64, 16)]
    found = [
        {"tile": tile << 10, "warps": warps, "blocks": blocks}
        for (tile, warps), blocks in itertools.product(tiles, (32, 64, 128))
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
    """One collective in one placement at one size; `nbytes` is what tables go by."""

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


def tasks(comm: tdccl.Communicator, collectives: list[str], sizes: list[int]) -> Iterator[Task]:
    """Every task, sizes growing."""
    memory = {
        "plain": [torch.zeros(sizes[-1], dtype=torch.uint8, device=comm.device) for _ in range(2)],
        "symmetric": [comm.empty(sizes[-1], torch.uint8) for _ in range(2)],
    }
    for collective, placement, size in itertools.product(collectives, PLACEMENTS, sizes):
        send, recv = (buffer[:size].view(torch.bfloat16) for buffer in memory[placement])
        chunk = size
        if collective in _CHUNKED:
            chunk = size // comm.size // 16 * 16
            send, recv = (buffer[: chunk * comm.size // 2] for buffer in (send, recv))
        if collective == "all_gather":
            send = send[: chunk // 2]
        if collective == "reduce_scatter":
            recv = recv[: chunk // 2]
        yield Task(collective, placement, chunk, send, recv)


class Tuner:
    """Measures tasks one after another; every method is collective."""

    def __init__(self, comm: tdccl.Communicator, bootstrap, log: Callable[[str], None]):
        self._comm, self._bootstrap, self._log = comm, bootstrap, log
        self._clock = clock_for(comm, bootstrap, graph=True)
        self._given = comm.table
        self._hopeless: set[tuple[str, str, str]] = set()

    def measure(self, task: Task) -> list[Measured]:
        """The times of all that fits, the present choice first."""
        found = []
        for algorithm, changes in self._candidates(task):
            self._comm.use_table(task.table(algorithm.name, changes))
            time = slowest(self._clock, self._bootstrap, task.call(self._comm), lambda: None, self._effort(found))
            sent = algorithm.sent(self._comm.size) * task.nbytes
            found.append(Measured(algorithm.name, changes, sent, round(time, 3)))
        best = min(each.time_us for each in found)
        for name in {each.algorithm for each in found}:
            if min(each.time_us for each in found if each.algorithm == name) > _HOPELESS * best:
                self._hopeless.add((task.collective, task.placement, name))
        return found

    def _candidates(self, task: Task) -> Iterator[tuple[Algorithm, dict[str, int]]]:
        """The present choice, then all that fits, each geometry once."""
        comm, seen = self._comm, []
        comm.use_table(self._given)
        present = comm.explain(task.collective, task.send, task.recv).choice.algorithm
        row = self._given.row(task.collective, task.placement, task.nbytes)
        changes = row.changes if row is not None and row.algorithm == present.name else {}
        every = [(a, shape) for a in ALGORITHMS[task.collective] for shape in shapes(a)]
        for algorithm, shape in [(present, changes), *every]:
            if algorithm is not present and (task.collective, task.placement, algorithm.name) in self._hopeless:
                continue
            if algorithm.path == "symmetric" and task.placement == "plain":
                continue
            comm.use_table(task.table(algorithm.name, shape))
            choice = comm.explain(task.collective, task.send, task.recv).choice
            if choice.algorithm is algorithm and (algorithm, choice.geometry) not in seen:
                seen.append((algorithm, choice.geometry))
                yield algorithm, shape

    def _effort(self, found: list[Measured]) -> Effort:
        """Calls enough for a millisecond or so, but two at least."""
        expected = found[-1].time_us if found else 100.0
        if environment.emulated():
            return Effort(iters=1, warmup=1, repetitions=1)
        return Effort(iters=int(min(20, max(2, 1000 / expected))), warmup=1, repetitions=5)


def rows_of(points: list[tuple[int, list[Measured]]]) -> list[tuning.Row]:
    """The rows for one collective and placement, from what was measured at growing sizes."""
    rows: list[tuning.Row] = []
    for i, (nbytes, found) in enumerate(points):
        best = min(found, key=lambda each: each.time_us)
        if rows:
            last = rows[-1]
            same = [each for each in found if (each.algorithm, each.changes) == (last.algorithm, last.changes)]
            if same and same[0].time_us * _WORTH <= best.time_us:
                best = same[0]
        following = points[i + 1][0] if i + 1 < len(points) else nbytes
        rows.append(tuning.Row(int((nbytes * following) ** 0.5), best.algorithm, best.changes))
    return merged(rows)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tdccl.tune", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("collectives", nargs="*", default=COLLECTIVES, metavar="COLLECTIVE", help=f"default: {', '.join(COLLECTIVES)}")
    add("-b", "--smallest", type=int, default=10, help="log2 of the smallest message in bytes (default 10)")
    add("-e", "--largest", type=int, default=30, help="log2 of the largest message in bytes (default 30)")
    add("-f", "--factor", type=int, default=1, help="log2 of the step from one size to the next (default 1)")
    add("-o", "--output", type=Path, help="the file to write (default: GPU-RANKS.json here)")
    options = parser.parse_args(arguments)
    if unknown := set(options.collectives) - set(COLLECTIVES):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(COLLECTIVES)}")
    return options


def main(arguments: list[str]) -> None:
    """Measures, writes the table, and says what it changes; collective."""
    options = _parse(arguments)
    comm = tdccl.init()
    bootstrap = discover(timeout=comm.timeout)
    sizes = [1 << power for power in range(options.smallest, options.largest + 1, options.factor)]
    log = print if comm.rank == 0 else lambda *_, **__: None
    tuner = Tuner(comm, bootstrap, log)
    points: dict[tuple[str, str], list[tuple[int, list[Measured]]]] = {}
    for task in tasks(comm, options.collectives, sizes):
        found = tuner.measure(task)
        points.setdefault((task.collective, task.placement), []).append((task.nbytes, found))
        log(_line(task, found), flush=True)
    if comm.rank == 0:
        output = options.output or Path(f"{comm.gpu.replace(' ', '-')}-{comm.size}.json")
        output.write_text(_dumped(comm, points, arguments))
        log(f"wrote {output}; use it by TDCCL_TUNING={output}")
    comm.destroy()


def _line(task: Task, found: list[Measured]) -> str:
    """What was found at one size, and what it changes."""
    before, best = found[0], min(found, key=lambda each: each.time_us)
    head = f"{task.collective:15}{task.placement:10}{task.nbytes:>12} B  {best.time_us:9.2f} us  {best.algorithm:22}"
    head += " ".join(f"{name}={value}" for name, value in best.changes.items())
    if best.time_us < before.time_us * _WORTH:
        head += f"  (was {before.algorithm}, {before.time_us:.2f} us)"
    return head


def _dumped(comm: tdccl.Communicator, points, arguments: list[str]) -> str:
    """The table as JSON, a row a line."""
    rows: dict[str, dict[str, list]] = {}
    measured = []
    for (collective, placement), found in points.items():
        listed = [{**row._asdict()} for row in rows_of(found)]
        rows.setdefault(collective, {})[placement] = listed
        for nbytes, each in found:
            for name in dict.fromkeys(one.algorithm for one in each):
                best = min((one for one in each if one.algorithm == name), key=lambda one: one.time_us)
                point = {"collective": collective, "placement": placement, "algorithm": name, "bytes": nbytes}
                measured.append({**point, "sent": best.sent, "time_us": best.time_us})
    made = {
        "gpu": comm.gpu,
        "world": comm.size,
        "versions": {"tdccl": tdccl.__version__, "torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([f"mpirun -n {comm.size} python -m tdccl.tune", *arguments]),
        "rows": rows,
        "measured": measured,
    }
    return dumped(made)


if __name__ == "__main__":
    main(sys.argv[1:])
