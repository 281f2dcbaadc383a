"""Expert parallelism across nodes, drawn inside this host: what `test_ep` asks of one node, bit by bit."""

import os
from unittest import mock

import pool
import pytest
import test_ep
import torch
from test_compile import bitcode
from test_nodes import drawn, eight_ranks, pytestmark  # noqa: F401

import tdccl
import tdccl.compat.deep_ep as deep_ep
from tdccl import environment
from tdccl.ep import LowLatency
from tdccl.overlap import route
from tdccl.transport import network

LONG = pytest.mark.skipif(os.environ.get("TDCCL_LONG", "0") == "0", reason="TDCCL_LONG=1 runs it")


def on_nodes(comm, check, size, **arguments):
    """A body of `test_ep` on these ranks as nodes of `size`, on a network that draws its delays anew."""
    if environment.emulated():
        network.reseed(comm.rank)
    check(drawn(comm, size), **arguments)


NEEDS_FOUR = pytest.mark.skipif(pool.LARGEST_WORLD < 4, reason="needs 4 ranks")


@NEEDS_FOUR
@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        pytest.param(test_ep.check_rounds, {"align": 4}, marks=LONG),
        (test_ep.check_corners, {}),
        (test_ep.check_quantised_layouts, {}),
        (test_ep.check_hooks, {}),
        (test_ep.check_refusals, {}),
        (test_ep.check_many, {"rounds": 4}),
        (test_ep.check_gradients, {"compiled": False}),
        pytest.param(test_ep.check_shapes, {}, marks=LONG),
    ],
    ids=lambda value: getattr(value, "__name__", "").removeprefix("check_"),
)
def test_two_nodes_of_two(ranks, check, arguments):
    ranks.run(on_nodes, 4, check=check, size=2, **arguments)


def check_refused(comm):
    group = drawn(comm, 1)
    with pytest.raises(tdccl.ArgumentError, match="ranks of one node"):
        LowLatency(group, 4, 64, 2 * comm.size, 2)
    with pytest.raises(tdccl.ArgumentError, match="ranks of one node"):
        route(group, torch.zeros(4, 2, dtype=torch.int64, device=comm.device), experts=4)
    draws = mock.patch.dict(os.environ, TDCCL_NODE_SIZE="1")
    with draws, pytest.raises(NotImplementedError, match="several nodes"):
        deep_ep.Buffer(group)


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
def test_what_is_for_one_node_says_so(ranks):
    ranks.run(check_refused, 2)


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
def test_nodes_of_one(ranks):
    ranks.run(on_nodes, 2, check=test_ep.check_rounds, size=1, align=1)


@LONG
@pytest.mark.skipif(not environment.emulated(), reason="more GPUs")
@pytest.mark.parametrize(("nodes", "size"), [(2, 3), (4, 2), (3, 1)])
@pytest.mark.parametrize("check", [test_ep.check_corners, test_ep.check_quantised_layouts])
def test_more_and_larger_nodes(eight_ranks, nodes, size, check):  # noqa: F811
    eight_ranks.run(on_nodes, nodes * size, 1200, check=check, size=size)


@pytest.mark.skipif(bitcode(90) is None, reason="NVSHMEM is not installed")
def test_kernels_link_nvshmem_and_access_16_bytes():
    kernels = test_ep.compiled(2, 2, ("cuda", "90", "32"))
    assert {kernel["name"] for kernel in kernels} >= {"across.dispatch", "across.combine"}
    test_ep.check_accesses(kernels)
    missing = [name for kernel in kernels for name in kernel.get("missing", ())]
    assert {*missing} <= {"vprintf", "__assertfail"}, missing  # which the driver has
