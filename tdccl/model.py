"""What collectives would take on nodes x GPUs that nobody has: `python -m tdccl.model all_reduce --nodes 2,16,128`.

Times are predicted from what the algorithms send and in how many steps, which is counted by the code that plans their
calls (`tdccl.hierarchical.schedule`), and from latencies and bandwidths of two links that are given:

    us = launch + fill + (steps - 1) x step
    step: the longest of what NVLink carries, what the network card carries, a signal inside for every turn, a message
          to every node, and the network's latency
    fill: for each stage the time of its first step inside, and across, one after another

Beside them stand a ring and a double binary tree through all GPUs, in the usual terms: bytes over the slowest link, and
hops. None of it has been compared with a real network, and no stage inside a node with anything.
"""

import argparse
import itertools
import sys
from typing import NamedTuple

from tdccl import tuning
from tdccl.decisions import ACROSS_NODES, context_for
from tdccl.errors import InitError
from tdccl.hierarchical.schedule import Schedule, schedule_of
from tdccl.runtime.algorithm import Call, Context

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all")


class Links(NamedTuple):
    """What connects the GPUs; each has a network card of its own.

    inside, across        GB/s that a GPU sends inside its node, and to other nodes
    inside_us, across_us  microseconds until a signal is seen
    message_us            microseconds that one message keeps a block busy that sends it
    launch_us             microseconds until a kernel runs
    """

    inside: float = 350.0
    across: float = 50.0
    inside_us: float = 1.2
    across_us: float = 6.0
    message_us: float = 0.5
    launch_us: float = 2.0


def predicted(schedule: Schedule, nodes: int, links: Links) -> float:
    """Microseconds of a call by this schedule."""
    steps = schedule.steps

    def carried(nbytes: int, gigabytes: float) -> float:
        return nbytes / steps / gigabytes / 1e3

    turns, messages = schedule.turns * links.inside_us, (nodes - 1) * links.message_us
    fill = sum(
        max(turns, carried(stage.inside, links.inside))
        + links.across_us
        + max(messages, carried(stage.across, links.across))
        for stage in schedule.stages
    )
    step = max(
        carried(sum(stage.inside for stage in schedule.stages), links.inside),
        carried(sum(stage.across for stage in schedule.stages), links.across),
        turns,
        messages * len(schedule.stages),
        links.across_us,
    )
    return links.launch_us + fill + (steps - 1) * step


def context_of(nodes: int, width: int, scratch: int = 64 << 20) -> Context:
    """What algorithms know of nodes x width GPUs with so many bytes of scratch."""
    return context_for(width, scratch=scratch, nodes=nodes, rules=tuning.GPU)


