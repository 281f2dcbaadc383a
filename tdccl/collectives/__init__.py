"""One file a collective: its kernels, then the table of its algorithms, the first that fits is taken."""

from tdccl.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    all_to_all_vdev,
    barrier,
    broadcast,
    reduce,
    reduce_scatter,
    send_recv,
)

ALGORITHMS = {
    "all_reduce": all_reduce.ALGORITHMS,
    "all_gather": all_gather.ALGORITHMS,
    "reduce_scatter": reduce_scatter.ALGORITHMS,
    "broadcast": broadcast.ALGORITHMS,
    "all_to_all": all_to_all.ALGORITHMS,
    "all_to_all_vdev": all_to_all_vdev.ALGORITHMS,
    "barrier": barrier.ALGORITHMS,
    "reduce": reduce.ALGORITHMS,
    "send_recv": send_recv.ALGORITHMS,
}
