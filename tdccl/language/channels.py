"""Channels: how one rank's tiles reach another when nobody else takes part.

Every block of a transfer has, from each rank, a ring of CHANNEL_DEPTH slots of `team.slot_bytes` bytes, and four
words a peer that only ever count up: tiles that it has sent there and received from there, which it alone writes and
reads, and tiles that have arrived from there and been taken there, which the peer writes. Nothing of it is shared with
collectives, with other pairs, or with the other direction of the same pair.
"""

import triton
import triton.language as tl

from tdccl.language.signals import fence, heap_at, local_at, wait_counters
from tdccl.language.team import CHANNEL_DEPTH, CHANNEL_KIND, MAX_RANKS, channel_offset

SENT, RECEIVED, ARRIVED, TAKEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def channel_counts(team, KIND: tl.constexpr):
    """Pointers ([MAX_RANKS]) to this block's words of a kind, one a peer. Ordering: none."""
    return local_at(team, channel_offset(team) + KIND * MAX_RANKS * 8, tl.int64) + tl.arange(0, MAX_RANKS)


@triton.jit
def _slot_offset(team, source, number):
    ring = channel_offset(team) + 4 * MAX_RANKS * 8 + source.to(tl.int64) * CHANNEL_DEPTH * team.slot_bytes
    return ring + number % CHANNEL_DEPTH * team.slot_bytes


@triton.jit
def channel_slot_at(team, number, pe, DTYPE: tl.constexpr):
    """Pointer to the slot on rank `pe` for this rank's tile of that number. Ordering: none."""
    return heap_at(team, _slot_offset(team, team.rank, number), pe, DTYPE)


@triton.jit
def channel_slot(team, number, source, DTYPE: tl.constexpr):
    """Pointer to the slot here for the tile of that number from rank `source`. Ordering: none."""
    return local_at(team, _slot_offset(team, source, number), DTYPE)


@triton.jit
def count_for_peers(team, KIND: tl.constexpr, counts, wanted):
    """Sets this rank's word of a kind on each peer in the mask `wanted` to its value in `counts` ([MAX_RANKS]).

    Ordering: block barrier, then release at sys scope.
    """
    fence()
    ranks = tl.arange(0, MAX_RANKS)
    wanted = wanted & (ranks < team.size) & (ranks != team.rank)
    offset = channel_offset(team) + (KIND * MAX_RANKS + team.rank) * 8
    addresses = tl.load(team.heap + ranks, mask=wanted, other=0) + offset
    tl.atomic_xchg(addresses.to(tl.pointer_type(tl.int64)), counts, mask=wanted, sem="release", scope="sys")


@triton.jit
def wait_counts(team, KIND: tl.constexpr, counts, wanted):
    """Waits until the words of a kind have reached `counts` for all peers in the mask `wanted`; whether they have.

    Ordering: acquire at sys scope, then a block barrier. Bounded as `signal_wait`: after a failed wait a block must
    neither write nor count for its peers.
    """
    ranks = tl.arange(0, MAX_RANKS)
    wanted = wanted & (ranks < team.size) & (ranks != team.rank)
    return wait_counters(team, channel_counts(team, KIND), counts, wanted, CHANNEL_KIND, tl.full([], 0, tl.int64))
