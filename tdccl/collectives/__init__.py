"""One file a collective: its kernels, then the table of its algorithms, of which the last that fits takes what no
tuning table knows. Those of `tdccl.nvls` stand before them."""

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
from tdccl.nvls import all_gather as nvls_all_gather
from tdccl.nvls import all_reduce as nvls_all_reduce
from tdccl.nvls import barrier as nvls_barrier
from tdccl.nvls import broadcast as nvls_broadcast
from tdccl.nvls import reduce_scatter as nvls_reduce_scatter

ALGORITHMS = {
    "all_reduce": [*nvls_all_reduce.ALGORITHMS, *all_reduce.ALGORITHMS],
    "all_gather": [*nvls_all_gather.ALGORITHMS, *all_gather.ALGORITHMS],
    "reduce_scatter": [*nvls_reduce_scatter.ALGORITHMS, *reduce_scatter.ALGORITHMS],
    "broadcast": [*nvls_broadcast.ALGORITHMS, *broadcast.ALGORITHMS],
    "all_to_all": all_to_all.ALGORITHMS,
    "all_to_all_vdev": all_to_all_vdev.ALGORITHMS,
    "barrier": [*nvls_barrier.ALGORITHMS, *barrier.ALGORITHMS],
    "reduce": reduce.ALGORITHMS,
    "send_recv": send_recv.ALGORITHMS,
}
