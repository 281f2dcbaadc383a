"""Which rows of a mixture of experts a rank multiplies, and in which order: found on the device.

All ranks learn all ranks' choice of experts. Each then sorts the tokens that have one of its experts by (expert, how
far away their rank is, token): a stable counting sort without atomics, so that all places are the same in every run.
Every expert's rows are cut into tiles, and the tiles sorted by how far away the farthest of their rows is: the order in
which rows arrive in an all-gather, and, backwards, that in which a reduce-scatter needs them.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl import environment
from tdccl.communicator import Communicator, named
from tdccl.ep import ExpertParallel
from tdccl.ep.experts import power_of_two
from tdccl.ep.routing import local_experts
from tdccl.errors import ArgumentError
from tdccl.language import overlap
from tdccl.overlap.workspace import workspace
from tdccl.runtime.launch import keyed

# The most blocks that look at the tokens of one rank, and at how many places together.
_PARTS = 1 if environment.emulated() else 32
_PLACES_AT_ONCE = 128
_UNIT = 4  # 16 bytes of an inbox
_WARPS = 4 if environment.emulated() else 8


class Sizes(NamedTuple):
    """What of a routing the host knows; all but `tokens` the same on all ranks.

    tokens   of this rank
    most     the most that any rank has: token t of rank r has number r * most + t
    top_k    experts of a token
    experts  on all ranks together
    sharded  1: rank r has experts r * experts / ranks .. whole; 0: every rank has a part of each expert
    """

    tokens: int
    most: int
    top_k: int
    experts: int
    sharded: int


class Tables(NamedTuple):
    """A routing as kernels take it; all *i32 but the last. An entry is a token and one of its places in top-k.

    idx        [ranks * most, top_k]: the experts of all ranks' tokens; what is no expert stands for none
    position   [ranks * most, top_k]: the row of an entry here, -1 if its expert is not here
    source     [ranks * most * top_k]: the entry of a row, token * top_k + place; nothing past the last row
    offsets    [experts here + 1]: the row at which each expert begins, and where the last ends
    stages     [ranks + 1]: the tile with which each distance begins, and how many there are
    tiles      [most tiles, 4]: expert, first row, rows, distance
    """

    idx: object
    position: object
    source: object
    offsets: object
    stages: object
    tiles: object


class Routing:
    """What `route` and `route_experts` make, and the operators take.

    sizes    what the host knows
    height   rows of a tile
    memory   int32, of the tables
    tables   Tables, views of it
    weights  float32 [ranks * most, top_k] of all ranks, or None
    """

    def __init__(self, comm: Communicator, sizes: Sizes, memory: torch.Tensor, weights: torch.Tensor | None):
        self.comm, self.sizes, self.memory, self.weights = comm, sizes, memory, weights
        self.height = height_of(comm.size, sizes)

    @property
    def tables(self) -> Tables:
        layout, _ = _layout(self.comm.size, self.sizes)
        return Tables(*(self.memory[start : start + math.prod(shape)].view(shape) for start, shape in layout))

    @property
    def rows(self) -> int:
        """Rows that there can be here at most; there are `offsets[-1]`."""
        return self.comm.size * self.sizes.most * self.sizes.top_k

    @property
    def offsets(self) -> torch.Tensor:
        """int32 [experts here + 1]: the row at which each expert begins, and where the last ends."""
        return self.tables.offsets

    @property
    def source(self) -> torch.Tensor:
        """int32 [rows]: the token and place of a row, as (rank * most + token) * top_k + place; past the last row any
        values."""
        return self.tables.source

    def constants(self) -> dict[str, int]:
        """Those that kernels take."""
        sizes = self.sizes
        return {
            "TOP_K": sizes.top_k, "PLACES": power_of_two(sizes.top_k), "LOCAL": local_of(self.comm.size, sizes),
        }  # fmt: skip


def local_of(ranks: int, sizes: Sizes) -> int:
    """How many experts a rank has, or a part of."""
    return sizes.experts // ranks if sizes.sharded else sizes.experts


def height_of(ranks: int, sizes: Sizes) -> int:
    """Rows of a tile: fewer where an expert has few."""
    if environment.emulated():
        return 16
    return 64 if ranks * sizes.most * sizes.top_k <= 64 * sizes.experts else 128


def parts_for(ranks: int, multiprocessors: int) -> int:
    """Blocks that look at the tokens of one rank, a power of two: all run at once, up to two a multiprocessor."""
    return min(_PARTS, 1 << (max(1, 2 * multiprocessors // ranks).bit_length() - 1))


def _layout(ranks: int, sizes: Sizes) -> tuple[list[tuple[int, tuple[int, ...]]], int]:
    """First word and shape of each table, in their order, each at a multiple of 16 bytes; and all words."""
    tokens, local = ranks * sizes.most, local_of(ranks, sizes)
    entries = tokens * sizes.top_k
    tiles = entries // height_of(ranks, sizes) + local
    shapes = [(tokens, sizes.top_k), (tokens, sizes.top_k), (entries,), (local + 1,), (ranks + 1,), (tiles, 4)]
    layout, end = [], 0
    for shape in shapes:
        layout.append((end, shape))
        end += -(-math.prod(shape) // 4) * 4
    return layout, end


@triton.jit
def _range_of_part(block, most, PARTS: tl.constexpr):
    """First and last + 1 of the tokens of its source that belong to a block."""
    span = (most + PARTS - 1) // PARTS
    first = tl.minimum(block % PARTS * span, most)
    return first, tl.minimum(first + span, most)


@triton.jit
def _entries_of(first, last, TOP_K: tl.constexpr, PLACES: tl.constexpr, TILE: tl.constexpr):
    """Entries [TILE, PLACES] of the tokens first .. of a rank, and the mask of those before `last`."""
    token, place = first + tl.arange(0, TILE), tl.arange(0, PLACES)
    return token[:, None] * TOP_K + place[None, :], (token < last)[:, None] & (place < TOP_K)[None, :]


@triton.jit
def _words_of(source, entries):
    """The first word (int64) of what a source has sent: its entries' experts, then their weights."""
    return (tl.zeros([], tl.int64) + source) * entries * 2


