"""A product fused with all-reduce: every rank has A and B of its share of K, and gets the whole sum.

The product stores each tile that is done into a slot on another rank, with a signal; then what all ranks have stored
is added in rank order, by the same kernel, or by a second one after it or beside it:

one shot   a tile goes to all ranks, and each adds it up                        few rows
two shots  a tile goes to its owner, which adds it up and sends the sum to all  else; tiles belong to the ranks in turns

With few rows the product reads B and little else: all multiprocessors take equal shares of the steps of all tiles, and
the block that comes last to a tile adds up the shares (stream-K). In one shot the block with a tile's last step adds up
what the ranks have sent of it, in the same launch. With many rows tiles are whole, and the second kernel runs beside
the product on a few multiprocessors.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl import environment
from tdccl.communicator import Communicator, named
from tdccl.language import overlap
from tdccl.overlap.copies import side_of
from tdccl.overlap.gemm import (
    Shape,
    grouped,
    prepare,
    product,
    product_onto,
    shape_for,
)
from tdccl.overlap.pushers import few_of, left_by
from tdccl.overlap.workspace import Workspace, check_matrices, check_out, keep_operands, workspace
from tdccl.runtime.launch import keyed

FEW_ROWS = 32 if environment.emulated() else 256
# What one shot may send more than two: bytes that pass the link while two shots wait for each other once more.
ONE_SHOT_MORE = 1 << 10 if environment.emulated() else 1 << 20
# Blocks that add up beside a product of many rows; they wait for it, so it leaves them their multiprocessors.
FOLDERS = 1 if environment.emulated() else 16
FOLD_WARPS = 4, 16  # of a block that adds up, of few rows and of many
FOLDED = 8 if environment.emulated() else 16  # of few rows in two shots a block adds up so many at once
FOLDED_OF_ALL = 128  # of many so many of all ranks together, or fewer
FOLDED_ELEMENTS = 256 if environment.emulated() else 1 << 14  # of few in one shot of all ranks together, or fewer
_SHAPES_OF_FEW = {
    16: Shape(16, 64, 128, 7, 4, 8),
    32: Shape(32, 64, 128, 6, 4, 8),
    64: Shape(64, 64, 128, 5, 4, 8),
    128: Shape(128, 64, 128, 4, 8, 8),
    256: Shape(128, 128, 64, 6, 8, 8),
}
_UNIT = 16  # the odd half begins at a multiple of so many elements


def reference(comm: Communicator, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What `gemm_all_reduce` computes, one after the other."""
    return comm.all_reduce(a @ b)


