"""Sees the deaths of other processes of this host within milliseconds: one thread, over their pidfds."""

import contextlib
import os
import select
import threading
import time
import traceback
from collections.abc import Callable

# Between a death and the word of it: what a rank had sent before it ended may be all that calls under way still need.
GRACE = 0.2


class _Process:
    def __init__(self, pid: int):
        self.descriptor = os.pidfd_open(pid)
        self.tell: list[Callable[[], None]] = []


_lock = threading.RLock()  # a garbage collection anywhere may end a watch
_processes: dict[int, _Process] = {}  # watched, by pid
_wake: int | None = None  # the thread's eventfd; None while there is no thread


def watch(pid: int, died: Callable[[], None]) -> Callable[[], None]:
    """Calls died() from another thread, GRACE seconds after process `pid` has ended or at once if it is gone.

    Returns what ends the watch, which may be called again. The thread lives as long as something is watched, and does
    not hold up the end of the interpreter. Where the system has no pidfds nothing is watched.
    """
    with _lock:
        process = _processes.get(pid)
        if process is None:
            try:
                process = _processes[pid] = _Process(pid)
            except ProcessLookupError:
                died()
                return lambda: None
            except OSError:
                return lambda: None
        process.tell.append(died)
        _notify()
    return lambda: _unwatch(pid, died)


def _unwatch(pid: int, died: Callable[[], None]) -> None:
    with _lock:
        process = _processes.get(pid)
        if process is None or died not in process.tell:
            return
        process.tell.remove(died)
        if not process.tell:
            os.close(_processes.pop(pid).descriptor)
            _notify()


def _notify() -> None:
    """Makes the thread look at the processes again, and starts it if there is none."""
    global _wake
    if _wake is None:
        _wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        threading.Thread(target=_serve, args=(_wake,), name="tdccl-watcher", daemon=True).start()
    os.eventfd_write(_wake, 1)


def _serve(wake: int) -> None:
    global _wake
    while True:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        with _lock:
            if not _processes:
                _wake = None
                os.close(wake)
                return
            for process in list(_processes.values()):
                poll.register(process.descriptor, select.POLLIN)
        ended = {descriptor for descriptor, _ in poll.poll()}
        if wake in ended:  # other descriptors may be closed by now, and their numbers used again
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(wake)
            continue
        time.sleep(GRACE)
        _tell(ended)


def _tell(ended: set[int]) -> None:
    """Tells of the processes behind these descriptors, and watches them no more."""
    told: list[Callable[[], None]] = []
    with _lock:
        for pid, process in list(_processes.items()):
            # A garbage collection in this loop may have ended the watch.
            if pid in _processes and process.descriptor in ended and _has_ended(process.descriptor):
                told += process.tell
                os.close(_processes.pop(pid).descriptor)
    for died in told:
        try:
            died()
        except Exception:  # the thread is there for others, too
            traceback.print_exc()


def _has_ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _forget_in_child() -> None:
    """A forked child has neither the thread nor anything to watch."""
    global _wake
    for process in _processes.values():
        os.close(process.descriptor)
    if _wake is not None:
        os.close(_wake)
    _processes.clear()
    _wake = None
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget_in_child)
