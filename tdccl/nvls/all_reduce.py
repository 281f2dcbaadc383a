"""all_reduce by the switch. Sums of floats need not have the bits of the other algorithms.

nvls_one_shot   every rank loads the whole message reduced    small messages
nvls_two_shot   every rank loads its part reduced, and stores it to all at once     large ones
  _staged       each through rings in scratch, pipelined, for any memory
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.nvls import layout
from tdccl.runtime.algorithm import Algorithm

# See `one_shot_staged` and `two_shot_staged`: how many slots make it safe to reuse one without asking.
ONE_SHOT_DEPTH, TWO_SHOT_DEPTH = tl.constexpr(4), tl.constexpr(3)


@triton.jit
def one_shot(
    team, send, recv, count, part, signature,
    DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr, MULTIMEM: tl.constexpr,
):  # fmt: skip
    """Every rank loads all ranks' symmetric `send` reduced, `part` quads in tiles of TILE, and writes its own recv.

    Waits:    block b for block b of every peer, on entry and at the end.
    Ordering: the entry barrier makes the peers' input visible.
    Reuse:    the closing barrier keeps every rank from changing its input while a peer still reads it. For the same
              reason recv may not be send.
    """
    opened = shmem.begin(team)
    call = shmem.of_call(signature, send)
    epoch = shmem.barrier_entry(team, opened, call)
    for step in range(tl.where(epoch == opened, shmem.steps_of(part, TILE), 0)):
        quads = shmem.span_start(step, TILE) + tl.arange(0, TILE)
        words = shmem.multimem_ld_reduce(team, send.bases, send.offset + quads * 16, quads < part, OP, DTYPE, MULTIMEM)
        shmem.store_words(recv, shmem.words_of(quads, DTYPE), words, count, DTYPE, WIDE)
    epoch = shmem.barrier_exit(team, epoch, call)
    shmem.end(team, epoch)


@triton.jit
def two_shot(
    team, send, recv, quads, part, tail, signature,
    DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, MULTIMEM: tl.constexpr,
):  # fmt: skip
    """Rank r loads part r of all ranks' symmetric `send` reduced, and stores it into all ranks' symmetric recv.

    A part is `part` of the message's `quads` quads. TAIL: rank 0 sends the last `tail` elements, which fill no quad.
    Waits:    block b for block b of every peer, on entry and at the end.
    Ordering: the entry barrier makes the peers' input visible, the closing one their results.
    Reuse:    part r of any buffer is read and written by rank r alone, so send may be recv.
    """
    opened = shmem.begin(team)
    call = shmem.of_call(shmem.of_call(signature, send), recv)
    epoch = shmem.barrier_entry(team, opened, call)
    for step in range(tl.where(epoch == opened, shmem.steps_of(part, TILE), 0)):
        within = shmem.span_start(step, TILE) + tl.arange(0, TILE)
        index = team.rank * part + within
        mask = (within < part) & (index < quads)
        words = shmem.multimem_ld_reduce(team, send.bases, send.offset + index * 16, mask, OP, DTYPE, MULTIMEM)
        shmem.multimem_st(team, recv.bases, recv.offset + index * 16, words, mask, MULTIMEM)
    if TAIL:
        if (tl.program_id(0) == 0) & (team.rank == 0) & (epoch == opened):
            last = quads.to(tl.int64) + tl.arange(0, 1)
            words = shmem.multimem_ld_reduce(team, send.bases, send.offset + last * 16, last >= 0, OP, DTYPE, MULTIMEM)
            count = last.to(tl.int64) * (128 // DTYPE.primitive_bitwidth) + tail
            index = shmem.words_of(last, DTYPE)
            for pe in tl.static_range(team.size):
                shmem.store_words(shmem.symm_at(recv, pe, DTYPE), index, words, count[:, None], DTYPE, False)
    epoch = shmem.barrier_exit(team, epoch, call)
    shmem.end(team, epoch)


@triton.jit
def one_shot_staged(
    team, send, recv, count, quads,
    DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
    WIDE: tl.constexpr, MULTIMEM: tl.constexpr,
):  # fmt: skip
    """At step s a block copies span s of its message into its own ring, and loads span s - 1 of all rings reduced.

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
            shmem.stage(team, epoch, send, 0, step, quads, count, DTYPE, TILE, TILES, ONE_SHOT_DEPTH, WHOLE, WIDE)
            shmem.multimem_fence(MULTIMEM)
            shmem.signal_all(team, epoch, shmem.DATA, step + 1)
        if step >= 1:
            epoch = shmem.wait_all(team, epoch, shmem.DATA, step)
            slot = shmem.slot_offset(team, epoch, 0, step - 1, span * 16, ONE_SHOT_DEPTH, WHOLE)
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


