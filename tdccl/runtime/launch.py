"""From a kernel and its arguments to something that launches in a few microseconds.

`Arguments` names a kernel's arguments with their types; `compile_kernel` makes machine code of it, with or without a
GPU; `bind` fixes all values once, with machine code from a pack or the compiler, and what it returns launches with two
fresh addresses a call.
"""

import ctypes
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from tdccl.environment import emulated
from tdccl.errors import InitError
from tdccl.runtime import bare, pack
from tdccl.runtime.algorithm import ITEMSIZE, Geometry
from tdccl.transport import nvshmem

_layout = bare.read("tdccl.language.team")
_rails = bare.read("tdccl.language.rails")
Team, Symmetric, Rail = _layout.Team, _layout.Symmetric, _rails.Rail

_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}


class Arguments:
    """A kernel's arguments by name: their types, their values, and which addresses are 16-byte aligned.

    Values of "constexpr" type are baked in; `send` and `recv` change from call to call. `signature` is for kernels that
    reach into peers' buffers, see `barrier_entry`; `rail` for those that go to other nodes.
    """

    def __init__(
        self,
        kernel,
        geometry: Geometry,
        symmetric: tuple[str, ...],
        op: str | None,
        signature: int = 0,
        rail: Rail | None = None,
    ):
        """Types from the geometry; `values` still lacks team, send and recv."""
        names = kernel.arg_names
        pointer = "*" + geometry.dtype
        self.types: dict[str, Any] = {"team": _layout.TEAM_TYPES, "rail": _rails.RAIL_TYPES, "signature": "i32"}
        for name in ("send", "recv"):
            self.types[name] = _layout.SYMMETRIC_TYPES if name in symmetric else pointer
        self.values: dict[str, Any] = {"signature": signature, "rail": rail}
        for name, value in geometry.counts.items():
            self.types[name] = ("i64",) * len(value) if isinstance(value, tuple) else "i64"
            self.values[name] = value
        for name, value in geometry.scalars.items():
            self.types[name] = "i32"
            self.values[name] = value
        for name, value in {**geometry.constants, "DTYPE": geometry.dtype, "OP": op}.items():
            self.types[name] = "constexpr"
            self.values[name] = value
        self.types = {name: self.types[name] for name in names}
        self.values = {name: self.values[name] for name in names if name in self.values}
        lanes = 16 // ITEMSIZE[geometry.dtype]
        self._promises = {name: lanes for name in geometry.counts} if geometry.aligned else {}
        if geometry.aligned:
            self._promises |= {"send": 16, "recv": 16}

    def key(self) -> tuple:
        """What of it goes into the machine code."""
        constants = tuple((name, str(value)) for name, value in self.values.items() if self.types[name] == "constexpr")
        across = (tuple(self.values["rail"][3:]), nvshmem.version()) if self.across else ()
        return str(self.types), constants, tuple(self._promises.items()), *across

    @property
    def across(self) -> bool:
        """Whether the kernel goes to other nodes, so that NVSHMEM's bitcode is linked to it."""
        return "rail" in self.types

    def promised(self, name: str) -> int:
        """A power of two that divides the argument's value, as the compiler is told."""
        return 16 if name in ("team", "rail") else self._promises.get(name, 1)


def _constant(name: str, value):
    """A constexpr argument as a kernel takes it."""
    if name not in ("DTYPE", "WIRE"):
        return value
    from triton.language import str_to_ty

    return str_to_ty("*" + value, None).element_ty


def _leaves(types, values=None, path=()):
    """(path, type, value) of every scalar in nested tuples of types."""
    if isinstance(types, tuple):
        for i, inner in enumerate(types):
            yield from _leaves(inner, None if values is None else values[i], (*path, i))
    else:
        yield path, types, values


def keyed(kernel):
    """The kernel, with a key in Triton's cache that is the same in every process: to be compiled or launched by Triton.

    Triton 3.6 makes a key from what is known of the callees by then: it would depend on what was compiled before.
    """
    if getattr(kernel, "hash", "") is None:  # what is interpreted has none
        _callees_first(kernel, set())
    return kernel


def _callees_first(function, seen: set[int]) -> None:
    """Computes Triton's keys of a function's callees, then its own."""
    from triton.runtime.jit import JITCallable

    seen.add(id(function))  # its hash is its key
    names = function.fn.__code__.co_names
    known = [function.fn.__globals__.get(name) for name in names]
    known += [getattr(module, name, None) for module in known if isinstance(module, ModuleType) for name in names]
    for callee in known:
        if isinstance(callee, JITCallable) and id(callee) not in seen:
            _callees_first(callee, seen)
    _ = function.cache_key


def compile_kernel(kernel, arguments: Arguments, team_constants: Team, warps: int, target):
    """Compiles for `target` (a triton GPUTarget); needs no GPU. Returns Triton's CompiledKernel.

    Raises InitError where this Triton cannot link NVSHMEM's bitcode.
    """
    import triton
    from triton.compiler import ASTSource

    constants, attributes = {}, {}
    for position, (name, types) in enumerate(arguments.types.items()):
        values = team_constants if name == "team" else arguments.values.get(name)
        for path, leaf, value in _leaves(types, values, (position,)):
            if leaf == "constexpr":
                constants[path] = _constant(name, value)
            elif leaf.startswith("*") or name != "team":
                divisor = arguments.promised(name)
                if divisor > 1 and leaf != "i32":
                    attributes[path] = [["tt.divisibility", divisor]]
    source = ASTSource(keyed(bare.kernel_of(kernel)), arguments.types, constants, attributes)
    # No contraction of a product and a sum: the bits must not depend on what the compiler fuses.
    options = {"num_warps": warps, "enable_fp_fusion": False}
    if not arguments.across:
        return triton.compile(source, target=target, options=options)
    bitcode = nvshmem.device_library(target.arch)
    try:
        return triton.compile(source, target=target, options=options | {"extern_libs": {"nvshmem": bitcode}})
    except ValueError as error:  # of LLVM's reader, which knows what was written by its own version or an older one
        raise InitError(
            f"Triton {triton.__version__} cannot link {bitcode}, of NVSHMEM (version {nvshmem.version()}): {error}; "
            "take a newer Triton or an older NVSHMEM"
        ) from error


