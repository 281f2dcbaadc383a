"""The table of cases: which collectives, dtypes, ops, sizes, algorithms and placements the tests go through."""

import os

import torch

from tdccl import environment, tuning
from tdccl.collectives import ALGORITHMS

REDUCED = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
MOVED = [torch.float8_e4m3fn, torch.complex128, torch.complex64, torch.bool, torch.bfloat16, torch.float32]
# An interpreted message larger than scratch takes a second: not every dtype goes through one, and most through one of
# an aligned or of a ragged length.
LARGE = [torch.float64, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.complex64]
RAGGED = [torch.int8, torch.complex64]
FEW = environment.emulated() and os.environ.get("TDCCL_LONG", "0") == "0"
REDUCTIONS = ["all_reduce", "reduce_scatter"]
MOVEMENTS = ["all_gather", "broadcast", "all_to_all"]


SCRATCH_MB = 2 if environment.emulated() else 24


def ops_of(dtype: torch.dtype) -> list[str]:
    bitwise, arithmetic = ["and", "or", "xor"], ["sum", "avg", "min", "max", "prod"]
    if dtype is torch.bool:
        return bitwise
    return arithmetic if dtype.is_floating_point else arithmetic + bitwise


def the_rules() -> tuning.Rules:
    return tuning.EMULATION if environment.emulated() else tuning.GPU


def counts_of(dtype: torch.dtype, algorithm: str, chunks: int = 1) -> list[int]:
    """Elements a chunk: none, few, around 1 KiB, around one tile, and larger than the scratch, which in emulation all
    `chunks` of a message are together."""
    numbers = the_rules()
    packets = algorithm.endswith("ll")
    kilobyte = 1024 // dtype.itemsize
    tile = (numbers.packet_tile * 4 if packets else numbers.small_tile) // dtype.itemsize
    around = [0, 1, 7, kilobyte - 1, kilobyte, kilobyte + 1, tile - 1, tile, tile + 1]
    if packets or dtype not in LARGE:
        return around
    large = (SCRATCH_MB << 20) * 9 // 8 // dtype.itemsize // (chunks if FEW else 1) // 64 * 64
    if FEW and dtype is not torch.bfloat16:
        return [*around, large + 3 if dtype in RAGGED else large]
    return [*around, large + 3, large]


def few_counts(dtype: torch.dtype) -> list[int]:
    """Enough to try an op whose addressing another op has already proven."""
    return [7, 1024 // dtype.itemsize + 1]


def algorithms_of(collective: str, symmetric: bool) -> list[str]:
    """Names of the algorithms that a plain or a symmetric placement has to be tried with; `test_nvls` has the rest."""
    return [a.name for a in ALGORITHMS[collective] if bool(a.symmetric) == symmetric and a.multimem is None]
