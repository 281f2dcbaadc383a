"""Every rank has a chunk for every other rank: what all_gather and all_to_all have in common.

push_ll   one hop, flags inside the data; the whole chunk at once       small chunks
push      16-byte stores straight into every peer's symmetric buffer    bandwidth, symmetric memory
staged    tiles through rings of slots in scratch, one step ahead       bandwidth, any memory, any split

In an all_gather the chunk is the same for all, so `send_stride` is 0.
"""

import triton
import triton.language as tl

import tdccl.language as shmem

# See `staged`: how many slots make it safe to reuse one without asking.
DEPTH = tl.constexpr(4)


@triton.jit
def push_ll(team, send, recv, count, send_stride, DTYPE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Block b sends the b-th TILE words of each chunk as packets, then collects what the peers sent it.

    Waits:    block b for block b of every peer, once.
    Ordering: none needed, the flag travels in the word.
    Reuse:    packet slots alternate by the parity of the epoch; each rank hears from all in each call.
    """
    epoch = shmem.begin(team)
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    received, epoch = shmem.exchange_words(team, epoch, send, send_stride, index, count, DTYPE, WIDE)
    for source in tl.static_range(team.size):
        shmem.store_words(recv + source * count, index, received[source], count, DTYPE, WIDE)
    shmem.end(team, epoch)


@triton.jit
def push(
    team, send, recv, count, send_stride, signature, DTYPE: tl.constexpr, TILE: tl.constexpr,
    ALIGN: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Each block copies its tiles of every chunk to their final place on every rank.

    Waits:    block b for block b of every peer, on entry and at the end.
    Ordering: stores, then the closing barrier (release and acquire at sys scope).
    Reuse:    writes users' memory directly, so it opens with a barrier: peers may still be reading it.
    """
    opened = shmem.begin(team)
    call = shmem.of_call(signature, recv)
    epoch = shmem.barrier_entry(team, opened, call)
    steps = tl.where(epoch == opened, shmem.steps_of(count, TILE), 0)
    for step in range(steps):
        index = shmem.span_start(step, TILE) + tl.arange(0, TILE)
        mask = index < count
        chunks = ()
        for distance in tl.static_range(1, 2 if SAME else team.size + 1):  # all loads are under way before a store
            pe = (team.rank + distance) % team.size
            chunks = chunks + (tl.load(send + pe * send_stride + index, mask=mask),)
        for distance in tl.static_range(1, team.size + 1):  # rank + 1 first: no two ranks on one target
            pe = (team.rank + distance) % team.size
            target = shmem.symm_at(recv, pe, DTYPE, ALIGN) + team.rank * count
            tl.store(target + index, chunks[0 if SAME else distance - 1], mask=mask)
    epoch = shmem.barrier_exit(team, epoch, call)
    shmem.end(team, epoch)


@triton.jit
def _steps_with_peers(send_counts, recv_counts, SPAN: tl.constexpr):
    """For each rank, as one small tensor: the steps of this block with it, the longer of the two directions."""
    ranks = tl.arange(0, shmem.MAX_RANKS)
    steps = tl.zeros([shmem.MAX_RANKS], tl.int64)
    for rank in tl.static_range(len(send_counts)):
        longer = tl.maximum(send_counts[rank], recv_counts[rank])
        steps = tl.where(ranks == rank, shmem.steps_of(longer, SPAN), steps)
    return steps


@triton.jit
def staged(
    team, send, recv, send_counts, send_offsets, recv_counts, recv_offsets,
    DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Every chunk goes `through_rings`, of which see the waits, ordering and reuse."""
    epoch = shmem.begin(team)
    epoch = through_rings(
        team, epoch, send, recv, send_counts, send_offsets, recv_counts, recv_counts, recv_offsets,
        DTYPE, TILE, TILES, WHOLE, SAME,
    )  # fmt: skip
    shmem.end(team, epoch)


@triton.jit
def through_rings(
    team, epoch, send, recv, send_counts, send_offsets, sent_here, recv_counts, recv_offsets,
    DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """At step s a block pushes span s of every chunk into a ring slot of its receiver, then takes in span s - 1.

    sent_here: what each rank sends this one, of which `recv_counts` elements are written. SAME: every rank is sent the
    same chunk, which is read once. Returns the epoch.

    Waits:    block b for block b of each peer, once a step; both directions of a pair take equally many
              steps, so two ranks agree on them from their own two counts alone.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    a slot returns after DEPTH = 4 steps. When a block starts step s it has seen its peer's
              signal for span s - 2, so the peer is past its step s - 3 and has taken in span s - 4.
              Between calls the ring alternates by the parity of the epoch; pairs that exchange nothing
              still hear of each other by the BARRIER signal. WHOLE: barriers instead, and all rings.
    """
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 1)
    else:
        shmem.signal_all(team, epoch, shmem.BARRIER, 1, "relaxed")
    span: tl.constexpr = TILE * TILES
    place = tl.arange(0, TILE)
    with_peers = _steps_with_peers(send_counts, sent_here, span)
    steps = tl.max(with_peers)
    own_count = shmem.pick(recv_counts, team.rank)
    own_source = send + shmem.pick(send_offsets, team.rank)
    own_target = recv + shmem.pick(recv_offsets, team.rank)
    for step in range(steps + 1):
        for tile in range(TILES):
            start = shmem.span_start(step, span) + tile * TILE
            chunks = ()
            for distance in tl.static_range(1, 2 if SAME else team.size):  # all loads are under way before a store
                pe = (team.rank + distance) % team.size
                chunk = send + (shmem.pick(send_offsets, pe) + start)
                chunks = chunks + (tl.load(chunk + place, mask=place < shmem.pick(send_counts, pe) - start),)
            for distance in tl.static_range(1, team.size):
                pe = (team.rank + distance) % team.size
                slot = shmem.remote_slot(team, epoch, distance - 1, step, pe, DTYPE, span, DEPTH, WHOLE) + tile * TILE
                mask = place < shmem.pick(send_counts, pe) - start
                tl.store(slot + place, chunks[0 if SAME else distance - 1], mask=mask)
            own = chunks[0] if SAME else tl.load(own_source + start + place, mask=place < own_count - start)
            tl.store(own_target + start + place, own, mask=place < own_count - start)
        shmem.signal_peers(team, epoch, shmem.DATA, step + 1, step < with_peers)
        if step >= 1:
            epoch = shmem.wait_peers(team, epoch, shmem.DATA, step, step - 1 < with_peers)
            for tile in range(TILES):
                start = shmem.span_start(step - 1, span) + tile * TILE
                chunks = ()
                for distance in tl.static_range(1, team.size):
                    source = (team.rank + team.size - distance) % team.size
                    slot = (
                        shmem.local_slot(team, epoch, distance - 1, step - 1, DTYPE, span, DEPTH, WHOLE) + tile * TILE
                    )
                    mask = place < shmem.pick(recv_counts, source) - start
                    chunks = chunks + (tl.load(slot + place, mask=mask),)
                for distance in tl.static_range(1, team.size):
                    source = (team.rank + team.size - distance) % team.size
                    target = recv + (shmem.pick(recv_offsets, source) + start)
                    mask = place < shmem.pick(recv_counts, source) - start
                    tl.store(target + place, chunks[distance - 1], mask=mask)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 2)
    else:
        epoch = shmem.wait_all(team, epoch, shmem.BARRIER, 1)
    return epoch
