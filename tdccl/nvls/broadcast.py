"""broadcast by the switch: the root stores its message to all ranks at once.

nvls_push     straight into symmetric buffers
nvls_staged   through a ring in scratch, as far ahead as it has slots, for any memory
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.nvls import layout
from tdccl.runtime.algorithm import ITEMSIZE, Algorithm

# How many spans the root may be ahead of the slowest rank.
DEPTH = tl.constexpr(4)


@triton.jit
def push(
    team, send, recv, quads, tail, root, signature,
    DTYPE: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, MULTIMEM: tl.constexpr,
):  # fmt: skip
    """The root stores its tiles of the message to their place on all ranks.

    TAIL: and the last `tail` elements, which fill none of the `quads` quads, one by one.
    Waits:    block b for block b of every peer, on entry and at the end.
    Ordering: stores, then the closing barrier (release and acquire at sys scope).
    Reuse:    writes users' memory directly, so it opens with a barrier: peers may still be reading it.
    """
    opened = shmem.begin(team)
    call = shmem.of_call(signature, recv)
    epoch = shmem.barrier_entry(team, opened, call)
    if team.rank == root:
        end = quads.to(tl.int64) * (128 // DTYPE.primitive_bitwidth)
        source = shmem.symm_at(recv, root, DTYPE)
        for step in range(tl.where(epoch == opened, shmem.steps_of(quads, TILE), 0)):
            index = shmem.span_start(step, TILE) + tl.arange(0, TILE)
            words = shmem.load_words(source, shmem.words_of(index, DTYPE), end, DTYPE, True)
            shmem.multimem_st(team, recv.bases, recv.offset + index * 16, words, index < quads, MULTIMEM)
        if TAIL:
            if (tl.program_id(0) == 0) & (epoch == opened):
                place = end + tl.arange(0, 16)
                mask = place < end + tail
                values = tl.load(source + place, mask=mask)
                for distance in tl.static_range(1, team.size):
                    pe = (team.rank + distance) % team.size
                    tl.store(shmem.symm_at(recv, pe, DTYPE) + place, values, mask=mask)
    epoch = shmem.barrier_exit(team, epoch, call)
    shmem.end(team, epoch)


@triton.jit
def staged(
    team, send, recv, count, quads, root,
    DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
    MULTIMEM: tl.constexpr,
):  # fmt: skip
    """The root stores span after span into the ring on all ranks; they take it in and tell the root.

    Waits:    block b for block b: of every rank for the root's span, of the root for all to have taken in the span that
              was in the slot before.
    Ordering: multimem stores, proxy fence, block barrier, release at sys scope; acquire at sys scope, block barrier,
              loads.
    Reuse:    the root writes span s only when all ranks have told it that they took in span s - DEPTH.
              Between calls the ring alternates by the parity of the epoch; the BARRIER signal lets each rank hear
              from all in each call. WHOLE: barriers instead, and twice the ring.
    """
    epoch = shmem.begin(team)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 1)
    else:
        shmem.signal_all(team, epoch, shmem.BARRIER, 1, "relaxed")
    span: tl.constexpr = TILE * TILES
    ranks = tl.arange(0, shmem.MAX_RANKS)
    for step in range(shmem.steps_of(quads, span)):
        if team.rank == root:
            if step >= DEPTH:
                epoch = shmem.wait_all(team, epoch, shmem.RESULT, step - DEPTH + 1)
            slot = shmem.slot_offset(team, epoch, 0, step, span * 16, DEPTH, WHOLE)
            for tile in range(TILES):
                inside = tile * TILE + tl.arange(0, TILE)
                index = shmem.span_start(step, span) + inside
                words = shmem.load_words(send, shmem.words_of(index, DTYPE), count, DTYPE, WIDE)
                shmem.multimem_st(team, team.heap, slot + inside * 16, words, index < quads, MULTIMEM)
            shmem.multimem_fence(MULTIMEM)
            shmem.signal_all(team, epoch, shmem.DATA, step + 1)
        else:
            epoch = shmem.wait_peers(team, epoch, shmem.DATA, step + 1, ranks == root)
            shmem.unstage(team, epoch, recv, 0, step, count, DTYPE, TILE, TILES, DEPTH, WHOLE, WIDE)
            shmem.multimem_fence(MULTIMEM)
            shmem.signal_peers(team, epoch, shmem.RESULT, step + 1, ranks == root)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 2)
    else:
        epoch = shmem.wait_all(team, epoch, shmem.BARRIER, 1)
    shmem.end(team, epoch)


def _push(call, context):
    geometry = layout.direct(call, context)
    tail = call.nbytes % 16 // ITEMSIZE[geometry.dtype]
    return geometry.adding(scalars={"tail": tail, "root": call.root}, constants={"TAIL": tail > 0})


def _staged(call, context):
    geometry = layout.staged(call, context, rings=1, depth=DEPTH.value)
    return geometry.adding(scalars={"root": call.root})


ALGORITHMS = [
    Algorithm("nvls_push", push, _push, sent=lambda n: 1, symmetric=("recv",), multimem=layout.any_call),
    Algorithm("nvls_staged", staged, _staged, sent=lambda n: 1, multimem=layout.any_call),
]
