"""Attention of a sequence that is sharded over the ranks: every rank has a shard of queries, keys and values.

A few blocks push the keys and values tile by tile into all peers' memory, and tell of each; beside them, on the
caller's stream, a persistent kernel attends with its queries to its own keys first, then to those of the next rank,
whose owner sent them here first, and waits for each tile of keys when it comes to it. Where the few have pushed, more
blocks of that kernel help afterwards; all take tiles of queries by tickets.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import tdccl.language as shmem
from tdccl import environment
from tdccl.communicator import Communicator, named
from tdccl.errors import ArgumentError
from tdccl.language import overlap
from tdccl.overlap.attention import LOG2_E, attend, check_heads, log_sum, mean, no_keys, scale_of, see
from tdccl.overlap.copies import beside
from tdccl.overlap.gemm import DTYPES, dense
from tdccl.overlap.pushers import PUSH_WARPS, in_flight, pushers
from tdccl.overlap.workspace import check_out, workspace
from tdccl.runtime.launch import keyed


class Shape(NamedTuple):
    """Queries of a tile, keys of a step, steps in flight, warps of a block, blocks on a multiprocessor together, and
    keys of a tile that is told of."""

    rows: int
    keys: int
    stages: int
    warps: int
    resident: int
    told: int


def shape_for(dim: int) -> Shape:
    """The shape for heads of that size. All ranks must cut alike, so it depends on nothing else."""
    if environment.emulated():
        return Shape(16, 16, 1, 4, 1, 32)
    return Shape(64, 128, 3, 4, 2, 512) if dim <= 64 else Shape(128, 128, 3, 8, 1, 512)


def reference(
    comm: Communicator, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, zigzag: bool, scale: float
) -> torch.Tensor:
    """What `gather_kv_attention` computes, one after the other."""
    keys, values = (torch.cat(comm.all_gather(each[None].contiguous()).unbind(), dim=1) for each in (k, v))
    places = torch.cat([positions(comm, rank, q.shape[1], zigzag) for rank in range(comm.size)])
    mine = positions(comm, comm.rank, q.shape[1], zigzag)
    seen = (places[None] <= mine[:, None]) if causal else torch.ones_like(places, dtype=torch.bool)
    return attend(q, keys, values, seen, scale)


def positions(comm: Communicator, rank: int, rows: int, zigzag: bool = True) -> torch.Tensor:
    """int64 [rows], on the device: which positions of the sequence `rank` has.

    zigzag: of 2 * size equal pieces it has number `rank` and number 2 * size - 1 - `rank`, so that under a causal mask
    all ranks have equally much to do. Else piece `rank` of `size`.
    """
    place = torch.arange(rows, device=comm.device)
    if not zigzag:
        return place + rank * rows
    half = rows // 2
    return torch.cat([place[:half] + rank * half, place[:half] + (2 * comm.size - 1 - rank) * half])


@triton.jit
def number_of(rank, piece, size, PIECES: tl.constexpr):
    """Which piece of the sequence a rank's piece is."""
    return tl.where(piece == 0, rank, PIECES * size - 1 - rank)


@triton.jit
def _first_of_piece(shards, number, rows):
    """(piece, row in it) with which tile `number` of a rank begins, where pieces have `rows` rows."""
    in_piece = (rows + shards.TILE - 1) // shards.TILE
    return number // in_piece, number % in_piece * shards.TILE


