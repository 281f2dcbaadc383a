"""Symmetric memory that is lent to a tensor, and lent again when the tensor is gone."""

import operator
import sys
import threading
from collections import defaultdict
from collections.abc import Callable

import torch

from tdccl.errors import ArgumentError, InitError
from tdccl.transport import Bootstrap

# Loans. A comparison is a round of messages between hosts; kernels that reach into peers' memory compare as well.
_COMPARE_EVERY = 512


class _Place:
    """A piece of symmetric memory, free while none but its own tensors use its storage, also from Python."""

    def __init__(self, number: int, memory: torch.Tensor):
        self.number = number
        whole = memory.untyped_storage()
        part = whole[: whole.nbytes()]  # of one's own, that keeps the memory alive and cannot be resized
        self._storage = part  # kept: then every `untyped_storage()` of tensors here is this very object
        self._bytes = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(part, 0, (memory.numel(),))
        self._tensors: dict[torch.dtype, torch.Tensor] = {}
        self._uses = 0

    def free(self) -> bool:
        return self._count() <= self._uses

    def _count(self) -> int:
        """Tensors on the storage, and references to it in Python: a program may hold the one without the other."""
        return torch._C._storage_Use_Count(self._storage._cdata) + sys.getrefcount(self._storage)

    def lend(self, dtype: torch.dtype) -> torch.Tensor:
        """Of a place that is free."""
        tensor = self._tensors.get(dtype)
        if tensor is None:
            with torch.inference_mode(False):  # what is lent there is no inference tensor for ever
                tensor = self._tensors[dtype] = self._bytes.view(dtype)
            self._uses = self._count()
        return tensor.detach()  # another on the storage, in a tenth of the time that a storage and a tensor take


class _Places:
    """Those of one size and stream. Those in use are asked whether they are free only when no other is known to be."""

    def __init__(self):
        self._free: list[_Place] = []  # by falling number
        self._lent: list[_Place] = []

    def take(self) -> _Place | None:
        """The first of those known to be free, which the caller lends."""
        if not self._free:
            asked, self._lent = self._lent, []
            for place in asked:
                (self._free if place.free() else self._lent).append(place)
            self._free.sort(key=operator.attrgetter("number"), reverse=True)
        if not self._free:
            return None
        self._lent.append(self._free.pop())
        return self._lent[-1]

    def add(self, place: _Place) -> None:
        """A new one, which the caller lends."""
        self._lent.append(place)


class Loans:
    """Tensors for programs that make and free them alike on every rank, by reference counts, as FSDP2's buffers are.

    A tensor takes the first place of its size that is known to be free, or a new one. Ranks that disagreed on which are
    free would put it at different places, and collectives would read other tensors; so they compare now and then where
    tensors lay.

    As in torch's own allocator, memory is lent again at once to the stream that it was lent to before, and to no other.

    allocate  `Communicator.empty`
    """

    def __init__(self, bootstrap: Bootstrap, device: torch.device, allocate: Callable[..., torch.Tensor]):
        self._bootstrap, self._device, self._allocate = bootstrap, device, allocate
        self._places: dict[tuple[int, int], _Places] = defaultdict(_Places)  # by size and stream
        self._made, self._lent, self._history = 0, 0, 0
        self._lock = threading.Lock()  # buffers for gradients are made in autograd's thread

    def tensor(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor of any content."""
        stream = torch._C._cuda_getCurrentRawStream(self._device.index) if self._device.type == "cuda" else 0
        with self._lock:
            place = self._place(numel * dtype.itemsize, stream)
            self._compare(place)
            return place.lend(dtype)

    def _place(self, nbytes: int, stream: int) -> _Place:
        places = self._places[nbytes, stream]
        place = places.take()
        if place is None:
            self._made += 1
            place = _Place(self._made, self._new(nbytes))
            places.add(place)
        return place

    def _new(self, nbytes: int) -> torch.Tensor:
        try:
            return self._allocate(nbytes, torch.uint8)
        except InitError as error:
            if not error.absent:
                raise
            ranks = f"rank{'s' * (len(error.absent) > 1)} {', '.join(map(str, error.absent))}"
            explained = InitError(
                f"lend: {ranks} did not make new memory of {nbytes} bytes, as this rank does, within the timeout: is "
                "some free there? Ranks must free their tensors alike. What is in a reference cycle, as a model after "
                "fully_shard is, Python frees at another time on each rank: call gc.collect() on all of them when it "
                "is no longer used"
            )
            explained.absent = error.absent
            raise explained from error

    def _compare(self, place: _Place) -> None:
        self._lent += 1
        self._history = hash((self._history, place.number))
        if self._lent % _COMPARE_EVERY == 0 and len(set(self._bootstrap.exchange(self._history))) > 1:
            raise ArgumentError(
                f"lend: of the last {_COMPARE_EVERY} tensors, some lay at different places on different "
                "ranks, which spoils what was communicated: ranks must free their tensors alike"
            )