def bind(kernel, arguments: Arguments, team: Team, geometry: Geometry, tables: dict[str, int]) -> Callable:
    """Binds all values once; returns launch(send, recv, stream) for fresh addresses (or offsets) of send and recv.

    `launch.assign(name, values)` changes the tuple of counts that the next launches take.
    tables: for each symmetric argument, the address of its table of segment bases.
    """
    values = dict(arguments.values, team=team)
    for name in ("send", "recv"):
        if name in arguments.types:
            values[name] = Symmetric(tables[name], 0) if name in tables else 0
    binder = _bind_emulated if emulated() else _bind_cuda
    return binder(kernel, arguments, values, geometry)


def identity(kernel, arguments: Arguments, team: Team, warps: int) -> str:
    """All that goes into a kernel's machine code besides the sources, and the same in every process."""
    function = kernel.fn
    return repr((function.__module__, function.__qualname__, arguments.key(), tuple(team[5:]), warps))


@functools.cache
def _target():
    import triton

    return triton.runtime.driver.active.get_current_target()


_loaded: dict[tuple[str, int], pack.Loaded] = {}


def _load(kernel, arguments: Arguments, team: Team, warps: int) -> pack.Loaded:
    """The kernel on the current device, loaded once: from a pack that has it, else compiled here."""
    device, name = torch.cuda.current_device(), identity(kernel, arguments, team, warps)
    loaded = _loaded.get((name, device))
    if loaded is None:
        _enter(device)
        loaded = pack.load(name, torch.cuda.get_device_capability(device))
        if loaded is None:
            compiled = compile_kernel(kernel, arguments, team, warps, _target())
            compiled._init_handles()
            loaded = pack.Loaded(compiled.function, compiled.metadata.shared, compiled, compiled.module)
        if arguments.across:
            nvshmem.initialize_module(loaded.module)
        _loaded[name, device] = loaded
    return loaded


def _enter(device: int) -> None:
    """Gives this thread the device's context, which the driver asks for: on device 0, where every thread begins, torch
    sees nothing to switch to, and a new thread has none before its first call of CUDA's runtime."""
    from cuda.bindings import runtime

    runtime.cudaSetDevice(device)


def _bind_cuda(kernel, arguments: Arguments, values, geometry: Geometry):
    from cuda.bindings import driver

    device = torch.cuda.current_device()
    loaded = _load(kernel, arguments, values["team"], geometry.warps)
    cells, fresh, tuples = [], {}, {}
    for name, types in arguments.types.items():
        for _, leaf, value in _leaves(types, values[name]):
            if leaf != "constexpr":
                cells.append(_C_TYPES.get(leaf, ctypes.c_void_p)(value))
        if isinstance(types, tuple):
            tuples[name] = cells[-len(types) :]
        if name in ("send", "recv"):
            fresh[name] = cells[-1]  # the address itself, or the offset that a Symmetric ends with
    cells += [ctypes.c_void_p(0), ctypes.c_void_p(0)]  # Triton's two scratch pointers, unused here
    pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
    parameters = ctypes.addressof(pointers)
    send_cell = fresh.get("send", ctypes.c_int64())
    recv_cell = fresh.get("recv", ctypes.c_int64())
    function = driver.CUfunction(loaded.function)
    threads, shared, grid = geometry.warps * 32, loaded.shared, geometry.grid
    launch_kernel = driver.cuLaunchKernel

    def launch(send, recv, stream, _keep=(loaded, cells, pointers)):
        send_cell.value = send
        recv_cell.value = recv
        (status,) = launch_kernel(function, grid, 1, 1, threads, 1, 1, shared, stream, parameters, 0)
        if status and status == _NO_CONTEXT:
            _enter(device)
            (status,) = launch_kernel(function, grid, 1, 1, threads, 1, 1, shared, stream, parameters, 0)
        if status:
            raise RuntimeError(f"cuLaunchKernel of {kernel.fn.__name__}: {status}")

    def assign(name: str, values: tuple[int, ...]) -> None:
        for cell, value in zip(tuples[name], values):
            cell.value = value

    launch.assign = assign
    return launch


def _bind_emulated(kernel, arguments: Arguments, values, geometry: Geometry):
    from tdccl.runtime.emulation import as_argument, interpret

    values = {name: _constant(name, value) for name, value in values.items()}

    def launch(send, recv, stream):
        bound = []
        for name, types in arguments.types.items():
            value = values[name]
            if name in ("send", "recv"):
                address = send if name == "send" else recv
                value = value._replace(offset=address) if isinstance(value, Symmetric) else address
            bound.append(as_argument(types, value))
        interpret(kernel, bound, (geometry.grid, 1, 1))

    launch.assign = values.__setitem__
    return launch
