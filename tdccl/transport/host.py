"""Symmetric memory in POSIX shared memory, for emulation: one segment a rank, mapped by all."""

import contextlib
import mmap
import os
import secrets

import torch

from tdccl.transport.bootstrap import Bootstrap
from tdccl.transport.symmetric_memory import SymmetricMemory

_FOLDER = "/dev/shm"


def allocate(bootstrap: Bootstrap, nbytes: int, device: torch.device) -> SymmetricMemory:
    """Allocates `nbytes` zeroed bytes on every rank; collective over the bootstrap's ranks.

    The files are unlinked as soon as all ranks have mapped them, so that no crash leaves one behind.
    Raises OSError where shared memory is too small.
    """
    nbytes = max(mmap.PAGESIZE, nbytes)
    path = f"{_FOLDER}/tdccl-{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        try:
            os.posix_fallocate(descriptor, 0, nbytes)  # else a full /dev/shm would kill us by SIGBUS later
        finally:
            os.close(descriptor)
        paths = bootstrap.exchange(path)
        maps = [_map(path, nbytes) for path in paths]
        bootstrap.barrier()
    finally:
        os.unlink(path)
    tensors = [torch.frombuffer(mapped, dtype=torch.uint8) for mapped in maps]
    addresses = [tensor.data_ptr() for tensor in tensors]
    local = tensors[bootstrap.rank]
    del tensors

    def release(bootstrap):
        for mapped in maps:
            with contextlib.suppress(BufferError):  # a user still holds a tensor: the last one unmaps
                mapped.close()
        maps.clear()

    return SymmetricMemory(local, addresses, release)


def _map(path: str, nbytes: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)
