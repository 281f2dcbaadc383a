"""Collectives across nodes, one file each: kernels that go on inside a node by address and across nodes by NVSHMEM.

The names of the collectives, and the tables of algorithms, are as in `tdccl.collectives`; these are for communicators
whose ranks are on several nodes.
"""

from tdccl.hierarchical import all_gather, all_reduce, all_to_all, barrier, broadcast, pairs, reduce_scatter

ALGORITHMS = {
    "all_reduce": all_reduce.ALGORITHMS,
    "all_gather": [*pairs.ALL_GATHER, *all_gather.ALGORITHMS],
    "reduce_scatter": reduce_scatter.ALGORITHMS,
    "broadcast": broadcast.ALGORITHMS,
    "all_to_all": [*pairs.ALL_TO_ALL, *all_to_all.ALGORITHMS],
    "all_to_all_vdev": pairs.ALL_TO_ALL_VDEV,
    "send_recv": pairs.SEND_RECV,
    "barrier": barrier.ALGORITHMS,
}
