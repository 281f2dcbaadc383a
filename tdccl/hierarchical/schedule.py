"""What the algorithms across nodes send, and in how many steps, counted from the layout that plans their calls."""

from typing import NamedTuple

from tdccl.hierarchical.layout import wire_of
from tdccl.runtime.algorithm import ITEMSIZE, Algorithm, Call, Context, words_of

_PACKET_BYTES = 8


class Stage(NamedTuple):
    """What the busiest rank sends in one stage of a call.

    inside  bytes to the ranks of its node
    across  bytes to other nodes
    """

    inside: int
    across: int


class Schedule(NamedTuple):
    """A call in steps, in each of which every stage takes a turn for each node.

    blocks  that work at once
    steps   of the block that has the most
    turns   in a step in which the ranks of a node wait for each other's signals: none on nodes of one
    stages  one after another, all of the whole call
    """

    blocks: int
    steps: int
    turns: int
    stages: tuple[Stage, ...]


def schedule_of(algorithm: Algorithm, call: Call, context: Context) -> Schedule:
    """The schedule of a call by an algorithm of `tdccl.hierarchical`."""
    geometry, nodes, width = algorithm.geometry(call, context), context.nodes, context.size
    tile, has_peers = geometry.constants["TILE"], width > 1
    if algorithm.packets is not None:
        word = 4 if call.itemsize < 8 else 8
        inside = (width - 1) * words_of(call) * word // 4 * _PACKET_BYTES
        return Schedule(geometry.grid, 1, int(has_peers), (Stage(inside, (nodes - 1) * geometry.grid * tile * word),))
    tiles = -(-geometry.counts["part"] // tile)
    moved = tiles * tile * ITEMSIZE[geometry.dtype]  # of one rank's part, in whole tiles
    inside, across = nodes * (width - 1) * moved, (nodes - 1) * moved
    sums = Stage(inside, across * ITEMSIZE[wire_of(call)] // call.itemsize)
    shares = Stage(inside, across)
    stages = {
        "all_reduce": (sums, shares),
        "reduce_scatter": (sums,),
        "all_gather": (shares,),
        "broadcast": (shares, shares),
        "all_to_all": (Stage(inside, width * across),),
    }[call.collective]
    return Schedule(geometry.grid, -(-tiles // geometry.grid), nodes * has_peers, stages)
