"""The flight recorder: the last calls of each rank, which the other ranks of the host can read.

A call costs one write of fixed size into memory that the peers have mapped; they look at it when a wait has failed,
also if this rank is stuck or dead by then. What became of a call is known in emulation alone, where a launch returns
when its kernel has ended; on a GPU the host would have to wait for it.
"""

import functools
import json
import os
import struct
from pathlib import Path
from time import time_ns
from typing import Any, NamedTuple

from tdccl.transport import Bootstrap, host

CALLS = 1024  # that are kept, a power of two
MESSAGES = ("send", "recv", "send_recv")  # between two ranks; all else is a collective
ROOTED = ("reduce", "gather", "scatter")  # where send and recv lie is the root's affair

_RECORD = struct.Struct("<qqqqq104s")  # the first five fields of an Entry, and what `described` makes of the others
_BYTES, _LAST, _write = _RECORD.size, CALLS - 1, _RECORD.pack_into
_DESCRIBED = struct.Struct("<16s24s16s4si?3xqqqq")
_OFFSET_BITS = 44
_ENDED = struct.Struct("<q")


class Entry(NamedTuple):
    """One call, as a rank made it.

    index      counts all calls of this rank from 1
    number     counts its collectives from 1; a message has the number of the collective before it
    started    when it was launched, in ns since 1970
    ended      when its kernel had ended; 0 where that is not known
    stream     the raw handle
    root       of a collective, or the other rank of a message
    send, recv  where they lie, see `placed`
    uneven     whether ranks may have different counts
    count      elements: of the whole message for all_reduce, reduce and broadcast, else of one rank's piece; if uneven,
               of all that this rank sends
    nbytes     the same in bytes
    """

    index: int
    number: int
    started: int
    ended: int
    stream: int
    collective: str
    algorithm: str
    dtype: str
    op: str | None
    root: int | None
    send: str
    recv: str
    uneven: bool
    count: int
    nbytes: int

    def __str__(self) -> str:
        return worded(self.collective, self.count, self.dtype, self.op, self.root)

    def alike(self) -> tuple:
        """What ranks have to have in common in a call."""
        dtype, nbytes = self.dtype if self.op else None, None if self.uneven else self.nbytes
        everywhere = not self.uneven and self.collective not in ROOTED
        places = (self.send, self.recv) if everywhere else None
        return self.collective, self.algorithm, self.op, self.root, dtype, nbytes, places

    def in_full(self) -> str:
        return f"{self} by {self.algorithm}, send in {self.send}, recv in {self.recv}"


PLAIN = -1


def place_of(segment: int, offset: int) -> int:
    """Where an array lies in symmetric memory, for `described`: so many bytes into the segment of that number."""
    return segment << _OFFSET_BITS | offset


def placed(place: int) -> str:
    """A place in words."""
    if place == PLAIN:
        return "plain memory"
    return f"symmetric memory {place >> _OFFSET_BITS} at {place & (1 << _OFFSET_BITS) - 1}"


def worded(collective: str, count: int, dtype: str, op: str | None, root: int | None) -> str:
    """A call as messages name it."""
    text = collective if collective == "barrier" else f"{collective} of {count} {dtype}"
    if op is not None:
        text += f", {op}"
    if root is not None:
        text += f", {'rank' if collective in MESSAGES else 'root'} {root}"
    return text


@functools.lru_cache(4096)
def described(
    collective: str,
    algorithm: str,
    dtype: Any,
    op: str | None,
    root: int | None,
    send: int,
    recv: int,
    uneven: bool,
    count: int,
    nbytes: int,
) -> bytes:
    """What stays the same whenever a call is made again, for `Recorder.note`.

    dtype: torch's. send, recv: PLAIN, or what `place_of` says.
    """
    names = (name.encode() for name in (collective, algorithm, str(dtype).removeprefix("torch."), op or ""))
    return _DESCRIBED.pack(*names, -1 if root is None else root, uneven, send, recv, count, nbytes)


def name_of(call: bytes) -> str:
    """The collective, of what `described` made."""
    return _DESCRIBED.unpack(call)[0].rstrip(b"\0").decode()


