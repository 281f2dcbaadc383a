"""Compiles the kernels of gemm_all_reduce and all_reduce_rms_norm for sm_90 without a GPU, as `fused_variants.py`."""

from importlib import import_module

import triton.language as tl
from fused_variants import compiled, operands_of, tell

from tdccl.overlap.gemm import Shape, shape_for

product = import_module("tdccl.overlap.gemm_all_reduce")  # the package has functions of these names
norm = import_module("tdccl.overlap.all_reduce_rms_norm")

RANKS = 4
TWO = {"ONE_SHOT": False, "FOLDED": product.FOLDED}


def in_one_shot(shape: Shape) -> dict:
    return {"ONE_SHOT": True, "FOLDED": product.Sums.of(shape, 128, True, True, RANKS, 132).folded}


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
    for rows in (1, 16, 32, 64, 128, 256):
        shape = product.shape_of_few(rows, 8192, True)
        products(product.multiply_shares, shape, True, 1 if rows == 1 else None, **in_one_shot(shape))
    few, plain = product.shape_of_few(128, 8192, True), product.shape_of_few(128, 8192, False)
    products(product.multiply_shares, few, True, **TWO)
    products(product.multiply_shares, plain, False, **TWO)
    products(product.multiply_shares, plain, False, **in_one_shot(plain))
    products(product.multiply_tiles, shape_for(8192, 8192, True), True)
    products(product.fold_and_share, few, True, FOLDED=product.FOLDED, HEIGHT=product.FOLDED)
    many = shape_for(8192, 8192, True)
    products(product.fold_and_share, many, True, FOLDED=product.FOLDED_OF_ALL // 4, HEIGHT=many.rows)
    norms(norm.one_shot, norm.WORDS_UPTO // 4, True)
    norms(norm.two_shot, norm.WORDS_UPTO // 8, True)
    norms(norm.one_shot, 1024, False)
    norms(norm.add_and_normalise, 4096, True)


if __name__ == "__main__":
    main()
