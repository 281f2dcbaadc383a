"""Between pairs of ranks across drawn nodes: messages, uneven pieces, roots, splits on the device; as on one node."""

import pool
import pytest
import test_collectives
import test_rooted
import test_send_recv
import torch
from test_nodes import drawn, long, pytestmark  # noqa: F401

import tdccl
from tdccl import environment, tuning
from tdccl.decisions import ACROSS_NODES, context_for
from tdccl.runtime.algorithm import Call
from tdccl.transport import network


def on_nodes(comm, check, size, **arguments):
    """A body of another test on these ranks as nodes of `size`, on a network that draws its delays anew."""
    if environment.emulated():
        network.reseed(comm.rank)
    check(drawn(comm, size), **arguments)


def test_lists_of_more_ranks_than_a_kernel_takes_are_refused():
    one, many = (1,) * 8, (1,) * 1024
    for collective, splits in (("send_recv", None), ("all_to_all", (many, many)), ("all_gather", (many, many))):
        call = Call(collective, 0, "u8", None, 0, 16, splits, (None, None), False)
        algorithm = next(each for each in ACROSS_NODES[collective] if each.pairs)
        with pytest.raises(tdccl.ArgumentError, match=f"{collective}: 1024 ranks, .* 1000 at most"):
            algorithm.geometry(call, context_for(8, scratch=64 << 20, nodes=128, rules=tuning.GPU))
        fewer = call._replace(splits=splits and (one * 125, one * 125))
        geometry = algorithm.geometry(fewer, context_for(8, scratch=64 << 20, nodes=125, rules=tuning.GPU))
        assert sum(8 * len(numbers) for numbers in geometry.counts.values()) + 500 < 32764


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
