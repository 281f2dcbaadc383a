"""A kernel with each device function of multimem, for tests that run it and for tests that compile it."""

import triton
import triton.language as tl

import tdccl.language as shmem


@triton.jit
def every_form(
    team, buffer, result, source, quads,
    DTYPE: tl.constexpr, OP: tl.constexpr, RED: tl.constexpr, MULTIMEM: tl.constexpr,
):  # fmt: skip
    """Of a buffer of 3 * 64 quads, of which `quads` count in each third: loads the first third reduced, stores that to
    the second on all ranks, each rank its share, and reduces `source` into the last on all ranks; then it waits until
    all ranks have done so."""
    place = tl.arange(0, 64).to(tl.int64)
    mask = place < quads
    words = shmem.multimem_ld_reduce(team, buffer.bases, buffer.offset + place * 16, mask, OP, DTYPE, MULTIMEM)
    target = result.to(tl.pointer_type(words.dtype)) + shmem.words_of(place, DTYPE)
    tl.store(target, words, mask=mask[:, None])
    mine = mask & ((place + 1) % team.size == team.rank)
    shmem.multimem_st(team, buffer.bases, buffer.offset + (64 + place) * 16, words, mine, MULTIMEM)
    if RED:
        offset = buffer.offset + 128 * 16
        shmem.multimem_red(team, buffer.bases, offset, source.to(tl.int64), quads, OP, DTYPE, MULTIMEM)
        epoch = shmem.multimem_barrier(team, shmem.begin(team), MULTIMEM)
        shmem.end(team, epoch)
