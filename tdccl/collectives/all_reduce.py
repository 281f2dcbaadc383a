"""all_reduce: every rank ends with the reduction of all ranks' messages, the same bits on all.

one_shot_ll   every rank sends its whole message to all and reduces all   small messages
two_shot      every rank reduces its part and sends the result to all:
  _ll         by packets both times                                       middle sizes
  _pull       straight from and to the peers' symmetric buffers           bandwidth, symmetric memory
  _push       inputs through rings, results straight to symmetric buffers bandwidth, symmetric memory
  _staged     tiles through rings in scratch, pipelined                   bandwidth, any memory
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.runtime.algorithm import (
    Algorithm,
    copying,
    one_shot,
    packets_in,
    tiles_in,
    two_shot,
)

# See `two_shot_staged`: how many slots make it safe to reuse one without asking.
DEPTH = tl.constexpr(3)
# See `two_shot_push`.
INPUT_DEPTH = tl.constexpr(4)


@triton.jit
def _one_shot(
    team, epoch, send, recv, index, count, written,
    OP: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All-reduces the words `index` of `count` elements by packets, of which `written` elements are stored; returns the
    epoch to go on with."""
    place = tl.arange(0, index.numel)
    mask = index < shmem.words_in(count, DTYPE, WIDE)
    own = shmem.load_words(send, index, count, DTYPE, WIDE)
    for distance in tl.static_range(1, team.size):
        shmem.put_words(team, epoch, own, place, mask, (team.rank + distance) % team.size)
    words, epoch = shmem.get_words(team, epoch, own, place, mask)
    shmem.store_words(recv, index, shmem.fold_words(words, OP, DTYPE), written, DTYPE, WIDE)
    return epoch


