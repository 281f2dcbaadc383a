"""Where every row of a dispatch goes, found on the device: the kernels of a plan.

All ranks learn all ranks' routing, and each computes from it its own part of what follows. A token is sent once to each
rank that has one of its experts. There its *compact row* is counted by (source rank, source token), and its *expert
rows*, one for each of its experts there, by (local expert, source rank, source token), every expert beginning at a
multiple of `align`.

Tokens are cut into ranges: of every source, range b belongs to block b, here and in the kernels that move rows.
Nothing is counted by atomics, so all places are the same in every run.

Across nodes a token goes once to each node that has one of its experts, to the rank with the same place there, which
passes it on: that rank finds the rows inside its node of the tokens of all ranks with its place.
"""

import triton
import triton.language as tl

import tdccl.language as shmem

# Words at which a kernel says what was wrong with a routing: 1 + a token of which it is true, or 0.
OUT_OF_RANGE, TWICE, NO_ROOM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def at(address, DTYPE: tl.constexpr):
    """Pointer to DTYPE at an int64 address, which is a multiple of 16. Ordering: none."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def range_of_block(count):
    """First and last + 1 of the `count` tokens of a source that belong to this block (int32)."""
    span = tl.cdiv(count, tl.num_programs(0))
    first = tl.minimum(tl.program_id(0) * span, count)
    return first, tl.minimum(first + span, count)


@triton.jit
def complain(complaints, KIND: tl.constexpr, wrong, token):
    """Notes one of the tokens for which `wrong` holds. Ordering: none; the host reads it when the kernel has ended."""
    worst = tl.max(tl.where(wrong, token + 1, 0)).to(tl.int64)
    tl.store(complaints + KIND, worst, mask=worst > 0)


@triton.jit
def clean(idx, token, complaints, EXPERTS: tl.constexpr, COMPLAIN: tl.constexpr = True):
    """Experts [tokens, places] as int32, where -1 also stands for what is no expert, or is there twice in a row.

    COMPLAIN: of these. Ordering: as `complain`.
    """
    outside = (idx < -1) | (idx >= EXPERTS)
    if COMPLAIN:
        complain(complaints, OUT_OF_RANGE, tl.max(outside.to(tl.int32), axis=1) != 0, token)
    idx = tl.where(outside, -1, idx).to(tl.int32)
    place = tl.arange(0, idx.shape[1])
    before = place[None, None, :] < place[None, :, None]
    same = (idx[:, :, None] == idx[:, None, :]) & before & (idx[:, :, None] >= 0)
    again = tl.max(same.to(tl.int32), axis=2) != 0
    if COMPLAIN:
        complain(complaints, TWICE, tl.max(again.to(tl.int32), axis=1) != 0, token)
    return tl.where(again, -1, idx)


@triton.jit
def local_experts(idx, rank, LOCAL: tl.constexpr):
    """Experts as numbered on `rank`, -1 for those of other ranks and for none."""
    local = idx - rank * LOCAL
    return tl.where((local >= 0) & (local < LOCAL), local, -1)


@triton.jit
def going_to(idx, rank, LOCAL: tl.constexpr):
    """For each token [tokens] 1 if it has an expert on `rank`, else 0."""
    return tl.max((local_experts(idx, rank, LOCAL) >= 0).to(tl.int32), axis=1)


@triton.jit
def _routing_offset(buffers, parity, source, TOKENS: tl.constexpr, TOP_K: tl.constexpr, SIZE):
    return buffers[0] + (parity * SIZE + source) * ((TOKENS * TOP_K + 3) // 4 * 16)


@triton.jit
def _sizes_offset(buffers, parity, SIZE):
    """Of this block's words that say how many tokens each source has."""
    return buffers[1] + (parity * tl.num_programs(0) + tl.program_id(0)) * SIZE * 4


