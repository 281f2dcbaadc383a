"""All-gather fused with a product: every rank has a shard of rows of A and its own B, and gets all A times its B.

The shard goes into all peers' memory piece by piece, each followed by a signal: by copy engines where it is large, else
by a few blocks. Beside them, on the caller's stream, a persistent product takes the own rows first, then those of the
next rank, whose owner sent them here first, and waits for each tile of rows when it comes to it.
"""

import math

import torch
import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl import environment
from tdccl.communicator import Communicator, named
from tdccl.language import overlap
from tdccl.overlap.copies import COPIERS, LEAST_BYTES, Copies, beside
from tdccl.overlap.gemm import grouped, prepare, product
from tdccl.overlap.pushers import PUSH_WARPS, in_flight, left_by, pushers
from tdccl.overlap.workspace import check_matrices, check_out, gather_rows, keep_operands, workspace
from tdccl.runtime.launch import keyed

# Tiles below each other that a copy engine moves together. Not the product's groups: those go by this rank's columns.
PIECE = 2 if environment.emulated() else 8


def reference(comm: Communicator, a_shard: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What `all_gather_gemm` computes, one after the other."""
    return comm.all_gather(a_shard.contiguous()) @ b


@triton.jit
def push_shard(
    team, epochs, shards, signals, shard, gathered, odd,
    DTYPE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Block b pushes tiles b, b + B, .. of this rank's shard: all to the rank before, then all to the one before that.

    Waits:    for nobody.
    Ordering: stores, block barrier, release at sys scope on the tile's signal.
    Reuse:    parities alternate. A rank launches this after its last product, which has heard from all peers' last
              pushes, and those came after the peers' last product but one, which read this parity.
    """
    epoch = overlap.begin(team, epochs)
    tiles = overlap.tiles_of(shards)
    here = shmem.Symmetric(gathered.bases, gathered.offset + (epoch & 1) * odd * (DTYPE.primitive_bitwidth // 8))
    for position in range(tl.program_id(0), tiles * (team.size - 1), tl.num_programs(0)):
        pe = (team.rank + team.size - 1 - position // tiles) % team.size
        tile = team.rank * tiles + position % tiles
        overlap.push(shards, shard, here, tile, pe, DTYPE, PIECE)
        overlap.notify(shards, signals, tile, pe, epoch)
    overlap.end(epochs, epoch)


@triton.jit
def multiply_gathered(
    team, epochs, shards, pieces, signals, a, gathered, odd_row, b, c, N, K, b_row, b_column,
    DTYPE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """c [size * shards.rows, N] = all ranks' rows times b; own rows from `a`, others from `gathered` when they come.

    pieces: the shards again, in tiles of as many rows as one signal tells of.

    Waits:    for the tile's piece, which its owner pushes or copies beside its own product.
    Ordering: acquire at sys scope, block barrier, loads.
    Reuse:    see `push_shard`; copies wait until all ranks' last products are over.
    """
    epoch = overlap.begin(team, epochs)
    ROWS: tl.constexpr = shards.TILE
    rows = shards.rows
    whole = team.rank  # the last rank of which all is known to be here
    tiles_down, tiles_across = overlap.tiles_of(shards), (N + COLUMNS - 1) // COLUMNS
    of_rank = tiles_down * tiles_across
    # Two loops have what is in flight in the same shared memory; branches of one loop would take twice as much.
    for position in range(tl.program_id(0), of_rank, tl.num_programs(0)):
        down, across = grouped(position, tiles_down, tiles_across, GROUP)
        _multiply_tile(
            a, down * ROWS, team.rank, down, across, b, c, rows, N, K, b_row, b_column,
            DTYPE, ROWS, COLUMNS, DEPTH, STAGES, DESCRIPTORS, TRANSPOSED,
        )  # fmt: skip
    for position in range(_first_from(of_rank), of_rank * team.size, tl.num_programs(0)):
        owner = (team.rank + position // of_rank) % team.size
        down, across = grouped(position % of_rank, tiles_down, tiles_across, GROUP)
        tile = owner * tiles_down + down
        if owner != whole:
            first = owner * overlap.tiles_of(pieces)
            overlap.wait(team, pieces, signals, first + down * ROWS // pieces.TILE, epoch)
            if COPIED:  # one piece after the other
                last = first + overlap.tiles_of(pieces) - 1
                whole = tl.where(overlap.is_there(team, pieces, signals, last, epoch), owner, whole)
        row = (epoch & 1).to(tl.int32) * odd_row + tile * ROWS
        _multiply_tile(
            gathered, row, owner, down, across, b, c, rows, N, K, b_row, b_column,
            DTYPE, ROWS, COLUMNS, DEPTH, STAGES, DESCRIPTORS, TRANSPOSED,
        )  # fmt: skip
    overlap.end(epochs, epoch)


@triton.jit
def _first_from(start):
    """The first position of this block that is not before `start`."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    return block + (tl.maximum(start - block, 0) + blocks - 1) // blocks * blocks


@triton.jit
def _multiply_tile(
    a, row, owner, down, across, b, c, rows, N, K, b_row, b_column,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One tile of c: rows `row` .. of a, which are tile `down` of the owner's shard. Ordering: plain accesses."""
    height = tl.minimum(rows - down * ROWS, ROWS)
    total = product(
        a, row, height, b, across * COLUMNS, N, K, b_row, b_column,
        ROWS, COLUMNS, DEPTH, STAGES, DESCRIPTORS, TRANSPOSED,
    )  # fmt: skip
    i, j = tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    place = (owner * rows + down * ROWS + i).to(tl.int64)[:, None] * N + j[None, :]
    tl.store(c + place, total.to(DTYPE), mask=(i < height)[:, None] & (j < N)[None, :])


def all_gather_gemm(
    comm: Communicator, a_shard: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """All ranks' rows of A times this rank's B, communication hidden behind the product; on the current stream.

    a_shard: [M / size, K] bfloat16 or float16, as many rows on every rank. b: [K, N] of that dtype, rows or columns
    contiguous (others are copied); ranks may have different N, 0 only if all have. out: [M, N], contiguous; None makes
    a new one, with a gradient. M / size, K and N may be any numbers. Sums are fp32. The first call of a larger size
    allocates symmetric memory, twice M x K, and is collective: it must not be in a graph's capture. Raises
    ArgumentError, and what any call of `comm` raises.
    """
    if out is None:
        return torch.ops.tdccl.all_gather_gemm(a_shard, b, comm.name)
    check_matrices("all_gather_gemm", comm, a_shard, b)
    shape = (comm.size * a_shard.shape[0], b.shape[1])
    _compute(comm, a_shard, b, check_out("all_gather_gemm", out, shape, a_shard))
    return out


def _compute(comm: Communicator, a_shard: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if out.numel() == 0:
        return
    if a_shard.shape[1] == 0:
        out.zero_()
        return
    (rows, depth), columns = a_shard.shape, b.shape[1]
    operands = prepare(comm, a_shard, b, rows, columns, comm.size)
    a_shard, shape = operands.a, operands.shape
    tiles = comm.size * -(-rows // shape.rows)
    copied = comm.size > 1 and a_shard.numel() * a_shard.itemsize >= LEAST_BYTES
    others = COPIERS if copied else pushers(comm)
    blocks, multipliers = comm.multiprocessors, left_by("all_gather_gemm", comm, others)
    elements, most = tiles * shape.rows * depth, -(-rows // shape.rows)
    unit = math.lcm(depth, 8)  # whole rows and 16 bytes
    space = workspace(comm, "all_gather_gemm", elements, unit, a_shard.dtype, most, blocks, copied)
    height = shape.rows * (PIECE if copied else 1)
    pieces = overlap.shards_of(rows, depth, height, space.most)
    odd, shards = space.odd(unit), overlap.shards_of(rows, depth, shape.rows, space.most)
    gathered = space.buffer[: odd + elements].view(-1, depth)
    first = comm.rank * -(-rows // shape.rows) * shape.rows  # row of the own shard in all peers' memory
    constants = operands.constants()

    copies = Copies(comm, space) if copied else None

    def copy():
        copies.meet()
        for pe in (*range(comm.rank - 1, -1, -1), *range(comm.size - 1, comm.rank, -1)):
            for piece, part in enumerate(a_shard.split(height)):
                copies.send(pe, part, (first + piece * height) * depth, piece)

    def push():
        keyed(push_shard)[(others,)](
            comm.team, space.epochs[0], shards, space.signals_on_all_ranks, a_shard, space.on_all_ranks, odd,
            DTYPE=constants["DTYPE"], PIECE=in_flight(), num_warps=PUSH_WARPS,
        )  # fmt: skip

    def multiply():
        keyed(multiply_gathered)[(multipliers,)](
            comm.team, space.epochs[1], shards, pieces, space.signals_on_all_ranks, operands.left(a_shard),
            operands.left(gathered), odd // depth, operands.b.operand, out, columns, depth, *operands.b.strides,
            COPIED=copied, **constants,
        )  # fmt: skip

    def together():
        beside(comm.device, copy if copied else push, multiply, moving_first=not copied)

    comm.start_fused("all_gather", "all_gather_gemm", a_shard, together if others else multiply)


@torch.library.custom_op("tdccl::all_gather_gemm", mutates_args=())
def _operator(a_shard: torch.Tensor, b: torch.Tensor, comm: str) -> torch.Tensor:
    communicator = named(comm)
    check_matrices("all_gather_gemm", communicator, a_shard, b)
    out = a_shard.new_empty((communicator.size * a_shard.shape[0], b.shape[1]))
    _compute(communicator, a_shard, b, out)
    return out


@_operator.register_fake
def _fake(a_shard, b, comm):
    return a_shard.new_empty((named(comm).size * a_shard.shape[0], b.shape[1]))


def _gradients(ctx, gradient):
    """Of the shard: the product's, reduced and scattered. Of b: all rows, gathered again, times the gradient."""
    a_shard, b = ctx.saved_tensors
    of_shard = of_b = None
    if ctx.needs_input_grad[0]:
        of_shard = torch.ops.tdccl.gemm_reduce_scatter(gradient, b.t(), ctx.comm)
    if ctx.needs_input_grad[1]:
        of_b = gather_rows(a_shard, ctx.comm).t() @ gradient
    return of_shard, of_b, None


_operator.register_autograd(_gradients, setup_context=keep_operands)
