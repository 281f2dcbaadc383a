"""Compiles the kernels of gemm_all_reduce and all_reduce_rms_norm for sm_90 without a GPU, as `fused_variants.py`."""

from importlib import import_module
from types import SimpleNamespace

import triton.language as tl
from fused_variants import compiled, operands_of, tell

from tdccl.overlap.gemm import Shape, shape_for

product = import_module("tdccl.overlap.gemm_all_reduce")  # the package has functions of these names
norm = import_module("tdccl.overlap.all_reduce_rms_norm")

ONE = SimpleNamespace(ONE_SHOT=True, FOLDED=16)
TWO = SimpleNamespace(ONE_SHOT=False, FOLDED=0)


def products(kernel, shape: Shape, descriptors: bool, rows: int | None = None, **constants) -> None:
    """Weights as linear layers have them. rows: 1, of which Triton makes a constant."""
    constants |= {"DTYPE": tl.bfloat16, "ROWS": shape.rows, "COLUMNS": shape.columns, "GROUP": shape.group}
    if "DEPTH" in kernel.arg_names:
        constants |= {"DEPTH": shape.depth, "STAGES": shape.stages, "DESCRIPTORS": descriptors, "TRANSPOSED": True}
    if rows is not None:
        constants["M"] = rows
    operands = operands_of(shape, descriptors, True) | {"partials": "*fp32", "arrivals": "*i32"}
    operands |= dict.fromkeys(("M", "share"), "i32")
    aligned = {"odd", "N", "K", "b_row"} if descriptors else {"odd"}
    warps = shape.warps if "DEPTH" in kernel.arg_names else product.FOLD_WARPS[constants["FOLDED"] != product.FOLDED]
    tell(kernel.__name__, compiled(kernel, constants, aligned, warps, shape.rows, operands))


def norms(kernel, words: int, wide: bool) -> None:
    names = ("x", "residual", "weight", "normed", "total", "summed")
    types = {**dict.fromkeys(names, "*bf16"), **dict.fromkeys(("width", "part"), "i32"), "eps": "fp32"}
    constants = {"DTYPE": tl.bfloat16, "WORDS": words, "WIDE": wide, "TILE": words}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    aligned = {"width", "part"} if wide else set()
    tell(kernel.__name__, compiled(kernel, constants, aligned, min(norm.WARPS, words // 64), 1, types))


def main() -> None:
    few = product.shape_of_few(128, 8192, True)
    products(product.multiply_shares, product.shape_of_few(1, 8192, True), True, 1, **vars(ONE))
    products(product.multiply_shares, few, True, **vars(TWO))
    products(product.multiply_shares, product.shape_of_few(128, 8192, False), False, **vars(TWO))
    products(product.multiply_tiles, shape_for(8192, 8192, True), True)
    products(product.fold_everywhere, few, True, FOLDED=product.FOLDED)
    products(product.fold_and_share, few, True, FOLDED=product.FOLDED, HEIGHT=product.FOLDED)
    many = shape_for(8192, 8192, True)
    products(product.fold_and_share, many, True, FOLDED=product.FOLDED_OF_ALL // 4, HEIGHT=many.rows)
    norms(norm.one_shot, norm.WORDS_UPTO // 4, True)
    norms(norm.two_shot, norm.WORDS_UPTO // 8, True)
    norms(norm.one_shot, 1024, False)
    norms(norm.add_and_normalise, 4096, True)


if __name__ == "__main__":
    main()
