"""Compiles the kernels of expert parallelism as they are launched, without a GPU. Run as a program by `test_ep`,
because a process either interprets or compiles: `python ep_variants.py 1 4 cuda 90 32` for 1 node of 4 ranks prints a
line of JSON a kernel."""

import concurrent.futures
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"TDCCL_EMULATE": "0", "TDCCL_SCRATCH_MB": "64"}

import variants
from triton.backends.compiler import GPUTarget

from bench.ep_kernels import Sizes, launches


def main(nodes: str, width: str, backend: str, arch: str, warp: str) -> None:
    """Every kernel, on all cores."""
    target = int(nodes), int(width), backend, arch, warp
    number = len(launches_of(*target))
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as workers:
        for line in workers.map(compile_launch, range(number), [target] * number):
            print(line, flush=True)


def launches_of(nodes: int, width: int, backend: str, arch: str, warp: str) -> list:
    sizes = Sizes(nodes, width, 8, 7168, 256, 8)
    return [*launches(sizes, backend, fp8=backend == "cuda")]  # gfx942 has another fp8


def compile_launch(number: int, target: tuple) -> str:
    """The facts of one of the launches, as a line of JSON."""
    _, _, backend, arch, warp = target
    launch = launches_of(*target)[number]
    compiled = launch.compile(GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp)))
    facts = {"name": launch.name, "multimem": None, "moves": launch.name.endswith((".dispatch", ".combine"))}
    if launch.arguments.across:
        facts["missing"] = re.findall(r"\.extern \.func[^;]*?(\w+)\s*\(", compiled.asm["ptx"])
    return variants.told(facts, compiled)


if __name__ == "__main__":
    main(*sys.argv[1:])
