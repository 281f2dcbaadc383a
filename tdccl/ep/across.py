"""Dispatch and combine for many tokens across nodes: one copy of a token for each node that it goes to.

It goes over the rail to the rank with the same place there, which passes it on inside by address; the sums come back
the same way, a node's ranks added up by the one that had passed the token on. Tokens travel in *records*: a row, its
scales and its weights, one after another, each at a multiple of 16 bytes. A tile of the rail has the records of those
tokens of a chunk that go to that node, in their order; both ends know from the plan which these are.

Why no two blocks wait for each other: at step s a block sends chunk s across and takes in chunk s - LAG, so a tile for
which there must be a free slot, s - LANE_DEPTH, was taken in before anybody came to step s.
"""

import triton
import triton.language as tl

import tdccl.language as shmem
import tdccl.language.rails as rails
from tdccl.ep.routing import NO_ROOM, at
from tdccl.ep.rows import quantise, row_tile, wide
from tdccl.ep.throughput import chunk_of, clear_padding, push_chunk, stage_chunk, take_chunk

# How many steps after a chunk has left its rank others take it in: time for it to travel.
LAG = tl.constexpr(2)


@triton.jit
def _most_steps(told, CHUNK: tl.constexpr, RANKS: tl.constexpr):
    """In how many chunks this block's range of any rank's tokens is walked: the same number on all ranks."""
    steps = tl.zeros([], tl.int32)
    for source in range(RANKS):
        span = tl.cdiv(tl.load(told + source), tl.num_programs(0))
        steps = tl.maximum(steps, tl.cdiv(span, CHUNK))
    return steps


@triton.jit
def _going(sent_node, node, first, last, CHUNK: tl.constexpr, NODES: tl.constexpr):
    """For each token of a chunk of this rank's ([CHUNK]) 1 if it goes to `node`."""
    token = first + tl.arange(0, CHUNK)
    return tl.load(sent_node + token * NODES + node, mask=token < last, other=0)


@triton.jit
def _coming(passed, first, last, CHUNK: tl.constexpr, SIZE: tl.constexpr):
    """For each token of a chunk of a rank of another node 1 if it goes to this node; passed: its part of sent_row."""
    token, goes = first + tl.arange(0, CHUNK), tl.zeros([CHUNK], tl.int32)
    for pe in tl.static_range(SIZE):
        goes |= (tl.load(passed + token * SIZE + pe, mask=token < last, other=-1) >= 0).to(tl.int32)
    return goes


@triton.jit
def _record_of(goes, number, RECORD: tl.constexpr, CHUNK: tl.constexpr):
    """(where in a tile the record of token `number` of a chunk begins, whether there is one)."""
    place = tl.arange(0, CHUNK)
    return tl.sum(tl.where(place < number, goes, 0)) * RECORD, tl.sum(tl.where(place == number, goes, 0)) != 0


