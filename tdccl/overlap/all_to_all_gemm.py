"""All-to-all fused with a product: every rank has all rows of its columns of A, and gets its rows of A times all of B.

The projection after attention in Ulysses' sequence parallelism: from shards of the heads back to shards of the
sequence. Two launches: a few blocks push the peers' rows tile by tile into their memory, and tell of each; beside them,
on the caller's stream, a persistent product starts each of its tiles with the own columns, and waits for the peers'.
"""

import math

import torch
import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.communicator import Communicator, named
from tdccl.errors import ArgumentError
from tdccl.language import overlap
from tdccl.overlap.copies import beside
from tdccl.overlap.gemm import grouped, prepare, product_onto
from tdccl.overlap.pushers import PUSH_WARPS, in_flight, left_by, pushers
from tdccl.overlap.workspace import check_operands, check_out, exchange_columns, keep_operands, padded, workspace
from tdccl.runtime.launch import keyed


def reference(comm: Communicator, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What `all_to_all_gemm` computes, one after the other."""
    return torch.cat(comm.all_to_all(a.contiguous()).chunk(comm.size), dim=1) @ b


@triton.jit
def push_rows(
    team, epochs, shards, signals, a, stride, gathered, odd,
    DTYPE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Block b pushes tiles b, b + B, .. of the peers' rows of a: the first tile of each of them, then the second, ..

    a: shards of `stride` rows, one for each rank. `gathered` has what each rank has pushed, as `shards` numbers it.

    Waits:    for nobody.
    Ordering: stores, block barrier, release at sys scope on the tile's signal.
    Reuse:    parities alternate. A rank launches this after its last product, which has heard from all peers' last
              pushes, and those came after the peers' last product but one, which read this parity.
    """
    epoch = overlap.begin(team, epochs)
    tiles, peers = overlap.tiles_of(shards), team.size - 1
    here = shmem.Symmetric(gathered.bases, gathered.offset + (epoch & 1) * odd * (DTYPE.primitive_bitwidth // 8))
    for position in range(tl.program_id(0), tiles * peers, tl.num_programs(0)):
        pe = (team.rank + 1 + position % peers) % team.size
        tile = team.rank * tiles + position // peers
        shard = a + (tl.zeros([], tl.int64) + pe) * stride * shards.columns
        overlap.push(shards, shard, here, tile, pe, DTYPE, PIECE)
        overlap.notify(shards, signals, tile, pe, epoch)
    overlap.end(epochs, epoch)


@triton.jit
def multiply_collected(
    team, epochs, shards, signals, a, stride, gathered, odd_row, b, c, N, K, b_row, b_column,
    DTYPE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """c [shards.rows, N] = the sum over ranks of their columns of this rank's rows times K rows of b [size * K, N].

    Own columns come from a, others from `gathered`. Sums begin with the own rank's and go on in rank order.

    Waits:    for the tile's rows, pushed by a kernel that every rank launches earlier.
    Ordering: acquire at sys scope, block barrier, loads.
    Reuse:    see `push_rows`.
    """
    epoch = overlap.begin(team, epochs)
    ROWS: tl.constexpr = shards.TILE
    tiles_down, tiles_across = overlap.tiles_of(shards), (N + COLUMNS - 1) // COLUMNS
    start_row = (epoch & 1).to(tl.int32) * odd_row
    for position in range(tl.program_id(0), tiles_down * tiles_across, tl.num_programs(0)):
        down, across = grouped(position, tiles_down, tiles_across, GROUP)
        height = tl.minimum(shards.rows - down * ROWS, ROWS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        total = product_onto(
            total, a, team.rank * stride + down * ROWS, height, b, team.rank * K, across * COLUMNS, N, K, 0, K, b_row,
            b_column, ROWS, COLUMNS, DEPTH, STAGES, DESCRIPTORS, TRANSPOSED,
        )  # fmt: skip
        for distance in range(1, team.size):
            source = (team.rank + distance) % team.size
            tile = source * tiles_down + down
            overlap.wait(team, shards, signals, tile, epoch)
            total = product_onto(
                total, gathered, start_row + tile * ROWS, height, b, source * K, across * COLUMNS, N, K, 0, K, b_row,
                b_column, ROWS, COLUMNS, DEPTH, STAGES, DESCRIPTORS, TRANSPOSED,
            )  # fmt: skip
        i, j = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
        place = c + i.to(tl.int64)[:, None] * N + j[None, :]
        tl.store(place, total.to(DTYPE), mask=(i < shards.rows)[:, None] & (j < N)[None, :])
    overlap.end(epochs, epoch)


def all_to_all_gemm(
    comm: Communicator, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """This rank's rows of A times B, where ranks have columns of A; communication hidden behind it; current stream.

    a: [M, K] bfloat16 or float16, all rows, M a multiple of the ranks, of this rank's columns. b: [size * K, N] of that
    dtype, all of it on every rank, rows or columns contiguous (others are copied); piece r of its rows belongs to the
    columns that rank r has. out: [M / size, N], contiguous; None makes a new one, with a gradient. M / size, K and N
    may be any numbers. Sums are fp32. The first call of a larger size allocates symmetric memory, twice M x K, and is
    collective: it must not be in a graph's capture. Raises ArgumentError, and what any call of `comm` raises.
    """
    if out is None:
        return torch.ops.tdccl.all_to_all_gemm(a, b, comm.name)
    _check(comm, a, b)
    shape = (a.shape[0] // comm.size, b.shape[1])
    _compute(comm, a, b, check_out("all_to_all_gemm", out, shape, a))
    return out


def _check(comm: Communicator, a: torch.Tensor, b: torch.Tensor) -> None:
    check_operands("all_to_all_gemm", comm, a, b)
    if a.dtype != b.dtype or comm.size * a.shape[1] != b.shape[0] or a.shape[0] % comm.size:
        raise ArgumentError(
            f"all_to_all_gemm: a is {a.dtype} {tuple(a.shape)}, b is {b.dtype} {tuple(b.shape)}; expected equal "
            f"dtypes, rows of a that {comm.size} ranks share, and {comm.size} times as many rows of b as a has columns"
        )


def _compute(comm: Communicator, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if out.numel() == 0:
        return
    depth = a.shape[1]
    if depth == 0:
        out.zero_()
        return
    rows, columns = out.shape
    operands = prepare(comm, a, b, rows, columns)
    shape = operands.shape
    a, stride = _aligned_shards(operands.a, comm.size)
    tiles = -(-rows // shape.rows)
    blocks, pushing = comm.multiprocessors, pushers(comm)
    multipliers = left_by("all_to_all_gemm", comm, pushing)
    elements, unit = comm.size * tiles * shape.rows * depth, math.lcm(depth, 8)  # whole rows and 16 bytes
    space = workspace(comm, "all_to_all_gemm", elements, unit, a.dtype, tiles, blocks)
    odd, shards = space.odd(unit), overlap.shards_of(rows, depth, shape.rows, space.most)
    gathered = space.buffer[: odd + elements].view(-1, depth)
    constants = operands.constants()

    def push():
        keyed(push_rows)[(pushing,)](
            comm.team, space.epochs[0], shards, space.signals_on_all_ranks, a, stride, space.on_all_ranks, odd,
            DTYPE=constants["DTYPE"], PIECE=in_flight(), num_warps=PUSH_WARPS,
        )  # fmt: skip

    def multiply():
        keyed(multiply_collected)[(multipliers,)](
            comm.team, space.epochs[1], shards, space.signals_on_all_ranks, operands.left(a), stride,
            operands.left(gathered), odd // depth, operands.b.operand, out, columns, depth, *operands.b.strides,
            **constants,
        )  # fmt: skip

    def together():
        beside(comm.device, push, multiply, moving_first=True)

    comm.start_fused("all_to_all", "all_to_all_gemm", a, together if pushing else multiply)


def _aligned_shards(a: torch.Tensor, size: int) -> tuple[torch.Tensor, int]:
    """`a` with rows added, if need be, so that each rank's begin at 16 bytes; and how many each then has."""
    rows, depth = a.shape[0] // size, a.shape[1]
    if rows * depth % 8 == 0:
        return a, rows
    stride = padded(rows, 8)
    shards = torch.nn.functional.pad(a.view(size, rows, depth), (0, 0, 0, stride - rows))
    return shards.view(size * stride, depth), stride


@torch.library.custom_op("tdccl::all_to_all_gemm", mutates_args=())
def _operator(a: torch.Tensor, b: torch.Tensor, comm: str) -> torch.Tensor:
    communicator = named(comm)
    _check(communicator, a, b)
    out = a.new_empty((a.shape[0] // communicator.size, b.shape[1]))
    _compute(communicator, a, b, out)
    return out


@_operator.register_fake
def _fake(a, b, comm):
    return a.new_empty((a.shape[0] // named(comm).size, b.shape[1]))


def _gradients(ctx, gradient):
    """Of a: all ranks' gradients times the transposed b, its columns sent to who has them. Of b: the rows of A that
    this rank has used, brought together again, times the gradient."""
    a, b = ctx.saved_tensors
    of_a = of_b = None
    if ctx.needs_input_grad[0]:
        of_a = torch.ops.tdccl.gemm_all_to_all(gradient, b.t(), ctx.comm)
    if ctx.needs_input_grad[1]:
        of_b = exchange_columns(a, ctx.comm).t() @ gradient
    return of_a, of_b, None


_operator.register_autograd(_gradients, setup_context=keep_operands)
