"""Compiles kernels on all cores of a host at once, into Triton's cache, where the ranks find them."""

import multiprocessing
import os
from collections.abc import Callable

import torch


def on_all_cores(compile_one: Callable, jobs: list[tuple]) -> None:
    """Calls compile_one(*job) for each job, in processes of their own; they need no GPU."""
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count()), _begin) as workers:
        workers.starmap(compile_one, jobs, chunksize=1)


def _begin() -> None:
    os.sched_setaffinity(0, range(os.cpu_count()))  # mpirun may have bound this rank to one core
    torch.set_num_threads(1)
