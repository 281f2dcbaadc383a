"""Triton's own interpreter, made right and fast enough to be tdccl's second target.

What is changed, and why:
- bf16: the stock interpreter adds bit patterns and truncates; here it computes in fp32 and rounds to even.
- fp8 e4m3: the stock interpreter loses the carry when a mantissa is rounded up; here torch converts.
- `tl` is patched once a process, not at each launch and each call of a device function.
- Arguments are not copied: CPU tensors are the device tensors, so a peer's shared mapping can be passed.
- Contiguous loads and stores are one memmove; what a mask leaves out is not 0 where the kernel does not ask for it.
- Arithmetic of integers and pointers, most of what a kernel does, goes around the checks of types.
- Kernels that were defined before tdccl was imported are interpreted too.
"""

import ctypes
import functools
import logging
import operator
import threading
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.jit import JITFunction

core = tl.core  # the interpreter patches what it finds under this name and `tl` in a function's globals
_builder = interpreter.interpreter_builder


def _float32_of(bf16_bits: np.ndarray) -> np.ndarray:
    return (bf16_bits.astype(np.uint32) << 16).view(np.float32)


def _bf16_bits_of(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _fp8_bits_of(values: np.ndarray) -> np.ndarray:
    """As a GPU does it: what is too large becomes the largest."""
    values = torch.from_numpy(np.clip(values, -448, 448))
    return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


_thread = threading.local()
_rewriting = threading.Lock()


def _rewritten(function: InterpretedFunction):
    """The function as the interpreter runs it, made at its first call: by one thread, as Python's parser wants."""
    with _rewriting:
        return function.rewrite()


class _Builder(type(_builder)):
    """The stock builder with its faults mended."""

    @property
    def grid_idx(self):  # of this thread: autograd's threads launch kernels too
        return _thread.grid_idx

    @grid_idx.setter
    def grid_idx(self, index):
        _thread.grid_idx = index

    @property
    def grid_dim(self):
        return _thread.grid_dim

    @grid_dim.setter
    def grid_dim(self, shape):
        _thread.grid_dim = shape

    def cast_impl(self, value, to):
        source, target = value.dtype.scalar, to.scalar
        if source == target:
            return TensorHandle(value.data, target)
        if source == tl.bfloat16:
            wide = TensorHandle(_float32_of(value.data), tl.float32)
            return wide if target == tl.float32 else super().cast_impl(wide, target)
        if target == tl.bfloat16:
            return TensorHandle(_bf16_bits_of(value.data.astype(np.float32)), tl.bfloat16)
        return super().cast_impl(value, to)

    def create_fp_ext(self, value, to):
        return self.cast_impl(value, to)

    def create_fp_trunc(self, value, to):
        return self.cast_impl(value, to)

    def create_fp_to_fp(self, value, to, rounding):
        if to.scalar != tl.float8e4nv:
            return super().create_fp_to_fp(value, to, rounding)
        return TensorHandle(_fp8_bits_of(self.cast_impl(value, tl.float32).data), to.scalar)

    def create_si_to_fp(self, value, to):
        return self.cast_impl(value, to)

    def create_ui_to_fp(self, value, to):
        return self.cast_impl(value, to)

    def create_fp_to_si(self, value, to):
        return self.cast_impl(value, to)

    def create_fp_to_ui(self, value, to):
        return self.cast_impl(value, to)

    def binary_op(self, left, right, op):
        if left.dtype.scalar != tl.bfloat16:
            return super().binary_op(left, right, op)
        left, right = (TensorHandle(_float32_of(side.data), tl.float32) for side in (left, right))
        result = super().binary_op(left, right, op)
        if result.data.dtype == np.bool_:
            return result
        return self.cast_impl(result, tl.bfloat16)

    def create_dot(self, left, right, total, *precision):
        if left.dtype.scalar == tl.bfloat16:
            left, right = (TensorHandle(_float32_of(side.data), tl.float32) for side in (left, right))
        return super().create_dot(left, right, total, *precision)

    def create_load(self, pointer, *policy):
        return self.create_masked_load(pointer, None, None, *policy)

    def create_store(self, pointer, value, *policy):
        return self.create_masked_store(pointer, value, None, *(policy or (None,)))

    def create_masked_load(self, pointers, mask, other, *policy, **named):
        if isinstance(mask, np.ndarray):  # of a tensor descriptor in 3.6
            mask = TensorHandle(mask, tl.int1)
        element = pointers.get_element_ty()
        dtype = _numpy_type(element)
        address, run = _contiguous(pointers.data, mask, dtype.itemsize)
        if run is None:
            if other is None and mask is not None and pointers.data.size > 1:  # a single 0 comes as None
                other = TensorHandle(_poison(dtype, pointers.data.shape), element)
            mask = _full_mask(pointers, mask)
            return super().create_masked_load(pointers, mask, other, *policy, **named)
        loaded = np.empty(pointers.data.size, dtype)
        if run < loaded.size:
            loaded[run:] = (_poison(dtype, loaded.shape) if other is None else other.data.reshape(-1))[run:]
        ctypes.memmove(loaded.ctypes.data, address, run * dtype.itemsize)
        return TensorHandle(loaded.reshape(pointers.data.shape), element)

    def create_masked_store(self, pointers, value, mask, *policy, **named):
        address, run = _contiguous(pointers.data, mask, value.data.itemsize)
        if run is None:
            mask = _full_mask(pointers, mask)
            super().create_masked_store(pointers, value, mask, *policy, **named)
            return
        stored = np.ascontiguousarray(value.data)
        ctypes.memmove(address, stored.ctypes.data, run * stored.itemsize)


@functools.lru_cache(64)
def _poison(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """What stands where a load was masked off and nothing was asked for: on a GPU anything may."""
    return np.full((*shape, dtype.itemsize), 0xFF, np.uint8).view(dtype).reshape(shape)


def _full_mask(pointers, mask) -> TensorHandle:
    if mask is None:
        return TensorHandle(np.ones_like(pointers.data, dtype=bool), tl.int1)
    return TensorHandle(mask.data.astype(bool), tl.int1)  # 3.9 lets an int8 through


_NO_RUN = (0, None)
_SHORT = 32  # below so many elements finding a run costs more than it saves


def _contiguous(pointers: np.ndarray, mask, itemsize: int):
    """(address, elements) if exactly a leading run of adjacent elements is accessed, else (0, None)."""
    flat = pointers.reshape(-1)
    run = flat.size
    if run < _SHORT:
        return _NO_RUN
    if mask is not None:
        wanted = mask.data.reshape(-1)
        run = int(np.count_nonzero(wanted))
        if run < flat.size and not wanted[:run].all():
            return _NO_RUN
        if run == 0:
            return 0, 0
    first = int(flat[0])
    if int(flat[run - 1]) - first != (run - 1) * itemsize:
        return _NO_RUN
    if run > 2 and not (np.diff(flat[:run]) == itemsize).all():
        return _NO_RUN
    return first, run


def _call_device_function(self, *args, **kwargs):
    return _rewritten(self)(*args, **kwargs)


def _interpreted(function: JITFunction) -> InterpretedFunction:
    twin = getattr(function, "_tdccl_interpreted", None)
    if twin is None:
        twin = function._tdccl_interpreted = InterpretedFunction(function.fn)
    return twin


def _run_kernel(self, *args, grid, warmup=False, **kwargs):
    """Replaces the launch of `kernel[grid](...)`, for kernels of users."""
    if warmup:
        return
    function = _rewritten(self)
    names = self.arg_names
    constexprs = {name for name, kind in function.__annotations__.items() if "constexpr" in str(kind)}
    bound = dict(zip(names, args))
    bound.update((name, value) for name, value in kwargs.items() if name in names)
    values = {n: v if n in constexprs else _convert(v) for n, v in bound.items()}
    shape = grid(bound) if callable(grid) else grid
    _run_blocks(function, (), values, (*shape, 1, 1)[:3])


def _convert(value: Any):
    """A value as a kernel argument; the constexpr fields of a Team stay what they are."""
    if hasattr(value, "_fields"):
        hints = type(value).__annotations__
        fields = (v if "constexpr" in str(hints[n]) else _convert(v) for n, v in zip(value._fields, value))
        return type(value)(*fields)
    if isinstance(value, tuple):
        return tuple(map(_convert, value))
    return interpreter._implicit_cvt(value)


_shapes: dict[tuple, tuple] = {}
_slow_make_tensor = tl.tensor.__init__
_slow_numpy_type = interpreter._get_np_dtype
_numpy_types: dict[str, np.dtype] = {}


def _numpy_type(kind):
    """Replaces a function of the interpreter that makes its table anew each time."""
    name = kind.scalar.name
    if name not in _numpy_types:
        _numpy_types[name] = _slow_numpy_type(kind)
    return _numpy_types[name]


def _make_tensor(self, handle, dtype):
    """Replaces `tl.tensor.__init__`, which makes its shape anew each time."""
    shape = tuple(dtype.shape) if dtype.is_block() else ()
    if shape not in _shapes:
        known = tl.tensor.__new__(tl.tensor)
        _slow_make_tensor(known, handle, dtype)
        _shapes[shape] = (known.shape, known.numel)
    self.shape, self.numel = _shapes[shape]
    self.handle, self.type, self.dtype = handle, dtype, dtype.scalar


def _broadcast(left, right, element):
    """The type of a result with elements of type `element`, where one is a scalar or both have one shape, else None."""
    shaped = left if left.is_block() else right
    if shaped is not left and not shaped.is_block():
        return element
    if shaped is left and right.is_block() and right is not left and right.shape.values != left.shape.values:
        return None
    return _shaped(shaped, element)


def _shaped(block, element):
    """The block type with another element type."""
    if block.scalar is element:
        return block
    place = (element.name, *block.shape)
    if place not in _block_types:
        _block_types[place] = block.with_element_ty(element)
    return _block_types[place]


_block_types: dict[tuple, tl.block_type] = {}


def _integers(tensor, other):
    """(the other operand for NumPy, type of the result) if both are signed integers that broadcast alike, else None."""
    wide = tensor.dtype is tl.int64
    if not (wide or tensor.dtype is tl.int32):
        return None
    if type(other) is tl.constexpr:
        other = other.value
    if type(other) is int:
        end = 1 << 63 if wide else 1 << 31
        return (other, tensor.type) if -end <= other < end else None
    if type(other) is not tl.tensor or not (other.dtype is tl.int64 or other.dtype is tl.int32):
        return None
    kind = _broadcast(tensor.type, other.type, tl.int64 if wide else other.dtype)
    return kind and (other.handle.data, kind)


def _quick(name: str, operate, compares: bool = False) -> None:
    """Replaces a method of `tl.tensor` where both operands are signed integers, which need no checks."""
    checked = getattr(tl.tensor, name)

    def method(self, other):
        known = _integers(self, other)
        if known is None:
            return checked(self, other)
        value, kind = known
        if compares:
            kind = _shaped(kind, tl.int1) if kind.is_block() else tl.int1
        return tl.tensor(TensorHandle(operate(self.handle.data, value), kind.scalar), kind)

    setattr(tl.tensor, name, method)


def _quick_masks(name: str, operate) -> None:
    """Replaces a method of `tl.tensor` where both operands are masks of one shape."""
    checked = getattr(tl.tensor, name)

    def method(self, other):
        if type(other) is not tl.tensor or self.dtype is not tl.int1 or other.dtype is not tl.int1:
            return checked(self, other)
        kind = _broadcast(self.type, other.type, tl.int1)
        if kind is None:
            return checked(self, other)
        return tl.tensor(TensorHandle(operate(self.handle.data, other.handle.data), tl.int1), kind)

    setattr(tl.tensor, name, method)


def _quick_pointers() -> None:
    """Replaces the addition of an integer tensor to a pointer."""
    checked = tl.tensor.__add__

    def method(self, other):
        if not self.dtype.is_ptr() or type(other) is not tl.tensor or not other.dtype.is_int():
            return checked(self, other)
        kind = _broadcast(self.type, other.type, self.dtype)
        return tl.tensor(_builder.create_addptr(self.handle, other.handle), kind) if kind else checked(self, other)

    tl.tensor.__add__ = method


def _quick_casts() -> None:
    """Replaces a cast from a type to itself, and one between signed integers."""
    checked = tl.tensor.to

    def method(self, dtype, *args, **kwargs):
        dtype = dtype.value if type(dtype) is tl.constexpr else dtype
        if args or kwargs:
            return checked(self, dtype, *args, **kwargs)
        if dtype is self.dtype:
            return self
        if not (dtype is tl.int64 and self.dtype is tl.int32):
            return checked(self, dtype)
        kind = _shaped(self.type, dtype) if self.type.is_block() else dtype
        return tl.tensor(TensorHandle(self.handle.data.astype(np.int64), dtype), kind)

    tl.tensor.to = method


def _patch() -> None:
    """Makes this process interpret every Triton kernel."""
    try:
        _builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    except TypeError:
        logging.getLogger(__name__).debug("this Triton's interpreter has no overflow sanitiser")
    _builder.__class__ = _Builder
    # Triton's own device functions, if Triton was imported before it was told to interpret.
    for owner in (tl, tl.core, tl.standard, tl.math, tl.tensor):
        for name, value in list(vars(owner).items()):
            if isinstance(value, JITFunction):
                setattr(owner, name, InterpretedFunction(value.fn))
    interpreter._patch_lang(_patch)  # never restored: it looks at this module's `tl` and `core`
    interpreter._get_np_dtype = _numpy_type
    tl.tensor.__init__ = _make_tensor
    for name in ("add", "radd", "sub", "mul", "rmul"):
        _quick(f"__{name}__", getattr(operator, name.removeprefix("r")))
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        _quick(f"__{name}__", getattr(operator, name), compares=True)
    _quick_masks("__and__", operator.and_)
    _quick_masks("__or__", operator.or_)
    _quick_pointers()
    _quick_casts()
    tl.tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])  # range(tensor) on NumPy >= 2.4
    # A loop variable is a plain int here, and constexpr does not know int % constexpr.
    tl.constexpr.__rmod__ = lambda self, other: other % self.value
    InterpretedFunction.__call__ = _call_device_function
    InterpretedFunction.run = _run_kernel
    JITFunction.__call__ = lambda self, *args, **kwargs: _interpreted(self)(*args, **kwargs)
    JITFunction.run = lambda self, *args, **kwargs: _interpreted(self).run(*args, **kwargs)


_patch()


def as_argument(types, value):
    """`value` as the interpreter wants an argument of these (nested) types."""
    if isinstance(types, tuple):
        converted = [as_argument(inner, v) for inner, v in zip(types, value)]
        return type(types)(*converted) if hasattr(types, "_fields") else tuple(converted)
    if types == "constexpr":
        return value
    numpy_type = {"i32": np.int32, "i64": np.int64}.get(types, np.uint64)
    triton_type = tl.str_to_ty(types, None)
    return tl.tensor(TensorHandle(np.array([value], dtype=numpy_type), triton_type), triton_type)


def interpret(kernel, arguments: list, grid: tuple[int, int, int]) -> None:
    """Runs the blocks of a grid one after another, on arguments made by `as_argument`."""
    _run_blocks(_rewritten(kernel), arguments, {}, grid)


def _run_blocks(function, args, kwargs, grid: tuple[int, int, int]) -> None:
    _builder.set_grid_dim(*grid)
    with np.errstate(all="ignore"):
        for x in range(grid[0]):
            for y in range(grid[1]):
                for z in range(grid[2]):
                    _builder.set_grid_idx(x, y, z)
                    function(*args, **kwargs)
