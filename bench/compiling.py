"""Compiles kernels on all cores of a host at once, into Triton's cache, where the ranks find them."""

import multiprocessing
import os
import time
from collections.abc import Callable

import torch

from bench.collectives import Case
from tdccl import aot
from tdccl.runtime.algorithm import Call
from tdccl.runtime.arrays import TRITON_NAMES


def call_of(case: Case, symmetric: bool = False) -> Call:
    """The case as a communicator plans it, on plain or on symmetric memory."""
    dtype, count = TRITON_NAMES[case.dtype], case.count
    if case.op is None:
        dtype, count = "u8", count * case.dtype.itemsize
    segments = ("symmetric",) * 2 if symmetric else (None, None)
    return Call(case.collective.name, count, dtype, case.op, max(0, case.root), 16, None, segments, case.in_place)


def compile_all(jobs: list[aot.Job]) -> str:
    """Compiles the kernels; returns how long it took, in words."""
    start = time.monotonic()
    on_all_cores(aot.warm, [(job,) for job in jobs])
    return f"{len(jobs)} kernels compiled in {time.monotonic() - start:.0f} s"


def on_all_cores(compile_one: Callable, jobs: list[tuple]) -> None:
    """Calls compile_one(*job) for each job, in processes of their own; they need no GPU."""
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count()), _begin) as workers:
        workers.starmap(compile_one, jobs, chunksize=1)


def _begin() -> None:
    os.sched_setaffinity(0, range(os.cpu_count()))  # mpirun may have bound this rank to one core
    torch.set_num_threads(1)
