"""NVSHMEM's calls in emulation, with an ordering as weak as that of a network.

What is put arrives when it likes: each operation is drawn a delay, from `TDCCL_NETWORK_SEED`, and a thread delivers it
then. A put with a signal delivers its data before the signal; between others only `fence` and `quiet` make an order.
What is put without waiting is read when it leaves, so that a source which is changed too early shows.

The memory is shared by all ranks of this host; a kernel has no address of it but its own rank's, so that it reaches the
others by these calls alone.
"""

import atexit
import ctypes
import heapq
import random
import threading
import time
import weakref
from typing import NamedTuple

import numpy as np
import torch

from tdccl import environment
from tdccl.errors import ArgumentError
from tdccl.transport import host
from tdccl.transport.bootstrap import Bootstrap
from tdccl.transport.symmetric_memory import SymmetricMemory

SET, ADD = 9, 10  # as NVSHMEM counts
_LONGEST = 3e-3  # seconds that an operation is under way, at most
_PROMPT = 0.5  # of all operations


class _Segment:
    """Memory of `allocate`. It stays mapped as long as somebody has this."""

    def __init__(self, memory: SymmetricMemory, pes: list[int]):
        self.memory = memory
        self.start, self.end = memory.address, memory.address + memory.nbytes
        self.addresses = dict(zip(pes, memory.addresses))  # by PE


class _Place(NamedTuple):
    """Where something lies for this process; what is under way there holds the segment, lest it write into nothing."""

    address: int
    segment: _Segment


class _Network:
    """What this process has under way."""

    def __init__(self, seed: int):
        # Weak: a communicator that is dropped without `destroy` must not leave addresses that others get after it.
        self._segments: weakref.WeakSet[_Segment] = weakref.WeakSet()
        self.pe = -1
        self.met: set[int] = set()  # the PEs with which this one has memory in common
        self.draws = random.Random(seed)
        self.longest = _LONGEST
        self._changed = threading.Condition()
        self._under_way: list[tuple] = []  # heap of (when it is due, number, operation)
        self._last: dict[int, float] = {}  # by PE: when all that was sent there will have arrived
        self._floor: dict[int, float] = {}  # by PE: before which nothing that is sent now may arrive
        self._numbers = 0
        self._thread: threading.Thread | None = None

    def at(self, address: int, pe: int) -> _Place:
        """Where PE `pe` has what lies here at `address`."""
        with self._changed:
            for segment in self._segments:
                if segment.start <= address < segment.end:
                    return _Place(segment.addresses[pe] + address - segment.start, segment)
        raise ArgumentError(f"nvshmem: {address:#x} is no address in memory that NVSHMEM allocated")

    def add(self, segment: _Segment) -> None:
        with self._changed:
            self._segments.add(segment)

    def remove(self, segment: _Segment) -> None:
        with self._changed:
            self._segments.discard(segment)

    def send(self, operation, pe: int) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._deliver, name="tdccl-network", daemon=True)
                self._thread.start()
            prompt = self.draws.random() < _PROMPT
            due = time.monotonic() + (0 if prompt else self.draws.random() * self.longest)
            due = max(due, self._floor.get(pe, 0))
            self._last[pe] = max(due, self._last.get(pe, 0))
            self._numbers += 1
            heapq.heappush(self._under_way, (due, self._numbers, operation))
            self._changed.notify_all()

    def fence(self) -> None:
        with self._changed:
            self._floor.update(self._last)

    def quiet(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way)

    def _deliver(self) -> None:
        with self._changed:
            while True:
                if not self._under_way:
                    self._changed.wait()
                    continue
                pause = self._under_way[0][0] - time.monotonic()
                if pause > 0:
                    self._changed.wait(pause)
                    continue
                self._under_way[0][2]()
                heapq.heappop(self._under_way)
                self._changed.notify_all()


_network: _Network | None = None


