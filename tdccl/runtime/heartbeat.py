"""Tells ranks that cannot see this process, on other hosts, that it lives, and of faults, through a Store.

Each rank watches one that it cannot see: the next after it in a ring. Of its own host's ranks it hears by `watcher`,
and tells the others. A thread a communicator makes a few small requests of the store in each PERIOD.
"""

import threading
import time
from collections.abc import Callable

from tdccl.transport import Control

PERIOD = 0.5  # seconds
SILENCE = 60.0  # seconds without a beat after which a rank counts as dead: a compiler may hold Python up for some

_LEFT = b"left"


class Heartbeat:
    """The beats of one communicator's rank.

    store    a torch.distributed Store, used by this thread alone
    watched  the rank whose beats are watched, if any
    died     called with a rank that has fallen silent, from another thread
    """

    def __init__(self, store, rank: int, watched: int | None, control: Control, died: Callable[[int], None]):
        self._store, self._rank, self._watched = store, rank, watched
        self._control, self._died = control, died
        self._wake, self._ends = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="tdccl-heartbeat", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Has a fault that there is now told at once."""
        self._wake.set()

    def end_soon(self) -> None:
        """Ends the beats; who watches them will know that this rank has left."""
        self._ends = True
        self._wake.set()

    def end(self) -> None:
        """`end_soon`, and waits for it."""
        self.end_soon()
        self._thread.join(10)  # the store may be gone

    def _run(self) -> None:
        beats, heard, since = 0, None, time.monotonic()
        try:
            while not self._ends:
                if self._control.abort.value:
                    self._store.compare_set("fault", "", self._control.record())
                    break
                if self._store.check(["fault"]):
                    self._control.adopt(self._store.get("fault").decode())
                    break
                beats += 1
                self._store.set(f"beat/{self._rank}", str(beats))
                last = self._last_beat()
                if last != heard or last == _LEFT:
                    heard, since = last, time.monotonic()
                elif self._watched is not None and time.monotonic() - since > SILENCE:
                    self._died(self._watched)
                    continue  # the others hear of it at once
                self._wake.wait(PERIOD)
                self._wake.clear()
            if self._control.abort.value:  # a fault, and then the end, before this thread looked
                self._store.compare_set("fault", "", self._control.record())
            self._store.set(f"beat/{self._rank}", _LEFT)
        except RuntimeError:
            pass  # the store is gone: from now on faults of other hosts show by deadlines alone

    def _last_beat(self) -> bytes | None:
        key = f"beat/{self._watched}"
        return self._store.get(key) if self._store.check([key]) else None
