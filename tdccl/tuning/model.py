"""The cost model: what an algorithm would take on GPUs or on a number of ranks that nobody measured.

    microseconds = latency + latency a peer x (ranks - 1) + bytes sent / bandwidth

Its three numbers are fitted, for each algorithm and placement, to all measured tables: least squares of the relative
error. It chooses algorithms; grid and tiles are those of the measured table with the nearest number of ranks.

NVLS algorithms were never measured. Each is taken to wait as long as the algorithm that has the same barriers or
pipeline, and to send at what NCCL's reach on 8 H100s.
"""

import itertools
import json
from collections import defaultdict
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tdccl.tuning.table import PLACEMENTS, Row, Sent, Table, merged, package_files, parse

_SIZES = [1 << power for power in range(6, 32)]
# NVLS algorithms, and those with the same waits.
_WAITS_LIKE = {
    "all_reduce": {
        "nvls_one_shot": "two_shot_pull",
        "nvls_two_shot": "two_shot_pull",
        "nvls_one_shot_staged": "two_shot_staged",
        "nvls_two_shot_staged": "two_shot_staged",
    },
    "all_gather": {"nvls_push": "push", "nvls_staged": "staged"},
    "reduce_scatter": {"nvls_reduce": "pull", "nvls_staged": "staged"},
    "broadcast": {"nvls_push": "scatter_gather_direct", "nvls_staged": "scatter_gather_staged"},
}
# An all_reduce with a busbw of 480 GB/s at 8 ranks sends 1 + 1/8 of its message through the switch at 309 GB/s.
_SWITCH_GBPS = 309
# What was never measured must promise this much more than what was.
_WORTH = 0.9
# A fraction of the blocks keeps the switch busy.
_SWITCH_SHAPE = {"blocks": 32, "warps": 16, "tile": 32 << 10}


class Cost(NamedTuple):
    """Microseconds, microseconds, microseconds a byte sent."""

    latency: float
    latency_a_peer: float
    a_byte: float

    def microseconds(self, ranks: int, sent: float) -> float:
        """Time of a call in which the busiest rank sends `sent` bytes."""
        return self.latency + self.latency_a_peer * (ranks - 1) + self.a_byte * sent


def fit(points: list[tuple[int, float, float]]) -> Cost:
    """The cost that fits points of (ranks, bytes sent, microseconds) best, with no number below zero."""
    ranks, sent, times = (np.array(column, dtype=float) for column in zip(*points))
    columns = [np.ones(len(points)), ranks - 1, sent]
    used = [0, 2] if len(set(ranks)) == 1 else [0, 1, 2]  # from one number of ranks nothing is learnt about others
    found = np.zeros(3)
    while used:
        system = np.stack([columns[i] / times for i in used], axis=1)
        scale = np.maximum(np.abs(system).max(axis=0), 1e-30)
        solution = np.linalg.lstsq(system / scale, np.ones(len(points)), rcond=None)[0] / scale
        if (solution >= 0).all():
            found[used] = solution
            break
        used = [i for i, value in zip(used, solution) if value > 0]
    return Cost(*found)


class Rival(NamedTuple):
    """An algorithm's cost, and the largest size at which it was worth measuring."""

    cost: Cost
    largest: int


def rivals_in(tables: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Rival]]:
    """{(collective, placement): {algorithm: rival}} from the measurements that tables keep."""
    points: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for made in tables:
        for point in made["measured"]:
            times = points[point["collective"], point["placement"]][point["algorithm"]]
            times.append((point["bytes"], made["world"], point["sent"], point["time_us"]))
    return {
        key: {
            algorithm: Rival(fit([time[1:] for time in times]), max(time[0] for time in times))
            for algorithm, times in algorithms.items()
        }
        for key, algorithms in points.items()
    }


def table(gpu: str, world: int, sent: Sent) -> Table:
    """A modelled table from the package's measured ones; without any it is empty, and algorithms only have to fit."""
    tables = [json.loads(path.read_text()) for path in package_files()]
    if not tables:
        return Table("nothing measured yet", {})
    nearest = min(tables, key=lambda made: (abs(made["world"] - world), made["world"]))
    shapes = parse(nearest, "nearest")
    known = rivals_in(tables)
    rows: dict[str, dict[str, list[Row]]] = {}
    for collective, placement in itertools.product(nearest["rows"], PLACEMENTS):
        rivals = known[collective, placement]
        limit = max(rival.largest for rival in rivals.values())
        modelled = []
        for nbytes in _SIZES:
            times = {
                name: rival.cost.microseconds(world, sent(collective, name, nbytes, world))
                for name, rival in rivals.items()
                if rival.largest >= min(nbytes, limit)
            }
            fastest = min(times, key=lambda algorithm: (times[algorithm], algorithm))
            modelled.append(Row(nbytes, fastest, _changes(shapes, collective, placement, nbytes, fastest)))
        rows.setdefault(collective, {})[placement] = merged(modelled)
    sources = ", ".join(f"{made['world']} x {made['gpu']}" for made in tables)
    return Table(f"modelled for {world} x {gpu} from {sources}", rows)


def with_multicast(table: Table, world: int, sent: Sent) -> Table:
    """The table, with NVLS algorithms where the model has them faster than what the table chooses."""
    known = rivals_in([json.loads(path.read_text()) for path in package_files()])
    rows = {collective: dict(placements) for collective, placements in table.rows.items()}
    for collective, placement in itertools.product(_WAITS_LIKE, PLACEMENTS):
        costs = {name: rival.cost for name, rival in known[collective, placement].items()}
        switched = {
            name: costs[like]._replace(a_byte=1 / (_SWITCH_GBPS * 1e3))
            for name, like in _WAITS_LIKE[collective].items()
            if like in costs
        }
        costs |= switched
        modelled = []
        given = table.rows.get(collective, {}).get(placement, [])
        for nbytes in sorted({*_SIZES, *(row.upto for row in given if row.upto)} if given else ()):
            row = table.row(collective, placement, nbytes)
            if row.algorithm not in costs:
                modelled.append(row._replace(upto=nbytes))
                continue
            times = {
                name: costs[name].microseconds(world, sent(collective, name, nbytes, world))
                for name in [row.algorithm, *switched]
            }
            fastest = min(times, key=times.get)
            if times[fastest] < _WORTH * times[row.algorithm]:
                modelled.append(Row(nbytes, fastest, _SWITCH_SHAPE))
            else:
                modelled.append(row._replace(upto=nbytes))
        if modelled:
            rows[collective][placement] = merged(modelled)
    return replace(table, source=f"{table.source}; NVLS modelled, not measured", rows=rows)


def _changes(shapes: Table, collective: str, placement: str, nbytes: int, algorithm: str) -> dict[str, int]:
    """The shape that the measured table gives this algorithm at this size, if it chose it there."""
    row = shapes.row(collective, placement, nbytes)
    return row.changes if row is not None and row.algorithm == algorithm else {}
