"""What passes between pairs of ranks of a communicator on several nodes, in any amounts: messages, uneven pieces.

transfer   messages between two ranks, which alone take part: at most one to and one from each
pieces     a piece for each rank, by split lists
on_device  the same by split lists on the device, as torch.ops.symm_mem.all_to_all_vdev has it

All pairs go by NVSHMEM, those inside a node too: to the lanes of these kernels every rank is a node. Messages go
through one lane of a pair, pieces through the other, so that neither is in the other's way.
"""

import triton
import triton.language as tl

import tdccl.language as shmem
import tdccl.language.rails as rails
from tdccl.runtime.algorithm import Algorithm, between_pairs, in_pieces, pieces_on_device

# A block takes in tiles this many steps after it has sent its own: long enough to find them there.
LAG = tl.constexpr(2)


@triton.jit
def _of(values, pe):
    """values[pe] of a small tensor."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == pe, values, 0))


@triton.jit
def _vector(values, RANKS: tl.constexpr):
    """A tuple of integers as a tensor ([RANKS], int64)."""
    ranks, vector = tl.arange(0, RANKS), tl.zeros([RANKS], tl.int64)
    for rank in tl.static_range(len(values)):
        vector = tl.where(ranks == rank, values[rank], vector)
    return vector


@triton.jit
def _exchange(
    team, rail, epoch, STAGE: tl.constexpr, sends, recvs, send_counts, arriving, recv_counts, DTYPE: tl.constexpr,
    TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """At step s a block sends tile s of what is for each rank, and takes in tile s - LAG of what comes from each.

    sends, recvs: addresses, by rank; send_counts, arriving: elements that are sent to it and come from it; of these
    recv_counts are stored. Returns the epoch.
    Waits:    for free slots, and for tiles, of the ranks to and from which there is something; all in step, so that a
              rank which does not come holds up what passes to and from the others.
    Ordering: stores, block barrier, put with signal; acquire at sys scope, block barrier, loads.
    Reuse:    that of lanes, see `tdccl.language.rails`: a tile for which there must be a free slot was taken in by its
              receiver before anybody came to this step.
    """
    place = tl.arange(0, TILE)
    itemsize: tl.constexpr = DTYPE.primitive_bitwidth // 8
    lanes: tl.constexpr = ALIGN // itemsize  # counts are multiples of it: accesses are as wide as addresses allow
    sending, receiving = shmem.steps_of(send_counts, TILE), shmem.steps_of(arriving, TILE)
    steps = tl.maximum(tl.max(sending), tl.max(receiving) + LAG)
    for step in range(steps):
        index = shmem.span_start(step, TILE) + place
        own = tl.load(_at(sends, rail.node, DTYPE, ALIGN) + index, mask=index < _count(send_counts, rail.node, lanes))
        tl.store(_at(recvs, rail.node, DTYPE, ALIGN) + index, own, mask=index < _count(recv_counts, rail.node, lanes))
        for distance in range(1, rail.nodes):  # rank + 1 first: no two ranks on one target
            pe = (rail.node + distance) % rail.nodes
            if step < _of(sending, pe):
                epoch, number, slot = rails.next_out(team, rail, STAGE, pe, epoch, DTYPE)
                count = _count(send_counts, pe, lanes)
                tile = tl.load(_at(sends, pe, DTYPE, ALIGN) + index, mask=index < count)
                tl.store(slot + place, tile, mask=index < count)
                left = tl.minimum(count - shmem.span_start(step, TILE), TILE)
                rails.put_tile(team, rail, STAGE, pe, number, slot, left * itemsize)
        if step >= LAG:
            index = shmem.span_start(step - LAG, TILE) + place
            for distance in range(1, rail.nodes):
                pe = (rail.node + rail.nodes - distance) % rail.nodes
                if step - LAG < _of(receiving, pe):
                    epoch, number = rails.next_in(team, rail, STAGE, pe, epoch)
                    mask = (index < _count(recv_counts, pe, lanes)) & (epoch > 0)  # after a failed wait nothing is
                    tile = tl.load(rails.in_slot(rail, STAGE, pe, number, DTYPE) + place, mask=mask)
                    tl.store(_at(recvs, pe, DTYPE, ALIGN) + index, tile, mask=mask)
                    rails.took(team, rail, STAGE, pe, number)
    return epoch


@triton.jit
def _at(addresses, pe, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(_of(addresses, pe).to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def _count(counts, pe, LANES: tl.constexpr):
    return _of(counts, pe) // LANES * LANES  # as the compiler sees it


@triton.jit
def transfer(
    team, rail, sends, recvs, send_counts, recv_counts, DTYPE: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """Sends and receives messages. sends, recvs: addresses, one a rank; send_counts, recv_counts: elements, 0 for none.

    Nobody waits for a rank that it has no message with. Waits, ordering, reuse: `_exchange`.
    """
    into = _vector(recv_counts, RANKS)
    _exchange(
        team, rail, tl.full([], 1, tl.int64), rails.INPUTS, _vector(sends, RANKS), _vector(recvs, RANKS),
        _vector(send_counts, RANKS), into, into, DTYPE, TILE, ALIGN,
    )  # fmt: skip


@triton.jit
def pieces(
    team, rail, send, recv, send_counts, send_offsets, recv_counts, recv_offsets, DTYPE: tl.constexpr,
    TILE: tl.constexpr, ALIGN: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Every rank gets its piece of `send`, and every rank's piece comes to its place in `recv`.

    Waits, ordering, reuse: `_exchange`.
    """
    itemsize: tl.constexpr = DTYPE.primitive_bitwidth // 8
    sends = send.to(tl.int64) + _vector(send_offsets, RANKS) * itemsize
    recvs = recv.to(tl.int64) + _vector(recv_offsets, RANKS) * itemsize
    into = _vector(recv_counts, RANKS)
    _exchange(
        team, rail, tl.full([], 1, tl.int64), rails.RESULTS, sends, recvs, _vector(send_counts, RANKS), into, into,
        DTYPE, TILE, ALIGN,
    )  # fmt: skip


