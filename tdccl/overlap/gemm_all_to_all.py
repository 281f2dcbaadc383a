"""A product fused with all-to-all: every rank has rows of A and all of B, and gets all rows times its columns of B.

The projection before attention in Ulysses' sequence parallelism: from shards of the sequence to shards of the heads.
One launch: a persistent product computes the next rank's columns first and its own last. A tile for another rank is
stored straight into a slot there, with a signal; beside its own tiles each block copies those that have come.
"""

import torch
import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.communicator import Communicator, named
from tdccl.language import overlap
from tdccl.overlap.gemm import grouped, prepare, product
from tdccl.overlap.gemm_reduce_scatter import slot_of, wait_peers
from tdccl.overlap.workspace import check_matrices, check_out, exchange_columns, keep_operands, padded, workspace
from tdccl.runtime.launch import keyed

_UNIT = 16  # slots' rows are padded to so many elements, so that all their accesses are 16 bytes wide


def reference(comm: Communicator, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What `gemm_all_to_all` computes, one after the other."""
    pieces = torch.stack((a @ b).chunk(comm.size, dim=1))
    return comm.all_to_all(pieces).flatten(0, 1)


@triton.jit
def multiply_exchanged(
    team, epochs, signals, a, b, slots, odd, c, rows, N, columns, width, K, most, b_row, b_column,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """c [size * rows, columns] = all ranks' a [rows, K] times columns `rank * columns` .. of b [K, N].

    slots: Symmetric, [size sources, rows, width], in odd epochs from element `odd` on. A block takes the same tiles for
    every rank.

    Waits:    block b for block b of every peer, once a tile of its own columns.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    parities alternate. A rank starts a call when its last one has heard from all peers, who spoke in it only
              after they had ended the last but one, which read this parity.
    """
    epoch = overlap.begin(team, epochs)
    tiles_down, tiles_across = (rows + ROWS - 1) // ROWS, (columns + COLUMNS - 1) // COLUMNS
    start = (epoch & 1) * odd
    tiles = tiles_down * tiles_across
    for distance in range(1, team.size + 1):
        owner = (team.rank + distance) % team.size
        slot = shmem.symm_at(slots, owner, DTYPE) + (start + slot_of(team.rank, rows, width))
        for position in range(tl.program_id(0), tiles, tl.num_programs(0)):
            down, across = grouped(position, tiles_down, tiles_across, GROUP)
            height = tl.minimum(rows - down * ROWS, ROWS)
            total = product(
                a, down * ROWS, height, b, owner * columns + across * COLUMNS, N, K, b_row, b_column,
                ROWS, COLUMNS, DEPTH, STAGES, DESCRIPTORS, TRANSPOSED,
            ).to(DTYPE)  # fmt: skip
            i, j = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
            if owner == team.rank:
                place = c + (team.rank * rows + i).to(tl.int64)[:, None] * columns + j[None, :]
                tl.store(place, total, mask=(i < rows)[:, None] & (j < columns)[None, :])
                wait_peers(team, signals, position, most, epoch)
                for step in range(1, team.size):
                    source = (team.rank + step) % team.size
                    _copy_tile(
                        team, slots, start, source, c, down * ROWS, across * COLUMNS, rows, columns, width,
                        DTYPE, ROWS, COLUMNS,
                    )  # fmt: skip
            else:
                place = slot + i.to(tl.int64)[:, None] * width + j[None, :]
                tl.store(place, total, mask=(i < rows)[:, None] & (j < width)[None, :])
                shmem.fence()
                shmem.signal_op(shmem.symm_at(signals, owner, tl.int64, 8) + team.rank * most + position, epoch)
    overlap.end(epochs, epoch)


@triton.jit
def _copy_tile(
    team, slots, start, source, c, row, column, rows, columns, width,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copies a tile of a source's slot to its place in c. Ordering: plain accesses; wait before."""
    i, j = (row + tl.arange(0, ROWS)).to(tl.int64), column + tl.arange(0, COLUMNS)
    slot = shmem.symm_at(slots, team.rank, DTYPE) + (start + slot_of(source, rows, width))
    mask = (i < rows)[:, None]
    tile = tl.load(slot + i[:, None] * width + j[None, :], mask=mask & (j < width)[None, :])
    place = c + (source * rows + i)[:, None] * columns + j[None, :]
    tl.store(place, tile, mask=mask & (j < columns)[None, :])


def gemm_all_to_all(
    comm: Communicator, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """All ranks' rows of A times this rank's columns of B, communication hidden behind the product; current stream.

    a: [M, K] bfloat16 or float16, as many rows on every rank. b: [K, N] of that dtype, all of it on every rank, rows or
    columns contiguous (others are copied); N a multiple of the ranks, and piece r of its columns is rank r's: its
    heads. out: [size * M, N / size], rows in rank order, contiguous; None makes a new one, with a gradient. M, K and
    N / size may be any numbers. Sums are fp32. The first call of a larger size allocates symmetric memory, twice M x N,
    and is collective: it must not be in a graph's capture. Raises ArgumentError, and what any call of `comm` raises.
    """
    if out is None:
        return torch.ops.tdccl.gemm_all_to_all(a, b, comm.name)
    check_matrices("gemm_all_to_all", comm, a, b, columns=comm.size)
    shape = (comm.size * a.shape[0], b.shape[1] // comm.size)
    _compute(comm, a, b, check_out("gemm_all_to_all", out, shape, a))
    return out


def _compute(comm: Communicator, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if out.numel() == 0:
        return
    if a.shape[1] == 0:
        out.zero_()
        return
    (rows, depth), columns = a.shape, out.shape[1]
    operands = prepare(comm, a, b, rows, columns, comm.size)
    shape = operands.shape
    width = padded(columns, _UNIT)
    tiles = -(-rows // shape.rows) * -(-columns // shape.columns)
    blocks = comm.multiprocessors
    space = workspace(comm, "gemm_all_to_all", comm.size * rows * width, _UNIT, a.dtype, tiles, blocks)

    def multiply():
        keyed(multiply_exchanged)[(blocks,)](
            comm.team, space.epochs[0], space.signals_on_all_ranks, operands.left(operands.a),
            operands.b.operand, space.on_all_ranks, space.odd(_UNIT), out, rows, b.shape[1], columns, width, depth,
            space.most, *operands.b.strides, ROWS=shape.rows, **operands.constants(),
        )  # fmt: skip

    comm.start_fused("all_to_all", "gemm_all_to_all", a, multiply)


@torch.library.custom_op("tdccl::gemm_all_to_all", mutates_args=())
def _operator(a: torch.Tensor, b: torch.Tensor, comm: str) -> torch.Tensor:
    communicator = named(comm)
    check_matrices("gemm_all_to_all", communicator, a, b, columns=communicator.size)
    out = a.new_empty((communicator.size * a.shape[0], b.shape[1] // communicator.size))
    _compute(communicator, a, b, out)
    return out


@_operator.register_fake
def _fake(a, b, comm):
    size = named(comm).size
    return a.new_empty((size * a.shape[0], b.shape[1] // size))


def _gradients(ctx, gradient):
    """Of a: all columns' gradients, brought back to its rows, times the transposed b. Of b: a times these gradients."""
    a, b = ctx.saved_tensors
    of_a = of_b = None
    if ctx.needs_input_grad[0]:
        of_a = torch.ops.tdccl.all_to_all_gemm(gradient, b.t(), ctx.comm)
    if ctx.needs_input_grad[1]:
        of_b = a.t() @ exchange_columns(gradient, ctx.comm)
    return of_a, of_b, None


_operator.register_autograd(_gradients, setup_context=keep_operands)
