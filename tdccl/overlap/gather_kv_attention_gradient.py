"""The gradient of `gather_kv_attention`: of this rank's queries, and of its keys and values, which all ranks have seen.

Two launches after each other. Queries: keys and values are pushed once more, tile by tile, while a persistent kernel
adds up what all of them give to a tile of queries, as forward. Keys and values: for each tile of any rank's keys, the
next rank's first and the own ones last, a persistent kernel adds up what this rank's queries give to it, and stores
the sum into a slot on the owner right away; a signal follows. To its own tiles each rank then adds what all peers have
sent, in rank order: nothing is added by atomics, so that every run gives the same bits. (FlashAttention-2's algorithm.)
"""

import math
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
from tdccl.overlap.attention import LOG2_E
from tdccl.overlap.copies import beside
from tdccl.overlap.gather_kv_attention import (
    check,
    hear_all,
    heavy_first,
    no_tickets,
    number_of,
    push_pairs,
    see_gathered,
    shape_for,
    ticket,
)
from tdccl.overlap.gemm import DTYPES, dense
from tdccl.overlap.gemm_reduce_scatter import wait_peers
from tdccl.overlap.pushers import PUSH_WARPS, in_flight, pushers
from tdccl.overlap.workspace import workspace
from tdccl.runtime.launch import keyed

_LN_2 = tl.constexpr(math.log(2))  # scores are scaled to base 2
FOLDED = 16  # rows of keys whose sums of all ranks are added up together: few, for each takes registers of every rank


class Part(NamedTuple):
    """Queries and keys of a step, of which a block keeps one and goes through the other; steps in flight, warps of a
    block, blocks on a multiprocessor together."""

    rows: int
    keys: int
    stages: int
    warps: int
    resident: int


def shapes_for(dim: int) -> tuple[Part, Part]:
    """The shapes of the kernels of queries and of keys, for heads of that size. All ranks must cut alike.

    On sm_90 the loops over what needs no mask keep everything in registers; of those tried on an H200 the fastest.
    """
    if environment.emulated():
        return Part(16, 16, 1, 4, 1), Part(16, 32, 1, 4, 1)
    if dim <= 64:
        return Part(64, 64, 2, 4, 3), Part(64, 64, 3, 4, 2)
    return Part(128, 64, 3, 8, 1), Part(64, 128, 3, 8, 1)


@triton.jit
def _slope(queries, state, k, v, live, seen, scale, MASKED: tl.constexpr):
    """The STEP of the queries' gradient, `state` (fp32 [ROWS, DIM],) without its factor. queries: q and the gradient of
    out, [ROWS, DIM], then `log_sum` and what the gradient of out times out adds up to, [ROWS]."""
    q, gradient, log, delta = queries
    if MASKED:
        k = tl.where(live, k, tl.zeros_like(k))  # 0 times NaN is not 0
    weights = tl.exp2(tl.dot(q, k.T) * scale - log[:, None])
    slopes = weights * (tl.dot(gradient, v.T) - delta[:, None])
    if MASKED:
        slopes = tl.where(seen, slopes, 0.0)
    return (tl.dot(slopes.to(k.dtype), k, state[0]),)


