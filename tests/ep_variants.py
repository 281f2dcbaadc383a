"""Compiles the kernels of expert parallelism as they are launched, without a GPU. Run as a program by `test_ep`,
because a process either interprets or compiles: `python ep_variants.py 1 4 cuda 90 32` for 1 node of 4 ranks prints a
line of JSON a kernel."""

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
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp))
    sizes = Sizes(int(nodes), int(width), 8, 7168, 256, 8)
    for launch in launches(sizes, backend, fp8=backend == "cuda"):  # gfx942 has another fp8
        compiled = launch.compile(target)
        facts = {"name": launch.name, "multimem": None, "moves": launch.name.endswith((".dispatch", ".combine"))}
        if launch.arguments.across:
            facts["missing"] = re.findall(r"\.extern \.func[^;]*?(\w+)\s*\(", compiled.asm["ptx"])
        print(variants.told(facts, compiled), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
