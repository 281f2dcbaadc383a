"""broadcast: every rank ends with the root's message.

push_ll          one hop, flags inside the data; the whole message at once           small messages
scatter_gather   the root sends each other rank a different part, and they share:
  _direct        straight into the peers' symmetric buffers                          bandwidth, symmetric memory
  _staged        tiles through rings in scratch, pipelined                           bandwidth, any memory

The message is cut into n - 1 parts, one for every rank but the root, so that the root's link carries the
message once: a flat push from the root would carry it n - 1 times.
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.runtime.algorithm import Algorithm, copying, one_shot, packets_in, tiles_in

# See `scatter_gather_staged`: how many slots make it safe to reuse one without asking.
DEPTH = tl.constexpr(4)


@triton.jit
def push_ll(team, send, recv, count, root, DTYPE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Block b of the root sends the b-th TILE words of the message to all as packets.

    Waits:    block b of every rank for block b of the root, then for that of every peer.
    Ordering: none needed for the data, the flag travels in the word.
    Reuse:    packet slots alternate by the parity of the epoch, which is only safe if each rank hears from
              all in each call: hence the BARRIER signals, sent first and awaited last, beside the data.
    """
    epoch = shmem.begin(team)
    shmem.signal_all(team, epoch, shmem.BARRIER, 1, "relaxed")
    place = tl.arange(0, TILE)
    index = tl.program_id(0).to(tl.int64) * TILE + place
    mask = index < shmem.words_in(count, DTYPE, WIDE)
    own = shmem.load_words(send, index, count, DTYPE, WIDE)
    if team.rank == root:
        for distance in tl.static_range(1, team.size):
            shmem.put_words(team, epoch, own, place, mask, (team.rank + distance) % team.size)
    words, epoch = shmem.get_words_from(team, epoch, own, place, mask, root)
    shmem.store_words(recv, index, words, count, DTYPE, WIDE)
    epoch = shmem.wait_all(team, epoch, shmem.BARRIER, 1)
    shmem.end(team, epoch)


