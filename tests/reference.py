"""What a collective must give, computed on one rank from all ranks' inputs."""

import torch


def inputs(seed: int, world: int, count: int, dtype: torch.dtype, device="cpu") -> list[torch.Tensor]:
    """Every rank's input of `count` elements: any values, small enough that a product stays finite."""
    return [_input(seed * 1009 + rank, count, dtype, device) for rank in range(world)]


def _input(seed: int, count: int, dtype: torch.dtype, device) -> torch.Tensor:
    given = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    if dtype is torch.bool:
        return torch.randint(0, 2, (count,), **given).bool()
    if dtype.is_complex:
        return torch.randn(count, dtype=dtype, **given)
    if dtype.is_floating_point:
        return (torch.randn(count, **given) * 2).to(dtype)
    low = 0 if dtype is torch.uint8 else -100
    return torch.randint(low, 100, (count,), **given).to(dtype)


def ordered(values: list[torch.Tensor], op: str) -> torch.Tensor:
    """The reduction in rank order, 16-bit floats in fp32: the bits that every algorithm must give."""
    dtype = values[0].dtype
    wide = {
        torch.float16: torch.float32,
        torch.bfloat16: torch.float32,
        torch.int8: torch.int32,
        torch.uint8: torch.int32,
    }
    total = values[0].to(wide.get(dtype, dtype))
    for value in values[1:]:
        total = _step(total, value.to(total.dtype), op)
    if op == "avg":
        size = len(values)
        # By a tensor: by a number torch multiplies with the reciprocal on GPUs, which rounds twice.
        divisor = torch.full_like(total, size)
        total = total / divisor if dtype.is_floating_point else torch.div(total, divisor, rounding_mode="trunc")
    return total.to(dtype)


def exact(values: list[torch.Tensor], op: str) -> torch.Tensor:
    """The reduction in fp64."""
    total = values[0].double()
    for value in values[1:]:
        total = _step(total, value.double(), op)
    return total / len(values) if op == "avg" else total


def _step(total, value, op):
    arithmetic = {
        "sum": torch.add, "avg": torch.add, "prod": torch.mul, "min": torch.minimum, "max": torch.maximum,
        "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
    }  # fmt: skip
    return arithmetic[op](total, value)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit by bit (NaN equals NaN, 0.0 does not equal -0.0)."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return (
        torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)) if left.numel() else True
    )