class Recorder:
    """Notes this rank's calls, and reads its peers'.

    name         of the communicator, the same on all ranks
    collectives  how many have been noted
    """

    def __init__(self, bootstrap: Bootstrap):
        """Collective over the bootstrap's ranks."""
        self.rank, self.size = bootstrap.rank, bootstrap.size
        self.name = bootstrap.exchange(os.urandom(4).hex())[0]
        own, peers = host.show(bootstrap, (1 + CALLS) * _BYTES)
        struct.pack_into("<q", own, 0, os.getpid())
        self._seen = {**peers, self.rank: own}
        self._ring = own[_BYTES:]
        self._calls = self.collectives = 0

    def note(self, call: bytes, stream: int, collectives: int = 1) -> int:
        """Notes that a call is launched now, which is 1 collective or 0; returns its index.

        It is part of every call: about 0.25 us, measured by timeit.
        """
        self._calls = index = self._calls + 1
        self.collectives = number = self.collectives + collectives
        _write(self._ring, (index & _LAST) * _BYTES, index, number, time_ns(), 0, stream, call)
        return index

    def end(self, index: int) -> None:
        """Notes that the kernel of that call has ended, unless so many calls came after it that it is not kept."""
        if self._calls - index < CALLS:
            _ENDED.pack_into(self._ring, (index & _LAST) * _BYTES + 24, time_ns())

    def histories(self) -> dict[int, list[Entry]]:
        """By rank, for all that can be seen from here: the last calls, the oldest first."""
        return _histories(self._seen)

    def dump(self, folder: str | os.PathLike, error: str | None) -> Path:
        """Writes all that can be seen from here, as JSON, to a file of this rank's in `folder`; returns its path."""
        seen = self._seen  # another thread may close it
        ranks = {
            rank: {"pid": struct.unpack_from("<q", seen[rank])[0], "calls": [call._asdict() for call in calls]}
            for rank, calls in _histories(seen).items()
        }
        told = {"communicator": self.name, "size": self.size, "rank": self.rank, "error": error, "ranks": ranks}
        path = Path(folder, f"{self.name}-rank{self.rank}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(told))
        return path.with_suffix(".part").replace(path)  # whoever reads the folder meanwhile sees no half of it

    def close(self) -> None:
        """Lets go of all memory; what peers have mapped stays."""
        self._seen, self._ring = {}, None


def _histories(seen: dict[int, memoryview]) -> dict[int, list[Entry]]:
    return {rank: _entries(memory) for rank, memory in sorted(seen.items())}


def _entries(memory: memoryview) -> list[Entry]:
    """The calls in a rank's memory, less one that the rank is just writing."""
    first, second = bytes(memory), bytes(memory)
    found = []
    for start in range(_BYTES, len(first), _BYTES):
        record = first[start : start + _BYTES]
        *moment, call = _RECORD.unpack(record)
        if moment[0] and record == second[start : start + _BYTES]:
            found.append(_entry(moment, call))
    return sorted(found, key=lambda entry: entry.index)


def _entry(moment: list[int], call: bytes) -> Entry:
    *names, root, uneven, send, recv, count, nbytes = _DESCRIBED.unpack(call[: _DESCRIBED.size])
    collective, algorithm, dtype, op = (name.rstrip(b"\0").decode() for name in names)
    root = None if root < 0 else root
    send, recv = placed(send), placed(recv)
    return Entry(*moment, collective, algorithm, dtype, op or None, root, send, recv, uneven, count, nbytes)


def account(histories: dict[int, list[Entry]]) -> list[str]:
    """Lines that say at which call each rank is, and where they part."""
    lines = []
    for rank, entries in histories.items():
        if entries:
            last = entries[-1]
            after = "after call" if last.collective in MESSAGES else "at call"
            ended = ", which has ended" if last.ended else ""
            lines.append(f"rank {rank} is {after} {last.number}: {last}{ended}")
        else:
            lines.append(f"rank {rank} has made no call")
    return [*lines, *_parting(histories)]


def _parting(histories: dict[int, list[Entry]]) -> list[str]:
    """Which call is the first that differs between ranks, or to which one some of them have not come."""
    calls = {
        rank: {entry.number: entry for entry in entries if entry.collective not in MESSAGES}
        for rank, entries in histories.items()
    }
    for number in sorted(set.intersection(*map(set, calls.values())) if calls else ()):
        made = {rank: of_rank[number] for rank, of_rank in calls.items()}
        if len({call.alike() for call in made.values()}) > 1:
            each = [f"  rank {rank}: {call.in_full()}" for rank, call in made.items()]
            return [f"the ranks differ in call {number}:", *each]
    last = {rank: max(of_rank, default=0) for rank, of_rank in calls.items()}
    furthest = max(last.values(), default=0)
    return [
        f"rank {rank} has not come to call {number + 1}, to which others have"
        for rank, number in last.items()
        if number < furthest
    ]
