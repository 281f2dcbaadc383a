"""NVSHMEM, through nvshmem4py: memory that ranks of other nodes reach by its calls, and its bitcode for kernels.

It is optional: nothing of it is imported before a communicator has ranks on several nodes. A process starts it once,
with the ranks of the first such communicator as its PEs, and takes one pool from it, because NVSHMEM allocates with all
PEs at once and communicators are of some.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from tdccl import environment
from tdccl.errors import InitError, TdcclError
from tdccl.runtime.streams import aside
from tdccl.transport.bootstrap import Bootstrap
from tdccl.transport.symmetric_memory import SymmetricMemory, together

_ALIGNMENT = 512
_INSTALL = "pip install nvshmem4py-cu13 nvidia-nvshmem-cu13 (cu12 for CUDA 12)"


class _Started(NamedTuple):
    """NVSHMEM in this process."""

    world: bytes  # the unique id with which it was started, the same on all its PEs
    pe: int
    pool: int  # its address
    free: list[tuple[int, int]]  # parts of the pool, as (begin, end) in bytes
    kept: set[tuple[tuple[int, ...], int, int]]  # after failures: (PEs that share it, begin, end)


_started: _Started | None = None


def folder() -> Path:
    """Where the libraries of NVSHMEM are: under NVSHMEM_HOME, or in the installed wheel. Raises InitError."""
    if home := os.environ.get("NVSHMEM_HOME"):
        return Path(home) / "lib"
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise InitError(f"NVSHMEM is not installed: {_INSTALL}, or set NVSHMEM_HOME")
    return Path(next(iter(spec.submodule_search_locations))) / "lib"


def device_library(arch: int) -> str:
    """The bitcode for this architecture (90 for sm_90): one file for all, or the newest that is not too new for it.

    Raises InitError if there is none.
    """
    if (single := folder() / "libnvshmem_device.bc").exists():
        return str(single)
    found = {
        int(match[1]): path for path in folder().glob("*.bc") if (match := re.search(r"device_sm_(\d+)", path.name))
    }
    fitting = [number for number in found if number <= arch]
    if not fitting:
        raise InitError(f"NVSHMEM in {folder()} has no bitcode for sm_{arch}, but for {sorted(found) or 'nothing'}")
    return str(found[max(fitting)])


@functools.cache
def version() -> str:
    """The version of NVSHMEM whose bitcode is linked to kernels; "unknown" where it is not from a wheel."""
    if not os.environ.get("NVSHMEM_HOME"):
        for wheel in ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12"):
            try:
                return importlib.metadata.version(wheel)
            except importlib.metadata.PackageNotFoundError:
                continue
    return "unknown"


def initialize_module(module) -> None:
    """Lets the kernels of a loaded module, a CUmodule or its number, use NVSHMEM.

    Raises InitError where their bitcode does not fit the library.
    """
    from nvshmem import bindings

    try:
        status = bindings.cumodule_init(int(module))
    except Exception as error:
        status = error
    if status:
        raise InitError(f"NVSHMEM refuses a kernel with bitcode of version {version()}: {status}; {_library()}")


def allocate(bootstrap: Bootstrap, nbytes: int, device: torch.device) -> tuple[SymmetricMemory, list[int]]:
    """(`nbytes` zeroed bytes on every rank, the PE of every rank); collective over the bootstrap's ranks.

    A rank has an address of its own memory alone. Raises InitError where NVSHMEM is missing or cannot be started, does
    not know a rank, or has no room.
    """
    from cuda.bindings import runtime

    from tdccl.transport import p2p

    started = _start(bootstrap, device)
    _give_back_kept(started, bootstrap, device)
    nbytes = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    everyone = bootstrap.exchange((started.pe, started.free))
    begin = first_fit([free for _, free in everyone], nbytes)
    if begin is None:
        raise InitError(
            f"no {nbytes} bytes are free on all ranks in NVSHMEM's pool of {environment.nvshmem_bytes()}: raise "
            "TDCCL_NVSHMEM_MB, or destroy communicators that are done with"
        )
    pes = [pe for pe, _ in everyone]
    _take(started.free, begin, begin + nbytes)
    address = started.pool + begin
    addresses = [0] * bootstrap.size
    addresses[bootstrap.rank] = address
    memory: SymmetricMemory | None = None

    def prepare() -> None:
        nonlocal memory
        with aside(device) as stream:
            p2p.check(runtime.cudaMemsetAsync(address, 0, nbytes, stream), "cudaMemsetAsync")
        memory = SymmetricMemory(p2p.tensor_at(address, nbytes, device), addresses, release)

    def release(bootstrap, peers_gone):
        try:
            if bootstrap is not None:
                _quiet(device)
                bootstrap.barrier()
                _give_back(started.free, begin, begin + nbytes)
                return
        except TdcclError:
            pass
        started.kept.add((tuple(pes), begin, begin + nbytes))  # a peer may still write there

    try:
        together(bootstrap, prepare)  # what a peer puts comes after the zeros
    except InitError:
        _give_back(started.free, begin, begin + nbytes)
        raise
    return memory, pes


def _give_back_kept(started: _Started, bootstrap: Bootstrap, device: torch.device) -> None:
    """Gives back what failures left behind, where all that shared it are here and have done with it; collective. What a
    rank shared that has died, or is left out from now on, stays. Before it is used again: an exchange of all ranks."""
    kept = dict(bootstrap.exchange((started.pe, started.kept)))
    done = [part for part in started.kept if all(part in kept.get(pe, ()) for pe in part[0])]
    if done:
        _quiet(device)
    for part in done:
        started.kept.remove(part)
        _give_back(started.free, *part[1:])


def _quiet(device: torch.device) -> None:
    """Returns when all that kernels of this rank put has arrived: their last signals are on the way when they end."""
    from nvshmem import bindings

    with aside(device) as stream:
        bindings.quiet_on_stream(stream)


def _start(bootstrap: Bootstrap, device: torch.device) -> _Started:
    """NVSHMEM, started by the first call."""
    global _started
    environment.forbid_multicast_to_others()
    said = (_started and _started.world, _unusable(), environment.multicast_forbidden_by())
    everyone = bootstrap.exchange(said)
    environment.forbid_multicast_to_others(for_a_peer=any(variable for *_, variable in everyone))
    for rank, (_, reason, _) in enumerate(everyone):
        if reason:
            raise InitError(f"ranks are on several nodes, which needs NVSHMEM; rank {rank} says: {reason}")
    worlds = [world for world, *_ in everyone]
    if len(set(worlds)) > 1:
        apart = sorted([rank for rank, other in enumerate(worlds) if other == world] for world in {*worlds} - {None})
        raise InitError(
            f"NVSHMEM was started among ranks {' and among '.join(map(str, apart))} alone, and starts once in a "
            "process: make a communicator of all ranks first (torch.distributed: a collective of the default group)"
        )
    if _started is not None:
        return _started
    import numpy as np
    from cuda.core import Device
    from nvshmem import bindings, core

    gpu, identity, pool = Device(device.index), None, 0

    def identify() -> bytes:
        nonlocal identity
        with _explained(bootstrap.rank):
            gpu.set_current()
            identity = core.get_unique_id(empty=bootstrap.rank != 0)
            return identity._data.view(np.int8).tobytes()

    def start() -> int:
        """This rank's PE. NVSHMEM itself waits where a rank fails inside its collective calls."""
        nonlocal pool
        with _explained(bootstrap.rank):
            core.init(device=gpu, uid=identity, rank=bootstrap.rank, nranks=bootstrap.size, initializer_method="uid")
            pool = int(bindings.align(_ALIGNMENT, environment.nvshmem_bytes()))
            if not pool:
                raise MemoryError(f"no pool of {environment.nvshmem_bytes()} bytes; set TDCCL_NVSHMEM_MB lower")
            return int(core.my_pe())

    word = together(bootstrap, identify)[0]
    identity._data.view(np.int8)[:] = np.frombuffer(word, np.int8)
    pes = together(bootstrap, start)
    _started = _Started(word, pes[bootstrap.rank], pool, [(0, environment.nvshmem_bytes())], set())
    return _started


