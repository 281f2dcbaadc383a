"""Fills Triton's cache with the kernels that the suite launches on GPUs, on all cores at once.

Without it every rank would compile each kernel by itself, one after another.
"""

import itertools
import multiprocessing
import os

import cases
import pool
import torch
from variants import arguments_of, compile_call, context_of

from tdccl import environment
from tdccl.collectives import ALGORITHMS
from tdccl.runtime.algorithm import Call
from tdccl.runtime.arrays import TRITON_NAMES


def _calls(collective: str, algorithm, size: int):
    """The calls that `test_collectives` makes by one algorithm, with every alignment."""
    segments = tuple(name in algorithm.symmetric or None for name in ("send", "recv"))  # placeholders
    reduces = collective in cases.REDUCTIONS
    for dtype in cases.REDUCED if reduces else cases.MOVED:
        for count, op in itertools.product(
            cases.counts_of(dtype, algorithm.name), cases.ops_of(dtype) if reduces else [None]
        ):
            if not count or (op != cases.ops_of(dtype)[0] and count not in cases.few_counts(dtype)):
                continue
            name, count = (TRITON_NAMES[dtype], count) if reduces else ("u8", count * dtype.itemsize)
            for alignment in (16, dtype.itemsize, 2 * dtype.itemsize, 4 * dtype.itemsize):
                yield Call(collective, count, name, op, 0, min(16, alignment), None, segments, False)


def everything() -> None:
    """Compiles each distinct kernel of `test_collectives` once, for every world."""
    tasks = {}
    for size, (collective, algorithms) in itertools.product(range(1, pool.LARGEST_WORLD + 1), ALGORITHMS.items()):
        context = context_of(size, environment.scratch_bytes())
        for algorithm in algorithms if collective not in ("barrier", "all_to_all_vdev", "reduce", "send_recv") else ():
            if collective == "broadcast" and size == 1:
                continue  # nothing is launched
            for call in _calls(collective, algorithm, size):
                key = arguments_of(algorithm, call, context)[1].key()
                tasks.setdefault((size, algorithm.kernel.fn.__module__, algorithm.name, key), (collective, call))
    jobs = [(collective, name, call, size) for (size, _, name, _), (collective, call) in tasks.items()]
    print(f"compiling {len(jobs)} kernels on {os.cpu_count()} cores", flush=True)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as workers:
        workers.starmap(_compile, jobs, chunksize=4)


def _compile(collective: str, name: str, call: Call, size: int) -> None:
    import triton

    torch.set_num_threads(1)
    (algorithm,) = (algorithm for algorithm in ALGORITHMS[collective] if algorithm.name == name)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compile_call(algorithm, call, context_of(size, environment.scratch_bytes()), target)
