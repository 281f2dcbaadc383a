"""Tells ranks that cannot see this process, on other hosts, that it lives, and of faults, through a Store.

Each rank watches one that it cannot see: the next after it in a ring. Of its own host's ranks it hears by `watcher`,
and tells the others. A thread a communicator makes a few small requests of the store in each PERIOD.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from tdccl.transport import Control

PERIOD = 0.5  # seconds
SILENCE = 60.0  # seconds without a beat after which a rank counts as dead: a compiler may hold Python up for some
HEARING = 4 * PERIOD  # seconds in which the others hear of a fault
_CONNECTING = timedelta(seconds=3)  # for one attempt to reach the store anew

_LEFT = b"left"
_running: set["Heartbeat"] = set()


class Heartbeat:
    """The beats of one communicator's rank.

    store    a torch.distributed Store, used by this thread alone
    watched  the rank whose beats are watched, if any
    keeps    whether the store may end with this process, which then lets the others hear of a fault before it ends
    died     called with a rank that has fallen silent, from another thread

    Requests that fail are made again on a new connection, until none has been answered for SILENCE: then the store is
    gone, and faults of other hosts show by deadlines alone.
    """

    def __init__(
        self, store, rank: int, size: int, watched: int | None, keeps: bool, control: Control,
        died: Callable[[int], None],
    ):  # fmt: skip
        self._store, self._rank, self._size, self._watched = store, rank, size, watched
        self._keeps, self._control, self._died = keeps, control, died
        self._wake, self._ends, self._leaves = threading.Event(), False, False
        self._beats, self._heard, self._since = 0, None, time.monotonic()
        self._store.set_timeout(_CONNECTING)
        self._thread = threading.Thread(target=self._run, name="tdccl-heartbeat", daemon=True)
        _running.add(self)
        self._thread.start()

    def hurry(self) -> None:
        """Has a fault that there is now told at once."""
        self._wake.set()

    def leave(self) -> None:
        """Ends the beats, waits for it, and lets who watches them know that this rank has left."""
        self._leaves = True
        self.end_soon()
        self.join()

    def end_soon(self) -> None:
        """Ends the beats; unless there is a fault, who watches them will take this rank for dead after SILENCE."""
        self._ends = True
        self._wake.set()

    def join(self) -> None:
        """Waits for the end of the beats, not long if the store does not answer."""
        self._thread.join(10)

    def _run(self) -> None:
        answered = time.monotonic()
        try:
            while True:
                try:
                    if self._turn():
                        return
                    answered = time.monotonic()
                except RuntimeError:
                    if self._ends or time.monotonic() - answered > SILENCE:
                        return
                    self._reconnect()
                self._wake.wait(PERIOD)
                self._wake.clear()
        finally:
            _running.discard(self)

    def _turn(self) -> bool:
        """Tells what there is to tell, and hears; returns whether that was the last time."""
        ends = self._ends
        if self._control.abort.value:  # looked at after `_ends`: a fault may come just before the end
            self._store.compare_set("fault", "", self._control.record())
        elif self._store.check(["fault"]):
            self._control.adopt(self._store.get("fault").decode())
        elif not ends:
            self._beat()
            return False
        faulty = bool(self._control.abort.value)
        if faulty or self._leaves:
            self._store.set(f"beat/{self._rank}", _LEFT)
        if faulty and self._keeps:
            self._await_others()
        return True

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", str(self._beats))
        last = self._last_beat_of(self._watched)
        if last != self._heard or last == _LEFT:
            self._heard, self._since = last, time.monotonic()
        elif self._watched is not None and time.monotonic() - self._since > SILENCE:
            self._died(self._watched)
            self._watched = None  # once is enough
            self.hurry()  # the others hear of it at once

    def _await_others(self) -> None:
        deadline = time.monotonic() + HEARING
        while time.monotonic() < deadline:
            if all(self._last_beat_of(rank) == _LEFT for rank in range(self._size)):
                return
            time.sleep(PERIOD / 10)

    def _last_beat_of(self, rank: int | None) -> bytes | None:
        key = f"beat/{rank}"
        return self._store.get(key) if self._store.check([key]) else None

    def _reconnect(self) -> None:
        """A connection that has once failed fails for ever."""
        with contextlib.suppress(RuntimeError):  # tried again after the next request, which fails on the old one
            self._store = self._store.clone()
        self._since = time.monotonic()  # who was not heard of meanwhile need not be silent


def end_all() -> None:
    """Ends the beats of all communicators, and waits for it: a thread that is inside a request when the interpreter
    ends would take the process with it."""
    running = list(_running)
    for beats in running:
        beats.end_soon()
    for beats in running:
        beats.join()


os.register_at_fork(after_in_child=_running.clear)
