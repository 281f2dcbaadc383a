"""Dispatch and combine for few tokens: one launch and one round of signals each, a copy for each (token, expert).

Every (source, token, place in top-k) has a slot of its own on every rank, so nothing has to be agreed on before a row
is sent: how many rows go to which expert travels beside the rows. Slots are doubled by the parity of the epoch.

A row is cut into SLICES. Block b has slice b % SLICES of the tokens g, g + G, ... of every source; G is the number
of groups of blocks; g is the group b // SLICES for source 0, another for each other one, so that few tokens of several
sources fall to different blocks. Blocks that are left over, as they are no whole group, do again what the first ones
do: they store the same bytes. A block looks at many entries of the routing at once, (source, token, place in top-k),
and then moves the rows of those that concern it, several under way at a time.
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
def _my_entries(
    team, start, PLACES: tl.constexpr, RANKS: tl.constexpr, SLICES: tl.constexpr, ENTRIES: tl.constexpr
):  # fmt: skip
    """(source, token, place) of this block's entries of the routing from `start` on: the places of its first token of
    every source, then of its second."""
    entry = start + tl.arange(0, ENTRIES)
    turn = entry // PLACES
    source = (team.rank + 1 + turn % RANKS) % RANKS  # rank + 1 first: no two ranks on one target
    return source, _my_token(team, source, turn // RANKS, SLICES), entry % PLACES


@triton.jit
def _of_source(tokens, source):
    """Of `tokens` [RANKS] those of each of the sources."""
    rank = tl.arange(0, tokens.shape[0])
    return tl.sum(tl.where(source[:, None] == rank[None, :], tokens[None, :], 0), axis=1)


@triton.jit
def _most_entries(team, tokens, PLACES: tl.constexpr, RANKS: tl.constexpr, SLICES: tl.constexpr):
    """Where `_my_entries` ends."""
    return tl.max(_my_tokens(team, tl.arange(0, RANKS), tokens, SLICES)) * RANKS * PLACES


@triton.jit
def _picked(here, number, of, values):
    """Of the values [ENTRIES] those of the entries that are `here`, numbered `of` - 1, as [numbers]; else 0."""
    chosen = here[None, :] & (of[None, :] == number[:, None] + 1)
    return tl.sum(tl.where(chosen, values[None, :], 0), axis=1)


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
def _routing_of(
    topk, token, live, complaints, TOP_K: tl.constexpr, PLACES: tl.constexpr, EXPERTS: tl.constexpr,
    COMPLAIN: tl.constexpr,
):  # fmt: skip
    """The experts [tokens, PLACES] of some of this rank's tokens, and complaints of them if COMPLAIN."""
    place = tl.arange(0, PLACES)
    mask = live[:, None] & (place < TOP_K)[None, :]
    idx = tl.load(topk + token[:, None] * TOP_K + place[None, :], mask=mask, other=-1)
    return clean(idx, token, complaints, EXPERTS, COMPLAIN)


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
def _send(
    team, buffers, parity, x, topk, complaints, count, DTYPE: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, PADDED: tl.constexpr, QUANT: tl.constexpr, SCALES: tl.constexpr, SCALE_SLICE: tl.constexpr,
    SCALE_TILE: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERT_TILE: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores this block's slices of all rows, and what they are, on the ranks of their experts; then tells this block
    of every rank how many rows each of its experts gets from here, and how many tokens there are.

    Ordering: plain stores; signal the peers after it.
    """
    local: tl.constexpr = EXPERTS // team.size
    PAYLOAD: tl.constexpr = DTYPE if QUANT == "" else tl.uint8
    column, in_slice = _slice_tile(WIDTH, SLICE, SLICES, PADDED)
    word, in_words = _scale_tile(SCALES, SCALE_SLICE, SLICES, SCALE_TILE)
    place, number = tl.arange(0, PLACES), tl.arange(0, CHUNK * PLACES)
    row_slots, scale_slots = _slots_offsets(buffers, parity, DTYPE, WIDTH, TOKENS, TOP_K, team.size)
    rows = tl.zeros([EXPERT_TILE], tl.int32)  # for each expert
    # Once at least: who has no token counts, too.
    for start in range(0, tl.maximum(_my_tokens(team, team.rank, count, SLICES), 1), TILE):
        token = _my_token(team, team.rank, start + tl.arange(0, TILE), SLICES)
        live = token < count
        tile = tl.load(
            x + wide(token)[:, None] * WIDTH + column[None, :], mask=live[:, None] & in_slice[None, :], other=0
        )
        idx = _routing_of(topk, token, live, complaints, TOP_K, PLACES, EXPERTS, True)
        flat = tl.reshape(idx, [TILE * PLACES])
        before = tl.reshape(tl.broadcast_to(token[:, None] * PLACES, [TILE, PLACES]), [TILE * PLACES])
        earlier = tl.zeros([TILE * PLACES], tl.int32)
        for part in range(0, count if start == 0 else tl.max(tl.where(live, token, 0)), CHUNK):
            other = part + tl.arange(0, CHUNK)
            others = _routing_of(topk, other, other < count, complaints, TOP_K, PLACES, EXPERTS, False)
            others = tl.reshape(others, [CHUNK * PLACES])
            same = (flat[:, None] == others[None, :]) & (number[None, :] + part * PLACES < before[:, None])
            earlier += tl.sum(same.to(tl.int32), axis=1)
            if start == 0:
                rows += tl.histogram(tl.maximum(others, 0), EXPERT_TILE, mask=others >= 0)
        earlier = tl.reshape(earlier, [TILE, PLACES])
        if QUANT != "":
            groups = tl.reshape(tile, [TILE * (PADDED // 128), 128])
            quantised, words = quantise(groups, QUANT == "fp8_128_ue8m0")
            tile, words = tl.reshape(quantised, [TILE, PADDED]), tl.reshape(words, [TILE, SCALE_TILE])
        owner = tl.where(idx >= 0, idx // local, -1)
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
        note = idx % local * TOKENS + earlier
        for distance in tl.static_range(1, team.size + 1):  # rank + 1 first: no two ranks on one target
            pe = (team.rank + distance) % team.size
            notes = _notes_offset(buffers, parity, team.rank, SLICES, TOKENS, TOP_K, team.size)
            target = shmem.heap_at(team, notes, pe, tl.int32) + token[:, None] * TOP_K + place[None, :]
            tl.store(target, tl.where(owner == pe, note, -1), mask=live[:, None] & (place < TOP_K)[None, :])
    expert, rank = tl.arange(0, EXPERT_TILE), tl.arange(0, shmem.MAX_RANKS)
    to = tl.load(team.heap + expert // local, mask=expert < EXPERTS, other=0)
    to += _counts_offset(buffers, parity, team.rank, COLUMNS, team.size) + expert % local * 4
    tl.store(to.to(tl.pointer_type(tl.int32)), rows, mask=expert < EXPERTS)
    to = tl.load(team.heap + rank, mask=rank < team.size, other=0)
    to += _counts_offset(buffers, parity, team.rank, COLUMNS, team.size) + COLUMNS * 4
    tl.store(to.to(tl.pointer_type(tl.int32)), tl.zeros_like(rank) + count, mask=rank < team.size)


@triton.jit
def _told(words, mask, TOKENS: tl.constexpr):
    """What sources said at these words, 0 without `mask`. No more than fits. Ordering: wait for the sources first, or
    for the kernel that wrote it."""
    return tl.minimum(tl.maximum(tl.load(words, mask=mask, other=0), 0), TOKENS)


@triton.jit
def _take_rows(
    team, buffers, parity, words, tokens, out, out_scales, placed, sources, DTYPE: tl.constexpr,
    PAYLOAD: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, PADDED: tl.constexpr,
    SCALES: tl.constexpr, SCALE_SLICE: tl.constexpr, SCALE_TILE: tl.constexpr, TOP_K: tl.constexpr,
    PLACES: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, LOCAL: tl.constexpr,
    ENTRIES: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    """Copies this block's slices of what all ranks sent here to their places.

    words [RANKS]: where a source says how many rows the experts here get. tokens [RANKS]: how many it has.

    Ordering: wait for the sources first.
    """
    column, in_slice = _slice_tile(WIDTH, SLICE, SLICES, PADDED)
    word, in_words = _scale_tile(SCALES, SCALE_SLICE, SLICES, SCALE_TILE)
    rank = tl.arange(0, RANKS)
    room: tl.constexpr = team.size * TOKENS
    row_slots, scale_slots = _slots_offsets(buffers, parity, DTYPE, WIDTH, TOKENS, TOP_K, team.size)
    start, most = 0, 1
    while start < most:  # not a `for`, so that the first notes are loaded together with `tokens`
        source, token, place = _my_entries(team, start, PLACES, RANKS, SLICES, ENTRIES)
        notes = _notes_offset(buffers, parity, source, SLICES, TOKENS, TOP_K, team.size)
        fits = (source < team.size) & (token < TOKENS) & (place < TOP_K)
        note = tl.load(shmem.local_at(team, notes, tl.int32) + token * TOP_K + place, mask=fits, other=-1)
        live = (token < _of_source(tokens, source)) & (place < TOP_K)
        note = tl.where(live & (note < LOCAL * TOKENS), note, -1)
        earlier = (rank[None, :] < source[:, None]) & (note >= 0)[:, None]
        rows = _told(words[None, :] + (note // TOKENS)[:, None], earlier, TOKENS)
        row = tl.sum(rows, axis=1) + note % TOKENS
        here = (note >= 0) & (row < room)
        row += note // TOKENS * room
        entry = (source * TOKENS + token) * TOP_K + place
        if tl.program_id(0) % SLICES == 0:
            tl.store(placed + entry, tl.where(here, row, -1), mask=live)
            tl.store(sources + row, entry // TOP_K, mask=here)
        of = tl.cumsum(here.to(tl.int32), 0)
        total = tl.sum(here.to(tl.int32))
        for first in range(0, total, TAKEN):
            number = first + tl.arange(0, TAKEN)
            there = number < total
            slot, to = wide(_picked(here, number, of, entry)), wide(_picked(here, number, of, row))
            mask = there[:, None] & in_slice[None, :]
            landed = shmem.heap_at(team, row_slots, team.rank, PAYLOAD) + slot[:, None] * WIDTH + column[None, :]
            tl.store(out + to[:, None] * WIDTH + column[None, :], tl.load(landed, mask=mask), mask=mask)
            if SCALES > 0:
                mask = there[:, None] & in_words[None, :]
                landed = shmem.heap_at(team, scale_slots, team.rank, tl.int32) + slot[:, None] * SCALES + word[None, :]
                tl.store(out_scales + to[:, None] * SCALES + word[None, :], tl.load(landed, mask=mask), mask=mask)
        start += ENTRIES
        most = _most_entries(team, tokens, PLACES, RANKS, SLICES)


@triton.jit
def dispatch(
    team, buffers, tensors, sizes, DTYPE: tl.constexpr, IDX: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, PADDED: tl.constexpr, QUANT: tl.constexpr, SCALES: tl.constexpr, SCALE_SLICE: tl.constexpr,
    SCALE_TILE: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERT_TILE: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, ALIGN: tl.constexpr,
    TILE: tl.constexpr, ENTRIES: tl.constexpr, TAKEN: tl.constexpr, SEND: tl.constexpr, RECV: tl.constexpr,
):  # fmt: skip
    """Each block sends its slices of its tokens, then takes its slices of what came from all ranks.

    tensors: addresses of x (DTYPE [n, WIDTH]) and the routing (int64 or int32, of IDX bits, [n, TOP_K]); of out
    ([experts here, ranks * TOKENS, WIDTH]), out_scales, placed, sources, counts, sizes; of the complaints. sizes: n.
    buffers: byte offsets from the team's heap to slots of rows and of scales, notes and counts.
    SEND and RECV: this launch does the first half, the second, or both. TILE: tokens at once in the first; ENTRIES of
    the routing and TAKEN rows in the second. ALIGN: of which a row's bytes are a multiple.

    Waits:    block b for block b of every peer, once.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    all buffers alternate by the parity of the epoch; each rank hears from all in each call. Counts from peers
              are cut to what there is room for.
    """
    PAYLOAD: tl.constexpr = DTYPE if QUANT == "" else tl.uint8
    local: tl.constexpr = EXPERTS // team.size
    if SEND:
        epoch = shmem.begin(team)
        _send(
            team, buffers, epoch & 1, at(tensors[0], DTYPE), at(tensors[1], tl.int64 if IDX == 64 else tl.int32),
            at(tensors[8], tl.int64), sizes[0].to(tl.int32), DTYPE, WIDTH, SLICE, SLICES, PADDED, QUANT, SCALES,
            SCALE_SLICE, SCALE_TILE, TOP_K, PLACES, TOKENS, CHUNK, EXPERTS, EXPERT_TILE, COLUMNS, ALIGN, TILE,
        )  # fmt: skip
        shmem.signal_all(team, epoch, shmem.DATA, 1)
    else:
        epoch = shmem.resume(team)
    if RECV:
        parity = epoch & 1
        epoch = shmem.wait_all(team, epoch, shmem.DATA, 1)
        rank, expert = tl.arange(0, RANKS), tl.arange(0, COLUMNS)
        words = shmem.local_at(team, _counts_offset(buffers, parity, rank, COLUMNS, team.size), tl.int32)
        tokens = _told(words + COLUMNS, rank < team.size, TOKENS)
        _take_rows(
            team, buffers, parity, words, tokens, at(tensors[2], PAYLOAD), at(tensors[3], tl.int32),
            at(tensors[4], tl.int32), at(tensors[5], tl.int32), DTYPE, PAYLOAD, WIDTH, SLICE, SLICES, PADDED,
            SCALES, SCALE_SLICE, SCALE_TILE, TOP_K, PLACES, TOKENS, RANKS, local, ENTRIES, TAKEN,
        )  # fmt: skip
        if tl.program_id(0) == 0:
            there = (rank < team.size)[:, None] & (expert < local)[None, :]
            rows = _told(words[:, None] + expert[None, :], there, TOKENS)
            tl.store(at(tensors[6], tl.int32) + expert, tl.sum(rows, axis=0), mask=expert < local)
            tl.store(at(tensors[7], tl.int32) + rank, tokens, mask=rank < team.size)
    shmem.end(team, epoch)


@triton.jit
def _send_back(
    team, buffers, parity, h, placed, sizes, DTYPE: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, PADDED: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr,
    RANKS: tl.constexpr, LOCAL: tl.constexpr, ENTRIES: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    """Stores this block's slices of the rows of h where their tokens came from.

    A plan may say anything where its dispatch has not been, or has failed in some blocks: only what can be is done.

    Ordering: plain stores; signal the peers after it.
    """
    column, in_slice = _slice_tile(WIDTH, SLICE, SLICES, PADDED)
    rank = tl.arange(0, RANKS)
    tokens = _told(sizes + rank, rank < team.size, TOKENS)
    for start in range(0, _most_entries(team, tokens, PLACES, RANKS, SLICES), ENTRIES):
        source, token, place = _my_entries(team, start, PLACES, RANKS, SLICES, ENTRIES)
        in_source, live = token * TOP_K + place, (token < _of_source(tokens, source)) & (place < TOP_K)
        row = tl.load(placed + source * (TOKENS * TOP_K) + in_source, mask=live, other=-1)
        here = (row >= 0) & (row < LOCAL * team.size * TOKENS)
        of = tl.cumsum(here.to(tl.int32), 0)
        total = tl.sum(here.to(tl.int32))
        for first in range(0, total, TAKEN):
            number = first + tl.arange(0, TAKEN)
            mask = (number < total)[:, None] & in_slice[None, :]
            owner, slot = _picked(here, number, of, source), _picked(here, number, of, in_source)
            from_row = wide(_picked(here, number, of, row))
            tile = tl.load(h + from_row[:, None] * WIDTH + column[None, :], mask=mask)
            target = shmem.heap_at(team, buffers[0], owner, DTYPE)[:, None]
            target += wide(parity * TOKENS * TOP_K + slot)[:, None] * WIDTH
            tl.store(target + column[None, :], tile, mask=mask)


@triton.jit
def combine(
    team, buffers, tensors, sizes, DTYPE: tl.constexpr, IDX: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, PADDED: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr, ENTRIES: tl.constexpr, TAKEN: tl.constexpr,
    SEND: tl.constexpr, RECV: tl.constexpr,
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
            WIDTH, SLICE, SLICES, PADDED, TOP_K, PLACES, TOKENS, RANKS, EXPERTS // team.size, ENTRIES, TAKEN,
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
            idx = _routing_of(topk, token, live, complaints, TOP_K, PLACES, EXPERTS, False)
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