@triton.jit
def gradient_of_queries(
    team, epochs, tickets, shards, signals, q, k, v, gathered, odd_row, apart_row, out, logs, gradient, of_q,
    minus_logs, minus_deltas, rows, batch, heads, group, scale, DTYPE: tl.constexpr, PIECES: tl.constexpr,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """of_q = gradient of the queries, all ranks' keys and values coming as for `attend_gathered`, whose arguments have
    these names. gradient: that of out; the sum over each of its rows times out goes into `minus_deltas`, which is like
    `logs`, as negative numbers, and logs over `scale` into `minus_logs`.

    Waits:    for the tile of keys, pushed by a kernel that every rank launches earlier.
    Ordering: acquire at sys scope, block barrier, loads.
    Reuse:    see `push_pairs` and `no_tickets`; what was gathered stays for `gradient_of_keys` of the same call.
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
        row = ((sequence * heads + head) * PIECES + piece).to(tl.int64) * rows + down + i
        queries = tl.load(q + place, mask=there[:, None], other=0)
        slopes = tl.load(gradient + place, mask=there[:, None], other=0)
        result = tl.load(out + place, mask=there[:, None], other=0)
        log = tl.load(logs + row, mask=there, other=0)
        delta = tl.sum(slopes.to(tl.float32) * result.to(tl.float32), axis=1)
        tl.store(minus_logs + row, -log / scale, mask=there)
        tl.store(minus_deltas + row, -delta, mask=there)
        (total,) = see_gathered(
            team, epoch, shards, signals, (queries, slopes, log, delta), (tl.zeros([ROWS, DIM], tl.float32),), k, v,
            gathered, odd_row, apart_row, sequence, piece, down, head // group * DIM, rows, scale, sequence == waited,
            _slope, PIECES, CAUSAL, ROWS, KEYS, STAGES,
        )  # fmt: skip
        tl.store(of_q + place, (total * (scale * _LN_2)).to(DTYPE), mask=there[:, None])
        waited = sequence
        position = ticket(tickets, epoch)
    if tl.program_id(0) == 0:
        no_tickets(tickets, epoch)
        hear_all(team, shards, signals, epoch)
    overlap.end(epochs, epoch)


@triton.jit
def _add_rows(
    keys, values, q, gradient, minus_log, minus_delta, seen, scale, of_keys, of_values, MASKED: tl.constexpr
):  # fmt: skip
    """The sums of a tile of keys, without the factor of `of_keys`, after a step of queries more.

    keys, values: [KEYS, DIM]. q, gradient: [ROWS, DIM]. minus_log, minus_delta: [ROWS], with which the products begin:
    so they take no registers beside these. seen: bool [KEYS, ROWS], which rows see a key, looked at if MASKED.
    Ordering: none; it computes.
    """
    shape: tl.constexpr = [keys.shape[0], q.shape[0]]
    weights = tl.exp2(tl.dot(keys, q.T, tl.broadcast_to(minus_log[None, :], shape)) * scale)
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    of_values = tl.dot(weights.to(q.dtype), gradient, of_values)
    slopes = weights * tl.dot(values, gradient.T, tl.broadcast_to(minus_delta[None, :], shape))
    return tl.dot(slopes.to(q.dtype), q, of_keys), of_values


@triton.jit
def _add_piece(
    keys, values, q, gradient, minus_logs, minus_deltas, part, column, mine, theirs, down, rows, scale, of_keys,
    of_values, CAUSAL: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_add_rows` for all rows of piece number `mine` that see keys `down` .. of piece number `theirs`.

    q, gradient: tensor descriptors, of which `part` is the piece; they give zeros past its rows, which add nothing.
    minus_logs, minus_deltas: of the piece. Ordering: plain loads.
    """
    i, j = tl.arange(0, ROWS), tl.arange(0, KEYS)
    first, crossed, behind = 0, 0, rows  # row i sees those up to `behind` + i
    if CAUSAL:
        OVER: tl.constexpr = (KEYS + ROWS - 1) // ROWS * ROWS
        behind = tl.where(theirs == mine, 0, rows)
        first = tl.where(theirs > mine, rows, tl.where(theirs == mine, down, 0))
        crossed = tl.minimum(tl.where(theirs == mine, first + OVER, first), rows)  # the diagonal ends before this row
    whole = crossed + (rows - crossed) // ROWS * ROWS
    for start in tl.range(crossed, whole, ROWS, num_stages=STAGES):
        of_keys, of_values = _add_rows(
            keys, values, q.load([part, start, column]).reshape([ROWS, DIM]),
            gradient.load([part, start, column]).reshape([ROWS, DIM]), tl.load(minus_logs + start + i),
            tl.load(minus_deltas + start + i), None, scale, of_keys, of_values, MASKED=False,
        )  # fmt: skip
    crossing = (crossed - first + ROWS - 1) // ROWS
    for step in tl.range(0, crossing + tl.where(whole < rows, 1, 0), num_stages=1):
        start = tl.where(step < crossing, first + step * ROWS, whole)
        row = start + i
        minus_log = tl.load(minus_logs + row, mask=row < rows, other=0)
        minus_delta = tl.load(minus_deltas + row, mask=row < rows, other=0)
        of_keys, of_values = _add_rows(
            keys, values, q.load([part, start, column]).reshape([ROWS, DIM]),
            gradient.load([part, start, column]).reshape([ROWS, DIM]), minus_log, minus_delta,
            (down + j)[:, None] <= (behind + row)[None, :], scale, of_keys, of_values, MASKED=True,
        )  # fmt: skip
    return of_keys, of_values


@triton.jit
def gradient_of_keys(
    team, epochs, tickets, shards, signals, q, gradient, minus_logs, minus_deltas, k, v, gathered, odd, apart, sums,
    of_k, of_v, rows, batch, width, heads, group, scale, DTYPE: tl.constexpr, PIECES: tl.constexpr,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """of_k, of_v [batch, PIECES, rows, width] = the sums over ranks, in rank order, of what their queries give to them.

    q, gradient: tensor descriptors of [batch * PIECES, rows, heads * DIM]. minus_logs, minus_deltas: what the launch
    before has left. gathered: what `push_pairs` has pushed, in odd epochs from element `odd` on. sums: Symmetric, fp32
    [size sources, 2, batch, PIECES, rows, width]. tickets: see `ticket`. A tile is KEYS keys of one of the width / DIM
    heads; peers' tiles come before the own ones. Its signal is as far behind those of pushed tiles. Of what this rank's
    queries do not see it stores nothing.

    Waits:    for every peer, once an own tile: for the sum of that tile, which a block of the peer took up before any
              block of it could wait. So none waits for one that may not run yet.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads. Keys of peers
              were waited for by the launch before, `gradient_of_queries`.
    Reuse:    of what is gathered, see `push_pairs`. A rank stores sums when the launch before has heard of this call
              from all peers, who have ended their last one: they have read what they got in that.
    """
    epoch = overlap.begin(team, epochs)
    told, in_piece = overlap.tiles_of(shards), (rows + shards.TILE - 1) // shards.TILE
    down_piece, across = (rows + KEYS - 1) // KEYS, width // DIM
    tiles, elements = batch * PIECES * down_piece * across, (tl.zeros([], tl.int64) + batch) * PIECES * rows * width
    others = tl.multiple_of(gathered + (epoch & 1) * odd, 16)
    j, d = tl.arange(0, KEYS), tl.arange(0, DIM)
    position = ticket(tickets, epoch)
    while position < tiles * team.size:
        owner = (team.rank + 1 + position // tiles) % team.size
        tile = position % tiles
        number, column = tile // across // down_piece, tile % across * DIM
        sequence, part, down = number // PIECES, number % PIECES, tile // across % down_piece * KEYS
        theirs = number_of(owner, part, team.size, PIECES)
        there = (down + j < rows)[:, None]
        place = (number * rows + down + j).to(tl.int64)[:, None] * width + column + d[None, :]
        if (not CAUSAL) or theirs <= number_of(team.rank, PIECES - 1, team.size, PIECES):
            if owner == team.rank:
                from_k, from_v, row = k, v, number * rows
            else:
                from_k, from_v, row = others, others + apart, (owner * told + number * in_piece) * shards.TILE
            pushed = (row + down + j).to(tl.int64)[:, None] * width + column + d[None, :]
            keys = tl.load(tl.multiple_of(from_k, 16) + pushed, mask=there, other=0)
            values = tl.load(tl.multiple_of(from_v, 16) + pushed, mask=there, other=0)
            of_keys, of_values = tl.zeros([KEYS, DIM], tl.float32), tl.zeros([KEYS, DIM], tl.float32)
            for each in range(group * PIECES):
                head, piece = tile % across * group + each // PIECES, each % PIECES
                mine = number_of(team.rank, piece, team.size, PIECES)
                first = ((sequence * heads + head) * PIECES + piece).to(tl.int64) * rows
                of_keys, of_values = _add_piece(
                    keys, values, q, gradient, minus_logs + first, minus_deltas + first, sequence * PIECES + piece,
                    head * DIM, mine, theirs, down, rows, scale, of_keys, of_values, CAUSAL, DIM, ROWS, KEYS, STAGES,
                )  # fmt: skip
            slot = shmem.symm_at(sums, owner, tl.float32) + team.rank * 2 * elements
            tl.store(slot + place, of_keys * (scale * _LN_2), mask=there)
            tl.store(slot + elements + place, of_values, mask=there)
        if owner == team.rank:
            wait_peers(team, signals, told + tile, shards.most, epoch)
            slots = shmem.symm_at(sums, team.rank, tl.float32)
            for folded in range(0, tl.minimum(rows - down, KEYS), FOLDED):
                row, count = number * rows + down + folded, rows - down - folded
                for of_one in tl.static_range(2):
                    _fold(
                        team, slots + of_one * elements, 2 * elements, of_v if of_one else of_k, row, column, count,
                        width, theirs, DTYPE, PIECES, CAUSAL, FOLDED, DIM,
                    )  # fmt: skip
        else:
            shmem.fence()
            word = team.rank * shards.most + told + tile
            shmem.signal_op(shmem.symm_at(signals, owner, tl.int64, 8) + word, epoch)
        position = ticket(tickets, epoch)
    if tl.program_id(0) == 0:
        no_tickets(tickets, epoch)
    overlap.end(epochs, epoch)


@triton.jit
def _fold(
    team, slots, apart, out, row, column, count, width, number, DTYPE: tl.constexpr, PIECES: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Adds all ranks' sums of up to `count` rows of piece `number` in rank order into `out`. Ordering: plain loads."""
    i, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    place = (row + i).to(tl.int64)[:, None] * width + column + d[None, :]
    there = (i < count)[:, None]
    values = ()
    for source in tl.static_range(team.size):
        sent = there
        if CAUSAL:
            sent = there & (number <= number_of(source, PIECES - 1, team.size, PIECES))
        values = values + (tl.load(slots + source * apart + place, mask=sent, other=0.0),)
    tl.store(out + place, shmem.fold(values, "sum", DTYPE), mask=there)


def _compute(comm: Communicator, inputs, results, causal: bool, zigzag: bool, scale: float) -> None:
    """inputs: q, k, v, out, logs and the gradient of out; results: the gradients of q, k and v."""
    q, k, v, out, logs, gradient = map(dense, inputs)
    of_q, of_k, of_v = results
    (batch, length, heads, dim), kv_heads = q.shape, k.shape[2]
    (of_queries, of_keys), told, pieces = shapes_for(dim), shape_for(dim).told, 2 if zigzag else 1
    rows, width = length // pieces, kv_heads * dim
    of_rank = batch * pieces * -(-rows // told)  # tiles that are told of
    tiles = batch * pieces * -(-rows // of_keys.keys) * kv_heads
    apart, pushing = comm.size * of_rank * told * width, pushers(comm)
    blocks = [comm.multiprocessors * part.resident for part in (of_queries, of_keys)]
    helping = pushing * of_queries.resident
    name = f"gather_kv_attention_gradient of {dim}"
    space = workspace(comm, name, 2 * apart, width, k.dtype, of_rank + tiles, sum(blocks) + 4)
    # One call after another takes both halves as one.
    sums = workspace(comm, "gather_kv_attention_gradient", comm.size * k.numel(), 1, torch.float32, 1, 1)
    epochs_of_queries, epochs_of_keys = space.epochs[1].tensor_split([blocks[0]])
    odd, shards = space.odd(width), overlap.shards_of(of_rank * told, width, told, space.most)
    gathered = space.buffer[: odd + 2 * apart].view(-1, width)
    minus = logs.new_empty(2, *logs.shape)
    cut = {"DTYPE": DTYPES[q.dtype], "PIECES": pieces, "CAUSAL": causal}

    def push():
        keyed(push_pairs)[(pushing,)](
            comm.team, space.epochs[0], shards, space.signals_on_all_ranks, k, v, space.on_all_ranks, odd, apart, rows,
            PIECE=in_flight(), num_warps=PUSH_WARPS, **cut,
        )  # fmt: skip

    keys, values, others = (
        TensorDescriptor.from_tensor(each.view(-1, width), [of_queries.keys, dim]) for each in (k, v, gathered)
    )
    queries, slopes = (
        TensorDescriptor.from_tensor(each.view(batch * pieces, rows, -1), [1, of_keys.rows, dim])
        for each in (q, gradient)
    )

    def compute_queries(grid: int, epochs: torch.Tensor):
        keyed(gradient_of_queries)[(grid,)](
            comm.team, epochs, space.epochs[0, -2:], shards, space.signals_on_all_ranks, q, keys, values, others,
            odd // width, apart // width, out, logs, gradient, of_q, *minus, rows, batch, heads, heads // kv_heads,
            scale * LOG2_E, DIM=dim, ROWS=of_queries.rows, KEYS=of_queries.keys, STAGES=of_queries.stages,
            num_warps=of_queries.warps, **cut,
        )  # fmt: skip

    def push_and_help():
        push()
        compute_queries(helping, epochs_of_queries[blocks[0] - helping :])

    def compute():
        if pushing:
            beside(
                comm.device, push_and_help, lambda: compute_queries(blocks[0] - helping, epochs_of_queries),
                moving_first=True,
            )  # fmt: skip
        else:
            compute_queries(blocks[0], epochs_of_queries)
        keyed(gradient_of_keys)[(blocks[1],)](
            comm.team, epochs_of_keys, space.epochs[0, -4:-2], shards, space.signals_on_all_ranks, queries, slopes,
            *minus, k, v, gathered, odd, apart, sums.on_all_ranks, of_k, of_v, rows, batch, width, heads,
            heads // kv_heads, scale * LOG2_E, DIM=dim, ROWS=of_keys.rows, KEYS=of_keys.keys, STAGES=of_keys.stages,
            FOLDED=FOLDED, num_warps=of_keys.warps, **cut,
        )  # fmt: skip

    comm.start_fused("reduce_scatter", "gather_kv_attention_gradient", k, compute)


def _check_forward(q, out, logs, gradient) -> None:
    batch, rows, heads, _ = q.shape
    expected = {"out": (out, q.shape, q.dtype), "logs": (logs, (batch, heads, rows), torch.float32)}
    for name, (tensor, shape, dtype) in {**expected, "gradient": (gradient, q.shape, q.dtype)}.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != q.device:
            raise ArgumentError(
                f"gather_kv_attention_gradient: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"expected {dtype} {tuple(shape)} on {q.device}"
            )


@torch.library.custom_op("tdccl::gather_kv_attention_gradient", mutates_args=())
def gather_kv_attention_gradient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, logs: torch.Tensor, gradient: torch.Tensor,
    causal: bool, zigzag: bool, scale: float, comm: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of q, k and v; out and logs are what forward gave, `gradient` is that of out. Raises ArgumentError,
    and what any call of the communicator raises."""
    communicator = named(comm)
    check("gather_kv_attention_gradient", communicator, q, k, v, zigzag)
    _check_forward(q, out, logs, gradient)
    results = _fake(q, k, v)
    if q.numel() == 0:
        return tuple(each.zero_() for each in results)
    _compute(communicator, (q, k, v, out, logs, gradient), results, causal, zigzag, scale)
    return results


@gather_kv_attention_gradient.register_fake
def _fake(q, k, v, *_):
    return tuple(each.new_empty(each.shape) for each in (q, k, v))
