"""What collectives across nodes are composed of: stages inside a node and across nodes, tile by tile.

A message is cut into one part for each rank, in rank order: rank l of node n has part n * width + l. (In an all_gather,
reduce_scatter or all_to_all the parts are the chunks.) A block walks its tiles of a part in *steps*, and in each step
takes a *turn* for every node. The stages of a turn:

    push_parts      every rank gives each rank of its node a tile of one node's part of that rank
    forward_sum     ... which adds them in rank order, and sends the sum to that node, over its own rail
    add_nodes       ... where its rank adds all nodes' sums, in node order
    share_across    every rank sends its tile to its like in all nodes
    share_inside    ... and passes what it has of a node on to the ranks of its own
    collect         ... which take it in

A kernel lets each stage run some turns behind the one before it: while a tile is under way across, the next go around
inside, so that both links are busy together.

Reuse inside: in turn t a block pushes tile t into one of DEPTH = 4 slots, then awaits tile t - 1 of its peers and takes
it in. So when it comes to turn t, its peers have pushed t - 2, and before that taken in t - 4, whose slot t uses again.
Between calls the rings alternate by the parity of the epoch: each rank hears from all of its node in each call. For
reuse across see `tdccl.language.rails`.

Failed waits: inside they leave an epoch that is past, and across nothing is sent after one, so that everybody's fail.
"""

import triton
import triton.language as tl

import tdccl.language as shmem
import tdccl.language.rails as rails

DEPTH = tl.constexpr(4)


@triton.jit
def others_first(rail, turn):
    """The node of a turn in which something is sent: this rank's own is the last of a step, no two send to one."""
    return (rail.node + 1 + turn % rail.nodes) % rail.nodes


@triton.jit
def tile_of(team, node, local, step, part, count, TILE: tl.constexpr):
    """(index, mask) of the tile at `step` of the part of rank `local` of `node`, in a message of `count` elements."""
    within = shmem.span_start(step, TILE) + tl.arange(0, TILE)
    index = (node * team.size + local) * part + within
    return index, (within < part) & (index < count)


