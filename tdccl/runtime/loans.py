"""Symmetric memory that is lent to a tensor, and lent again when the tensor is gone."""

import threading
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tdccl.errors import ArgumentError
from tdccl.transport import Bootstrap

_COMPARE_EVERY = 64  # loans: a comparison is a round of messages between hosts


class _Place:
    """A piece of symmetric memory and its borrower; it is free when no tensor is left on the borrowed storage."""

    def __init__(self, number: int, memory: torch.Tensor):
        self.number = number
        self._memory = memory.untyped_storage()
        self._borrower: StorageWeakRef | None = None

    def free(self) -> bool:
        return self._borrower is None or self._borrower.expired()

    def lend(self) -> torch.UntypedStorage:
        storage = self._memory[: self._memory.nbytes()]  # one of its own, which keeps the memory alive
        self._borrower = StorageWeakRef(storage)
        return storage


class Loans:
    """Tensors for programs that make and free them alike on every rank, by reference counts, as FSDP2's buffers are.

    A tensor takes the first free place of its size, or a new one. Ranks that disagreed on which are free would put it
    at different places, and collectives would read other tensors; so they compare now and then where tensors lay.

    As in torch's own allocator, memory is lent again at once to the stream that it was lent to before, and to no other.

    allocate  `Communicator.empty`
    """

    def __init__(self, bootstrap: Bootstrap, device: torch.device, allocate: Callable[..., torch.Tensor]):
        self._bootstrap, self._device, self._allocate = bootstrap, device, allocate
        self._places: dict[tuple[int, int], list[_Place]] = defaultdict(list)  # by size and stream
        self._made, self._lent, self._history = 0, 0, 0
        self._lock = threading.Lock()  # buffers for gradients are made in autograd's thread

    def tensor(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor of any content."""
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device).cuda_stream if on_gpu else 0
        with self._lock:
            place = self._place(numel * dtype.itemsize, stream)
            self._compare(place)
            return torch.empty(0, dtype=dtype, device=self._device).set_(place.lend(), 0, (numel,))

    def _place(self, nbytes: int, stream: int) -> _Place:
        places = self._places[nbytes, stream]
        for place in places:
            if place.free():
                return place
        self._made += 1
        places.append(_Place(self._made, self._allocate(nbytes, torch.uint8)))
        return places[-1]

    def _compare(self, place: _Place) -> None:
        self._lent += 1
        self._history = hash((self._history, place.number))
        if self._lent % _COMPARE_EVERY == 0 and len(set(self._bootstrap.exchange(self._history))) > 1:
            raise ArgumentError(
                f"lend: of the last {_COMPARE_EVERY} tensors, some lay at different places on different "
                "ranks, which spoils what was communicated: ranks must free their tensors alike"
            )
