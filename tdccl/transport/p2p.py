"""Symmetric memory on GPUs of one host: device memory shared by CUDA IPC handles over NVLink or PCIe.

Needs no NCCL, no torch group and no multicast object, so any number of overlapping groups can be made in
any order. Two ranks may share one GPU.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from cuda.bindings import runtime

from tdccl.errors import InitError, TdcclError
from tdccl.runtime.streams import aside
from tdccl.transport.bootstrap import Bootstrap
from tdccl.transport.symmetric_memory import SymmetricMemory, free_kept, keep, together


def allocate(bootstrap: Bootstrap, nbytes: int, device: torch.device) -> SymmetricMemory:
    """Allocates `nbytes` zeroed bytes on every rank's GPU; collective over the bootstrap's ranks.

    Raises InitError, on all ranks, where memory is short on one or it cannot reach a peer's.
    """
    free_kept()

    def obtain() -> _Raw:
        memory = _Raw(check(runtime.cudaMalloc(nbytes), f"cudaMalloc of {nbytes} bytes"), nbytes)
        weakref.finalize(memory, _free, memory.address, device).atexit = False
        with aside(device) as stream:
            check(runtime.cudaMemsetAsync(memory.address, 0, nbytes, stream), "cudaMemsetAsync")
        return memory

    return _shared(bootstrap, obtain, device)


def share(bootstrap: Bootstrap, address: int, nbytes: int, device: torch.device, owner: Any) -> SymmetricMemory:
    """Shares `nbytes` bytes that start where somebody else's cudaMalloc put them; collective.

    Keeps `owner`, with whom the memory lives, as long as a peer has it mapped. Raises InitError, on all ranks, where
    one cannot reach a peer's.
    """
    return _shared(bootstrap, lambda: _Raw(address, nbytes, owner), device)


def _shared(bootstrap: Bootstrap, obtain: Callable[[], "_Raw"], device: torch.device) -> SymmetricMemory:
    """Exchanges handles, and maps the peers' memory; what obtain() returns is kept until no peer has it mapped."""
    memory: _Raw | None = None
    shared: SymmetricMemory | None = None

    def export() -> bytes:
        nonlocal memory
        memory = obtain()
        handle = check(runtime.cudaIpcGetMemHandle(memory.address), "cudaIpcGetMemHandle")
        return bytes(handle.reserved)

    def open_all() -> None:
        nonlocal shared
        for rank, reserved in enumerate(handles):
            if rank != bootstrap.rank:
                addresses[rank] = _open(reserved, rank)
        shared = SymmetricMemory(torch.as_tensor(memory, device=device), addresses, release)

    def release(bootstrap, peers_gone):
        with torch.cuda.device(device):
            _close(addresses, memory.address)
        try:
            if bootstrap is not None:
                bootstrap.barrier()  # memory may be freed only after every peer has closed it
                return
        except TdcclError:
            pass
        keep(memory, peers_gone)

    with torch.cuda.device(device):
        handles = together(bootstrap, export)
        addresses = [memory.address] * bootstrap.size
        try:
            together(bootstrap, open_all)
        except BaseException as error:
            _close(addresses, memory.address)
            if isinstance(error, InitError) and not error.absent:
                bootstrap.barrier()  # as in `release`: all ranks are here
            raise
    return shared


def _close(addresses: list[int], own: int) -> None:
    """Unmaps the peers' memory. What the driver says is not asked: a peer may have died, and nothing is left to do."""
    for address in addresses:
        if address != own:
            runtime.cudaIpcCloseMemHandle(address)


def pin(address: int, nbytes: int) -> None:
    """Lets kernels of all GPUs use host memory, at the address that it has here. Raises InitError."""
    flags = runtime.cudaHostRegisterPortable | runtime.cudaHostRegisterMapped
    check(runtime.cudaHostRegister(address, nbytes, flags), f"cudaHostRegister of {nbytes} bytes")


def unpin(address: int) -> None:
    """Takes `pin` back."""
    check(runtime.cudaHostUnregister(address), "cudaHostUnregister")


def _open(reserved: bytes, rank: int) -> int:
    handle = runtime.cudaIpcMemHandle_t()
    handle.reserved = reserved
    flags = runtime.cudaIpcMemLazyEnablePeerAccess
    return check(
        runtime.cudaIpcOpenMemHandle(handle, flags),
        f"cudaIpcOpenMemHandle of rank {rank}'s memory (are both GPUs on this host, with peer access?)",
    )


def check(result, what: str):
    """What a call of the CUDA runtime returned. Raises InitError if it failed."""
    status, *values = result
    if status != runtime.cudaError_t.cudaSuccess:
        raise InitError(f"{what}: {status.name}")
    return int(values[0]) if values and not hasattr(values[0], "reserved") else (values or [None])[0]


def _free(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        check(runtime.cudaFree(address), "cudaFree")


def tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Device memory as a uint8 tensor, which does not own it."""
    return torch.as_tensor(_Raw(address, nbytes), device=device)


class _Raw:
    """Device memory in the form in which torch takes it: tensors on it keep this object, and so the owner, alive."""

    def __init__(self, address: int, nbytes: int, owner: Any = None):
        self.address, self.owner = address, owner
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "strides": None,
            "typestr": "|u1",
            "version": 3,
        }
