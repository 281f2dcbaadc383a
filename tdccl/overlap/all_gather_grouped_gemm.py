"""All-gather, or dispatch, fused with the experts' products: all ranks' rows times the matrices of their experts.

Two launches: a few blocks push this rank's tokens to those that have an expert for them, first to the rank before;
beside them, on the caller's stream, a persistent product takes the tiles in the order in which their rows arrive. Rows
are not sorted in memory: the product fetches each from where it lies.
"""

import itertools
import math

import torch
import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl import environment
from tdccl.communicator import named
from tdccl.language import overlap
from tdccl.overlap.copies import beside
from tdccl.overlap.gemm import DTYPES, dense
from tdccl.overlap.grouped import (
    by_descriptors,
    check_grouped,
    dense_stack,
    grouped_product,
    have_experts_on,
    shape_of,
    stack,
    store_rows,
    tile_at,
)
from tdccl.overlap.grouped_gradient import grouped_gradient
from tdccl.overlap.pushers import left_by, pushers
from tdccl.overlap.routing import Routing, Sizes, padded_tokens
from tdccl.overlap.workspace import check_out, workspace
from tdccl.runtime.launch import keyed

PUSH_WARPS = 16
# Tokens and elements of each that a pusher has in flight.
PUSH_TOKENS, PUSH_COLUMNS = (8, 64) if environment.emulated() else (16, 2048)