@contextlib.contextmanager
def _explained(rank: int):
    """Raises InitError for whatever keeps NVSHMEM from starting."""
    try:
        yield
    except Exception as error:
        raise InitError(f"NVSHMEM cannot be started on rank {rank}: {error}; {_library()}") from error


def _unusable() -> str | None:
    """Why this process cannot use NVSHMEM: it is not there, or nvshmem4py loads another version than the bitcode's."""
    try:
        from nvshmem import core

        loaded, linked = core.get_version().libnvshmem_version, version()
        if linked != "unknown" and loaded.split(".")[:2] != linked.split(".")[:2]:
            return f"nvshmem4py loads NVSHMEM {loaded}, the bitcode for kernels in {folder()} is of {linked}"
        major, minor = torch.cuda.get_device_capability()
        device_library(10 * major + minor)
    except InitError as error:
        return str(error)
    except (ImportError, RuntimeError, OSError) as error:
        return f"{_INSTALL} ({error})"
    return None


def _library() -> str:
    """What is installed, for messages."""
    try:
        from nvshmem import core

        return f"installed: {core.get_version()}, bitcode {version()} in {folder()}"
    except Exception as error:
        return f"nvshmem4py does not say its version: {error}"


def first_fit(free: list[list[tuple[int, int]]], nbytes: int) -> int | None:
    """Where the first `nbytes` bytes begin that are free on all ranks, given each one's free parts; None if nowhere."""
    for begin in sorted({begin for parts in free for begin, _ in parts}):
        if all(any(low <= begin and begin + nbytes <= high for low, high in parts) for parts in free):
            return begin
    return None


def _take(free: list[tuple[int, int]], begin: int, end: int) -> None:
    """Takes a part that is free out of the free parts."""
    index = next(i for i, (low, high) in enumerate(free) if low <= begin and end <= high)
    low, high = free[index]
    free[index : index + 1] = [part for part in ((low, begin), (end, high)) if part[0] < part[1]]


def _give_back(free: list[tuple[int, int]], begin: int, end: int) -> None:
    """Puts a part back, as one with what is free beside it."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted([*free, (begin, end)]):
        if merged and merged[-1][1] == low:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    free[:] = merged
