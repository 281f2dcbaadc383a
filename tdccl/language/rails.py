"""Rails: what passes between the nodes of a communicator, each rank with those of its own place in the other nodes.

Every block of a rank has, for each node, two *lanes*: one to share inputs and one to share results, so that a kernel
may do both at once. A lane has LANE_DEPTH slots for tiles that go out, as many for tiles that come in, and words:

    sent, received     tiles so far, which this rank alone writes and reads
    arrived, by slot   1 + the number of the tile that has come into it; the other node's rank sets it with the tile
    taken, by slot     1 + the number of the tile that the other node's rank has taken out of its own slot

All of them only ever count up, over all calls, so a captured graph replays correctly. Why slots are reused safely:
tile q goes out when tile q - LANE_DEPTH has been taken, which has the same slots here and there; so its bytes have
left, and nothing that comes later into a slot, or into the words of one, can be overtaken by what came before. Nothing
is asked of the order in which the network delivers, but that a signal comes after its own tile.

The lane for this rank's own node goes nowhere: its outgoing slots hold tiles that all nodes are sent, or none; its
incoming slots nothing but what finds no free slot because a wait has failed.
"""

from typing import NamedTuple

import triton
import triton.language as tl

import tdccl.language.nvshmem as nvshmem
from tdccl.language.signals import fence, may_signal, wait_word
from tdccl.language.team import DEAD, RAIL_KIND

LANE_DEPTH = tl.constexpr(4)
LANE_WORD_BYTES = tl.constexpr(128)
STAGES = tl.constexpr(2)
INPUTS, RESULTS = tl.constexpr(0), tl.constexpr(1)

# The words of a lane. The last two are written by whoever has a signal to set and nothing to send.
SENT, RECEIVED, ARRIVED_WORD, TAKEN_WORD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(4), tl.constexpr(8)
NOTHING_FROM, NOTHING_TO = tl.constexpr(14), tl.constexpr(15)


class Rail(NamedTuple):
    """What a kernel knows of the other nodes; comes after the `Team`, which is this rank's node.

    local       *i8: base of this rank's lanes, in memory that NVSHMEM allocated at the same place on every PE
    pes         *i32: PEs of the ranks with this place in their nodes, by node
    node        i32: this rank's node
    nodes       number of nodes
    slot_bytes  bytes of a slot, a multiple of 128
    stride      from a rank of the communicator to its like in the next node: 1 where every rank counts as a node
    """

    local: object
    pes: object
    node: object
    nodes: tl.constexpr
    slot_bytes: tl.constexpr
    stride: tl.constexpr


RAIL_TYPES = Rail("*i8", "*i32", "i32", "constexpr", "constexpr", "constexpr")


def lane_bytes(slot_bytes: int) -> int:
    """Bytes of a lane with slots of so many bytes."""
    return LANE_WORD_BYTES.value + 2 * LANE_DEPTH.value * slot_bytes


def rail_bytes(blocks: int, nodes: int, slot_bytes: int) -> int:
    """Bytes of memory for the lanes of so many blocks to so many nodes."""
    return blocks * STAGES.value * nodes * lane_bytes(slot_bytes)


def slot_bytes_within(nbytes: int, blocks: int, nodes: int) -> int:
    """The largest slots that take no more than `nbytes` bytes in all lanes, a multiple of 128. The lanes' words come on
    top: else the slots would be a little less than a power of two, which tiles are, and half empty."""
    return nbytes // (blocks * STAGES.value * nodes * 2 * LANE_DEPTH.value) // 128 * 128


def has_come(words: list[int]) -> bool:
    """Whether a tile has come that has not been taken in, by the words of its lane. The first block's lane for node n
    through INPUTS is the n-th in memory."""
    number = words[RECEIVED.value]
    return words[ARRIVED_WORD.value + number % LANE_DEPTH.value] > number


@triton.jit
def _lane(rail, STAGE: tl.constexpr, node):
    """Where this block's lane for `node` begins."""
    size: tl.constexpr = LANE_WORD_BYTES + 2 * LANE_DEPTH * rail.slot_bytes
    number = (tl.program_id(0).to(tl.int64) * STAGES + STAGE) * rail.nodes + node
    return rail.local + number * size


@triton.jit
def _word(rail, STAGE: tl.constexpr, node, index):
    return _lane(rail, STAGE, node).to(tl.pointer_type(tl.int64)) + index


