"""Compiles the kernels for mixtures of experts for sm_90 without a GPU, a JSON line a kernel. Run as a program."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import triton.language as tl
from fused_variants import compiled, tell

from tdccl.language.team import SYMMETRIC_TYPES
from tdccl.overlap.all_gather_grouped_gemm import PUSH_COLUMNS, PUSH_TOKENS, PUSH_WARPS, multiply_arriving, push_tokens
from tdccl.overlap.grouped import shape_of_tiles
from tdccl.overlap.grouped_gemm_reduce_scatter import (
    REDUCE_COLUMNS,
    REDUCE_TOKENS,
    REDUCE_WARPS,
    multiply_backwards,
    reduce_rows,
)
from tdccl.overlap.grouped_gradient import _ROWS, _TILE, multiply_rows
from tdccl.overlap.routing import Tables, exchange_choices, place_entries

INTEGERS = ("tokens", "most", "word_row", "step", "pushers", "most_signals", "words", "multipliers", "shard")
TYPES = {
    "tables": Tables(*["*i32"] * 6), "counts": "*i32", "weights": "*fp32", **dict.fromkeys(INTEGERS, "i32"),
    **dict.fromkeys(("x", "partial", "y", "left", "right", "out"), "*bf16"),
}  # fmt: skip
EVERYTHING = {"odd", "N", "width", "K", "b_row", "step", "most"}


def operands_of(shape, descriptors: bool, transposed: bool) -> dict:
    if not descriptors:
        return {"h": "*bf16", "b": "*bf16"}
    block = (shape.columns, shape.depth) if transposed else (shape.depth, shape.columns)
    return {
        "h": f"tensordesc<bf16[{shape.rows}, {shape.depth}]>",
        "b": f"tensordesc<bf16[{block[0]}, {block[1]}]>",
    }


def main() -> None:
    entries = {"TOP_K": 8, "PLACES": 8, "LOCAL": 128}
    sorting = {**entries, "COLUMNS": 128, "PARTS": 32, "TILE": 16}
    exchanging = {**TYPES, "inbox": SYMMETRIC_TYPES, "idx": "*i64", "factors": "*fp32"}
    compiled_exchange = compiled(exchange_choices, sorting | {"WEIGHTED": True}, EVERYTHING, 8, 0, exchanging)
    tell("exchange_choices", compiled_exchange)
    tell("place_entries", compiled(place_entries, sorting | {"ROWS": 128}, EVERYTHING, 8, 0, TYPES))
    constants = {"DTYPE": tl.bfloat16, **entries, "SHARDED": True, "TOKENS": PUSH_TOKENS, "COLUMNS": PUSH_COLUMNS}
    gathered = {**TYPES, "gathered": SYMMETRIC_TYPES}
    tell("push_tokens", compiled(push_tokens, constants, EVERYTHING, PUSH_WARPS, 0, gathered))
    constants |= {"WEIGHTED": True, "TOKENS": REDUCE_TOKENS, "COLUMNS": REDUCE_COLUMNS, "CHUNK": 1024}
    tell("reduce_rows", compiled(reduce_rows, constants, EVERYTHING, REDUCE_WARPS, 0, TYPES))
    constants = {"DTYPE": tl.bfloat16, "TOP_K": 8, "LEFT_BY_TOKEN": True, "ROWS": _ROWS, "TILE": _TILE}
    tell("multiply_rows", compiled(multiply_rows, constants, EVERYTHING, 8, 0, TYPES))
    for height, columns, descriptors, transposed in [
        (128, 1024, True, False), (64, 1024, True, True), (128, 1024, False, False),
    ]:  # fmt: skip
        shape = shape_of_tiles(height, columns, descriptors)
        constants = {
            "DTYPE": tl.bfloat16, "ROWS": shape.rows, "COLUMNS": shape.columns, "DEPTH": shape.depth,
            "STAGES": shape.stages, "DESCRIPTORS": descriptors, "TRANSPOSED": transposed,
        }  # fmt: skip
        operands = {**TYPES, "gathered": "*bf16", **operands_of(shape, descriptors, transposed)}
        fixed = {"aligned": EVERYTHING if descriptors else {"odd", "width"}, "warps": shape.warps, "tile": 0}
        arriving = compiled(multiply_arriving, constants | {"TOP_K": 8}, **fixed, operands=operands)
        tell("multiply_arriving", arriving)
        constants |= {"ACROSS": 4, "WORDS": 128}
        tell("multiply_backwards", compiled(multiply_backwards, constants, **fixed, operands=operands))


if __name__ == "__main__":
    main()
