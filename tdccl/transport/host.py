"""Memory of this host that several ranks map: symmetric memory for emulation, and what a rank shows its peers."""

import contextlib
import mmap
import os

import numpy as np
import torch

from tdccl.errors import InitError
from tdccl.transport.bootstrap import Bootstrap
from tdccl.transport.symmetric_memory import SymmetricMemory, together

_FOLDER = "/dev/shm"
_TOKEN_BYTES = 16
_windows: dict[int, list[int]] = {}  # emulated multicast address -> what every rank's segment has here


def behind_multicast(address: int) -> list[int]:
    """Every rank's segment, for the address that `SymmetricMemory.multicast` gives."""
    return _windows[address]


def allocate(bootstrap: Bootstrap, nbytes: int, device: torch.device) -> SymmetricMemory:
    """Allocates `nbytes` zeroed bytes on every rank; collective over the bootstrap's ranks.

    Its multicast address is that of pages which nobody may touch: a kernel that goes there but by multimem dies.

    The segments never have a name, so that no crash at any moment leaves a file behind; the peers open them through
    this process's descriptor, which is closed as soon as all have mapped it. Raises InitError, on all ranks, where
    shared memory is too small on one.
    """
    nbytes = max(mmap.PAGESIZE, nbytes)
    descriptors, maps = [], []

    def reserve() -> str:
        with _explained(nbytes):
            descriptors.append(os.open(_FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600))
            os.posix_fallocate(descriptors[0], 0, nbytes)  # else a full one would kill this process by SIGBUS later
        return f"/proc/{os.getpid()}/fd/{descriptors[0]}"

    def map_all() -> None:
        with _explained(nbytes):
            maps.extend(_map(path, nbytes) for path in paths)

    try:
        paths = together(bootstrap, reserve)
        together(bootstrap, map_all)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    tensors = [torch.frombuffer(mapped, dtype=torch.uint8) for mapped in maps]
    addresses = [tensor.data_ptr() for tensor in tensors]
    local = tensors[bootstrap.rank]
    del tensors
    window = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0)
    multicast = np.frombuffer(window, np.uint8).ctypes.data
    _windows[multicast] = addresses

    def release(bootstrap, peers_gone):
        del _windows[multicast]
        window.close()
        maps.clear()  # the peers' are unmapped by it, this rank's when the last tensor that lies there is gone

    return SymmetricMemory(local, addresses, release, multicast)


@contextlib.contextmanager
def _explained(nbytes: int):
    """Raises InitError for what the system refuses."""
    try:
        yield
    except OSError as error:
        raise InitError(
            f"no shared memory of {nbytes} bytes a rank in {_FOLDER}: {error.strerror}. Make it larger (docker: "
            "--shm-size), allow more open files (ulimit -n), or set TDCCL_SCRATCH_MB lower"
        ) from error


def show(bootstrap: Bootstrap, nbytes: int) -> tuple[memoryview, dict[int, memoryview]]:
    """(this rank's `nbytes` zeroed bytes, and by rank those of the peers that can be read from here); collective.

    A peer's can be read even when it is stuck or dead. Where a rank has no shared memory, or lives in another
    container, the others see nothing of it; that is no error.
    """
    token = os.urandom(_TOKEN_BYTES)  # another container's process may have the peer's number, and a file open
    size = _TOKEN_BYTES + nbytes
    descriptor, path = -1, None
    try:
        try:
            descriptor = os.open(_FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
            os.posix_fallocate(descriptor, 0, size)
            own, path = mmap.mmap(descriptor, size), f"/proc/{os.getpid()}/fd/{descriptor}"
        except OSError:
            own = mmap.mmap(-1, size)
        own[:_TOKEN_BYTES] = token
        peers = {}
        for rank, (other, expected) in enumerate(bootstrap.exchange((path, token))):
            if rank != bootstrap.rank and other is not None:
                with contextlib.suppress(OSError, ValueError):
                    mapped = _map(other, size, mmap.ACCESS_READ)
                    if mapped[:_TOKEN_BYTES] == expected:
                        peers[rank] = memoryview(mapped)[_TOKEN_BYTES:]
        bootstrap.barrier()
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return memoryview(own)[_TOKEN_BYTES:], peers


def _map(path: str, nbytes: int, access: int = mmap.ACCESS_WRITE) -> mmap.mmap:
    flags = os.O_RDWR if access == mmap.ACCESS_WRITE else os.O_RDONLY | os.O_NONBLOCK  # it may be a stranger's pipe
    descriptor = os.open(path, flags)
    try:
        return mmap.mmap(descriptor, nbytes, access=access)
    finally:
        os.close(descriptor)
