"""Order between streams, told to the driver by raw handles: torch's objects for it take several times as long."""

import weakref


class Order:
    """Makes streams of one device wait for others.

    One event serves for all of it, as a wait keeps what the event stood for when it was made; so callers hold a lock.
    """

    def __init__(self):
        """On the current device. Raises RuntimeError if the driver refuses."""
        from cuda.bindings import driver

        status, self._event = driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        if status:
            raise RuntimeError(f"cuEventCreate: {status!r}")
        weakref.finalize(self, driver.cuEventDestroy, self._event).atexit = False
        self._record, self._wait = driver.cuEventRecord, driver.cuStreamWaitEvent

    def follow(self, stream: int, before: int) -> None:
        """What `stream` is given from now on waits for what `before` has been given, raw handles both.

        Raises RuntimeError if the driver refuses.
        """
        (status,) = self._record(self._event, before)
        if not status:
            (status,) = self._wait(stream, self._event, 0)
        if status:
            raise RuntimeError(f"stream {stream:#x} cannot wait for stream {before:#x}: {status!r}")
