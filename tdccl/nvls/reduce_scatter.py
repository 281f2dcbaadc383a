"""reduce_scatter by the switch: every rank loads its chunk reduced. Sums of floats need not have the bits of the other
algorithms.

nvls_reduce   straight from symmetric buffers
nvls_staged   through rings in scratch, pipelined, for any memory
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.nvls import layout
from tdccl.runtime.algorithm import Algorithm

# See `staged`: how many slots make it safe to reuse one without asking.
DEPTH = tl.constexpr(4)


@triton.jit
def reduce(
    team, send, recv, count, quads, signature,
    DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr, MULTIMEM: tl.constexpr,
):  # fmt: skip
    """Rank r loads chunk r (`count` elements, `quads` whole quads) of all ranks' symmetric `send` reduced.

    Waits:    block b for block b of every peer, on entry and at the end.
    Ordering: the entry barrier makes the peers' input visible.
    Reuse:    the closing barrier keeps every rank from changing its input while a peer still reads it. Chunk r is read
              by rank r alone, so recv may be this rank's chunk.
    """
    opened = shmem.begin(team)
    call = shmem.of_call(signature, send)
    epoch = shmem.barrier_entry(team, opened, call)
    for step in range(tl.where(epoch == opened, shmem.steps_of(quads, TILE), 0)):
        index = shmem.span_start(step, TILE) + tl.arange(0, TILE)
        offset = send.offset + (team.rank.to(tl.int64) * quads + index) * 16
        words = shmem.multimem_ld_reduce(team, send.bases, offset, index < quads, OP, DTYPE, MULTIMEM)
        shmem.store_words(recv, shmem.words_of(index, DTYPE), words, count, DTYPE, WIDE)
    epoch = shmem.barrier_exit(team, epoch, call)
    shmem.end(team, epoch)


@triton.jit
def staged(
    team, send, recv, count, quads,
    DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
    WIDE: tl.constexpr, MULTIMEM: tl.constexpr,
):  # fmt: skip
    """At step s a block copies span s of every chunk into its own rings, one a chunk, and loads span s - 1 of its own
    chunk from all ranks' rings reduced.

    Waits:    block b for block b of every peer, once a step.
    Ordering: stores, proxy fence, block barrier, release at sys scope; acquire at sys scope, block barrier, multimem
              loads.
    Reuse:    a slot returns after DEPTH = 4 steps. When a block starts step s it has seen its peers' signals for span
              s - 2, so they are past their step s - 3 and have loaded span s - 4.
              Between calls the ring alternates by the parity of the epoch, or is WHOLE between barriers.
    """
    epoch = shmem.begin(team)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 1)
    span: tl.constexpr = TILE * TILES
    place = tl.arange(0, TILE)
    steps = shmem.steps_of(quads, span)
    for step in range(steps + 1):
        if step < steps:
            for owner in tl.static_range(team.size):
                shmem.stage(
                    team, epoch, send + owner * count, owner, step, quads, count,
                    DTYPE, TILE, TILES, DEPTH, WHOLE, WIDE,
                )  # fmt: skip
            shmem.multimem_fence(MULTIMEM)
            shmem.signal_all(team, epoch, shmem.DATA, step + 1)
        if step >= 1:
            epoch = shmem.wait_all(team, epoch, shmem.DATA, step)
            slot = shmem.slot_offset(team, epoch, team.rank, step - 1, span * 16, DEPTH, WHOLE)
            for tile in range(TILES):
                inside = tile * TILE + place
                index = shmem.span_start(step - 1, span) + inside
                words = shmem.multimem_ld_reduce(
                    team, team.heap, slot + inside * 16, index < quads, OP, DTYPE, MULTIMEM
                )
                shmem.store_words(recv, shmem.words_of(index, DTYPE), words, count, DTYPE, WIDE)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 2)
    shmem.end(team, epoch)


def _staged(call, context):
    return layout.staged(call, context, rings=context.size, depth=DEPTH.value)


ALGORITHMS = [
    Algorithm(
        "nvls_reduce", reduce, layout.direct, sent=lambda n: n, symmetric=("send",),
        multimem=layout.reduction_of_quads,
    ),
    Algorithm("nvls_staged", staged, _staged, sent=lambda n: n, multimem=layout.reduction),
]  # fmt: skip
