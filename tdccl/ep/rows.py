"""Rows: how a kernel holds one in registers, and how it is quantised to fp8.

A row of WIDTH elements is one tile, padded to a power of two. To be quantised it is a tile of groups of 128 elements,
each with a scale of its own: fp32, or a power of two of which only the exponent is kept, four in an int32 (UE8M0).
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(128)
LARGEST = tl.constexpr(448.0)  # of fp8 e4m3
SMALLEST_AMAX = tl.constexpr(1e-4)


@triton.jit
def row_tile(WIDTH: tl.constexpr, PADDED: tl.constexpr, GROUPED: tl.constexpr):
    """Offsets of a row's elements and the mask of those that there are: [PADDED], or GROUPED: [PADDED / 128, 128]."""
    if GROUPED:
        offset = tl.arange(0, PADDED // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        offset = tl.arange(0, PADDED)
    return offset, offset < WIDTH


@triton.jit
def wide(number):
    """A number as int64: a loop's variable may be a plain int in emulation."""
    return tl.full([], 0, tl.int64) + number


@triton.jit
def quantise(tile, UE8M0: tl.constexpr):
    """A GROUPED tile as fp8 e4m3 in uint8 [groups, 128], and the words (int32) of its scales: fp32 bits [groups], or
    UE8M0 [groups / 4]."""
    values = tile.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(values), axis=1), SMALLEST_AMAX)
    largest = tl.full(amax.shape, LARGEST, tl.float32)
    scale = tl.div_rn(amax, largest)
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)  # rounded up
        factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        fours = tl.reshape(exponent, [exponent.shape[0] // 4, 4])
        words = tl.sum(fours << (tl.arange(0, 4) * 8)[None, :], axis=1)
    else:
        factor = tl.div_rn(largest, amax)
        words = scale.to(tl.int32, bitcast=True)
    return (values * factor[:, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True), words