@triton.jit
def _load_routing(pointer, first, last, TILE: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr):
    token = first + tl.arange(0, TILE)
    place = tl.arange(0, PLACES)
    mask = (token < last)[:, None] & (place < TOP_K)[None, :]
    offset = token[:, None] * TOP_K + place[None, :]
    return token, offset, mask, tl.load(pointer + offset, mask=mask, other=-1)


@triton.jit
def _routing_of(
    team, buffers, gathered, parity, source, TOKENS: tl.constexpr, TOP_K: tl.constexpr, NODES: tl.constexpr
):
    """Pointer to the routing of a source: what it told this block, or across nodes what was `gathered`."""
    if NODES == 1:
        return shmem.local_at(team, _routing_offset(buffers, parity, source, TOKENS, TOP_K, team.size), tl.int32)
    else:
        return gathered + source * ((TOKENS * TOP_K + 3) // 4 * 4 + 4)


@triton.jit
def _sizes_of_all(
    team, buffers, gathered, parity, TOKENS: tl.constexpr, TOP_K: tl.constexpr, NODES: tl.constexpr,
    SOURCES: tl.constexpr,
):  # fmt: skip
    """How many tokens each source has [SOURCES], by what `_routing_of` leads to. Ordering: plain loads."""
    source = tl.arange(0, SOURCES)
    if NODES == 1:
        sizes = (team.local + _sizes_offset(buffers, parity, team.size)).to(tl.pointer_type(tl.int32)) + source
    else:
        entries: tl.constexpr = (TOKENS * TOP_K + 3) // 4 * 4
        sizes = gathered + source * (entries + 4) + entries
    return tl.minimum(tl.maximum(tl.load(sizes, mask=source < team.size * NODES, other=0), 0), TOKENS)


@triton.jit
def _of(table, number):
    """Row `number` of a table, or element `number` of a vector."""
    there = tl.arange(0, table.shape[0]) == number
    if len(table.shape) == 2:
        there = there[:, None]
    return tl.sum(tl.where(there, table, 0), axis=0)


@triton.jit
def _count(
    team, buffers, gathered, parity, node, counts, TOKENS: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    TILE: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr, NODES: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Counts what is in this block's range of every source: tokens for each expert here, and for each rank of the node.

    Ordering: plain loads and stores.
    """
    column, rank = tl.arange(0, COLUMNS), tl.arange(0, shmem.MAX_RANKS)
    local: tl.constexpr = EXPERTS // (team.size * NODES)
    sizes = _sizes_of_all(team, buffers, gathered, parity, TOKENS, TOP_K, NODES, SOURCES)
    for source in range(team.size * NODES):  # a loop, as code that runs once costs as much to fetch as to run
        routing = _routing_of(team, buffers, gathered, parity, source, TOKENS, TOP_K, NODES)
        first, last = range_of_block(_of(sizes, source))
        of_expert, of_rank = tl.zeros([COLUMNS], tl.int32), tl.zeros([shmem.MAX_RANKS], tl.int32)
        for start in range(first, last, TILE):
            _, _, _, idx = _load_routing(routing, start, last, TILE, TOP_K, PLACES)
            mine = tl.reshape(local_experts(idx, node * team.size + team.rank, local), [TILE * PLACES])
            of_expert += tl.sum((mine[:, None] == column[None, :]).to(tl.int32), axis=0)
            for to in tl.static_range(team.size):
                of_rank += tl.where(rank == to, tl.sum(going_to(idx, node * team.size + to, local)), 0)
        row = counts + (tl.program_id(0) * team.size * NODES + source) * (COLUMNS + shmem.MAX_RANKS)
        tl.store(row + column, of_expert)
        tl.store(row + COLUMNS + rank, of_rank)


@triton.jit
def _clear(plan, words):
    """Fills the words of a plan with -1, all blocks together."""
    for start in range(tl.program_id(0) * 1024, words, tl.num_programs(0) * 1024):
        word = start + tl.arange(0, 1024)
        tl.store(plan + word, -1, mask=word < words)


@triton.jit
def write(
    team, buffers, tensors, sizes, DTYPE: tl.constexpr, TOKENS: tl.constexpr, TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr, TILE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Across nodes, before an all_gather: writes this rank's routing and its size as others are to read them.

    tensors: addresses of the routing (DTYPE [n, TOP_K]), of what is to be gathered (int32: TOKENS * TOP_K words rounded
    up to fours, then n), of the plan (filled with -1 here) and the complaints. sizes: n, and the words of the plan.
    """
    topk, message = at(tensors[0], DTYPE), at(tensors[1], tl.int32)
    complaints, count = at(tensors[3], tl.int64), sizes[0].to(tl.int32)
    first, last = range_of_block(count)
    for start in range(first, last, TILE):
        token, offset, mask, idx = _load_routing(topk, start, last, TILE, TOP_K, PLACES)
        tl.store(message + offset, clean(idx, token, complaints, EXPERTS), mask=mask)
    if tl.program_id(0) == 0:
        tl.store(message + (TOKENS * TOP_K + 3) // 4 * 4, count)
    _clear(at(tensors[2], tl.int32), sizes[1].to(tl.int32))


@triton.jit
def count(
    team, buffers, tensors, sizes, TOKENS: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, TILE: tl.constexpr,
    PLACES: tl.constexpr, COLUMNS: tl.constexpr, NODES: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Across nodes, after the all_gather: what `exchange` counts. tensors: addresses of what was gathered, and of the
    counts. sizes: this rank's node."""
    _count(
        team, buffers, at(tensors[0], tl.int32), 0, sizes[0].to(tl.int32), at(tensors[1], tl.int32), TOKENS, TOP_K,
        EXPERTS, TILE, PLACES, COLUMNS, NODES, SOURCES,
    )  # fmt: skip


@triton.jit
def exchange(
    team, buffers, tensors, sizes, DTYPE: tl.constexpr, TOKENS: tl.constexpr, TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr, TILE: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Block b gives its range of this rank's routing to all ranks, and counts what is in range b of every source.

    tensors: addresses of the routing (DTYPE [n, TOP_K]), of the plan (int32 words, filled with -1 here), of the counts
    (int32 [blocks, ranks, COLUMNS + MAX_RANKS]: tokens for each expert of this rank, then for each rank), and of the
    complaints. sizes: n, and the words of the plan. buffers: byte offsets from the team's heap to the routing of all
    ranks (int32 [2, ranks, TOKENS, TOP_K]) and the sizes (int32 [2, blocks, ranks]).

    Waits:    block b for block b of every peer, once.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    routing and sizes alternate by the parity of the epoch; each rank hears from all in each call. Sizes from
              peers are cut to TOKENS before anything is read by them.
    """
    topk, plan, counts = at(tensors[0], DTYPE), at(tensors[1], tl.int32), at(tensors[2], tl.int32)
    complaints = at(tensors[3], tl.int64)
    count = sizes[0].to(tl.int32)
    epoch = shmem.begin(team)
    parity = epoch & 1
    first, last = range_of_block(count)
    for start in range(first, last, TILE):
        token, offset, mask, idx = _load_routing(topk, start, last, TILE, TOP_K, PLACES)
        idx = clean(idx, token, complaints, EXPERTS)
        for distance in tl.static_range(1, team.size + 1):  # rank + 1 first: no two ranks on one target
            pe = (team.rank + distance) % team.size
            routing = _routing_offset(buffers, parity, team.rank, TOKENS, TOP_K, team.size)
            tl.store(shmem.heap_at(team, routing, pe, tl.int32) + offset, idx, mask=mask)
    for distance in tl.static_range(1, team.size + 1):
        pe = (team.rank + distance) % team.size
        address = tl.load(team.heap + pe) + _sizes_offset(buffers, parity, team.size) + team.rank * 4
        tl.store(address.to(tl.pointer_type(tl.int32)), count)
    shmem.signal_all(team, epoch, shmem.DATA, 1)

    _clear(plan, sizes[1].to(tl.int32))
    epoch = shmem.wait_all(team, epoch, shmem.DATA, 1)
    _count(team, buffers, counts, parity, 0, counts, TOKENS, TOP_K, EXPERTS, TILE, PLACES, COLUMNS, 1, SOURCES)
    shmem.end(team, epoch)


@triton.jit
def _before_and_total(
    counts, source, size, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SIZE, BLOCKS
):
    """Of COLUMNS columns of the counts of a source: their sums over the blocks before this one, and over all."""
    block = tl.arange(0, BLOCKS)
    column = FIRST + tl.arange(0, COLUMNS)
    offset = (block[:, None] * SIZE + source) * WIDTH + column[None, :]
    counted = block < tl.cdiv(size, tl.maximum(tl.cdiv(size, tl.num_programs(0)), 1))  # the others have no tokens
    found = tl.load(counts + offset, mask=counted[:, None], other=0)
    return tl.sum(tl.where((block < tl.program_id(0))[:, None], found, 0), axis=0), tl.sum(found, axis=0)


@triton.jit
def _starts(
    counts, sizes, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Of COLUMNS columns of the counts: for each source [sources, COLUMNS], how many there are of earlier sources and
    of its own in the blocks before this one, and how many of its own; and of all sources [COLUMNS]."""
    number = tl.arange(0, sizes.shape[0])[:, None]
    before = tl.zeros([sizes.shape[0], COLUMNS], tl.int32)
    totals = tl.zeros([sizes.shape[0], COLUMNS], tl.int32)
    for source in range(SIZE):
        of_source, total = _before_and_total(counts, source, _of(sizes, source), FIRST, COLUMNS, WIDTH, SIZE, BLOCKS)
        before += tl.where(number == source, of_source[None, :], 0) + tl.where(number > source, total[None, :], 0)
        totals += tl.where(number == source, total[None, :], 0)
    return before, totals, tl.sum(totals, axis=0)


@triton.jit
def place(
    team, buffers, tensors, sizes, TOKENS: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    ALIGN: tl.constexpr, TILE: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr, NODES: tl.constexpr,
    SOURCES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Block b finds the rows of range b of every source. Nothing of a peer is touched; `exchange` came before, or
    across nodes `count`.

    tensors: addresses of the counts, of what was gathered across nodes, and of the arrays of a plan in their order (see
    `Plan`). sizes: this rank's node. BLOCKS, SOURCES: powers of two, at least the grid, and the ranks.

    A peer that has come too late may write its routing while this reads it, or have written it since it was counted:
    what would be outside the plan's arrays is left out.
    """
    counts, gathered = at(tensors[0], tl.int32), at(tensors[1], tl.int32)
    sent_row, sent_node, recv_row = at(tensors[2], tl.int32), at(tensors[3], tl.int32), at(tensors[4], tl.int32)
    topk, expert_row = at(tensors[5], tl.int32), at(tensors[6], tl.int32)
    source_of_row, source_of_expert_row = at(tensors[7], tl.int32), at(tensors[8], tl.int32)
    told = at(tensors[9], tl.int32)
    expert_counts, expert_offsets = at(tensors[10], tl.int32), at(tensors[11], tl.int32)
    node = sizes[0].to(tl.int32)
    parity = shmem.resume(team) & 1
    ranks: tl.constexpr = team.size * NODES
    local: tl.constexpr = EXPERTS // ranks
    width: tl.constexpr = COLUMNS + shmem.MAX_RANKS
    most: tl.constexpr = ranks * TOKENS * (TOP_K if local > TOP_K else local) + local * (ALIGN - 1)  # expert rows
    column, rank = tl.arange(0, COLUMNS), tl.arange(0, shmem.MAX_RANKS)
    me = node * team.size + team.rank

    sizes_of_all = _sizes_of_all(team, buffers, gathered, parity, TOKENS, TOP_K, NODES, SOURCES)
    expert_starts, _of_sources, of_experts = _starts(counts, sizes_of_all, 0, COLUMNS, width, ranks, BLOCKS)
    rank_starts, to_ranks, _of_ranks = _starts(counts, sizes_of_all, COLUMNS, shmem.MAX_RANKS, width, ranks, BLOCKS)
    aligned = (of_experts + ALIGN - 1) // ALIGN * ALIGN
    ends = tl.cumsum(aligned, axis=0)
    expert_starts += (ends - aligned)[None, :]
    if tl.program_id(0) == 0:
        tl.store(expert_counts + column, of_experts, mask=column < local)
        tl.store(expert_offsets + column, ends - aligned, mask=column < local)
        tl.store(expert_offsets + 1 + column, ends, mask=column == local - 1)
        number = tl.arange(0, SOURCES)
        here = tl.sum(tl.where(rank[None, :] == team.rank, to_ranks, 0), axis=1)
        tl.store(told + number, sizes_of_all, mask=number < ranks)
        tl.store(told + ranks + number, here, mask=number < ranks)
        if NODES == 1:
            tl.store(told + 2 * ranks + rank, _of(to_ranks, me), mask=rank < team.size)

    for source in range(ranks):  # a loop, as code that runs once costs as much to fetch as to run
        routing = _routing_of(team, buffers, gathered, parity, source, TOKENS, TOP_K, NODES)
        first, last = range_of_block(_of(sizes_of_all, source))
        row_starts, expert_start = _of(rank_starts, source), _of(expert_starts, source)
        row_start = tl.sum(tl.where(rank == team.rank, row_starts, 0))
        for start in range(first, last, TILE):
            token, _, mask, idx = _load_routing(routing, start, last, TILE, TOP_K, PLACES)
            mine = local_experts(idx, me, local)
            comes = going_to(idx, me, local)
            row = row_start + tl.cumsum(comes, axis=0) - comes
            here = (comes != 0) & (row < ranks * TOKENS)
            tl.store(recv_row + source * TOKENS + token, row, mask=here)
            tl.store(source_of_row + row, source * TOKENS + token, mask=here)
            flat = tl.reshape(mine, [TILE * PLACES])
            chosen = flat[:, None] == column[None, :]
            number = tl.arange(0, TILE * PLACES)
            earlier = (flat[:, None] == flat[None, :]) & (number[None, :] < number[:, None])
            first_rows = tl.sum(tl.where(chosen, expert_start[None, :], 0), axis=1)
            expert_rows = tl.reshape(first_rows + tl.sum(earlier.to(tl.int32), axis=1), [TILE, PLACES])
            fits = (mine >= 0) & here[:, None] & (expert_rows < most)
            of_row = row[:, None] * TOP_K + tl.arange(0, PLACES)[None, :]
            tl.store(topk + of_row, mine, mask=mask & here[:, None])
            tl.store(expert_row + of_row, expert_rows, mask=fits)
            origin = tl.broadcast_to(source * TOKENS + token[:, None], [TILE, PLACES])
            tl.store(source_of_expert_row + expert_rows, origin, mask=fits)
            expert_start += tl.sum(chosen.to(tl.int32), axis=0)
            row_start += tl.sum(comes)
        if source % team.size == team.rank:  # its tokens pass through this rank
            for start in range(first, last, TILE):
                token, _, mask, idx = _load_routing(routing, start, last, TILE, TOP_K, PLACES)
                passed = (source // team.size * TOKENS + token) * team.size
                for pe in tl.static_range(team.size):
                    goes = going_to(idx, node * team.size + pe, local)
                    row = tl.sum(tl.where(rank == pe, row_starts, 0)) + tl.cumsum(goes, axis=0) - goes
                    tl.store(sent_row + passed + pe, row, mask=goes != 0)
                    row_starts += tl.where(rank == pe, tl.sum(goes), 0)
                if NODES > 1:
                    for to in range(NODES):
                        goes = going_to(idx, to, local * team.size)
                        tl.store(sent_node + token * NODES + to, goes, mask=(token < last) & (source == me))
