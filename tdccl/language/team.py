"""The team: what a kernel knows of its communicator, and how the symmetric heap is laid out.

Every block of a kernel owns its own piece of the heap on every rank, so that block b only ever deals
with block b of its peers:

    state     the epoch of this block, a word that the first failed wait claims, and two of `multimem_barrier`
    signals   SIGNAL_KINDS x MAX_RANKS words of 8 bytes: where peers tell this block something
    packets   2 parities x ranks x team.packets words of 8 bytes: the slots of the LL protocol
    ring      2 parities x ring_bytes: scratch through which tiles of ordinary tensors pass
    channel   4 x MAX_RANKS words, and ranks x CHANNEL_DEPTH slots: what passes between two ranks alone

An *epoch* counts the calls of one block. It lives in the heap and the kernel itself advances it, so a
captured graph replays correctly. Packets and ring are doubled by the parity of the epoch. Why that is
safe without a barrier at the end: in every call each block hears from the same block of every peer, and
a peer speaks in epoch e only after its launch of epoch e - 1 has ended; so whoever has finished epoch
e - 1 knows that all peers are done with epoch e - 2, whose parity epoch e uses again. A kernel may also take the
rings of both parities and of all blocks as its own and share them out among the blocks that it has: then it must
open and close with a barrier. (A peer that has come to the first has ended its last launch, in all blocks.)
"""

from typing import NamedTuple

import triton
import triton.language as tl

MAX_RANKS = tl.constexpr(8)
STATE_BYTES = tl.constexpr(128)
STOP_BYTE = tl.constexpr(64)  # where in the first block's state the word for failed waits is
SIGNAL_KINDS = tl.constexpr(4)
SIGNAL_BYTES = tl.constexpr(4 * 8 * 8)
CHANNEL_DEPTH = tl.constexpr(4)

# Kinds of signal. The first three belong to tdccl's own collectives; the fourth is free for users.
DATA = tl.constexpr(0)
RESULT = tl.constexpr(1)
BARRIER = tl.constexpr(2)
USER = tl.constexpr(3)

LAST_EPOCH = tl.constexpr(0xFFFFFFFF)
# How far back the epoch falls after a failed wait: even, to keep the parity; no peer still waits for it, and it is so
# far that what peers have signalled up to now is not taken for it either: a barrier in a past epoch fails.
DEAD = tl.constexpr(512)


class Team(NamedTuple):
    """First argument of every communicating kernel; `Communicator.team` makes it.

    heap     *i64: table of the base addresses of all ranks' heaps, then their multicast address or 0
    local    *i8: base of this rank's own heap
    rank     i32
    control  *i64: words of pinned host memory, the abort word and the fault record (`FAULT_FIELDS`)
    timeout  i64: nanoseconds that a wait may last
    size     number of ranks
    blocks   the largest grid of a communicating kernel: so many blocks have signals and packets in the heap
    packets  words of 8 bytes in the LL slot that a block has for each rank
    rings    how many blocks have a ring; a kernel that uses rings launches no more
    ring_bytes   bytes of such a block's ring for each parity
    channels     how many blocks have a channel
    slot_bytes   bytes of a slot of a channel
    backend  "cuda", "hip" or "emulation"
    """

    heap: object
    local: object
    rank: object
    control: object
    timeout: object
    size: tl.constexpr
    blocks: tl.constexpr
    packets: tl.constexpr
    rings: tl.constexpr
    ring_bytes: tl.constexpr
    channels: tl.constexpr
    slot_bytes: tl.constexpr
    backend: tl.constexpr


TEAM_TYPES = Team("*i64", "*i8", "i32", "*i64", "i64", *["constexpr"] * 8)


class Symmetric(NamedTuple):
    """A buffer that exists on every rank: *i64 table of all ranks' segment bases (then their multicast address or
    0), and i64 offset in bytes."""

    bases: object
    offset: object


SYMMETRIC_TYPES = Symmetric("*i64", "i64")

# Words of the control block. `abort` is 0 or one of the codes; above its 8 bits it has the rank that
# waited, aborted or died.
FAULT_FIELDS = ("abort", "block", "peer", "kind", "epoch", "expected", "seen", "timeout")
# Behind them: which rank of the communicator the team's rank 0 is, if the team is but a node of it.
FIRST_WORD = tl.constexpr(8)
ABORTED, TIMED_OUT, GRID_TOO_LARGE, PEER_DIED = 1, 2, 3, 4
PACKET_KIND = tl.constexpr(4)
CHANNEL_KIND = tl.constexpr(5)
RAIL_KIND = tl.constexpr(7)
TIMED_OUT_CODE = tl.constexpr(TIMED_OUT)
GRID_CODE = tl.constexpr(GRID_TOO_LARGE)


