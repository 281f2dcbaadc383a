"""all_gather across nodes: every rank ends with the chunks of all ranks, in rank order.

rails   every rank sends its chunk to its like in all nodes, and they pass it on inside, pipelined
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.hierarchical import stages
from tdccl.hierarchical.layout import in_chunks
from tdccl.runtime.algorithm import Algorithm


@triton.jit
def through_rails(team, rail, send, recv, count, part, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """A block sends a tile across at the begin of a step, and shares inside what came of the step before.

    Waits, ordering, reuse: those of the stages.
    """
    epoch = shmem.begin(team)
    steps = shmem.steps_of(part, TILE)
    turns = steps * rail.nodes
    for turn in range(turns + rail.nodes + 1):
        if (turn % rail.nodes == 0) & (turn < turns):
            index = shmem.span_start(turn // rail.nodes, TILE) + tl.arange(0, TILE)
            tile = tl.load(send + index, mask=index < part)
            epoch, _ = stages.share_across(team, rail, epoch, tile, DTYPE, TILE)
        epoch = stages.share_and_collect(
            team, rail, epoch, turn - rail.nodes, turns, send, recv, part, count, 0, DTYPE, TILE
        )
    shmem.end(team, epoch)


def _rails(call, context):
    return in_chunks(call, context, rings=context.size - 1)


ALGORITHMS = [Algorithm("rails", through_rails, _rails, sent=lambda n: n - 1)]
