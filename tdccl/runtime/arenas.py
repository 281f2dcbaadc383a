"""Puts tensors into symmetric memory as torch makes them: what `tdccl.symmetric` is made of, on every target.

It is not torch's memory pool over symmetric memory because such a pool reuses what is freed, and ranks do not free
alike: torch frees a tensor that another stream has used when it finds that stream done, and a reference cycle when
garbage is collected; and among free blocks of one size it may take the one of the lowest address, which differs
between ranks. One tensor would then lie at different places on different ranks, and no one could tell.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tdccl.errors import ArgumentError, TdcclError
from tdccl.transport import Bootstrap, Region, Regions, SymmetricMemory

_ALIGNMENT = 512  # torch's own
_ARENA_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


class _Report(NamedTuple):
    """What a rank tells the others about what it has made since its last report: (operator, bytes) of each tensor."""

    where: str
    made: tuple[tuple[str, int], ...]


class Arenas:
    """Symmetric memory handed out piece after piece, at the same place on every rank, and never reused.

    Ranks that make tensors of the same sizes in the same order get the same places, and they compare their sizes
    before an arena is added and before anything is registered. A large tensor gets an arena to itself.

    allocate   gives symmetric memory of so many bytes; collective
    segments   what is allocated is appended to it; its owner releases it
    regions    what the ranks have agreed on is added to it
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        device: torch.device,
        allocate: Callable[[int], SymmetricMemory],
        segments: list[SymmetricMemory],
        regions: Regions,
    ):
        self.device, self._obtain = device, allocate
        self._bootstrap, self._segments, self._regions = bootstrap, segments, regions
        self._arena_bytes = _ARENA_BYTES[device.type]
        self._arena: SymmetricMemory | None = None
        self._used = 0
        self._pending: list[Region] = []  # placed, but not agreed on
        self._made: list[tuple[str, int]] = []  # since the last report

    @contextlib.contextmanager
    def block(self):
        """Tensors made inside it lie in symmetric memory, and are registered at its end; collective.

        Raises ArgumentError on every rank, and registers nothing, if the ranks' tensors differ or a rank leaves it by
        an exception.
        """
        try:
            with _Placing(self):
                yield
            self._compare(_Report("the end of the block", tuple(self._made)))
        except BaseException as error:
            self._tell(error)
            self._forget()
            raise
        for region in self._pending:
            self._regions.add(region)
        self._pending.clear()

    def place(self, operator: str, nbytes: int) -> torch.UntypedStorage:
        """A storage of `nbytes` bytes at the next free place; it keeps its memory alive by itself."""
        self._made.append((operator, nbytes))
        room = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if room > self._arena_bytes // 2:
            memory, start = self._allocate(room), 0
        else:
            if self._arena is None or self._used + room > self._arena.nbytes:
                self._arena, self._used = self._allocate(self._arena_bytes), 0
            memory, start = self._arena, self._used
            self._used += room
        first = memory.address + start
        self._pending.append(Region(first, first + room, memory))
        return memory.local.untyped_storage()[start : start + nbytes]

    def _allocate(self, nbytes: int) -> SymmetricMemory:
        self._compare(_Report("more memory", tuple(self._made)))
        memory = self._obtain(nbytes)
        self._segments.append(memory)
        return memory

    def _compare(self, mine: _Report) -> None:
        """Raises ArgumentError on every rank unless all have come to the same point with the same sizes."""
        self._made.clear()
        everyone = self._bootstrap.exchange(mine)
        if all(_alike(mine, other) for other in everyone):
            return
        self._forget()
        error = ArgumentError(f"symmetric: {_difference(everyone)}; nothing is registered")
        error.told_ranks_of = {self}
        raise error

    def _tell(self, error: BaseException) -> None:
        """Lets the other ranks, who would wait for this one, know that it leaves the block by an exception."""
        told = error.__dict__.setdefault("told_ranks_of", set())  # it may pass through several blocks
        if not isinstance(error, Exception) or self in told:
            return
        told.add(self)
        if isinstance(error, ArgumentError) or not isinstance(error, TdcclError):  # else the ranks have lost each other
            with contextlib.suppress(TdcclError):  # the error itself says more
                self._bootstrap.exchange(_Report(f"an exception: {error!r}", tuple(self._made)))

    def _forget(self) -> None:
        """Ranks may have got differently far: the next tensor starts an arena, and what is pending stays plain."""
        self._arena = None
        self._pending.clear()
        self._made.clear()


def _alike(mine: _Report, other) -> bool:
    return (
        isinstance(other, _Report)
        and other.where == mine.where
        and [nbytes for _, nbytes in other.made] == [nbytes for _, nbytes in mine.made]
    )


def _difference(everyone: list) -> str:
    """Which rank has what, where the ranks' reports first differ."""
    reports = [other if isinstance(other, _Report) else _Report("another call", ()) for other in everyone]
    came_to = [report.where for report in reports]
    for row in itertools.zip_longest(*(report.made for report in reports)):
        if len({tensor and tensor[1] for tensor in row}) > 1:
            came_to = [f"{tensor[1]} bytes ({tensor[0]})" if tensor else end for tensor, end in zip(row, came_to)]
            break
    ranks = ", ".join(f"rank {rank} came to {what}" for rank, what in enumerate(came_to))
    return f"the ranks must make tensors of the same sizes in the same order, but {ranks}"


class _Thread(threading.local):
    placing = False


_thread = _Thread()


@contextlib.contextmanager
def nothing_placed():
    """What this thread makes inside it stays where torch puts it, in a block too: what one rank alone has to make."""
    before, _thread.placing = _thread.placing, True
    try:
        yield
    finally:
        _thread.placing = before


class _Placing(TorchDispatchMode):
    """Moves what operators allocate on the arenas' device into the arenas, before anyone has seen it."""

    def __init__(self, arenas: Arenas):
        super().__init__()
        self._arenas = arenas

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if _thread.placing:  # the innermost of nested blocks places
            return operator(*arguments, **(options or {}))
        _thread.placing = True
        try:
            return self._place(operator, arguments, options or {})
        finally:
            _thread.placing = False

    def _place(self, operator, arguments: tuple, options: dict):
        result = operator(*arguments, **options)
        given = {storage._cdata for storage in map(_storage, tree_leaves((arguments, options))) if storage is not None}
        if operator is torch.ops.aten.lift_fresh.default:
            given.clear()  # it is how torch.tensor hands out what it has just made
        moved = {}

        def placed(tensor: torch.Tensor) -> torch.Tensor:
            storage = _storage(tensor)
            if storage is None or storage._cdata in given or not self._takes(tensor, storage):
                return tensor
            if storage._cdata not in moved:
                moved[storage._cdata] = self._arenas.place(str(operator), storage.nbytes())
                moved[storage._cdata].copy_(storage)
            home = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            return home.set_(moved[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())

        return tree_map_only(torch.Tensor, placed, result)

    def _takes(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
        """Whether it is plain, and torch has just allocated it on the device: what a user or an arena lent it cannot
        be resized."""
        plain = type(tensor) is torch.Tensor and not tensor.is_quantized
        return plain and storage.device == self._arenas.device and storage.nbytes() > 0 and storage.resizable()


def _storage(value) -> torch.UntypedStorage | None:
    """A tensor's storage, if it has one, as sparse tensors do not."""
    return value.untyped_storage() if isinstance(value, torch.Tensor) and value.layout is torch.strided else None
