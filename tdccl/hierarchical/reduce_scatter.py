"""reduce_scatter across nodes: rank r ends with the reduction of all ranks' r-th chunks, with the bits of all_reduce.

rails   reduced inside, then by the chunk's rank across, pipelined
"""

import triton
import triton.language as tl

import tdccl.language as shmem
import tdccl.language.rails as rails
from tdccl.hierarchical import stages
from tdccl.hierarchical.layout import in_chunks, wire_of
from tdccl.runtime.algorithm import Algorithm


@triton.jit
def through_rails(
    team, rail, send, recv, count, part,
    DTYPE: tl.constexpr, WIRE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The ranks of a node add a tile of each other node's chunks in a turn; a step later those of all nodes are added.

    Waits, ordering, reuse: those of the stages.
    """
    epoch = shmem.begin(team)
    steps = shmem.steps_of(part, TILE)
    turns = steps * rail.nodes
    for turn in range(turns + rail.nodes + 1):
        if turn < turns:
            node = stages.others_first(rail, turn)
            stages.push_parts(team, epoch, turn, node, turn // rail.nodes, send, part, count, DTYPE, TILE)
            shmem.signal_all(team, epoch, shmem.DATA, turn + 1)
        if (turn >= 1) & (turn <= turns):
            node, step = stages.others_first(rail, turn - 1), (turn - 1) // rail.nodes
            epoch = stages.forward_sum(
                team, rail, epoch, turn - 1, node, step, send, part, count, DTYPE, WIRE, OP, TILE, ALIGN
            )
        step = turn // rail.nodes - 2
        if (turn % rail.nodes == 0) & (step >= 0):
            own = rails.out_slot(rail, rails.INPUTS, rail.node, step, WIRE)
            epoch, total = stages.add_nodes(team, rail, epoch, rails.INPUTS, own, DTYPE, WIRE, OP, TILE)
            index = shmem.span_start(step, TILE) + tl.arange(0, TILE)
            tl.store(recv + index, total, mask=index < part)
    shmem.end(team, epoch)


def _rails(call, context):
    return in_chunks(call, context, rings=context.size - 1, wire=wire_of(call))


ALGORITHMS = [Algorithm("rails", through_rails, _rails, sent=lambda n: n - 1)]
