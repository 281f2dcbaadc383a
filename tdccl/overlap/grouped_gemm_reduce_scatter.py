"""The experts' products fused with what brings them back: the weighted sum over a token's experts, and reduce-scatter
or combine.

Two launches: a persistent product takes the tiles of the routing backwards, so that the rows of the farthest ranks'
tokens are complete first, columns after columns; beside it blocks add up the rows of each token and store the sum into
a slot on its rank. On its own tokens each of them then adds what the same block of all peers has stored, in rank order.
"""

import itertools

import torch
import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl import environment
from tdccl.communicator import named
from tdccl.language import overlap
from tdccl.overlap.copies import beside
from tdccl.overlap.gemm import DTYPES, dense, left
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
from tdccl.overlap.pushers import few_of, left_by
from tdccl.overlap.routing import Routing, Sizes
from tdccl.overlap.workspace import check_out, padded, workspace
from tdccl.runtime.launch import keyed

REDUCE_WARPS = 16
# Tokens, and columns, of which a reducer adds up the rows together.
REDUCE_TOKENS, REDUCE_COLUMNS = (16, 32) if environment.emulated() else (16, 256)
# Columns after which reducers are told, in tiles: few, so that they read what is still in the L2 cache.
_ACROSS = 2
_UNIT = 16  # rows are padded to so many elements, so that all their accesses are 16 bytes wide


