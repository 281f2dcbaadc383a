"""How long a call takes: the slowest rank, the median of several repetitions."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tdccl import environment
from tdccl.communicator import Communicator
from tdccl.transport.bootstrap import Bootstrap

_LEAD = 400_000  # GPU clocks, some 200 us: enough to launch a graph in


def clock_for(comm: Communicator, bootstrap: Bootstrap, graph: bool) -> "HostClock":
    """The clock for what the communicator runs on, for replays of a graph or for eager calls."""
    if environment.emulated():
        return HostClock(bootstrap)
    return (GraphClock if graph else GpuClock)(bootstrap, comm)


class HostClock:
    """Wall time of calls that have ended when they return: emulation, and Gloo on CPU tensors."""

    mode = "eager"

    def __init__(self, bootstrap: Bootstrap):
        self._bootstrap = bootstrap

    def repeated(self, call: Callable[[], None], times: int) -> Callable[[], None]:
        """One callable for `times` calls."""

        def run():
            for _ in range(times):
                call()

        return run

    def microseconds(self, run: Callable[[], None]) -> float:
        """Time of one run on this rank, begun on all ranks together."""
        self._bootstrap.barrier()
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6


class GpuClock(HostClock):
    """Time between two CUDA events on the current stream, around eager calls."""

    def __init__(self, bootstrap: Bootstrap, comm: Communicator):
        super().__init__(bootstrap)
        self._comm = comm

    def microseconds(self, run: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()  # else work still queued would hide what launching costs
        self._bootstrap.barrier()
        self._lead()
        self._comm.barrier()  # on the GPU: hosts leave theirs too far apart for calls of a few microseconds
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def _lead(self) -> None:
        """Eager calls are to show what launching costs: the host gets no lead."""


class GraphClock(GpuClock):
    """The same around the replay of one graph that holds all the calls."""

    mode = "graph"

    def repeated(self, call: Callable[[], None], times: int) -> Callable[[], None]:
        call()  # compiles and connects, which must not happen under capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay

    def _lead(self) -> None:
        torch.cuda._sleep(_LEAD)  # the replay is queued before the GPUs leave their barrier together


@dataclass(frozen=True)
class Effort:
    """How often each call is made: `warmup` times untimed, then `iters` times together, `repetitions` times."""

    iters: int
    warmup: int
    repetitions: int


def slowest(
    clock: HostClock,
    bootstrap: Bootstrap,
    call: Callable[[], None],
    refill: Callable[[], None],
    effort: Effort,
) -> float:
    """Microseconds a call on the slowest rank; collective.

    `refill` renews the input before each repetition: calls in place sum it up, to infinity in the end.
    """
    for _ in range(effort.warmup):
        call()
    run = clock.repeated(call, effort.iters)
    if effort.warmup:
        run()  # the first replay of a graph also uploads it
    mine = []
    for _ in range(effort.repetitions):
        refill()
        mine.append(clock.microseconds(run) / effort.iters)
    everyone = bootstrap.exchange(mine)
    return statistics.median(map(max, zip(*everyone)))
