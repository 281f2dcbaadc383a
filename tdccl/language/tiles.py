"""Tiles: how a block walks a message, and the ring of scratch through which tiles of ordinary tensors pass.

Block b of a grid of B takes tiles b, b + B, b + 2B, ... A tile is TILE elements; indices are int64.
"""

import triton
import triton.language as tl

from tdccl.language.signals import heap_at, local_at
from tdccl.language.team import ring_offset


@triton.jit
def steps_of(count, TILE: tl.constexpr):
    """How many tiles of `count` elements this block has to walk."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    tiles = (count + TILE - 1) // TILE
    return (tl.maximum(tiles - block, 0) + blocks - 1) // blocks


@triton.jit
def tile_start(step, TILE: tl.constexpr):
    """Index (int64) of the first element of the tile that this block walks at `step`."""
    return (tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)) * TILE


@triton.jit
def pick(values, index):
    """values[index] for a tuple of scalars and an index known only at run time."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def _slot_offset(team, epoch, lane, step, DTYPE: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    slot_bytes: tl.constexpr = TILE * DTYPE.primitive_bitwidth // 8
    return ring_offset(team, epoch) + (lane * DEPTH + step % DEPTH) * slot_bytes


@triton.jit
def remote_slot(team, epoch, lane, step, pe, DTYPE: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """Pointer to the slot for `step` in ring number `lane` of this block on rank `pe`.

    A ring has DEPTH slots of one tile; a kernel numbers its rings (by source rank, by stage) itself,
    and its geometry sees to it that they fit into `team.ring_bytes`. Ordering: none.
    """
    return heap_at(team, _slot_offset(team, epoch, lane, step, DTYPE, TILE, DEPTH), pe, DTYPE)


@triton.jit
def local_slot(team, epoch, lane, step, DTYPE: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """The same slot on this rank. Ordering: none."""
    return local_at(team, _slot_offset(team, epoch, lane, step, DTYPE, TILE, DEPTH), DTYPE)