@triton.jit
def two_shot_staged(
    team, send, recv, count, part, quads,
    DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
    WIDE: tl.constexpr, MULTIMEM: tl.constexpr,
):  # fmt: skip
    """At step s a block copies span s of every part into its own rings, loads span s - 1 of its own part from all
    ranks' rings reduced and stores it to all ranks at once, and writes out span s - 2 of all results.

    A part is `part` elements, `quads` quads. Rings are numbered by parts, those of the results behind.
    Waits:    block b for block b of every peer, twice a step: for their inputs, for their results.
    Ordering: stores, proxy fence, block barrier, release at sys scope; acquire at sys scope, block barrier, loads;
              multimem too.
    Reuse:    a slot returns after DEPTH = 3 steps. Inputs: when a block starts step s it has seen all results s - 3, so
              all parts of its input s - 3 are loaded. Results: when it sends result s - 1 it has seen the peers' inputs
              s - 1, so they are past their step s - 2 and have written out s - 4.
              Between calls the ring alternates by the parity of the epoch, or is WHOLE between barriers.
    """
    epoch = shmem.begin(team)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 1)
    span: tl.constexpr = TILE * TILES
    place = tl.arange(0, TILE)
    steps = shmem.steps_of(quads, span)
    for step in range(steps + 2):
        if step < steps:
            for owner in tl.static_range(team.size):
                shmem.stage(
                    team, epoch, send + owner * part, owner, step, quads, _left(count, owner, part),
                    DTYPE, TILE, TILES, TWO_SHOT_DEPTH, WHOLE, WIDE,
                )  # fmt: skip
            shmem.multimem_fence(MULTIMEM)
            shmem.signal_all(team, epoch, shmem.DATA, step + 1)
        if (step >= 1) & (step <= steps):
            epoch = shmem.wait_all(team, epoch, shmem.DATA, step)
            inputs = shmem.slot_offset(team, epoch, team.rank, step - 1, span * 16, TWO_SHOT_DEPTH, WHOLE)
            results = shmem.slot_offset(team, epoch, team.size + team.rank, step - 1, span * 16, TWO_SHOT_DEPTH, WHOLE)
            for tile in range(TILES):
                inside = tile * TILE + place
                mask = shmem.span_start(step - 1, span) + inside < quads
                words = shmem.multimem_ld_reduce(team, team.heap, inputs + inside * 16, mask, OP, DTYPE, MULTIMEM)
                shmem.multimem_st(team, team.heap, results + inside * 16, words, mask, MULTIMEM)
            shmem.multimem_fence(MULTIMEM)
            shmem.signal_all(team, epoch, shmem.RESULT, step)
        if step >= 2:
            epoch = shmem.wait_all(team, epoch, shmem.RESULT, step - 1)
            for owner in tl.static_range(team.size):
                shmem.unstage(
                    team, epoch, recv + owner * part, team.size + owner, step - 2, _left(count, owner, part),
                    DTYPE, TILE, TILES, TWO_SHOT_DEPTH, WHOLE, WIDE,
                )  # fmt: skip
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 2)
    shmem.end(team, epoch)


@triton.jit
def _left(count, owner, part):
    """How many of `count` elements lie in an owner's part."""
    return tl.minimum(tl.maximum(count - owner * part, 0), part)


def _two_shot(call, context):
    tail = call.nbytes % 16 // call.itemsize
    geometry = layout.direct(call, context, parts=context.size)
    return geometry.adding(scalars={"tail": tail}, constants={"TAIL": tail > 0})


def _one_shot(call, context):
    return layout.direct(call, context).adding(scalars={"part": -(-call.nbytes // 16)})


def _one_shot_staged(call, context):
    return layout.staged(call, context, rings=1, depth=ONE_SHOT_DEPTH.value)


def _two_shot_staged(call, context):
    return layout.staged(call, context, rings=2 * context.size, depth=TWO_SHOT_DEPTH.value, parts=context.size)


ALGORITHMS = [
    Algorithm(
        "nvls_one_shot", one_shot, _one_shot, sent=lambda n: n, symmetric=("send",), in_place=False,
        multimem=layout.reduction,
    ),
    Algorithm("nvls_one_shot_staged", one_shot_staged, _one_shot_staged, sent=lambda n: n, multimem=layout.reduction),
    Algorithm(
        "nvls_two_shot", two_shot, _two_shot, sent=lambda n: 1 + 1 / n, symmetric=("send", "recv"),
        multimem=layout.reduction,
    ),
    Algorithm(
        "nvls_two_shot_staged", two_shot_staged, _two_shot_staged, sent=lambda n: 1 + 1 / n, multimem=layout.reduction
    ),
]  # fmt: skip