@triton.jit
def multiply_shares(
    team, epochs, signals, slots, odd, a, b, c, partials, arrivals, M, N, K, share, most, b_row, b_column,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, ONE_SHOT: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """Sends the tiles of a [M, K] times b; each block takes `share` steps, of DEPTH of K, one tile after another.

    ONE_SHOT: the block also adds up, into c, FOLDED rows at once, the tiles whose last step was its. Else c is not
    touched.

    Waits:    for the blocks before it, all running, that have shares of its tiles; in one shot then for the same blocks
              of every peer, once for each tile.
    Ordering: stores, block barrier, release at sys scope on the tile's signals; acquire at sys scope, block barrier,
              loads; between the blocks of a tile `_join`.
    Reuse:    slots alternate by the parity of the epoch. A rank starts a call when its last one has ended, in which it
              has heard from all ranks, directly or through a tile's owner; and they spoke in it only after they had
              ended the last but one, which read this parity.
    """
    epoch = overlap.begin(team, epochs)
    tiles_down, tiles_across = (M + ROWS - 1) // ROWS, (N + COLUMNS - 1) // COLUMNS
    tiles, steps = tiles_down * tiles_across, (K + DEPTH - 1) // DEPTH
    at = tl.program_id(0) * share
    end = tl.minimum(at + share, tiles * steps)
    while at < end:
        tile, first = at // steps, at % steps
        last = tl.minimum(steps, first + end - at)
        down, across = grouped(tile, tiles_down, tiles_across, GROUP)
        height = tl.minimum(M - down * ROWS, ROWS)
        total = product_onto(
            tl.zeros([ROWS, COLUMNS], tl.float32), a, down * ROWS, height, b, 0, across * COLUMNS, N, K,
            first * DEPTH, tl.minimum(last * DEPTH, K), b_row, b_column,
            ROWS, COLUMNS, DEPTH, STAGES, DESCRIPTORS, TRANSPOSED,
        )  # fmt: skip
        done = last - first == steps
        if last - first < steps:
            total, done = _join(team, partials, arrivals, total, tile, height, steps, share, ROWS, COLUMNS)
        if done:
            _send_tile(
                team, signals, slots, (epoch & 1) * odd, total, tile, tiles, height, most, epoch,
                DTYPE, ROWS, COLUMNS, ONE_SHOT,
            )  # fmt: skip
        at += last - first
    if ONE_SHOT:
        for tile in range(tl.program_id(0) * share // steps, end // steps):
            down, across = grouped(tile, tiles_down, tiles_across, GROUP)
            height = tl.minimum(M - down * ROWS, ROWS)
            _wait_ranks(team, signals, tile, most, epoch)
            for row in range(0, height, FOLDED):
                _fold_into(
                    team, slots, (epoch & 1) * odd, c, tile, tiles, row, height, down, across, M, N,
                    DTYPE, ROWS, COLUMNS, FOLDED,
                )  # fmt: skip
        overlap.end(epochs + tl.num_programs(0), epoch)  # the kernel that is not launched keeps in step
    overlap.end(epochs, epoch)


@triton.jit
def _join(
    team, partials, arrivals, total, tile, height, steps, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Puts this block's share of a tile beside those of the others, which are the blocks before and after it.

    Returns the sum in the order of the blocks and True in the block that comes last, anything and False in the others.
    Where there are two, the last one's share stays in registers.

    Waits:    the last one, for those that came before it and are storing their shares.
    Ordering: stores, block barrier, release at gpu scope; acquire at sys scope, block barrier, loads.
    """
    place, mask = _rows_of_tile(0, height, ROWS, COLUMNS)
    first, last = tile * steps // share, ((tile + 1) * steps - 1) // share
    come, stored = arrivals + 2 * tile, arrivals + 2 * tile + 1
    done = tl.atomic_add(come, 1, sem="relaxed", scope="gpu") == last - first
    kept = done & (last - first == 1)  # the sum of two has the same bits in either order
    if not kept:
        tl.store(_share_of(partials, tl.program_id(0), tile, steps, share, ROWS * COLUMNS) + place, total, mask=mask)
        tl.debug_barrier()
        tl.atomic_add(stored, 1, sem="release", scope="gpu")
    if done:
        shmem.signal_wait(team, stored, tl.where(kept, 1, last - first + 1), team.rank)
        if kept:
            other = _share_of(partials, first + last - tl.program_id(0), tile, steps, share, ROWS * COLUMNS)
            total += tl.load(other + place, mask=mask, other=0)
        else:
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            for block in range(first, last + 1):
                of_block = _share_of(partials, block, tile, steps, share, ROWS * COLUMNS)
                total += tl.load(of_block + place, mask=mask, other=0)
        tl.store(come, 0)
        tl.store(stored, 0)
    return total, done


@triton.jit
def _share_of(partials, block, tile, steps, share, ELEMENTS: tl.constexpr):
    """Where a block keeps its share of a tile, which is the first or the last that it deals with. Ordering: none."""
    return partials + (block * 2 + (block * share // steps != tile).to(tl.int32)).to(tl.int64) * ELEMENTS


@triton.jit
def multiply_tiles(
    team, epochs, signals, slots, odd, a, b, M, N, K, most, b_row, b_column,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Sends the tiles of a [M, K] times b, each to its owner; a block takes whole tiles.

    Waits:    for nobody.
    Ordering: stores, block barrier, release at sys scope on the tile's signal.
    Reuse:    as `multiply_shares`.
    """
    epoch = overlap.begin(team, epochs)
    tiles_down, tiles_across = (M + ROWS - 1) // ROWS, (N + COLUMNS - 1) // COLUMNS
    tiles = tiles_down * tiles_across
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        down, across = grouped(tile, tiles_down, tiles_across, GROUP)
        height = tl.minimum(M - down * ROWS, ROWS)
        total = product(
            a, down * ROWS, height, b, across * COLUMNS, N, K, b_row, b_column,
            ROWS, COLUMNS, DEPTH, STAGES, DESCRIPTORS, TRANSPOSED,
        )  # fmt: skip
        _send_tile(
            team, signals, slots, (epoch & 1) * odd, total, tile, tiles, height, most, epoch,
            DTYPE, ROWS, COLUMNS, False,
        )  # fmt: skip
    overlap.end(epochs, epoch)


@triton.jit
def _send_tile(
    team, signals, slots, start, total, tile, tiles, height, most, epoch,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ONE_SHOT: tl.constexpr,
):  # fmt: skip
    """Stores a tile's `height` rows into this rank's slot on all ranks, or on the tile's owner, and tells them.

    Ordering: stores, block barrier, release at sys scope.
    """
    ranks = tl.arange(0, shmem.MAX_RANKS)
    if ONE_SHOT:
        index, of_rank, receivers = tile, tiles, ranks < team.size
    else:
        index, of_rank, receivers = tile // team.size, _owned(team, tiles), ranks == tile % team.size
    place, mask = _rows_of_tile(0, height, ROWS, COLUMNS)
    place += start + _slot(team.rank * of_rank + index, ROWS * COLUMNS)
    value = total.to(DTYPE)
    if ONE_SHOT:
        for distance in tl.static_range(1, team.size + 1):  # rank + 1 first: no two ranks on one target
            tl.store(shmem.symm_at(slots, (team.rank + distance) % team.size, DTYPE) + place, value, mask=mask)
    else:
        tl.store(shmem.symm_at(slots, tile % team.size, DTYPE) + place, value, mask=mask)
    _tell(signals, receivers, team.rank * most + index, epoch)


@triton.jit
def _owned(team, tiles):
    """How many tiles belong to a rank, at most: tile t is rank t % size's."""
    return (tiles + team.size - 1) // team.size


@triton.jit
def _slot(number, ELEMENTS: tl.constexpr):
    """Index (int64) of the first element of a slot."""
    return (tl.zeros([], tl.int64) + number) * ELEMENTS


@triton.jit
def _rows_of_tile(first, height, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr):
    """Places in a slot of HEIGHT rows of its tile from `first` on, and which of them are among the tile's `height`."""
    row, column = first + tl.arange(0, HEIGHT), tl.arange(0, COLUMNS)
    return row[:, None] * COLUMNS + column[None, :], (row < height)[:, None] & (column >= 0)[None, :]


@triton.jit
def _tell(signals, receivers, word, epoch):
    """Sets a signal on the ranks in the mask `receivers`. Ordering: block barrier, release at sys scope."""
    shmem.fence()
    addresses = tl.load(signals.bases + tl.arange(0, shmem.MAX_RANKS), mask=receivers, other=0) + signals.offset
    value = tl.full([shmem.MAX_RANKS], 0, tl.int64) + epoch
    pointers = addresses.to(tl.pointer_type(tl.int64)) + word
    tl.atomic_xchg(pointers, value, mask=receivers, sem="release", scope="sys")


@triton.jit
def fold_and_share(
    team, epochs, signals, slots, odd, c, M, N, most,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, FOLDED: tl.constexpr,
    HEIGHT: tl.constexpr,
):  # fmt: skip
    """c [M, N] = the sum of what all ranks have stored of each tile, in rank order.

    Each rank adds up its own tiles, and sends the sums to all; blocks take HEIGHT rows of a tile, FOLDED at once.

    Waits:    for what all ranks store of own tiles, by kernels that were launched earlier; block b for block b of every
              peer, once for each sum of theirs, after it has sent its own.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    see `multiply_shares`; the slots of sums follow those of tiles, and alternate with them.
    """
    epoch = overlap.begin(team, epochs)
    tiles_down, tiles_across = (M + ROWS - 1) // ROWS, (N + COLUMNS - 1) // COLUMNS
    owned, blocks = _owned(team, tiles_down * tiles_across), tl.num_programs(0)
    parts = (tl.minimum(M, ROWS) + HEIGHT - 1) // HEIGHT
    start = (epoch & 1) * odd
    sums = start + _slot(team.size * owned, ROWS * COLUMNS)
    for unit in range(tl.program_id(0), owned * parts + blocks, blocks):  # own ones, and the others' of one turn before
        tile, begin = unit // parts * team.size + team.rank, unit % parts * HEIGHT
        down, across = grouped(tile, tiles_down, tiles_across, GROUP)
        height = tl.minimum(M - down * ROWS, ROWS)
        if (tile < tiles_down * tiles_across) & (begin < height):
            _share_sum(
                team, signals, slots, start, sums, c, unit, parts, owned, down, across, height, M, N, most, epoch,
                DTYPE, ROWS, COLUMNS, FOLDED, HEIGHT,
            )  # fmt: skip
        for distance in tl.static_range(1, team.size):
            owner = (team.rank + team.size - distance) % team.size
            _take_sum(
                team, signals, slots, sums, c, unit - blocks, owner, parts, owned, M, N, most, epoch,
                DTYPE, ROWS, COLUMNS, GROUP, HEIGHT,
            )  # fmt: skip
    overlap.end(epochs, epoch)


@triton.jit
def _share_sum(
    team, signals, slots, start, sums, c, unit, parts, owned, down, across, height, M, N, most, epoch,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLDED: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Adds up a unit of an own tile when it has come, stores the sum here and on all peers, and tells them.

    Ordering: acquire at sys scope, block barrier, loads; stores, block barrier, release at sys scope.
    """
    index, begin = unit // parts, unit % parts * HEIGHT
    if _wait_ranks(team, signals, index, most, epoch):
        of_tile = sums + _slot(index * team.size + team.rank, ROWS * COLUMNS)
        for first in range(begin, tl.minimum(begin + HEIGHT, height), FOLDED):
            total = _fold_rows(team, slots, start, index, owned, first, height, DTYPE, ROWS, COLUMNS, FOLDED)
            place, mask = _rows_of_tile(first, height, FOLDED, COLUMNS)
            for distance in tl.static_range(1, team.size):
                pe = (team.rank + distance) % team.size
                tl.store(shmem.symm_at(slots, pe, DTYPE) + of_tile + place, total, mask=mask)
            _store_rows(c, total, down * ROWS + first, across * COLUMNS, M, N, FOLDED, COLUMNS)
        ranks = tl.arange(0, shmem.MAX_RANKS)
        _tell(signals, (ranks < team.size) & (ranks != team.rank), team.rank * most + owned + unit, epoch)


@triton.jit
def _take_sum(
    team, signals, slots, sums, c, unit, owner, parts, owned, M, N, most, epoch,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Copies a unit of an owner's sums into c once it is here. Ordering: acquire at sys scope, block barrier, loads."""
    tiles_down, tiles_across = (M + ROWS - 1) // ROWS, (N + COLUMNS - 1) // COLUMNS
    tile, begin = unit // parts * team.size + owner, unit % parts * HEIGHT
    down, across = grouped(tile, tiles_down, tiles_across, GROUP)
    height = tl.minimum(M - down * ROWS, ROWS)
    if (unit >= 0) & (tile < tiles_down * tiles_across) & (begin < height):
        word = shmem.symm_at(signals, team.rank, tl.int64, 8) + (owner * most + owned + unit)
        shmem.signal_wait(team, word, epoch, owner)
        mine = shmem.symm_at(slots, team.rank, DTYPE) + (sums + _slot(tile, ROWS * COLUMNS))
        place, mask = _rows_of_tile(begin, height, HEIGHT, COLUMNS)
        total = tl.load(mine + place, mask=mask)
        _store_rows(c, total, down * ROWS + begin, across * COLUMNS, M, N, HEIGHT, COLUMNS)


@triton.jit
def _wait_ranks(team, signals, index, most, epoch):
    """Waits for what all ranks store of a tile; whether it came. Ordering: acquire at sys scope, block barrier."""
    ranks = tl.arange(0, shmem.MAX_RANKS)
    pointers = shmem.symm_at(signals, team.rank, tl.int64, 8) + (ranks * most + index)
    targets = tl.full([shmem.MAX_RANKS], 0, tl.int64) + epoch
    return shmem.wait_counters(team, pointers, targets, ranks < team.size, shmem.USER, epoch)


@triton.jit
def _fold_rows(
    team, slots, start, index, of_rank, first, height,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """The sum, in rank order and fp32, of FOLDED rows of a tile from `first` on. Ordering: plain loads; wait before."""
    place, mask = _rows_of_tile(first, height, FOLDED, COLUMNS)
    base = shmem.symm_at(slots, team.rank, DTYPE) + start
    values = ()
    for source in tl.static_range(team.size):
        slot = base + _slot(source * of_rank + index, ROWS * COLUMNS)
        values = values + (tl.load(slot + place, mask=mask, other=0),)
    return shmem.fold(values, "sum", DTYPE)


@triton.jit
def _fold_into(
    team, slots, start, c, index, of_rank, first, height, down, across, M, N,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """`_fold_rows`, and stores them into c [M, N]. Ordering: plain loads and stores; wait before."""
    total = _fold_rows(team, slots, start, index, of_rank, first, height, DTYPE, ROWS, COLUMNS, FOLDED)
    _store_rows(c, total, down * ROWS + first, across * COLUMNS, M, N, FOLDED, COLUMNS)


@triton.jit
def _store_rows(c, total, row, column, M, N, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores some rows of a tile into c [M, N]. Ordering: plain stores."""
    i, j = (row + tl.arange(0, HEIGHT)).to(tl.int64), column + tl.arange(0, COLUMNS)
    tl.store(c + i[:, None] * N + j[None, :], total, mask=(i < M)[:, None] & (j < N)[None, :])


def gemm_all_reduce(
    comm: Communicator, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum over ranks of A times B on every rank, the same bits on all; on the current stream.

    a: [M, K] bfloat16 or float16, K this rank's share, as large on every rank. b: [K, N] of that dtype, rows or columns
    contiguous (others are copied). out: [M, N], contiguous; None makes a new one, with a gradient. M, N, K may be any
    numbers. Each rank's product is rounded to the dtype, as for all_reduce; they are added in fp32, in rank order: the
    same bits in every run.

    Gradients are those of a layer whose result all ranks go on with alike: that of the result is the same on all ranks,
    and nothing is communicated.

    The first call of a larger size allocates symmetric memory, up to four times M x N, of few rows twice the ranks
    times M x N, and is collective: it must not be in a graph's capture. Raises ArgumentError, and what any call of
    `comm` raises.
    """
    if out is None:
        return torch.ops.tdccl.gemm_all_reduce(a, b, comm.name)
    check_matrices("gemm_all_reduce", comm, a, b)
    _compute(comm, a, b, check_out("gemm_all_reduce", out, (a.shape[0], b.shape[1]), a))
    return out


def shape_of_few(rows: int, columns: int, descriptors: bool) -> Shape:
    """The rule's shape for a product of at most FEW_ROWS rows: narrow tiles while it is loading B that takes time, and
    as low as they can be, for rows that do not exist take time to load, too."""
    if environment.emulated():
        return shape_for(rows, columns, descriptors)
    shape = next(shape for upto, shape in _SHAPES_OF_FEW.items() if rows <= upto)
    return shape if descriptors else shape._replace(depth=32, stages=3)


def in_one_shot(rows: int, columns: int, itemsize: int, size: int) -> bool:
    """Whether all ranks add up everything; two ranks send no more by it than by two shots."""
    more = (size - 1) * (size - 2) / size
    return rows <= FEW_ROWS and more * rows * columns * itemsize <= ONE_SHOT_MORE


def share_of(tiles: int, steps: int, blocks: int) -> int:
    """How many steps a block takes of so many tiles of so many steps: whole tiles, or whole parts of one, where that
    leaves few blocks idle, for a tile that is cut has to be put together again."""
    share = -(-tiles * steps // blocks)
    parts = steps // share
    even = steps // parts if parts and steps % parts == 0 else -(-share // steps) * steps
    return even if even <= 1.08 * share else share


class Sums(NamedTuple):
    """How tiles are added up: in one shot or two, how many of them a rank owns, in two shots how many rows of one stand
    between two signals, and how many rows a block adds up at once."""

    one_shot: bool
    owned: int
    height: int
    folded: int

    @classmethod
    def of(cls, shape: Shape, tiles: int, few: bool, one_shot: bool, size: int, blocks: int) -> "Sums":
        power = (size - 1).bit_length()
        if one_shot:
            return cls(True, tiles, shape.rows, min(shape.rows, max(1, (FOLDED_ELEMENTS >> power) // shape.columns)))
        owned = -(-tiles // size)
        if not few:
            return cls(False, owned, shape.rows, min(FOLDED_OF_ALL >> power, shape.rows))
        height = FOLDED
        while height < shape.rows and owned * (shape.rows // height) > blocks:  # more than one turn for a block
            height *= 2
        return cls(False, owned, height, FOLDED)


def _compute(comm: Communicator, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if out.numel() == 0:
        return
    if a.shape[1] == 0:
        out.zero_()
        return
    (rows, columns), depth = out.shape, a.shape[1]
    few, blocks, folders = rows <= FEW_ROWS, comm.multiprocessors, few_of(comm, FOLDERS)
    multipliers = blocks if few else left_by("gemm_all_reduce", comm, folders)
    kind, rule = ("few", shape_of_few) if few else ("many", shape_for)
    operands = prepare(comm, a, b, rows, columns, kind=kind, rule=rule)
    shape = operands.shape
    tiles = -(-rows // shape.rows) * -(-columns // shape.columns)
    one_shot = in_one_shot(rows, columns, a.itemsize, comm.size)
    sums = Sums.of(shape, tiles, few, one_shot, comm.size, blocks)
    space = _space(comm, a.dtype, shape, tiles, sums, few, blocks)
    slots = (space.signals_on_all_ranks, space.on_all_ranks, space.odd(_UNIT))
    pair, layout = (operands.left(operands.a), operands.b.operand), (space.most, *operands.b.strides)
    how = operands.constants() | {"ROWS": shape.rows}
    steps = -(-depth // shape.depth)
    share = share_of(tiles, steps, blocks)

    def multiply():
        if few:
            keyed(multiply_shares)[(multipliers,)](
                comm.team, space.epochs[0], *slots, *pair, out, space.partials, space.arrivals, rows, columns, depth,
                share, *layout, ONE_SHOT=one_shot, FOLDED=sums.folded, **how,
            )  # fmt: skip
        else:
            keyed(multiply_tiles)[(multipliers,)](
                comm.team, space.epochs[0], *slots, *pair, rows, columns, depth, *layout, **how
            )  # fmt: skip

    def fold():
        if not one_shot:
            tiling = {name: how[name] for name in ("DTYPE", "ROWS", "COLUMNS", "GROUP")}
            keyed(fold_and_share)[(blocks if few else folders,)](
                comm.team, space.epochs[1], *slots, out, rows, columns, space.most,
                **tiling, FOLDED=sums.folded, HEIGHT=sums.height, num_warps=FOLD_WARPS[not few],
            )  # fmt: skip

    comm.start_fused("all_reduce", _name(few), a, lambda: _one_then_other(comm.device, multiply, fold, beside=not few))


def _name(few: bool) -> str:
    """Of a kind of call, and of its workspace: calls of a kind take equally many blocks, which keeps epochs equal."""
    return "gemm_all_reduce of few rows" if few else "gemm_all_reduce"


def _space(comm: Communicator, dtype, shape: Shape, tiles: int, sums: Sums, few: bool, blocks: int) -> Workspace:
    """Slots for the tiles of all ranks, then, in two shots, for the sums of all tiles; and a signal for each, or at
    least as many as tiles: so many words count the blocks that have come to a tile."""
    tile = shape.rows * shape.columns
    elements, signals = comm.size * sums.owned * tile, sums.owned
    if not sums.one_shot:
        elements += tiles * tile
        signals += sums.owned * (shape.rows // sums.height)
    partials = 2 * blocks * tile if few else 0
    return workspace(comm, _name(few), elements, _UNIT, dtype, max(signals, tiles), blocks, partials=partials)


def _one_then_other(device: torch.device, multiply, fold, beside: bool) -> None:
    """Launches both on the current stream, or, `beside`, the second on one of its own, for which the current waits."""
    if device.type != "cuda" or not beside:
        multiply()
        fold()
        return
    current = torch.cuda.current_stream(device)
    side = side_of(current)
    side.wait_stream(current)
    try:
        multiply()
        with torch.cuda.stream(side):
            fold()
    finally:
        current.wait_stream(side)


@torch.library.custom_op("tdccl::gemm_all_reduce", mutates_args=())
def _operator(a: torch.Tensor, b: torch.Tensor, comm: str) -> torch.Tensor:
    communicator = named(comm)
    check_matrices("gemm_all_reduce", communicator, a, b)
    out = a.new_empty((a.shape[0], b.shape[1]))
    _compute(communicator, a, b, out)
    return out


@_operator.register_fake
def _fake(a, b, comm):
    return a.new_empty((a.shape[0], b.shape[1]))


def _gradients(ctx, gradient):
    """Those of the product: the result's gradient is that of every rank's summand."""
    a, b = ctx.saved_tensors
    of_a = gradient @ b.t() if ctx.needs_input_grad[0] else None
    of_b = a.t() @ gradient if ctx.needs_input_grad[1] else None
    return of_a, of_b, None


_operator.register_autograd(_gradients, setup_context=keep_operands)
