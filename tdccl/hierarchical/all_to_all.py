"""all_to_all across nodes: rank i's j-th chunk ends as rank j's i-th.

rails   across first, to the rank of the same place in the receiver's node, then inside, pipelined
"""

import triton
import triton.language as tl

import tdccl.language as shmem
import tdccl.language.rails as rails
from tdccl.hierarchical import stages
from tdccl.hierarchical.layout import in_chunks
from tdccl.runtime.algorithm import Algorithm


@triton.jit
def _send_across(team, rail, epoch, node, step, send, part, count, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """Sends this rank's like in `node` a tile of the chunk of each rank there, all in one slot; returns the epoch.

    Waits:    for a free slot of the rail.
    Ordering: stores, block barrier, put with signal.
    """
    epoch, number, slot = rails.next_out(team, rail, rails.INPUTS, node, epoch, DTYPE)
    for local in tl.static_range(team.size):
        index, mask = stages.tile_of(team, node, local, step, part, count, TILE)
        tl.store(slot + local * TILE + tl.arange(0, TILE), tl.load(send + index, mask=mask))
    nbytes: tl.constexpr = team.size * TILE * DTYPE.primitive_bitwidth // 8
    rails.put_tile(team, rail, rails.INPUTS, node, number, slot, nbytes)
    return epoch


@triton.jit
def _pass_inside(
    team, rail, epoch, turn, node, step, send, recv, part, count, DTYPE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Gives each rank of this node its tile of what this rank's like in `node` sent; of this node's, of `send`.

    Signals DATA; returns the epoch.
    Waits:    for the rail's like in `node`, unless that is this rank's own node.
    Ordering: acquire at sys scope, block barrier, loads; stores, block barrier, release at sys scope.
    """
    place, number = tl.arange(0, TILE), tl.full([], 0, tl.int64)
    if node != rail.node:
        epoch, number = rails.next_in(team, rail, rails.INPUTS, node, epoch)
    incoming = rails.in_slot(rail, rails.INPUTS, node, number, DTYPE)
    tiles = ()
    for distance in tl.static_range(team.size):
        local = (team.rank + distance) % team.size
        index, mask = stages.tile_of(team, rail.node, local, step, part, count, TILE)
        tile = tl.load(incoming + local * TILE + place, mask=place < tl.where(node == rail.node, 0, TILE))
        if node == rail.node:
            tile = tl.load(send + index, mask=mask)
        tiles = tiles + (tile,)
    if node != rail.node:
        rails.took(team, rail, rails.INPUTS, node, number)
    index, mask = stages.tile_of(team, node, team.rank, step, part, count, TILE)
    tl.store(recv + index, tiles[0], mask=mask)
    for distance in tl.static_range(1, team.size):
        pe = (team.rank + distance) % team.size
        slot = shmem.remote_slot(team, epoch, distance - 1, turn, pe, DTYPE, TILE, stages.DEPTH, False)
        tl.store(slot + place, tiles[distance], mask=mask)
    shmem.signal_all(team, epoch, shmem.RESULT, turn + 1)
    return epoch


@triton.jit
def through_rails(team, rail, send, recv, count, part, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """A turn sends to one node, a step later it takes in from the one that has sent here then.

    A tile of a chunk of `send` is read before anything is written there, so that recv may be send.
    Waits, ordering, reuse: those of the stages.
    """
    epoch = shmem.begin(team)
    nodes: tl.constexpr = rail.nodes
    steps = shmem.steps_of(part, TILE)
    turns = steps * nodes
    for turn in range(turns + nodes + 1):
        node = stages.others_first(rail, turn)
        if (turn < turns) & (node != rail.node):
            epoch = _send_across(team, rail, epoch, node, turn // nodes, send, part, count, DTYPE, TILE)
        at = turn - nodes
        if (at >= 0) & (at < turns):
            node, step = _came_from(rail, at), at // nodes
            epoch = _pass_inside(team, rail, epoch, at, node, step, send, recv, part, count, DTYPE, TILE)
        if (at >= 1) & (at <= turns):
            node, step = _came_from(rail, at - 1), (at - 1) // nodes
            epoch = stages.collect(team, epoch, at - 1, node, step, recv, part, count, 0, DTYPE, TILE)
    shmem.end(team, epoch)


@triton.jit
def _came_from(rail, turn):
    """The node that sends to this one in a turn, see `stages.others_first`."""
    return (rail.node + rail.nodes - 1 - turn % rail.nodes) % rail.nodes


def _rails(call, context):
    return in_chunks(call, context, rings=context.size - 1, tiles=context.size)


ALGORITHMS = [Algorithm("rails", through_rails, _rails, sent=lambda n: n - 1)]