@triton.jit
def one_shot_ll(team, send, recv, count, DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Block b sends the b-th TILE words of its message to all as packets, and reduces what all sent it.

    Waits:    block b for block b of every peer, once.
    Ordering: none needed, the flag travels in the word. Own data never leaves the registers.
    Reuse:    packet slots alternate by the parity of the epoch; each rank hears from all in each call.
    """
    epoch = shmem.begin(team)
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    epoch = _one_shot(team, epoch, send, recv, index, count, count, OP, DTYPE, WIDE)
    shmem.end(team, epoch)


@triton.jit
def two_shot_ll(team, send, recv, count, DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Block b sends the b-th TILE words of each part to the part's rank, reduces those of its own part and sends
    the result to all.

    Waits:    block b for block b of every peer, twice: for their inputs, for their results.
    Ordering: none needed, the flag travels in the word.
    Reuse:    inputs and results have packet slots of their own, which alternate by the parity of the epoch. Results
              go out in full, also where a part lies past the end, so each rank hears from all in each call.
    """
    epoch = shmem.begin(team)
    place = tl.arange(0, TILE)
    words = shmem.words_in(count, DTYPE, WIDE)
    for distance in tl.static_range(1, team.size):
        pe = (team.rank + distance) % team.size
        index = _of_part(pe, place, TILE)
        shmem.put_words(team, epoch, shmem.load_words(send, index, count, DTYPE, WIDE), place, index < words, pe)
    index = _of_part(team.rank, place, TILE)
    own = shmem.load_words(send, index, count, DTYPE, WIDE)
    inputs, epoch = shmem.get_words(team, epoch, own, place, index < words)
    result = shmem.fold_words(inputs, OP, DTYPE)
    place += TILE
    everywhere = place >= 0
    for distance in tl.static_range(1, team.size):
        shmem.put_words(team, epoch, result, place, everywhere, (team.rank + distance) % team.size)
    results, epoch = shmem.get_words(team, epoch, result, place, everywhere)
    for source in tl.static_range(team.size):
        index = _of_part(source, tl.arange(0, TILE), TILE)
        shmem.store_words(recv, index, results[source], count, DTYPE, WIDE)
    shmem.end(team, epoch)


@triton.jit
def _of_part(part, place, TILE: tl.constexpr):
    """Index of the words at `place` of this block's tile of a part; parts are as long as all blocks' tiles."""
    return (part * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * TILE + place


@triton.jit
def _reduce_tail(
    team, epoch, send, recv, count, tail, root, OP: tl.constexpr, DTYPE: tl.constexpr, ROOTED: tl.constexpr
):
    """Block 0 all-reduces the last `tail` elements, fewer than fill 16 bytes, by packets."""
    if tl.program_id(0) == 0:
        THREADS: tl.constexpr = shmem.threads_of(team.backend)
        index = tl.arange(0, THREADS if THREADS > 16 else 16).to(tl.int64)  # for the sake of `get_words`
        written = tl.where(team.rank == root, tail, 0) if ROOTED else tail
        _one_shot(team, epoch, send + count, recv + count, index, tail, written, OP, DTYPE, False)


@triton.jit
def two_shot_pull(
    team, send, recv, count, part, tail, signature,
    DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rank r loads part r from all ranks, reduces it, and stores the result into all ranks' buffers.

    Waits:    block b for block b of every peer, on entry and at the end.
    Ordering: the entry barrier makes the peers' input visible, the closing one their results.
    Reuse:    part r of any buffer is read and written by rank r alone, so send may be recv.
    """
    opened = shmem.begin(team)
    call = shmem.of_call(shmem.of_call(signature, send), recv)
    epoch = shmem.barrier_entry(team, opened, call)
    steps = tl.where(epoch == opened, shmem.steps_of(part, TILE), 0)
    for step in range(steps):
        within = shmem.span_start(step, TILE) + tl.arange(0, TILE)
        index = team.rank * part + within
        mask = (within < part) & (index < count)
        values = ()
        for source in tl.static_range(team.size):
            values = values + (tl.load(shmem.symm_at(send, source, DTYPE, ALIGN) + index, mask=mask, other=0),)
        result = shmem.fold(values, OP, DTYPE)
        for distance in tl.static_range(1, team.size + 1):
            pe = (team.rank + distance) % team.size
            tl.store(shmem.symm_at(recv, pe, DTYPE, ALIGN) + index, result, mask=mask)
    if TAIL:
        own_send = shmem.symm_at(send, team.rank, DTYPE, ALIGN)
        own_recv = shmem.symm_at(recv, team.rank, DTYPE, ALIGN)
        _reduce_tail(team, epoch, own_send, own_recv, count, tail, 0, OP, DTYPE, False)
    epoch = shmem.barrier_exit(team, epoch, call)
    shmem.end(team, epoch)


@triton.jit
def _push_span(
    team, epoch, send, part, count, step,
    DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Stores the span of this step of every part into a ring slot of the part's rank. Ordering: none; signal it."""
    span: tl.constexpr = TILE * TILES
    for tile in range(TILES):
        inside = tile * TILE + tl.arange(0, TILE)
        within = shmem.span_start(step, span) + inside
        tiles = ()
        for distance in tl.static_range(1, team.size):  # all loads are under way before a store
            index = (team.rank + distance) % team.size * part + within
            tiles = tiles + (tl.load(send + index, mask=(within < part) & (index < count)),)
        for distance in tl.static_range(1, team.size):
            pe = (team.rank + distance) % team.size
            mask = (within < part) & (pe * part + within < count)
            slot = shmem.remote_slot(team, epoch, distance - 1, step, pe, DTYPE, span, DEPTH, WHOLE)
            tl.store(slot + inside, tiles[distance - 1], mask=mask)


@triton.jit
def two_shot_push(
    team, send, recv, count, part, tail, signature,
    DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, TAIL: tl.constexpr,
    TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """At step s a block pushes span s of every part to the part's rank, reduces span s - 1 of its own part, and stores
    the result into all ranks' buffers. Stores over a link are faster than loads.

    Waits:    block b for block b of every peer, on entry, once a step for their inputs, and at the end.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    slots as `exchange.through_rings`, INPUT_DEPTH of them between barriers. A result is written only after
              every rank has sent its input for that place, so send may be recv.
    """
    opened = shmem.begin(team)
    call = shmem.of_call(signature, recv)
    epoch = shmem.barrier_entry(team, opened, call)
    span: tl.constexpr = TILE * TILES
    place = tl.arange(0, TILE)
    steps = tl.where(epoch == opened, shmem.steps_of(part, span), 0)
    for step in range(steps + 1):
        if step < steps:
            _push_span(team, epoch, send, part, count, step, DTYPE, TILE, TILES, INPUT_DEPTH, WHOLE)
            shmem.signal_all(team, epoch, shmem.DATA, step + 1)
        if step >= 1:
            epoch = shmem.wait_all(team, epoch, shmem.DATA, step)
            for tile in range(TILES):
                start = shmem.span_start(step - 1, span) + tile * TILE
                index = team.rank * part + start + place
                mask = (start + place < part) & (index < count) & (epoch == opened)
                own = send + team.rank * part + start
                values = shmem.load_ranks(
                    team, epoch, own, step - 1, tile * TILE, mask, DTYPE, TILE, span, INPUT_DEPTH, WHOLE, ALIGN
                )
                result = shmem.fold(values, OP, DTYPE)
                for distance in tl.static_range(1, team.size + 1):
                    pe = (team.rank + distance) % team.size
                    tl.store(shmem.symm_at(recv, pe, DTYPE, ALIGN) + index, result, mask=mask)
    if TAIL:
        own_recv = shmem.symm_at(recv, team.rank, DTYPE, ALIGN)
        _reduce_tail(team, epoch, send, own_recv, count, tail, 0, OP, DTYPE, False)
    epoch = shmem.barrier_exit(team, epoch, call)
    shmem.end(team, epoch)


@triton.jit
def two_shot_staged(
    team, send, recv, count, part, tail, root,
    DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, TAIL: tl.constexpr,
    TILES: tl.constexpr, WHOLE: tl.constexpr, ROOTED: tl.constexpr,
):  # fmt: skip
    """At step s a block pushes span s of every part to the part's rank, reduces span s - 1 of its own part
    and pushes the result to all, and writes out span s - 2 of the others' results.

    ROOTED: the results go to the root alone, the signals to all as ever; then it is a reduce.

    Waits:    block b for block b of every peer, twice a step: for their inputs, for their results.
    Ordering: stores, block barrier, release at sys scope; acquire at sys scope, block barrier, loads.
    Reuse:    a slot returns after DEPTH = 3 steps. Inputs: when a block starts step s it has seen its peer's
              result s - 3, so the peer has read input s - 3. Results: when it sends result s - 1 it has
              seen the peer's input s - 1, so the peer is past its step s - 2 and has written out s - 4.
              Between calls the ring alternates by the parity of the epoch, or is WHOLE between barriers.
    """
    epoch = shmem.begin(team)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 1)
    span: tl.constexpr = TILE * TILES
    results: tl.constexpr = team.size - 1  # the first of the rings for results
    place = tl.arange(0, TILE)
    steps = shmem.steps_of(part, span)
    for step in range(steps + 2):
        if step < steps:
            _push_span(team, epoch, send, part, count, step, DTYPE, TILE, TILES, DEPTH, WHOLE)
            shmem.signal_all(team, epoch, shmem.DATA, step + 1)
        if (step >= 1) & (step <= steps):
            epoch = shmem.wait_all(team, epoch, shmem.DATA, step)
            for tile in range(TILES):
                start = shmem.span_start(step - 1, span) + tile * TILE
                index = team.rank * part + start + place
                mask = (start + place < part) & (index < count)
                own = send + team.rank * part + start
                values = shmem.load_ranks(
                    team, epoch, own, step - 1, tile * TILE, mask, DTYPE, TILE, span, DEPTH, WHOLE, ALIGN
                )
                result = shmem.fold(values, OP, DTYPE)
                for distance in tl.static_range(1, team.size):
                    pe = (team.rank + distance) % team.size
                    ring = results + distance - 1
                    slot = shmem.remote_slot(team, epoch, ring, step - 1, pe, DTYPE, span, DEPTH, WHOLE)
                    tl.store(slot + tile * TILE + place, result, mask=mask & (pe == root) if ROOTED else mask)
                tl.store(recv + index, result, mask=mask & (team.rank == root) if ROOTED else mask)
            shmem.signal_all(team, epoch, shmem.RESULT, step)
        if step >= 2:
            epoch = shmem.wait_all(team, epoch, shmem.RESULT, step - 1)
            for tile in range(TILES):
                inside = tile * TILE + place
                within = shmem.span_start(step - 2, span) + inside
                here = within < part
                if ROOTED:
                    here = here & (team.rank == root)
                tiles = ()
                for distance in tl.static_range(1, team.size):
                    index = (team.rank + team.size - distance) % team.size * part + within
                    ring = results + distance - 1
                    slot = shmem.local_slot(team, epoch, ring, step - 2, DTYPE, span, DEPTH, WHOLE)
                    tiles = tiles + (tl.load(slot + inside, mask=here & (index < count)),)
                for distance in tl.static_range(1, team.size):
                    index = (team.rank + team.size - distance) % team.size * part + within
                    tl.store(recv + index, tiles[distance - 1], mask=here & (index < count))
    if TAIL:
        _reduce_tail(team, epoch, send, recv, count, tail, root, OP, DTYPE, ROOTED)
    if WHOLE:
        epoch = shmem.barrier_block(team, epoch, 2)
    shmem.end(team, epoch)


def _bulk_and_tail(call):
    """The call without its ragged end, and the elements (fewer than fill 16 bytes) of that end."""
    tail = call.count % (16 // call.itemsize)  # whatever this rank's alignment: all must cut alike
    return call._replace(count=call.count - tail), tail


def _part_bytes(call, context):
    """Bytes of one rank's part of the message, a multiple of 16."""
    return -(-call.nbytes // (16 * context.size)) * 16


def _sent_in_two_shots(n):
    return 2 * (n - 1) / n


def _two_shot_ll(call, context):
    return packets_in(call, context, shots=2)


def _two_shot_pull(call, context):
    bulk, tail = _bulk_and_tail(call)
    geometry = copying(bulk, context, part_bytes=_part_bytes(bulk, context))
    return geometry.adding(scalars={"tail": tail}, constants={"TAIL": tail > 0})


def _two_shot_push(call, context):
    bulk, tail = _bulk_and_tail(call)
    part_bytes = _part_bytes(bulk, context)
    geometry = tiles_in(bulk, context, context.size - 1, INPUT_DEPTH.value, part_bytes, always_whole=True)
    return geometry.adding(scalars={"tail": tail}, constants={"TAIL": tail > 0})


def staged(call, context):
    """The layout of `two_shot_staged`; the caller adds the root."""
    bulk, tail = _bulk_and_tail(call)
    rings = 2 * (context.size - 1)
    geometry = tiles_in(bulk, context, rings, DEPTH.value, part_bytes=_part_bytes(bulk, context))
    return geometry.adding(scalars={"tail": tail}, constants={"TAIL": tail > 0})


def _two_shot_staged(call, context):
    return staged(call, context).adding(scalars={"root": 0}, constants={"ROOTED": False})


ALGORITHMS = [
    Algorithm("one_shot_ll", one_shot_ll, packets_in, sent=lambda n: 2 * (n - 1), packets=one_shot),
    Algorithm("two_shot_ll", two_shot_ll, _two_shot_ll, sent=lambda n: 4 * (n - 1) / n, packets=two_shot),
    Algorithm("two_shot_pull", two_shot_pull, _two_shot_pull, sent=_sent_in_two_shots, symmetric=("send", "recv")),
    Algorithm("two_shot_push", two_shot_push, _two_shot_push, sent=_sent_in_two_shots, symmetric=("recv",)),
    Algorithm("two_shot_staged", two_shot_staged, _two_shot_staged, sent=_sent_in_two_shots),
]
