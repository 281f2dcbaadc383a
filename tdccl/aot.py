"""Kernels compiled ahead of time: `python -m tdccl.aot build` writes a pack, without a GPU; `list` says what one holds.

A process that finds a pack (see `environment.packs`) loads from it what it has, and compiles the rest as ever.
"""

import argparse
import errno
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["TDCCL_EMULATE"] = "0"  # a process either interprets or compiles

import torch
import triton
from triton.backends.compiler import GPUTarget

from tdccl import environment
from tdccl.collectives import ALGORITHMS
from tdccl.decisions import ACROSS_NODES, context_for, rail_for, table_across, table_for
from tdccl.errors import InitError
from tdccl.language.team import MAX_RANKS
from tdccl.runtime import pack
from tdccl.runtime.algorithm import ITEMSIZE, Algorithm, Call, Context, Geometry, team_of
from tdccl.runtime.arrays import BITWISE, OPS, TRITON_NAMES
from tdccl.runtime.launch import Arguments, compile_kernel, identity
from tdccl.runtime.plan import choose
from tdccl.transport import Multicast
from tdccl.tuning import BESIDE_COMPUTATION, Table
from tdccl.tuning.table import package_files, read

_LARGEST = 4 << 30


class Job(NamedTuple):
    """A kernel to compile: that of an algorithm, laid out for `size` ranks on each of `nodes` nodes."""

    arch: str
    size: int
    collective: str
    algorithm: str
    geometry: Geometry
    op: str | None
    nodes: int = 1


