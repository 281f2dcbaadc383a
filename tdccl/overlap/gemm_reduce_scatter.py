"""A product fused with reduce-scatter: every rank has A and B of its share of K, and gets its rows of the sum.

A persistent product computes the rows of the next rank first and its own last. What belongs to another rank goes into a
slot there: where it is much, copy engines move it piece by piece, as soon as a piece is done, else each tile is stored
there right away; a signal follows. To its own tiles each block then adds what all peers have sent, in rank order.
"""

import torch
import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.communicator import Communicator, named
from tdccl.language import overlap
from tdccl.overlap.copies import COPIERS, LEAST_BYTES, Copies, beside
from tdccl.overlap.gemm import grouped, prepare, product
from tdccl.overlap.workspace import check_matrices, check_out, gather_rows, keep_operands, padded, workspace
from tdccl.runtime.launch import keyed

_UNIT = 16  # slots' rows are padded to so many elements, so that all their accesses are 16 bytes wide


def reference(comm: Communicator, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What `gemm_reduce_scatter` computes, one after the other."""
    return comm.reduce_scatter(a @ b)


@triton.jit
def multiply_scattered(
    team, epochs, signals, a, b, slots, odd, staged, told, c, rows, N, width, K, most, b_row, b_column,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, FOLDED: tl.constexpr,
    COPIED: tl.constexpr,
):  # fmt: skip
    """c [rows, N] = the sum over ranks, in rank order, of their rows `rank * rows` .. of a [size * rows, K] times b.

    slots: Symmetric, [size sources, rows, width], in odd epochs from element `odd` on. COPIED: what belongs to other
    ranks is left in `staged` [size owners, rows, width], and `told` (*i64 [size, most]) counts the tiles of each piece
    of GROUP tiles' rows. Else a block takes the same tiles of every rank's rows, and stores them into their slots.

    Waits:    for every peer, once a tile of its own rows: for the same tile, or the piece that it is in.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    parities alternate. A rank starts a call when its last one has heard from all peers, who spoke in it only
              after they had ended the last but one, which read this parity. Copies wait until all ranks' last products
              are over.
    """
    epoch = overlap.begin(team, epochs)
    tiles_down, tiles_across = (rows + ROWS - 1) // ROWS, (N + COLUMNS - 1) // COLUMNS
    start = (epoch & 1) * odd
    tiles = tiles_down * tiles_across
    alone: tl.constexpr = team.size == 1  # there is nothing to add up: tiles go straight into c
    pitch = N if alone else width
    for distance in range(1, team.size + 1):
        owner = (team.rank + distance) % team.size
        slot = shmem.symm_at(slots, owner, DTYPE) + (start + slot_of(team.rank, rows, width))
        if alone:
            slot = c
        if COPIED and distance < team.size:
            slot = staged + slot_of(owner, rows, width)
        for position in range(tl.program_id(0), tiles, tl.num_programs(0)):
            down, across = grouped(position, tiles_down, tiles_across, GROUP)
            word = down // GROUP if COPIED else position
            height = tl.minimum(rows - down * ROWS, ROWS)
            total = product(
                a, owner * rows + down * ROWS, height, b, across * COLUMNS, N, K, b_row, b_column,
                ROWS, COLUMNS, DEPTH, STAGES, DESCRIPTORS, TRANSPOSED,
            )  # fmt: skip
            i, j = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
            place = slot + i.to(tl.int64)[:, None] * pitch + j[None, :]
            tl.store(place, total.to(DTYPE), mask=(i < rows)[:, None] & (j < pitch)[None, :])
            if owner == team.rank:
                wait_peers(team, signals, word, most, epoch)
                for first in range(0, 0 if alone else height, FOLDED):
                    _fold_rows(
                        team, slots, start, c, down * ROWS + first, across * COLUMNS, rows, N, width,
                        DTYPE, FOLDED, COLUMNS,
                    )  # fmt: skip
            else:
                shmem.fence()
                if COPIED:
                    shmem.signal_op(told + owner * most + word, 1, "add")
                else:
                    shmem.signal_op(shmem.symm_at(signals, owner, tl.int64, 8) + team.rank * most + word, epoch)
    overlap.end(epochs, epoch)


@triton.jit
def slot_of(source, rows, width):
    """Index (int64) of the first element of a source's slots."""
    return (tl.zeros([], tl.int64) + source) * rows * width


@triton.jit
def wait_peers(team, signals, word, most, epoch):
    """Waits for what all peers send of one tile or piece. Ordering: acquire at sys scope, then a block barrier."""
    ranks = tl.arange(0, shmem.MAX_RANKS)
    pointers = shmem.symm_at(signals, team.rank, tl.int64, 8) + (ranks * most + word)
    targets = tl.full([shmem.MAX_RANKS], 0, tl.int64) + epoch
    wanted = (ranks < team.size) & (ranks != team.rank)
    shmem.wait_counters(team, pointers, targets, wanted, shmem.USER, epoch)


@triton.jit
def _fold_rows(
    team, slots, start, c, row, column, rows, N, width,
    DTYPE: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds all sources' elements of HEIGHT rows in rank order, in fp32, into c. Ordering: plain loads; wait before."""
    i, j = (row + tl.arange(0, HEIGHT)).to(tl.int64), column + tl.arange(0, COLUMNS)
    base = shmem.symm_at(slots, team.rank, DTYPE) + start
    values = ()
    for source in tl.static_range(team.size):
        place = base + slot_of(source, rows, width) + i[:, None] * width + j[None, :]
        values = values + (tl.load(place, mask=(i < rows)[:, None] & (j < width)[None, :], other=0),)
    tl.store(
        c + i[:, None] * N + j[None, :], shmem.fold(values, "sum", DTYPE), mask=(i < rows)[:, None] & (j < N)[None, :]
    )


def gemm_reduce_scatter(
    comm: Communicator, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """This rank's rows of the sum over ranks of A times B, communication hidden behind the product; current stream.

    a: [M, K] bfloat16 or float16, M a multiple of the ranks, K this rank's share, which may be larger than others'; 0
    only if it is on all. b: [K, N] of that dtype, rows or columns contiguous (others are copied). out: [M / size, N],
    contiguous; None makes a new one, with a gradient.
    M / size, K and N may be any numbers. Each rank's product is rounded to the dtype, as for reduce_scatter; they are
    added in fp32, in rank order: the same bits in every run. The first call of a larger size allocates symmetric
    memory, twice M x N, and is collective: it must not be in a graph's capture. Raises ArgumentError, and what any call
    of `comm` raises.
    """
    if out is None:
        return torch.ops.tdccl.gemm_reduce_scatter(a, b, comm.name)
    check_matrices("gemm_reduce_scatter", comm, a, b, comm.size)
    shape = (a.shape[0] // comm.size, b.shape[1])
    _compute(comm, a, b, check_out("gemm_reduce_scatter", out, shape, a))
    return out


def _compute(comm: Communicator, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if out.numel() == 0:
        return
    if a.shape[1] == 0:
        out.zero_()
        return
    rows, columns = out.shape
    operands = prepare(comm, a, b, rows, columns, comm.size, shared=False)
    a, shape = operands.a, operands.shape
    depth = a.shape[1]
    width = padded(columns, _UNIT)
    tiles_down, tiles_across = -(-rows // shape.rows), -(-columns // shape.columns)
    blocks, elements = comm.multiprocessors, comm.size * rows * width
    copied = comm.size > 1 and blocks > COPIERS and rows * width * a.itemsize >= LEAST_BYTES
    words = -(-tiles_down // shape.group) if copied else tiles_down * tiles_across
    space = workspace(comm, "gemm_reduce_scatter", elements, _UNIT, a.dtype, words, blocks, copied)
    staged = a.new_empty(comm.size, rows, width) if copied else a

    copies = Copies(comm, space) if copied else None

    def copy():
        copies.meet()
        for owner in (*range(comm.rank + 1, comm.size), *range(comm.rank)):
            for piece, part in enumerate(staged[owner].split(shape.group * shape.rows)):
                copies.await_tiles(owner, piece, -(-len(part) // shape.rows) * tiles_across)
                first = comm.rank * rows + piece * shape.group * shape.rows
                copies.send(owner, part, first * width, piece)

    def multiply():
        keyed(multiply_scattered)[(blocks - COPIERS if copied else blocks,)](
            comm.team, space.epochs[0], space.signals_on_all_ranks, operands.left(a), operands.b.operand,
            space.on_all_ranks, space.odd(_UNIT), staged, space.told if copied else space.epochs, out, rows, columns,
            width, depth, space.most, *operands.b.strides,
            ROWS=shape.rows, FOLDED=min(16, shape.rows), COPIED=copied, **operands.constants(),
        )  # fmt: skip

    def together():
        beside(comm.device, copy, multiply, moving_first=False)

    comm.start_fused("reduce_scatter", "gemm_reduce_scatter", a, together if copied else multiply)


@torch.library.custom_op("tdccl::gemm_reduce_scatter", mutates_args=())
def _operator(a: torch.Tensor, b: torch.Tensor, comm: str) -> torch.Tensor:
    communicator = named(comm)
    check_matrices("gemm_reduce_scatter", communicator, a, b, communicator.size)
    out = a.new_empty((a.shape[0] // communicator.size, b.shape[1]))
    _compute(communicator, a, b, out)
    return out


@_operator.register_fake
def _fake(a, b, comm):
    return a.new_empty((a.shape[0] // named(comm).size, b.shape[1]))


def _gradients(ctx, gradient):
    """Of a: all ranks' gradients times the transposed b, gathered on the way. Of b: a times the gathered gradient."""
    a, b = ctx.saved_tensors
    of_a = of_b = None
    if ctx.needs_input_grad[0]:
        of_a = torch.ops.tdccl.all_gather_gemm(gradient, b.t(), ctx.comm)
    if ctx.needs_input_grad[1]:
        of_b = a.t() @ gather_rows(gradient, ctx.comm)
    return of_a, of_b, None


_operator.register_autograd(_gradients, setup_context=keep_operands)
