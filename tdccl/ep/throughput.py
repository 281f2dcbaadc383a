"""Dispatch and combine for many tokens: one copy of a token for each rank that it goes to.

Both pass through one landing buffer a rank, in which a row has the place that the plan found for it. As there is one
only, a kernel that writes there opens with a barrier: a peer that has come to it has ended its last launch.
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.ep.routing import NO_ROOM, at, range_of_block
from tdccl.ep.rows import quantise, row_tile, wide


@triton.jit
def _steps_of_sources(told, CHUNK: tl.constexpr, SIZE):
    """For each source, as one small tensor, in how many chunks this block's range of its tokens is walked."""
    rank = tl.arange(0, shmem.MAX_RANKS)
    first, last = range_of_block(tl.load(told + rank, mask=rank < SIZE, other=0))
    return tl.cdiv(last - first, CHUNK)


@triton.jit
def chunk_of(told, source, step, CHUNK: tl.constexpr):
    """First and last + 1 of the tokens of a source in this block's chunk number `step`; none past its range."""
    first, last = range_of_block(tl.load(told + source))
    return tl.minimum(first + step * CHUNK, last), tl.minimum(first + (step + 1) * CHUNK, last)


@triton.jit
def push_chunk(
    team, buffers, x, scales, weights, sent_row, first, last, DTYPE: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, QUANT: tl.constexpr, SCALES: tl.constexpr, SCALE_TILE: tl.constexpr, TOP_K: tl.constexpr,
    PLACES: tl.constexpr, WEIGHTED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Stores these tokens' rows, scales and weights at their places in the landing buffers of the ranks they go to.

    Ordering: plain stores; signal the peers after it.
    """
    PAYLOAD: tl.constexpr = DTYPE if QUANT == "" else tl.uint8
    column, in_row = row_tile(WIDTH, PADDED, QUANT != "")
    word, k = tl.arange(0, SCALE_TILE), tl.arange(0, PLACES)
    for token in range(first, last, UNROLL):
        payloads, words, factors = (), (), ()
        for u in tl.static_range(UNROLL):  # all loads are under way before a store
            row = wide(token + u)
            live = row < last
            payload = tl.load(x + row * WIDTH + column, mask=in_row & live, other=0)
            if QUANT != "":
                payload, found = quantise(payload, QUANT == "fp8_128_ue8m0")
                words = words + (found,)
            elif SCALES > 0:
                words = words + (tl.load(scales + row * SCALES + word, mask=(word < SCALES) & live),)
            payloads = payloads + (payload,)
            if WEIGHTED:
                factors = factors + (tl.load(weights + row * TOP_K + k, mask=(k < TOP_K) & live),)
        for distance in tl.static_range(1, team.size + 1):  # rank + 1 first: no two ranks on one target
            pe = (team.rank + distance) % team.size
            for u in tl.static_range(UNROLL):
                place = tl.load(sent_row + (token + u) * team.size + pe, mask=token + u < last, other=-1)
                goes, place = place >= 0, place.to(tl.int64)
                target = shmem.heap_at(team, buffers[0], pe, PAYLOAD) + place * WIDTH
                tl.store(target + column, payloads[u], mask=in_row & goes)
                if SCALES > 0:
                    target = shmem.heap_at(team, buffers[1], pe, tl.int32) + place * SCALES
                    tl.store(target + word, words[u], mask=(word < SCALES) & goes)
                if WEIGHTED:
                    target = shmem.heap_at(team, buffers[2], pe, tl.float32) + place * TOP_K
                    tl.store(target + k, factors[u], mask=(k < TOP_K) & goes)


@triton.jit
def take_chunk(
    team, buffers, recv_row, expert_row, out, out_scales, out_weights, capacity, source, first, last,
    PAYLOAD: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, SCALES: tl.constexpr, SCALE_TILE: tl.constexpr,
    TOP_K: tl.constexpr, PLACES: tl.constexpr, WEIGHTED: tl.constexpr, OUT: tl.constexpr, TOKENS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Takes what these tokens of a source have here out of the landing buffer. Ordering: wait for the source first."""
    column, in_row = row_tile(WIDTH, PADDED, False)
    word, k = tl.arange(0, SCALE_TILE), tl.arange(0, PLACES)
    for token in range(first, last, UNROLL):
        rows, payloads, words = (), (), ()
        for u in tl.static_range(UNROLL):
            row = tl.load(recv_row + source * TOKENS + token + u, mask=token + u < last, other=-1).to(tl.int64)
            rows = rows + (row,)
            if OUT != "landing":
                landed = shmem.heap_at(team, buffers[0], team.rank, PAYLOAD) + row * WIDTH
                payloads = payloads + (tl.load(landed + column, mask=in_row & (row >= 0)),)
                if SCALES > 0:
                    landed = shmem.heap_at(team, buffers[1], team.rank, tl.int32) + row * SCALES
                    words = words + (tl.load(landed + word, mask=(word < SCALES) & (row >= 0)),)
        for u in tl.static_range(UNROLL):
            row = rows[u]
            if OUT == "compact":
                fits = (row >= 0) & (row < capacity)
                tl.store(out + row * WIDTH + column, payloads[u], mask=in_row & fits)
                if SCALES > 0:
                    tl.store(out_scales + row * SCALES + word, words[u], mask=(word < SCALES) & fits)
            if OUT == "expert":
                for place in tl.static_range(TOP_K):
                    target = tl.load(expert_row + row * TOP_K + place, mask=row >= 0, other=-1).to(tl.int64)
                    fits = (target >= 0) & (target < capacity)
                    tl.store(out + target * WIDTH + column, payloads[u], mask=in_row & fits)
                    if SCALES > 0:
                        tl.store(out_scales + target * SCALES + word, words[u], mask=(word < SCALES) & fits)
            if WEIGHTED:
                here = (k < TOP_K) & (row >= 0)
                target = tl.load(expert_row + row * TOP_K + k, mask=here, other=-1)
                factor = tl.load(shmem.heap_at(team, buffers[2], team.rank, tl.float32) + row * TOP_K + k, mask=here)
                if OUT == "expert":
                    tl.store(out_weights + target, factor, mask=(target >= 0) & (target < capacity))
                else:
                    factor = tl.where(target >= 0, factor, 0.0)
                    tl.store(out_weights + row * TOP_K + k, factor, mask=here & (row < capacity))


@triton.jit
def clear_padding(
    expert_counts, expert_offsets, out, out_scales, capacity, PAYLOAD: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, SCALES: tl.constexpr, SCALE_TILE: tl.constexpr, LOCAL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Zeros between the rows of one expert and the next, shared out among the blocks."""
    column, in_row = row_tile(WIDTH, PADDED, False)
    word = tl.arange(0, SCALE_TILE)
    for number in range(tl.program_id(0), LOCAL * (ALIGN - 1), tl.num_programs(0)):
        expert = number // (ALIGN - 1)
        count, start = tl.load(expert_counts + expert), tl.load(expert_offsets + expert)
        row = wide(start + count + number % (ALIGN - 1))
        padding = (row < tl.load(expert_offsets + expert + 1)) & (row < capacity)
        tl.store(out + row * WIDTH + column, tl.zeros([PADDED], PAYLOAD), mask=in_row & padding)
        if SCALES > 0:
            tl.store(out_scales + row * SCALES + word, tl.zeros([SCALE_TILE], tl.int32), mask=(word < SCALES) & padding)


@triton.jit
def dispatch(
    team, buffers, tensors, sizes, DTYPE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, QUANT: tl.constexpr,
    SCALES: tl.constexpr, SCALE_TILE: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, WEIGHTED: tl.constexpr,
    OUT: tl.constexpr, TOKENS: tl.constexpr, LOCAL: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr,
    UNROLL: tl.constexpr, SEND: tl.constexpr, RECV: tl.constexpr,
):  # fmt: skip
    """At step s block b pushes chunk s of its range of tokens into the landing buffers of the ranks where they go, then
    takes chunk s - 1 of every source out of its own, to where `OUT` says.

    tensors: addresses of x (DTYPE [n, WIDTH]), scales, weights; of the plan's sent_row, recv_row, expert_row, told,
    expert_counts, expert_offsets; of out, out_scales, out_weights and the complaints. sizes: rows that out has.
    OUT: "landing" (rows stay there), "compact" or "expert". QUANT: "" (scales, if any, come with x), "fp8_128" or
    "fp8_128_ue8m0". buffers: byte offsets from the team's heap to
    the landing rows, scales and weights. SEND and RECV: this launch does the first half, the second, or both.

    Waits:    block b for block b of every peer on entry, then of each source once a chunk.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    the landing buffer is written only after all peers' blocks b have come, which have ended what they read of
              it; what others read of this rank's was ordered before this launch.
    """
    x, scales, weights = at(tensors[0], DTYPE), at(tensors[1], tl.int32), at(tensors[2], tl.float32)
    sent_row, recv_row, expert_row = at(tensors[3], tl.int32), at(tensors[4], tl.int32), at(tensors[5], tl.int32)
    told, expert_counts = at(tensors[6], tl.int32), at(tensors[7], tl.int32)
    expert_offsets = at(tensors[8], tl.int32)
    PAYLOAD: tl.constexpr = DTYPE if QUANT == "" else tl.uint8
    out, out_scales, out_weights = at(tensors[9], PAYLOAD), at(tensors[10], tl.int32), at(tensors[11], tl.float32)
    complaints, capacity = at(tensors[12], tl.int64), sizes[0]
    rank = tl.arange(0, shmem.MAX_RANKS)
    with_sources = _steps_of_sources(told, CHUNK, team.size)
    steps = tl.max(with_sources)
    if SEND:
        opened = shmem.begin(team)
        epoch = shmem.barrier_block(team, opened, 1)
        steps = tl.where(epoch == opened, steps, 0)  # not all have come: nothing is written
    else:
        epoch = shmem.resume(team)
    own_steps = tl.sum(tl.where(rank == team.rank, with_sources, 0)) + tl.zeros_like(rank)  # for all peers
    for step in range(steps + 1):
        if SEND:
            if step < steps:
                first, last = chunk_of(told, team.rank, step, CHUNK)
                push_chunk(
                    team, buffers, x, scales, weights, sent_row, first, last, DTYPE, WIDTH, PADDED, QUANT, SCALES,
                    SCALE_TILE, TOP_K, PLACES, WEIGHTED, UNROLL,
                )  # fmt: skip
                shmem.signal_peers(team, epoch, shmem.DATA, step + 1, step < own_steps)
        if RECV:
            if step >= 1:
                epoch = shmem.wait_peers(team, epoch, shmem.DATA, step, step - 1 < with_sources)
                if (OUT != "landing") or WEIGHTED:
                    for source in tl.static_range(team.size):
                        first, last = chunk_of(told, source, step - 1, CHUNK)
                        take_chunk(
                            team, buffers, recv_row, expert_row, out, out_scales, out_weights, capacity, source, first,
                            last, PAYLOAD, WIDTH, PADDED, SCALES, SCALE_TILE, TOP_K, PLACES, WEIGHTED, OUT, TOKENS,
                            UNROLL,
                        )  # fmt: skip
    if RECV and OUT == "expert":
        if ALIGN > 1:
            clear_padding(
                expert_counts, expert_offsets, out, out_scales, capacity, PAYLOAD, WIDTH, PADDED, SCALES, SCALE_TILE,
                LOCAL, ALIGN,
            )  # fmt: skip
    if RECV and OUT != "landing":
        if OUT == "expert":
            rows = tl.load(expert_offsets + LOCAL)
        else:
            rows = tl.sum(tl.load(told + team.size + rank, mask=rank < team.size, other=0))
        tl.store(complaints + NO_ROOM, rows.to(tl.int64), mask=rows > capacity)
    shmem.end(team, epoch)


@triton.jit
def stage_chunk(
    team, buffers, h, weights, carried, recv_row, expert_row, capacity, source, first, last, DTYPE: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, WEIGHTED: tl.constexpr,
    CARRY: tl.constexpr, LAYOUT: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Puts what these tokens of a source get from this rank into its landing buffer. Ordering: plain stores."""
    column, in_row = row_tile(WIDTH, PADDED, False)
    k = tl.arange(0, PLACES)
    for token in range(first, last, UNROLL):
        rows, staged = (), ()
        for u in tl.static_range(UNROLL):
            row = tl.load(recv_row + source * TOKENS + token + u, mask=token + u < last, other=-1).to(tl.int64)
            rows = rows + (row,)
            if LAYOUT == "compact":
                here = (row >= 0) & (row < capacity)
                staged = staged + (tl.load(h + row * WIDTH + column, mask=in_row & here, other=0),)
            if LAYOUT == "expert":
                values, factors = (), ()
                for place in tl.static_range(TOP_K):
                    found = tl.load(expert_row + row * TOP_K + place, mask=row >= 0, other=-1).to(tl.int64)
                    here = (found >= 0) & (found < capacity)
                    values = values + (tl.load(h + found * WIDTH + column, mask=in_row & here, other=0),)
                    if WEIGHTED:
                        factors = factors + (tl.load(weights + found, mask=here, other=0.0),)
                total = tl.zeros([PADDED], tl.float32)
                for place in tl.static_range(TOP_K):
                    if WEIGHTED:
                        total += values[place].to(tl.float32) * factors[place]
                    else:
                        total += values[place].to(tl.float32)
                staged = staged + (total.to(DTYPE),)
        for u in tl.static_range(UNROLL):
            row = rows[u]
            if LAYOUT != "landing":
                target = shmem.heap_at(team, buffers[0], team.rank, DTYPE) + row * WIDTH
                tl.store(target + column, staged[u], mask=in_row & (row >= 0))
            if CARRY:
                here = (k < TOP_K) & (row >= 0)
                if LAYOUT == "expert":
                    expert = tl.load(expert_row + row * TOP_K + k, mask=here, other=-1)
                    value = tl.load(carried + expert, mask=(expert >= 0) & (expert < capacity), other=0.0)
                else:
                    value = tl.load(carried + row * TOP_K + k, mask=here & (row < capacity), other=0.0)
                tl.store(shmem.heap_at(team, buffers[2], team.rank, tl.float32) + row * TOP_K + k, value, mask=here)


@triton.jit
def _pull_chunk(
    team, buffers, bias, more_bias, sent_row, out, out_carried, first, last, DTYPE: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, BIASES: tl.constexpr, CARRY: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Adds up what all ranks have for these tokens. Ordering: wait for the peers first."""
    column, in_row = row_tile(WIDTH, PADDED, False)
    k = tl.arange(0, PLACES)
    for token in range(first, last, UNROLL):
        everyone, values = (), ()
        for u in tl.static_range(UNROLL):  # all loads are under way before the first sum
            row = wide(token + u)
            for pe in tl.static_range(team.size):
                place = tl.load(sent_row + row * team.size + pe, mask=row < last, other=-1).to(tl.int64)
                landed = shmem.heap_at(team, buffers[0], pe, DTYPE) + place * WIDTH
                everyone = everyone + (tl.load(landed + column, mask=in_row & (place >= 0), other=0),)
                if CARRY:
                    landed = shmem.heap_at(team, buffers[2], pe, tl.float32) + place * TOP_K
                    values = values + (tl.load(landed + k, mask=(k < TOP_K) & (place >= 0), other=0.0),)
        for u in tl.static_range(UNROLL):
            row = wide(token + u)
            live = row < last
            total = tl.zeros([PADDED], tl.float32)
            if BIASES >= 1:
                total += tl.load(bias + row * WIDTH + column, mask=in_row & live, other=0).to(tl.float32)
            if BIASES >= 2:
                total += tl.load(more_bias + row * WIDTH + column, mask=in_row & live, other=0).to(tl.float32)
            value = tl.zeros([PLACES], tl.float32)
            for pe in tl.static_range(team.size):
                total += everyone[u * team.size + pe].to(tl.float32)
                if CARRY:
                    value += values[u * team.size + pe]
            tl.store(out + row * WIDTH + column, total.to(DTYPE), mask=in_row & live)
            if CARRY:
                tl.store(out_carried + row * TOP_K + k, value, mask=(k < TOP_K) & live)


@triton.jit
def combine(
    team, buffers, tensors, sizes, DTYPE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TOP_K: tl.constexpr,
    PLACES: tl.constexpr, WEIGHTED: tl.constexpr, CARRY: tl.constexpr, BIASES: tl.constexpr, LAYOUT: tl.constexpr,
    TOKENS: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr, SEND: tl.constexpr, RECV: tl.constexpr,
):  # fmt: skip
    """At step s block b puts chunk s of its range of every source into the landing buffer, added up over this rank's
    experts, then adds up all ranks' rows for chunk s - 1 of its own tokens.

    tensors: addresses of h, weights, carried, two biases; of the plan's sent_row, recv_row, expert_row, told; of out
    and out_carried. sizes: rows that h has. LAYOUT: of h, "landing" if it is the landing buffer. SEND and RECV as in
    `dispatch`.

    Sums are fp32: of a token's experts on one rank in top-k order, rounded to DTYPE; then the biases, and the ranks in
    rank order, rounded to DTYPE. A rank without a row adds 0.

    Waits:    block b for block b of every peer: on entry if it writes to the landing buffer, then once a chunk.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    the landing buffer is written after all peers' blocks b have come, which have ended earlier reads of it.
    """
    h, weights, carried = at(tensors[0], DTYPE), at(tensors[1], tl.float32), at(tensors[2], tl.float32)
    bias, more_bias = at(tensors[3], DTYPE), at(tensors[4], DTYPE)
    sent_row, recv_row, expert_row = at(tensors[5], tl.int32), at(tensors[6], tl.int32), at(tensors[7], tl.int32)
    told, out, out_carried = at(tensors[8], tl.int32), at(tensors[9], DTYPE), at(tensors[10], tl.float32)
    capacity = sizes[0]
    rank = tl.arange(0, shmem.MAX_RANKS)
    with_sources = _steps_of_sources(told, CHUNK, team.size)
    own_steps = tl.sum(tl.where(rank == team.rank, with_sources, 0)) + tl.zeros_like(rank)  # for all peers
    steps = tl.max(with_sources)
    if SEND:
        opened = shmem.begin(team)
        epoch = opened
        if CARRY or LAYOUT != "landing":
            epoch = shmem.barrier_block(team, opened, 1)
        steps = tl.where(epoch == opened, steps, 0)  # not all have come: nothing is written
    else:
        epoch = shmem.resume(team)
    for step in range(steps + 1):
        if SEND:
            if step < steps:
                if CARRY or LAYOUT != "landing":
                    for source in tl.static_range(team.size):
                        first, last = chunk_of(told, source, step, CHUNK)
                        stage_chunk(
                            team, buffers, h, weights, carried, recv_row, expert_row, capacity, source, first, last,
                            DTYPE, WIDTH, PADDED, TOP_K, PLACES, WEIGHTED, CARRY, LAYOUT, TOKENS, UNROLL,
                        )  # fmt: skip
                shmem.signal_peers(team, epoch, shmem.DATA, step + 1, step < with_sources)
        if RECV:
            if step >= 1:
                epoch = shmem.wait_peers(team, epoch, shmem.DATA, step, step - 1 < own_steps)
                first, last = chunk_of(told, team.rank, step - 1, CHUNK)
                _pull_chunk(
                    team, buffers, bias, more_bias, sent_row, out, out_carried, first, last, DTYPE, WIDTH, PADDED,
                    TOP_K, PLACES, BIASES, CARRY, UNROLL,
                )  # fmt: skip
    shmem.end(team, epoch)