def reference(routing: Routing, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What `all_gather_grouped_gemm` computes, one after the other, for the rows that there are; waits on the host."""
    sizes = routing.sizes
    offsets = routing.offsets.tolist()
    rows = routing.comm.all_gather(padded_tokens(x, sizes.most))[routing.source[: offsets[-1]] // sizes.top_k]
    return torch.cat([rows[begin:end] @ b[e] for e, (begin, end) in enumerate(itertools.pairwise(offsets))])


@triton.jit
def push_tokens(
    team, epochs, tables, signals, x, gathered, odd, tokens, most, word_row, K,
    DTYPE: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, LOCAL: tl.constexpr, SHARDED: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Block b pushes token tiles b, b + B, .. of x [tokens, K]: all to the rank before, then to the one before that.

    Only tokens that have an expert there. Each block adds 1 to this rank's signal there when its last one has left.

    Waits:    for nobody.
    Ordering: stores, block barrier, release at sys scope.
    Reuse:    parities alternate. A rank launches this after its last product, which has heard from all peers' last
              pushes, and those came after the peers' last product but one, which read this parity.
    """
    epoch = overlap.begin(team, epochs)
    tiles = (tokens + TOKENS - 1) // TOKENS
    for distance in range(1, team.size):
        pe = (team.rank + team.size - distance) % team.size
        target = shmem.symm_at(gathered, pe, DTYPE) + ((epoch & 1) * odd + _elements(team.rank * most, K))
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            token = tile * TOKENS + tl.arange(0, TOKENS)
            goes = have_experts_on(team, tables, token, tokens, most, pe, TOP_K, PLACES, LOCAL, SHARDED)
            for column in range(0, K, COLUMNS):
                j = column + tl.arange(0, COLUMNS)
                offset = token.to(tl.int64)[:, None] * K + j[None, :]
                mask = goes[:, None] & (j < K)[None, :]
                tl.store(target + offset, tl.load(x + offset, mask=mask), mask=mask)
        shmem.fence()
        shmem.signal_op(shmem.symm_at(signals, pe, tl.int64, 8) + team.rank * word_row, 1, "add")
    overlap.end(epochs, epoch)


@triton.jit
def _elements(rows, columns):
    """rows * columns as int64."""
    return (tl.zeros([], tl.int64) + rows) * columns


@triton.jit
def _wait_for_distances(team, signals, word_row, first, last, target):
    """Waits until the ranks at distances first .. last have pushed all. Ordering: as `signal_wait`."""
    for distance in range(first, last + 1):
        source = (team.rank + distance) % team.size
        shmem.signal_wait(team, shmem.symm_at(signals, team.rank, tl.int64, 8) + source * word_row, target, source)


@triton.jit
def _either(first, one, other, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers `one` where `first` holds, else `other`; ALIGNED: to 16 bytes, which the choice would hide."""
    address = tl.where(first, one.to(tl.int64), other.to(tl.int64))
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16 if ALIGNED else 2)


@triton.jit
def _rows_at(tables, position, positions, tiles_across, ROWS: tl.constexpr, TOP_K: tl.constexpr):
    """Expert, first row, rows, distance and tokens [ROWS] of the tile at a position. Ordering: plain loads.

    Looked up a tile ahead, so that the product before hides it.
    """
    expert, row, height, distance = tile_at(tables, position // tiles_across, position < positions)
    i = tl.arange(0, ROWS)
    return expert, row, height, distance, tl.load(tables.source + row + i, mask=i < height, other=0) // TOP_K


@triton.jit
def multiply_arriving(
    team, epochs, tables, signals, x, gathered, odd, b, step, c, pushers, most, word_row, N, K, b_row, b_column,
    DTYPE: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """c [rows, N] = each row times its expert's matrix; own tokens from `x`, others from `gathered` when they come.

    b: the experts' matrices, `step` rows each (see `Stack`). gathered: this rank's, odd epochs from element `odd` on.

    Waits:    for the `pushers` blocks of each rank whose tokens a tile has, launched earlier there; at the end for all.
    Ordering: acquire at sys scope, block barrier, loads.
    Reuse:    see `push_tokens`.
    """
    epoch = overlap.begin(team, epochs)
    target = epoch * pushers
    tiles_across = (N + COLUMNS - 1) // COLUMNS
    positions = tl.load(tables.stages + team.size) * tiles_across
    heard = 0
    landed = gathered + (epoch & 1) * odd
    i = tl.arange(0, ROWS)
    following = _rows_at(tables, tl.program_id(0), positions, tiles_across, ROWS, TOP_K)
    for position in range(tl.program_id(0), positions, tl.num_programs(0)):
        expert, row, height, distance, token = following
        following = _rows_at(tables, position + tl.num_programs(0), positions, tiles_across, ROWS, TOP_K)
        _wait_for_distances(team, signals, word_row, heard + 1, distance, target)
        heard = tl.maximum(heard, distance)
        live = i < height
        own = x + (token - team.rank * most).to(tl.int64) * K
        rows = _either(token // most == team.rank, own, landed + token.to(tl.int64) * K, DTYPE, DESCRIPTORS)
        column = position % tiles_across * COLUMNS
        total = grouped_product(
            rows, 0, live, b, expert * step, column, N, K, b_row, b_column,
            COLUMNS, DEPTH, STAGES, False, DESCRIPTORS, TRANSPOSED,
        )  # fmt: skip
        store_rows(c, row, height, column, N, N, total, DTYPE)
    _wait_for_distances(team, signals, word_row, heard + 1, team.size - 1, target)
    overlap.end(epochs, epoch)


def all_gather_grouped_gemm(
    x: torch.Tensor, b: torch.Tensor, routing: Routing, out: torch.Tensor | None = None
) -> torch.Tensor:
    """All ranks' tokens times this rank's part of their experts, communication hidden behind it; on the current stream.

    x: [tokens, K] bfloat16 or float16, this rank's. b: [experts here, K, N] of that dtype, either of the last two
    dimensions contiguous (others are copied). routing: of `route`, or of `route_experts`: then tokens go only to the
    ranks of their experts (dispatch + grouped GEMM). out: [routing.rows, N], contiguous; None makes a new one, with a
    gradient, for which ranks must have equal N. Returns it: rows by expert as `routing.offsets` says; what they are of,
    `routing.source`. Rows past the last are left as they are. Sums are fp32. The first call of a larger size allocates
    symmetric memory, twice the tokens of all ranks x K, and is collective: it must not be in a graph's capture. Raises
    ArgumentError, and what any call of the communicator raises.
    """
    if out is None:
        return torch.ops.tdccl.all_gather_grouped_gemm(x, b, routing.memory, routing.comm.name, list(routing.sizes))
    check_grouped("all_gather_grouped_gemm", x, routing.sizes.tokens, b, routing)
    check_out("all_gather_grouped_gemm", out, (routing.rows, b.shape[2]), x)
    _compute(x, b, routing, out)
    return out


def _compute(x: torch.Tensor, b: torch.Tensor, routing: Routing, out: torch.Tensor) -> None:
    if out.numel() == 0:
        return
    if x.shape[1] == 0:
        out.zero_()
        return
    comm, sizes = routing.comm, routing.sizes
    x, b = dense(x), dense_stack(b)
    depth, columns = b.shape[1:]
    descriptors = by_descriptors(b)
    shape = shape_of(b, routing, descriptors)
    blocks, pushing = comm.multiprocessors, pushers(comm)
    multipliers = left_by("all_gather_grouped_gemm", comm, pushing)
    unit = math.lcm(depth, 8)  # whole rows and 16 bytes
    elements = comm.size * sizes.most * depth
    space = workspace(comm, "all_gather_grouped_gemm", elements, unit, x.dtype, 1, blocks)
    odd, of_b = space.odd(unit), stack(b, shape, descriptors)

    def push():
        keyed(push_tokens)[(pushing,)](
            comm.team, space.epochs[0], routing.tables, space.signals_on_all_ranks, x, space.on_all_ranks, odd,
            sizes.tokens, sizes.most, space.most, depth, DTYPE=DTYPES[x.dtype], **routing.constants(),
            SHARDED=bool(sizes.sharded), TOKENS=PUSH_TOKENS, COLUMNS=PUSH_COLUMNS, num_warps=PUSH_WARPS,
        )  # fmt: skip

    def multiply():
        keyed(multiply_arriving)[(multipliers,)](
            comm.team, space.epochs[1], routing.tables, space.signals_on_all_ranks, x, space.buffer, odd,
            of_b.right.operand, of_b.step, out, pushing, sizes.most, space.most, columns, depth, *of_b.right.strides,
            DTYPE=DTYPES[x.dtype], TOP_K=sizes.top_k, ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth,
            STAGES=shape.stages, DESCRIPTORS=descriptors, TRANSPOSED=of_b.right.transposed, num_warps=shape.warps,
        )  # fmt: skip

    comm.start_fused(
        "all_gather",
        "all_gather_grouped_gemm",
        x,
        lambda: beside(comm.device, push, multiply, moving_first=True) if pushing else multiply(),
    )


@torch.library.custom_op("tdccl::all_gather_grouped_gemm", mutates_args=())
def _operator(x: torch.Tensor, b: torch.Tensor, memory: torch.Tensor, comm: str, sizes: list[int]) -> torch.Tensor:
    routing = Routing(named(comm), Sizes(*sizes), memory, None)
    check_grouped("all_gather_grouped_gemm", x, routing.sizes.tokens, b, routing)
    out = x.new_empty(routing.rows, b.shape[2])
    _compute(x, b, routing, out)
    return out


@_operator.register_fake
def _fake(x, b, memory, comm, sizes):
    return x.new_empty(Routing(named(comm), Sizes(*sizes), memory, None).rows, b.shape[2])


def _keep(ctx, inputs, output):
    x, b, memory, ctx.comm, ctx.sizes = inputs
    ctx.save_for_backward(x, b, memory)


def _gradients(ctx, gradient):
    """Of the tokens: the rows' gradients times the transposed b, reduced and scattered. Of b: all tokens, gathered
    again, times the rows' gradients."""
    x, b, memory = ctx.saved_tensors
    of_x = of_b = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.tdccl.grouped_gemm_reduce_scatter(
            gradient, b.transpose(1, 2), memory, None, ctx.comm, ctx.sizes
        )
    if ctx.needs_input_grad[1]:
        of_b = grouped_gradient(x, gradient, memory, ctx.comm, ctx.sizes, True)
    return of_x, of_b, None, None, None


_operator.register_autograd(_gradients, setup_context=_keep)
