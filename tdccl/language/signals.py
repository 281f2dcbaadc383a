"""The shmem layer: peers' addresses, signals, bounded waits, barriers.

A signal is an int64 of symmetric memory. Those of the team carry (epoch << 32) + step: they only ever
grow, are never reset, and are compared wrap-safe by the sign of the difference.
"""

import triton
import triton.language as tl

from tdccl.language.target import POLLS_A_CHECK, POLLS_A_LOOK_AT_HOST, clock_of, pause
from tdccl.language.team import (
    BARRIER,
    DEAD,
    FIRST_WORD,
    MAX_RANKS,
    STOP_BYTE,
    TIMED_OUT_CODE,
    USER,
    begin,
    end,
    signal_offset,
)

# Defaults of device functions must be constexpr already.
RELEASE, SET, GE, CALL = map(tl.constexpr, ("release", "set", "ge", "call"))

# Below it in a signal of `barrier_entry` stands what is called, above it the step.
ONE_STEP = tl.constexpr(1 << 30)

# What nobody is ahead by: 256 epochs. A word that is, was last set most of 2**32 epochs ago, by staged kernels, say, or
# the epoch is past since a wait failed.
_TOO_FAR = tl.constexpr(DEAD.value // 2 << 32)


@triton.jit
def symm_at(symmetric, pe, DTYPE: tl.constexpr, ALIGN: tl.constexpr = 16):
    """Pointer to rank `pe`'s copy of a symmetric buffer. ALIGN bytes are promised to the compiler.

    Ordering: none; it computes an address. OpenSHMEM: `shmem_ptr`.
    """
    address = tl.load(symmetric.bases + pe) + symmetric.offset
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def heap_at(team, offset, pe, DTYPE: tl.constexpr):
    """Pointer to byte `offset` (a multiple of 16) of rank `pe`'s heap. Ordering: none."""
    address = tl.load(team.heap + pe) + offset
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def local_at(team, offset, DTYPE: tl.constexpr):
    """Pointer to byte `offset` (a multiple of 16) of this rank's own heap. Ordering: none."""
    return tl.multiple_of((team.local + offset).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def fence():
    """Orders this block's earlier accesses before the release signals it sends next.

    Triton emits no block barrier before a release atomic, so a signal alone would only order the
    accesses of the one thread that sends it. OpenSHMEM: `shmem_fence`.
    """
    tl.debug_barrier()


@triton.jit
def signal_op(pointer, value, OP: tl.constexpr = SET, SEM: tl.constexpr = RELEASE):
    """Sets the int64 signal at `pointer` (local or a peer's) to `value`, or adds `value` to it (OP="add").

    Ordering: release at sys scope for the calling thread; call `fence` before it to cover the block.
    With SEM="relaxed" it orders nothing. OpenSHMEM: `shmemx_signal_op`.
    """
    if OP == "set":
        tl.atomic_xchg(pointer, value, sem=SEM, scope="sys")
    else:
        tl.static_assert(OP == "add", "signal_op: OP is set or add")
        tl.atomic_add(pointer, value, sem=SEM, scope="sys")


@triton.jit
def _holds(seen, value, CMP: tl.constexpr):
    difference = seen - value
    if CMP == "ge":
        return difference >= 0
    elif CMP == "eq":
        return difference == 0
    elif CMP == "ne":
        return difference != 0
    else:
        tl.static_assert(CMP == "gt", "signal_wait: CMP is ge, gt, eq or ne")
        return difference > 0


@triton.jit
def look(pointer):
    """The integer at `pointer`, read by one thread for the whole block, so that the block decides as one.

    Ordering: relaxed at sys scope. (Triton makes a load of an atomic addition of zero.)
    """
    return tl.atomic_add(pointer, 0, sem="relaxed", scope="sys")


@triton.jit
def _stop_word(team):
    """0, or 1 + the block whose deadline passed first, or more than any block if the host aborted."""
    return (team.local + STOP_BYTE).to(tl.pointer_type(tl.int64))


@triton.jit
def may_go_on(team, polls, started):
    """Whether a wait that began at `started` ns may poll again: no abort was asked for, no deadline passed.

    Returns (go on, started): `started` is 0 on the first call and is filled in here, so that a wait
    that is satisfied at once reads no clock. One failed wait sets the stop word of its rank, which ends all
    others there. The answer is the same for all threads of the block. Ordering: none.
    """
    return may_poll(team, team.backend, polls, started)


@triton.jit
def may_poll(team, BACKEND: tl.constexpr, polls, started):
    """`may_go_on`, where `team` need have no more than local, control and timeout."""
    go = tl.full([], 1, tl.int1)  # not a question of `polls`, which overflows within minutes
    pause(polls)
    if polls % POLLS_A_CHECK == 0:
        now = clock_of(BACKEND)
        started = tl.where(started == 0, now, started)
        stop = tl.where(now - started >= team.timeout, tl.program_id(0) + 1, 0).to(tl.int64)
        if polls % POLLS_A_LOOK_AT_HOST == 0:
            stop = tl.where(look(team.control) != 0, 1 << 32, stop)
        tl.atomic_cas(_stop_word(team), tl.full([], 0, tl.int64), stop, sem="relaxed", scope="gpu")
        go = look(_stop_word(team)) == 0  # one thread's clock decides for the block, by what it has left there
    return go, started


@triton.jit
def may_signal(team):
    """Whether no wait of this rank has failed: what it would tell its peers after one is no result. Ordering: none."""
    return look(_stop_word(team)) == 0


@triton.jit
def record_fault(team, peer, kind, epoch, expected, seen):
    """After a wait that may not go on: notes in the control block who waited for whom.

    Only the block whose own deadline passed first notes something, once; all other waits end because of that one, or
    because of an abort. Ordering: the record is released at sys scope by the abort word, which the host reads first.
    """
    if (look(_stop_word(team)) == tl.program_id(0) + 1) & (look(team.control) == 0):
        first = tl.load(team.control + FIRST_WORD)
        tl.store(team.control + 1, tl.program_id(0).to(tl.int64))
        tl.store(team.control + 2, first + peer)
        tl.store(team.control + 3, tl.full([], kind, tl.int64))
        tl.store(team.control + 4, epoch)
        tl.store(team.control + 5, expected)
        tl.store(team.control + 6, seen)
        tl.store(team.control + 7, tl.full([], 0, tl.int64) + team.timeout)
        tl.debug_barrier()
        word = TIMED_OUT_CODE + ((first + team.rank) << 8)
        tl.atomic_xchg(team.control, word, sem="release", scope="sys")


@triton.jit
def signal_wait(team, pointer, value, peer, CMP: tl.constexpr = GE):
    """Waits until the int64 signal at `pointer` compares with `value`; returns the value seen.

    CMP is ge (wrap-safe), gt, eq or ne; `peer` is the rank to name if it never comes.
    Ordering: acquire at sys scope, then a block barrier: the whole block sees what the signaller
    released. Bounded: ends after the team's timeout, or on abort, with the fault recorded.
    OpenSHMEM: `shmem_signal_wait_until`.
    """
    zero = tl.full([], 0, tl.int64)
    seen, _ = wait_word(team, pointer, value, zero + peer, USER, zero, CMP)
    return seen


@triton.jit
def wait_word(team, pointer, value, peer, KIND: tl.constexpr, epoch, CMP: tl.constexpr = GE):
    """`signal_wait`, which records KIND and epoch with a fault; returns (the value seen, whether the wait succeeded).

    Ordering: as `signal_wait`.
    """
    seen = look(pointer)
    go = tl.full([], 1, tl.int1)
    polls = 0
    started = tl.full([], 0, tl.int64)
    while (not _holds(seen, value, CMP)) & go:
        polls += 1
        go, started = may_go_on(team, polls, started)
        if go:
            seen = look(pointer)
    tl.atomic_add(pointer, 0, sem="acquire", scope="sys")  # the looks order nothing; this one read acquires
    if not go:
        record_fault(team, peer, KIND, epoch, tl.full([], 0, tl.int64) + value, seen)
    tl.debug_barrier()
    return seen, go


@triton.jit
def _peers(team):
    """All rank numbers as one small tensor, and the mask of those that exist and are not this rank."""
    ranks = tl.arange(0, MAX_RANKS)
    return ranks, (ranks < team.size) & (ranks != team.rank)


@triton.jit
def signal_peers(team, epoch, KIND: tl.constexpr, step, wanted, SEM: tl.constexpr = RELEASE):
    """Tells this block of every peer in the mask `wanted` ([MAX_RANKS]) that this rank has reached `step`.

    Ordering: block barrier, then release at sys scope: what the block did before is visible to
    whoever sees the signal. The signals to all peers leave in parallel, under one fence.
    """
    fence()
    ranks, peers = _peers(team)
    wanted = wanted & peers
    addresses = tl.load(team.heap + ranks, mask=wanted, other=0) + signal_offset(team, KIND, team.rank)
    value = tl.full([MAX_RANKS], 0, tl.int64) + ((epoch << 32) + step)
    tl.atomic_xchg(addresses.to(tl.pointer_type(tl.int64)), value, mask=wanted, sem=SEM, scope="sys")


@triton.jit
def signal_all(team, epoch, KIND: tl.constexpr, step, SEM: tl.constexpr = RELEASE):
    """`signal_peers` to every peer."""
    signal_peers(team, epoch, KIND, step, tl.arange(0, MAX_RANKS) >= 0, SEM)


@triton.jit
def _late_rank(seen, targets, wanted, CMP: tl.constexpr):
    """The last of the ranks in the mask `wanted` that have not come, or -1."""
    behind = seen - targets
    if CMP == "call":
        missing = (behind != 0) & (behind != ONE_STEP)
    else:
        tl.static_assert(CMP == "ge", "wait_counters: CMP is ge or call")
        missing = (behind < 0) | (behind >= _TOO_FAR)
    return tl.max(tl.where(wanted & missing, tl.arange(0, MAX_RANKS), -1))


@triton.jit
def wait_counters(team, pointers, targets, wanted, KIND: tl.constexpr, epoch, CMP: tl.constexpr = GE):
    """Waits until the int64 counter that each rank in the mask `wanted` advances has reached its target, wrap-safe.

    pointers, targets, wanted: [MAX_RANKS], counter and target of rank r at place r. One thread a counter polls, all at
    once; the additions of zero give every thread the same values. Returns whether the wait succeeded.
    CMP is ge (wrap-safe, however long ago the counter was advanced), or call: the target itself, or one step of
    `barrier_entry` further.
    Ordering: acquire at sys scope, then a block barrier: the block sees what those ranks released.
    Bounded as `signal_wait`; a fault is recorded with KIND and epoch.
    """
    ranks = tl.arange(0, MAX_RANKS)
    zero = tl.full([MAX_RANKS], 0, tl.int64)
    seen = tl.atomic_add(pointers, zero, mask=wanted, sem="acquire", scope="sys")
    late = _late_rank(seen, targets, wanted, CMP)
    go = tl.full([], 1, tl.int1)
    polls = 0
    started = tl.full([], 0, tl.int64)
    while (late >= 0) & go:
        polls += 1
        go, started = may_go_on(team, polls, started)
        if go:  # who comes after the deadline was late
            seen = tl.atomic_add(pointers, zero, mask=wanted, sem="acquire", scope="sys")
            late = _late_rank(seen, targets, wanted, CMP)
    if not go:
        expected, found = tl.where(ranks == late, targets, 0), tl.where(ranks == late, seen, 0)
        record_fault(team, late, KIND, epoch, tl.sum(expected), tl.sum(found))
    tl.debug_barrier()
    return go


@triton.jit
def wait_peers(team, epoch, KIND: tl.constexpr, step, wanted, CMP: tl.constexpr = GE):
    """Waits until this block of every peer in the mask `wanted` ([MAX_RANKS]) has signalled `step` of `epoch`.

    Returns the epoch to go on with: the same, or after a failed wait one that is past, so that nothing this
    block signals from then on can pass for this call's: its peers fail too instead of taking garbage.
    Ordering: acquire at sys scope, then a block barrier: the block sees what those peers released.
    Bounded as `signal_wait`.
    """
    ranks, peers = _peers(team)
    target = tl.full([MAX_RANKS], 0, tl.int64) + ((epoch << 32) + step)
    mine = (team.local + signal_offset(team, KIND, ranks)).to(tl.pointer_type(tl.int64))
    go = wait_counters(team, mine, target, wanted & peers, KIND, epoch, CMP)
    return tl.where(go, epoch, epoch - DEAD)


@triton.jit
def wait_all(team, epoch, KIND: tl.constexpr, step):
    """`wait_peers` for every peer; returns the epoch to go on with."""
    return wait_peers(team, epoch, KIND, step, tl.arange(0, MAX_RANKS) >= 0)


@triton.jit
def barrier_block(team, epoch, step):
    """No block b leaves before block b of every peer has come; `step` counts the barriers of this call from 1.

    Returns the epoch to go on with, as `wait_peers`.
    Ordering: what any of these blocks did before the barrier is visible to all of them after it.
    """
    signal_all(team, epoch, BARRIER, step)
    return wait_all(team, epoch, BARRIER, step)


@triton.jit
def of_call(signature, symmetric):
    """What `barrier_entry` compares: the signature (30 bits), mixed with where a symmetric buffer of the call lies.

    Ordering: none; it computes a number.
    """
    mixed = (signature + symmetric.offset) * 0x9E3779B1
    return (mixed ^ (mixed >> 32)) & (ONE_STEP - 1)


@triton.jit
def barrier_entry(team, epoch, call):
    """`barrier_block` on entry to a kernel that reaches into its peers' buffers, which it closes by `barrier_exit`.

    A peer that has come with another `call` (see `of_call`) has not come: its buffers are smaller, or elsewhere, or in
    use. Returns the epoch to go on with, as `wait_peers`: where it is another one, nothing of a peer may be touched.
    Ordering: as `barrier_block`.
    """
    signal_all(team, epoch, BARRIER, call + ONE_STEP)
    return wait_peers(team, epoch, BARRIER, call + ONE_STEP, tl.arange(0, MAX_RANKS) >= 0, CALL)


@triton.jit
def barrier_exit(team, epoch, call):
    """`barrier_block` at the end of a kernel that began with `barrier_entry`. Ordering: as `barrier_block`."""
    return barrier_block(team, epoch, call + 2 * ONE_STEP)


@triton.jit
def barrier_all(team):
    """A barrier over all ranks as a call of its own, for kernels of users. OpenSHMEM: `shmem_barrier_all`.

    Ordering: as `barrier_block`. Every rank must launch the same grid.
    """
    epoch = begin(team)
    epoch = barrier_block(team, epoch, 1)
    end(team, epoch)
