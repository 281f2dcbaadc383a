"""Memory that exists on every rank of a group and that every rank can address."""

import threading
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from tdccl.errors import InitError
from tdccl.runtime.streams import aside
from tdccl.transport.bootstrap import Bootstrap

T = TypeVar("T")

# After a failure: memory that a peer may still have mapped, and whether it may be freed by now.
_kept: list[tuple[Any, Callable[[], bool]]] = []
_keeping = threading.Lock()


def together(bootstrap: Bootstrap, step: Callable[[], T]) -> list[T]:
    """What step() returns on every rank, in rank order; collective. Where it raises InitError on one rank, or torch
    has no memory for it, all raise InitError, and none waits for one that cannot go on."""
    result = refused = None
    try:
        result = step()
    except InitError as error:
        refused = error
    except torch.OutOfMemoryError as error:
        refused = InitError(str(error))
    everyone = bootstrap.exchange((result, refused and str(refused)))
    try:
        if refused is not None:
            raise refused
    finally:
        refused = None  # else it would hold this frame, whose callers hold memory, and this frame it
    for rank, (_, words) in enumerate(everyone):
        if words is not None:
            raise InitError(f"rank {rank} could not take part: {words}")
    return [theirs for theirs, _ in everyone]


class SymmetricMemory:
    """One segment a rank, all of the same size, each mapped by all ranks.

    local      this rank's segment, a uint8 tensor; None once released
    address    where it starts, and
    nbytes     its size
    addresses  every rank's segment as this process sees it
    multicast  address through which the switch reaches all segments at once, or 0
    peers      `addresses`, then `multicast`, as an int64 tensor on the device: the table that kernels read
    """

    def __init__(self, local: torch.Tensor, addresses: list[int], release: Callable[..., None], multicast: int = 0):
        self.local = local
        self.address, self.nbytes = local.data_ptr(), local.numel()
        self.addresses = addresses
        self.multicast = multicast
        with aside(local.device):  # torch waits for what it copies, and for all before it
            self.peers = torch.tensor([*addresses, multicast], dtype=torch.int64, device=local.device)
        self._release = release

    def release(self, bootstrap: Bootstrap | None, peers_gone: Callable[[], bool]) -> None:
        """Unmaps the peers' segments and lets go of this rank's; no kernel may use them any more.

        A tensor that still lies in this rank's segment stays valid: the last one frees it. Collective over
        `bootstrap`; None after a failure, when peers cannot be asked: then what a peer may still have mapped is freed
        when memory is allocated and peers_gone() is true.
        """
        release, self._release = self._release, lambda *_: None
        release(bootstrap, peers_gone)
        self.local = None


class Region(NamedTuple):
    """Part of this rank's segment of a symmetric memory: the bytes from address `start` to `end`."""

    start: int
    end: int
    memory: SymmetricMemory


class Regions:
    """Disjoint regions, found by address. Threads may look while one adds."""

    def __init__(self):
        # Starts, for bisect, and regions. Replaced as one: another table, other regions.
        self.table: tuple[list[int], list[Region]] = ([], [])

    def add(self, region: Region) -> None:
        """Adds a region; one that goes on where another of the same memory ends becomes one with it."""
        starts, regions = map(list, self.table)
        index = bisect_right(starts, region.start)
        before = regions[index - 1] if index else None
        if before and before.end == region.start and before.memory is region.memory:
            regions[index - 1] = before._replace(end=region.end)
        else:
            starts.insert(index, region.start)
            regions.insert(index, region)
        self.table = starts, regions

    def find(self, address: int, nbytes: int) -> SymmetricMemory | None:
        """The memory of the region in which all `nbytes` bytes at `address` lie."""
        starts, regions = self.table
        index = bisect_right(starts, address) - 1
        if index >= 0 and address + nbytes <= regions[index].end:
            return regions[index].memory
        return None


def keep(memory: Any, until: Callable[[], bool]) -> None:
    """Holds on to `memory` until `free_kept` finds that until() is true."""
    with _keeping:
        _kept.append((memory, until))


def free_kept() -> None:
    """Frees what was kept for peers who are gone now."""
    with _keeping:
        _kept[:] = [(memory, until) for memory, until in _kept if not until()]
