"""Spans and tiles: how a block walks a message, and the rings of scratch through which ordinary tensors pass.

Block b of a grid of B takes spans b, b + B, b + 2B, ... one a step. A span is SPAN elements: one tile or a few, a
tile being what the block holds in registers at once. Indices are int64.
"""

import triton
import triton.language as tl

from tdccl.language.signals import heap_at, local_at
from tdccl.language.team import ring_offset


@triton.jit
def steps_of(count, SPAN: tl.constexpr):
    """How many spans of `count` elements this block has to walk."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    spans = (count + SPAN - 1) // SPAN
    return (tl.maximum(spans - block, 0) + blocks - 1) // blocks


@triton.jit
def span_start(step, SPAN: tl.constexpr):
    """Index (int64) of the first element of the span that this block walks at `step`."""
    return (tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)) * SPAN


@triton.jit
def pick(values, index):
    """values[index] for a tuple of scalars and an index known only at run time."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def slot_offset(team, epoch, ring, step, SLOT_BYTES: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr):
    """Byte offset in any rank's heap of the slot for `step` in ring number `ring` of this block; see `remote_slot`."""
    return ring_offset(team, epoch, WHOLE) + (ring * DEPTH + step % DEPTH) * SLOT_BYTES


@triton.jit
def remote_slot(
    team, epoch, ring, step, pe, DTYPE: tl.constexpr, SPAN: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr
):
    """Pointer to the slot for `step` in ring number `ring` of this block on rank `pe`.

    A ring has DEPTH slots of SPAN elements; a kernel numbers its rings (by distance, by stage) itself, and
    its geometry sees to it that they fit into `team.ring_bytes`, or into twice as much if WHOLE. Ordering: none.
    """
    slot_bytes: tl.constexpr = SPAN * DTYPE.primitive_bitwidth // 8
    return heap_at(team, slot_offset(team, epoch, ring, step, slot_bytes, DEPTH, WHOLE), pe, DTYPE)


@triton.jit
def local_slot(
    team, epoch, ring, step, DTYPE: tl.constexpr, SPAN: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr
):
    """The same slot on this rank. Ordering: none."""
    slot_bytes: tl.constexpr = SPAN * DTYPE.primitive_bitwidth // 8
    return local_at(team, slot_offset(team, epoch, ring, step, slot_bytes, DEPTH, WHOLE), DTYPE)


@triton.jit
def load_ranks(
    team, epoch, own, step, start, mask,
    DTYPE: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """One tile from every rank, as a tuple in rank order: this rank's at `own`, each other's from its ring.

    Rank r's ring is the one for its distance, (rank - r) % size - 1; the tile begins `start` elements into the slot for
    `step`. Addresses are promised to be multiples of ALIGN bytes. Ordering: plain loads; wait for the peers first.
    """
    values = ()
    for source in tl.static_range(team.size):
        ring = (team.rank + team.size - source) % team.size - 1
        slot = local_slot(team, epoch, ring, step, DTYPE, SPAN, DEPTH, WHOLE) + start
        address = tl.where(source == team.rank, own.to(tl.int64), slot.to(tl.int64))
        pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGN)
        values = values + (tl.load(pointer + tl.arange(0, TILE), mask=mask, other=0),)
    return values
