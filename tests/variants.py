"""Compiles kernels for GPUs without a GPU. Run as a program by `test_compile`, because a process either
interprets or compiles: `python variants.py kernels cuda 90 32` prints one JSON line a kernel."""

import concurrent.futures
import itertools
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":
    os.environ["TDCCL_EMULATE"] = "0"

import multimem_kernels
from divergence import divergent_branches
from triton.backends.compiler import GPUTarget

from tdccl import tuning
from tdccl.collectives import ALGORITHMS
from tdccl.decisions import context_for, rail_for
from tdccl.hierarchical import ALGORITHMS as ACROSS_NODES
from tdccl.runtime.algorithm import ITEMSIZE, Call, Context, team_of
from tdccl.runtime.algorithm import context_of as context_within
from tdccl.runtime.launch import Arguments, Symmetric, Team, compile_kernel
from tdccl.transport import Multicast

# Reductions that differ in width of elements and in arithmetic; with TDCCL_LONG=1 more of them.
LONG = os.environ.get("TDCCL_LONG", "0") != "0"
REDUCED = [("bf16", "sum"), ("fp64", "prod"), ("i8", "min")]
REDUCED += [("fp16", "avg"), ("fp32", "max"), ("i64", "xor")] if LONG else []
# What the switch reduces by: one instruction for 16 bytes where the type has vectors, else one a word.
WIDE_FORMS = [("bf16", "sum"), ("fp16", "sum"), ("fp32", "avg")]
NARROW_FORMS = [("fp64", "sum"), ("i64", "min"), ("i32", "max"), ("u8", "xor")]


