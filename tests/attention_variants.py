"""Compiles the attention kernels for sm_90 without a GPU, a JSON line each. Run as a program, as `variants.py` is."""

import fused_variants as fused  # first: it says that kernels are compiled
import triton.language as tl

from tdccl.language.team import SYMMETRIC_TYPES
from tdccl.overlap.flash_decode import _GROUP, _KEYS, _STAGES, _WARPS, _WIDTH, attend_splits, merge_ranks
from tdccl.overlap.gather_kv_attention import attend_gathered, push_pairs, shape_for
from tdccl.overlap.gather_kv_attention_gradient import FOLDED, gradient_of_keys, gradient_of_queries, shapes_for


def main() -> None:
    dim = 128
    strides = [f"{name}_{stride}" for name in "kv" for stride in ("batch", "row", "head")]
    operands = {
        **dict.fromkeys("qkv", "*bf16"), "lengths": "*i32", "partial": "*fp32", "logs": "*fp32", "out": "*bf16",
        "scale": "fp32", **dict.fromkeys([*strides, "room", "heads", "kv_heads", "group", "splits"], "i32"),
    }  # fmt: skip
    constants = {"ROWS": _GROUP, "DIM": dim, "KEYS": _KEYS, "STAGES": _STAGES}
    kernel = fused.compiled(attend_splits, constants, {*strides}, _WARPS, 0, operands)
    fused.tell("attend_splits", kernel)
    constants = {
        "DTYPE": tl.bfloat16, "DIM": dim, "WIDTH": _WIDTH, "ROWS": 1, "PARTS": 64
    }  # fmt: skip
    fused.tell("merge_ranks", fused.compiled(merge_ranks, constants, set(), 2, 0, operands))

    cut = {"DTYPE": tl.bfloat16, "PIECES": 2, "CAUSAL": True}
    integers = dict.fromkeys(["odd", "apart", "rows", "batch", "width", "odd_row", "apart_row"], "i32")
    outs = dict.fromkeys(["of_q", "of_k", "of_v", "gradient"], "*bf16")
    minus = dict.fromkeys(["minus_logs", "minus_deltas"], "*fp32")
    operands = {**operands, **integers, **outs, **minus, "gathered": SYMMETRIC_TYPES, "tickets": "*i64"}
    pushed = fused.compiled(
        push_pairs, {**cut, "PIECE": fused.PIECE}, {"odd", "apart", "columns"}, fused.PUSH_WARPS, 512, operands
    )
    fused.tell("push_pairs", pushed)
    for dim in (64, 128):
        forward, (of_queries, of_keys) = shape_for(dim), shapes_for(dim)
        for kernel, shape, more in (
            (attend_gathered, forward, {"KEPT": True}), (gradient_of_queries, of_queries, {}),
            (gradient_of_keys, of_keys, {"FOLDED": FOLDED}),
        ):  # fmt: skip
            constants = {**cut, **more, "DIM": dim, "ROWS": shape.rows, "KEYS": shape.keys, "STAGES": shape.stages}
            types = operands | dict.fromkeys(["k", "v", "gathered"], f"tensordesc<bf16[{shape.keys}, {dim}]>")
            if kernel is gradient_of_keys:
                types |= dict.fromkeys(["k", "v", "gathered"], "*bf16") | {"sums": SYMMETRIC_TYPES}
                types |= dict.fromkeys(["q", "gradient"], f"tensordesc<bf16[1, {shape.rows}, {dim}]>")
            aligned = {"odd", "apart", "width"}
            compiled = fused.compiled(kernel, constants, aligned, shape.warps, forward.told, types)
            fused.tell(kernel.__name__, compiled)


if __name__ == "__main__":
    main()
