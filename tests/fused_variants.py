"""Compiles the fused kernels for sm_90 without a GPU, a JSON line a kernel. Run as a program, as `variants.py` is."""

import concurrent.futures
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["TDCCL_EMULATE"] = "0"

import triton.language as tl
from divergence import divergent_branches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from variants import context_of, sass_facts

from tdccl.language.overlap import Shards
from tdccl.language.team import SYMMETRIC_TYPES, TEAM_TYPES
from tdccl.overlap.all_gather_gemm import multiply_gathered, push_shard
from tdccl.overlap.all_to_all_gemm import multiply_collected, push_rows
from tdccl.overlap.gemm import Shape, shape_for
from tdccl.overlap.gemm_all_to_all import multiply_exchanged
from tdccl.overlap.gemm_reduce_scatter import multiply_scattered
from tdccl.overlap.pushers import PIECE, PUSH_WARPS
from tdccl.runtime.algorithm import team_of
from tdccl.runtime.launch import _leaves

TARGET = GPUTarget("cuda", 90, 32)
TEAM = team_of(context_of(4), "cuda")
INTEGERS = ("odd", "odd_row", "rows", "N", "width", "K", "most", "b_row", "b_column", "columns", "stride")


def compiled(kernel, constants: dict, aligned: set[str], warps: int, tile: int, operands: dict):
    """The kernel for bf16; pointers, and integers in `aligned`, are multiples of 16: "columns" are those of shards."""
    types = {
        "team": TEAM_TYPES, "epochs": "*i64", "signals": SYMMETRIC_TYPES, "slots": SYMMETRIC_TYPES, "told": "*i64",
        **dict.fromkeys(("shards", "pieces"), Shards("i32", "i32", "i32", "constexpr")),
        **dict.fromkeys(("shard", "staged", "c"), "*bf16"),
        **dict.fromkeys(INTEGERS, "i32"), **operands, **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    types = {name: types[name] for name in kernel.arg_names}
    values = {"team": TEAM, "shards": Shards(0, 0, 0, tile), "pieces": Shards(0, 0, 0, 8 * tile)}
    fixed, divisible = {}, {}
    columns = ("shards", 1) if "columns" in aligned else None
    for position, (name, kinds) in enumerate(types.items()):
        value = values.get(name) or (constants.get(name) if kinds == "constexpr" else None)
        for path, kind, leaf in _leaves(kinds, value, (position,)):
            if kind == "constexpr":
                fixed[path] = leaf
            elif kind.startswith("*") or name in aligned or (name, path[-1]) == columns:
                divisible[path] = [["tt.divisibility", 16]]
    return compile(ASTSource(kernel, types, fixed, divisible), target=TARGET, options={"num_warps": warps})


def operands_of(shape: Shape, descriptors: bool, transposed: bool) -> dict:
    if not descriptors:
        return {"a": "*bf16", "gathered": "*bf16", "b": "*bf16"}
    left = f"tensordesc<bf16[{shape.rows}, {shape.depth}]>"
    block = (shape.columns, shape.depth) if transposed else (shape.depth, shape.columns)
    return {"a": left, "gathered": left, "b": f"tensordesc<bf16[{block[0]}, {block[1]}]>"}


def spills_in_loops(sass: str) -> list[int]:
    """How many accesses to spilled registers each innermost loop on tensor cores has, in ascending order."""
    lines = sass.splitlines()
    labels = {line.strip(" :"): at for at, line in enumerate(lines) if re.match(r"\s*LBB\w+:", line)}
    jumps = (
        (labels.get(found[1]), at) for at, line in enumerate(lines) if (found := re.search(r"BRA.*\b(LBB\w+)", line))
    )
    loops = [(first, last) for first, last in jumps if first is not None and first < last]
    loops = [loop for loop in loops if any("HGMMA" in line or "HMMA" in line for line in lines[slice(*loop)])]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return sorted(len(re.findall(r"\b(?:STL|LDL)\b", "\n".join(lines[slice(*loop)]))) for loop in inner)


def told(name: str, kernel) -> str:
    """The facts of a kernel as a line of JSON."""
    sass = kernel.asm["sass"]
    facts = {"name": name, "wgmma": len(re.findall("HGMMA", sass)), "mma": len(re.findall(r"\bHMMA", sass))}
    facts |= {"shared": kernel.metadata.shared, "by_descriptors": len(re.findall("UTMALDG", sass))}
    facts |= {"spills_in_loops": spills_in_loops(sass), "divergent": divergent_branches(kernel.asm["ptx"])}
    return json.dumps({**facts, **sass_facts(sass)})


def tell(name: str, kernel) -> None:
    print(told(name, kernel), flush=True)


def pushers() -> list[str]:
    constants = {"DTYPE": tl.bfloat16, "PIECE": PIECE}
    lines = []
    for aligned in ({"columns"}, set()):
        pushed = compiled(push_shard, constants, aligned, PUSH_WARPS, 128, {"gathered": SYMMETRIC_TYPES})
        lines.append(told("push_shard", pushed))
    operands = {"gathered": SYMMETRIC_TYPES, "a": "*bf16"}
    return [*lines, told("push_rows", compiled(push_rows, constants, {"columns"}, PUSH_WARPS, 128, operands))]


# Rows, columns, by descriptors, columns after columns: the first by copy engines, too, and with what goes to all ranks.
PRODUCTS = [
    (2048, 7168, True, False), (2048, 7168, True, True), (2048, 128, True, False), (64, 7168, True, False),
    (2048, 7168, False, False), (64, 7168, False, False),
]  # fmt: skip


def products(rows: int, columns: int, descriptors: bool, transposed: bool) -> list[str]:
    shape, lines = shape_for(rows, columns, descriptors), []
    constants = {
        "DTYPE": tl.bfloat16, "COLUMNS": shape.columns, "DEPTH": shape.depth, "STAGES": shape.stages,
        "GROUP": shape.group, "DESCRIPTORS": descriptors, "TRANSPOSED": transposed,
    }  # fmt: skip
    aligned = {"odd", "odd_row", "N", "width", "K", "b_row", "columns"} if descriptors else {"odd", "width"}
    fixed = {"aligned": aligned, "warps": shape.warps, "tile": shape.rows}
    fixed["operands"] = operands_of(shape, descriptors, transposed)
    first = (rows, columns, descriptors, transposed) == PRODUCTS[0]
    for copied in (False, True) if first else (False,):
        gathering = constants | {"COPIED": copied}
        lines.append(told("multiply_gathered", compiled(multiply_gathered, gathering, **fixed)))
        scattering = gathering | {"ROWS": shape.rows, "FOLDED": 16}
        lines.append(told("multiply_scattered", compiled(multiply_scattered, scattering, **fixed)))
    if first:
        exchanging = constants | {"ROWS": shape.rows}
        lines.append(told("multiply_exchanged", compiled(multiply_exchanged, exchanging, **fixed)))
        lines.append(told("multiply_collected", compiled(multiply_collected, constants, **fixed)))
    return lines


def main() -> None:
    """Every kernel, on all cores."""
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as workers:
        running = [workers.submit(products, *each) for each in PRODUCTS] + [workers.submit(pushers)]
        for each in running:
            print("\n".join(each.result()), flush=True)


if __name__ == "__main__":
    main()