def sizes() -> Iterator[int]:
    """Bytes, eight steps an octave: the length of a span takes whole numbers, not only powers of two."""
    for octave in range(_LARGEST.bit_length()):
        yield from (((8 + eighth) << octave) // 8 for eighth in range(8))


def calls(collective: str, dtype: str, op: str | None, size: int) -> Iterator[Call]:
    """Calls of every size, alignment and placement, as the communicator makes them: most share their kernel."""
    itemsize = ITEMSIZE[dtype]
    around = itertools.chain.from_iterable((nbytes // itemsize, nbytes // itemsize + 1) for nbytes in sizes())
    counts = sorted({count for count in around if 0 < count * itemsize <= _LARGEST})
    alignments = [alignment for alignment in (16, 8, 4, 2, 1) if alignment >= itemsize]
    if collective == "all_to_all_vdev":
        for alignment in alignments:
            on_device = (0, 0, alignment, alignment, alignment)
            yield Call(collective, 0, dtype, op, 0, alignment, None, (None, None), False, on_device)
        return
    placements = itertools.product((None, "symmetric"), repeat=2)
    for count, alignment, segments in itertools.product(counts, alignments, placements):
        yield Call(collective, count, dtype, op, 0, alignment, None, segments, False)
    if collective == "all_to_all":
        for alignment in alignments:
            yield Call(collective, 0, dtype, op, 0, alignment, (((alignment,) * size),) * 2, (None, None), False)


def key_of(algorithm: Algorithm, geometry: Geometry, op: str | None, context: Context) -> str:
    """The key under which a communicator will ask for the kernel of a call."""
    arguments = Arguments(algorithm.kernel, geometry, algorithm.symmetric, op, rail=rail_for(context, algorithm.pairs))
    return pack.key_of(identity(algorithm.kernel, arguments, team_of(context, "cuda"), geometry.warps))


def jobs(
    arch: str, size: int, collectives: list[str], dtypes: list[str], ops: list[str], multicast: bool, nodes: int = 1
) -> dict[str, Job]:
    """One job for each distinct kernel, by key: what any GPU's tuning table chooses, with multicast or without."""
    distinct: dict[str, Job] = {}
    caps = (None, BESIDE_COMPUTATION)  # direct, torch's groups
    contexts = [context_for(size, most_blocks, nodes=nodes) for most_blocks in caps]
    algorithms, tables = _algorithms(nodes), [table_across()] if nodes > 1 else _tables(size, multicast)
    collectives = [collective for collective in collectives if collective in algorithms]
    if multicast:
        contexts = [context._replace(multicast=Multicast("switch", "asked for")) for context in contexts]
    for context, table, collective in itertools.product(contexts, tables, collectives):
        for dtype, op in _kinds(collective, dtypes, ops):
            for call in calls(collective, dtype, op, size * nodes):
                if nodes > 1 and call.symmetric:
                    continue  # it has no kernel of its own there
                choice = choose(algorithms[collective], call, context, table)
                key = key_of(choice.algorithm, choice.geometry, op, context)
                job = Job(arch, size, collective, choice.algorithm.name, choice.geometry, op, nodes)
                distinct.setdefault(key, job)
    return distinct


def _algorithms(nodes: int) -> dict[str, list[Algorithm]]:
    return ACROSS_NODES if nodes > 1 else ALGORITHMS


def _tables(size: int, multicast: bool = False) -> list[Table]:
    """The measured tables for this number of ranks, and the one that is modelled for GPUs without."""
    measured = {made["gpu"] for made in map(read, package_files()) if made["world"] == size}
    return [table_for(gpu, size, multicast) for gpu in sorted(measured | {"another GPU"})]


def _kinds(collective: str, dtypes: list[str], ops: list[str]) -> list[tuple[str, str | None]]:
    """(dtype, op) of the calls of a collective; what only moves data moves bytes."""
    if "reduce" not in collective:
        return [("u8", None)]
    return [(dtype, op) for dtype, op in itertools.product(dtypes, ops) if "f" not in dtype or op not in BITWISE]


def warm(job: Job) -> None:
    """Compiles the kernel into Triton's cache, where a process finds it that compiles it again."""
    _compile(job)


def compile_job(job: Job) -> tuple[pack.Kernel, bytes]:
    """What a pack says of the kernel, and its machine code."""
    triton.knobs.compilation.disable_line_info = True  # it names the folders of this machine
    with tempfile.TemporaryDirectory() as triton.knobs.cache.dir:
        compiled = _compile(job)
    metadata, function = compiled.metadata, _algorithm(job).kernel.fn
    source = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    threads = metadata.num_warps * 32
    kernel = pack.Kernel(metadata.name, metadata.shared, threads, source, job.size, job.geometry.dtype, job.op)
    return kernel, compiled.asm["cubin"]


def _algorithm(job: Job) -> Algorithm:
    return next(a for a in _algorithms(job.nodes)[job.collective] if a.name == job.algorithm)


def _compile(job: Job):
    torch.set_num_threads(1)
    algorithm, geometry, context = _algorithm(job), job.geometry, context_for(job.size, nodes=job.nodes)
    arguments = Arguments(
        algorithm.kernel, geometry, algorithm.symmetric, job.op, rail=rail_for(context, algorithm.pairs)
    )
    target = GPUTarget("cuda", int(job.arch.removeprefix("sm_")), 32)
    return compile_kernel(algorithm.kernel, arguments, team_of(context, "cuda"), geometry.warps, target)


def _compile_item(item: tuple[str, Job]) -> tuple[str, str, tuple[pack.Kernel, bytes]]:
    key, job = item
    return job.arch, key, compile_job(job)


def write_pack(path: str, todo: list[tuple[str, Job]]) -> None:
    """Compiles jobs, each with its key, on all cores, and writes them into a pack."""
    started, sources = time.monotonic(), pack.source_digest()
    cores = min(len(todo), len(os.sched_getaffinity(0)))
    _say(f"compiling {len(todo)} kernels on {cores} cores")
    kernels = defaultdict(dict)
    # Not multiprocessing's Pool, which starts another process for one that the compiler has ended, and waits for ever.
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as workers:
        compiling = [workers.submit(_compile_item, item) for item in todo]
        try:
            for done, future in enumerate(as_completed(compiling), 1):
                arch, key, compiled = future.result()
                kernels[arch][key] = compiled
                if sys.stderr.isatty():
                    _say(f"\r{done} of {len(todo)}", end="\n" if done == len(todo) else "")
        except BrokenProcessPool as error:
            archs = ", ".join(sorted({job.arch for _, job in todo}))
            raise SystemExit(
                f"the compiler ended its process: does Triton {triton.__version__} know {archs}?"
            ) from error
    pack.write(path, sources, triton.__version__, kernels)
    mebibytes, seconds = os.path.getsize(path) / 2**20, time.monotonic() - started
    _say(f"{path}: {len(todo)} kernels, {mebibytes:.1f} MiB, in {seconds:.0f} s")


def build(options: argparse.Namespace) -> None:
    """Compiles what the options ask for, and writes the pack."""
    todo = [
        item
        for arch, size, nodes in itertools.product(options.arch, options.world, options.nodes)
        for item in jobs(arch, size, options.collective, options.dtype, options.op, options.multicast, nodes).items()
    ]
    write_pack(options.out, todo)


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def show(options: argparse.Namespace) -> None:
    """Prints where each pack is from, and how many kernels it has of each function, architecture and world."""
    for path in options.pack or environment.packs():
        try:
            opened = pack.Pack(path)
        except pack.UNREADABLE as error:
            raise SystemExit(f"{path} is no pack: {error}") from error
        fresh = "fresh" if opened.header["sources"] == pack.source_digest() else "stale: built from other sources"
        print(f"{path}: tdccl {opened.header['tdccl']}, triton {opened.header['triton']}, {fresh}")
        for arch in opened.archs:
            groups = defaultdict(list)
            for key in opened.keys(arch):
                kernel = opened.kernel(arch, key)
                groups[kernel.ranks, kernel.source].append(kernel)
            for (ranks, source), kernels in sorted(groups.items()):
                dtypes = " ".join(sorted({kernel.dtype for kernel in kernels}))
                ops = " ".join(sorted({kernel.op for kernel in kernels if kernel.op}))
                print(f"  {arch}, {ranks} ranks  {source:32} {len(kernels):4}  {dtypes}  {ops}".rstrip())


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tdccl.aot", description=__doc__)
    commands = parser.add_subparsers(required=True)
    builder = commands.add_parser("build", help="compile kernels into a pack; needs no GPU")
    builder.set_defaults(run=build)
    collectives, dtypes, ops = list(ALGORITHMS), sorted(set(TRITON_NAMES.values())), sorted(OPS)
    builder.add_argument("--arch", type=_archs, default=_own_arch(), help="as sm_90,sm_100 (default: %(default)s)")
    builder.add_argument("--world", type=_worlds, default="2,4,8", help="numbers of ranks (default: %(default)s)")
    builder.add_argument("--nodes", type=_numbers, default="1", help="of so many ranks each (default: %(default)s)")
    builder.add_argument("--collective", type=_some_of(collectives), default=collectives, help="default: all")
    builder.add_argument("--dtype", type=_some_of(dtypes), default="bf16,fp16,fp32", help="of reductions")
    builder.add_argument("--op", type=_some_of(ops), default="sum,avg,min,max", help="of reductions")
    builder.add_argument("--multicast", action="store_true", help="for hosts with NVLink multicast")
    builder.add_argument("--out", default=environment.default_pack(), help="default: %(default)s, where it is found")
    lister = commands.add_parser("list", help="say what packs hold")
    lister.set_defaults(run=show)
    lister.add_argument("pack", nargs="*", help="default: those that a process would find here")
    options = parser.parse_args(words)
    if options.run is build:
        try:
            _check_writable(options.out)
        except OSError as error:
            builder.error(f"--out is {options.out}: {error.strerror}")
    try:
        options.run(options)
    except InitError as error:  # NVSHMEM's bitcode is missing or of no use, or TDCCL_SCRATCH_MB too little
        raise SystemExit(str(error)) from error


def _check_writable(path: str) -> None:
    """Raises OSError where no pack can be written, before minutes go by."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "a folder, expected a file in it")


def _some_of(known: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        words = text.split(",")
        if unknown := set(words) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {','.join(known)}")
        return words

    return parse


def _archs(text: str) -> list[str]:
    words = text.split(",")
    if not all(re.fullmatch(r"sm_\d+", word) for word in words):
        raise argparse.ArgumentTypeError(f"{text}: expected architectures like sm_90,sm_100")
    return words


def _worlds(text: str) -> list[int]:
    return [int(word) for word in _some_of([str(size) for size in range(1, MAX_RANKS.value + 1)])(text)]


def _numbers(text: str) -> list[int]:
    if not all(word.isdigit() and int(word) for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers like 1,2")
    return [int(word) for word in text.split(",")]


def _own_arch() -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "sm_90"


if __name__ == "__main__":
    main(sys.argv[1:])
