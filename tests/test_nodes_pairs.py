"""Between pairs of ranks across drawn nodes: messages, uneven pieces, roots, splits on the device; as on one node."""

import pool
import pytest
import test_collectives
import test_rooted
import test_send_recv
import torch
from test_nodes import drawn, long, pytestmark  # noqa: F401

from tdccl import environment
from tdccl.transport import network


def on_nodes(comm, check, size, **arguments):
    """A body of another test on these ranks as nodes of `size`, on a network that draws its delays anew."""
    if environment.emulated():
        network.reseed(comm.rank)
    check(drawn(comm, size), **arguments)


@pytest.mark.skipif(pool.LARGEST_WORLD < 4, reason="needs 4 ranks")
@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        pytest.param(test_send_recv.check_ring, {}, marks=long),
        (test_send_recv.check_pair_alone, {}),
        (test_send_recv.check_storm, {"seed": 1}),
        (test_send_recv.check_bad_messages, {}),
        (test_rooted.check_moves, {}),
        (test_rooted.check_uneven, {}),
        (test_rooted.check_uneven_reduction, {"dtype": torch.int32}),
        (test_collectives.check_splits, {"seed": 1}),
        (test_collectives.check_device_splits, {"seed": 1}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_two_nodes_of_two(ranks, check, arguments):
    ranks.run(on_nodes, 4, check=check, size=2, **arguments)
