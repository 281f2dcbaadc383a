"""Ranks that live through faults: processes that are killed, stopped and interrupted, and tell what they saw."""

import gc
import os
import re
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import tdccl
from bench import launch
from tdccl import Communicator, environment, torch_entry
from tdccl.transport.symmetric_memory import free_kept

ON_GPU = not environment.emulated()
LONG = 100.0  # seconds: a timeout that no fault here waits for
_CUDA_OPENS = ("/dev/nvidia", "anon_inode:[eventfd]")  # and keeps open, when it likes
SETTLED = 0.3  # seconds, until ranks that said they are about to call are inside the call


class Seen(NamedTuple):
    """What a rank saw of a fault: the error's type ("" for none), text and rank, and when, by the monotonic clock."""

    error: str
    text: str
    rank: int | None
    at: float


class Outcome(NamedTuple):
    """A fault's course: what each rank that lived saw, and the seconds until the last of them saw it."""

    seen: dict[int, Seen]
    seconds: float


class Part:
    """A rank's part in a fault."""

    def __init__(self, rank: int, size: int, store, pipe):
        self.rank, self.size = rank, size
        self.victim = size - 1
        self.store = store
        self._pipe = pipe

    @property
    def hit(self) -> bool:
        """Whether the fault befalls this rank."""
        return self.rank == self.victim

    def init(self, timeout: float = LONG) -> Communicator:
        comm = tdccl.init(store=self.store, rank=self.rank, size=self.size, timeout=timeout)
        named = [line for line in _shared_mappings() if not line.endswith("(deleted)\n")]
        assert not named, f"a crash would leave {named}, and the next job of that name would find it"
        return comm

    def meet(self) -> None:
        """Returns once all ranks have called it; once in a fault."""
        self.store.set(f"met/{self.rank}", "")
        self.store.wait([f"met/{rank}" for rank in range(self.size)])

    def say(self, word: str) -> None:
        """Tells the crew where this rank is: "here" before the call that the fault meets, "struck" in doing it."""
        self._pipe.send((word, time.monotonic()))

    def watch(self, comm: Any, call: Callable[[], Any]) -> Seen:
        """Makes the call, waits for its end, and tells what came of it."""
        try:
            call()
            if ON_GPU:
                torch.cuda.synchronize(comm.device)
            comm.check()
        except (tdccl.TdcclError, KeyboardInterrupt) as error:
            return Seen(type(error).__name__, str(error), getattr(error, "rank", None), time.monotonic())
        return Seen("", "", None, time.monotonic())

    def go_on(self, comm: Communicator) -> None:
        """The survivors shrink the communicator and use what they get."""
        with comm.shrink(exclude=[self.victim]) as smaller:
            verify(smaller)


def verify(comm: Communicator) -> None:
    """Checks a small and a large all_reduce."""
    for count in (7, 100_000):
        x = torch.full((count,), float(comm.rank + 1), device=comm.device)
        assert (comm.all_reduce(x) == comm.size * (comm.size + 1) / 2).all(), f"all_reduce of {count} is wrong"


def tensor(comm: Communicator) -> torch.Tensor:
    return torch.ones(100_000, device=comm.device)


