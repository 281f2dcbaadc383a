"""Dispatch and combine for few tokens: one launch and one round of signals each, a copy for each (token, expert).

Every (source, token, place in top-k) has a slot of its own on every rank, so nothing has to be agreed on before a row
is sent: how many rows go to which expert travels beside the rows. Slots are doubled by the parity of the epoch.

A row is cut into SLICES. Block b has slice b % SLICES of the tokens g, g + G, ... of every source; G is the number
of groups of blocks; g is the group b // SLICES for source 0, another for each other one, so that few tokens of several
sources fall to different blocks. Tokens of several sources are under way at once.
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.ep.routing import at, clean
from tdccl.ep.rows import quantise, wide


@triton.jit
def _my_token(team, rank, number, SLICES: tl.constexpr):
    """Token `number` of those of `rank` that are this block's."""
    groups = tl.num_programs(0) // SLICES
    return (tl.program_id(0) // SLICES + rank * (groups // team.size)) % groups + number * groups


@triton.jit
def _my_tokens(team, rank, count, SLICES: tl.constexpr):
    """How many of the `count` tokens of `rank` are this block's."""
    groups = tl.num_programs(0) // SLICES
    return tl.cdiv(tl.maximum(count - _my_token(team, rank, 0, SLICES), 0), groups)


@triton.jit
def _in_turn(number, counts):
    """Of things in one row, counts[r] of them of rank r: of which rank number `number` is, and its number there."""
    passed = number[:, None] >= tl.cumsum(counts, 0)[None, :]
    return tl.sum(passed.to(tl.int32), axis=1), number - tl.sum(tl.where(passed, counts[None, :], 0), axis=1)


@triton.jit
def _slice_tile(WIDTH: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, PADDED: tl.constexpr):
    """Offsets in a row of this block's elements, and which of them there are."""
    inside = tl.arange(0, PADDED)
    column = tl.program_id(0) % SLICES * SLICE + inside
    return column, (inside < SLICE) & (column < WIDTH)


@triton.jit
def _scale_tile(SCALES: tl.constexpr, SCALE_SLICE: tl.constexpr, SLICES: tl.constexpr, SCALE_TILE: tl.constexpr):
    """The same of its words of scales."""
    inside = tl.arange(0, SCALE_TILE)
    word = tl.program_id(0) % SLICES * SCALE_SLICE + inside
    return word, (inside < SCALE_SLICE) & (word < SCALES)


@triton.jit
def _routing_of(topk, token, live, complaints, TOP_K: tl.constexpr, PLACES: tl.constexpr, EXPERTS: tl.constexpr):
    """The experts [tokens, PLACES] of some of this rank's tokens."""
    place = tl.arange(0, PLACES)
    mask = live[:, None] & (place < TOP_K)[None, :]
    idx = tl.load(topk + token[:, None] * TOP_K + place[None, :], mask=mask, other=-1)
    return clean(idx, token, complaints, EXPERTS)


@triton.jit
def _chunk_of_routing(
    topk, start, count, complaints, TOP_K: tl.constexpr, PLACES: tl.constexpr, EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The experts of CHUNK tokens from `start` on, in one row."""
    token = start + tl.arange(0, CHUNK)
    idx = _routing_of(topk, token, token < count, complaints, TOP_K, PLACES, EXPERTS)
    return tl.reshape(idx, [CHUNK * PLACES])


@triton.jit
def _slots_offsets(
    buffers, parity, DTYPE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, TOP_K: tl.constexpr, SIZE
):  # fmt: skip
    """Of the slots of one parity, for rows and for scales.

    Where they begin does not depend on how rows are quantised: a peer's next call may be quantised otherwise.
    """
    slots = parity.to(tl.int64) * SIZE * TOKENS * TOP_K
    rows, scales = slots * (WIDTH * DTYPE.primitive_bitwidth // 8), slots * ((WIDTH + 127) // 128 * 4)
    return buffers[0] + (rows + 15) // 16 * 16, buffers[1] + (scales + 15) // 16 * 16


@triton.jit
def _notes_offset(buffers, parity, source, SLICES: tl.constexpr, TOKENS: tl.constexpr, TOP_K: tl.constexpr, SIZE):
    """Of what a source says of its rows to this block's slice: expert here * TOKENS + earlier rows from it, or -1.

    As for slots, what is of one parity does not depend on the number of slices.
    """
    return buffers[2] + ((tl.program_id(0) % SLICES * 2 + parity) * SIZE + source) * ((TOKENS * TOP_K + 3) // 4 * 16)


@triton.jit
def _counts_offset(buffers, parity, source, COLUMNS: tl.constexpr, SIZE):
    """Of the words by which a source tells this block its rows for each expert here, and how many tokens it has."""
    return buffers[3] + ((parity * tl.num_programs(0) + tl.program_id(0)) * SIZE + source) * (COLUMNS + 4) * 4


@triton.jit
def _send_rows(
    team, buffers, parity, x, topk, complaints, count, DTYPE: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, PADDED: tl.constexpr, QUANT: tl.constexpr, SCALES: tl.constexpr, SCALE_SLICE: tl.constexpr,
    SCALE_TILE: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores this block's slices of all rows, and what they are, on the ranks of their experts.

    Ordering: plain stores; signal the peers after it.
    """
    local: tl.constexpr = EXPERTS // team.size
    PAYLOAD: tl.constexpr = DTYPE if QUANT == "" else tl.uint8
    column, in_slice = _slice_tile(WIDTH, SLICE, SLICES, PADDED)
    word, in_words = _scale_tile(SCALES, SCALE_SLICE, SLICES, SCALE_TILE)
    place, number = tl.arange(0, PLACES), tl.arange(0, CHUNK * PLACES)
    row_slots, scale_slots = _slots_offsets(buffers, parity, DTYPE, WIDTH, TOKENS, TOP_K, team.size)
    for start in range(0, _my_tokens(team, team.rank, count, SLICES), TILE):
        token = _my_token(team, team.rank, start + tl.arange(0, TILE), SLICES)
        live = token < count
        tile = tl.load(
            x + wide(token)[:, None] * WIDTH + column[None, :], mask=live[:, None] & in_slice[None, :], other=0
        )
        if QUANT != "":
            groups = tl.reshape(tile, [TILE * (PADDED // 128), 128])
            quantised, words = quantise(groups, QUANT == "fp8_128_ue8m0")
            tile, words = tl.reshape(quantised, [TILE, PADDED]), tl.reshape(words, [TILE, SCALE_TILE])
        idx = _routing_of(topk, token, live, complaints, TOP_K, PLACES, EXPERTS)
        flat = tl.reshape(idx, [TILE * PLACES])
        before = tl.reshape(tl.broadcast_to(token[:, None] * PLACES, [TILE, PLACES]), [TILE * PLACES])
        earlier = tl.zeros([TILE * PLACES], tl.int32)
        for part in range(0, tl.max(tl.where(live, token, 0)), CHUNK):
            others = _chunk_of_routing(topk, part, count, complaints, TOP_K, PLACES, EXPERTS, CHUNK)
            same = (flat[:, None] == others[None, :]) & (number[None, :] + part * PLACES < before[:, None])
            earlier += tl.sum(same.to(tl.int32), axis=1)
        earlier = tl.reshape(earlier, [TILE, PLACES])
        note = idx % local * TOKENS + earlier
        owner = tl.where(idx >= 0, idx // local, -1)
        for distance in tl.static_range(1, team.size + 1):  # rank + 1 first: no two ranks on one target
            pe = (team.rank + distance) % team.size
            notes = _notes_offset(buffers, parity, team.rank, SLICES, TOKENS, TOP_K, team.size)
            target = shmem.heap_at(team, notes, pe, tl.int32) + token[:, None] * TOP_K + place[None, :]
            tl.store(target, tl.where(owner == pe, note, -1), mask=live[:, None] & (place < TOP_K)[None, :])
        for k in tl.static_range(TOP_K):
            owner_k = tl.sum(tl.where(place[None, :] == k, owner, 0), axis=1)
            goes = live & (owner_k >= 0)
            base = tl.load(team.heap + owner_k, mask=goes, other=0)
            slot = wide((team.rank * TOKENS + token) * TOP_K + k)
            target = base + row_slots + slot * (WIDTH * PAYLOAD.primitive_bitwidth // 8)
            target = tl.multiple_of(target.to(tl.pointer_type(PAYLOAD)), ALIGN)
            tl.store(target[:, None] + column[None, :], tile, mask=goes[:, None] & in_slice[None, :])
            if QUANT != "":
                target = (base + scale_slots + slot * (SCALES * 4)).to(tl.pointer_type(tl.int32))
                tl.store(target[:, None] + word[None, :], words, mask=goes[:, None] & in_words[None, :])


@triton.jit
def _send_counts(
    team, buffers, parity, topk, complaints, count, TOP_K: tl.constexpr, PLACES: tl.constexpr, CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERT_TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tells this block of every rank how many rows each expert there gets from here, and how many tokens there are.

    Ordering: plain stores; signal the peers after it.
    """
    local: tl.constexpr = EXPERTS // team.size
    expert = tl.arange(0, EXPERT_TILE)
    rows = tl.zeros([EXPERT_TILE], tl.int32)
    for start in range(0, count, CHUNK):
        flat = _chunk_of_routing(topk, start, count, complaints, TOP_K, PLACES, EXPERTS, CHUNK)
        rows += tl.histogram(tl.maximum(flat, 0), EXPERT_TILE, mask=flat >= 0)
    to = tl.load(team.heap + expert // local, mask=expert < EXPERTS, other=0)
    to += _counts_offset(buffers, parity, team.rank, COLUMNS, team.size) + expert % local * 4
    tl.store(to.to(tl.pointer_type(tl.int32)), rows, mask=expert < EXPERTS)
    rank = tl.arange(0, shmem.MAX_RANKS)
    to = tl.load(team.heap + rank, mask=rank < team.size, other=0)
    to += _counts_offset(buffers, parity, team.rank, COLUMNS, team.size) + COLUMNS * 4
    tl.store(to.to(tl.pointer_type(tl.int32)), tl.zeros_like(rank) + count, mask=rank < team.size)


@triton.jit
def _told(team, buffers, parity, LOCAL: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr):
    """What the sources said: rows [RANKS, COLUMNS] for each expert here, and tokens [RANKS]. No more than fit.

    Ordering: wait for the sources first.
    """
    source, expert = tl.arange(0, RANKS), tl.arange(0, COLUMNS)
    there = source < team.size
    words = shmem.local_at(team, _counts_offset(buffers, parity, source, COLUMNS, team.size), tl.int32)
    rows = tl.load(words[:, None] + expert[None, :], mask=there[:, None] & (expert < LOCAL)[None, :], other=0)
    tokens = tl.load(words + COLUMNS, mask=there, other=0)
    return tl.minimum(tl.maximum(rows, 0), TOKENS), tl.minimum(tl.maximum(tokens, 0), TOKENS)


@triton.jit
def _take_rows(
    team, buffers, parity, found, tokens, out, out_scales, placed, sources, DTYPE: tl.constexpr,
    PAYLOAD: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, PADDED: tl.constexpr,
    SCALES: tl.constexpr, SCALE_SLICE: tl.constexpr, SCALE_TILE: tl.constexpr, TOP_K: tl.constexpr,
    PLACES: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, LOCAL: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Copies this block's slices of what all ranks sent here to their places. found, tokens: as of `_told`.

    Ordering: wait for the sources first.
    """
    column, in_slice = _slice_tile(WIDTH, SLICE, SLICES, PADDED)
    word, in_words = _scale_tile(SCALES, SCALE_SLICE, SLICES, SCALE_TILE)
    place, pair = tl.arange(0, PLACES), tl.arange(0, RANKS * COLUMNS)
    first_rows = tl.reshape(tl.cumsum(found, 0) - found, [RANKS * COLUMNS])
    room: tl.constexpr = team.size * TOKENS
    row_slots, scale_slots = _slots_offsets(buffers, parity, DTYPE, WIDTH, TOKENS, TOP_K, team.size)
    mine = _my_tokens(team, tl.arange(0, RANKS), tokens, SLICES)
    total = tl.sum(mine)
    for start in range(0, total, TILE):
        number = start + tl.arange(0, TILE)
        live = number < total
        source, number = _in_turn(number, mine)
        token = _my_token(team, source, number, SLICES)
        mask = live[:, None] & (place < TOP_K)[None, :]
        notes = _notes_offset(buffers, parity, source, SLICES, TOKENS, TOP_K, team.size)
        said = shmem.local_at(team, notes, tl.int32) + token * TOP_K
        note = tl.reshape(tl.load(said[:, None] + place[None, :], mask=mask, other=-1), [TILE * PLACES])
        entry = ((source * TOKENS + token) * TOP_K)[:, None] + place[None, :]
        entry, mask = tl.reshape(entry, [TILE * PLACES]), tl.reshape(mask, [TILE * PLACES])
        chosen = (entry // (TOKENS * TOP_K) * COLUMNS + note // TOKENS)[:, None] == pair[None, :]
        row = tl.sum(tl.where(chosen, first_rows[None, :], 0), axis=1) + note % TOKENS
        here = (note >= 0) & (note < LOCAL * TOKENS) & (row < room)
        row += note // TOKENS * room
        if tl.program_id(0) % SLICES == 0:
            tl.store(placed + entry, tl.where(here, row, -1), mask=mask)
            tl.store(sources + row, entry // TOP_K, mask=here)
        slot = wide(entry)
        landed = shmem.heap_at(team, row_slots, team.rank, PAYLOAD) + slot[:, None] * WIDTH + column[None, :]
        tile = tl.load(landed, mask=here[:, None] & in_slice[None, :])
        tl.store(out + wide(row)[:, None] * WIDTH + column[None, :], tile, mask=here[:, None] & in_slice[None, :])
        if SCALES > 0:
            landed = shmem.heap_at(team, scale_slots, team.rank, tl.int32) + slot[:, None] * SCALES + word[None, :]
            words = tl.load(landed, mask=here[:, None] & in_words[None, :])
            tl.store(
                out_scales + wide(row)[:, None] * SCALES + word[None, :], words, mask=here[:, None] & in_words[None, :]
            )


@triton.jit
def dispatch(
    team, buffers, tensors, sizes, DTYPE: tl.constexpr, IDX: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, PADDED: tl.constexpr, QUANT: tl.constexpr, SCALES: tl.constexpr, SCALE_SLICE: tl.constexpr,
    SCALE_TILE: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERT_TILE: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, ALIGN: tl.constexpr,
    TILE: tl.constexpr, TAKEN: tl.constexpr, SEND: tl.constexpr, RECV: tl.constexpr,
):  # fmt: skip
    """Each block sends its slices of its tokens, then takes its slices of what came from all ranks.

    tensors: addresses of x (DTYPE [n, WIDTH]) and the routing (int64 or int32, of IDX bits, [n, TOP_K]); of out
    ([experts here, ranks * TOKENS, WIDTH]), out_scales, placed, sources, counts, sizes; of the complaints. sizes: n.
    buffers: byte offsets from the team's heap to slots of rows and of scales, notes and counts.
    SEND and RECV: this launch does the first half, the second, or both. TILE and TAKEN: tokens at once in each. ALIGN:
    of which a row's bytes are a multiple.

    Waits:    block b for block b of every peer, once.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    all buffers alternate by the parity of the epoch; each rank hears from all in each call. Counts from peers
              are cut to what there is room for.
    """
    PAYLOAD: tl.constexpr = DTYPE if QUANT == "" else tl.uint8
    local: tl.constexpr = EXPERTS // team.size
    complaints, count = at(tensors[8], tl.int64), sizes[0].to(tl.int32)
    if SEND:
        epoch = shmem.begin(team)
        topk = at(tensors[1], tl.int64 if IDX == 64 else tl.int32)
        _send_rows(
            team, buffers, epoch & 1, at(tensors[0], DTYPE), topk, complaints, count, DTYPE, WIDTH, SLICE, SLICES,
            PADDED, QUANT, SCALES, SCALE_SLICE, SCALE_TILE, TOP_K, PLACES, TOKENS, CHUNK, EXPERTS, ALIGN, TILE,
        )  # fmt: skip
        # Last, while the rows are on their way.
        _send_counts(
            team, buffers, epoch & 1, topk, complaints, count, TOP_K, PLACES, CHUNK, EXPERTS, EXPERT_TILE, COLUMNS
        )
        shmem.signal_all(team, epoch, shmem.DATA, 1)
    else:
        epoch = shmem.resume(team)
    if RECV:
        parity = epoch & 1
        epoch = shmem.wait_all(team, epoch, shmem.DATA, 1)
        found, tokens = _told(team, buffers, parity, local, TOKENS, COLUMNS, RANKS)
        _take_rows(
            team, buffers, parity, found, tokens, at(tensors[2], PAYLOAD), at(tensors[3], tl.int32),
            at(tensors[4], tl.int32), at(tensors[5], tl.int32), DTYPE, PAYLOAD, WIDTH, SLICE, SLICES, PADDED,
            SCALES, SCALE_SLICE, SCALE_TILE, TOP_K, PLACES, TOKENS, COLUMNS, RANKS, local, TAKEN,
        )  # fmt: skip
        if tl.program_id(0) == 0:
            expert, rank = tl.arange(0, COLUMNS), tl.arange(0, RANKS)
            tl.store(at(tensors[6], tl.int32) + expert, tl.sum(found, axis=0), mask=expert < local)
            tl.store(at(tensors[7], tl.int32) + rank, tokens, mask=rank < team.size)
    shmem.end(team, epoch)


@triton.jit
def _send_back(
    team, buffers, parity, h, placed, sizes, DTYPE: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, PADDED: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr,
    RANKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores this block's slices of the rows of h where their tokens came from. Ordering: as `_send_rows`."""
    column, in_slice = _slice_tile(WIDTH, SLICE, SLICES, PADDED)
    place, turn = tl.arange(0, PLACES), tl.arange(0, RANKS)
    peers = (team.rank + 1 + turn) % team.size  # rank + 1 first: no two ranks on one target
    tokens = tl.load(sizes + peers, mask=turn < team.size, other=0)
    mine = _my_tokens(team, peers, tokens, SLICES)
    total = tl.sum(mine)
    for start in range(0, total, TILE):
        number = start + tl.arange(0, TILE)
        live = number < total
        turn_of, number = _in_turn(number, mine)
        pe = (team.rank + 1 + turn_of) % team.size
        token = _my_token(team, pe, number, SLICES)
        entry = tl.reshape(((pe * TOKENS + token) * TOP_K)[:, None] + place[None, :], [TILE * PLACES])
        mask = tl.reshape(live[:, None] & (place < TOP_K)[None, :], [TILE * PLACES])
        row = tl.load(placed + entry, mask=mask, other=-1)
        there = (row >= 0)[:, None] & in_slice[None, :]
        tile = tl.load(h + wide(row)[:, None] * WIDTH + column[None, :], mask=there)
        owner = tl.where(mask, entry // (TOKENS * TOP_K), team.rank)
        slot = wide(parity * TOKENS * TOP_K + entry % (TOKENS * TOP_K))
        target = shmem.heap_at(team, buffers[0], owner, DTYPE)[:, None] + slot[:, None] * WIDTH
        tl.store(target + column[None, :], tile, mask=there)


@triton.jit
def combine(
    team, buffers, tensors, sizes, DTYPE: tl.constexpr, IDX: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, PADDED: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr, TAKEN: tl.constexpr, SEND: tl.constexpr,
    RECV: tl.constexpr,
):  # fmt: skip
    """Each block sends its slices of the rows that its experts made to where their tokens came from, and adds up its
    slices of its own tokens: fp32, in top-k order, each row times its weight, rounded to DTYPE at the end.

    tensors: addresses of h, of the plan's placed and sizes, of the routing, weights (float32 [n, TOP_K]), out and the
    complaints. sizes: n. buffers: byte offset to the slots (DTYPE [2, TOKENS, TOP_K, WIDTH]). Otherwise as `dispatch`.

    Waits:    block b for block b of every peer, once.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    slots alternate by the parity of the epoch; each rank hears from all in each call.
    """
    if SEND:
        epoch = shmem.begin(team)
        _send_back(
            team, buffers, epoch & 1, at(tensors[0], DTYPE), at(tensors[1], tl.int32), at(tensors[2], tl.int32), DTYPE,
            WIDTH, SLICE, SLICES, PADDED, TOP_K, PLACES, TOKENS, RANKS, TAKEN,
        )  # fmt: skip
        shmem.signal_all(team, epoch, shmem.DATA, 1)
    else:
        epoch = shmem.resume(team)
    if RECV:
        parity = epoch & 1
        epoch = shmem.wait_all(team, epoch, shmem.DATA, 1)
        column, in_slice = _slice_tile(WIDTH, SLICE, SLICES, PADDED)
        place = tl.arange(0, PLACES)
        topk = at(tensors[3], tl.int64 if IDX == 64 else tl.int32)
        weights, out = at(tensors[4], tl.float32), at(tensors[5], DTYPE)
        complaints, count = at(tensors[6], tl.int64), sizes[0].to(tl.int32)
        slots = shmem.heap_at(team, buffers[0], team.rank, DTYPE)
        for start in range(0, _my_tokens(team, team.rank, count, SLICES), TILE):
            token = _my_token(team, team.rank, start + tl.arange(0, TILE), SLICES)
            live = token < count
            idx = _routing_of(topk, token, live, complaints, TOP_K, PLACES, EXPERTS)
            values, factors = (), ()
            for k in tl.static_range(TOP_K):  # all loads are under way before the first sum
                here = live & (tl.sum(tl.where(place[None, :] == k, idx, 0), axis=1) >= 0)
                slot = wide((parity * TOKENS + token) * TOP_K + k)
                landed = slots + slot[:, None] * WIDTH + column[None, :]
                values = values + (tl.load(landed, mask=here[:, None] & in_slice[None, :], other=0),)
                factors = factors + (tl.load(weights + token * TOP_K + k, mask=here, other=0.0),)
            total = tl.zeros([TILE, PADDED], tl.float32)
            for k in tl.static_range(TOP_K):
                total += values[k].to(tl.float32) * factors[k][:, None]
            target = out + wide(token)[:, None] * WIDTH + column[None, :]
            tl.store(target, total.to(DTYPE), mask=live[:, None] & in_slice[None, :])
    shmem.end(team, epoch)
