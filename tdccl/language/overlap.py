"""The tile layer: the author names a tile, a geometry says where it lies, on which rank, and which signal tells of it.

    from tdccl.language import overlap

A kernel that communicates is launched before the one that computes, or computes for its peers first. It moves a tile
and tells of it; the other waits for the tile and goes on with it:

    epoch = overlap.begin(team, epochs)
    overlap.push(shards, x, gathered, tile, pe, tl.bfloat16, 4096)  # stores: faster over a link than loads
    overlap.notify(shards, signals, tile, pe, epoch)
    ...
    overlap.wait(team, shards, signals, tile, epoch)
    overlap.end(epochs, epoch)

Push where the owner knows that the target is free: nobody waits before it, and stores need no answer. Pull where only
the reader knows what it needs, or where what it needs is less than the owner would send. Each is a few lines over the
shmem layer, to which a kernel may go down at any place.

Signals carry the epoch of the call, which only grows; each block of a kernel keeps it in device memory, so that a graph
replays. All launches of one kernel on the same `epochs` have the same grid.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from tdccl.language.signals import fence, signal_op, signal_wait, symm_at
from tdccl.language.target import device
from tdccl.language.team import if_sound


class Shards(NamedTuple):
    """A matrix of all ranks' rows, in symmetric memory: shard after shard, each of whole tiles. `shards_of` makes it.

    rows     i32: of each rank's shard; its last tile may have fewer than TILE
    columns  i32: elements of a row
    most     i32: how many tiles a shard may have at most, of all matrices that share the signals
    TILE     rows of a tile: tile t of rank r has number r * tiles + t, its first row is row number * TILE
    """

    rows: object
    columns: object
    most: object
    TILE: tl.constexpr


def shards_of(rows: int, columns: int, tile: int, most: int | None = None) -> Shards:
    """The kernel argument `shards`; most: None if nothing else shares the signals."""
    return Shards(rows, columns, -(-rows // tile) if most is None else most, tl.constexpr(tile))


@triton.jit
def begin(team, epochs):
    """The epoch of this call in this block, an int64. `epochs`: *i64, zeroed once, a word a block. Ordering: none."""
    return if_sound(team, tl.load(epochs + tl.program_id(0)) + 1)


@triton.jit
def end(epochs, epoch):
    """Closes the call in this block. Ordering: block barrier; all waits must be over."""
    tl.debug_barrier()
    tl.store(epochs + tl.program_id(0), epoch)


@triton.jit
def tiles_of(shards):
    """How many tiles a rank's shard has."""
    return (shards.rows + shards.TILE - 1) // shards.TILE


@triton.jit
def owner_of(shards, tile):
    """The rank whose rows a tile has."""
    return tile // tiles_of(shards)


@triton.jit
def offset_of(shards, tile):
    """Index (int64) of the first element of a tile in the matrix of all ranks."""
    return (tl.zeros([], tl.int64) + tile) * shards.TILE * shards.columns  # a tile may be a plain int


@triton.jit
def elements_of(shards, tile):
    """How many elements (int64) a tile has: the last of a shard may have fewer than the others."""
    first = (tile % tiles_of(shards)) * shards.TILE
    return tl.minimum(shards.rows - first, shards.TILE).to(tl.int64) * shards.columns


@triton.jit
def signal_of(shards, signals, tile, pe):
    """Pointer to the signal of a tile on rank `pe`. Ordering: none.

    One word is only ever set by one rank, whatever the matrix: a rank that is a call ahead must not pass for another.
    """
    word = owner_of(shards, tile) * shards.most + tile % tiles_of(shards)
    return symm_at(signals, pe, tl.int64, 8) + word


@triton.jit
def notify(shards, signals, tile, pe, epoch):
    """Tells rank `pe` that a tile is done. signals: Symmetric, int64 [size, shards.most].

    Ordering: block barrier, then release at sys scope: what the block did before is visible to who waits.
    """
    fence()
    signal_op(signal_of(shards, signals, tile, pe), epoch)


@triton.jit
def wait(team, shards, signals, tile, epoch):
    """Waits until the tile's owner has told this rank of it; returns whether it has.

    Ordering: acquire at sys scope, then a block barrier; tensor descriptors see it, too. Bounded as `signal_wait`.
    """
    seen = signal_wait(team, signal_of(shards, signals, tile, team.rank), epoch, owner_of(shards, tile))
    fence_descriptors(team.backend)
    return seen - epoch >= 0


