"""all_to_all_vdev: an all_to_all whose split lists live on the device, as torch.ops.symm_mem.all_to_all_vdev has it.

Nothing depends on the host knowing them: routing may change from one replay of a graph to the next.
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.collectives import exchange
from tdccl.runtime.algorithm import Algorithm, split_on_device

# Of a message, of which the first four are sent: as many as a block can have threads, for the sake of `get_words`.
PLACES = tl.constexpr(1024)


@triton.jit
def _message(rows, room):
    """The words that a rank sends another: its rows for it, and how many it has room for, each in two halves."""
    place = tl.arange(0, PLACES)
    return (tl.where(place < 2, rows, room) >> (place % 2 * 32)).to(tl.int32)


@triton.jit
def _said(words, FIRST: tl.constexpr):
    """The number whose halves are the words FIRST and FIRST + 1."""
    place = tl.arange(0, PLACES)
    half = words.to(tl.int64) & 0xFFFFFFFF
    return tl.sum(tl.where(place == FIRST, half, 0) + tl.where(place == FIRST + 1, half << 32, 0))


@triton.jit
def _counts_and_offsets(counts, room):
    """For each rank its count, at most what is left of `room`, and the sum of those before it; two tuples."""
    fitting, offsets, start = (), (), room - room
    for rank in tl.static_range(len(counts)):
        count = tl.minimum(tl.maximum(counts[rank], 0), room - start)
        fitting, offsets = fitting + (count,), offsets + (start,)
        start += count
    return fitting, offsets


@triton.jit
def staged(
    team, send, recv, splits, received, row, send_count, recv_count,
    DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Every block tells its peers by packets how much it has for them, and what it has room for; then as
    `exchange.staged`.

    Waits:    block b for block b of every peer, for these two; then as `exchange.staged`.
    Ordering: none needed for the counts, the flag travels in the word.
    Reuse:    packet slots and rings alternate by the parity of the epoch; each rank hears from all in each call.
              Counts from peers are cut to what fits into recv before anything is written by them or counts steps.
    """
    epoch = shmem.begin(team)
    wanted = ()
    for rank in tl.static_range(team.size):
        wanted = wanted + (tl.load(splits.to(tl.pointer_type(tl.int64)) + rank) * row,)
    send_counts, send_offsets = _counts_and_offsets(wanted, send_count)
    # In rows, because ranks may go by different elements; and how many there is room for, so that the two agree on
    # their steps by numbers of which each has checked its own.
    place = tl.arange(0, PLACES)
    sent_places = place < 4
    for distance in tl.static_range(1, team.size):
        pe = (team.rank + distance) % team.size
        message = _message(shmem.pick(send_counts, pe) // row, recv_count // row)
        shmem.put_words(team, epoch, message, place, sent_places, pe)
    own = _message(shmem.pick(send_counts, team.rank) // row, recv_count // row)
    words, epoch = shmem.get_words(team, epoch, own, place, sent_places)
    told, sent, taken = (), (), ()
    for rank in tl.static_range(team.size):
        rows, room = _said(words[rank], 0), _said(words[rank], 2)
        told = told + (tl.maximum(rows, 0) * row,)
        sent = sent + (tl.minimum(send_counts[rank], tl.maximum(room, 0) * row),)
        taken = taken + (tl.minimum(tl.maximum(rows * row, 0), recv_count),)
    recv_counts, recv_offsets = _counts_and_offsets(told, recv_count)
    if tl.program_id(0) == 0:
        answer = received.to(tl.pointer_type(tl.int64))
        start = row - row
        for source in tl.static_range(team.size):
            rows = told[source] // row
            tl.store(answer + source, rows)
            tl.store(answer + team.size + source, start)
            start += rows
    epoch = exchange.through_rings(
        team, epoch, send, recv, sent, send_offsets, taken, recv_counts, recv_offsets, DTYPE, TILE, TILES, WHOLE, False
    )
    shmem.end(team, epoch)


def _staged(call, context):
    return split_on_device(call, context, rings=context.size - 1, depth=exchange.DEPTH.value)


ALGORITHMS = [Algorithm("staged", staged, _staged, sent=lambda n: n - 1)]
