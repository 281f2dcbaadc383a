"""Ranks that are started once and run many test bodies.

A body is a module-level function `body(comm, **arguments)` of a test module. `RankPool.run` calls it on the first
`world` ranks, each with a communicator over just these, and raises with what every failed rank said.
"""

import importlib
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from bench import launch
from tdccl import environment

ROOT = Path(__file__).parent.parent
TIMEOUT = 30  # seconds, of the ranks' waits
# Ranks may share a GPU (TDCCL_TEST_RANKS larger than the number of GPUs): right, but slow by time slicing.
_FOUND = torch.cuda.device_count() if torch.cuda.is_available() else 4
LARGEST_WORLD = int(os.environ.get("TDCCL_TEST_RANKS", min(4, _FOUND)))
# NCCL, which programs on GPUs are compared with, takes one rank a GPU.
LARGEST_FOR_NCCL = min(LARGEST_WORLD, _FOUND)


class RankPool:
    """`size` processes, one a rank, that live as long as the test session or until one of them fails to answer."""

    def __init__(self, size: int):
        self.size = size
        self._start()

    def _start(self) -> None:
        context = launch.processes()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._processes = [], []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, body, world: int, seconds: float = 240, **arguments) -> list:
        """Runs body(comm, **arguments) on ranks 0 .. world-1; returns what each returned."""
        for pipe in self._pipes[:world]:
            pipe.send((body.__module__, body.__qualname__, world, arguments))
        answers, complaints = [], []
        for rank, pipe in enumerate(self._pipes[:world]):
            try:
                ok, answer = pipe.recv() if pipe.poll(seconds) else (False, f"no answer within {seconds} s")
            except EOFError:
                ok, answer = False, f"died with exit code {self._processes[rank].exitcode}"
            answers.append(answer)
            if not ok:
                complaints.append(f"rank {rank} of {world}: {answer}")
                seconds = min(seconds, 15)  # the others are at most waiting for this one
        if complaints:
            self.close()
            self._start()
            test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
            repeat = f"\nrepeat with: python -m pytest '{test}'"
            raise AssertionError("\n".join(complaints) + repeat)
        return answers

    def close(self) -> None:
        """Ends the ranks. On GPUs their kernels end first: under MPS who is killed in one takes all others along."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + (0 if environment.emulated() else 2 * TIMEOUT)
        for process in self._processes:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()
            process.join()


def _serve(rank: int, port: int, pipe) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    torch.set_num_threads(1)
    import tdccl

    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    communicators = {}
    while True:
        try:
            module, name, world, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if world not in communicators:
                own = dist.PrefixStore(f"world{world}", store)
                communicators[world] = tdccl.init(store=own, rank=rank, size=world, timeout=TIMEOUT)
            body = getattr(importlib.import_module(module), name)
            pipe.send((True, body(communicators[world], **arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