def reference(routing: Routing, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What `grouped_gemm_reduce_scatter` computes, one after the other; waits on the host."""
    sizes = routing.sizes
    offsets = routing.offsets.tolist()
    source = routing.source[: offsets[-1]]
    rows = torch.cat([h[begin:end] @ b[e] for e, (begin, end) in enumerate(itertools.pairwise(offsets))])
    weights = 1.0 if routing.weights is None else routing.weights.view(-1, 1)[source]
    total = h.new_zeros(routing.comm.size * sizes.most, b.shape[2], dtype=torch.float32)
    total.index_add_(0, source // sizes.top_k, rows * weights)
    return routing.comm.reduce_scatter(total.to(h.dtype))[: sizes.tokens]


@triton.jit
def _tile_backwards(team, tables, position, tiles, tiles_across, COLUMNS: tl.constexpr, ACROSS: tl.constexpr):
    """Expert, first row, rows, first column and segment of the tile at a position. Ordering: plain loads.

    All tiles of a distance lie together, and as far from the end of the list as from the beginning of this order.
    Looked up a tile ahead, so that the product before hides it.
    """
    there = position < tiles * tiles_across
    distance = tl.load(tables.tiles + (tiles - 1 - position // tiles_across) * 4 + 3, mask=there, other=0)
    first, last = tl.load(tables.stages + distance), tl.load(tables.stages + distance + 1)
    within = position - (tiles - last) * tiles_across
    of_chunk = tl.maximum(last - first, 1) * ACROSS
    chunk = within // of_chunk
    across_here = tl.minimum(tiles_across - chunk * ACROSS, ACROSS)
    number = first + within % of_chunk // across_here
    column = (chunk * ACROSS + within % of_chunk % across_here) * COLUMNS
    expert, row, height, _ = tile_at(tables, number, there)
    chunks = (tiles_across + ACROSS - 1) // ACROSS
    return expert, row, height, column, (team.size - 1 - distance) * chunks + chunk


@triton.jit
def multiply_backwards(
    team, epochs, tables, signals, h, b, step, partial, N, width, K, b_row, b_column, most_signals, words,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    ACROSS: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """partial [rows, width] = rows of h [rows, K] times their experts' matrices: farthest tokens first, own ones last,
    and of each distance ACROSS tiles of columns after the other. These are the segments, of which reducers are told.

    b: the experts' matrices, `step` rows each (see `Stack`). Each block adds 1 to each segment's word when it has done
    its part, and to the others up to `words`, so that all count the calls; WORDS: a power of two, no less.

    Waits:    for nobody.
    Ordering: stores, block barrier, release on the segment's word.
    Reuse:    `partial` belongs to the call.
    """
    epoch = overlap.begin(team, epochs)
    tiles_across = (N + COLUMNS - 1) // COLUMNS
    tiles = tl.load(tables.stages + team.size)
    done = shmem.symm_at(signals, team.rank, tl.int64, 8) + team.rank * most_signals
    told = 0
    following = _tile_backwards(team, tables, tl.program_id(0), tiles, tiles_across, COLUMNS, ACROSS)
    for position in range(tl.program_id(0), tiles * tiles_across, tl.num_programs(0)):
        expert, row, height, column, segment = following
        following = _tile_backwards(
            team, tables, position + tl.num_programs(0), tiles, tiles_across, COLUMNS, ACROSS
        )  # fmt: skip
        _tell(done, told, segment, WORDS)
        told = segment
        i = tl.arange(0, ROWS)
        rows = h if DESCRIPTORS else h + (row + i).to(tl.int64) * K
        total = grouped_product(
            rows, row, i < height, b, expert * step, column, N, K, b_row, b_column,
            COLUMNS, DEPTH, STAGES, DESCRIPTORS, DESCRIPTORS, TRANSPOSED,
        )  # fmt: skip
        store_rows(partial, row, height, column, N, width, total, DTYPE)
    _tell(done, told, words, WORDS)
    overlap.end(epochs, epoch)


@triton.jit
def _tell(done, first, last, WORDS: tl.constexpr):
    """Adds 1 to words first .. last - 1. Ordering: block barrier, then release."""
    if last > first:
        shmem.fence()
        word = tl.arange(0, WORDS)
        one = tl.full([WORDS], 1, tl.int64)
        tl.atomic_add(done + word, one, mask=(word >= first) & (word < last), sem="release", scope="gpu")


@triton.jit
def reduce_rows(
    team, epochs, tables, signals, partial, weights, slots, odd, y, tokens, most, N, width, most_signals, multipliers,
    DTYPE: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, LOCAL: tl.constexpr, SHARDED: tl.constexpr,
    WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """y [tokens, N] = the sum over ranks, in rank order, of the weighted sums of their rows in `partial`.

    Block b takes token tiles b, b + B, .. of every rank. slots: Symmetric, [size sources, most, width], in odd epochs
    from element `odd` on. CHUNK: columns of a segment of `multiply_backwards`, of which `multipliers` blocks run.

    Waits:    for the product, launched earlier, once a segment; block b for block b of every peer, once a segment of
              own tokens.
    Ordering: acquire at sys scope, block barrier, loads; stores, block barrier, release at sys scope.
    Reuse:    parities alternate. A rank starts a call when its last one has heard from all peers, who spoke in it only
              after they had ended the last but one, which read this parity.
    """
    epoch = overlap.begin(team, epochs)
    start = (epoch & 1) * odd
    own_signals = shmem.symm_at(signals, team.rank, tl.int64, 8)
    chunks = (N + CHUNK - 1) // CHUNK
    tiles = (most + TOKENS - 1) // TOKENS
    for back in range(team.size):
        owner = (team.rank + team.size - 1 - back) % team.size
        slot = shmem.symm_at(slots, owner, DTYPE) + (start + _slot(team.rank, most, width))
        for chunk in range(chunks):
            segment = own_signals + team.rank * most_signals + back * chunks + chunk
            complete = shmem.signal_wait(team, segment, epoch * multipliers, team.rank) - epoch * multipliers >= 0
            word = tl.program_id(0) * chunks + chunk
            end = tl.minimum((chunk + 1) * CHUNK, width)
            for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
                _add_entries(
                    tables, partial, weights, slot, owner * most, tile * TOKENS, chunk * CHUNK, end, most, width,
                    DTYPE, TOP_K, WEIGHTED, TOKENS, COLUMNS,
                )  # fmt: skip
            if owner == team.rank:
                _wait_peers(team, own_signals + word, most_signals, epoch)
                for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
                    _add_ranks(
                        team, tables, slots, start, y, tile * TOKENS, chunk * CHUNK, end, tokens, most, N, width,
                        DTYPE, TOP_K, PLACES, LOCAL, SHARDED, TOKENS, COLUMNS,
                    )  # fmt: skip
            else:
                shmem.fence()
                target = shmem.symm_at(signals, owner, tl.int64, 8) + team.rank * most_signals + word
                shmem.signal_op(target, tl.where(complete, epoch, epoch - 1))  # peers take nothing half done
    overlap.end(epochs, epoch)


@triton.jit
def _slot(source, rows, width):
    """Index (int64) of the first element of a source's slots."""
    return (tl.zeros([], tl.int64) + source) * rows * width


@triton.jit
def _wait_peers(team, word, most_signals, epoch):
    """Waits until every peer has set its word, which is so many words after that of the rank before it.

    Ordering: acquire at sys scope, then a block barrier."""
    ranks = tl.arange(0, shmem.MAX_RANKS)
    targets = tl.full([shmem.MAX_RANKS], 0, tl.int64) + epoch
    wanted = (ranks < team.size) & (ranks != team.rank)
    shmem.wait_counters(team, word + ranks * most_signals, targets, wanted, shmem.USER, epoch)


@triton.jit
def _add_entries(
    tables, partial, weights, slot, first, token, column, end, most, width,
    DTYPE: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The weighted sums of the rows of tokens first + token .., columns column .. end, into their slots, in fp32, in
    top-k order. Tokens without rows are left out. Ordering: plain accesses; wait before."""
    i = token + tl.arange(0, TOKENS)
    entry = (first + i) * TOP_K
    rows, factors = (), ()
    comes = tl.zeros([TOKENS], tl.int1)
    for place in tl.static_range(TOP_K):
        row = tl.load(tables.position + entry + place, mask=i < most, other=-1)
        comes = comes | (row >= 0)
        rows = rows + (row.to(tl.int64),)
        if WEIGHTED:
            factors = factors + (tl.load(weights + entry + place, mask=row >= 0, other=0.0),)
    for start in range(column, end, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        values = ()
        for place in tl.static_range(TOP_K):  # all loads are under way before the first sum
            mask = (rows[place] >= 0)[:, None] & (j < width)[None, :]
            values = values + (tl.load(partial + rows[place][:, None] * width + j[None, :], mask=mask, other=0),)
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for place in tl.static_range(TOP_K):
            if WEIGHTED:
                total += values[place].to(tl.float32) * factors[place][:, None]
            else:
                total += values[place].to(tl.float32)
        at = slot + i.to(tl.int64)[:, None] * width + j[None, :]
        tl.store(at, total.to(DTYPE), mask=comes[:, None] & (j < width)[None, :])


@triton.jit
def _add_ranks(
    team, tables, slots, start, y, token, column, end, tokens, most, N, width,
    DTYPE: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, LOCAL: tl.constexpr, SHARDED: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds all ranks' sums for these own tokens, columns column .. end, in rank order, in fp32, into y.

    Ordering: plain loads; wait before."""
    i = token + tl.arange(0, TOKENS)
    base = shmem.symm_at(slots, team.rank, DTYPE) + start
    came = ()
    for source in tl.static_range(team.size):
        came = came + (have_experts_on(team, tables, i, tokens, most, source, TOP_K, PLACES, LOCAL, SHARDED),)
    for first in range(column, end, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        values = ()
        for source in tl.static_range(team.size):
            at = base + _slot(source, most, width) + i.to(tl.int64)[:, None] * width + j[None, :]
            values = values + (tl.load(at, mask=came[source][:, None] & (j < width)[None, :], other=0),)
        at = y + i.to(tl.int64)[:, None] * N + j[None, :]
        tl.store(at, shmem.fold(values, "sum", DTYPE), mask=(i < tokens)[:, None] & (j < N)[None, :])


def grouped_gemm_reduce_scatter(
    h: torch.Tensor, b: torch.Tensor, routing: Routing, out: torch.Tensor | None = None
) -> torch.Tensor:
    """This rank's tokens: the sums over ranks and over a token's experts of its rows times the experts' matrices, each
    times its weight; communication hidden behind the product; on the current stream.

    h: [routing.rows, K] bfloat16 or float16, rows by expert as `all_gather_grouped_gemm` returns them. b: [experts
    here, K, N] of that dtype, either of the last two dimensions contiguous (others are copied). routing: of `route`,
    K this rank's part, as large on every rank; or of `route_experts` (grouped GEMM + combine). Its weights multiply the
    rows. out: [tokens, N], contiguous; None makes a new one, with a gradient, of the weights, too.

    A row is rounded to the dtype; a token's rows are added in fp32 in top-k order, and rounded; then the ranks' in
    fp32, in rank order: the same bits in every run. The first call of a larger size, or of a K that shares out the
    device otherwise, allocates symmetric memory, twice the tokens of all ranks x N, and is collective: it must not be
    in a graph's capture. Raises ArgumentError, and what any call of the communicator raises.
    """
    if out is None:
        return torch.ops.tdccl.grouped_gemm_reduce_scatter(
            h, b, routing.memory, routing.weights, routing.comm.name, list(routing.sizes)
        )
    check_grouped("grouped_gemm_reduce_scatter", h, routing.rows, b, routing)
    check_out("grouped_gemm_reduce_scatter", out, (routing.sizes.tokens, b.shape[2]), h)
    _compute(h, b, routing, out)
    return out


def _compute(h: torch.Tensor, b: torch.Tensor, routing: Routing, out: torch.Tensor) -> None:
    depth, columns = b.shape[1:]
    if routing.rows == 0 or columns == 0:
        return
    if depth == 0:
        out.zero_()
        return
    comm, sizes = routing.comm, routing.sizes
    h, b = dense(h), dense_stack(b)
    descriptors = by_descriptors(b)
    shape = shape_of(b, routing, descriptors)
    width, chunk = padded(columns, _UNIT), _ACROSS * shape.columns
    blocks = comm.multiprocessors
    reducers = few_of(comm, _reducers(blocks, depth))
    multipliers = left_by("grouped_gemm_reduce_scatter", comm, reducers)
    signals = max(reducers, comm.size) * -(-columns // chunk)
    # Counters and epochs are of one grid: another has its own.
    name = f"grouped_gemm_reduce_scatter with {reducers} reducers"
    space = workspace(comm, name, comm.size * sizes.most * width, _UNIT, h.dtype, signals, blocks)
    words = space.most // max(reducers, comm.size) * comm.size
    of_b = stack(b, shape, descriptors)
    partial = h.new_empty(routing.rows, width)

    def multiply():
        keyed(multiply_backwards)[(multipliers,)](
            comm.team, space.epochs[0], routing.tables, space.signals_on_all_ranks, left(h, shape, descriptors),
            of_b.right.operand, of_b.step, partial, columns, width, depth, *of_b.right.strides, space.most, words,
            DTYPE=DTYPES[h.dtype], ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth, STAGES=shape.stages,
            ACROSS=_ACROSS, DESCRIPTORS=descriptors, TRANSPOSED=of_b.right.transposed,
            WORDS=triton.next_power_of_2(words), num_warps=shape.warps,
        )  # fmt: skip

    def reduce():
        keyed(reduce_rows)[(reducers,)](
            comm.team, space.epochs[1], routing.tables, space.signals_on_all_ranks, partial, routing.weights,
            space.on_all_ranks, space.odd(_UNIT), out, sizes.tokens, sizes.most, columns, width, space.most,
            multipliers, DTYPE=DTYPES[h.dtype], **routing.constants(), SHARDED=bool(sizes.sharded),
            WEIGHTED=routing.weights is not None, TOKENS=REDUCE_TOKENS, COLUMNS=REDUCE_COLUMNS, CHUNK=chunk,
            num_warps=REDUCE_WARPS,
        )  # fmt: skip

    comm.start_fused(
        "reduce_scatter",
        "grouped_gemm_reduce_scatter",
        h,
        lambda: beside(comm.device, multiply, reduce, moving_first=True),
    )


def _reducers(blocks: int, depth: int) -> int:
    """How many of the blocks add up and send, so that both kernels take equally long: an element of a product costs, in
    units of a step of its depth, about 500 and its depth, and 350 to be added up (measured on H200)."""
    if environment.emulated():
        return 1
    return max(4, round(blocks * 350 / (850 + depth) / 4) * 4)


@torch.library.custom_op("tdccl::grouped_gemm_reduce_scatter", mutates_args=())
def _operator(
    h: torch.Tensor, b: torch.Tensor, memory: torch.Tensor, weights: torch.Tensor | None, comm: str, sizes: list[int]
) -> torch.Tensor:
    routing = Routing(named(comm), Sizes(*sizes), memory, weights)
    check_grouped("grouped_gemm_reduce_scatter", h, routing.rows, b, routing)
    out = h.new_empty(routing.sizes.tokens, b.shape[2])
    _compute(h, b, routing, out)
    return out


@_operator.register_fake
def _fake(h, b, memory, weights, comm, sizes):
    return h.new_empty(Sizes(*sizes).tokens, b.shape[2])


def _keep(ctx, inputs, output):
    h, b, memory, weights, ctx.comm, ctx.sizes = inputs
    ctx.save_for_backward(h, b, memory, weights)


def _gradients(ctx, gradient):
    """Of the rows: all ranks' gradients times the transposed b, gathered on the way, times the weights; without them
    the rows' products with h are what the weights get. Of b: the weighted rows times the gathered gradients."""
    h, b, memory, weights = ctx.saved_tensors
    position = Routing(named(ctx.comm), Sizes(*ctx.sizes), memory, None).tables.position
    of_h = of_b = of_weights = None
    factors = _weights_of_rows(position, weights)
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
        rows = torch.ops.tdccl.all_gather_grouped_gemm(gradient, b.transpose(1, 2), memory, ctx.comm, ctx.sizes)
        of_h = torch.where(factors.isnan(), 0, rows * factors).to(h.dtype)
    if ctx.needs_input_grad[3]:
        found = (rows.float() * h.float()).sum(1)
        of_weights = torch.where(position >= 0, found[position.clamp(min=0)], 0.0)
    if ctx.needs_input_grad[1]:
        of_b = grouped_gradient(gradient, (h * factors).to(h.dtype), memory, ctx.comm, ctx.sizes, False)
    return of_h, of_b, None, of_weights, None, None


def _weights_of_rows(position: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """float32 [rows, 1]: the weight of each row, NaN past the last."""
    rows = position.numel()
    weights = torch.ones_like(position, dtype=torch.float32) if weights is None else weights
    factors = weights.new_full((rows + 1,), torch.nan)  # the last for the entries that have no row here
    factors[torch.where(position < 0, rows, position).flatten().long()] = weights.flatten()
    return factors[:rows, None]


_operator.register_autograd(_gradients, setup_context=_keep)