def _here() -> _Network:
    global _network
    if _network is None:
        _network = _Network(environment.network_seed())
        atexit.register(_network.quiet)  # what peers still wait for
    return _network


def reseed(seed: int, longest: float = _LONGEST) -> None:
    """Draws delays of so many seconds at most from another seed from now on, for tests."""
    network = _here()
    network.quiet()
    network.draws, network.longest = random.Random(seed), longest


def allocate(bootstrap: Bootstrap, nbytes: int, device: torch.device) -> tuple[SymmetricMemory, list[int]]:
    """(`nbytes` zeroed bytes on every rank, the PE of every rank); collective over the bootstrap's ranks."""
    memory, network = host.allocate(bootstrap, nbytes, device), _here()
    pes = bootstrap.exchange(bootstrap.world_rank)
    segment = _Segment(memory, pes)
    network.add(segment)
    network.pe = bootstrap.world_rank
    network.met.update(pes)

    def release(bootstrap, peers_gone):
        network.quiet()  # as `nvshmem.allocate`'s; here what came later would find no memory at all
        network.remove(segment)
        memory.release(bootstrap, peers_gone)

    return SymmetricMemory(memory.local, memory.addresses, release), pes


def put(destination: int, source: int, nbytes: int, pe: int) -> None:
    """Writes bytes from `source` to PE `pe`, where `destination` lies here; the source may be changed at once."""
    data = ctypes.string_at(source, nbytes)
    target = _here().at(destination, pe)
    _here().send(lambda: ctypes.memmove(target.address, data, nbytes), pe)


def put_nbi(destination: int, source: int, nbytes: int, pe: int) -> None:
    """`put`, but the source must stay as it is until `quiet`."""
    target = _here().at(destination, pe)
    _here().send(lambda: ctypes.memmove(target.address, source, nbytes), pe)


def put_signal(destination: int, source: int, nbytes: int, signal: int, value: int, pe: int, operation: int = SET):
    """`put`, and then the signal, an int64, is SET to `value` or has it ADDed."""
    _send_with_signal(destination, ctypes.string_at(source, nbytes), nbytes, signal, value, pe, operation)


def put_signal_nbi(destination: int, source: int, nbytes: int, signal: int, value: int, pe: int, operation: int = SET):
    """`put_signal`, but the source must stay as it is until `quiet`."""
    _send_with_signal(destination, source, nbytes, signal, value, pe, operation)


def _send_with_signal(
    destination: int, data: int | bytes, nbytes: int, signal: int, value: int, pe: int, operation: int
) -> None:
    target, word = _here().at(destination, pe), _here().at(signal, pe)

    def deliver():
        ctypes.memmove(target.address, data, nbytes)
        _update(word.address, value, operation)

    _here().send(deliver, pe)


def signal_op(signal: int, value: int, pe: int) -> None:
    """A signal without data."""
    word = _here().at(signal, pe)
    _here().send(lambda: _update(word.address, value, SET), pe)


def get(destination: int, source: int, nbytes: int, pe: int) -> None:
    """Reads bytes of PE `pe`, from where `source` lies here."""
    ctypes.memmove(destination, _here().at(source, pe).address, nbytes)


def fence() -> None:
    """What is sent to a PE from now on arrives after what was sent there before."""
    _here().fence()


def quiet() -> None:
    """Returns when all that was sent has arrived."""
    _here().quiet()


def my_pe() -> int:
    """This process's PE: its rank in the world."""
    return _here().pe


def n_pes() -> int:
    """How many PEs this process has met, itself among them."""
    return len(_here().met)


def _update(word: int, value: int, operation: int) -> None:
    if operation == SET:
        ctypes.c_int64.from_address(word).value = value
        return
    from triton._C.libtriton import interpreter

    where, what = np.array([word], np.uint64), np.array([value], np.int64)
    every = np.ones(1, bool)
    interpreter.atomic_rmw(interpreter.RMW_OP.ADD, where, what, every, interpreter.MEM_SEMANTIC.ACQUIRE_RELEASE)
