"""One run: every cap, collective, placement, size, dtype and op; tdccl and its peers one after another at each."""

import argparse
import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist

from bench import data, implementations
from bench.collectives import COLLECTIVES, Buffers, Case, Collective
from bench.implementations import Candidate, Implementation
from bench.options import sizes
from bench.output import Output, Result
from tdccl import Communicator, environment
from tdccl.timing import Effort, HostClock, slowest
from tdccl.transport.bootstrap import Bootstrap


def run(options: argparse.Namespace, comm: Communicator, bootstrap: Bootstrap) -> int:
    """Measures all that the options ask for and destroys `comm`; collective. 1 if any element is wrong, else 0."""
    if options.root >= comm.size:
        raise SystemExit(f"-r is {options.root}, expected a rank from 0 to {comm.size - 1}")
    if environment.emulated():
        torch.set_num_threads(1)  # ranks share the cores
    output = Output(options, comm)
    ours = implementations.ours(comm, bootstrap, options.graph)
    caps = options.max_blocks or [comm.max_blocks]  # TDCCL_MAX_BLOCKS is one too
    rivals = options.vs if None in caps else []
    if rivals != options.vs:
        output.note("--vs takes a pass without a cap on blocks, and there is none: left out")
    peers, notes = implementations.peers(rivals, comm, bootstrap, options.graph, options.maxbytes)
    for name, reason in notes.items():
        output.note(f"{name} {reason}: left out")
    meter = Meter(options, bootstrap, output)
    buffers = {placement: _allocate(comm, placement, options.maxbytes) for placement in options.placement}
    for cap, name, placement in itertools.product(caps, options.collectives, options.placement):
        comm.limit_blocks(cap)
        beside = peers if cap is None else []  # theirs would be the same again
        collective = COLLECTIVES[name]
        output.begin(name, placement, ours.clock.mode, cap, [peer.name for peer in beside if peer.variants(collective)])
        for cases in _cases(options, collective, comm):
            if cases[False].count == 0:
                least = "16 a rank" if collective.pieces else f"one {cases[False].dtype_name}"
                output.note(f"{cases[False].limit} bytes are less than {least}: left out")
                continue
            output.row([meter.results(each, cases, placement, buffers[placement]) for each in (ours, *beside)])
    status = output.end()
    if dist.is_initialized():
        dist.destroy_process_group()
    comm.destroy()
    return status


def _allocate(comm: Communicator, placement: str, nbytes: int) -> Buffers:
    if placement == "symmetric":
        return Buffers(comm.empty(nbytes, torch.uint8), comm.empty(nbytes, torch.uint8))
    return Buffers(*(torch.empty(nbytes, dtype=torch.uint8, device=comm.device) for _ in range(2)))


def _cases(options: argparse.Namespace, collective: Collective, comm: Communicator) -> Iterator[dict[bool, Case]]:
    """For each row of the table: {False: the case out of place, True: in place}."""
    ops = options.ops if collective.reduces else [None]
    root = options.root if collective.rooted else -1
    for limit, dtype, op in itertools.product(sizes(options), options.dtypes, ops):
        yield {
            in_place: Case(collective, limit, dtype, op, root, comm.rank, comm.size, in_place)
            for in_place in (False, True)
        }


class Meter:
    """Checks and times candidates; every method is collective."""

    def __init__(self, options: argparse.Namespace, bootstrap: Bootstrap, output: Output):
        self._checks = options.check
        self._effort = Effort(options.iters, options.warmup_iters, 3 if environment.emulated() else 7)
        self._bootstrap, self._output = bootstrap, output
        self._seeds = itertools.count()

    def results(
        self, implementation: Implementation, cases: dict[bool, Case], placement: str, buffers: Buffers
    ) -> list[Result]:
        """The best candidate of each variant that the implementation has of the case."""
        found = []
        for in_place in implementation.variants(cases[False].collective):
            case = cases[in_place]
            self._output.progress(f"{case.collective.name} {case.nbytes} B: {implementation.name}")
            measured = []
            for candidate in implementation.candidates(case, buffers):
                if implementation.name != "tdccl" and (reason := _refusal(candidate)):
                    self._output.note(f"{implementation.name}: no {case.op or ''} {case.dtype_name}: {reason}")
                    continue
                wrong, time = self._measure(case, candidate, implementation.clock)
                how = implementation.clock.mode, placement, implementation.max_blocks
                measured.append(Result(case, implementation.name, candidate.algorithm, *how, time, wrong))
            if measured:
                found.append(min(measured, key=lambda result: result.time_us))
        return found

    def _measure(self, case: Case, candidate: Candidate, clock: HostClock) -> tuple[int | None, float]:
        """(wrong elements on all ranks, or None unchecked; microseconds a call)."""
        wrong = 0 if self._checks else None
        once = clock.repeated(candidate.call, 1)
        for _ in range(self._checks):
            seed = next(self._seeds)
            data.prepare(case, candidate.send, candidate.recv, seed)
            once()
            wrong += sum(self._bootstrap.exchange(data.count_wrong(case, candidate.recv, seed)))
        seed = next(self._seeds)

        def refill():
            data.prepare(case, candidate.send, candidate.recv, seed)

        refill()
        return wrong, slowest(clock, self._bootstrap, candidate.call, refill, self._effort)


def _refusal(candidate: Candidate) -> str | None:
    """Why a peer does not take the case: not every backend of torch has every dtype and op. None if it does."""
    try:
        candidate.call()
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error).strip().partition("\n")[0]
    return None