def context_of(size: int, scratch: int = 64 << 20, blocks: int = tuning.GPU.blocks) -> Context:
    return context_within(size, scratch, replace(tuning.GPU, blocks=blocks))


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
    """An aligned call of the size that the algorithm is for, with each dtype and op that makes another kernel, and one
    with a ragged end where that makes another."""
    nbytes = 4096 if algorithm.path == "packets" else 1 << 24
    kinds = [("u8", None)]
    if "reduce" in collective:
        kinds = REDUCED if algorithm.multimem is None else WIDE_FORMS
    for dtype, op in kinds:
        itemsize = ITEMSIZE[dtype]
        on_device = (1 << 20, 1 << 21, 64, 6400, 6400) if collective == "all_to_all_vdev" else None
        yield Call(collective, nbytes // itemsize, dtype, op, 0, 16, None, (object(), object()), False, on_device)
    if collective in ("all_reduce", "reduce") and algorithm.path != "packets" and algorithm.multimem is None:
        yield Call(collective, nbytes // 4 + 1, "fp32", "sum", 0, 16, None, (object(), object()), False)  # a ragged end


def sass_facts(sass: str) -> dict:
    """Widths of the global accesses, and how many fences and spills there are."""
    return {
        "loads": sorted(set(re.findall(r"\bLDG\.E(?:\.\w+)*?\.(128|64)\b", sass))),
        "stores": sorted(set(re.findall(r"\bSTG\.E(?:\.\w+)*?\.(128|64)\b", sass))),
        # But not of constants: so NVSHMEM reads its descriptions of queues, and Triton nothing.
        "narrow": len(re.findall(r"\b(?:LDG|STG)\.E\.(?:U8|S8|U16|S16)\b(?!\.CONSTANT)", sass)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
    }


def multimem_facts(compiled) -> dict:
    """The multimem instructions in PTX, how many of each there are in SASS, and those that nothing guards there."""
    ptx, sass = compiled.asm["ptx"], compiled.asm["sass"]
    return {
        "forms": sorted(set(re.findall(r"multimem\.(?:ld_reduce|st|red)\.[\w.:]+", ptx))),
        "reduced_loads": len(re.findall(r"\bLDGMC\b", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.E\.128\.STRONG\.SYS\b", sass)),
        "reductions": len(re.findall(r"\bREDG\.E\S*\.STRONG\.SYS\b", sass)),
        "alias_fences": len(re.findall(r"fence\.proxy\.alias;", ptx)),
        "unguarded": unguarded(sass.splitlines()),
    }


def unguarded(lines: list[str]) -> list[str]:
    """Those of the switch's instructions that have no predicate, and that no branch before them leads around."""
    labels = {line.rstrip(":"): number for number, line in enumerate(lines) if re.fullmatch(r"\w+:", line)}
    return [
        line
        for number, line in enumerate(lines)
        if re.search(r"\bLDGMC\b|\b(?:STG|REDG)\.E\S*\.STRONG\.SYS\b", line)
        and not re.search(r"@!?U?P", line)
        and not _skipped(lines, labels, number)
    ]


def _skipped(lines: list[str], labels: dict[str, int], number: int) -> bool:
    """Whether all ways to an instruction pass a branch that may lead around it; a loop's own is one."""
    for before in reversed(range(number)):
        label = lines[before].rstrip(":")
        if label in labels:
            ways = [i for i, line in enumerate(lines) if re.search(rf"\bBRA {label}\b", line)]
            if not all(way > number and re.search(r"@!?U?P\w+ BRA", lines[way]) for way in ways):
                return False
        skips = re.search(r"@!?U?P\w+ (?:EXIT|BRA (\w+))", lines[before])
        if skips and (skips[1] is None or labels[skips[1]] > number):
            return True
    return False


def compile_forms(dtype: str, op: str, kind: str, red: bool, size: int, target: GPUTarget, ones: bool = False):
    """The kernel with all device functions of `tdccl.language.multimem`, for one element type and operation.

    ones: as Triton makes it for rank 1 and one quad, integers that it takes for constants.
    """
    constexpr = {"DTYPE": dtype, "OP": op, "RED": red, "MULTIMEM": kind} | ({"quads": 1} if ones else {})
    integer = "constexpr" if ones else "i32"
    team_types = Team("*i64", "*i8", integer, "*i64", "i64", *["constexpr"] * (len(Team._fields) - 5))
    pointers = {"result": "*i8", "source": "*i8", "quads": "i32"}
    types = {
        "team": team_types,
        "buffer": Symmetric("*i64", "i64"),
        **pointers,
        **dict.fromkeys(constexpr, "constexpr"),
    }
    arguments = SimpleNamespace(types=types, values=constexpr, promised=lambda name: 1, across=False)
    team = team_of(context_of(size), target.backend)._replace(rank=1)
    return compile_kernel(multimem_kernels.every_form, arguments, team, 4, target)


def main(backend: str, arch: str, warp: str) -> None:
    """Every kernel, on all cores; with TDCCL_LONG=1 for more numbers of ranks."""
    sizes = (4, 2, 3, 8) if LONG and arch == "90" else (4,)
    names = [(collective, place) for collective, listed in ALGORITHMS.items() for place in range(len(listed))]
    jobs = [(backend, arch, warp, size, *name) for size, name in itertools.product(sizes, names)]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as workers:
        for lines in workers.map(compile_algorithm, jobs):
            print("\n".join(lines), flush=True)


def compile_algorithm(job: tuple) -> list[str]:
    """The facts of one algorithm's kernels, a line of JSON each."""
    backend, arch, warp, size, collective, place = job
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp))
    algorithm, context = ALGORITHMS[collective][place], context_of(size)
    calls = list(calls_of(collective, algorithm))
    calls = calls if (size, arch) == (4, "90") else calls[:1]
    lines = []
    for kind in kinds_of(algorithm, size, arch):
        reached = context._replace(multicast=Multicast(kind, "for a test"))
        for call in calls if kind != "unicast" else calls[:1]:
            compiled, geometry = compile_call(algorithm, call, reached, target)
            facts = {"name": f"{collective}.{algorithm.name}", "size": size, "dtype": call.dtype, "op": call.op}
            lines.append(told(facts | {"multimem": kind, "aligned": geometry.aligned}, compiled))
    return lines


def kinds_of(algorithm, size: int, arch: str) -> list[str | None]:
    """How a kernel's multimem is compiled: for the switch, which CUDA alone has, and without it."""
    if algorithm.multimem is None:
        return [None]
    if size != 4:
        return []  # nothing new
    return {"90": ["switch", "unicast"], "100": ["switch"]}.get(arch, ["unicast"])


def forms(backend: str, arch: str, warp: str) -> None:
    """The device functions of multimem by themselves, with every type and operation that the architecture has."""
    target = GPUTarget(backend, int(arch), int(warp))
    kinds = [*WIDE_FORMS, *NARROW_FORMS, ("bf16", "min"), ("fp16", "max"), ("i64", "sum"), ("i32", "and")]
    listed = [(dtype, op, "switch", True) for dtype, op in kinds]
    listed += [("bf16", "sum", "switch", True, True), ("bf16", "sum", "unicast", True)]
    if arch == "100":
        listed += [(dtype, op, "switch", False) for dtype in ("fp8e4nv", "fp8e5") for op in ("sum", "min")]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as workers:
        for line in workers.map(_form, listed, [target] * len(listed)):
            print(line, flush=True)


def _form(form: tuple, target: GPUTarget) -> str:
    dtype, op, kind, red, *ones = form
    compiled = compile_forms(dtype, op.replace("avg", "sum"), kind, red, 4, target, *ones)
    facts = {"name": "every_form", "size": 4, "dtype": dtype, "op": op, "multimem": kind}
    return told(facts, compiled)


def across(backend: str, arch: str, warp: str) -> None:
    """Every kernel across nodes, linked to NVSHMEM's bitcode; with TDCCL_LONG=1 for more and larger nodes, too."""
    shapes = [(2, 2), (4, 3)] if LONG else [(2, 2)]
    target = GPUTarget(backend, int(arch), int(warp))
    jobs = [(size, nodes, *job) for size, nodes in shapes for job in _jobs_across(size * nodes, size == 2)]
    for size, nodes, collective, algorithm, call in jobs:
        context = context_for(size, scratch=64 << 20, nodes=nodes)
        geometry = algorithm.geometry(call, context)
        arguments = Arguments(algorithm.kernel, geometry, (), call.op, rail=rail_for(context, algorithm.pairs))
        compiled = compile_kernel(algorithm.kernel, arguments, team_of(context, "cuda"), geometry.warps, target)
        facts = {"name": f"{collective}.{algorithm.name}", "size": size, "dtype": call.dtype, "op": call.op}
        facts |= {"multimem": None, "state": "nvshmemi_device_state_d" in compiled.asm["ptx"]}
        facts["missing"] = re.findall(r"\.extern \.func[^;]*?(\w+)\s*\(", compiled.asm["ptx"])
        print(told(facts, compiled), flush=True)


def _jobs_across(ranks: int, all_kinds: bool):
    for collective, algorithms in ACROSS_NODES.items():
        for algorithm in algorithms:
            calls = [
                call for call in calls_of(collective, algorithm) if call.op is None or call.dtype in ("bf16", "fp16")
            ]
            calls = [call for call in calls if algorithm.packets is None or call.op != "avg"]
            if algorithm.splits == "only":
                calls = [call._replace(splits=((call.count,) * ranks,) * 2) for call in calls]
            yield from ((collective, algorithm, call) for call in (calls if all_kinds else calls[:1]))


def told(facts: dict, compiled) -> str:
    """The facts, with those of the machine code, as a line of JSON."""
    if "hsaco" in compiled.asm:
        facts["code"] = len(compiled.asm["hsaco"])
    else:
        facts |= sass_facts(compiled.asm["sass"])
        if "nvshmem" not in compiled.asm["ptx"]:  # whose threads have waits of their own
            facts["divergent"] = divergent_branches(compiled.asm["ptx"])
        if facts["multimem"] is not None:
            facts |= multimem_facts(compiled)
    return json.dumps(facts)


if __name__ == "__main__":
    {"kernels": main, "forms": forms, "across": across}[sys.argv[1]](*sys.argv[2:])
