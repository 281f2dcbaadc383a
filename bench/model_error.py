"""How far `tdccl.model` is off what was measured: `python -m bench.model_error bench/results/2xH200-nodes.json`.

Of the links only the bandwidth and the latency across are fitted, and on the all_reduces alone; the other collectives
are foretold. Compared are times in CUDA graphs.
"""

import argparse
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench import reading
from tdccl import model
from tdccl.decisions import ACROSS_NODES
from tdccl.hierarchical.schedule import Schedule, schedule_of

FITTED_ON = "all_reduce"


class Point(NamedTuple):
    """A measured call: `us` microseconds, and the schedule that it has by its algorithm."""

    collective: str
    algorithm: str
    nbytes: int
    us: float
    schedule: Schedule


class Comparison(NamedTuple):
    """Points, what the model says of each in microseconds, and the links that it was told."""

    points: list[Point]
    predicted: list[float]
    links: model.Links

    def errors(self, fitted: bool) -> list[float]:
        """|predicted / measured - 1| of the points that the links were fitted on, or of the others."""
        both = zip(self.points, self.predicted)
        return [abs(us / point.us - 1) for point, us in both if (point.collective == FITTED_ON) == fitted]

    def summary(self) -> str:
        """How far the model is off, in words."""
        fitted, foretold = (
            f"{100 * np.mean(errors):.0f}% in the mean and {100 * max(errors):.0f}% at most"
            for errors in (self.errors(True), self.errors(False))
        )
        inside = any(stage.inside for point in self.points for stage in point.schedule.stages)
        alone = "" if inside else " Nodes are of one: no stage inside a node is compared."
        links = f"{self.links.across:.0f} GB/s and {self.links.across_us:.1f} us across"
        return (
            f"Model: {links}, fitted on the {FITTED_ON}s: of these it is off by {fitted}; "
            f"of the other collectives, which it foretells, by {foretold}.{alone}"
        )


def compare(report: dict) -> Comparison | None:
    """The model beside a report of `bench.nodes_check` on GPUs; None if nothing was measured in graphs."""
    drawn = re.search(r"as (\d+) nodes of (\d+)", report["host"])
    points = _points(report["nodes"], *map(int, drawn.groups())) if drawn and report["gpu"] else []
    if not any(point.collective == FITTED_ON for point in points):
        return None
    nodes = int(drawn[1])
    links = _fitted([point for point in points if point.collective == FITTED_ON], nodes)
    return Comparison(points, [model.predicted(point.schedule, nodes, links) for point in points], links)


def _points(rows: Iterable[dict], nodes: int, width: int) -> list[Point]:
    context, found = model.context_of(nodes, width), []
    for row in rows:
        name = row["collective"]
        out_of_place = row["in_place"] == (name == "broadcast")  # which is always in place
        if name in model.COLLECTIVES and row["mode"] == "graph" and row["dtype"] == "bfloat16" and out_of_place:
            (algorithm,) = (each for each in ACROSS_NODES[name] if each.name == row["algorithm"])
            schedule = schedule_of(algorithm, model.call_of(name, row["bytes"], nodes * width), context)
            found.append(Point(name, algorithm.name, row["bytes"], row["time_us"], schedule))
    return found


def _fitted(points: list[Point], nodes: int) -> model.Links:
    """The links whose worst error is least, of a grid of bandwidths 2% apart and latencies 0.1 us apart."""

    def worst(links: model.Links) -> float:
        return max(abs(np.log(model.predicted(point.schedule, nodes, links) / point.us)) for point in points)

    grid = itertools.product(np.geomspace(10, 500, 200), np.arange(5, 201) / 10)
    return min((model.Links(across=float(speed), across_us=float(us)) for speed, us in grid), key=worst)


def main() -> None:
    """Prints each point beside what the model says of it, and how far it is off."""
    parser = argparse.ArgumentParser(prog="python -m bench.model_error", description=__doc__.partition(":")[0])
    parser.add_argument("file", type=Path, help="written by `python -m bench.nodes_check -J FILE` on GPUs")
    path = parser.parse_args().file
    try:
        found = compare(*reading.read([path]))
    except ValueError as error:
        parser.error(str(error))
    if found is None:
        parser.error(f"{path} has no all_reduce across nodes in a CUDA graph")
    for point, us in zip(found.points, found.predicted):
        what = f"{point.collective}, {point.algorithm}"
        print(f"{what:<30}{reading.size(point.nbytes):>8}{point.us:>10.1f} us{us:>10.1f} us{us / point.us - 1:>+8.0%}")
    print(found.summary())


if __name__ == "__main__":
    main()