@triton.jit
def is_there(team, shards, signals, tile, epoch):
    """Whether the tile's owner has told this rank of it: `wait` without waiting, of the same ordering if it has."""
    pointer = signal_of(shards, signals, tile, team.rank)
    seen = tl.atomic_add(pointer, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    fence_descriptors(team.backend)
    return seen - epoch >= 0


@triton.jit
def push(shards, shard, gathered, tile, pe, DTYPE: tl.constexpr, PIECE: tl.constexpr):
    """Copies a tile of this rank's `shard` (its first row; 16-byte aligned) to its place in `gathered` on rank `pe`.

    A tile of TILE rows is whole 16 bytes, but for the last of a shard.
    gathered: Symmetric. PIECE elements are in flight at once. Ordering: none; `notify` after it.
    """
    source = tl.multiple_of(shard + offset_of(shards, tile % tiles_of(shards)), 16)
    target = tl.multiple_of(symm_at(gathered, pe, DTYPE) + offset_of(shards, tile), 16)
    copy(source, target, elements_of(shards, tile), PIECE)


@triton.jit
def pull(shards, gathered, target, tile, pe, DTYPE: tl.constexpr, PIECE: tl.constexpr):
    """Copies a tile from its place in `gathered` on rank `pe` to the same place in this rank's `target` (16-byte
    aligned). Ordering: none; `wait` before it, and let `pe` not change the tile until it knows that it was read.
    """
    source = tl.multiple_of(symm_at(gathered, pe, DTYPE) + offset_of(shards, tile), 16)
    own = tl.multiple_of(target + offset_of(shards, tile), 16)
    copy(source, own, elements_of(shards, tile), PIECE)


@triton.jit
def copy(source, target, count, PIECE: tl.constexpr):
    """Copies `count` elements from one 16-byte aligned place to another: whole pieces 16 bytes wide, then the rest in
    smaller ones, for it takes a register an element. Ordering: none."""
    place = tl.arange(0, PIECE)
    whole = count // PIECE * PIECE
    for start in range(0, whole, PIECE):
        tl.store(target + start + place, tl.load(source + start + place))
    REST: tl.constexpr = PIECE // 4
    for start in range(whole, count, REST):
        index = start + tl.arange(0, REST)
        tl.store(target + index, tl.load(source + index, mask=index < count), mask=index < count)


def _host_fence(BACKEND):
    pass


@device(_host_fence)
def fence_descriptors(BACKEND: tl.constexpr):
    """After an acquire: loads by tensor descriptors see what was acquired, too. (They go another way than loads.)"""
    if BACKEND == "cuda":
        tl.inline_asm_elementwise(
            "{ fence.proxy.async.global; mov.u32 $0, 0; }", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


# ---- swizzles: in which order a rank works ------------------------------------------------------------------------


@triton.jit
def from_own_rank(team, position, tiles):
    """The tile at a position of the order that starts with the own rank's `tiles` tiles, then the next rank's, ...

    For consumers of an all-gather: own rows are there at once.
    """
    return (team.rank * tiles + position) % (tiles * team.size)


@triton.jit
def from_next_rank(team, position, tiles):
    """The order that starts with the next rank's tiles and ends with the own ones.

    For producers of a reduce-scatter: what must travel furthest in time leaves first, and no two ranks store to one.
    """
    return ((team.rank + 1) * tiles + position) % (tiles * team.size)


@triton.jit
def from_other_node(team, position, tiles, NODE: tl.constexpr):
    """The order that starts with the tiles of the next node's ranks and ends with the own node's, the own ones last.

    For producers of a reduce-scatter over nodes of NODE ranks: what crosses the network leaves first, and no two ranks
    of a node send to one rank at once.
    """
    step = position // tiles
    node = (team.rank // NODE + 1 + step // NODE) % (team.size // NODE)
    local = (team.rank + 1 + step) % NODE
    return (node * NODE + local) * tiles + position % tiles


@triton.jit
def straddling_last(team, position, rows, TILE: tl.constexpr):
    """The tile of TILE rows at a position, where shards of `rows` rows follow each other without gaps, so that tiles
    may straddle ranks: the own rank's whole tiles, the next ranks', and last those that need more than one rank."""
    total, straddling = _counts(team, rows, TILE)
    whole = _whole_tile(team, position, team.rank, rows, TILE)
    return tl.where(
        position < total - straddling, whole, _straddling_tile(team, position - total + straddling, rows, TILE)
    )


@triton.jit
def straddling_first(team, position, rows, TILE: tl.constexpr):
    """As `straddling_last`, for producers: first the tiles whose rows go to more than one rank, then the next rank's,
    the own ones last."""
    _, straddling = _counts(team, rows, TILE)
    whole = _whole_tile(team, position - straddling, (team.rank + 1) % team.size, rows, TILE)
    return tl.where(position < straddling, _straddling_tile(team, position, rows, TILE), whole)


@triton.jit
def _straddles(rank, rows, TILE: tl.constexpr):
    """1 if the first row of `rank` cuts a tile that no rank before it cuts, else 0."""
    row, before = rank * rows, (rank - 1) * rows
    return tl.where((row % TILE != 0) & ((before % TILE == 0) | (before // TILE != row // TILE)), 1, 0)


@triton.jit
def _counts(team, rows, TILE: tl.constexpr):
    """How many tiles there are, and how many of them straddle ranks."""
    straddling = 0
    for rank in tl.static_range(1, team.size):
        straddling += _straddles(rank, rows, TILE)
    return (rows * team.size + TILE - 1) // TILE, straddling


@triton.jit
def _straddling_tile(team, number, rows, TILE: tl.constexpr):
    """The straddling tile of that number."""
    found, seen = 0, 0
    for rank in tl.static_range(1, team.size):
        cut = _straddles(rank, rows, TILE)
        found = tl.where((cut == 1) & (seen == number), rank * rows // TILE, found)
        seen += cut
    return found


@triton.jit
def _whole_tile(team, number, first_rank, rows, TILE: tl.constexpr):
    """The tile of that number among those of one rank alone, counted from the first row of `first_rank`."""
    total, straddling = _counts(team, rows, TILE)
    first = (first_rank * rows + TILE - 1) // TILE
    before = first  # how many whole tiles come before it
    for rank in tl.static_range(1, team.size):
        before -= tl.where(rank * rows // TILE < first, _straddles(rank, rows, TILE), 0)
    tile = (before + number) % tl.maximum(total - straddling, 1)  # now its number among the whole ones by rows
    for rank in tl.static_range(1, team.size):
        tile += tl.where(rank * rows // TILE <= tile, _straddles(rank, rows, TILE), 0)
    return tile
