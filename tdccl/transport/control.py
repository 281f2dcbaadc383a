"""Words of host memory that all ranks of a communicator share: through them a fault of one ends the waits of all."""

import contextlib
import ctypes
import mmap
import os
import select
import weakref

import torch

from tdccl.errors import InitError
from tdccl.transport import topology
from tdccl.transport.bootstrap import Bootstrap

_WORDS_OF_KERNELS = 16
_LEFT, _MEETING = _WORDS_OF_KERNELS, _WORDS_OF_KERNELS + 1


class Control:
    """One block a rank, each mapped by all.

    words  this rank's block, int64: the abort word, at which kernels look, and what they record (`FAULT_FIELDS`)
    abort  the abort word, for the host
    pids   of all ranks' processes, as this process knows them; None for a rank on another host or in another pid
           namespace, whose death is not seen and who is not told of faults here: only the deadlines of waits end them

    The memory has no name, so that no crash leaves anything behind.
    """

    def __init__(self, bootstrap: Bootstrap, pinned: bool, node: list[int]):
        """Collective; pinned: kernels of a GPU look at it; node: the ranks that may have this one's memory mapped.

        Raises InitError if it cannot be pinned.
        """
        self._rank, self._unpin, self._node = bootstrap.rank, lambda: None, node
        descriptor = os.memfd_create("tdccl")
        try:
            os.ftruncate(descriptor, mmap.PAGESIZE)
            namespace = topology.boot_id(), os.readlink("/proc/self/ns/pid")  # whose number is the same on all hosts
            everyone = bootstrap.exchange((os.getpid(), namespace, descriptor))
            self.pids = [pid if other == namespace else None for pid, other, _ in everyone]
            self._blocks = [self._map(rank, theirs) for rank, (_, _, theirs) in enumerate(everyone)]
            self.words = self._blocks[self._rank]
            refused = self._pin() if pinned else None
            for rank, words in enumerate(bootstrap.exchange(refused)):  # and all have mapped all
                if words is not None:
                    raise InitError(f"rank {rank}: {words}")
        finally:
            os.close(descriptor)
        self._abort_words = [ctypes.c_int64.from_address(block.data_ptr()) for block in self._blocks]
        self.abort = self._abort_words[self._rank]

    def _pin(self) -> str | None:
        """Lets kernels use the own block as long as it is mapped; returns what the driver says against it."""
        from tdccl.transport import p2p

        try:
            p2p.pin(self.words.data_ptr(), mmap.PAGESIZE)
        except InitError as error:
            return str(error)
        self._unpin = weakref.finalize(self, _unpin, self.words)
        self._unpin.atexit = False
        return None

    def _map(self, rank: int, descriptor: int) -> torch.Tensor:
        """A rank's block; one that nobody else sees where it cannot be reached."""
        pages = None
        if self.pids[rank] is not None:
            with contextlib.suppress(OSError):
                file = os.open(f"/proc/{self.pids[rank]}/fd/{descriptor}", os.O_RDWR)
                try:
                    pages = mmap.mmap(file, mmap.PAGESIZE)
                finally:
                    os.close(file)
        if pages is None:
            self.pids[rank] = None
            pages = mmap.mmap(-1, mmap.PAGESIZE)
        return torch.frombuffer(pages, dtype=torch.int64)

    def fail(self, code: int, culprit: int) -> None:
        """Ends the waits of all ranks' kernels, and says why; the first fault that a rank hears of counts there."""
        for word in self._abort_words:
            if not word.value:
                word.value = code | culprit << 8

    def share(self) -> None:
        """Gives what this rank's kernel recorded to the ranks that have heard of no fault, whose waits end by it."""
        for block, word in zip(self._blocks, self._abort_words):
            if not word.value:
                block[1:_WORDS_OF_KERNELS] = self.words[1:_WORDS_OF_KERNELS]
                word.value = self.abort.value

    def record(self) -> str:
        """The fault of this rank, for `adopt` on a host that does not share this memory."""
        return self.words[:_WORDS_OF_KERNELS].numpy().tobytes().hex()

    def adopt(self, record: str) -> None:
        """Gives a fault of another host to those of the ranks seen from here that have heard of none."""
        words = torch.frombuffer(bytearray.fromhex(record), dtype=torch.int64)
        for block, word in zip(self._blocks, self._abort_words):
            if not word.value:
                block[1:_WORDS_OF_KERNELS] = words[1:]
                word.value = int(words[0])

    def leave(self) -> None:
        """Tells the peers that this rank uses none of their memory any more; kernels here must have ended."""
        self._unpin()
        self.words[_LEFT] = 1

    def has_left(self, rank: int) -> bool:
        """Whether a rank has called `leave`."""
        return bool(self._blocks[rank][_LEFT])

    def peers_gone(self) -> bool:
        """Whether each peer in this rank's node has left or died, so that none has its memory mapped."""
        return all(self.has_left(rank) or _dead(self.pids[rank]) for rank in self._node if rank != self._rank)

    def announce(self, members: int, port: int) -> None:
        """Says at which port `members`, a number of 31 bits for a set of ranks, meet; port 0 takes it back."""
        self.words[_MEETING] = members << 32 | port

    def announced(self, rank: int, members: int) -> int:
        """The port at which `rank` awaits those members, 0 if it does not."""
        word = int(self._blocks[rank][_MEETING])
        return word & 0xFFFFFFFF if word >> 32 == members else 0


def _unpin(words: torch.Tensor) -> None:
    from tdccl.transport import p2p

    p2p.unpin(words.data_ptr())


def _dead(pid: int | None) -> bool:
    """Whether there is no such process any more, or but its exit code."""
    if pid is None:
        return False
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    try:
        return bool(poll.poll(0))
    finally:
        os.close(descriptor)