@triton.jit
def _fitting(counts, room):
    """(counts >= 0 as far as all of them fit into `room`, the sums of those before each), of a small tensor."""
    counts = tl.minimum(tl.maximum(counts, 0), room)
    ends = tl.minimum(tl.cumsum(counts, axis=0), room)
    starts = tl.minimum(tl.cumsum(counts, axis=0) - counts, room)
    return ends - starts, starts


@triton.jit
def on_device(
    team, rail, send, recv, splits, received, row, send_count, recv_count, DTYPE: tl.constexpr, TILE: tl.constexpr,
    ALIGN: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Every block tells every rank how many rows it has for it, and has room for; then as `pieces`.

    Waits:    block b for block b of every rank, for these two; then as `_exchange`.
    Ordering: put with signal; acquire at sys scope, block barrier, loads.
    Reuse:    that of lanes. Counts from others are cut to what fits into recv before anything is written by them.
    """
    itemsize: tl.constexpr = DTYPE.primitive_bitwidth // 8
    ranks, epoch = tl.arange(0, RANKS), tl.full([], 1, tl.int64)
    there = ranks < rail.nodes
    wanted = tl.load(splits.to(tl.pointer_type(tl.int64)) + ranks, mask=there, other=0)
    send_counts, send_offsets = _fitting(wanted * row, send_count)
    # In rows, because ranks may go by different elements.
    mine, room = send_counts // row, recv_count // row
    for distance in range(1, rail.nodes):
        pe = (rail.node + distance) % rail.nodes
        epoch, number, slot = rails.next_out(team, rail, rails.RESULTS, pe, epoch, tl.int64)
        tl.store(slot, _of(mine, pe))
        tl.store(slot + 1, room)
        rails.put_tile(team, rail, rails.RESULTS, pe, number, slot, 16)
    told, rooms = tl.where(ranks == rail.node, mine, 0), tl.where(ranks == rail.node, room, 0)
    for distance in range(1, rail.nodes):
        pe = (rail.node + rail.nodes - distance) % rail.nodes
        epoch, number = rails.next_in(team, rail, rails.RESULTS, pe, epoch)
        slot = rails.in_slot(rail, rails.RESULTS, pe, number, tl.int64)
        told, rooms = tl.where(ranks == pe, tl.load(slot), told), tl.where(ranks == pe, tl.load(slot + 1), rooms)
        rails.took(team, rail, rails.RESULTS, pe, number)
    told = tl.where(epoch > 0, tl.maximum(told, 0), 0)
    sent = tl.minimum(send_counts, tl.maximum(rooms, 0) * row)
    arriving = tl.minimum(told * row, recv_count)
    recv_counts, recv_offsets = _fitting(told * row, recv_count)
    if tl.program_id(0) == 0:
        answer = received.to(tl.pointer_type(tl.int64)) + ranks
        tl.store(answer, told, mask=there)
        tl.store(answer + rail.nodes, tl.cumsum(told, axis=0) - told, mask=there)
    sends, recvs = send.to(tl.int64) + send_offsets * itemsize, recv.to(tl.int64) + recv_offsets * itemsize
    _exchange(team, rail, epoch, rails.RESULTS, sends, recvs, sent, arriving, recv_counts, DTYPE, TILE, ALIGN)


def _same(call, context):
    return in_pieces(call, context, same=True)


SEND_RECV = [Algorithm("transfer", transfer, between_pairs, sent=lambda n: 1, pairs=True)]
ALL_GATHER = [Algorithm("pairs", pieces, _same, sent=lambda n: n - 1, pairs=True, splits="only")]
ALL_TO_ALL = [Algorithm("pairs", pieces, in_pieces, sent=lambda n: n - 1, pairs=True, splits="only")]
ALL_TO_ALL_VDEV = [Algorithm("on_device", on_device, pieces_on_device, sent=lambda n: n - 1, pairs=True)]
