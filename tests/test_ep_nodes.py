"""Expert parallelism across nodes, drawn inside this host: what `test_ep` asks of one node, bit by bit."""

import os

import ep_reference as reference
import pool
import pytest
import test_ep
import torch
from reference import same_bits
from test_nodes import drawn, eight_ranks, pytestmark  # noqa: F401

import tdccl
from tdccl import environment
from tdccl.ep import ExpertParallel, LowLatency
from tdccl.transport import network

LONG = pytest.mark.skipif(os.environ.get("TDCCL_LONG", "0") == "0", reason="TDCCL_LONG=1 runs it")


def on_nodes(comm, check, size, **arguments):
    """A body of `test_ep` on these ranks as nodes of `size`, on a network that draws its delays anew."""
    if environment.emulated():
        network.reseed(comm.rank)
    check(drawn(comm, size), **arguments)


NEEDS_FOUR = pytest.mark.skipif(pool.LARGEST_WORLD < 4, reason="needs 4 ranks")


@NEEDS_FOUR
def test_rows_arrive_in_order_and_combine_bitwise(ranks):
    ranks.run(on_nodes, 4, check=test_ep.check_rounds, size=2, align=4)
