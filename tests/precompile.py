"""A pack of the kernels that the suite launches on GPUs, compiled on all cores at once.

Without it every rank would compile each kernel by itself, one after another.
"""

import itertools

import cases
import torch

from tdccl import aot, tuning
from tdccl.collectives import ALGORITHMS
from tdccl.decisions import table_for
from tdccl.runtime.algorithm import Call
from tdccl.runtime.arrays import TRITON_NAMES
from tdccl.runtime.plan import choose


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


def write_pack(path: str, worlds: set[int], gpus: int) -> None:
    """Compiles each distinct kernel of `test_collectives` once, for these numbers of ranks on so many GPUs."""
    gpu, arch, multiprocessors = "NVIDIA H200", "sm_90", 132
    if torch.cuda.is_available():
        gpu, arch = torch.cuda.get_device_name(), "sm_{}{}".format(*torch.cuda.get_device_capability())
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    jobs = {}
    for size, (collective, algorithms) in itertools.product(sorted(worlds), ALGORITHMS.items()):
        sharing = -(-size // gpus)
        context, table = aot.context_for(size, min(tuning.GPU.rings, multiprocessors // sharing)), table_for(gpu, size)
        for algorithm in algorithms if collective in {*cases.REDUCTIONS, *cases.MOVEMENTS} else ():
            if algorithm.multimem is not None:
                continue  # what the twins need is compiled as they are called
            if collective == "broadcast" and size == 1:
                continue  # nothing is launched
            for call in _calls(collective, algorithm, size):
                geometry = choose(algorithms, call, context, table, algorithm.name).geometry
                key = aot.key_of(algorithm, geometry, call.op, context)
                jobs.setdefault(key, aot.Job(arch, size, collective, algorithm.name, geometry, call.op))
    aot.write_pack(path, list(jobs.items()))
