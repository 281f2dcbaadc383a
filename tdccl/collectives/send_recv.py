"""send and receive: a round of messages, at most one to and one from each rank, between pairs that agree on it.

Nobody waits for a rank that it has no message with, and what two ranks exchange is in nobody's way: channels count for
themselves, see `tdccl.language.channels`.
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.runtime.algorithm import Algorithm, between_pairs

# A block takes in tiles this many steps after it has sent its own: long enough to find them there.
LAG = tl.constexpr(2)


@triton.jit
def _of(counts, pe):
    """counts[pe] of a small tensor."""
    return tl.sum(tl.where(tl.arange(0, shmem.MAX_RANKS) == pe, counts, 0))


@triton.jit
def _tiles(counts, TILE: tl.constexpr):
    """For each rank the tiles of this block in a message of so many elements."""
    ranks = tl.arange(0, shmem.MAX_RANKS)
    tiles = tl.zeros([shmem.MAX_RANKS], tl.int64)
    for rank in tl.static_range(len(counts)):
        tiles = tl.where(ranks == rank, shmem.steps_of(counts[rank], TILE), tiles)
    return tiles


@triton.jit
def transfer(
    team, sends, recvs, send_counts, recv_counts, DTYPE: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr
):
    """At step s a block stores tile s of each message into its receiver's ring, and takes in tile s - LAG of what
    others send. sends, recvs: addresses, one a rank; send_counts, recv_counts: elements, 0 for no message.

    Waits:    block b for block b of a receiver, for a free slot; for block b of a sender, for its tile; all in step, so
              that a rank which does not come holds up what passes to and from the others.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    a slot is written again only after its receiver has counted it as taken. Rings outlive launches.
    """
    place = tl.arange(0, TILE)
    sending, receiving = _tiles(send_counts, TILE), _tiles(recv_counts, TILE)
    sent = tl.load(shmem.channel_counts(team, shmem.SENT))
    received = tl.load(shmem.channel_counts(team, shmem.RECEIVED))
    steps = tl.maximum(tl.max(sending), tl.max(receiving) + LAG)
    alive = steps * 0 + 1  # 0 after a failed wait: from then on nothing is written and nothing counted
    for step in range(steps):
        wanted = step < sending * alive
        free = sent + step + 1 - shmem.CHANNEL_DEPTH
        alive = tl.where(shmem.wait_counts(team, shmem.TAKEN, free, wanted), alive, 0)
        for distance in tl.static_range(1, team.size):  # rank + 1 first: no two ranks on one target
            pe = (team.rank + distance) % team.size
            index = shmem.span_start(step, TILE) + place
            mask = index < shmem.pick(send_counts, pe) * alive
            source = tl.multiple_of(shmem.pick(sends, pe).to(tl.pointer_type(DTYPE)), ALIGN)
            slot = shmem.channel_slot_at(team, _of(sent, pe) + step, pe, DTYPE)
            tl.store(slot + place, tl.load(source + index, mask=mask), mask=mask)
        shmem.count_for_peers(team, shmem.ARRIVED, sent + step + 1, step < sending * alive)
        if step >= LAG:
            wanted = step - LAG < receiving * alive
            there = received + step - LAG + 1
            alive = tl.where(shmem.wait_counts(team, shmem.ARRIVED, there, wanted), alive, 0)
            for distance in tl.static_range(1, team.size):
                pe = (team.rank + team.size - distance) % team.size
                index = shmem.span_start(step - LAG, TILE) + place
                mask = index < shmem.pick(recv_counts, pe) * alive
                target = tl.multiple_of(shmem.pick(recvs, pe).to(tl.pointer_type(DTYPE)), ALIGN)
                slot = shmem.channel_slot(team, _of(received, pe) + step - LAG, pe, DTYPE)
                tl.store(target + index, tl.load(slot + place, mask=mask), mask=mask)
            shmem.count_for_peers(team, shmem.TAKEN, there, step - LAG < receiving * alive)
    tl.debug_barrier()
    # Only what this launch has moved: another may be under way with other peers, or the other way.
    tl.store(shmem.channel_counts(team, shmem.SENT), sent + sending, mask=sending > 0)
    tl.store(shmem.channel_counts(team, shmem.RECEIVED), received + receiving, mask=receiving > 0)


ALGORITHMS = [Algorithm("transfer", transfer, between_pairs, sent=lambda n: 1)]