class Strike(NamedTuple):
    """What is done to the victim once all ranks (without it: those that live) have said a word."""

    word: str
    signal: int
    by_victim: bool = True


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    body     what each rank does; returns what it saw
    strikes  what is done to the victim meanwhile; without any the victim says itself when the fault began
    error    the type that those who see the fault raise, "" if nothing is to be seen
    words    what its text says
    seen_by  whether it is "others" who see it, or the "victim", or "all"
    waited   seconds of timeout that it waits for
    exits    whether the victim's process ends by itself
    on       "both", "gpu" or "emulation"
    """

    name: str
    body: Callable[[Part], Seen]
    error: str
    words: tuple[str, ...] = ()
    strikes: tuple[Strike, ...] = ()
    seen_by: str = "others"
    waited: float = 0
    exits: bool = False
    on: str = "both"

    @property
    def timed(self) -> bool:
        """Whether the others wait for something, an error or the end of their call."""
        return bool(self.error) or self.kills

    @property
    def kills(self) -> bool:
        """Whether the victim does not live through it."""
        return self.exits or any(strike.signal == signal.SIGKILL for strike in self.strikes)


class Crew:
    """Rank processes that live until a fault kills them, or `close`."""

    def __init__(self, size: int):
        self.size = size
        self._context = launch.processes()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Any] = [None] * size
        self._processes: list[Any] = [None] * size
        self._runs = 0
        for rank in range(size):
            self._start(rank)

    def _start(self, rank: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(rank, self.size, self._store.port, theirs), daemon=True)
        process.start()
        theirs.close()
        self._pipes[rank], self._processes[rank] = ours, process

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def run(self, fault: Fault, seconds: float = 60) -> Outcome:
        """Has the ranks live through a fault. Raises AssertionError with what any of them says that it should not."""
        self._runs += 1
        for pipe in self._pipes:
            pipe.send((fault.body, self._runs))
        try:
            outcome = self._follow(fault, time.monotonic() + seconds)
        except BaseException:
            self.close()
            for rank in range(self.size):
                self._start(rank)
            raise
        if fault.kills:
            self._processes[-1].join()
            self._start(self.size - 1)
        _judge(fault, outcome, self.size)
        return outcome

    def _follow(self, fault: Fault, deadline: float) -> Outcome:
        victim, awaited = self.size - 1, set(range(self.size))
        said: Counter = Counter()
        strikes, began, seen = list(fault.strikes), None, {}
        if fault.kills:
            awaited.remove(victim)
        open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while awaited - seen.keys():
            while strikes and said[strikes[0].word] == self.size - (not strikes[0].by_victim):
                time.sleep(SETTLED)
                began = began or time.monotonic()
                os.kill(self._processes[victim].pid, strikes.pop(0).signal)
            ready = connection.wait(list(open_pipes), max(0, deadline - time.monotonic()))
            assert ready, f"{fault.name}: no answer from rank {sorted(awaited - seen.keys())}; said: {dict(said)}"
            for pipe in ready:
                rank = open_pipes[pipe]
                try:
                    word, what = pipe.recv()
                except EOFError:
                    del open_pipes[pipe]
                    assert fault.kills and rank == victim, f"{fault.name}: rank {rank} died"
                    continue
                assert word != "failed", f"{fault.name}: rank {rank}: {what}"
                if word == "seen":
                    seen[rank] = what
                elif word == "struck":
                    began = what
                said[word] += 1
        return Outcome(seen, max((each.at for rank, each in seen.items() if _sees(fault, rank, victim))) - began)


def _sees(fault: Fault, rank: int, victim: int) -> bool:
    return fault.seen_by == "all" or (rank == victim) == (fault.seen_by == "victim")


def _judge(fault: Fault, outcome: Outcome, size: int) -> None:
    """Raises AssertionError unless the right ranks saw the right error."""
    victim = size - 1
    for rank, seen in outcome.seen.items():
        if not _sees(fault, rank, victim):
            continue
        assert seen.error == fault.error, f"{fault.name}: rank {rank} saw {seen}, expected {fault.error or 'nothing'}"
        for word in fault.words:
            assert word.format(victim=victim) in seen.text, f"{fault.name}: rank {rank} saw {seen}, expected {word!r}"
        if seen.error in ("PeerFailure", "Aborted"):
            assert seen.rank == victim, f"{fault.name}: rank {rank} saw {seen}, expected rank {victim}"


def _serve(rank: int, size: int, port: int, pipe) -> None:
    """A rank's process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    torch_entry.register()
    index = None
    if ON_GPU:
        index = rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # with what follows, opens what stays open
    with tdccl.init(store=dist.PrefixStore(f"alone/{os.getpid()}", store), rank=0, size=1, device=index) as comm:
        verify(comm)
    while True:
        try:
            body, run = pipe.recv()
        except EOFError:
            return
        part = Part(rank, size, dist.PrefixStore(f"run/{run}", store), pipe)
        before = footprint()
        try:
            seen = body(part)
            check_footprint(before)
        except Exception:
            pipe.send(("failed", traceback.format_exc()))
        else:
            pipe.send(("seen", seen))


def footprint() -> Counter:
    """Descriptors by kind, shared mappings, and threads of this process."""
    found: Counter = Counter()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # that of the folder itself
            continue
        if not (ON_GPU and target.startswith(_CUDA_OPENS)):
            found[re.sub(r"\d+", "", target)] += 1
    found["mapped"] = len(_shared_mappings())
    names = [thread.name for thread in threading.enumerate()]
    found["threads"] = sum(name.startswith("tdccl") and name != "tdccl-network" for name in names)  # it lives on
    return found


def _shared_mappings() -> list[str]:
    with open("/proc/self/maps") as lines:
        return [line for line in lines if "memfd:tdccl" in line or "/dev/shm" in line]


def check_footprint(before: Counter) -> None:
    deadline = time.monotonic() + 10
    while left := footprint() - before:
        assert time.monotonic() < deadline, f"left behind: {dict(left)}"
        gc.collect()
        if ON_GPU:
            free_kept()  # as the next communicator would
        time.sleep(0.02)
