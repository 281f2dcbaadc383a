"""Device functions for communicating Triton kernels: import this before you define yours.

    import tdccl.language as shmem

The *shmem* layer is here: teams and epochs, symmetric addresses, signals and bounded waits, LL packets,
ring slots, ordered reductions, multimem. Each function states its memory ordering.
"""

from tdccl.language.channels import (
    ARRIVED,
    RECEIVED,
    SENT,
    TAKEN,
    channel_counts,
    channel_slot,
    channel_slot_at,
    count_for_peers,
    wait_counts,
)
from tdccl.language.multimem import (
    multimem_barrier,
    multimem_fence,
    multimem_ld_reduce,
    multimem_red,
    multimem_st,
    quads_in,
    stage,
    unstage,
    words_of,
)
from tdccl.language.packets import (
    exchange_words,
    fold_words,
    get_words,
    get_words_from,
    lane_of,
    lane_word,
    load_words,
    put_words,
    store_words,
    words_in,
)
from tdccl.language.reduce import accumulate, fold, settle, widen
from tdccl.language.signals import (
    barrier_all,
    barrier_block,
    barrier_entry,
    barrier_exit,
    fence,
    heap_at,
    local_at,
    may_go_on,
    may_signal,
    of_call,
    record_fault,
    signal_all,
    signal_op,
    signal_peers,
    signal_wait,
    symm_at,
    wait_all,
    wait_counters,
    wait_peers,
    wait_word,
)
from tdccl.language.target import clock, threads_of
from tdccl.language.team import (
    BARRIER,
    CHANNEL_DEPTH,
    DATA,
    MAX_RANKS,
    RESULT,
    USER,
    Symmetric,
    Team,
    begin,
    end,
    following,
    resume,
)
from tdccl.language.tiles import load_ranks, local_slot, pick, remote_slot, slot_offset, span_start, steps_of

__all__ = [name for name in dir() if not name.startswith("_")]