@triton.jit
def scatter_gather_direct(
    team, send, recv, count, part, root, signature,
    DTYPE: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The root stores tile s of each part into its rank's buffer; that rank passes it on to the others.

    Waits:    block b for block b of every peer, on entry and at the end; on the way for the root's, a tile.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    writes users' memory directly, so it opens with a barrier: peers may still be reading it.
    """
    opened = shmem.begin(team)
    call = shmem.of_call(signature, recv)
    epoch = shmem.barrier_entry(team, opened, call)
    steps = tl.where(epoch == opened, shmem.steps_of(part, TILE), 0)
    from_root = tl.arange(0, shmem.MAX_RANKS) == root
    mine = (team.rank + team.size - root - 1) % team.size
    for step in range(steps):
        within = shmem.span_start(step, TILE) + tl.arange(0, TILE)
        if team.rank == root:
            for other in tl.static_range(team.size - 1):
                index = other * part + within
                mask = (within < part) & (index < count)
                chunk = tl.load(send + index, mask=mask)
                pe = (root + 1 + other) % team.size
                tl.store(shmem.symm_at(recv, pe, DTYPE, ALIGN) + index, chunk, mask=mask)
            shmem.signal_all(team, epoch, shmem.DATA, step + 1)
        else:
            epoch = shmem.wait_peers(team, epoch, shmem.DATA, step + 1, from_root)
            index = mine * part + within
            mask = (within < part) & (index < count) & (epoch == opened)
            chunk = tl.load(shmem.symm_at(recv, team.rank, DTYPE, ALIGN) + index, mask=mask)
            for distance in tl.static_range(1, team.size):
                pe = (team.rank + distance) % team.size
                target = shmem.symm_at(recv, pe, DTYPE, ALIGN) + index
                tl.store(target, chunk, mask=mask & (pe != root))
    epoch = shmem.barrier_exit(team, epoch, call)
    shmem.end(team, epoch)


@triton.jit
def _of_source(team, root, distance, within, part, count):
    """(index, mask) of what this rank takes in from the rank at `distance`: nothing from the root, nor at the root."""
    source = (team.rank + team.size - distance) % team.size
    index = ((source + team.size - root - 1) % team.size) * part + within
    return index, (within < part) & (index < count) & (source != root) & (team.rank != root)


@triton.jit
def scatter_gather_staged(
    team, send, recv, count, part, root,
    DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """At step s the root pushes span s of every part to the part's rank; that rank takes in span s - 1 and
    passes it on to the others; every rank takes in span s - 2 of the others' parts.

    Waits:    block b for block b: of the root for its span, of every other rank for what it passed on.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    a slot returns after DEPTH = 4 steps. All ranks signal all, the root included, so when a block
              starts step s it has seen each peer pass on span s - 3: the peer is past its step s - 3 and
              has taken in span s - 5 of the others' parts, and the root's span s - 3.
              Between calls the ring alternates by the parity of the epoch; the BARRIER signal lets each
              rank hear from all in each call. WHOLE: barriers instead, and twice the ring.
    """
    epoch = shmem.begin(team)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 1)
    else:
        shmem.signal_all(team, epoch, shmem.BARRIER, 1, "relaxed")
    span: tl.constexpr = TILE * TILES
    scattered: tl.constexpr = team.size - 1  # the ring for what the root sends, behind one for each distance
    place = tl.arange(0, TILE)
    ranks = tl.arange(0, shmem.MAX_RANKS)
    is_root = team.rank == root
    mine = (team.rank + team.size - root - 1) % team.size
    steps = shmem.steps_of(part, span)
    for step in range(steps + 2):
        if is_root & (step < steps):
            for tile in range(TILES):
                inside = tile * TILE + place
                within = shmem.span_start(step, span) + inside
                tiles = ()
                for other in tl.static_range(team.size - 1):  # all loads are under way before a store
                    index = other * part + within
                    tiles = tiles + (tl.load(send + index, mask=(within < part) & (index < count)),)
                for other in tl.static_range(team.size - 1):
                    mask = (within < part) & (other * part + within < count)
                    pe = (root + 1 + other) % team.size
                    slot = shmem.remote_slot(team, epoch, scattered, step, pe, DTYPE, span, DEPTH, WHOLE)
                    tl.store(slot + inside, tiles[other], mask=mask)
            shmem.signal_all(team, epoch, shmem.DATA, step + 1)
        if (team.rank != root) & (step >= 1) & (step <= steps):
            epoch = shmem.wait_peers(team, epoch, shmem.DATA, step, ranks == root)
            for tile in range(TILES):
                inside = tile * TILE + place
                within = shmem.span_start(step - 1, span) + inside
                index = mine * part + within
                mask = (within < part) & (index < count)
                slot = shmem.local_slot(team, epoch, scattered, step - 1, DTYPE, span, DEPTH, WHOLE)
                chunk = tl.load(slot + inside, mask=mask)
                for distance in tl.static_range(1, team.size):
                    pe = (team.rank + distance) % team.size
                    slot = shmem.remote_slot(team, epoch, distance - 1, step - 1, pe, DTYPE, span, DEPTH, WHOLE)
                    tl.store(slot + inside, chunk, mask=mask & (pe != root))
                tl.store(recv + index, chunk, mask=mask)
            shmem.signal_all(team, epoch, shmem.RESULT, step)
        if step >= 2:
            epoch = shmem.wait_peers(team, epoch, shmem.RESULT, step - 1, ranks != root)
            for tile in range(TILES):
                inside = tile * TILE + place
                within = shmem.span_start(step - 2, span) + inside
                tiles = ()
                for distance in tl.static_range(1, team.size):
                    index, mask = _of_source(team, root, distance, within, part, count)
                    slot = shmem.local_slot(team, epoch, distance - 1, step - 2, DTYPE, span, DEPTH, WHOLE)
                    tiles = tiles + (tl.load(slot + inside, mask=mask),)
                for distance in tl.static_range(1, team.size):
                    index, mask = _of_source(team, root, distance, within, part, count)
                    tl.store(recv + index, tiles[distance - 1], mask=mask)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 2)
    else:
        epoch = shmem.wait_all(team, epoch, shmem.BARRIER, 1)
    shmem.end(team, epoch)


def _part_bytes(call, context):
    """Bytes of one of the n - 1 parts of the message, a multiple of 16."""
    return -(-call.nbytes // (16 * max(1, context.size - 1))) * 16


def _push_ll(call, context):
    return packets_in(call, context).adding(scalars={"root": call.root})


def _direct(call, context):
    geometry = copying(call, context, part_bytes=_part_bytes(call, context))
    return geometry.adding(scalars={"root": call.root})


def _staged(call, context):
    rings = context.size
    geometry = tiles_in(call, context, rings, DEPTH.value, part_bytes=_part_bytes(call, context))
    return geometry.adding(scalars={"root": call.root})


ALGORITHMS = [
    Algorithm("push_ll", push_ll, _push_ll, sent=lambda n: 2 * (n - 1), packets=one_shot),
    Algorithm("scatter_gather_direct", scatter_gather_direct, _direct, sent=lambda n: 1, symmetric=("recv",)),
    Algorithm("scatter_gather_staged", scatter_gather_staged, _staged, sent=lambda n: 1),
]