def call_of(collective: str, nbytes: int, ranks: int) -> Call:
    """The call with a message of `nbytes` bytes in all, bf16 sums, aligned."""
    whole = collective in ("all_reduce", "broadcast")
    dtype, itemsize, op = ("bf16", 2, "sum") if "reduce" in collective else ("u8", 1, None)
    count = max(16, nbytes if whole else nbytes // ranks // 16 * 16) // itemsize
    return Call(collective, count, dtype, op, 0, 16, None, (None, None), False)


def fastest(collective: str, nbytes: int, context: Context, links: Links) -> tuple[str, float]:
    """(algorithm, microseconds) of what is fastest for a message of `nbytes` bytes in all, bf16 sums, aligned."""
    call = call_of(collective, nbytes, context.nodes * context.size)
    fit = [algorithm for algorithm in ACROSS_NODES[collective] if algorithm.unfit(call, context) is None]
    times = {a.name: predicted(schedule_of(a, call, context), context.nodes, links) for a in fit}
    name = min(times, key=times.get)
    return name, times[name]


def ring(collective: str, nbytes: int, nodes: int, width: int, links: Links) -> float:
    """Microseconds by rings through all GPUs, as many as a node has cards, each of which crosses every node once."""
    ranks = nodes * width
    rounds = {"all_reduce": 2, "broadcast": 1}.get(collective, 1)
    hops = rounds * ((ranks - nodes) * links.inside_us + nodes * links.across_us)
    share = 1.0 if collective == "broadcast" else (ranks - 1) / ranks
    slowest = min(links.inside, width * links.across)
    return links.launch_us + hops + rounds * share * nbytes / slowest / 1e3


def tree(nbytes: int, nodes: int, width: int, links: Links) -> float:
    """Microseconds of an all_reduce by a double binary tree of nodes, with a chain inside each: up, and down again."""
    depth = max(1, (nodes - 1).bit_length())
    hops = 2 * (depth * links.across_us + (width - 1) * links.inside_us)
    return links.launch_us + hops + 2 * nbytes / min(links.inside, width * links.across) / 1e3


def pairwise(nbytes: int, nodes: int, width: int, links: Links) -> float:
    """Microseconds of an all_to_all in which every rank sends a message to every other."""
    ranks = nodes * width
    remote, local = (ranks - width) * nbytes / ranks, (width - 1) * nbytes / ranks
    messages = (ranks - 1) * links.message_us
    return links.launch_us + links.across_us + max(messages, remote / links.across / 1e3, local / links.inside / 1e3)


def busbw(collective: str, nbytes: int, ranks: int, microseconds: float) -> float:
    """GB/s, as nccl-tests counts them."""
    factor = {"all_reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0}.get(collective, (ranks - 1) / ranks)
    return nbytes / microseconds / 1e3 * factor


def lines(collective: str, nodes: int, width: int, sizes: list[int], links: Links, scratch: int) -> list[str]:
    """A table as text: for each size what tdccl would take, and the others beside it."""
    context, ranks = context_of(nodes, width, scratch), nodes * width
    rivals = {
        "all_reduce": {
            "ring": lambda n: ring(collective, n, nodes, width, links),
            "tree": lambda n: tree(n, nodes, width, links),
        },
        "all_to_all": {"pairwise": lambda n: pairwise(n, nodes, width, links)},
    }.get(collective, {"ring": lambda n: ring(collective, n, nodes, width, links)})
    names = "".join(f"{name + ', us':>14}{'busbw':>8}" for name in rivals)
    said = [f"# {collective} on {nodes} nodes of {width}", f"{'bytes':>12}  {'tdccl, us':>10}{'busbw':>8}{names}  by"]
    for nbytes in sizes:
        name, ours = fastest(collective, nbytes, context, links)
        cells = f"{nbytes:>12}  {ours:>10.1f}{busbw(collective, nbytes, ranks, ours):>8.1f}"
        for rival in rivals.values():
            cells += f"{rival(nbytes):>14.1f}{busbw(collective, nbytes, ranks, rival(nbytes)):>8.1f}"
        said.append(f"{cells}  {name}")
    return said


def _at_least(least: float, kind=float):
    """What argparse takes numbers by that must not be less."""

    def number(word: str):
        if not (value := kind(word)) >= least:
            raise argparse.ArgumentTypeError(f"{word} is less than {least}")
        return value

    return number


def _numbers_of_nodes(word: str) -> list[int]:
    return [*map(_at_least(2, int), word.split(","))]


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tdccl.model", description=__doc__.partition(":")[0])
    parser.add_argument("collectives", nargs="*", choices=[*COLLECTIVES, []], help="default: all_reduce")
    counts = {"type": _numbers_of_nodes, "default": "2,16,128"}
    parser.add_argument("--nodes", **counts, help="numbers of nodes, from 2 on (default %(default)s)")
    parser.add_argument("--gpus", type=int, default=8, choices=range(1, 9), help="of a node (default %(default)s)")
    whole = _at_least(1, int)
    parser.add_argument("--scratch", type=whole, default=64, help="MiB, as TDCCL_SCRATCH_MB (default %(default)s)")
    parser.add_argument("-b", "--smallest", type=whole, default=10, help="log2 of bytes (default %(default)s)")
    parser.add_argument("-e", "--largest", type=whole, default=32, help="log2 of bytes (default %(default)s)")
    for name, value in Links()._asdict().items():
        unit, least = ("microseconds", 0) if name.endswith("_us") else ("GB/s a GPU", 0.001)
        about = {"type": _at_least(least), "default": value, "help": f"{unit} (default {value})"}
        parser.add_argument(f"--{name.replace('_', '-')}", **about)
    options = parser.parse_args(words)
    links = Links(*(getattr(options, name) for name in Links._fields))
    sizes = [1 << power for power in range(options.smallest, options.largest + 1, 2)]
    for collective, nodes in itertools.product(options.collectives or ["all_reduce"], options.nodes):
        try:
            said = lines(collective, nodes, options.gpus, sizes, links, options.scratch << 20)
        except InitError as error:  # too little scratch for so many
            parser.error(str(error))
        print("\n".join(said), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
