"""reduce_scatter: rank r ends with the reduction of all ranks' r-th chunks.

push_ll   one hop, flags inside the data; the whole chunk at once                     small chunks
pull      loads straight from the peers' symmetric buffers, adds in registers         bandwidth, symmetric memory
staged    tiles through rings of slots in scratch, one step ahead                     bandwidth, any memory
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.runtime.algorithm import Algorithm, copying, one_shot, packets_in, tiles_in

# The pipeline is that of `exchange.staged`, and so is the reason why four slots do.
DEPTH = tl.constexpr(4)


@triton.jit
def push_ll(team, send, recv, count, DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Block b sends the b-th TILE words of each chunk to the chunk's rank, and reduces what all sent it.

    Waits:    block b for block b of every peer, once.
    Ordering: none needed, the flag travels in the word. Own data never leaves the registers.
    Reuse:    packet slots alternate by the parity of the epoch; each rank hears from all in each call.
    """
    epoch = shmem.begin(team)
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    words, epoch = shmem.exchange_words(team, epoch, send, count, index, count, DTYPE, WIDE)
    shmem.store_words(recv, index, shmem.fold_words(words, OP, DTYPE), count, DTYPE, WIDE)
    shmem.end(team, epoch)


@triton.jit
def pull(
    team, send, recv, count, signature,
    DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rank r loads chunk r from all ranks and reduces it.

    Waits:    block b for block b of every peer, on entry and at the end.
    Ordering: the entry barrier makes the peers' input visible.
    Reuse:    the closing barrier keeps every rank from changing its input while a peer still reads it.
    """
    opened = shmem.begin(team)
    call = shmem.of_call(signature, send)
    epoch = shmem.barrier_entry(team, opened, call)
    steps = tl.where(epoch == opened, shmem.steps_of(count, TILE), 0)
    for step in range(steps):
        index = shmem.span_start(step, TILE) + tl.arange(0, TILE)
        mask = index < count
        values = ()
        for source in tl.static_range(team.size):
            chunk = shmem.symm_at(send, source, DTYPE, ALIGN) + team.rank * count
            values = values + (tl.load(chunk + index, mask=mask, other=0),)
        tl.store(recv + index, shmem.fold(values, OP, DTYPE), mask=mask)
    epoch = shmem.barrier_exit(team, epoch, call)
    shmem.end(team, epoch)


@triton.jit
def staged(
    team, send, recv, count,
    DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, TILES: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """At step s a block pushes span s of every chunk to the chunk's rank and reduces span s - 1 of its own.

    Waits:    block b for block b of every peer, once a step.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    as `exchange.staged`: a slot returns after DEPTH = 4 steps, the ring alternates by parity, or
              is WHOLE between barriers.
    """
    epoch = shmem.begin(team)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 1)
    span: tl.constexpr = TILE * TILES
    place = tl.arange(0, TILE)
    steps = shmem.steps_of(count, span)
    for step in range(steps + 1):
        if step < steps:
            for tile in range(TILES):
                within = tile * TILE + place
                index = shmem.span_start(step, span) + within
                mask = index < count
                chunks = ()
                for distance in tl.static_range(1, team.size):  # all loads are under way before a store
                    pe = (team.rank + distance) % team.size
                    chunks = chunks + (tl.load(send + pe * count + index, mask=mask),)
                for distance in tl.static_range(1, team.size):
                    pe = (team.rank + distance) % team.size
                    slot = shmem.remote_slot(team, epoch, distance - 1, step, pe, DTYPE, span, DEPTH, WHOLE)
                    tl.store(slot + within, chunks[distance - 1], mask=mask)
            shmem.signal_all(team, epoch, shmem.DATA, step + 1)
        if step >= 1:
            epoch = shmem.wait_all(team, epoch, shmem.DATA, step)
            for tile in range(TILES):
                start = shmem.span_start(step - 1, span) + tile * TILE
                index = start + place
                mask = index < count
                own = send + team.rank * count + start
                values = shmem.load_ranks(
                    team, epoch, own, step - 1, tile * TILE, mask, DTYPE, TILE, span, DEPTH, WHOLE, ALIGN
                )
                tl.store(recv + index, shmem.fold(values, OP, DTYPE), mask=mask)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 2)
    shmem.end(team, epoch)


def _staged(call, context):
    return tiles_in(call, context, rings=context.size - 1, depth=DEPTH.value)


ALGORITHMS = [
    Algorithm("push_ll", push_ll, packets_in, sent=lambda n: 2 * (n - 1), packets=one_shot),
    Algorithm("pull", pull, copying, sent=lambda n: n - 1, symmetric=("send",)),
    Algorithm("staged", staged, _staged, sent=lambda n: n - 1),
]
