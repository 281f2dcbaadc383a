"""broadcast across nodes: every rank ends with the root's message.

rails   the root gives each rank of every node a different part, by its own node's rails, and they share, pipelined

So the root's links carry the message once, and its node's rails share the work.
"""

import triton
import triton.language as tl

import tdccl.language as shmem
import tdccl.language.rails as rails
from tdccl.hierarchical import stages
from tdccl.hierarchical.layout import in_parts, part_of
from tdccl.runtime.algorithm import Algorithm


@triton.jit
def _hand_out(
    team, rail, epoch, turn, root, source, recv, part, count, DTYPE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """What the root pushed in `turn` goes to the node that it is for, or, if it is for this one, to `recv`.

    Waits:    for DATA of every peer inside, so that slots are reused safely, and for a free slot of the rail.
    Ordering: acquire at sys scope, block barrier, loads; stores, block barrier, put with signal.
    """
    epoch = shmem.wait_all(team, epoch, shmem.DATA, turn + 1)
    node, place = stages.others_first(rail, turn), tl.arange(0, TILE)
    index, mask = stages.tile_of(team, node, team.rank, turn // rail.nodes, part, count, TILE)
    if team.rank == root % team.size:
        tile = tl.load(source + index, mask=mask)
    else:
        ring = (team.rank + team.size - root % team.size) % team.size - 1
        slot = shmem.local_slot(team, epoch, ring, turn, DTYPE, TILE, stages.DEPTH, False)
        tile = tl.load(slot + place, mask=mask)
    if node == rail.node:
        tl.store(recv + index, tile, mask=mask)
    else:
        epoch, number, slot = rails.next_out(team, rail, rails.INPUTS, node, epoch, DTYPE)
        tl.store(slot + place, tile)
        rails.put_tile(team, rail, rails.INPUTS, node, number, slot, TILE * DTYPE.primitive_bitwidth // 8)
    return epoch


@triton.jit
def through_rails(team, rail, send, recv, count, part, root, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """The root's node hands out a tile of each node's parts in a turn; two steps later all share what they have got.

    Waits, ordering, reuse: those of the stages, and of `_hand_out`.
    """
    epoch = shmem.begin(team)
    nodes: tl.constexpr = rail.nodes
    roots = root // team.size
    steps = shmem.steps_of(part, TILE)
    turns = steps * nodes
    mine = (rail.node * team.size + team.rank) * part
    for turn in range(turns + 3 * nodes + 1):
        if (turn < turns) & (rail.node == roots):
            if team.rank == root % team.size:
                node = stages.others_first(rail, turn)
                stages.push_parts(team, epoch, turn, node, turn // nodes, send, part, count, DTYPE, TILE)
            shmem.signal_all(team, epoch, shmem.DATA, turn + 1)
        if (turn >= 1) & (turn <= turns) & (rail.node == roots):
            epoch = _hand_out(team, rail, epoch, turn - 1, root, send, recv, part, count, DTYPE, TILE)
        step = turn // nodes - 2
        if (turn % nodes == 0) & (step >= 0) & (step < steps):
            index, mask = stages.tile_of(team, rail.node, team.rank, step, part, count, TILE)
            if rail.node == roots:
                shmem.fence()  # a thread may read what another has stored
                tile = tl.load(recv + index, mask=mask)
            else:
                epoch, number = rails.next_in(team, rail, rails.INPUTS, roots, epoch)
                tile = tl.load(rails.in_slot(rail, rails.INPUTS, roots, number, DTYPE) + tl.arange(0, TILE))
                rails.took(team, rail, rails.INPUTS, roots, number)
                tl.store(recv + index, tile, mask=mask)
            epoch, _ = stages.share_across(team, rail, epoch, tile, DTYPE, TILE)
        epoch = stages.share_and_collect(
            team, rail, epoch, turn - 3 * nodes, turns, recv + mine, recv, part, count, team.size - 1, DTYPE, TILE
        )
    shmem.end(team, epoch)


def _rails(call, context):
    geometry = in_parts(call, context, part_of(call, context), rings=2 * (context.size - 1))
    return geometry.adding(scalars={"root": call.root})


ALGORITHMS = [Algorithm("rails", through_rails, _rails, sent=lambda n: 2 * (n - 1) / n)]
