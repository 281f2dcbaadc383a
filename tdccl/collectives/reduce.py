"""reduce: the root ends with the reduction of all ranks' messages; the bits are those of all_reduce.

push_ll          one hop, flags inside the data                                       small messages
two_shot_staged  all_reduce's, whose results go to the root alone                     bandwidth
"""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.collectives import all_reduce
from tdccl.runtime.algorithm import Algorithm, one_shot, packets_in


@triton.jit
def push_ll(
    team, send, recv, count, root, DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr
):
    """Block b sends the b-th TILE words of its message to the root as packets; the root reduces what all sent it.

    Waits:    block b of the root for block b of every peer; block b of every rank for a signal of all.
    Ordering: none needed for the data, the flag travels in the word.
    Reuse:    packet slots alternate by the parity of the epoch, which is only safe if each rank hears from
              all in each call: hence the BARRIER signals, sent first and awaited last, beside the data.
    """
    epoch = shmem.begin(team)
    shmem.signal_all(team, epoch, shmem.BARRIER, 1, "relaxed")
    place = tl.arange(0, TILE)
    index = tl.program_id(0).to(tl.int64) * TILE + place
    mask = index < shmem.words_in(count, DTYPE, WIDE)
    own = shmem.load_words(send, index, count, DTYPE, WIDE)
    if team.rank == root:
        words, epoch = shmem.get_words(team, epoch, own, place, mask)
        shmem.store_words(recv, index, shmem.fold_words(words, OP, DTYPE), count, DTYPE, WIDE)
    else:
        shmem.put_words(team, epoch, own, place, mask, root)
    epoch = shmem.wait_all(team, epoch, shmem.BARRIER, 1)
    shmem.end(team, epoch)


def _push_ll(call, context):
    return packets_in(call, context).adding(scalars={"root": call.root})


def _two_shot_staged(call, context):
    return all_reduce.staged(call, context).adding(scalars={"root": call.root}, constants={"ROOTED": True})


ALGORITHMS = [
    Algorithm("push_ll", push_ll, _push_ll, sent=lambda n: 2, packets=one_shot),
    Algorithm("two_shot_staged", all_reduce.two_shot_staged, _two_shot_staged, sent=lambda n: 1),
]
