"""Arrays and streams of any framework, seen as torch tensors and stream handles."""

import math
import operator
from typing import Any

import torch

from tdccl.errors import ArgumentError

TRITON_NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "u8",
}  # fmt: skip

ARITHMETIC = {"sum", "avg", "min", "max", "prod"}
BITWISE = {"and", "or", "xor"}
OPS = ARITHMETIC | BITWISE


def as_tensor(array: Any, name: str, written: bool = False) -> torch.Tensor:
    """A torch tensor over the same memory: of a torch, CuPy or NumPy array, or by DLPack or
    `__cuda_array_interface__`. Raises ArgumentError for anything else, and if it is to be written but is read-only."""
    if isinstance(array, torch.Tensor):
        if array.layout is not torch.strided:
            raise ArgumentError(f"{name} is {array.layout}, expected a dense tensor; pass to_dense() of it")
        return array
    if min(getattr(array, "strides", None) or (0,)) < 0:
        raise ArgumentError(f"{name} has negative strides {array.strides}; pass a contiguous copy")
    if written and not getattr(getattr(array, "flags", None), "writeable", True):
        raise ArgumentError(f"{name} is read-only, and would be written")
    if hasattr(array, "__dlpack__"):
        try:
            return torch.from_dlpack(array)
        except (RuntimeError, BufferError, TypeError) as error:
            raise ArgumentError(f"{name}: its memory cannot be shared by DLPack: {error}") from error
    if hasattr(array, "__cuda_array_interface__"):
        return torch.as_tensor(array, device="cuda")
    raise ArgumentError(
        f"{name} is a {type(array).__name__}, expected a torch tensor, a CuPy array, or anything with "
        "DLPack or __cuda_array_interface__"
    )


def whole_numbers(values: Any) -> tuple[int, ...] | None:
    """Whole numbers >= 0, from anything that lists them; None if it does not."""
    try:
        found = tuple(map(operator.index, values))
    except TypeError:
        return None
    return found if min(found, default=0) >= 0 else None


def checked_shape(what: str, shape: Any, dtype: Any) -> tuple[int, ...]:
    """A shape, or a number of elements, as a tuple. Raises ArgumentError unless there can be a tensor of it."""
    try:
        found = whole_numbers((operator.index(shape),))
    except TypeError:
        found = whole_numbers(shape)
    if found is None or not isinstance(dtype, torch.dtype) or math.prod(found) * dtype.itemsize >= 1 << 63:
        raise ArgumentError(
            f"{what}: got shape {shape!r} and dtype {dtype}, expected whole numbers >= 0, of less than 2**63 bytes, "
            "and a torch.dtype"
        )
    return found


def signature(collective: str, value: Any, timeout: float | None, send: Any, recv: Any) -> tuple | None:
    """Equal for two calls exactly if what holds for the one holds for the other, unless they are of complex tensors,
    which may be conjugate; None: look closer at the arrays.

    Of shapes only the number of elements counts; where more does, it is in `value`.
    """
    if type(send) is not torch.Tensor or type(recv) is not torch.Tensor:
        return None
    dtype = send.dtype
    if send.is_neg() or not send.is_contiguous():
        return None
    if recv is send:
        return collective, value, timeout, dtype, send.data_ptr(), send.numel()
    if recv.dtype is not dtype or recv.is_neg() or not recv.is_contiguous():
        return None
    return collective, value, timeout, dtype, send.data_ptr(), send.numel(), recv.data_ptr(), recv.numel()


def like(tensor: torch.Tensor, array: Any) -> Any:
    """`tensor` as an array of the framework that `array` came from, over the same memory."""
    if isinstance(array, torch.Tensor):
        return tensor
    framework = type(array).__module__.partition(".")[0]
    if framework == "cupy":
        import cupy

        return cupy.from_dlpack(tensor)
    if framework == "numpy":
        return tensor.numpy()
    return tensor


def stream_handle(stream: Any) -> int:
    """The raw handle of a stream: an int, a torch or a CuPy stream."""
    if isinstance(stream, int):
        return stream
    for attribute in ("cuda_stream", "ptr"):
        if hasattr(stream, attribute):
            return getattr(stream, attribute)
    if hasattr(stream, "__cuda_stream__"):
        return stream.__cuda_stream__()[1]
    raise ArgumentError(f"stream is a {type(stream).__name__}, expected None, an int, a torch or a CuPy stream")


def check_reduction(collective: str, op: str, dtype: torch.dtype) -> None:
    """Raises ArgumentError unless `op` is defined for `dtype`."""
    if not isinstance(op, str) or op not in OPS:
        known = ", ".join(sorted(OPS))
        raise ArgumentError(f"{collective}: op is {op!r}, expected one of {known}")
    if dtype not in TRITON_NAMES:
        known = ", ".join(str(d).removeprefix("torch.") for d in TRITON_NAMES)
        raise ArgumentError(f"{collective}: {dtype} cannot be reduced; it works on {known}")
    if dtype is torch.bool and op in ARITHMETIC:
        raise ArgumentError(f"{collective}: {op} is not defined for bool, expected and, or or xor")
    if dtype.is_floating_point and op in BITWISE:
        raise ArgumentError(f"{collective}: {op} is not defined for {dtype}, expected sum, avg, min, max or prod")
