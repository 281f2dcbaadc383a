"""Reductions: in rank order, 16-bit floats in fp32, so that every algorithm gives the same bits."""

import triton
import triton.language as tl


@triton.jit
def widen(value, DTYPE: tl.constexpr):
    """`value` in the type in which DTYPE is accumulated: fp32 for smaller floats, int32 for small integers."""
    if tl.float16 == DTYPE or tl.bfloat16 == DTYPE or DTYPE.is_fp8():
        return value.to(tl.float32)
    elif tl.int8 == DTYPE or tl.uint8 == DTYPE:
        return value.to(tl.int32)
    else:
        return value


@triton.jit
def accumulate(total, value, OP: tl.constexpr):
    """One step of the reduction. min and max let a NaN through, as torch does."""
    if OP == "sum" or OP == "avg":
        return total + value
    elif OP == "prod":
        return total * value
    elif OP == "min":
        return tl.where((value < total) | (value != value), value, total)
    elif OP == "max":
        return tl.where((value > total) | (value != value), value, total)
    elif OP == "and":
        return total & value
    elif OP == "or":
        return total | value
    else:
        tl.static_assert(OP == "xor", "OP is sum, avg, min, max, prod, and, or or xor")
        return total ^ value


@triton.jit
def settle(total, OP: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """The accumulated total as DTYPE; avg divides here, once (integers toward zero)."""
    if OP == "avg":
        if total.dtype == tl.float32:
            total = tl.div_rn(total, tl.full(total.shape, SIZE, tl.float32))
        elif total.dtype == tl.float64:
            total = total / SIZE
        else:
            total = total // SIZE
    return total.to(DTYPE)


@triton.jit
def fold(values, OP: tl.constexpr, DTYPE: tl.constexpr):
    """Reduces a tuple with the values of ranks 0 .. n-1, in that order, to one DTYPE value."""
    total = widen(values[0], DTYPE)
    for rank in tl.static_range(1, len(values)):
        total = accumulate(total, widen(values[rank], DTYPE), OP)
    return settle(total, OP, len(values), DTYPE)
