"""Events, under DeepEP's name for their module, and the stream on which asynchronous calls go."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from tdccl import environment


class EventHandle:
    """What the current stream has been given up to now. In emulation, where calls end before they return, nothing."""

    def __init__(self):
        self.event = None if environment.emulated() else torch.cuda.current_stream().record_event()

    def current_stream_wait(self) -> None:
        """What comes on the current stream from now on waits for it."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class EventOverlap:
    """An event, or none. `with` it, what the block puts on the current stream overlaps with what the event stands for,
    and what comes after the block waits for it.

    extra_tensors: kept as long as this object.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[torch.Tensor, ...] | None = None):
        self.event, self.extra_tensors = event, extra_tensors

    def current_stream_wait(self) -> None:
        """What comes on the current stream from now on waits for the event; there must be one."""
        assert self.event is not None, "no event: the call was not given async_finish=True"
        self.event.current_stream_wait()

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(self, *_) -> None:
        if self.event is not None:
            self.event.current_stream_wait()


class SideStream:
    """A stream beside the caller's, for calls with async_finish."""

    def __init__(self, device: torch.device):
        self.stream = None if environment.emulated() else torch.cuda.Stream(device)

    def run(
        self, call: Callable[[], tuple], used: Iterable[Any], previous: EventOverlap | None, async_finish: bool
    ) -> tuple[tuple, EventOverlap]:
        """(what `call` returns, the event behind it if `async_finish`).

        It goes on the current stream, or if `async_finish` on the one beside it; after `previous`, or after what the
        current stream has been given. used: what holds the tensors that the call reads or writes.
        """
        if previous is not None and previous.event is None:
            previous = None
        if self.stream is None or not async_finish:
            if previous is not None:
                previous.current_stream_wait()
            return call(), EventOverlap(EventHandle() if async_finish else None)
        caller = torch.cuda.current_stream(self.stream.device)  # the current device may be another
        with torch.cuda.stream(self.stream):
            if previous is None:
                self.stream.wait_stream(caller)
            else:
                previous.current_stream_wait()
            for tensor in _tensors(used):  # their memory may be used again only after both streams
                tensor.record_stream(self.stream)
            made = call()
            event = EventHandle()
        for tensor in _tensors(made):
            tensor.record_stream(caller)
        return made, EventOverlap(event)


def _tensors(found: Any) -> Iterable[torch.Tensor]:
    """All tensors in nested tuples and handles."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, tuple):
        for each in found:
            yield from _tensors(each)
    elif hasattr(found, "memory"):
        yield from _tensors(found.memory)
