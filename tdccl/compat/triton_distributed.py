"""Triton-distributed's primitives on stock Triton, under its names: a kernel written for it changes its import.

    import tdccl.compat.triton_distributed as dl

Its kernels take no team: who talks to whom is known to the process. So the host names a communicator once, and makes
the tensors that kernels reach on other ranks in its symmetric memory:

    dl.initialize(comm, heap_bytes)
    buffer = dl.create_tensor((rows, columns), torch.bfloat16)
    signals = dl.create_tensor((comm.size,), torch.int64)

Waits are bounded, as all of tdccl's: `comm.check()`, and the communicator's next call, raise what went wrong.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tdccl import environment
from tdccl.communicator import Communicator
from tdccl.errors import ArgumentError
from tdccl.language import overlap
from tdccl.language.signals import may_poll, record_fault
from tdccl.language.team import USER

_BACKEND = tl.constexpr("emulation" if environment.emulated() else "hip" if torch.version.hip else "cuda")
# Where in this process the words are that kernels look up: compiled into them, so the same as long as it lives.
_CONTEXT = tl.constexpr(0)
_SET, _INTER_NODE = tl.constexpr("set"), tl.constexpr("inter_node")

_RANK, _SIZE, _BASES, _LOCAL, _CONTROL, _TIMEOUT = map(tl.constexpr, range(6))


class _Host:
    """What the process has named: the words for kernels, and what is left of the symmetric heap."""

    words: torch.Tensor | None = None
    heap: torch.Tensor | None = None
    used = 0


def initialize(comm: Communicator, heap_bytes: int) -> None:
    """Names the communicator of this process's kernels, and makes a symmetric heap of so many bytes; collective.

    Another one may follow: the kernels then talk to its ranks, and tensors of the heap before are no longer reached.
    Raises ArgumentError where it is on another device, or its ranks are on several nodes, and what `Communicator.empty`
    raises.
    """
    global _CONTEXT
    comm.check_one_node("initialize")
    if _Host.words is None:
        _Host.words = torch.zeros(8, dtype=torch.int64, device=comm.device)
        _CONTEXT = tl.constexpr(_Host.words.data_ptr())
    if _Host.words.device != comm.device:
        raise ArgumentError(f"initialize: the communicator is on {comm.device}, kernels know {_Host.words.device}")
    _Host.heap, _Host.used = comm.empty(heap_bytes, torch.uint8), 0
    team = comm.team
    addresses = [part if isinstance(part, int) else part.data_ptr() for part in (team.local, team.control)]
    words = [comm.rank, comm.size, comm.symmetric(_Host.heap).bases.data_ptr(), *addresses, int(comm.timeout * 1e9)]
    _Host.words[: len(words)] = torch.tensor(words)


def create_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed tensor at the same place of every rank's heap; every rank makes the same ones in the same order.

    Raises ArgumentError where the heap is full, or `initialize` was not called.
    """
    if _Host.heap is None:
        raise ArgumentError("create_tensor: call initialize(comm, heap_bytes) first")
    nbytes = math.prod(shape) * dtype.itemsize
    if _Host.used + nbytes > _Host.heap.numel():
        raise ArgumentError(
            f"create_tensor: {nbytes} bytes for {tuple(shape)}, but {_Host.heap.numel() - _Host.used} of "
            f"{_Host.heap.numel()} are left; initialize with more"
        )
    tensor = _Host.heap[_Host.used : _Host.used + nbytes].view(dtype).view(shape)
    _Host.used += -(-nbytes // 256) * 256
    return tensor


class _Waiter(NamedTuple):
    """What a bounded wait needs of a team."""

    local: object
    control: object
    timeout: object
    rank: object


@triton.jit
def _word(index: tl.constexpr):
    return tl.load(tl.full([], _CONTEXT, tl.int64).to(tl.pointer_type(tl.int64)) + index)


@triton.jit
def rank(axis=-1):
    """This rank, int32. Ordering: none."""
    return _word(_RANK).to(tl.int32)


@triton.jit
def num_ranks(axis=-1):
    """How many ranks there are, int32. Ordering: none."""
    return _word(_SIZE).to(tl.int32)


@triton.jit
def symm_at(ptr, rank):
    """The place on `rank` of what `ptr`, a pointer or a tensor of pointers into the heap, is here. Ordering: none."""
    bases = _word(_BASES).to(tl.pointer_type(tl.int64))
    apart = tl.multiple_of(tl.load(bases + rank) - tl.load(bases + _word(_RANK)), 16)
    return (ptr.to(tl.pointer_type(tl.int8)) + apart).to(ptr.dtype)


@triton.jit
def wait(barrierPtrs, numBarriers, scope: tl.constexpr, semantic: tl.constexpr, waitValue=1):
    """Waits until each of `numBarriers` integers from `barrierPtrs` on is `waitValue`; returns a token.

    Ordering: `semantic` (acquire, relaxed) at `scope` (gpu, sys), then a block barrier. Bounded: ends after the
    communicator's timeout, or on abort, with the fault recorded.
    """
    waiter = _Waiter(
        _word(_LOCAL).to(tl.pointer_type(tl.int8)),
        _word(_CONTROL).to(tl.pointer_type(tl.int64)),
        _word(_TIMEOUT),
        rank(),
    )
    for barrier in range(numBarriers):
        _wait_one(waiter, barrierPtrs + barrier, scope, semantic, waitValue)
    tl.debug_barrier()
    overlap.fence_descriptors(_BACKEND)
    return 0


@triton.jit
def _wait_one(waiter, pointer, scope: tl.constexpr, semantic: tl.constexpr, value):
    seen = tl.atomic_add(pointer, 0, sem=semantic, scope=scope)
    go = tl.full([], 1, tl.int1)
    polls = 0
    started = tl.full([], 0, tl.int64)
    while (seen != value) & go:
        polls += 1
        go, started = may_poll(waiter, _BACKEND, polls, started)
        if go:
            seen = tl.atomic_add(pointer, 0, sem=semantic, scope=scope)
    if not go:  # who should have come is not known here: the rank that waits stands for it
        zero = tl.full([], 0, tl.int64)
        record_fault(waiter, waiter.rank, USER, zero, zero + value, seen.to(tl.int64))


@triton.jit
def consume_token(value, token):
    """`value`, whose use comes after the wait that gave the token. (The wait's block barrier already says so.)"""
    return value


@triton.jit
def notify(ptr, rank, signal=1, sig_op: tl.constexpr = _SET, comm_scope: tl.constexpr = _INTER_NODE):
    """Sets the integer at `ptr` on `rank` to `signal`, or adds it (sig_op="add").

    Ordering: block barrier, then release at the scope of the GPU (comm_scope="gpu") or the system ("intra_node",
    "inter_node"): what the block did before is visible to who waits with acquire.
    """
    SCOPE: tl.constexpr = "gpu" if comm_scope == "gpu" else "sys"
    target = symm_at(ptr, rank)
    tl.debug_barrier()
    if sig_op == "set":
        tl.atomic_xchg(target, signal, sem="release", scope=SCOPE)
    else:
        tl.static_assert(sig_op == "add", "notify: sig_op is set or add")
        tl.atomic_add(target, signal, sem="release", scope=SCOPE)
