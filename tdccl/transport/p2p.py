"""Symmetric memory on GPUs of one host: device memory shared by CUDA IPC handles over NVLink or PCIe.

Needs no NCCL, no torch group and no multicast object, so any number of overlapping groups can be made in
any order. Two ranks may share one GPU.
"""

import torch
from cuda.bindings import runtime

from tdccl.errors import InitError
from tdccl.transport.bootstrap import Bootstrap
from tdccl.transport.symmetric_memory import SymmetricMemory


def allocate(bootstrap: Bootstrap, nbytes: int, device: torch.device) -> SymmetricMemory:
    """Allocates `nbytes` zeroed bytes on every rank's GPU; collective over the bootstrap's ranks.

    Raises InitError where memory is short or a peer's memory cannot be reached.
    """
    with torch.cuda.device(device):
        own = _check(runtime.cudaMalloc(nbytes), f"cudaMalloc of {nbytes} bytes")
        # On a stream of its own: kernels of other groups may be waiting for peers that are busy right here.
        stream = torch.cuda.Stream(device)
        _check(runtime.cudaMemsetAsync(own, 0, nbytes, stream.cuda_stream), "cudaMemsetAsync")
        stream.synchronize()
        handle = _check(runtime.cudaIpcGetMemHandle(own), "cudaIpcGetMemHandle")
        handles = bootstrap.exchange(bytes(handle.reserved))
        addresses = [own] * bootstrap.size
        for rank, reserved in enumerate(handles):
            if rank != bootstrap.rank:
                addresses[rank] = _open(reserved, rank)
        bootstrap.barrier()

    def release(bootstrap):
        with torch.cuda.device(device):
            for rank, address in enumerate(addresses):
                if rank != bootstrap.rank:
                    _check(runtime.cudaIpcCloseMemHandle(address), "cudaIpcCloseMemHandle")
            if bootstrap is not None:
                bootstrap.barrier()  # memory may be freed only after every peer has closed it
                _check(runtime.cudaFree(own), "cudaFree")

    return SymmetricMemory(_as_tensor(own, nbytes, device), addresses, release)


def _open(reserved: bytes, rank: int) -> int:
    handle = runtime.cudaIpcMemHandle_t()
    handle.reserved = reserved
    flags = runtime.cudaIpcMemLazyEnablePeerAccess
    return _check(
        runtime.cudaIpcOpenMemHandle(handle, flags),
        f"cudaIpcOpenMemHandle of rank {rank}'s memory (are both GPUs on this host, with peer access?)",
    )


def _check(result, what: str):
    status, *values = result
    if status != runtime.cudaError_t.cudaSuccess:
        raise InitError(f"{what}: {status.name}")
    return int(values[0]) if values and not hasattr(values[0], "reserved") else (values or [None])[0]


class _Raw:
    """Device memory that torch wraps without owning it."""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "strides": None,
            "typestr": "|u1",
            "version": 3,
        }


def _as_tensor(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(_Raw(address, nbytes), device=device)