@triton.jit
def out_slot(rail, STAGE: tl.constexpr, node, number, DTYPE: tl.constexpr):
    """Pointer to the slot of outgoing tile `number` for `node`. Ordering: none."""
    offset = LANE_WORD_BYTES + number % LANE_DEPTH * rail.slot_bytes
    return tl.multiple_of((_lane(rail, STAGE, node) + offset).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def in_slot(rail, STAGE: tl.constexpr, node, number, DTYPE: tl.constexpr):
    """Pointer to the slot of incoming tile `number` from `node`. Ordering: none."""
    offset = LANE_WORD_BYTES + (LANE_DEPTH + number % LANE_DEPTH) * rail.slot_bytes
    return tl.multiple_of((_lane(rail, STAGE, node) + offset).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _wait_lane(team, rail, STAGE: tl.constexpr, node, epoch, index, value):
    """Waits until a word of a lane is at least `value`; returns the epoch to go on with, as `wait_peers`."""
    peer = team.rank + (node - rail.node).to(tl.int64) * rail.stride
    _, go = wait_word(team, _word(rail, STAGE, node, index), value, peer, RAIL_KIND, epoch)
    return tl.where(go, epoch, epoch - DEAD)


@triton.jit
def next_out(team, rail, STAGE: tl.constexpr, node, epoch, DTYPE: tl.constexpr):
    """(epoch to go on with, number, pointer to the slot) of the next tile for `node`, once its slot is free.

    Ordering: acquire at sys scope, then a block barrier. Bounded, as `wait_peers`; after a failed wait the pointer is
    to a slot that nobody sends or looks at, for what is in the tile's own may still be under way.
    """
    number = tl.load(_word(rail, STAGE, node, SENT))
    taken = number % LANE_DEPTH + TAKEN_WORD
    later = _wait_lane(team, rail, STAGE, node, epoch, taken, number + 1 - LANE_DEPTH)
    slot = out_slot(rail, STAGE, node, number, DTYPE).to(tl.int64)
    unused = in_slot(rail, STAGE, rail.node, number, DTYPE).to(tl.int64)
    slot = tl.where(later == epoch, slot, unused).to(tl.pointer_type(DTYPE))
    return later, number, tl.multiple_of(slot, 16)


@triton.jit
def put_tile(team, rail, STAGE: tl.constexpr, node, number, source, nbytes):
    """Sends tile `number`, that is `nbytes` bytes at `source`, to `node`: one of this rank's outgoing slots.

    A rank of which a wait has failed sends nothing, so that the others' fail, too.
    Ordering: block barrier; the other rank's `next_in` sees these bytes.
    """
    fence()
    if may_signal(team):
        target = in_slot(rail, STAGE, rail.node, number, tl.int8)
        arrived = _word(rail, STAGE, rail.node, number % LANE_DEPTH + ARRIVED_WORD)
        pe = tl.load(rail.pes + node)
        nvshmem.put_signal_nbi(target, source, tl.full([], 0, tl.int64) + nbytes, arrived, number + 1, pe)
    _count(rail, STAGE, node, SENT, number)


@triton.jit
def _count(rail, STAGE: tl.constexpr, node, index, number):
    """One thread stores the word; the barrier keeps the others from reading it too early the next time."""
    tl.store(_word(rail, STAGE, node, index), number + 1)
    fence()


@triton.jit
def next_in(team, rail, STAGE: tl.constexpr, node, epoch):
    """(epoch to go on with, number) of the next tile from `node`, once it has come.

    Ordering: acquire at sys scope, then a block barrier. Bounded, as `wait_peers`.
    """
    number = tl.load(_word(rail, STAGE, node, RECEIVED))
    epoch = _wait_lane(team, rail, STAGE, node, epoch, number % LANE_DEPTH + ARRIVED_WORD, number + 1)
    return epoch, number


@triton.jit
def took(team, rail, STAGE: tl.constexpr, node, number):
    """Tells `node` that the block has read its tile `number`. Ordering: a block barrier, then the signal."""
    fence()
    if may_signal(team):
        nothing, there = _word(rail, STAGE, node, NOTHING_FROM), _word(rail, STAGE, rail.node, NOTHING_TO)
        taken = _word(rail, STAGE, rail.node, number % LANE_DEPTH + TAKEN_WORD)
        pe = tl.load(rail.pes + node)
        nvshmem.put_signal_nbi(there, nothing, tl.full([], 8, tl.int64), taken, number + 1, pe)
    _count(rail, STAGE, node, RECEIVED, number)


@triton.jit
def barrier(team, rail, epoch):
    """Block b leaves when block b of this rank's likes in all nodes has come; returns the epoch to go on with.

    Every block tells its likes 1, 2, 4, ... nodes further what it knows by then, in lanes of INPUTS.
    Ordering: what these blocks stored before is visible after it; what they put, if `nvshmem.quiet` came before it.
    Bounded, as `wait_peers`.
    """
    distance = 1
    while distance < rail.nodes:
        after, before = (rail.node + distance) % rail.nodes, (rail.node + rail.nodes - distance) % rail.nodes
        epoch, number, slot = next_out(team, rail, INPUTS, after, epoch, tl.int8)
        put_tile(team, rail, INPUTS, after, number, slot, 16)  # of anything
        epoch, number = next_in(team, rail, INPUTS, before, epoch)
        took(team, rail, INPUTS, before, number)
        distance *= 2
    return epoch


@triton.jit
def sent(rail, STAGE: tl.constexpr, node):
    """The number of the next tile for `node`, for whom `next_out` has found a slot. Ordering: none."""
    return tl.load(_word(rail, STAGE, node, SENT))


@triton.jit
def received(rail, STAGE: tl.constexpr, node):
    """The number of the next tile from `node`, for which `next_in` has waited. Ordering: none."""
    return tl.load(_word(rail, STAGE, node, RECEIVED))


@triton.jit
def next_shared(rail):
    """The number of the next tile that all nodes are sent from one slot: that of this rank's own node, in RESULTS.

    Take `next_out` of every other node before writing it: then all have taken the last tile that was there.
    Ordering: none.
    """
    return sent(rail, RESULTS, rail.node)


@triton.jit
def close_shared(rail, number):
    """Ends what `next_shared` began, when it has been put. Ordering: a block barrier."""
    _count(rail, RESULTS, rail.node, SENT, number)
