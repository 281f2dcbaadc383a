"""Measures a table of products' tiles for a kind of GPU: `python -m tdccl.tune products`, on one, without a launcher.

Operators of a communicator of one rank launch their products alone: these are timed in CUDA graphs, for each size and
layout of the right operand in each shape worth a try, beside torch.mm, and torch's grouped product for mixtures of
experts. Every result is compared with torch's first.
"""

import argparse
import importlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

import tdccl
from tdccl import environment
from tdccl.errors import InitError
from tdccl.overlap import (
    all_gather_gemm,
    all_gather_grouped_gemm,
    gemm_all_reduce,
    gemm_reduce_scatter,
    grouped_gemm_reduce_scatter,
    route,
)
from tdccl.overlap.gemm import shape_for
from tdccl.overlap.gemm_all_reduce import FEW_ROWS, shape_of_few
from tdccl.overlap.grouped import shape_of_tiles
from tdccl.overlap.routing import Sizes, height_of
from tdccl.runtime.launch import keyed
from tdccl.timing import HostClock, clock_for
from tdccl.transport.bootstrap import StoreBootstrap, discover
from tdccl.tuning import Products, Shape
from tdccl.tuning.products import Row, shared_bytes
from tdccl.tuning.table import dumped

_DENSE = {call.__name__: call for call in (all_gather_gemm, gemm_reduce_scatter, gemm_all_reduce)}
_GROUPED = {call.__name__: call for call in (all_gather_grouped_gemm, grouped_gemm_reduce_scatter)}
OPERATORS = _DENSE | _GROUPED
# (intermediate, hidden) of the MLPs of decoders: 7B, 8B, 70B, 72B, 405B.
_MLPS = [(11008, 4096), (14336, 4096), (28672, 8192), (29568, 8192), (53248, 16384)]
_SHARDS = (2, 4)  # ranks among which the intermediate size is divided
_TOKENS = 8192
_FEW_TOKENS = (1, 16, 32, 64, 128, 256)
_FEW_OF = (28672, 8192)
# Those of experts, of which each token takes some: Qwen3 30B, 235B. What else they have does not matter much to tiles.
_EXPERT_MLPS = [(768, 2048), (1536, 4096)]
_EXPERTS, _TOP_K = (4, 2) if environment.emulated() else (128, 8)
# Of steps in flight a block gets this much shared memory, so that every operator's kernel has room for the rest.
_IN_FLIGHT = 200 << 10
_GROUPS = (4, 8, 16)
# A shape has to beat the rule's, and a cut the rule's cut, by this much, so that tables are of what matters.
_WORTH = 0.99
# Those that come so close to the fastest are measured again, in turns.
_CLOSE = 1.05
_SWEEPS, _ROUNDS = (1, 1) if environment.emulated() else (2, 5)  # over all shapes, and then over those
_TOLERANCE = 0.03
_LARGEST = 1 << 31  # kernels count rows, columns and depth in 32 bits


class Task(NamedTuple):
    """One product by one operator; see `tuning.products.Row` for the sizes."""

    kind: str
    operator: str
    rows: int
    columns: int
    depth: int
    transposed: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.rows, self.columns, self.depth

    def row(self, shape: Shape) -> Row:
        return Row(self.kind, *self.sizes, self.transposed, shape)

    @property
    def tokens(self) -> int:
        """Of a grouped product, of whose rows an expert has self.rows on average."""
        return self.rows * _EXPERTS // _TOP_K

    def rule(self) -> Shape:
        if self.kind == "grouped":
            height = height_of(1, Sizes(self.tokens, self.tokens, _TOP_K, _EXPERTS, 0))
            return shape_of_tiles(height, self.columns, True)
        return (shape_of_few if self.kind == "few" else shape_for)(self.rows, self.columns, True)

    def __str__(self) -> str:
        layout = "columns of b contiguous" if self.transposed else "rows of b contiguous"
        return f"{self.operator:28}{' x '.join(map(str, self.sizes)):22}{layout:25}"