@triton.jit
def push_pairs(
    team, epochs, shards, signals, k, v, gathered, odd, apart, rows,
    DTYPE: tl.constexpr, PIECES: tl.constexpr, CAUSAL: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Block b pushes tiles b, b + B, .. of this rank's keys and values: all to the rank before, then to the one before.

    k, v: pieces of `rows` rows, one after another, PIECES a sequence. shards: the same, but each piece filled up to
    whole tiles; values are `apart` elements behind keys. Nothing but the signal is sent of what the peer does not see.

    Waits:    for nobody.
    Ordering: stores, block barrier, release at sys scope on the tile's signal.
    Reuse:    parities alternate. A rank launches this after its last attention, which has heard from all peers' last
              pushes, and those came after the peers' last attention but one, which read this parity.
    """
    epoch = overlap.begin(team, epochs)
    tiles = overlap.tiles_of(shards)
    here = shmem.Symmetric(gathered.bases, gathered.offset + (epoch & 1) * odd * (DTYPE.primitive_bitwidth // 8))
    for position in range(tl.program_id(0), tiles * (team.size - 1), tl.num_programs(0)):
        pe = (team.rank + team.size - 1 - position // tiles) % team.size
        tile = team.rank * tiles + position % tiles
        piece, first = _first_of_piece(shards, position % tiles, rows)
        last_seen = number_of(pe, PIECES - 1, team.size, PIECES)
        if (not CAUSAL) or number_of(team.rank, piece % PIECES, team.size, PIECES) <= last_seen:
            source = (piece * rows + first).to(tl.int64) * shards.columns
            count = tl.minimum(rows - first, shards.TILE).to(tl.int64) * shards.columns
            target = tl.multiple_of(shmem.symm_at(here, pe, DTYPE) + overlap.offset_of(shards, tile), 16)
            overlap.copy(tl.multiple_of(k + source, 16), target, count, PIECE)
            overlap.copy(tl.multiple_of(v + source, 16), tl.multiple_of(target + apart, 16), count, PIECE)
        overlap.notify(shards, signals, tile, pe, epoch)
    overlap.end(epochs, epoch)


@triton.jit
def _see_rows(
    queries, state, k, v, k_row, v_row, column, count, behind, scale,
    STEP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """STEPs of `see_gathered` for `count` keys from k_row and v_row on, of which row i of the queries sees those up to
    `behind` + i.

    k, v: tensor descriptors. What follows the `count` keys may be anything. Ordering: plain loads.
    """
    i, j = tl.arange(0, ROWS), tl.arange(0, KEYS)
    by_all = tl.minimum(count, behind + 1) // KEYS * KEYS
    for start in tl.range(0, by_all, KEYS, num_stages=STAGES):
        keys, values = k.load([k_row + start, column]), v.load([v_row + start, column])
        state = STEP(queries, state, keys, values, None, None, scale, MASKED=False)
    for start in tl.range(by_all, count, KEYS, num_stages=1):
        keys, values = k.load([k_row + start, column]), v.load([v_row + start, column])
        key = start + j
        seen = (key < count)[None, :] & (key[None, :] <= behind + i[:, None])
        state = STEP(queries, state, keys, values, (key < count)[:, None], seen, scale, MASKED=True)
    return state


@triton.jit
def _reach(mine, theirs, down, rows, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """(count, behind) of `_see_rows` for a tile of queries, rows `down` .. of piece number `mine`, and the keys of
    piece number `theirs`: none, all, or a triangle."""
    if CAUSAL:
        behind = tl.where(theirs == mine, down, rows)
        return tl.where(theirs > mine, 0, tl.minimum(rows, behind + ROWS)), behind
    else:
        return rows, rows


@triton.jit
def see_gathered(
    team, epoch, shards, signals, queries, state, k, v, gathered, odd_row, apart_row, sequence, piece, down, column,
    rows, scale, came, STEP: tl.constexpr, PIECES: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`state` after a STEP for each tile of keys that rows `down` .. of this rank's `piece` of `sequence` see: own keys
    first, then those of the next rank.

    STEP(queries, state, keys, values, whether each is a key, which of them a row sees, scale, MASKED) gives the new
    state; unless it is MASKED, all are keys and all rows see them. came: whether all these keys were waited for before.
    Other arguments are those of `attend_gathered`, `column` that of the head in a row of keys.

    Waits:    for the tile of keys, pushed by a kernel that every rank launches earlier, unless they `came`.
    Ordering: acquire at sys scope, block barrier, loads.
    """
    tiles, in_piece = overlap.tiles_of(shards), (rows + shards.TILE - 1) // shards.TILE
    start_row = (epoch & 1).to(tl.int32) * odd_row
    mine = number_of(team.rank, piece, team.size, PIECES)
    for part in range(PIECES):
        theirs = number_of(team.rank, part, team.size, PIECES)
        count, behind = _reach(mine, theirs, down, rows, CAUSAL, ROWS)
        row = (sequence * PIECES + part) * rows
        state = _see_rows(queries, state, k, v, row, row, column, count, behind, scale, STEP, ROWS, KEYS, STAGES)
    stride = tl.where(came, in_piece, 1) * shards.TILE
    for part in range(PIECES, PIECES * team.size):
        owner = (team.rank + part // PIECES) % team.size
        theirs = number_of(owner, part % PIECES, team.size, PIECES)
        count, behind = _reach(mine, theirs, down, rows, CAUSAL, ROWS)
        first_tile = owner * tiles + (sequence * PIECES + part % PIECES) * in_piece
        for first in range(0, count, stride):
            tile = first_tile + first // shards.TILE
            if not came:
                overlap.wait(team, shards, signals, tile, epoch)
            row = start_row + tile * shards.TILE
            state = _see_rows(
                queries, state, gathered, gathered, row, row + apart_row, column, tl.minimum(count - first, stride),
                rows, scale, STEP, ROWS, KEYS, STAGES,
            )  # fmt: skip
    return state


@triton.jit
def ticket(tickets, epoch):
    """The next number that no block has in this call. Ordering: none."""
    return tl.atomic_add(tickets + (epoch & 1), 1, sem="relaxed", scope="gpu").to(tl.int32)


@triton.jit
def no_tickets(tickets, epoch):
    """Zeroes the next call's, which nobody takes before this one has ended. Ordering: plain store."""
    tl.store(tickets + ((epoch + 1) & 1), tl.full([], 0, tl.int64))


@triton.jit
def heavy_first(position, heads, rows, PIECES: tl.constexpr, ROWS: tl.constexpr):
    """(sequence, head, piece, first row in it) of the tile of ROWS queries at a position: a sequence after the other,
    and of each first what sees most under a causal mask, all heads of it."""
    down_piece = (rows + ROWS - 1) // ROWS
    of_sequence = PIECES * down_piece * heads
    down = PIECES * down_piece - 1 - position % of_sequence // heads
    return position // of_sequence, position % heads, down // down_piece, down % down_piece * ROWS


@triton.jit
def hear_all(team, shards, signals, epoch):
    """Waits for the first tile of every peer: who sees nothing of a peer still has to hear from it before the next
    call. Ordering: as `overlap.wait`."""
    for distance in range(1, team.size):
        overlap.wait(team, shards, signals, (team.rank + distance) % team.size * overlap.tiles_of(shards), epoch)


@triton.jit
def _attend(queries, state, k, v, live, seen, scale, MASKED: tl.constexpr):
    """The STEP of attention: queries ([ROWS, DIM],), state as of `see`."""
    if MASKED:
        v = tl.where(live, v, tl.zeros_like(v))  # a weight of 0 leaves NaN what it is
    return see(queries[0], k, v, seen, scale, state[0], state[1], state[2], MASKED)


@triton.jit
def attend_gathered(
    team, epochs, tickets, shards, signals, q, k, v, gathered, odd_row, apart_row, out, logs, rows, batch, heads, group,
    scale, DTYPE: tl.constexpr, PIECES: tl.constexpr, CAUSAL: tl.constexpr, KEPT: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = attention of q to all ranks' keys; own ones from k and v, others from `gathered` when they come.

    q, out: [batch, PIECES, rows, heads, DIM]. k, v, gathered: tensor descriptors of rows of heads / group * DIM
    elements; `gathered` has tiles as `shards` numbers them, values `apart_row` rows behind keys. tickets: *i64, zeroed
    once: how many tiles of queries were taken in a call of even and of odd epoch. KEPT: `log_sum` of each row is left
    in `logs`, fp32 [batch, heads, PIECES, rows].

    Waits:    for the tile of keys, pushed by a kernel that every rank launches earlier.
    Ordering: acquire at sys scope, block barrier, loads.
    Reuse:    see `push_pairs` and `no_tickets`.
    """
    epoch = overlap.begin(team, epochs)
    tiles = batch * PIECES * ((rows + ROWS - 1) // ROWS) * heads
    i, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    waited = -1  # the sequence of whose keys this block has waited for all that it needs
    position = ticket(tickets, epoch)
    while position < tiles:
        sequence, head, piece, down = heavy_first(position, heads, rows, PIECES, ROWS)
        there = down + i < rows
        place = ((sequence * PIECES + piece) * rows + down + i).to(tl.int64) * heads + head
        place = place[:, None] * DIM + d[None, :]
        queries = tl.load(q + place, mask=there[:, None], other=0)
        top, total, values = see_gathered(
            team, epoch, shards, signals, (queries,), no_keys(ROWS, DIM), k, v, gathered, odd_row, apart_row, sequence,
            piece, down, head // group * DIM, rows, scale, sequence == waited,
            _attend, PIECES, CAUSAL, ROWS, KEYS, STAGES,
        )  # fmt: skip
        tl.store(out + place, mean(total, values).to(DTYPE), mask=there[:, None])
        if KEPT:
            row = ((sequence * heads + head) * PIECES + piece).to(tl.int64) * rows + down + i
            tl.store(logs + row, log_sum(top, total), mask=there)
        waited = sequence
        position = ticket(tickets, epoch)
    if tl.program_id(0) == 0:
        no_tickets(tickets, epoch)
        hear_all(team, shards, signals, epoch)
    overlap.end(epochs, epoch)


def gather_kv_attention(
    comm: Communicator,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = True,
    zigzag: bool = True,
    out: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of this rank's queries to all ranks' keys, communication hidden behind it; on the current stream.

    q: [B, S / size, heads, dim] bfloat16 or float16, contiguous (others are copied); dim 64 or 128. k, v: [B, S / size,
    KV heads, dim] of that dtype; heads is a multiple of KV heads. Every rank has as many positions of S, by `zigzag`
    those that `positions` tells, and then an even number. causal: a query sees the keys up to its own position. out: as
    q, contiguous; None makes a new one, with a gradient. scale: of scores, above 0; None: 1 / sqrt(dim). Sums are fp32.
    The first call of a larger size allocates symmetric memory, four times all ranks' k, its gradient's eight times, and
    is collective: it must not be in a graph's capture. Raises ArgumentError, and what any call of `comm` raises.
    """
    _check_queries("gather_kv_attention", q)
    scale = scale_of("gather_kv_attention", scale, q.shape[-1])
    if out is None:
        return torch.ops.tdccl.gather_kv_attention(q, k, v, causal, zigzag, scale, comm.name)[0]
    check("gather_kv_attention", comm, q, k, v, zigzag)
    check_out("gather_kv_attention", out, tuple(q.shape), q)
    _compute(comm, q, k, v, causal, zigzag, scale, out)
    return out


def _check_queries(operator: str, q: torch.Tensor) -> None:
    if q.dim() != 4:
        raise ArgumentError(f"{operator}: q is {tuple(q.shape)}, expected [B, S / size, heads, dim]")


def check(operator: str, comm: Communicator, q, k, v, zigzag: bool) -> None:
    """Raises ArgumentError unless these are shards of queries, keys and values that go together."""
    _check_queries(operator, q)
    check_heads(operator, comm, q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ArgumentError(
            f"{operator}: q has {q.shape[1]} positions, k has {k.shape[1]}; expected a shard of the same ones"
        )
    if zigzag and q.shape[1] % 2:
        raise ArgumentError(
            f"{operator}: q has {q.shape[1]} positions, expected an even number, two pieces, or zigzag=False"
        )


def _compute(comm: Communicator, q, k, v, causal: bool, zigzag: bool, scale: float, out, logs=None) -> None:
    """logs: also gets the logarithm of the sum of each row's exponential scores, for the gradient."""
    if q.numel() == 0:
        return
    q, k, v = dense(q), dense(k), dense(v)
    (batch, length, heads, dim), kv_heads = q.shape, k.shape[2]
    shape, pieces = shape_for(dim), 2 if zigzag else 1
    rows, width = length // pieces, kv_heads * dim
    of_rank = batch * pieces * -(-rows // shape.told)  # tiles
    apart = comm.size * of_rank * shape.told * width
    blocks, pushing = comm.multiprocessors * shape.resident, pushers(comm)
    helping = pushing * shape.resident
    space = workspace(comm, f"gather_kv_attention of {dim}", 2 * apart, width, k.dtype, of_rank, blocks + 2)
    odd, shards = space.odd(width), overlap.shards_of(of_rank * shape.told, width, shape.told, space.most)
    gathered = space.buffer[: odd + 2 * apart].view(-1, width)
    cut = {"DTYPE": DTYPES[q.dtype], "PIECES": pieces, "CAUSAL": causal}

    def push():
        keyed(push_pairs)[(pushing,)](
            comm.team, space.epochs[0], shards, space.signals_on_all_ranks, k, v, space.on_all_ranks, odd, apart, rows,
            PIECE=in_flight(), num_warps=PUSH_WARPS, **cut,
        )  # fmt: skip

    keys, values, others = (
        TensorDescriptor.from_tensor(each.view(-1, width), [shape.keys, dim]) for each in (k, v, gathered)
    )

    def compute(grid: int, epochs: torch.Tensor):
        keyed(attend_gathered)[(grid,)](
            comm.team, epochs, space.epochs[0, -2:], shards, space.signals_on_all_ranks, q, keys, values, others,
            odd // width, apart // width, out, logs, rows, batch, heads, heads // kv_heads, scale * LOG2_E,
            KEPT=logs is not None, DIM=dim, ROWS=shape.rows, KEYS=shape.keys, STAGES=shape.stages,
            num_warps=shape.warps, **cut,
        )  # fmt: skip

    def push_and_help():
        push()
        compute(helping, space.epochs[1, blocks - helping :])

    def attend_beside():
        if pushing:
            beside(comm.device, push_and_help, lambda: compute(blocks - helping, space.epochs[1]), moving_first=True)
        else:
            compute(blocks, space.epochs[1])

    comm.start_fused("all_gather", "gather_kv_attention", k, attend_beside)


@torch.library.custom_op("tdccl::gather_kv_attention", mutates_args=())
def _operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, zigzag: bool, scale: float, comm: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the function returns, fp32 [B, heads, S / size]: logarithms of base 2 of the sums of rows' exponentials)"""
    communicator = named(comm)
    check("gather_kv_attention", communicator, q, k, v, zigzag)
    out, logs = _fake(q, k, v, causal, zigzag, scale, comm)
    _compute(communicator, q, k, v, causal, zigzag, scale, out, logs)
    return out, logs


@_operator.register_fake
def _fake(q, k, v, causal, zigzag, scale, comm):
    batch, rows, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, rows), dtype=torch.float32)


def _keep(ctx, inputs, output):
    q, k, v, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx, gradient, _):
    of_each = torch.ops.tdccl.gather_kv_attention_gradient(*ctx.saved_tensors, gradient, *ctx.options)
    return (*of_each, *[None] * len(ctx.options))


_operator.register_autograd(_gradients, setup_context=_keep)
