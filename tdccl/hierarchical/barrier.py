"""barrier across nodes: no rank's stream goes on before every rank's stream has come here."""

import triton
import triton.language as tl

import tdccl.language as shmem
import tdccl.language.rails as rails
from tdccl.runtime.algorithm import Algorithm, Geometry

_SIGNAL_BYTES = tl.constexpr(16)


@triton.jit
def dissemination(team, rail):
    """After a barrier inside, every rank tells its likes 1, 2, 4, ... nodes further what it knows by then.

    Waits:    for block 0 of every peer inside; then log2(nodes) times for one like.
    Ordering: release and acquire at sys scope inside, puts with signals across: what came before the barrier is visible
              after it.
    """
    epoch = shmem.begin(team)
    epoch = shmem.barrier_block(team, epoch, 1)
    distance = 1
    while distance < rail.nodes:
        after, before = (rail.node + distance) % rail.nodes, (rail.node + rail.nodes - distance) % rail.nodes
        epoch, number, slot = rails.next_out(team, rail, rails.INPUTS, after, epoch, tl.int8)
        rails.put_tile(team, rail, rails.INPUTS, after, number, slot, _SIGNAL_BYTES)
        epoch, number = rails.next_in(team, rail, rails.INPUTS, before, epoch)
        rails.took(team, rail, rails.INPUTS, before, number)
        distance *= 2
    shmem.end(team, epoch)


def _one_block(call, context):
    return Geometry(dtype="i8", grid=1, warps=1, aligned=False, counts={}, constants={})


ALGORITHMS = [Algorithm("dissemination", dissemination, _one_block, sent=lambda n: 0)]