def tasks(sizes: list[tuple[str, int, int, int]]) -> list[Task]:
    """Those sizes by those operators, in both layouts; each once."""
    found: dict[tuple, Task] = {}
    for (operator, *numbers), transposed in itertools.product(sizes, (False, True)):
        kind = "few" if operator == "gemm_all_reduce" and numbers[0] <= FEW_ROWS else "many"
        if operator in _GROUPED:
            kind = "grouped"
        if kind != "grouped" or transposed or numbers[2] % 64 == 0:  # else descriptors cannot load b
            found.setdefault((kind, *numbers, transposed), Task(kind, operator, *numbers, transposed))
    return list(found.values())


def usual_sizes() -> Iterator[tuple[str, int, int, int]]:
    """Both products of the MLPs of decoders, tensor parallel, of many tokens; the second of one with few; both of
    experts, whole and in two parts."""
    if environment.emulated():
        yield from zip(OPERATORS, (40, 40, 5, 10, 10), (64, 32, 64, 64, 32), (32, 64, 64, 32, 64))
        return
    for (intermediate, hidden), shards in itertools.product(_MLPS, _SHARDS):
        yield "all_gather_gemm", _TOKENS, intermediate // shards, hidden
        yield "gemm_reduce_scatter", _TOKENS, hidden, intermediate // shards
    intermediate, hidden = _FEW_OF
    for shards, tokens in itertools.product(_SHARDS, _FEW_TOKENS):
        yield "gemm_all_reduce", tokens, hidden, intermediate // shards
    for (intermediate, hidden), shards in itertools.product(_EXPERT_MLPS, (1, 2)):
        rows = _TOKENS * _TOP_K // _EXPERTS
        yield "all_gather_grouped_gemm", rows, 2 * intermediate // shards, hidden
        yield "grouped_gemm_reduce_scatter", rows, hidden, intermediate // shards


def shapes(task: Task) -> list[Shape]:
    """What is tried, the rule's first. Tiles are as high as the rule's everywhere.

    Left out is what was found to spill registers on sm_90, in Triton 3.6, in a kernel of any of the operators.
    """
    rule = task.rule()
    if environment.emulated():
        return [rule, rule._replace(columns=16, group=3), rule._replace(depth=16)]
    found = {"many": _shapes_of_many, "few": _shapes_of_few, "grouped": _shapes_of_grouped}[task.kind](rule.rows)
    fitting = [shape for shape in found if shape.columns < 2 * task.columns and shared_bytes(shape) <= _IN_FLIGHT]
    return list(dict.fromkeys([rule, *fitting]))


def _shapes_of_many(height: int) -> Iterator[Shape]:
    if height == 128:
        wide = [(64, 3, 8), (64, 4, 8), (64, 4, 16), (128, 2, 8)]
        narrow = [(64, 4, 4), (64, 4, 8), (64, 6, 8), (128, 3, 8)]
    else:
        wide = [(64, 4, 8), (64, 5, 8)]
        narrow = [(64, 6, 4), (64, 8, 4), (128, 4, 4)]
    for columns, tried in ((256, wide), (128, narrow)):
        for (depth, stages, warps), group in itertools.product(tried, _GROUPS):
            yield Shape(height, columns, depth, stages, warps, group)