@triton.jit
def _send_chunk(
    team, rail, epoch, x, scales, weights, sent_node, first, last, DTYPE: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, QUANT: tl.constexpr, SCALES: tl.constexpr, SCALE_TILE: tl.constexpr, TOP_K: tl.constexpr,
    PLACES: tl.constexpr, WEIGHTED: tl.constexpr, CHUNK: tl.constexpr, RECORD: tl.constexpr, AT_SCALES: tl.constexpr,
    AT_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Sends each other node those of a chunk of this rank's tokens that go there; returns the epoch.

    Waits:    for a free slot of the rail.
    Ordering: stores, block barrier, put with signal.
    """
    PAYLOAD: tl.constexpr = DTYPE if QUANT == "" else tl.uint8
    column, in_row = row_tile(WIDTH, PADDED, QUANT != "")
    word, k = tl.arange(0, SCALE_TILE), tl.arange(0, PLACES)
    for distance in range(1, rail.nodes):
        node = (rail.node + distance) % rail.nodes
        goes = _going(sent_node, node, first, last, CHUNK, rail.nodes)
        count = tl.sum(goes)
        if count > 0:
            epoch, number, slot = rails.next_out(team, rail, rails.INPUTS, node, epoch, tl.int8)
            for token in range(first, last):
                offset, sent = _record_of(goes, token - first, RECORD, CHUNK)
                record, row = tl.multiple_of(slot + offset, 16), wide(token)
                payload = tl.load(x + row * WIDTH + column, mask=in_row & sent, other=0)
                if QUANT != "":
                    payload, words = quantise(payload, QUANT == "fp8_128_ue8m0")
                elif SCALES > 0:
                    words = tl.load(scales + row * SCALES + word, mask=(word < SCALES) & sent)
                tl.store(record.to(tl.pointer_type(PAYLOAD)) + column, payload, mask=in_row & sent)
                if SCALES > 0:
                    target = (record + AT_SCALES).to(tl.pointer_type(tl.int32))
                    tl.store(target + word, words, mask=(word < SCALES) & sent)
                if WEIGHTED:
                    factors = tl.load(weights + row * TOP_K + k, mask=(k < TOP_K) & sent)
                    target = (record + AT_WEIGHTS).to(tl.pointer_type(tl.float32))
                    tl.store(target + k, factors, mask=(k < TOP_K) & sent)
            rails.put_tile(team, rail, rails.INPUTS, node, number, slot, count * RECORD)
    return epoch


@triton.jit
def _pass_on_chunk(
    team, rail, buffers, epoch, node, passed, first, last, PAYLOAD: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, SCALES: tl.constexpr, SCALE_TILE: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr,
    WEIGHTED: tl.constexpr, CHUNK: tl.constexpr, RECORD: tl.constexpr, AT_SCALES: tl.constexpr,
    AT_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Stores what came of a chunk of tokens of this rank's like in `node` at its places on the ranks of this node.

    Returns the epoch. passed: the like's part of sent_row.
    Waits:    for the like, if it has sent any.
    Ordering: acquire at sys scope, block barrier, loads; plain stores: signal the peers after it.
    """
    column, in_row = row_tile(WIDTH, PADDED, False)
    word, k = tl.arange(0, SCALE_TILE), tl.arange(0, PLACES)
    goes = _coming(passed, first, last, CHUNK, team.size)
    if tl.sum(goes) > 0:
        epoch, number = rails.next_in(team, rail, rails.INPUTS, node, epoch)
        slot = rails.in_slot(rail, rails.INPUTS, node, number, tl.int8)
        for token in range(first, last):
            offset, came = _record_of(goes, token - first, RECORD, CHUNK)
            record = tl.multiple_of(slot + offset, 16)
            payload = tl.load(record.to(tl.pointer_type(PAYLOAD)) + column, mask=in_row & came)
            if SCALES > 0:
                words = tl.load((record + AT_SCALES).to(tl.pointer_type(tl.int32)) + word, mask=(word < SCALES) & came)
            if WEIGHTED:
                factors = (record + AT_WEIGHTS).to(tl.pointer_type(tl.float32)) + k
                factors = tl.load(factors, mask=(k < TOP_K) & came)
            for distance in tl.static_range(1, team.size + 1):  # rank + 1 first: no two ranks on one target
                pe = (team.rank + distance) % team.size
                place = tl.load(passed + token * team.size + pe).to(tl.int64)
                target = shmem.heap_at(team, buffers[0], pe, PAYLOAD) + place * WIDTH
                tl.store(target + column, payload, mask=in_row & (place >= 0))
                if SCALES > 0:
                    target = shmem.heap_at(team, buffers[1], pe, tl.int32) + place * SCALES
                    tl.store(target + word, words, mask=(word < SCALES) & (place >= 0))
                if WEIGHTED:
                    target = shmem.heap_at(team, buffers[2], pe, tl.float32) + place * TOP_K
                    tl.store(target + k, factors, mask=(k < TOP_K) & (place >= 0))
        rails.took(team, rail, rails.INPUTS, node, number)
    return epoch


@triton.jit
def dispatch(
    team, rail, buffers, tensors, sizes, DTYPE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    QUANT: tl.constexpr, SCALES: tl.constexpr, SCALE_TILE: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr,
    WEIGHTED: tl.constexpr, OUT: tl.constexpr, TOKENS: tl.constexpr, LOCAL: tl.constexpr, ALIGN: tl.constexpr,
    CHUNK: tl.constexpr, RECORD: tl.constexpr, AT_SCALES: tl.constexpr, AT_WEIGHTS: tl.constexpr, SEND: tl.constexpr,
    RECV: tl.constexpr,
):  # fmt: skip
    """At step s block b sends chunk s of its range of tokens across, passes chunk s - LAG of its own and of its likes
    on to the landing buffers of this node, and takes chunk s - LAG - 1 of every source out of its own.

    tensors, sizes, buffers, OUT, QUANT: as `throughput.dispatch`, but that sent_node comes after sent_row. CHUNK: a
    power of two. RECORD: bytes of a record, AT_SCALES and AT_WEIGHTS: where in it these begin. SEND: this launch does
    all but the taking out, which RECV does.

    Waits:    block b for block b of every peer inside, on entry and once a chunk; for its likes in other nodes: for
              tiles, and for free slots.
    Ordering: across put with signal, then acquire; inside stores, block barrier, release at sys scope; acquire at sys
              scope, block barrier, loads.
    Reuse:    the landing buffer is written by ranks of this node only, after all their blocks b have come.
    """
    x, scales, weights = at(tensors[0], DTYPE), at(tensors[1], tl.int32), at(tensors[2], tl.float32)
    sent_row, sent_node, recv_row = at(tensors[3], tl.int32), at(tensors[4], tl.int32), at(tensors[5], tl.int32)
    expert_row, told = at(tensors[6], tl.int32), at(tensors[7], tl.int32)
    expert_counts, expert_offsets = at(tensors[8], tl.int32), at(tensors[9], tl.int32)
    PAYLOAD: tl.constexpr = DTYPE if QUANT == "" else tl.uint8
    out, out_scales, out_weights = at(tensors[10], PAYLOAD), at(tensors[11], tl.int32), at(tensors[12], tl.float32)
    complaints, capacity = at(tensors[13], tl.int64), sizes[0]
    ranks: tl.constexpr = team.size * rail.nodes
    of_node: tl.constexpr = TOKENS * team.size
    steps = _most_steps(told, CHUNK, ranks)
    if SEND:
        opened = shmem.begin(team)
        epoch = shmem.barrier_block(team, opened, 1)
        steps = tl.where(epoch == opened, steps, 0)
    else:
        epoch = shmem.resume(team)
    me = rail.node * team.size + team.rank
    for step in range(steps + LAG + 1):
        passing, taking = step - LAG, step - LAG - 1
        if SEND:
            first, last = chunk_of(told, me, step, CHUNK)
            epoch = _send_chunk(
                team, rail, epoch, x, scales, weights, sent_node, first, last, DTYPE, WIDTH, PADDED, QUANT, SCALES,
                SCALE_TILE, TOP_K, PLACES, WEIGHTED, CHUNK, RECORD, AT_SCALES, AT_WEIGHTS,
            )  # fmt: skip
            if (passing >= 0) & (passing < steps):
                first, last = chunk_of(told, me, passing, CHUNK)
                push_chunk(
                    team, buffers, x, scales, weights, sent_row + rail.node * of_node, first, last, DTYPE, WIDTH,
                    PADDED, QUANT, SCALES, SCALE_TILE, TOP_K, PLACES, WEIGHTED, 1,
                )  # fmt: skip
                for distance in range(1, rail.nodes):
                    node = (rail.node + rail.nodes - distance) % rail.nodes
                    first, last = chunk_of(told, node * team.size + team.rank, passing, CHUNK)
                    epoch = _pass_on_chunk(
                        team, rail, buffers, epoch, node, sent_row + node * of_node, first, last, PAYLOAD, WIDTH,
                        PADDED, SCALES, SCALE_TILE, TOP_K, PLACES, WEIGHTED, CHUNK, RECORD, AT_SCALES, AT_WEIGHTS,
                    )  # fmt: skip
                shmem.signal_all(team, epoch, shmem.DATA, passing + 1)
        if RECV:
            if taking >= 0:
                epoch = shmem.wait_all(team, epoch, shmem.DATA, taking + 1)
                if (OUT != "landing") or WEIGHTED:
                    for source in range(ranks):
                        first, last = chunk_of(told, source, taking, CHUNK)
                        take_chunk(
                            team, buffers, recv_row, expert_row, out, out_scales, out_weights, capacity, source, first,
                            last, PAYLOAD, WIDTH, PADDED, SCALES, SCALE_TILE, TOP_K, PLACES, WEIGHTED, OUT, TOKENS, 1,
                        )  # fmt: skip
    if RECV and OUT == "expert":
        if ALIGN > 1:
            clear_padding(
                expert_counts, expert_offsets, out, out_scales, capacity, PAYLOAD, WIDTH, PADDED, SCALES, SCALE_TILE,
                LOCAL, ALIGN,
            )  # fmt: skip
    if RECV and OUT != "landing":
        rows = tl.load(expert_offsets + LOCAL)
        if OUT == "compact":
            rows = rows - rows
            for source in range(ranks):
                rows += tl.load(told + ranks + source)
        tl.store(complaints + NO_ROOM, rows.to(tl.int64), mask=rows > capacity)
    shmem.end(team, epoch)


@triton.jit
def _sum_inside(
    team, buffers, passed, token, live, DTYPE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    TOP_K: tl.constexpr, PLACES: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """(this node's sum for a token, as DTYPE, and of what is carried): of its ranks, in rank order.

    passed: the part of sent_row of the token's rank. Ordering: wait for the peers first.
    """
    column, in_row = row_tile(WIDTH, PADDED, False)
    k = tl.arange(0, PLACES)
    rows, values = (), ()
    for pe in tl.static_range(team.size):  # all loads are under way before the first sum
        place = tl.load(passed + token * team.size + pe, mask=live, other=-1).to(tl.int64)
        landed = shmem.heap_at(team, buffers[0], pe, DTYPE) + place * WIDTH
        rows = rows + (tl.load(landed + column, mask=in_row & (place >= 0), other=0),)
        if CARRY:
            landed = shmem.heap_at(team, buffers[2], pe, tl.float32) + place * TOP_K
            values = values + (tl.load(landed + k, mask=(k < TOP_K) & (place >= 0), other=0.0),)
    total, value = tl.zeros([PADDED], tl.float32), tl.zeros([PLACES], tl.float32)
    for pe in tl.static_range(team.size):
        total += rows[pe].to(tl.float32)
        if CARRY:
            value += values[pe]
    return total.to(DTYPE), value


@triton.jit
def _return_chunk(
    team, rail, buffers, epoch, node, passed, first, last, DTYPE: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr, CARRY: tl.constexpr, CHUNK: tl.constexpr,
    RECORD: tl.constexpr, AT_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Sends this node's sums for a chunk of tokens of this rank's like in `node` there; returns the epoch.

    Waits:    for a free slot of the rail; for the peers inside wait before.
    Ordering: stores, block barrier, put with signal.
    """
    column, in_row = row_tile(WIDTH, PADDED, False)
    k = tl.arange(0, PLACES)
    goes = _coming(passed, first, last, CHUNK, team.size)
    count = tl.sum(goes)
    if count > 0:
        epoch, number, slot = rails.next_out(team, rail, rails.RESULTS, node, epoch, tl.int8)
        for token in range(first, last):
            offset, sent = _record_of(goes, token - first, RECORD, CHUNK)
            record = tl.multiple_of(slot + offset, 16)
            total, value = _sum_inside(team, buffers, passed, token, sent, DTYPE, WIDTH, PADDED, TOP_K, PLACES, CARRY)
            tl.store(record.to(tl.pointer_type(DTYPE)) + column, total, mask=in_row & sent)
            if CARRY:
                target = (record + AT_WEIGHTS).to(tl.pointer_type(tl.float32))
                tl.store(target + k, value, mask=(k < TOP_K) & sent)
        rails.put_tile(team, rail, rails.RESULTS, node, number, slot, count * RECORD)
    return epoch


@triton.jit
def _add_nodes(
    team, rail, buffers, epoch, bias, more_bias, sent_row, sent_node, out, out_carried, first, last,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TOP_K: tl.constexpr, PLACES: tl.constexpr,
    BIASES: tl.constexpr, CARRY: tl.constexpr, CHUNK: tl.constexpr, RECORD: tl.constexpr, AT_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Adds up all nodes' sums for a chunk of this rank's tokens, in node order; returns the epoch.

    sent_row: this rank's part of it.
    Waits:    for its likes in the nodes to which any of the tokens went; for the peers inside wait before.
    Ordering: acquire at sys scope, block barrier, loads; block barrier, then each is told that its tile is taken.
    """
    column, in_row = row_tile(WIDTH, PADDED, False)
    k = tl.arange(0, PLACES)
    for distance in range(1, rail.nodes):
        node = (rail.node + distance) % rail.nodes
        if tl.sum(_going(sent_node, node, first, last, CHUNK, rail.nodes)) > 0:
            epoch, _ = rails.next_in(team, rail, rails.RESULTS, node, epoch)
    for token in range(first, last):
        row = wide(token)
        own, own_value = _sum_inside(team, buffers, sent_row, row, True, DTYPE, WIDTH, PADDED, TOP_K, PLACES, CARRY)
        total, value = tl.zeros([PADDED], tl.float32), tl.zeros([PLACES], tl.float32)
        if BIASES >= 1:
            total += tl.load(bias + row * WIDTH + column, mask=in_row, other=0).to(tl.float32)
        if BIASES >= 2:
            total += tl.load(more_bias + row * WIDTH + column, mask=in_row, other=0).to(tl.float32)
        for node in range(rail.nodes):
            goes = _going(sent_node, node, first, last, CHUNK, rail.nodes)
            offset, came = _record_of(goes, token - first, RECORD, CHUNK)
            came = came & (node != rail.node)
            slot = rails.in_slot(rail, rails.RESULTS, node, rails.received(rail, rails.RESULTS, node), tl.int8)
            record = tl.multiple_of(slot + offset, 16)
            theirs = tl.load(record.to(tl.pointer_type(DTYPE)) + column, mask=in_row & came, other=0)
            total += tl.where(node == rail.node, own, theirs).to(tl.float32)
            if CARRY:
                theirs = (record + AT_WEIGHTS).to(tl.pointer_type(tl.float32)) + k
                theirs = tl.load(theirs, mask=(k < TOP_K) & came, other=0.0)
                value += tl.where(node == rail.node, own_value, theirs)
        tl.store(out + row * WIDTH + column, total.to(DTYPE), mask=in_row)
        if CARRY:
            tl.store(out_carried + row * TOP_K + k, value, mask=k < TOP_K)
    for distance in range(1, rail.nodes):
        node = (rail.node + distance) % rail.nodes
        if tl.sum(_going(sent_node, node, first, last, CHUNK, rail.nodes)) > 0:
            rails.took(team, rail, rails.RESULTS, node, rails.received(rail, rails.RESULTS, node))
    return epoch


@triton.jit
def combine(
    team, rail, buffers, tensors, sizes, DTYPE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    TOP_K: tl.constexpr, PLACES: tl.constexpr, WEIGHTED: tl.constexpr, CARRY: tl.constexpr, BIASES: tl.constexpr,
    LAYOUT: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr, RECORD: tl.constexpr, AT_WEIGHTS: tl.constexpr,
    SEND: tl.constexpr, RECV: tl.constexpr,
):  # fmt: skip
    """At step s block b puts chunk s of its range of every source into the landing buffer, as `throughput.combine`;
    sends its likes in other nodes this node's sums for chunk s - 1 of theirs; adds up all nodes' for chunk s - 1 - LAG
    of its own tokens.

    tensors, sizes, LAYOUT: as `throughput.combine`, but that sent_node comes after sent_row. SEND: this launch does the
    first of these, RECV: the others.

    Sums are fp32: of a token's experts on one rank in top-k order, rounded to DTYPE; of a node's ranks in rank order,
    rounded to DTYPE; then the biases, and the nodes in node order, rounded to DTYPE.

    Waits:    block b for block b of every peer inside, on entry if it writes to the landing buffer, and once a chunk;
              for its likes in other nodes: for tiles, and for free slots.
    Ordering: inside stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads; across put
              with signal, then acquire.
    Reuse:    the landing buffer is written after all peers' blocks b have come, which have ended earlier reads of it.
    """
    h, weights, carried = at(tensors[0], DTYPE), at(tensors[1], tl.float32), at(tensors[2], tl.float32)
    bias, more_bias = at(tensors[3], DTYPE), at(tensors[4], DTYPE)
    sent_row, sent_node, recv_row = at(tensors[5], tl.int32), at(tensors[6], tl.int32), at(tensors[7], tl.int32)
    expert_row, told = at(tensors[8], tl.int32), at(tensors[9], tl.int32)
    out, out_carried = at(tensors[10], DTYPE), at(tensors[11], tl.float32)
    capacity = sizes[0]
    ranks: tl.constexpr = team.size * rail.nodes
    of_node: tl.constexpr = TOKENS * team.size
    steps = _most_steps(told, CHUNK, ranks)
    if SEND:
        opened = shmem.begin(team)
        epoch = opened
        if CARRY or LAYOUT != "landing":
            epoch = shmem.barrier_block(team, opened, 1)
        steps = tl.where(epoch == opened, steps, 0)
    else:
        epoch = shmem.resume(team)
    me = rail.node * team.size + team.rank
    for step in range(steps + LAG + 1):
        returning, adding = step - 1, step - 1 - LAG
        if SEND:
            if step < steps:
                if CARRY or LAYOUT != "landing":
                    for source in range(ranks):
                        first, last = chunk_of(told, source, step, CHUNK)
                        stage_chunk(
                            team, buffers, h, weights, carried, recv_row, expert_row, capacity, source, first, last,
                            DTYPE, WIDTH, PADDED, TOP_K, PLACES, WEIGHTED, CARRY, LAYOUT, TOKENS, 1,
                        )  # fmt: skip
                shmem.signal_all(team, epoch, shmem.DATA, step + 1)
        if RECV:
            if (returning >= 0) & (returning < steps):
                epoch = shmem.wait_all(team, epoch, shmem.DATA, returning + 1)
                for distance in range(1, rail.nodes):
                    node = (rail.node + rail.nodes - distance) % rail.nodes
                    first, last = chunk_of(told, node * team.size + team.rank, returning, CHUNK)
                    epoch = _return_chunk(
                        team, rail, buffers, epoch, node, sent_row + node * of_node, first, last, DTYPE, WIDTH, PADDED,
                        TOP_K, PLACES, CARRY, CHUNK, RECORD, AT_WEIGHTS,
                    )  # fmt: skip
            if adding >= 0:
                first, last = chunk_of(told, me, adding, CHUNK)
                epoch = _add_nodes(
                    team, rail, buffers, epoch, bias, more_bias, sent_row + rail.node * of_node, sent_node, out,
                    out_carried, first, last, DTYPE, WIDTH, PADDED, TOP_K, PLACES, BIASES, CARRY, CHUNK, RECORD,
                    AT_WEIGHTS,
                )  # fmt: skip
    shmem.end(team, epoch)
