"""LL packets: data and flag in one 8-byte word, so that one hop over the link is the whole protocol.

A packet holds 32 bits of data below 32 bits of flag; the flag is the epoch. The receiver polls the packet
itself: when the flag is this call's, the data beside it is too, because 8 aligned bytes are written at
once. No fence, no signal, no barrier. It costs half the bandwidth, so it is for small messages.
(NCCL's LL protocol.) Types of 8 bytes travel as two packets, in the two halves of a slot.

The data of a call is cut into *words*: int32, or int64 for 8-byte types. LANES elements make a word.
"""

import triton
import triton.language as tl

from tdccl.language.reduce import accumulate, settle, widen
from tdccl.language.signals import heap_at, local_at, may_go_on, record_fault
from tdccl.language.target import threads_of
from tdccl.language.team import DEAD, PACKET_KIND, packet_offset


@triton.jit
def words_in(count, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Number of words that `count` elements make; the last may be partly filled unless WIDE."""
    LANES: tl.constexpr = 1 if DTYPE.primitive_bitwidth >= 32 else 32 // DTYPE.primitive_bitwidth
    if WIDE:
        return count // LANES
    else:
        return (count + LANES - 1) // LANES


@triton.jit
def load_words(pointer, index, count, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Words `index` of the `count` elements at `pointer`; elements past the end read as zero.

    WIDE: `pointer` is aligned to 16 bytes and `count` fills whole words, so words are loaded whole;
    otherwise they are put together from elements, which any alignment and any tail allow.
    Ordering: plain loads.
    """
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    LANES: tl.constexpr = 1 if BITS >= 32 else 32 // BITS
    WORD: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    if WIDE or LANES == 1:
        mask = index < words_in(count, DTYPE, True)
        return tl.load(pointer.to(tl.pointer_type(WORD)) + index, mask=mask, other=0)
    else:
        ELEMENT: tl.constexpr = tl.uint8 if BITS == 8 else tl.uint16
        elements = pointer.to(tl.pointer_type(ELEMENT))
        words = tl.zeros(index.shape, tl.int32)
        for lane in tl.static_range(LANES):
            at = index * LANES + lane
            words |= tl.load(elements + at, mask=at < count, other=0).to(tl.int32) << (lane * BITS)
        return words


@triton.jit
def store_words(pointer, index, words, count, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """The inverse of `load_words`; nothing past `count` elements is written. Ordering: plain stores."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    LANES: tl.constexpr = 1 if BITS >= 32 else 32 // BITS
    WORD: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    if WIDE or LANES == 1:
        tl.store(pointer.to(tl.pointer_type(WORD)) + index, words, mask=index < words_in(count, DTYPE, True))
    else:
        ELEMENT: tl.constexpr = tl.uint8 if BITS == 8 else tl.uint16
        elements = pointer.to(tl.pointer_type(ELEMENT))
        for lane in tl.static_range(LANES):
            at = index * LANES + lane
            tl.store(elements + at, (words >> (lane * BITS)).to(ELEMENT), mask=at < count)


@triton.jit
def _pack(half, epoch):
    return (half.to(tl.int64) & 0xFFFFFFFF) | (epoch << 32)


@triton.jit
def put_words(team, epoch, words, slot_index, mask, pe):
    """Sends `words` to this block's slot on rank `pe`, at places `slot_index`: below team.packets, half of it if int64.

    Ordering: none is needed and none is given; each packet carries its own flag.
    """
    slot = heap_at(team, packet_offset(team, epoch, team.rank), pe, tl.int64)
    tl.store(slot + slot_index, _pack(words, epoch), mask=mask)
    if words.dtype == tl.int64:
        tl.store(slot + team.packets // 2 + slot_index, _pack(words >> 32, epoch), mask=mask)


@triton.jit
def _poll(team, epoch, own, slot_index, mask, SOURCES: tl.constexpr, first):
    """One look at the packets of SOURCES ranks from `first` on, all loads in flight together."""
    packets = ()
    for source in tl.static_range(SOURCES):
        slot = local_at(team, packet_offset(team, epoch, first + source), tl.int64)
        wanted = mask & (first + source != team.rank)
        packets = packets + (tl.load(slot + slot_index, mask=wanted, other=_pack(own, epoch), volatile=True),)
        if own.dtype == tl.int64:
            upper = slot + team.packets // 2 + slot_index
            high = tl.load(upper, mask=wanted, other=_pack(own >> 32, epoch), volatile=True)
            packets = packets + (high,)
    return packets


@triton.jit
def _missing(packets, epoch):
    """Number of packets, over all sources, that do not carry this epoch's flag yet."""
    flag = epoch.to(tl.int32)
    missing = ((packets[0] >> 32).to(tl.int32) != flag).to(tl.int32)
    for i in tl.static_range(1, len(packets)):
        missing = missing | ((packets[i] >> 32).to(tl.int32) != flag).to(tl.int32)
    return tl.max(missing)


@triton.jit
def _receive(team, epoch, own, slot_index, mask, SOURCES: tl.constexpr, first):
    # Of fewer, each warp would have a look of its own, and go on past the barriers of the block when it has seen them.
    tl.static_assert(own.numel >= threads_of(team.backend), "packets: fewer places than the block has threads")
    packets = _poll(team, epoch, own, slot_index, mask, SOURCES, first)
    go = tl.full([], 1, tl.int1)
    polls = 0
    started = tl.full([], 0, tl.int64)
    while (_missing(packets, epoch) != 0) & go:
        polls += 1
        go, started = may_go_on(team, polls, started)
        if go:  # who comes after the deadline was late
            packets = _poll(team, epoch, own, slot_index, mask, SOURCES, first)
    if not go:
        _record_missing(team, epoch, packets, SOURCES, first)
    words = ()
    if own.dtype == tl.int64:
        for source in tl.static_range(SOURCES):
            words = words + ((packets[2 * source] & 0xFFFFFFFF) | (packets[2 * source + 1] << 32),)
    else:
        for source in tl.static_range(SOURCES):
            words = words + (packets[source].to(tl.int32),)
    return words, tl.where(go, epoch, epoch - DEAD)


@triton.jit
def _record_missing(team, epoch, packets, SOURCES: tl.constexpr, first):
    planes: tl.constexpr = len(packets) // SOURCES
    late = tl.full([], -1, tl.int32)
    for i in tl.static_range(len(packets)):
        absent = tl.max(((packets[i] >> 32).to(tl.int32) != epoch.to(tl.int32)).to(tl.int32))
        late = tl.where(absent != 0, first + i // planes, late)
    record_fault(team, late, PACKET_KIND, epoch, epoch, tl.full([], 0, tl.int64))


@triton.jit
def get_words(team, epoch, own, slot_index, mask):
    """Waits for the words of all ranks; returns them, a tuple in rank order with `own` at this rank's place, and the
    epoch to go on with, as `wait_peers`.

    There must be as many places as the block has threads, or more; `mask` leaves out those that hold no packet.
    Ordering: the packets' data only; nothing else that a peer wrote is made visible. Bounded as
    `signal_wait`: after a timeout the words of a late peer are whatever its slot held.
    """
    return _receive(team, epoch, own, slot_index, mask, team.size, 0)


@triton.jit
def exchange_words(team, epoch, source, stride, index, count, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Sends words `index` of the chunk at `source` + p * stride elements to each rank p, a chunk being `count`
    elements; returns as `get_words` what all ranks sent here. Ordering and bound as `put_words` and `get_words`.
    """
    place = tl.arange(0, index.numel)
    mask = index < words_in(count, DTYPE, WIDE)
    for distance in tl.static_range(1, team.size):  # rank + 1 first: no two ranks on one target
        pe = (team.rank + distance) % team.size
        put_words(team, epoch, load_words(source + pe * stride, index, count, DTYPE, WIDE), place, mask, pe)
    own = load_words(source + team.rank * stride, index, count, DTYPE, WIDE)
    return get_words(team, epoch, own, place, mask)


@triton.jit
def get_words_from(team, epoch, own, slot_index, mask, source):
    """Waits for the words of one rank, which may be this one (then `own`); returns them, and the epoch as `get_words`.
    Ordering and bound as `get_words`."""
    words, epoch = _receive(team, epoch, own, slot_index, mask, 1, source)
    return words[0], epoch


@triton.jit
def lane_of(word, LANE: tl.constexpr, DTYPE: tl.constexpr):
    """Element number LANE of each word."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    if BITS == 64 or BITS == 32:
        return word.to(DTYPE, bitcast=True)
    elif BITS == 16:
        return (word >> (LANE * 16)).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return (word >> (LANE * 8)).to(tl.int8).to(DTYPE, bitcast=True)


@triton.jit
def lane_word(value, LANE: tl.constexpr, DTYPE: tl.constexpr):
    """Words that hold `value` as element number LANE, and zeros beside it."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    if BITS == 64:
        return value.to(tl.int64, bitcast=True)
    elif BITS == 32:
        return value.to(tl.int32, bitcast=True)
    elif BITS == 16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << (LANE * 16)
    else:
        return (value.to(tl.int8, bitcast=True).to(tl.int32) & 0xFF) << (LANE * 8)


@triton.jit
def fold_words(words, OP: tl.constexpr, DTYPE: tl.constexpr):
    """Reduces a tuple of the ranks' words, element by element, in rank order; the arithmetic of `fold`."""
    LANES: tl.constexpr = 1 if DTYPE.primitive_bitwidth >= 32 else 32 // DTYPE.primitive_bitwidth
    result = tl.zeros(words[0].shape, words[0].dtype)
    for lane in tl.static_range(LANES):
        total = widen(lane_of(words[0], lane, DTYPE), DTYPE)
        for rank in tl.static_range(1, len(words)):
            total = accumulate(total, widen(lane_of(words[rank], lane, DTYPE), DTYPE), OP)
        result |= lane_word(settle(total, OP, len(words), DTYPE), lane, DTYPE)
    return result