def packets_a_rank(packets: int, size: int) -> int:
    """What of a block's LL slots each of `size` ranks gets, a power of two."""
    return 1 << ((packets // size).bit_length() - 1)


def heap_bytes(team) -> int:
    """Bytes of heap that a team with these constants needs on each rank."""
    slots = 2 * team.size * team.packets * 8
    channel = 4 * MAX_RANKS.value * 8 + team.size * CHANNEL_DEPTH.value * team.slot_bytes
    blocks = team.blocks * (STATE_BYTES.value + SIGNAL_BYTES.value + slots)
    return blocks + team.rings * 2 * team.ring_bytes + team.channels * channel


def ring_bytes_within(scratch: int, team) -> int:
    """The largest ring (a multiple of 1 KiB) for which the team's heap stays within `scratch` bytes."""
    left = scratch - heap_bytes(team._replace(ring_bytes=0))
    return left // (2 * team.rings) // 1024 * 1024


def whole_ring_bytes(ring_bytes: int, rings: int, blocks: int) -> int:
    """What a block of a grid of `blocks` gets when they share all rings of both parities, a multiple of 1 KiB."""
    return 2 * ring_bytes * rings // blocks // 1024 * 1024


@triton.jit
def block_of(team):
    """The number of this block, and the last one's for all blocks of a grid that is too large (see `begin`)."""
    return tl.minimum(tl.program_id(0), team.blocks - 1)


@triton.jit
def signal_offset(team, kind, source):
    """Byte offset in any rank's heap of the signal that `source` sets for this block."""
    word = (block_of(team) * SIGNAL_KINDS + kind) * MAX_RANKS + source
    return team.blocks * STATE_BYTES + word * 8


@triton.jit
def packet_offset(team, epoch, source):
    """Byte offset of the packet slot into which `source` writes for this block in this epoch."""
    start: tl.constexpr = team.blocks * (STATE_BYTES + SIGNAL_BYTES)
    slot = (block_of(team) * 2 + (epoch & 1).to(tl.int32)) * team.size + source
    return start + slot * team.packets * 8


@triton.jit
def ring_offset(team, epoch, WHOLE: tl.constexpr):
    """Byte offset of this block's ring for this epoch; WHOLE: of its share of all rings (`whole_ring_bytes`)."""
    packets: tl.constexpr = 2 * team.size * team.packets * 8
    start: tl.constexpr = team.blocks * (STATE_BYTES + SIGNAL_BYTES + packets)
    block = tl.minimum(tl.program_id(0), team.rings - 1).to(tl.int64)
    if WHOLE:
        share = 2 * team.ring_bytes * team.rings // tl.num_programs(0) // 1024 * 1024
        return start + block * share
    else:
        return start + (block * 2 + (epoch & 1)) * team.ring_bytes


@triton.jit
def channel_offset(team):
    """Byte offset of this block's channel; a kernel that uses channels launches at most `team.channels` blocks."""
    packets: tl.constexpr = 2 * team.size * team.packets * 8
    start: tl.constexpr = team.blocks * (STATE_BYTES + SIGNAL_BYTES + packets) + team.rings * 2 * team.ring_bytes
    block = tl.minimum(tl.program_id(0), team.channels - 1).to(tl.int64)
    return start + block * (4 * MAX_RANKS * 8 + team.size * CHANNEL_DEPTH * team.slot_bytes)


@triton.jit
def begin(team):
    """The epoch of this call in this block, an int64 in 1 .. 2**32 - 1; 2 follows the last, to keep parity.

    Until `end` the block must have heard from the same block of every peer: on that rests the reuse of all scratch.
    A grid of more than `team.blocks` blocks touches nothing out of bounds, but its results are wrong and the
    communicator's next call raises.
    """
    if tl.program_id(0) >= team.blocks:
        tl.store(team.control, tl.full([], GRID_CODE, tl.int64))
    return following(resume(team))


@triton.jit
def following(epoch):
    """The epoch after this one."""
    return tl.where(epoch == LAST_EPOCH, 2, epoch + 1)


@triton.jit
def resume(team):
    """The epoch in which this block's last launch ended, for one that goes on with the same call."""
    return if_sound(team, tl.load((team.local + block_of(team) * STATE_BYTES).to(tl.pointer_type(tl.int64))))


@triton.jit
def if_sound(team, epoch):
    """The epoch to begin with: this one, or once a wait of this rank has failed in a launch before, a past one, so that
    what is made of the results of that passes for nothing with the peers. Ordering: none."""
    failed = tl.load((team.local + STOP_BYTE).to(tl.pointer_type(tl.int64))) != 0
    return tl.where(failed, epoch - DEAD, epoch)


@triton.jit
def end(team, epoch):
    """Closes the call: the next launch of this block sees a new epoch. All waits must be over."""
    tl.debug_barrier()
    tl.store((team.local + block_of(team) * STATE_BYTES).to(tl.pointer_type(tl.int64)), epoch)
