"""torch.distributed on tdccl and its peers, in turns in one process: host time of a call, memory of groups, training
steps of a GPT.

torchrun --nproc-per-node 4 -m bench.torch_backend --vs nccl -J FILE
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from bench import reading
from bench.output import describe, given
from examples.gpt import GPT, VOCABULARY
from tdccl import environment, torch_entry
from tdccl.runtime import bare

MODES = ("DDP", "FSDP2")
# GPT-2's largest, 1.5 billion parameters; in emulation a toy.
_GPU = {"layers": 48, "width": 1600, "heads": 25, "context": 1024, "steps": 8, "calls": 400}
_EMULATION = {"layers": 2, "width": 32, "heads": 4, "context": 16, "steps": 1, "calls": 3}
_KERNELS = tuple(
    algorithm.kernel.fn.__name__ for rows in bare.read("tdccl.collectives").ALGORITHMS.values() for algorithm in rows
)


class Figures:
    """What was measured, a row a backend: {"what", "impl", "value", "unit"}; the slowest rank's value counts."""

    def __init__(self, device: torch.device):
        self._device = device
        self.rows: list[dict] = []

    def add(self, what: str, backend: str, value: float, unit: str) -> None:
        slowest = torch.tensor([value], dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        value = float(f"{slowest.item():.4g}")
        self.rows.append({"what": what, "impl": backend, "value": value, "unit": unit})
        if dist.get_rank() == 0:
            print(f"{what:50} {backend:12} {value:9.2f} {unit}", flush=True)


def main() -> None:
    options = _options()
    device = _device()
    torch_entry.register()
    environment.forbid_multicast_to_others()
    dist.init_process_group("tdccl")
    figures = Figures(device)
    groups = {"tdccl": dist.group.WORLD}
    groups |= {backend: dist.new_group(backend=backend) for backend in filter(None, options.vs.split(","))}
    if device.type == "cuda":
        for backend, group in groups.items():
            memory(figures, backend, group, device)
    host_time(figures, groups, device, options.calls)
    for mode in MODES:
        training(figures, groups, mode, device, options)
    if options.json and dist.get_rank() == 0:
        report = describe(dist.get_world_size(), device, options.command)
        options.json.write_text(json.dumps({**report, "rows": [], "figures": figures.rows}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def memory(figures: Figures, backend: str, group: dist.ProcessGroup, device: torch.device) -> None:
    """Device memory that a group takes once it is used, and then ten more groups of all ranks."""
    x, gathered = torch.ones(1 << 20, device=device), torch.ones(dist.get_world_size() << 20, device=device)

    def use(group):
        dist.all_reduce(x, group=group)
        dist.all_gather_into_tensor(gathered, x, group=group)
        torch.cuda.synchronize()

    def taken():
        free, _ = torch.cuda.mem_get_info(device)
        return -free / 2**20

    before = taken()
    use(group)
    whole = taken()
    more = [dist.new_group(backend=backend) for _ in range(10)]
    for each in more:
        use(each)
    parts = taken()
    figures.add("memory of a group", backend, whole - before, "MiB")
    figures.add("memory of ten more groups", backend, parts - whole, "MiB")
    for each in more:
        dist.destroy_process_group(each)


def host_time(figures: Figures, groups: dict[str, dist.ProcessGroup], device: torch.device, calls: int) -> None:
    """How long a call keeps the host, which does not wait for the device: synchronous ones, and asynchronous ones with
    their wait()."""
    for count, asynchronous in itertools.product((512, 32768), (False, True)):
        x = torch.ones(count, dtype=torch.bfloat16, device=device)
        larger = torch.ones(count * dist.get_world_size(), dtype=torch.bfloat16, device=device)
        kind = "asynchronous " if asynchronous else ""
        for name, arguments in {
            "all_reduce": (x, dist.ReduceOp.MAX),
            "all_gather_into_tensor": (larger, x),
            "reduce_scatter_tensor": (x, larger, dist.ReduceOp.MAX),
        }.items():
            call = functools.partial(getattr(dist, name), *arguments, async_op=asynchronous)
            series = {
                backend: functools.partial(_series, functools.partial(call, group=group), calls)
                for backend, group in groups.items()
            }
            for backend, value in _in_turns(series, 5).items():
                what = f"host time of {kind}dist.{name}, {reading.size(x.nbytes)}"
                figures.add(what, backend, value / calls * 1e6, "us")


def _series(call: Callable, calls: int) -> None:
    for _ in range(calls):
        work = call()
        if work is not None:
            work.wait()


def _in_turns(runs: dict[str, Callable], times: int, warmup: int = 1) -> dict[str, float]:
    """The median seconds of each run on this rank, begun together; in turns, because a host's speed drifts."""
    seconds = {name: [] for name in runs}
    for turn in range(warmup + times):
        for name in runs if turn % 2 else reversed(runs):
            dist.barrier()
            _synchronize()
            started = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(listed[warmup:]) for name, listed in seconds.items()}


def training(
    figures: Figures, groups: dict[str, dist.ProcessGroup], mode: str, device: torch.device, options: argparse.Namespace
) -> None:
    """Steps of a GPT in bfloat16 on random tokens, with as many sequences a rank as `--sequences` lists."""
    parallel = _sharded if mode == "FSDP2" else _replicated
    steps = {backend: _step(parallel(_model(device, options), backend, group)) for backend, group in groups.items()}
    for sequences in map(int, options.sequences.split(",")):
        tokens = torch.randint(VOCABULARY, (sequences, options.context), device=device)
        what = f"{mode} step, {sequences} x {options.context} tokens a rank"

        def timed(chosen, tokens=tokens):
            runs = {backend: functools.partial(_until_idle, steps[backend], tokens) for backend in chosen}
            return _in_turns(runs, options.steps, warmup=3)

        for backend, seconds in timed(groups).items():
            figures.add(what, backend, 1e3 * seconds, "ms")
        if options.trace:
            for backend in groups:
                path = options.trace / f"{backend}-{mode}-{sequences}-{dist.get_rank()}.json"
                _add_hidden(figures, what, backend, _traced(functools.partial(steps[backend], tokens), path))
        communicator = groups["tdccl"].communicator
        own = communicator.max_blocks
        for cap in options.max_blocks:
            communicator.limit_blocks(cap)
            figures.add(f"{what}, {cap or 'any'} blocks", "tdccl", 1e3 * timed(["tdccl"])["tdccl"], "ms")
        communicator.limit_blocks(own)


def _model(device: torch.device, options: argparse.Namespace) -> GPT:
    torch.manual_seed(0)
    with torch.device(device):
        return GPT(options.layers, options.width, options.heads, options.context).to(torch.bfloat16)


def _step(model) -> Callable[[torch.Tensor], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step(tokens):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()

    return step


def _until_idle(step: Callable, tokens: torch.Tensor) -> None:
    step(tokens)
    _synchronize()


def _replicated(model, backend: str, group: dist.ProcessGroup):
    return DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)


def _sharded(model, backend: str, group: dist.ProcessGroup):
    mesh = DeviceMesh.from_group(group, next(model.parameters()).device.type)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
        if backend == "tdccl":
            module.set_allocate_memory_from_process_group_for_comm(True)
    return model


def _traced(step: Callable, path: Path) -> list[tuple[bool, float, float]]:
    """Writes a step's trace, to open in a viewer; its kernels as (whether it communicates, start, end) in us."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        _synchronize()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    return [(_communicates(kernel["name"]), kernel["ts"], kernel["ts"] + kernel["dur"]) for kernel in kernels]


def _communicates(kernel: str) -> bool:
    return kernel.startswith(_KERNELS) or kernel.startswith("nccl")


def _add_hidden(figures: Figures, what: str, backend: str, kernels: list[tuple[bool, float, float]]) -> None:
    communication = _union([(start, end) for communicates, start, end in kernels if communicates])
    everything = _union([(start, end) for _, start, end in kernels])
    computation = _union([(start, end) for communicates, start, end in kernels if not communicates])
    exposed = _length(everything) - _length(computation)
    figures.add(f"{what}: communication", backend, _length(communication) / 1e3, "ms")
    figures.add(f"{what}: of which exposed", backend, exposed / 1e3, "ms")


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def _length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def _synchronize() -> None:
    if torch.cuda.is_available() and not environment.emulated():
        torch.cuda.synchronize()


def _device() -> torch.device:
    if environment.emulated():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    torch.ones(1, device=device)
    torch.cuda.Stream(device)  # makes torch's pool of streams, whose memory is not a group's
    return device


def _caps(text: str) -> list[int | None]:
    return [None if cap == "none" else int(cap) for cap in text.split(",")]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.torch_backend", description=__doc__)
    parser.add_argument("--vs", default="", help="backends to measure beside tdccl: nccl, gloo")
    parser.add_argument("--sequences", default="1,4", help="of so many sequences a rank (default: %(default)s)")
    parser.add_argument("--max-blocks", type=_caps, default=[], help="steps also with these caps: none,16,24")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="also write a step's trace of every rank there")
    parser.add_argument("-J", "--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    for name, default in (_EMULATION if environment.emulated() else _GPU).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.command = f"torchrun --nproc-per-node {os.environ['WORLD_SIZE']} -m bench.torch_backend {given()}".rstrip()
    if options.trace:
        options.trace.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    sys.exit(main())
