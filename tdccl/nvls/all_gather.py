"""all_gather by the switch: every rank stores its chunk to all ranks at once, so that its link carries it out once.

nvls_push     straight into symmetric buffers
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
def push(
    team, send, recv, count, quads, signature,
    DTYPE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr, MULTIMEM: tl.constexpr,
):  # fmt: skip
    """Each block stores its tiles of the chunk (`count` elements, `quads` whole quads) to their place on all ranks.

    Waits:    block b for block b of every peer, on entry and at the end.
    Ordering: stores, then the closing barrier (release and acquire at sys scope).
    Reuse:    writes users' memory directly, so it opens with a barrier: peers may still be reading it.
    """
    opened = shmem.begin(team)
    call = shmem.of_call(signature, recv)
    epoch = shmem.barrier_entry(team, opened, call)
    for step in range(tl.where(epoch == opened, shmem.steps_of(quads, TILE), 0)):
        index = shmem.span_start(step, TILE) + tl.arange(0, TILE)
        words = shmem.load_words(send, shmem.words_of(index, DTYPE), count, DTYPE, WIDE)
        offset = recv.offset + (team.rank.to(tl.int64) * quads + index) * 16
        shmem.multimem_st(team, recv.bases, offset, words, index < quads, MULTIMEM)
    epoch = shmem.barrier_exit(team, epoch, call)
    shmem.end(team, epoch)


@triton.jit
def staged(
    team, send, recv, count, quads,
    DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
    MULTIMEM: tl.constexpr,
):  # fmt: skip
    """At step s a block stores span s of its chunk into its ring on all ranks, and takes in span s - 1 of all chunks.

    Waits:    block b for block b of every peer, once a step.
    Ordering: multimem stores, proxy fence, block barrier, release at sys scope; acquire at sys scope, block barrier,
              loads.
    Reuse:    a slot returns after DEPTH = 4 steps. When a block starts step s it has seen its peers' signals for span
              s - 2, so they are past their step s - 3 and have taken in span s - 4.
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
            slot = shmem.slot_offset(team, epoch, team.rank, step, span * 16, DEPTH, WHOLE)
            for tile in range(TILES):
                inside = tile * TILE + place
                index = shmem.span_start(step, span) + inside
                words = shmem.load_words(send, shmem.words_of(index, DTYPE), count, DTYPE, WIDE)
                shmem.multimem_st(team, team.heap, slot + inside * 16, words, index < quads, MULTIMEM)
            shmem.multimem_fence(MULTIMEM)
            shmem.signal_all(team, epoch, shmem.DATA, step + 1)
        if step >= 1:
            epoch = shmem.wait_all(team, epoch, shmem.DATA, step)
            for source in tl.static_range(team.size):
                shmem.unstage(
                    team, epoch, recv + source * count, source, step - 1, count,
                    DTYPE, TILE, TILES, DEPTH, WHOLE, WIDE,
                )  # fmt: skip
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 2)
    shmem.end(team, epoch)


def _staged(call, context):
    return layout.staged(call, context, rings=context.size, depth=DEPTH.value)


ALGORITHMS = [
    Algorithm(
        "nvls_push", push, layout.direct, sent=lambda n: n, symmetric=("recv",), multimem=layout.whole_quads
    ),
    Algorithm("nvls_staged", staged, _staged, sent=lambda n: n, multimem=layout.any_call),
]  # fmt: skip