@triton.jit
def exchange_choices(
    team, epochs, signals, inbox, odd, idx, factors, tables, weights, counts, tokens, most, most_signals, shard,
    TOP_K: tl.constexpr, PLACES: tl.constexpr, LOCAL: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """tables.idx and `weights` of all ranks from their idx and factors [tokens, TOP_K], and how many of which experts.

    Block d * PARTS + p sends part p of this rank's tokens to the rank at distance -d, and takes that part of the rank
    at distance d. counts [blocks, COLUMNS]: its entries of each expert here. inbox: Symmetric, int32 [size sources, 2,
    most, TOP_K], in odd epochs from element `odd` on. signals: Symmetric, int64 [size sources, most_signals].

    Waits:    block b for block b of one peer.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    parities alternate. A rank launches this after its last one, which has heard from all peers, who spoke in
              it after they had ended the last but one, which read this parity.
    """
    epoch = overlap.begin(team, epochs)
    block = tl.program_id(0)
    distance = block // PARTS
    source, pe = (team.rank + distance) % team.size, (team.rank + team.size - distance) % team.size
    first, last = _range_of_part(block, most, PARTS)
    entries = most * TOP_K
    start = (epoch & 1) * odd
    out = shmem.symm_at(inbox, pe, tl.int32) + start + _words_of(team.rank, entries)
    for token in range(first, last, TILE):
        entry, mask = _entries_of(token, last, TOP_K, PLACES, TILE)
        here = mask & (entry < tokens * TOP_K)
        choice = tl.load(idx + entry, mask=here, other=-1)
        tl.store(out + entry, tl.where((choice < 0) | (choice > 1 << 30), -1, choice).to(tl.int32), mask=mask)
        if WEIGHTED:
            factor = tl.load(factors + entry, mask=here, other=0.0)
            tl.store(out + entries + entry, factor.to(tl.int32, bitcast=True), mask=mask)
    if distance > 0:
        shmem.fence()
        shmem.signal_op(shmem.symm_at(signals, pe, tl.int64, 8) + team.rank * most_signals + block, epoch)
        word = shmem.symm_at(signals, team.rank, tl.int64, 8) + source * most_signals + block
        shmem.signal_wait(team, word, epoch, source)
    else:
        tl.debug_barrier()
    column = tl.arange(0, COLUMNS)
    found = tl.zeros([COLUMNS], tl.int32)
    came = shmem.symm_at(inbox, team.rank, tl.int32) + start + _words_of(source, entries)
    for token in range(first, last, TILE):
        entry, mask = _entries_of(token, last, TOP_K, PLACES, TILE)
        chosen = tl.load(came + entry, mask=mask, other=-1)
        tl.store(tables.idx + source * entries + entry, chosen, mask=mask)
        if WEIGHTED:
            factor = tl.load(came + entries + entry, mask=mask, other=0).to(tl.float32, bitcast=True)
            tl.store(weights + source * entries + entry, factor, mask=mask)
        expert = tl.reshape(local_experts(chosen, shard, LOCAL), [TILE * PLACES])
        found += tl.sum((expert[:, None] == column[None, :]).to(tl.int32), axis=0)
    tl.store(counts + block * COLUMNS + column, found)
    overlap.end(epochs, epoch)


@triton.jit
def _flat(tile):
    return tl.reshape(tile, [tile.shape[0] * tile.shape[1]])


@triton.jit
def _counts_at(counts, distance, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Of the tokens at one distance: each expert's entries before this block, and all."""
    block, column = distance * PARTS + tl.arange(0, PARTS), tl.arange(0, COLUMNS)
    found = tl.load(counts + block[:, None] * COLUMNS + column[None, :])
    return tl.sum(tl.where((block < tl.program_id(0))[:, None], found, 0), axis=0), tl.sum(found, axis=0)


@triton.jit
def place_entries(
    team, tables, counts, most, shard, TOP_K: tl.constexpr, PLACES: tl.constexpr, LOCAL: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Fills the tables behind idx, after `exchange_choices` on its grid; ROWS: of a tile. Ordering: as there."""
    block = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    before, total = tl.zeros([COLUMNS], tl.int32), tl.zeros([COLUMNS], tl.int32)
    for distance in range(team.size):  # loops, as code that runs once costs as much to fetch as to run
        earlier, found = _counts_at(counts, distance, COLUMNS, PARTS)
        before += earlier
        total += found
    ends = tl.cumsum(total, axis=0)
    begins = ends - total
    if block == 0:
        tl.store(tables.offsets + column, begins, mask=column < LOCAL)
        tl.store(tables.offsets + 1 + column, ends, mask=column == LOCAL - 1)
        tl.store(tables.stages, 0)

    arrived, cut, listed = tl.zeros([COLUMNS], tl.int32), tl.zeros([COLUMNS], tl.int32), tl.zeros([], tl.int32)
    for distance in range(team.size):
        _, found = _counts_at(counts, distance, COLUMNS, PARTS)
        arrived += found
        # Whole tiles of what has arrived up to this distance; the last tile when all has.
        complete = tl.where(arrived == total, (total + ROWS - 1) // ROWS, arrived // ROWS)
        new = complete - cut
        place = listed + tl.cumsum(new, axis=0) - new
        for number in range(block, tl.max(new), tl.num_programs(0)):
            row = begins + (cut + number) * ROWS
            tile, there = tables.tiles + (place + number) * 4, number < new
            tl.store(tile, column, mask=there)
            tl.store(tile + 1, row, mask=there)
            tl.store(tile + 2, tl.minimum(ends - row, ROWS), mask=there)
            tl.store(tile + 3, tl.zeros_like(column) + distance, mask=there)
        listed += tl.sum(new)
        cut = complete
        if block == 0:
            tl.store(tables.stages + 1 + distance, listed)

    source = (team.rank + block // PARTS) % team.size
    first, last = _range_of_part(block, most, PARTS)
    number = tl.arange(0, TILE * PLACES)
    next_row = begins + before
    for start in range(first, last, TILE):
        entry, mask = _entries_of(source * most + start, source * most + last, TOP_K, PLACES, TILE)
        expert = local_experts(tl.load(tables.idx + entry, mask=mask, other=-1), shard, LOCAL)
        entry, mask, expert = _flat(entry), _flat(mask), _flat(expert)
        here = expert >= 0
        chosen = expert[:, None] == column[None, :]
        earlier = (expert[:, None] == expert[None, :]) & (number[None, :] < number[:, None])
        row = tl.sum(tl.where(chosen, next_row[None, :], 0), axis=1) + tl.sum(earlier.to(tl.int32), axis=1)
        tl.store(tables.position + entry, tl.where(here, row, -1), mask=mask)
        tl.store(tables.source + row, entry, mask=here)
        next_row += tl.sum(chosen.to(tl.int32), axis=0)


def route(
    comm: Communicator, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None = None, *, experts: int
) -> Routing:
    """The routing of experts of which every rank has a part (tensor parallelism); on the current stream, collective.

    topk_idx: int64 or int32 [tokens, top_k], as many tokens on every rank: the experts of each, anything outside 0 ..
    experts for none (tokens that are but padding have none). topk_weights: float32 [tokens, top_k], with a gradient;
    what `grouped_gemm_reduce_scatter` multiplies the experts' rows by, 1 if None. experts: how many there are. Nothing
    waits on the host. Raises ArgumentError, and what any call of `comm` raises.
    """
    if topk_idx.dim() != 2:
        raise ArgumentError(f"topk_idx is {tuple(topk_idx.shape)}, expected [tokens, top_k]")
    return _routed(comm, topk_idx, topk_weights, Sizes(len(topk_idx), len(topk_idx), topk_idx.shape[1], experts, 0))


def route_experts(ep: ExpertParallel, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None = None) -> Routing:
    """The routing of whole experts that are spread over the ranks as those of `ep`; as `route`, but for up to
    ep.max_tokens tokens a rank, on each a number of its own. topk_idx: [tokens, ep.top_k]."""
    if topk_idx.dim() != 2:
        raise ArgumentError(f"topk_idx is {tuple(topk_idx.shape)}, expected [tokens, {ep.top_k}]")
    sizes = Sizes(len(topk_idx), ep.max_tokens, ep.top_k, ep.num_experts, 1)
    if sizes.tokens > sizes.most:
        raise ArgumentError(f"route_experts: topk_idx has {sizes.tokens} tokens, expected at most {sizes.most}")
    return _routed(ep.comm, topk_idx, topk_weights, sizes)


def _routed(comm: Communicator, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None, sizes: Sizes) -> Routing:
    shape = (sizes.tokens, sizes.top_k)
    for name, tensor, dtypes in (
        ("topk_idx", topk_idx, (torch.int64, torch.int32)), ("topk_weights", topk_weights, (torch.float32,)),
    ):  # fmt: skip
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != comm.device:
            raise ArgumentError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected "
                f"{' or '.join(map(str, dtypes))} {shape} on {comm.device}"
            )
    if len(comm.topology.nodes) > 1:
        raise ArgumentError("products of experts are for the ranks of one node; take the communicator of split()")
    if sizes.experts < 1:
        raise ArgumentError(f"experts is {sizes.experts}, expected a whole number >= 1")
    memory, weights = torch.ops.tdccl.route(topk_idx, topk_weights, comm.name, list(sizes))
    return Routing(comm, sizes, memory, None if topk_weights is None else weights)


@torch.library.custom_op("tdccl::route", mutates_args=())
def _operator(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor | None, comm: str, sizes: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    communicator, given = named(comm), Sizes(*sizes)
    _, words = _layout(communicator.size, given)
    routing = Routing(communicator, given, topk_idx.new_empty(words, dtype=torch.int32), None)
    weights = topk_idx.new_empty(0, dtype=torch.float32)
    if topk_weights is not None:
        weights = weights.new_empty(communicator.size * given.most, given.top_k)
    if routing.rows == 0:
        routing.memory.zero_()
        return routing.memory, weights
    _find(routing, topk_idx.contiguous(), None if topk_weights is None else topk_weights.contiguous(), weights)
    return routing.memory, weights


def padded_tokens(tensor: torch.Tensor, most: int, value: int = 0) -> torch.Tensor:
    """[most, ..], contiguous, `value` where there is no token."""
    if len(tensor) == most:
        return tensor.contiguous()
    padded = tensor.new_full((most, *tensor.shape[1:]), value)
    padded[: len(tensor)] = tensor
    return padded


def _find(routing: Routing, idx: torch.Tensor, factors: torch.Tensor | None, weights: torch.Tensor) -> None:
    """Fills the tables, and the weights of all ranks if this one gives its own."""
    comm, sizes, constants = routing.comm, routing.sizes, routing.constants()
    columns, parts = power_of_two(constants["LOCAL"]), parts_for(comm.size, comm.multiprocessors)
    blocks = comm.size * parts
    counts = routing.memory.new_empty(blocks, columns)
    tables, shard = routing.tables, comm.rank if sizes.sharded else 0
    constants |= {"COLUMNS": columns, "PARTS": parts, "TILE": max(1, _PLACES_AT_ONCE // constants["PLACES"])}
    space = workspace(comm, "route", 2 * routing.rows, _UNIT, torch.int32, blocks, blocks)

    def exchange_and_place():
        keyed(exchange_choices)[(blocks,)](
            comm.team, space.epochs[0], space.signals_on_all_ranks, space.on_all_ranks, space.odd(_UNIT), idx, factors,
            tables, weights, counts, sizes.tokens, sizes.most, space.most, shard, **constants,
            WEIGHTED=factors is not None, num_warps=_WARPS,
        )  # fmt: skip
        keyed(place_entries)[(blocks,)](
            comm.team, tables, counts, sizes.most, shard, **constants, ROWS=routing.height, num_warps=_WARPS
        )

    comm.start_fused("all_gather", "route", idx, exchange_and_place)


@_operator.register_fake
def _fake(topk_idx, topk_weights, comm, sizes):
    ranks, given = named(comm).size, Sizes(*sizes)
    shape = (0,) if topk_weights is None else (ranks * given.most, given.top_k)
    memory = topk_idx.new_empty(_layout(ranks, given)[1], dtype=torch.int32)
    return memory, topk_idx.new_empty(shape, dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.comm, ctx.tokens, ctx.weighted = inputs[2], inputs[3][0], inputs[1] is not None
    ctx.mark_non_differentiable(output[0])


def _gradients(ctx, _, of_weights):
    """Of a rank's own weights: what all ranks found for them, added up."""
    if not ctx.weighted:
        return None, None, None, None
    return None, torch.ops.tdccl.own_weights(of_weights, ctx.comm, ctx.tokens), None, None


_operator.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("tdccl::own_weights", mutates_args=())
def _own_weights(everyone: torch.Tensor, comm: str, tokens: int) -> torch.Tensor:
    """The sum over ranks of what each has for this rank's weights: [tokens, top_k]."""
    return named(comm).reduce_scatter(everyone.contiguous())[:tokens].clone()


@_own_weights.register_fake
def _(everyone, comm, tokens):
    return everyone.new_empty(tokens, everyone.shape[1])
