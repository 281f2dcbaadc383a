"""The product of two tiles' rows and columns that all fused operators share, and its shape: by rule, or measured."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tdccl import environment
from tdccl.communicator import Communicator
from tdccl.tuning import Shape

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def shape_for(rows: int, columns: int, descriptors: bool) -> Shape:
    """The rule's shape for a product whose shards have so many rows and columns; `rows` alone decides how high tiles
    are, in what was measured, too.

    All ranks must cut alike, so it depends on sizes only.
    """
    if environment.emulated():
        return Shape(16, 32, 32, 1, 4, 2)
    height = 64 if rows <= 64 else 128
    if not descriptors:
        return Shape(height, 128, 32, 3, 8, 8)
    if height == 64 or columns <= 128:
        return Shape(height, 128, 64, 4, 4, 8)
    return Shape(128, 256, 64, 4, 8, 8)


class Right(NamedTuple):
    """The right operand as kernels take it: a TensorDescriptor or a pointer, strides in elements, and whether it lies
    column after column."""

    operand: object
    strides: tuple[int, int]
    transposed: bool


def by_descriptors(depth: int, columns: int) -> bool:
    """Whether tensor descriptors can load both operands: their rows, or columns, are whole 16 bytes."""
    return depth % 8 == 0 and columns % 8 == 0


def left(a: torch.Tensor, shape: Shape, descriptors: bool):
    """A matrix [M, K] with contiguous rows as the left operand of `product`."""
    return TensorDescriptor.from_tensor(a, [shape.rows, shape.depth]) if descriptors else a


def right(b: torch.Tensor, shape: Shape, descriptors: bool) -> Right:
    """A matrix [K, N] with contiguous rows or columns as the right operand of `product`."""
    transposed = b.stride(1) != 1
    if not descriptors:
        return Right(b, b.stride(), transposed)
    if transposed:
        return Right(TensorDescriptor.from_tensor(b.t(), [shape.columns, shape.depth]), b.stride(), True)
    return Right(TensorDescriptor.from_tensor(b, [shape.depth, shape.columns]), b.stride(), False)


class Operands(NamedTuple):
    """What one call multiplies, and in which tiles.

    a            [M, K], rows contiguous at a 16-byte aligned address
    b            [K, N] as kernels take it
    shape        of the tiles of the result
    descriptors  whether tensor descriptors load both
    """

    a: torch.Tensor
    b: Right
    shape: Shape
    descriptors: bool

    def left(self, rows: torch.Tensor):
        """Rows of `a`, here or gathered, as the left operand of `product`."""
        return left(rows, self.shape, self.descriptors)

    def constants(self) -> dict:
        """What every kernel that multiplies them is compiled for, and its warps."""
        shape = self.shape
        return {
            "DTYPE": DTYPES[self.a.dtype], "COLUMNS": shape.columns, "DEPTH": shape.depth, "STAGES": shape.stages,
            "GROUP": shape.group, "DESCRIPTORS": self.descriptors, "TRANSPOSED": self.b.transposed,
            "num_warps": shape.warps,
        }  # fmt: skip


def prepare(
    comm: Communicator, a: torch.Tensor, b: torch.Tensor, rows: int, columns: int, shards: int = 1, kind: str = "many",
    rule=shape_for, shared: bool = True,
) -> Operands:  # fmt: skip
    """a [M, K] and b [K, N], laid out for a product of `shards` times so many rows, and so many columns, of the result.

    kind: of `tuning.products.KINDS`, in whose rows shapes are looked up; rule: chooses tiles where there is none near,
    as `shape_for` does, from the same arguments. shared: whether all ranks have as many columns of a; if not, those
    that descriptors cannot load are filled up with zeros, for ranks must cut alike.
    """
    if not shared and columns % 8 == 0:
        a, b = _filled_up(a), _filled_up(b.t()).t()
    a, b = dense(a), rows_or_columns(b)
    descriptors = by_descriptors(a.shape[1], b.shape[1])
    shape = rule(rows, columns, descriptors)
    if descriptors:
        shape = comm.products.shape(kind, shards * rows, columns, b.shape[0], b.stride(1) != 1, shape, shared)
    return Operands(a, right(b, shape, descriptors), shape, descriptors)


def _filled_up(a: torch.Tensor) -> torch.Tensor:
    """The matrix with columns of zeros behind it, so that 8 divides how many it has."""
    missing = -a.shape[1] % 8
    return torch.nn.functional.pad(a, (0, missing)) if missing else a


def dense(a: torch.Tensor) -> torch.Tensor:
    """The matrix with contiguous rows at a 16-byte aligned address."""
    return _aligned(_regular(a.contiguous()))


def rows_or_columns(b: torch.Tensor) -> torch.Tensor:
    """The matrix with contiguous rows or columns at a 16-byte aligned address."""
    if b.t().is_contiguous() and not b.is_contiguous():
        return _aligned(_regular(b.t())).t()
    return _aligned(_regular(b.contiguous()))


def _regular(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor with the strides of one: torch leaves those of dimensions of one element as they are."""
    strides = [1]
    for size in reversed(tensor.shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tensor.as_strided(tensor.shape, strides[::-1])


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.clone() if matrix.data_ptr() % 16 else matrix


@triton.jit
def grouped(position, tiles_down, tiles_across, GROUP: tl.constexpr):
    """(row, column) of the tile at a position of an order that goes down GROUP tiles before it goes across."""
    in_group = GROUP * tiles_across
    first = position // in_group * GROUP
    height = tl.minimum(tiles_down - first, GROUP)
    within = position % in_group
    return first + within % height, within // height


@triton.jit
def product(
    a, row, height, b, column, N, K, b_row, b_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """fp32 [ROWS, COLUMNS]: rows `row` .. of a [.., K] times columns `column` .. of b [K, N].

    DESCRIPTORS: a and b are tensor descriptors, else pointers, of which `height` rows and N columns are read. Rows and
    columns beyond have any values. Ordering: plain loads.
    """
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    return product_onto(
        total, a, row, height, b, 0, column, N, K, 0, K, b_row, b_column,
        ROWS, COLUMNS, DEPTH, STAGES, DESCRIPTORS, TRANSPOSED,
    )  # fmt: skip


@triton.jit
def product_onto(
    total, a, row, height, b, b_first, column, N, K, first, last, b_row, b_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """`total` + what columns `first` .. `last` of a add to `product`; the K rows of b that count begin with `b_first`.

    `first` is a multiple of DEPTH, `last` too, or K. By descriptors what is behind K is multiplied by zeros. Ordering:
    plain loads.
    """
    if DESCRIPTORS:
        for k in tl.range(first, last, DEPTH, num_stages=STAGES):
            of_a = a.load([row, k])
            of_b = b.load([column, b_first + k]).T if TRANSPOSED else b.load([b_first + k, column])
            total = tl.dot(of_a, of_b, total)
    else:
        i, j, inner = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
        rows = a + (row + i).to(tl.int64)[:, None] * K
        columns = b + j.to(tl.int64)[None, :] * b_column
        for k in tl.range(first, last, DEPTH, num_stages=STAGES):
            depth = k + inner
            of_a = tl.load(rows + depth[None, :], mask=(i < height)[:, None] & (depth < K)[None, :], other=0)
            at = columns + (b_first + depth).to(tl.int64)[:, None] * b_row
            of_b = tl.load(at, mask=(depth < K)[:, None] & (j < N)[None, :], other=0)
            total = tl.dot(of_a, of_b, total)
    return total
