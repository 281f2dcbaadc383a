"""Streams by raw handles, streams of one's own, and order between them."""

import contextlib
import functools

import torch


@functools.lru_cache(None)
def stream_of(handle: int, gpu: int) -> torch.cuda.Stream:
    """torch's stream of a raw handle on the GPU of that number; the default stream's too, where `ExternalStream` makes
    another one."""
    return torch.cuda.ExternalStream(handle, gpu) if handle else torch.cuda.default_stream(gpu)


def current_stream(gpu: int) -> torch.cuda.Stream:
    """torch.cuda.current_stream, in a tenth of its time, which is longer than a small collective takes."""
    return stream_of(torch._C._cuda_getCurrentRawStream(gpu), gpu)


def own_stream(gpu: int) -> torch.cuda.Stream:
    """A stream that nobody else gets. `torch.cuda.Stream` deals out the same 32 in turns: what waits for a peer on one
    of them holds up all who got that one, too. It is never destroyed, because torch's allocator may yet look at it."""
    from tdccl.transport import p2p

    with torch.cuda.device(gpu):
        made = p2p.runtime.cudaStreamCreateWithFlags(p2p.runtime.cudaStreamNonBlocking)
        return stream_of(p2p.check(made, "cudaStreamCreateWithFlags"), gpu)


@functools.lru_cache(None)
def _errands(gpu: int) -> torch.cuda.Stream:
    return own_stream(gpu)


@contextlib.contextmanager
def aside(device: torch.device):
    """What is put on the current stream inside goes past all that waits for a peer, who may be waiting for this very
    rank; its end is waited for. It is short, and waits for nobody. Gives the stream's raw handle."""
    if device.type != "cuda":
        yield 0
        return
    stream = _errands(device.index)
    with torch.cuda.stream(stream):
        yield stream.cuda_stream
        stream.synchronize()


def is_capturing(handle: int) -> bool:
    """Whether what the stream of a raw handle is given now goes into a graph."""
    from cuda.bindings import driver

    status, capture = driver.cuStreamIsCapturing(handle)
    return not status and bool(capture)  # refused of the default stream where others capture; itself it cannot


class Order:
    """Makes streams of one GPU wait for others.

    One event serves for all of it, as a wait keeps what the event stood for when it was made; so callers hold a lock.
    """

    def __init__(self, gpu: int):
        self._gpu = gpu
        self._event = torch._C._CudaEventBase()  # torch.cuda.Event, without a layer of Python in every call

    def follow(self, stream: int, before: int) -> None:
        """What `stream` is given from now on waits for what `before` has been given, raw handles both."""
        self._event.record(stream_of(before, self._gpu))
        self._event.wait(stream_of(stream, self._gpu))
