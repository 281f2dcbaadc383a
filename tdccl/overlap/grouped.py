"""The product of rows with their experts' matrices that the operators for mixtures of experts share."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tdccl import environment
from tdccl.ep.routing import going_to
from tdccl.errors import ArgumentError
from tdccl.overlap.gemm import Right, _aligned, right
from tdccl.overlap.routing import Routing, local_of
from tdccl.tuning import Shape


class Stack(NamedTuple):
    """The experts' matrices [experts, K, N] as kernels take them: one matrix that has them below each other, or, if
    `right.transposed`, what they are the transposes of; `step` rows of it each."""

    right: Right
    step: int


def check_grouped(operator: str, rows: torch.Tensor, most: int, b: torch.Tensor, routing: Routing) -> None:
    """Raises ArgumentError unless `most` rows [.., K] can be multiplied by the experts' matrices b [.., K, N]."""
    comm, local = routing.comm, local_of(routing.comm.size, routing.sizes)
    for name, tensor, dimensions in (("rows", rows, 2), ("b", b, 3)):
        fits = tensor.dim() == dimensions and tensor.dtype in (torch.bfloat16, torch.float16)
        if not fits or tensor.device != comm.device or tensor.dtype != rows.dtype:
            raise ArgumentError(
                f"{operator}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected "
                f"{dimensions} dimensions of bfloat16 or float16, the same for both, on {comm.device}"
            )
    if rows.shape[0] != most or b.shape[0] != local or b.shape[1] != rows.shape[1]:
        raise ArgumentError(
            f"{operator}: rows are {tuple(rows.shape)}, b is {tuple(b.shape)}; expected [{most}, K] and [{local}, K, N]"
        )


def shape_of(b: torch.Tensor, routing: Routing, descriptors: bool) -> Shape:
    """The shape of a product by what `dense_stack` gave: one that was measured near, or the rule's.

    Ranks must have equally wide tiles to tell each other of columns: it goes by the rows that an expert has on average.
    """
    depth, columns = b.shape[1:]
    shape = shape_of_tiles(routing.height, columns, descriptors)
    if not descriptors:
        return shape
    rows = max(1, routing.rows // routing.sizes.experts)
    return routing.comm.products.shape("grouped", rows, columns, depth, not b.is_contiguous(), shape)


def shape_of_tiles(height: int, columns: int, descriptors: bool) -> Shape:
    """The rule's shape of a product whose tiles have `height` rows."""
    if environment.emulated():
        return Shape(height, 32, 32, 1, 4, 1)
    if not descriptors:
        return Shape(height, 128, 32, 3, 8, 1)
    if height == 64 or columns <= 128:
        return Shape(height, 128, 64, 4, 4, 1)
    return Shape(height, 256, 64, 4, 8, 1)


def by_descriptors(b: torch.Tensor) -> bool:
    """Whether tensor descriptors can load b [experts, K, N] where it is: a step must not reach into the next expert's
    rows."""
    depth, columns = b.shape[1:]
    step = 32 if environment.emulated() else 64
    return depth % 8 == 0 and columns % 8 == 0 and (b.stride(2) != 1 or depth % step == 0)


def dense_stack(b: torch.Tensor) -> torch.Tensor:
    """b [experts, K, N] with all experts' rows, or columns, below each other, at a 16-byte aligned address."""
    return _aligned(b if b.is_contiguous() or b.transpose(1, 2).is_contiguous() else b.contiguous())


def stack(b: torch.Tensor, shape: Shape, descriptors: bool) -> Stack:
    """What `dense_stack` gave, as kernels take it."""
    _, depth, columns = b.shape
    if b.is_contiguous():
        return Stack(right(b.view(-1, columns), shape, descriptors), depth)
    return Stack(right(b.transpose(1, 2).reshape(-1, depth).t(), shape, descriptors), columns)


@triton.jit
def tile_at(tables, number, there):
    """Expert, first row, rows and distance of a tile; 0 if not `there`. Ordering: plain loads."""
    tile = tables.tiles + number * 4
    expert, row = tl.load(tile, mask=there, other=0), tl.load(tile + 1, mask=there, other=0)
    return expert, row, tl.load(tile + 2, mask=there, other=0), tl.load(tile + 3, mask=there, other=0)


@triton.jit
def grouped_product(
    a, row, live, b, first, column, N, K, b_row, b_column,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """fp32 [ROWS, COLUMNS]: rows of a [.., K] times columns `column` .. of one expert's b [K, N].

    a: LEFT: a tensor descriptor, of which rows `row` .. are taken; else pointers [ROWS] to the first elements of rows
    that may lie anywhere. live [ROWS]: which rows there are; others have any values, as have columns beyond N. b: the
    experts' matrices (see `Stack`), RIGHT: a tensor descriptor, else a pointer; `first`: where the expert's begins.
    Ordering: plain loads.
    """
    total = tl.zeros([live.shape[0], COLUMNS], tl.float32)
    j, inner = column + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    for k in tl.range(0, K, DEPTH, num_stages=STAGES):
        depth = k + inner
        if LEFT:
            of_a = a.load([row, k])
        else:
            of_a = tl.load(a[:, None] + depth[None, :], mask=live[:, None] & (depth < K)[None, :], other=0)
        if RIGHT:
            of_b = b.load([first + column, k]).T if TRANSPOSED else b.load([first + k, column])
        else:
            stacked = b + (tl.zeros([], tl.int64) + first) * (b_column if TRANSPOSED else b_row)
            at = stacked + j.to(tl.int64)[None, :] * b_column + depth.to(tl.int64)[:, None] * b_row
            of_b = tl.load(at, mask=(depth < K)[:, None] & (j < N)[None, :], other=0)
        total = tl.dot(of_a, of_b, total)
    return total


@triton.jit
def store_rows(c, row, height, column, N, width, total, DTYPE: tl.constexpr):
    """Stores the first `height` rows of a product at row `row` of c [.., width]. Ordering: plain stores."""
    i, j = tl.arange(0, total.shape[0]), column + tl.arange(0, total.shape[1])
    place = (row + i).to(tl.int64)[:, None] * width + j[None, :]
    tl.store(c + place, total.to(DTYPE), mask=(i < height)[:, None] & (j < width)[None, :])


@triton.jit
def have_experts_on(
    team, tables, token, tokens, most, pe,
    TOP_K: tl.constexpr, PLACES: tl.constexpr, LOCAL: tl.constexpr, SHARDED: tl.constexpr,
):  # fmt: skip
    """Which of this rank's tokens [n] have an expert on rank `pe`. Ordering: plain loads."""
    place = tl.arange(0, PLACES)
    entry = (team.rank * most + token)[:, None] * TOP_K + place[None, :]
    mask = (token < tokens)[:, None] & (place < TOP_K)[None, :]
    return going_to(tl.load(tables.idx + entry, mask=mask, other=-1), pe if SHARDED else 0, LOCAL) != 0
