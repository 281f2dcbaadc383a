"""Compiles kernels for GPUs without a GPU. Run as a program by `test_compile`, because a process either
interprets or compiles: `python variants.py cuda 90 32` prints one JSON line a kernel."""

import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":
    os.environ["TDCCL_EMULATE"] = "0"

from triton.backends.compiler import GPUTarget

from tdccl import tuning
from tdccl.collectives import ALGORITHMS
from tdccl.runtime.algorithm import Call, Context, team_of
from tdccl.runtime.algorithm import context_of as context_within
from tdccl.runtime.launch import Arguments, compile_kernel


def context_of(size: int, scratch: int = 64 << 20) -> Context:
    return context_within(size, scratch, tuning.GPU)


def arguments_of(algorithm, call: Call, context: Context):
    """(geometry, arguments) with which `algorithm` would take the call."""
    geometry = algorithm.geometry(call, context)
    return geometry, Arguments(algorithm.kernel, geometry, algorithm.symmetric, call.op)


def compile_call(algorithm, call: Call, context: Context, target: GPUTarget):
    """The compiled kernel, and its geometry, of `call` by `algorithm`."""
    geometry, arguments = arguments_of(algorithm, call, context)
    team = team_of(context, target.backend)
    return compile_kernel(algorithm.kernel, arguments, team, geometry.warps, target), geometry


def calls_of(collective: str, algorithm):
    """An aligned call of the size that the algorithm is for, with each dtype and op that makes another kernel."""
    nbytes = 4096 if algorithm.path == "packets" else 1 << 24
    kinds = [("u8", None)]
    if "reduce" in collective:
        kinds = [("bf16", "sum"), ("fp16", "avg"), ("fp32", "max"), ("fp64", "prod"), ("i8", "min"), ("i64", "xor")]
    for dtype, op in kinds:
        itemsize = {"u8": 1, "i8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "i64": 8}[dtype]
        on_device = (1 << 20, 1 << 21, 64, 6400, 6400) if collective == "all_to_all_vdev" else None
        yield Call(collective, nbytes // itemsize, dtype, op, 0, 16, None, (object(), object()), False, on_device)


def sass_facts(sass: str) -> dict:
    """Widths of the global accesses, and how many fences and spills there are."""
    return {
        "loads": sorted(set(re.findall(r"\bLDG\.E(?:\.\w+)*?\.(128|64)\b", sass))),
        "stores": sorted(set(re.findall(r"\bSTG\.E(?:\.\w+)*?\.(128|64)\b", sass))),
        "narrow": len(re.findall(r"\b(?:LDG|STG)\.E\.(?:U8|S8|U16|S16)\b", sass)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
    }


def main(backend: str, arch: str, warp: str) -> None:
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp))
    for size in (4, 2, 3, 8) if arch == "90" else (4,):
        context = context_of(size)
        for collective, algorithms in ALGORITHMS.items():
            for algorithm in algorithms:
                calls = list(calls_of(collective, algorithm))
                for call in calls if (size, arch) == (4, "90") else calls[:1]:
                    compiled, geometry = compile_call(algorithm, call, context, target)
                    facts = {"name": f"{collective}.{algorithm.name}", "size": size, "dtype": call.dtype, "op": call.op}
                    facts["aligned"] = geometry.aligned
                    if backend == "cuda":
                        facts |= sass_facts(compiled.asm["sass"])
                    else:
                        facts["code"] = len(compiled.asm["hsaco"])
                    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
