"""barrier across nodes: no rank's stream goes on before every rank's stream has come here."""

import triton

import tdccl.language as shmem
import tdccl.language.rails as rails
from tdccl.runtime.algorithm import Algorithm, Geometry


@triton.jit
def dissemination(team, rail):
    """A barrier inside, then one among the likes of all nodes.

    Waits:    for block 0 of every peer inside; then log2(nodes) times for one like.
    Ordering: release and acquire at sys scope inside, puts with signals across: what came before the barrier is visible
              after it.
    """
    epoch = shmem.begin(team)
    epoch = shmem.barrier_block(team, epoch, 1)
    epoch = rails.barrier(team, rail, epoch)
    shmem.end(team, epoch)


def _one_block(call, context):
    return Geometry(dtype="i8", grid=1, warps=1, aligned=False, counts={}, constants={})


ALGORITHMS = [Algorithm("dissemination", dissemination, _one_block, sent=lambda n: 0)]
