"""barrier by the switch: one addition that reaches every rank."""

import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.nvls import layout
from tdccl.runtime.algorithm import Algorithm, Geometry


@triton.jit
def barrier(team, MULTIMEM: tl.constexpr):
    """One block adds to every rank's word at once, and waits for all ranks' additions to its own.

    Waits:    for block 0 of every peer, once.
    Ordering: release and acquire at sys scope: what came before the barrier is visible after it.
    """
    epoch = shmem.begin(team)
    epoch = shmem.multimem_barrier(team, epoch, MULTIMEM)
    shmem.end(team, epoch)


def _one_block(call, context):
    constants = {"MULTIMEM": context.multicast.kind}
    return Geometry(dtype="i8", grid=1, warps=1, aligned=False, counts={}, constants=constants)


ALGORITHMS = [Algorithm("nvls_red", barrier, _one_block, sent=lambda n: 0, multimem=layout.any_call)]