@triton.jit
def push_parts(team, epoch, turn, node, step, source, part, count, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """Pushes to each peer inside the tile at `step` of its part in `node`. Ordering: plain stores; signal DATA next."""
    tiles = ()
    for distance in tl.static_range(1, team.size):  # all loads are under way before a store
        index, mask = tile_of(team, node, (team.rank + distance) % team.size, step, part, count, TILE)
        tiles = tiles + (tl.load(source + index, mask=mask),)
    for distance in tl.static_range(1, team.size):
        pe = (team.rank + distance) % team.size
        _, mask = tile_of(team, node, pe, step, part, count, TILE)
        slot = shmem.remote_slot(team, epoch, distance - 1, turn, pe, DTYPE, TILE, DEPTH, False)
        tl.store(slot + tl.arange(0, TILE), tiles[distance - 1], mask=mask)


@triton.jit
def forward_sum(
    team, rail, epoch, turn, node, step, source, part, count,
    DTYPE: tl.constexpr, WIRE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Adds the tiles that the ranks of this node pushed in `turn`, in rank order, and sends the sum to `node`, as WIRE;
    for this rank's own node it stays in a slot. Returns the epoch.

    Waits:    for DATA of every peer inside, and for a free slot of the rail.
    Ordering: acquire at sys scope, block barrier, loads; stores, block barrier, put with signal.
    """
    epoch = shmem.wait_all(team, epoch, shmem.DATA, turn + 1)
    _, mask = tile_of(team, node, team.rank, step, part, count, TILE)
    own = source + (node * team.size + team.rank) * part + shmem.span_start(step, TILE)
    values = shmem.load_ranks(team, epoch, own, turn, 0, mask, DTYPE, TILE, TILE, DEPTH, False, ALIGN)
    total = add_ranks(values, OP, DTYPE).to(WIRE)
    place = tl.arange(0, TILE)
    if node == rail.node:
        tl.store(rails.out_slot(rail, rails.INPUTS, node, step, WIRE) + place, total)
    else:
        epoch, number, slot = rails.next_out(team, rail, rails.INPUTS, node, epoch, WIRE)
        tl.store(slot + place, total)
        rails.put_tile(team, rail, rails.INPUTS, node, number, slot, TILE * WIRE.primitive_bitwidth // 8)
    return epoch


@triton.jit
def add_ranks(values, OP: tl.constexpr, DTYPE: tl.constexpr):
    """A node's sum of a tuple of its ranks' values, in that order, as it is accumulated; avg does not divide yet."""
    total = shmem.widen(values[0], DTYPE)
    for rank in tl.static_range(1, len(values)):
        total = shmem.accumulate(total, shmem.widen(values[rank], DTYPE), OP)
    return total


@triton.jit
def add_nodes(
    team, rail, epoch, STAGE: tl.constexpr, own,
    DTYPE: tl.constexpr, WIRE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(epoch, the sum as DTYPE) of the next tile of every node, in node order; this rank's node has its own at `own`.

    Waits:    for the rail's like in every other node.
    Ordering: acquire at sys scope, block barrier, loads; block barrier, then each is told that its tile is taken.
    """
    place = tl.arange(0, TILE)
    total = shmem.widen(tl.zeros([TILE], WIRE), WIRE)
    shmem.fence()
    for node in range(rail.nodes):
        slot, number = own.to(tl.int64), tl.full([], 0, tl.int64)
        if node != rail.node:
            epoch, number = rails.next_in(team, rail, STAGE, node, epoch)
            slot = rails.in_slot(rail, STAGE, node, number, WIRE).to(tl.int64)
        pointer = tl.multiple_of(slot.to(tl.pointer_type(WIRE)), 16)
        value = shmem.widen(tl.load(pointer + place), WIRE)
        total = tl.where(node == 0, value, shmem.accumulate(total, value, OP))
        if node != rail.node:
            rails.took(team, rail, STAGE, node, number)
    return epoch, shmem.settle(total, OP, rail.nodes * team.size, DTYPE)


@triton.jit
def share_across(team, rail, epoch, tile, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """Sends `tile` to this rank's like in every other node, from one slot; returns (epoch, that slot).

    Waits:    for a free slot at every one of them.
    Ordering: stores, block barrier, puts with signals.
    """
    opened = epoch
    for distance in range(1, rail.nodes):
        epoch, _, _ = rails.next_out(team, rail, rails.RESULTS, (rail.node + distance) % rail.nodes, epoch, DTYPE)
    shared = rails.next_shared(rail)
    slot = rails.out_slot(rail, rails.RESULTS, rail.node, shared, DTYPE)
    tl.store(slot + tl.arange(0, TILE), tile, mask=epoch == opened)  # else it may still be under way to someone
    for distance in range(1, rail.nodes):
        node = (rail.node + distance) % rail.nodes
        number = rails.sent(rail, rails.RESULTS, node)
        rails.put_tile(team, rail, rails.RESULTS, node, number, slot, TILE * DTYPE.primitive_bitwidth // 8)
    rails.close_shared(rail, shared)
    return epoch, slot


@triton.jit
def share_inside(
    team, rail, epoch, turn, node, step, own, recv, part, count, FIRST_RING: tl.constexpr,
    DTYPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Passes the next tile of `node` on to the peers inside, and stores it in `recv`; returns the epoch.

    own: where this rank's own part is. Signals RESULT.
    Waits:    for the rail's like in `node`, unless that is this rank's own node.
    Ordering: acquire at sys scope, block barrier, loads; stores, block barrier, release at sys scope.
    """
    place = tl.arange(0, TILE)
    index, mask = tile_of(team, node, team.rank, step, part, count, TILE)
    if node == rail.node:
        tile = tl.load(own + shmem.span_start(step, TILE) + place, mask=mask)
    else:
        epoch, number = rails.next_in(team, rail, rails.RESULTS, node, epoch)
        tile = tl.load(rails.in_slot(rail, rails.RESULTS, node, number, DTYPE) + place)
        rails.took(team, rail, rails.RESULTS, node, number)
    for distance in tl.static_range(1, team.size):
        pe = (team.rank + distance) % team.size
        slot = shmem.remote_slot(team, epoch, FIRST_RING + distance - 1, turn, pe, DTYPE, TILE, DEPTH, False)
        tl.store(slot + place, tile, mask=mask)
    tl.store(recv + index, tile, mask=mask)
    shmem.signal_all(team, epoch, shmem.RESULT, turn + 1)
    return epoch


@triton.jit
def share_and_collect(
    team, rail, epoch, turn, turns, own, recv, part, count, FIRST_RING: tl.constexpr,
    DTYPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`share_inside` of a turn, the first of a step for this rank's own node, and `collect` of the one before.

    Returns the epoch.
    """
    if (turn >= 0) & (turn < turns):
        node = (rail.node + turn % rail.nodes) % rail.nodes
        epoch = share_inside(
            team, rail, epoch, turn, node, turn // rail.nodes, own, recv, part, count, FIRST_RING, DTYPE, TILE
        )
    if (turn >= 1) & (turn <= turns):
        before = turn - 1
        node = (rail.node + before % rail.nodes) % rail.nodes
        epoch = collect(team, epoch, before, node, before // rail.nodes, recv, part, count, FIRST_RING, DTYPE, TILE)
    return epoch


@triton.jit
def collect(
    team, epoch, turn, node, step, recv, part, count, FIRST_RING: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr
):
    """Takes in what the peers inside passed on in `turn`; returns the epoch.

    Waits:    for RESULT of every peer inside.
    Ordering: acquire at sys scope, block barrier, loads.
    """
    epoch = shmem.wait_all(team, epoch, shmem.RESULT, turn + 1)
    tiles = ()
    for distance in tl.static_range(1, team.size):  # all loads are under way before a store
        _, mask = tile_of(team, node, (team.rank + team.size - distance) % team.size, step, part, count, TILE)
        slot = shmem.local_slot(team, epoch, FIRST_RING + distance - 1, turn, DTYPE, TILE, DEPTH, False)
        tiles = tiles + (tl.load(slot + tl.arange(0, TILE), mask=mask),)
    for distance in tl.static_range(1, team.size):
        index, mask = tile_of(team, node, (team.rank + team.size - distance) % team.size, step, part, count, TILE)
        tl.store(recv + index, tiles[distance - 1], mask=mask)
    return epoch