def _shapes_of_few(height: int) -> Iterator[Shape]:
    for columns, depth in itertools.product((32, 64, 128), (64, 128, 256)):
        if (height, columns, depth) == (16, 64, 256):
            continue
        most = min(8, _IN_FLIGHT // ((height + columns) * depth * 2))
        for stages, warps in itertools.product({most, most * 2 // 3}, (4, 8)):
            slim = height * columns < 128 * 128  # else 4 warps run out of registers
            if stages >= 3 and (slim if warps == 4 else height * columns >= 64 * 128):
                yield Shape(height, columns, depth, stages, warps, 8)


def _shapes_of_grouped(height: int) -> Iterator[Shape]:
    tried = [(256, 3, 8), (256, 4, 8), (128, 3, 4), (128, 4, 4), (128, 4, 8), (128, 6, 8)]
    if height == 64:
        tried = [(256, 3, 4), (256, 4, 4), (256, 4, 8), (128, 4, 4), (128, 6, 4), (128, 8, 4)]
    for columns, stages, warps in tried:
        yield Shape(height, columns, 64, stages, warps, 1)


class Measured(NamedTuple):
    """What one task takes in microseconds: by torch, and in each shape, the rule's first."""

    task: Task
    torch_us: float
    times: dict[Shape, float]

    @property
    def rule_us(self) -> float:
        return next(iter(self.times.values()))


class Problem:
    """Operands of a task, as many as do not fit into the L2 cache together; calls take them in turns."""

    def __init__(self, comm: tdccl.Communicator, task: Task, blank: bool = False):
        """blank: of any content."""
        self._comm, self._task = comm, task
        make = self._blank if blank else self._random
        nbytes = 2 * (task.rows * task.depth + task.depth * task.columns + task.rows * task.columns) * self._products()
        count = 1 if blank or environment.emulated() else math.ceil(4 * _cache_bytes(comm.device) / nbytes)
        self._operands = [(make(*self._sizes_of_left()), self._right(make)) for _ in range(count)]
        self.out, self.expected = self._blank(*self._sizes_of_out()), self._blank(*self._sizes_of_out())
        if not blank:
            self.by_torch()()
            self._scale = self.expected.float().std()

    def _products(self) -> int:
        return 1

    def _sizes_of_left(self) -> tuple[int, int]:
        return self._task.rows, self._task.depth

    def _sizes_of_out(self) -> tuple[int, int]:
        return self._task.rows, self._task.columns

    def _right(self, make: Callable) -> torch.Tensor:
        _, columns, depth = self._task.sizes
        return make(columns, depth).t() if self._task.transposed else make(depth, columns)

    def _random(self, *sizes: int) -> torch.Tensor:
        return self._blank(*sizes).normal_(std=0.05)

    def _blank(self, *sizes: int) -> torch.Tensor:
        return torch.empty(sizes, device=self._comm.device, dtype=torch.bfloat16)

    def _multiply(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """By torch, into `expected`."""
        torch.mm(a, b, out=self.expected)

    def _call(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """By the operator, into `out`."""
        _DENSE[self._task.operator](self._comm, a, b, self.out)

    def by_torch(self) -> Callable[[], None]:
        """A call of torch's product on the next operands."""
        operands = itertools.cycle(self._operands)
        return lambda: self._multiply(*next(operands))

    def by(self, shape: Shape) -> Callable[[], None]:
        """A call of the operator in that shape on the next operands."""
        operands = itertools.cycle(self._operands)
        tried = Products("tried", (self._task.row(shape),))

        def call():
            self._comm.use_products(tried)
            self._call(*next(operands))

        return call

    def wrong(self, shape: Shape) -> int:
        """How many elements of the result in that shape are not torch's, but for rounding; before `by_torch` has been
        called for other operands."""
        self.out.fill_(math.nan)
        self.by(shape)()
        apart = (self.out - self.expected).abs()
        return int((~(apart <= _TOLERANCE * (self.expected.abs() + self._scale))).sum())


class GroupedProblem(Problem):
    """Those of a mixture of experts of which every token takes some at random."""

    def __init__(self, comm: tdccl.Communicator, task: Task, blank: bool = False):
        self._first = task.operator == "all_gather_grouped_gemm"
        idx = torch.rand(task.tokens, _EXPERTS, device=comm.device).topk(_TOP_K, dim=1).indices
        self._routing = route(comm, idx, experts=_EXPERTS)
        self._ends = self._routing.offsets[1:].contiguous()
        self._token_of_row = self._routing.source // _TOP_K
        self._row_of_entry = self._routing.tables.position.flatten()
        super().__init__(comm, task, blank)

    def _products(self) -> int:
        return _EXPERTS

    def _sizes_of_left(self) -> tuple[int, int]:
        return (self._task.tokens if self._first else self._routing.rows), self._task.depth

    def _sizes_of_out(self) -> tuple[int, int]:
        return (self._routing.rows if self._first else self._task.tokens), self._task.columns

    def _right(self, make: Callable) -> torch.Tensor:
        _, columns, depth = self._task.sizes
        if self._task.transposed:
            return make(_EXPERTS, columns, depth).transpose(1, 2)
        return make(_EXPERTS, depth, columns)

    def _multiply(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if self._first:
            self.expected = torch._grouped_mm(a.index_select(0, self._token_of_row), b, offs=self._ends)
            return
        rows = torch._grouped_mm(a, b, offs=self._ends).index_select(0, self._row_of_entry)
        torch.sum(rows.view(-1, _TOP_K, self._task.columns), 1, out=self.expected)

    def _call(self, a: torch.Tensor, b: torch.Tensor) -> None:
        _GROUPED[self._task.operator](a, b, self._routing, self.out)


def problem_of(comm: tdccl.Communicator, task: Task, blank: bool = False) -> Problem:
    """The task's operands."""
    return (GroupedProblem if task.kind == "grouped" else Problem)(comm, task, blank)


def right(problem: Problem, task: Task, tried: list[Shape]) -> list[Shape]:
    """The shapes in which the result is right; says which others there are. Raises RuntimeError if it is the first, by
    which operators multiply already."""
    wrong = {shape: count for shape in tried if (count := problem.wrong(shape))}
    for shape, count in wrong.items():
        print(f"{task}{shape} is left out: {count} of {problem.out.numel()} elements are wrong", flush=True)
    if tried[0] in wrong:
        raise RuntimeError(f"{task}{tried[0]}: {wrong[tried[0]]} of {problem.out.numel()} elements are wrong")
    return [shape for shape in tried if shape not in wrong]


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


class Tuner:
    """Measures tasks one after another, on one GPU."""

    def __init__(self, comm: tdccl.Communicator, bootstrap):
        self._comm = comm
        self._clock: HostClock = clock_for(comm, bootstrap, graph=True)

    def measure(self, task: Task, tried: list[Shape]) -> Measured:
        """Times of torch and of all shapes whose result is right; of those that are close to the fastest the median of
        several, in turns, so that all meet the GPU as warm and at the same clocks."""
        problem = problem_of(self._comm, task)
        tried = right(problem, task, tried)
        calls = self._calls(problem)
        torch_run = self._clock.repeated(problem.by_torch(), calls)
        runs = {shape: self._clock.repeated(problem.by(shape), calls) for shape in tried}
        for run in (torch_run, *runs.values()):
            run()  # the first replay of a graph also uploads it
        sweeps = [{shape: self._clock.microseconds(run) for shape, run in runs.items()} for _ in range(_SWEEPS)]
        once = {shape: min(sweep[shape] for sweep in sweeps) for shape in tried}
        close = [shape for shape in tried if shape == tried[0] or once[shape] <= _CLOSE * min(once.values())]
        turns = [[self._clock.microseconds(run) for run in (torch_run, *map(runs.get, close))] for _ in range(_ROUNDS)]
        by_torch, *medians = (statistics.median(times) / calls for times in zip(*turns))
        times = {shape: time / calls for shape, time in once.items()} | dict(zip(close, medians))
        return Measured(task, by_torch, {shape: times[shape] for shape in tried})

    def _calls(self, problem: Problem) -> int:
        """As many as take some milliseconds, two at least."""
        if environment.emulated():
            return 1
        run = self._clock.repeated(problem.by_torch(), 2)
        run()
        return int(min(50, max(2, 3000 / (self._clock.microseconds(run) / 2))))

    def compile(self, everything: dict[Task, list[Shape]], log: Callable) -> dict[Task, list[Shape]]:
        """Compiles the kernels of all tasks on all cores; returns the shapes that fit into shared memory."""
        if environment.emulated():
            return everything
        wanted = self._kernels(everything)
        distinct = list({job.key: job for jobs in wanted.values() for job in jobs}.values())
        cores = min(len(distinct), len(os.sched_getaffinity(0)))
        with multiprocessing.get_context("spawn").Pool(cores) as workers:
            taken = dict(zip((job.key for job in distinct), workers.map(warm, distinct, chunksize=1)))
        limit = triton.runtime.driver.active.utils.get_device_properties(self._comm.device.index)["max_shared_mem"]
        log(f"compiled {len(distinct)} kernels on {cores} cores")
        fitting: dict[Task, list[Shape]] = {task: [] for task in everything}
        for (task, shape), jobs in wanted.items():
            most = max(taken[job.key] for job in jobs)
            if most <= limit:
                fitting[task].append(shape)
            else:
                log(f"{task}{shape} is left out: {most} bytes of shared memory, infinite if it does not compile")
        return fitting

    def _kernels(self, everything: dict[Task, list[Shape]]) -> dict[tuple[Task, Shape], list["Job"]]:
        """What each shape of each task has to be compiled: the operators are called, and launch nothing."""
        wanted: dict[tuple[Task, Shape], list[Job]] = {}
        for collecting in (False, True):  # first all workspaces grow: kernels depend on how large they are
            for task, tried in everything.items():
                problem = problem_of(self._comm, task, blank=True)
                for shape in tried:
                    jobs = wanted.setdefault((task, shape), [])
                    with triton.knobs.runtime.scope():
                        triton.knobs.runtime.jit_cache_hook = _collector(jobs if collecting else [])
                        problem.by(shape)()
        return wanted


class Job(NamedTuple):
    """A kernel to compile: its place, and what Triton was about to compile it for."""

    key: str
    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[tuple, Any]
    attributes: dict[tuple, Any]
    options: dict[str, Any]
    capability: int


def _collector(jobs: list[Job]) -> Callable[..., bool]:
    """A hook of Triton's that puts the kernels it was about to compile into `jobs`, and has it launch none."""

    def collect(*, key, fn, compile, **_) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        constants, attributes = compile["constants"], compile["configs"][0]
        key = f"{fn.module}.{fn.name} {key}"
        capability = triton.runtime.driver.active.get_current_target().arch
        jobs.append(Job(key, fn.module, fn.name, compile["signature"], constants, attributes, options, capability))
        return True

    return collect


def warm(job: Job) -> float:
    """Compiles the kernel into Triton's cache, where the tuner finds it; returns how many bytes of shared memory it
    takes, infinite if it does not compile."""
    torch.set_num_threads(1)
    kernel = keyed(getattr(importlib.import_module(job.module), job.name))
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    try:
        return triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=job.options).metadata.shared
    except (RuntimeError, TritonError):  # the compiler's, and ptxas's
        return math.inf


def rows_of(layouts: list[Measured]) -> list[Row]:
    """The rows of one size in one layout or two. Both get tiles of the same columns and groups, the best for both."""

    def best(found: Measured, cut: tuple) -> Shape:
        """The fastest of a cut, or the rule's shape where that is as good."""
        rule, *_ = found.times
        times = {shape: time for shape, time in found.times.items() if found.task.row(shape).cut == cut}
        fastest = min(times, key=times.get)
        return rule if rule in times and times[fastest] > _WORTH * times[rule] else fastest

    def time(cut: tuple) -> float:
        return math.prod(found.times[best(found, cut)] / found.rule_us for found in layouts) ** (1 / len(layouts))

    cuts = [dict.fromkeys(found.task.row(shape).cut for shape in found.times) for found in layouts]
    common = [cut for cut in cuts[0] if all(cut in others for others in cuts)]
    by_rule, fastest = common[0], min(common, key=time)
    cut = fastest if time(fastest) < _WORTH * time(by_rule) else by_rule
    return [found.task.row(best(found, cut)) for found in layouts]


def main(arguments: list[str]) -> None:
    """Measures, says for each size what was found, and writes the table; under a launcher rank 0 does so alone."""
    options = _parse(arguments)
    if _rank() != 0:
        return
    store = dist.HashStore()
    comm = tdccl.init(store=store, rank=0, size=1)
    bootstrap = StoreBootstrap(dist.PrefixStore("tune", store), 0, 1, comm.timeout)
    tuner = Tuner(comm, bootstrap)
    wanted = tasks(options.shapes or list(usual_sizes()))
    everything = tuner.compile({task: shapes(task) for task in wanted}, lambda said: print(said, flush=True))
    listed = []
    for _, layouts in itertools.groupby(wanted, lambda task: (task.kind, task.sizes)):
        found = [tuner.measure(task, everything[task]) for task in layouts]
        for measured, row in zip(found, rows_of(found)):
            print(_line(measured, row.shape), flush=True)
            listed.append(_listed(measured, row))
    output = options.output or Path(f"{comm.gpu.replace(' ', '-')}-products.json")
    output.write_text(_dumped(comm, listed, arguments))
    print(f"wrote {output}; use it by TDCCL_TUNING={output}")
    comm.destroy()


def _rank() -> int:
    """This rank's number, 0 without a launcher."""
    try:
        return discover().rank
    except InitError:
        return 0


def _line(measured: Measured, shape: Shape) -> str:
    """What was found for one task: times, and how fast they are beside torch's."""
    task, by_torch, times = measured
    ways = [("rule", measured.rule_us), ("table", times[shape])]
    said = "".join(f"  {way} {time:.1f} us ({by_torch / time:.1%})" for way, time in ways)
    rows, columns, depth, stages, warps, group = shape
    tiles = f"{rows} x {columns} x {depth}, {stages} stages, {warps} warps, groups of {group}"
    return f"{task}torch {by_torch:.1f} us{said}  {tiles}"


def _listed(measured: Measured, row: Row) -> dict[str, Any]:
    """A row as it stands in a table, with what was measured."""
    times = {"torch_us": measured.torch_us, "rule_us": measured.rule_us, "us": measured.times[row.shape]}
    times = {name: float(f"{time:.5g}") for name, time in times.items()}
    return {**row._asdict(), "shape": row.shape._asdict(), "operator": measured.task.operator, **times}


def _dumped(comm: tdccl.Communicator, listed: list[dict[str, Any]], arguments: list[str]) -> str:
    """The table as JSON, a row a line."""
    made = {
        "gpu": comm.gpu,
        "versions": {"tdccl": tdccl.__version__, "torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m tdccl.tune products", *(Path(each).name for each in arguments)]),
        "products": listed,
    }
    return dumped(made)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tdccl.tune products", description=__doc__.partition(":")[0])
    parser.add_argument(
        "--shapes", nargs="+", type=_sizes, default=[], metavar="[OPERATOR:]M,N,K",
        help=f"products of [M, K] and [K, N], on a rank, by one of {', '.join(OPERATORS)}; M is, of grouped ones, how "
        "many rows an expert has on average; default: those of the MLPs of decoders",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: named by the kind of GPU")
    options = parser.parse_args(arguments)
    if options.output is not None and (options.output.is_dir() or not options.output.absolute().parent.is_dir()):
        parser.error(f"argument -o: {options.output} is expected to be a file in a folder that there is")
    return options


def _sizes(text: str) -> tuple[str, int, int, int]:
    operator, _, numbers = text.rpartition(":")
    sizes = [int(number) if number.isdecimal() else 0 for number in numbers.split(",")]
    if len(sizes) != 3 or not 0 < min(sizes) <= max(sizes) < _LARGEST or operator not in ("", *OPERATORS):
        before = f"one of {', '.join(OPERATORS)} and a colon if not as usual"
        raise argparse.ArgumentTypeError(f"{text!r}: expected M,N,K from 1 to {_LARGEST - 1}, after {before}")
    if any(size % 8 for size in sizes[1:]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected N and K that 8 divides, for others take the rule's tiles")
    return operator or ("gemm_all_reduce" if sizes[0] <= FEW_ROWS else "all_gather_gemm"), *sizes
