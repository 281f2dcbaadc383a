"""Across nodes: node boundaries drawn inside this host, beyond which ranks reach each other by NVSHMEM's calls alone.

In emulation those have the ordering of a network. On GPUs they need nvshmem4py, and go over NVLink.
"""

import contextlib
import ctypes
import errno
import gc
import importlib.util
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from unittest import mock

import cases
import numpy as np
import pool
import pytest
import reference
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from test_collectives import only
from test_process_group import MPIRUN
from waiting import settle

import tdccl
import tdccl.language as shmem
import tdccl.language.nvshmem as nvshmem
import tdccl.language.rails as rails
from bench.launch import processes
from tdccl import environment, model, transport, tuning
from tdccl.decisions import ACROSS_NODES, context_for, device_of
from tdccl.ep import ExpertParallel
from tdccl.overlap import all_gather_gemm
from tdccl.runtime import heartbeat, launch
from tdccl.runtime.algorithm import Geometry
from tdccl.transport import network, topology
from tdccl.transport import nvshmem as library
from tdccl.transport.topology import topology_of

pytestmark = pytest.mark.skipif(
    not environment.emulated() and importlib.util.find_spec("nvshmem") is None, reason="nvshmem4py is not installed"
)
long = pytest.mark.skipif(os.environ.get("TDCCL_LONG", "0") == "0", reason="TDCCL_LONG=1 runs it")

_groups = {}


def split(comm, size):
    """A new communicator of the same ranks, with a node boundary after every `size` ranks."""
    os.environ["TDCCL_NODE_SIZE"] = str(size)
    try:
        return comm.split(0)
    finally:
        del os.environ["TDCCL_NODE_SIZE"]


def drawn(comm, size):
    """One that is made once."""
    if (comm, size) not in _groups:
        _groups[comm, size] = split(comm, size)
    return _groups[comm, size]


@contextlib.contextmanager
def fresh(comm, size):
    """One that is made anew, for what leaves it unusable."""
    group = split(comm, size)
    try:
        yield group
    finally:
        comm._bootstrap.barrier()
        group.destroy()


def by_nodes(values, op, size):
    """The bits of a reduction across nodes of `size` ranks: node by node, then the nodes' sums, see `hierarchical`."""
    dtype, partial = values[0].dtype, "sum" if op == "avg" else op
    nodes = [values[start : start + size] for start in range(0, len(values), size)]
    wide = op == "avg" and (dtype is torch.float16 or (dtype.itemsize == 1 and not dtype.is_floating_point))
    if wide:
        wide = torch.float32 if dtype.is_floating_point else torch.int32
        nodes = [[value.to(wide) for value in node] for node in nodes]
    sums = [reference.ordered(node, partial) for node in nodes]
    if op != "avg":
        return reference.ordered(sums, op)
    total = sums[0].float() if dtype.is_floating_point and dtype.itemsize < 4 else sums[0]
    for each in sums[1:]:
        total = total + each.to(total.dtype)
    divisor = torch.full_like(total, len(values))
    return (total / divisor if dtype.is_floating_point else torch.div(total, divisor, rounding_mode="trunc")).to(dtype)


# ---- topology ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "nodes"),
    [
        ("aabb", [(0, 1), (2, 3)]),
        ("aaaa", [(0, 1, 2, 3)]),
        ("ab", [(0,), (1,)]),
        ("aabbcc", [(0, 1), (2, 3), (4, 5)]),
        ("abab", [(0,), (1,), (2,), (3,)]),  # not one after another
        ("aab", [(0,), (1,), (2,)]),  # not equally many
    ],
)
def test_ranks_of_a_place_share_a_node_if_they_can(places, nodes):
    topology = topology_of(len(places) - 1, list(places))
    assert list(topology.nodes) == nodes
    assert topology.node == len(nodes) - 1 and topology.local == list(nodes[-1])
    assert topology.rail == [ranks[-1] for ranks in nodes]


@pytest.mark.parametrize(
    ("places", "gpus"),
    [
        (["a", "b"] * 4, [0, 0, 1, 1, 2, 2, 3, 3]),
        (["a"] * 3 + ["b"] * 3, [0, 1, 2, 0, 1, 2]),
        (["a"] * 3 + ["b"] * 6, [0, 1, 2, 0, 1, 2, 3, 0, 1]),  # more ranks than GPUs share them
        (["a/part 0"] * 2 + ["a/part 1"] * 2, [0, 1, 2, 3]),
        (["a", None], [0, 0]),  # a rank that does not know raises, and no other instead
    ],
)
def test_gpus_are_taken_in_the_order_of_the_ranks_of_a_host(monkeypatch, places, gpus):
    monkeypatch.setattr(environment, "emulated", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    numbers = [topology_of(rank, places).number_on_host for rank in range(len(places))]
    assert [device_of(None, number).index for number in numbers] == gpus


def check_topology(comm):
    group = drawn(comm, 2)
    assert group.topology.nodes == ((0, 1), (2, 3)), group.topology
    assert len(comm.topology.nodes) == 1
    os.environ["TDCCL_NODE_SIZE"] = "2"
    try:
        backwards, inside = group.split(0, -group.rank), group.split(group.rank // 2)
    finally:
        del os.environ["TDCCL_NODE_SIZE"]
    assert backwards.topology.nodes == ((0, 1), (2, 3))
    assert len(inside.topology.nodes) == 1
    for part in (backwards, inside):
        ones = part.all_reduce(torch.ones(3, device=comm.device))
        assert ones.tolist() == [part.size] * 3
        settle(part)
        part.destroy()


@pytest.mark.skipif(pool.LARGEST_WORLD < 4, reason="needs 4 ranks")
def test_boundaries_are_drawn_in_the_world_and_hold_for_its_parts(ranks):
    ranks.run(check_topology, 4)


@pytest.mark.parametrize("bad", ["0", "-1", "two"])
def test_a_bad_node_size_is_refused(monkeypatch, bad):
    monkeypatch.setenv("TDCCL_NODE_SIZE", bad)
    with pytest.raises(tdccl.InitError, match="TDCCL_NODE_SIZE"):
        environment.node_size()


# ---- NVSHMEM's calls ---------------------------------------------------------------------------------------


@triton.jit
def tell(team, rail, recv, round, HOW: tl.constexpr, TILE: tl.constexpr):
    """Node 0 puts two tiles to node 1, and tells it by a signal; node 1 copies what it then has to `recv`."""
    place, one = tl.arange(0, TILE), tl.full([], 1, tl.int64)
    ADDS: tl.constexpr = HOW == "add" or HOW == "put_signal_add"
    arrived = rails._word(rail, rails.RESULTS, 0, rails.ARRIVED_WORD)
    for tile in range(2):
        source = rails.out_slot(rail, rails.RESULTS, 0, tile, tl.int32)
        target = rails.in_slot(rail, rails.RESULTS, 0, tile, tl.int32)
        nbytes = tl.full([], TILE * 4, tl.int64)
        if rail.node == 0:
            pe = tl.load(rail.pes + 1)
            tl.store(source + place, place + round * 1000 + tile * 100)
            shmem.fence()
            if HOW == "put_signal" and tile == 1:
                nvshmem.put_signal_nbi(target, source, nbytes, arrived, round, pe)
            elif HOW == "add":
                nvshmem.put_signal_nbi(target, source, nbytes, arrived, one, pe, nvshmem.ADD)
            elif HOW == "put_signal_add":
                nvshmem.put_signal(target, source, nbytes, arrived, one, pe, nvshmem.ADD)
                shmem.fence()
                tl.store(source + place, 0)
            elif HOW == "put":
                nvshmem.put(target, source, nbytes, pe)
            else:
                nvshmem.put_nbi(target, source, nbytes, pe)
    if rail.node == 0:
        if HOW == "quiet":
            nvshmem.quiet()
        elif HOW == "fence" or HOW == "put":
            nvshmem.fence()
        if HOW != "put_signal" and not ADDS:
            nvshmem.signal_op(arrived, round, tl.load(rail.pes + 1))
        nvshmem.quiet()
    else:
        shmem.signal_wait(team, arrived, 2 * round if ADDS else round, 0)
        for tile in range(2):
            slot = rails.in_slot(rail, rails.RESULTS, 0, tile, tl.int32)
            tl.store(recv + tile * TILE + place, tl.load(slot + place))


def told(comm, how, seeds):
    """For each seed, which of the two tiles node 1 saw; by a communicator that is used for nothing else."""
    tile, seen = 64, []
    with fresh(comm, 1) as group:
        recv = torch.zeros(2 * tile, dtype=torch.int32, device=group.device)
        geometry = Geometry("i32", 1, 4, False, {}, {"HOW": how, "TILE": tile})
        for round, seed in enumerate(seeds, 1):
            if environment.emulated():
                network.reseed(seed, longest=0.2)  # longer than a busy host keeps the reader from looking
            group._bootstrap.barrier()
            geometry = geometry.adding(counts={"round": round})
            arguments = launch.Arguments(tell, geometry, (), None, 0, group._rails[False])
            launch.bind(tell, arguments, group._team, geometry, {})(0, recv.data_ptr(), 0)
            settle(group)
            expected = torch.arange(tile, dtype=torch.int32) + round * 1000
            seen.append([torch.equal(recv.cpu()[:tile], expected), torch.equal(recv.cpu()[tile:], expected + 100)])
            group._bootstrap.barrier()
    if environment.emulated():
        network.reseed(0)
    return seen


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
@pytest.mark.parametrize("how", ["fence", "quiet", "put"])
def test_a_signal_behind_a_fence_comes_after_what_was_put(ranks, how):
    _, seen = ranks.run(told, 2, how=how, seeds=range(8))
    assert seen == [[True, True]] * 8


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
@pytest.mark.parametrize("how", ["add", "put_signal_add"])
def test_puts_that_add_to_one_signal_are_all_there_when_it_has_counted_them(ranks, how):
    _, seen = ranks.run(told, 2, how=how, seeds=range(4))
    assert seen == [[True, True]] * 4


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
def test_a_put_with_signal_is_there_when_its_signal_is(ranks):
    _, seen = ranks.run(told, 2, how="put_signal", seeds=range(8))
    assert all(second for _, second in seen)
    if environment.emulated():
        assert not all(first for first, _ in seen), "what was put before it is not ordered, and was there every time"


@pytest.mark.skipif(not environment.emulated() or pool.LARGEST_WORLD < 2, reason="NVLink happens to keep the order")
def test_a_signal_without_a_fence_overtakes(ranks):
    _, seen = ranks.run(told, 2, how="nothing", seeds=range(8))
    assert seen != [[True, True]] * 8


@triton.jit
def stream(team, rail, recv, count, TILE: tl.constexpr):
    """Node 0 sends node 1 many more tiles than there are slots, and hears nothing from it but that they are taken."""
    epoch, place = shmem.begin(team), tl.arange(0, TILE)
    for tile in range(count):
        if rail.node == 0:
            epoch, number, slot = rails.next_out(team, rail, rails.INPUTS, 1, epoch, tl.int32)
            tl.store(slot + place, place + tile * 1000)
            rails.put_tile(team, rail, rails.INPUTS, 1, number, slot, TILE * 4)
        else:
            epoch, number = rails.next_in(team, rail, rails.INPUTS, 0, epoch)
            slot = rails.in_slot(rail, rails.INPUTS, 0, number, tl.int32)
            tl.store(recv + tile * TILE + place, tl.load(slot + place))
            rails.took(team, rail, rails.INPUTS, 0, number)
    shmem.end(team, epoch)


def check_stream(comm, late):
    """Rank `late` begins long after the other."""
    count, tile = 30, 64
    with fresh(comm, 1) as group:
        recv = torch.zeros(count * tile, dtype=torch.int32, device=group.device)
        geometry = Geometry("i32", 1, 4, False, {"count": count}, {"TILE": tile})
        arguments = launch.Arguments(stream, geometry, (), None, 0, group._rails[False])
        start = launch.bind(stream, arguments, group._team, geometry, {})
        if group.rank == late:
            time.sleep(0.3)
        start(0, recv.data_ptr(), 0)
        settle(group)
        expected = torch.arange(tile) + 1000 * torch.arange(count)[:, None]
        assert group.rank == 0 or torch.equal(recv.cpu(), expected.flatten().int())


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
@pytest.mark.parametrize("late", [0, 1])
def test_a_sender_waits_for_slots_to_be_taken(ranks, late):
    ranks.run(check_stream, 2, late=late)


@triton.jit
def fetch(team, rail, recv, TILE: tl.constexpr):
    """Every node reads what the other has in a slot, once that has told it that it is there; and who they are."""
    place, other = tl.arange(0, TILE), 1 - rail.node
    source = rails.out_slot(rail, rails.RESULTS, 0, 0, tl.int32)
    target = rails.in_slot(rail, rails.RESULTS, 0, 0, tl.int32)
    arrived, pe = rails._word(rail, rails.RESULTS, 0, rails.ARRIVED_WORD), tl.load(rail.pes + other)
    tl.store(source + place, place + 1000 * rail.node)
    nvshmem.fence()
    nvshmem.signal_op(arrived, tl.full([], 1, tl.int64), pe)
    shmem.signal_wait(team, arrived, 1, 0)
    nvshmem.get(target, source, tl.full([], TILE * 4, tl.int64), pe)
    tl.store(recv + place, tl.load(target + place))
    tl.store(recv + TILE, nvshmem.my_pe())
    tl.store(recv + TILE + 1, nvshmem.n_pes())


def check_fetch(comm):
    tile = 64
    with fresh(comm, 1) as group:
        recv = torch.zeros(tile + 2, dtype=torch.int32, device=group.device)
        geometry = Geometry("i32", 1, 4, False, {}, {"TILE": tile})
        arguments = launch.Arguments(fetch, geometry, (), None, 0, group._rails[False])
        launch.bind(fetch, arguments, group._team, geometry, {})(0, recv.data_ptr(), 0)
        settle(group)
        assert torch.equal(recv.cpu()[:tile], torch.arange(tile, dtype=torch.int32) + 1000 * (1 - group.rank))
        assert recv[tile].item() == group._pes[False][group.rank].item() and recv[tile + 1].item() >= 2
        group._bootstrap.barrier()


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
def test_get_reads_from_another_node(ranks):
    ranks.run(check_fetch, 2)


def check_addresses(comm):
    """A rank has no address of another node's memory, and what it has is not beyond its reach by mistake."""
    group = drawn(comm, 1)
    assert group._heap.addresses == [group._heap.address]
    with pytest.raises(tdccl.ArgumentError, match="no address in memory that NVSHMEM allocated"):
        network.get(0, group._heap.address, 8, 0)


@pytest.mark.skipif(not environment.emulated() or pool.LARGEST_WORLD < 2, reason="of the emulation")
def test_other_nodes_are_out_of_reach_but_for_nvshmem(ranks):
    ranks.run(check_addresses, 2)


# ---- collectives -------------------------------------------------------------------------------------------


def run_once(group, size, collective, dtype, op, count, seed, in_place):
    """One call against the reference, with this rank's buffers at an alignment of their own."""
    whole = collective in ("all_reduce", "broadcast")
    each = count if whole or collective == "all_gather" else count * group.size
    everyone = reference.inputs(seed, group.size, each, dtype, group.device)
    mine, root = slice(group.rank * count, (group.rank + 1) * count), seed % group.size
    shift = (seed + group.rank) % 2
    send = torch.cat([everyone[group.rank][:shift], everyone[group.rank]])[shift:]
    if collective == "all_reduce":
        expected = by_nodes(everyone, op, size)
        result = group.all_reduce(send, send if in_place else None, op)
    elif collective == "reduce_scatter":
        expected = by_nodes([values[mine] for values in everyone], op, size)
        result = group.reduce_scatter(send, send[mine] if in_place else torch.empty_like(send[mine]), op)
    elif collective == "all_gather":
        expected = torch.cat(everyone)
        recv = torch.zeros_like(expected)
        recv[mine] = send
        result = group.all_gather(recv[mine] if in_place else send, recv)
    elif collective == "broadcast":
        expected, result = everyone[root], group.broadcast(send, root)
    else:
        expected = torch.cat([values[mine] for values in everyone])
        result = group.all_to_all(send, send if in_place else None)
    settle(group)
    where = f"{collective} {dtype} {op} count {count} seed {seed} in_place {in_place} of {group.topology.nodes}"
    assert reference.same_bits(result, expected), f"{where}: {(result != expected).sum().item()} wrong"


def check_all(comm, size, kinds, counts):
    """Every algorithm across nodes on some dtypes and sizes."""
    group, seed = drawn(comm, size), 0
    for collective, algorithms in ACROSS_NODES.items():
        for algorithm in algorithms:
            for dtype, op in kinds if not algorithm.pairs else ():  # which are for other calls
                for count in counts:
                    seed += 1
                    if algorithm.packets is not None and (count > 300 or (op == "avg" and dtype.itemsize < 4)):
                        continue
                    with only(group, collective, algorithm.name):
                        if collective == "barrier":
                            group.barrier()
                        else:
                            run_once(group, size, collective, dtype, op, count, seed, seed % 2 == 1)


KINDS = [(torch.bfloat16, "sum"), (torch.float16, "avg"), (torch.int8, "avg"), (torch.float64, "max")]


@pytest.mark.parametrize("size", [1, 2])
def test_every_algorithm_gives_the_ordered_bits(ranks, size, world):
    if world < 2 or world % size or world == size:
        pytest.skip("one node")
    ranks.run(check_all, world, size=size, kinds=KINDS if size == 2 else KINDS[:1], counts=[1, 257, 20_011])


@pytest.fixture(scope="module")
def eight_ranks():
    shared = pool.RankPool(8)
    yield shared
    shared.close()


@pytest.mark.skipif(not environment.emulated() and pool.LARGEST_WORLD < 8, reason="needs 8 GPUs")
@pytest.mark.parametrize(
    ("nodes", "size"), [(2, 3), (2, 4), (4, 2), pytest.param(3, 2, marks=long), pytest.param(8, 1, marks=long)]
)
def test_more_and_larger_nodes(eight_ranks, nodes, size):
    eight_ranks.run(check_all, nodes * size, size=size, kinds=KINDS[:1], counts=[1001], seconds=200)


def check_large(comm):
    """More than all scratch, so that every slot is used again and again."""
    group = drawn(comm, 2)
    count = (cases.SCRATCH_MB << 20) * 9 // 8 // 2
    for collective in ("all_reduce", "broadcast", "all_to_all"):
        each = count if collective != "all_to_all" else count // group.size
        run_once(group, 2, collective, torch.bfloat16, "sum", each + 3, 5, False)


@pytest.mark.skipif(pool.LARGEST_WORLD < 4, reason="needs 4 ranks")
def test_messages_larger_than_the_scratch(ranks):
    ranks.run(check_large, 4)


def storm(comm, seed, calls):
    """Random calls back to back, without a word between them, on a network that draws its delays anew."""
    group, shared = drawn(comm, 2), random.Random(seed)
    if environment.emulated():
        network.reseed(seed * 7 + comm.rank)
    for call in range(calls):
        collective = shared.choice([*model.COLLECTIVES, "barrier"])
        dtype, count = shared.choice([torch.float32, torch.bfloat16, torch.int8]), shared.choice([1, 64, 1000, 9001])
        if collective == "barrier":
            group.barrier()
        else:
            run_once(group, 2, collective, dtype, "sum", count, seed * 100 + call, shared.random() < 0.5)


@pytest.mark.skipif(pool.LARGEST_WORLD < 4, reason="needs 4 ranks")
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=long) for seed in range(2, 12))])
def test_calls_back_to_back_on_a_network_that_reorders(ranks, seed):
    ranks.run(storm, 4, seed=seed, calls=25)


def check_graphs(comm):
    """A captured graph replays on new input, between eager calls."""
    group = drawn(comm, comm.size // 2)
    x, y = torch.empty(50_000, device=comm.device), torch.empty(50_000, device=comm.device)
    group.all_reduce(x, y)
    settle(group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        group.all_reduce(x, y)
    for round in range(4):
        everyone = reference.inputs(round, comm.size, x.numel(), x.dtype, comm.device)
        x.copy_(everyone[comm.rank])
        graph.replay()
        settle(group)
        expected = by_nodes(everyone, "sum", comm.size // 2)
        assert reference.same_bits(y, expected), round
        assert reference.same_bits(group.all_reduce(x), expected), round


@pytest.mark.skipif(environment.emulated(), reason="CUDA graphs")
def test_graphs_replay(ranks, world):
    if world not in (2, 4):
        pytest.skip("two nodes")
    ranks.run(check_graphs, world)


def check_composed(comm):
    """Roots and uneven pieces, none among them."""
    group, rank, size = drawn(comm, comm.size // 2), comm.rank, comm.size
    rows = [[(3 * i + j) % 4 for j in range(size)] for i in range(size)]  # i sends j so many
    x = torch.arange(300.0, device=comm.device) + 1000 * rank
    everyone = [torch.arange(300.0, device=comm.device) + 1000 * other for other in range(size)]
    for root in (0, size - 1):
        total, gathered = group.reduce(x, None, "max", root), group.gather(x, None, root)
        assert (total is None) == (gathered is None) == (rank != root)
        if rank == root:
            assert torch.equal(total, everyone[-1]) and torch.equal(gathered, torch.cat(everyone))
        part = torch.empty(7, device=comm.device)
        group.scatter(torch.arange(7.0 * size, device=comm.device) if rank == root else None, part, root)
        assert part.tolist() == [7.0 * rank + i for i in range(7)]
    sent, received = rows[rank], [row[rank] for row in rows]
    starts = [sum(row[:rank]) for row in rows]
    expected = [everyone[i][start : start + count] for i, (start, count) in enumerate(zip(starts, received))]
    found = group.all_to_all(x[: sum(sent)].clone(), None, sent, received)
    assert torch.equal(found, torch.cat(expected))
    counts = [2 * other for other in range(size)]
    found = group.all_gather(x[: 2 * rank].clone(), None, counts)
    assert torch.equal(found, torch.cat([values[:count] for values, count in zip(everyone, counts)]))
    settle(group)


def test_roots_and_uneven_pieces(ranks, world):
    if world not in (2, 4):
        pytest.skip("two nodes")
    ranks.run(check_composed, world)


# ---- faults, faces -----------------------------------------------------------------------------------------


def check_timeout(comm, absent, size):
    """All but one call; the errors name that one, also from another node."""
    with fresh(comm, size) as group:
        group.all_reduce(torch.ones(9, device=comm.device))  # those that call are quick from here on
        if comm.rank == absent:
            return []
        time.sleep(1 if comm.rank == 0 else 0)  # else it could name rank 2, which itself waits for the absent one
        with pytest.raises(tdccl.Timeout) as caught:
            group.all_reduce(torch.ones(9, device=comm.device), timeout=3)
            settle(group)
        return [str(caught.value).partition(":")[0]]


@pytest.mark.skipif(pool.LARGEST_WORLD < 4, reason="needs 4 ranks")
@pytest.mark.parametrize("size", [1, 2])
def test_a_missing_rank_is_named_by_its_number_in_the_communicator(ranks, size):
    said = [*itertools.chain(*ranks.run(check_timeout, 4, absent=3, size=size))]
    waited = {line for line in said if line.startswith("rank ")}
    assert len(said) == 3 and any("for rank 3" in line for line in waited), said


def check_kept(comm, call):
    """Rank 0 calls alone, more than there are slots for: what it has put is still there when its waits have failed."""
    put, sent = network.put_signal_nbi, {}

    def kept(target, source, nbytes, *rest):
        if not sent:
            threading.Timer(0.2, group.abort).start()
        sent[source] = ctypes.string_at(source, nbytes)
        put(target, source, nbytes, *rest)

    with fresh(comm, 1) as group:
        send, tokens = torch.arange(1 << 18, dtype=torch.float32), torch.ones(160, 64, dtype=torch.bfloat16)
        ep = ExpertParallel(group, len(tokens), tokens.shape[1], 2 * comm.size, 2)
        plan = ep.plan(torch.arange(2 * len(tokens)).view(-1, 2) % (2 * comm.size))
        rows = ep.dispatch(tokens, plan).rows
        tokens, rows = (values * torch.arange(len(values))[:, None] for values in (tokens, rows))
        group._bootstrap.barrier()
        if comm.rank == 1:
            return
        calls = {
            "send": lambda: group.send(send, 1), "dispatch": lambda: ep.dispatch(tokens, plan),
            "combine": lambda: ep.combine(rows, plan),
        }  # fmt: skip
        with mock.patch.object(network, "put_signal_nbi", kept), pytest.raises(tdccl.Aborted):
            calls.get(call, lambda: getattr(group, call)(send))()
            group.check()
        assert sent and all(ctypes.string_at(source, len(data)) == data for source, data in sent.items())


@pytest.mark.skipif(not environment.emulated(), reason="seen in the emulated network")
@pytest.mark.parametrize("call", ["all_reduce", "all_gather", "all_to_all", "broadcast", "send", "dispatch", "combine"])
def test_what_is_under_way_is_not_written_over_after_a_failed_wait(ranks, call):
    ranks.run(check_kept, 2, call=call)


def check_dropped(comm):
    """Of a communicator that was dropped without `destroy` no address is left; what it had under way still arrives."""
    for elements in (1 << 10, 1 << 16, 1 << 12):
        network.reseed(comm.rank, longest=0.05)
        group = split(comm, 1)
        x = torch.arange(float(elements))
        assert torch.equal(group.all_reduce(x), 2 * x)
        lanes, group = group._lanes.address, weakref.ref(group)
        gc.collect()
        assert group() is None
        network.quiet()
        with pytest.raises(tdccl.ArgumentError, match="no address in memory"):
            network.get(0, lanes, 8, 0)
    network.reseed(0)
    comm._bootstrap.barrier()


@pytest.mark.skipif(not environment.emulated() or pool.LARGEST_WORLD < 2, reason="of the emulation")
def test_a_dropped_communicator_leaves_no_addresses(ranks):
    ranks.run(check_dropped, 2)


def check_short(comm):
    """Memory that one node cannot have no other keeps; a fault on it ends the wait of its ranks."""

    def full(descriptor, offset, nbytes):
        raise OSError(errno.ENOSPC, "no space left")

    with fresh(comm, 2) as group:
        x = torch.full((9,), 1.0)
        who = "no shared memory" if comm.rank == 0 else "rank 0 could not take part"
        short = mock.patch("os.posix_fallocate", full) if comm.rank == 0 else contextlib.nullcontext()
        with short, pytest.raises(tdccl.InitError, match=who):
            group.empty(1 << 16)
        assert group.all_reduce(x).tolist() == [4] * 9
        assert group.all_reduce(group.empty(9).fill_(1)).tolist() == [4] * 9
        comm._bootstrap.barrier()
        start = time.monotonic()
        with pytest.raises(tdccl.Aborted, match="rank 1"):
            if comm.rank == 1:
                time.sleep(0.5)
                group.abort()
            group.empty(1 << 16)
        assert time.monotonic() - start < 10


@pytest.mark.skipif(not environment.emulated() or pool.LARGEST_WORLD < 4, reason="shared memory of 4 emulated ranks")
def test_memory_that_a_node_is_refused_no_other_waits_for(ranks):
    ranks.run(check_short, 4)


@contextlib.contextmanager
def two_hosts(rank):
    """Ranks take each other to be on two hosts, two on each: they meet by the network and the store alone."""
    found = topology.boot_id
    topology.boot_id = lambda: f"host {rank // 2}"
    try:
        yield
    finally:
        topology.boot_id = found


def check_hosts(comm):
    with two_hosts(comm.rank):
        group, other = comm.split(0), comm.split(0)
    assert group.topology.nodes == ((0, 1), (2, 3))
    assert [pid is None for pid in group._control.pids] == [rank // 2 != comm.rank // 2 for rank in range(4)]
    assert group.all_reduce(torch.ones(9)).tolist() == [4] * 9
    if comm.rank != 3:  # the first whose deadline has passed tells the others, also on the other host
        with pytest.raises(tdccl.Timeout, match=r"waited 1 s for rank \d"):
            group.all_reduce(torch.ones(9), timeout=1)
    comm._bootstrap.barrier()
    group.destroy()
    start = time.monotonic()
    if comm.rank == 1:
        other.abort()
    with pytest.raises(tdccl.Aborted, match="rank 1 aborted"):
        other.all_reduce(torch.ones(9))
    assert time.monotonic() - start < 5
    comm._bootstrap.barrier()
    assert group._control.peers_gone()  # nobody else has this host's memory mapped
    with two_hosts(comm.rank):
        if comm.rank == 0:
            other._store.set("shrink/[0, 1, 2]", "localhost:1")  # what an attempt that failed has left
        comm._bootstrap.barrier()
        if comm.rank != 3:
            time.sleep(0.5 if comm.rank == 0 else 0)
            smaller = other.shrink(exclude=[3])
            assert smaller.all_reduce(torch.ones(9)).tolist() == [3] * 9
            smaller.destroy()
    comm._bootstrap.barrier()
    other.destroy()


@pytest.mark.skipif(not environment.emulated() or pool.LARGEST_WORLD < 4, reason="other hosts are emulated")
def test_ranks_of_other_hosts_are_reached_by_the_network_alone(ranks):
    ranks.run(check_hosts, 4)


def live_or_die(rank, port, answers):
    """Rank 2 ends without a word between calls; the others hear of it, and go on without the host."""
    heartbeat.SILENCE = 3.0
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    with two_hosts(rank):
        comm = tdccl.init(store=store, rank=rank, size=4, timeout=60)
        assert comm.all_reduce(torch.ones(9)).tolist() == [4] * 9
        comm._bootstrap.barrier()
        if rank >= 2:  # a host is gone, with all of its ranks at once
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        try:
            comm.all_reduce(torch.ones(9))
        except tdccl.PeerFailure as failure:
            assert failure.rank == 2 and "rank 2 on another host" in str(failure), failure
            assert time.monotonic() - start < 12
            comm = comm.shrink(exclude=[2, 3])
            answers.put(comm.all_reduce(torch.ones(9)).tolist() == [2] * 9)
        comm.destroy()


@pytest.mark.skipif(not environment.emulated(), reason="other hosts are emulated")
def test_a_host_that_falls_silent_is_noticed_and_left_behind():
    context = processes()
    store, answers = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), context.Queue()
    ranks = [context.Process(target=live_or_die, args=(rank, store.port, answers)) for rank in range(4)]
    for process in ranks:
        process.start()
    try:
        assert [answers.get(timeout=90) for _ in range(2)] == [True, True]
        for process in ranks:
            process.join(30)
        assert [process.exitcode for process in ranks] == [0, 0, -signal.SIGKILL, -signal.SIGKILL]
    finally:
        for process in ranks:
            process.kill()


def check_refused(comm):
    group, x = drawn(comm, 1), torch.ones(16, 16, dtype=torch.bfloat16, device=comm.device)
    with pytest.raises(tdccl.ArgumentError, match="ranks of one node, these are on 2"):
        all_gather_gemm(group, x, x)


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
def test_what_goes_by_addresses_alone_says_so(ranks):
    ranks.run(check_refused, 2)


@pytest.mark.skipif(pool.LARGEST_WORLD < 4, reason="needs 4 ranks")
def test_all_faces_check_and_time_it():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "-m", "bench.nodes_check"]
    variables = os.environ | {"TDCCL_NODE_SIZE": "2"}
    done = subprocess.run(command, cwd=pool.ROOT, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "# parts that failed: 0" in done.stdout, done.stdout + done.stderr[-3000:]


UNDER_MPIRUN = """
from mpi4py import MPI
import torch
import tdccl
from tdccl.transport import topology

rank = MPI.COMM_WORLD.Get_rank()
topology.boot_id = lambda: f"host {rank // 2}"
comm = tdccl.init(timeout=60)
assert comm.all_reduce(torch.ones(9)).tolist() == [4] * 9
MPI.COMM_WORLD.Barrier()  # else the abort could meet a slow rank's first call
if rank == 3:
    comm.abort()
try:
    comm.all_reduce(torch.ones(9))
except tdccl.Aborted as error:
    print("told of", error.rank, flush=True)
comm.destroy()
"""


@pytest.mark.skipif(not environment.emulated(), reason="other hosts are emulated")
@pytest.mark.skipif(MPIRUN is None, reason="no mpirun")
def test_ranks_of_mpirun_make_a_store_for_faults_to_cross_hosts(tmp_path):
    (tmp_path / "abort.py").write_text(UNDER_MPIRUN)
    command = [MPIRUN, "--oversubscribe", "-n", "4", sys.executable, tmp_path / "abort.py"]
    variables = os.environ | {"PYTHONPATH": str(pool.ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("told of 3") == 4, done.stdout + done.stderr[-3000:]


@long
@pytest.mark.skipif(not environment.emulated(), reason="of ranks on one GPU each")
def test_the_table_of_faults_holds_across_drawn_nodes():
    command = [sys.executable, "-m", "bench.faults", "--ranks", "3", "--repeat", "1"]
    variables = os.environ | {"TDCCL_NODE_SIZE": "1"}
    done = subprocess.run(command, cwd=pool.ROOT, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout


# ---- memory from NVSHMEM -----------------------------------------------------------------------------------


VARIABLES = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS", "TDCCL_NVLS")


@pytest.fixture
def nvshmem4py(monkeypatch):
    """Stand-ins for NVSHMEM and its Python binding, of which nothing is started yet."""
    identity, done = types.SimpleNamespace(_data=np.frombuffer(bytearray(random.randbytes(128)), np.int8)), []
    core = {"get_unique_id": lambda empty: identity, "init": lambda **_: None, "my_pe": lambda: 0}
    bindings = {"align": lambda alignment, nbytes: 1 << 20, "quiet_on_stream": lambda stream: done.append("quiet")}
    runtime = types.SimpleNamespace(cudaMemsetAsync=lambda *_: done.append("zeros"))
    modules = {"nvshmem.core": core, "nvshmem.bindings": bindings, "cuda.bindings": {"runtime": runtime}}
    modules["cuda.core"] = {"Device": lambda index: types.SimpleNamespace(set_current=lambda: None)}
    modules |= {name: {"__path__": []} for name in ("nvshmem", "cuda")}
    modules["tdccl.transport.p2p"] = {"check": lambda *_: None, "tensor_at": lambda *_: torch.empty(1)}
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(transport, "p2p", sys.modules["tdccl.transport.p2p"], raising=False)
    monkeypatch.setattr(library, "aside", contextlib.nullcontext)
    monkeypatch.setattr(library, "_started", None)
    monkeypatch.setattr(library, "_unusable", lambda: None)
    for name in VARIABLES:  # so that what is set is undone
        monkeypatch.setenv(name, "")
    return done


def beside(*others):
    """The bootstrap of rank 0, to whom the other ranks say so much of where NVSHMEM was started on them."""
    theirs = [(world, None, None) for world in others]
    return types.SimpleNamespace(rank=0, size=1 + len(theirs), exchange=lambda value: [value, *theirs])


def test_memory_is_given_back_when_all_that_was_put_has_arrived(nvshmem4py):
    alone = beside()
    memory, pes = library.allocate(alone, 1000, torch.device("cuda", 0))
    assert pes == [0] and library._started.free[0][0] == 1024 and nvshmem4py == ["zeros"]
    alone.barrier = lambda: nvshmem4py.append(("barrier", library._started.free[0][0]))
    memory.release(alone, lambda: False)
    assert nvshmem4py == ["zeros", "quiet", ("barrier", 1024)] and library._started.free[0][0] == 0


def test_after_a_failure_memory_is_given_back_when_all_its_ranks_are_met_again(nvshmem4py):
    gpu, left = torch.device("cuda", 0), []

    def answers(value):
        """Rank 1's: its memory is taken like rank 0's; of what is kept it has `left`."""
        if value and value[0] == 0:
            return 1, {*left} if isinstance(value[1], set) else value[1]
        return value

    both = types.SimpleNamespace(rank=0, size=2, exchange=lambda value: [value, answers(value)])
    lost, _ = library.allocate(both, 1000, gpu)
    lost.release(None, lambda: True)
    assert library._started.kept == {((0, 1), 0, 1024)}
    library.allocate(both, 1000, gpu)  # rank 1 has not yet destroyed what has failed
    assert library._started.free[0][0] == 2048 and "quiet" not in nvshmem4py
    library.allocate(beside(), 1000, gpu)  # and is not here
    assert library._started.free[0][0] == 3072 and "quiet" not in nvshmem4py
    left.extend(library._started.kept)
    library.allocate(both, 1000, gpu)
    assert library._started.free[0][0] == 3072 and nvshmem4py[-2:] == ["quiet", "zeros"] and not library._started.kept


def test_worlds_that_started_nvshmem_apart_are_told(nvshmem4py):
    gpu = torch.device("cuda", 0)
    with pytest.raises(tdccl.InitError, match=r"among ranks \[1, 2\] alone"):
        library._start(beside(b"one", b"one"), gpu)
    started = library._start(beside(), gpu)
    assert library._start(beside(started.world), gpu) is started
    with pytest.raises(tdccl.InitError, match=r"\[0, 3\] and among \[1, 2\] alone.* communicator of all ranks first"):
        library._start(beside(b"one", b"one", started.world), gpu)
    with pytest.raises(tdccl.InitError, match=r"among ranks \[0\] alone"):
        library._start(beside(None), gpu)


def test_nvshmem_makes_no_multicast_object_that_a_peer_forbids(nvshmem4py):
    def exchange(value):
        return [value, (*value[:2], "TDCCL_NVLS=0") if len(value) == 3 else value]

    library._start(types.SimpleNamespace(rank=0, size=2, exchange=exchange), torch.device("cuda", 0))
    assert os.environ["NVSHMEM_DISABLE_NVLS"] == "1"


def test_members_take_memory_that_is_free_on_all_of_them():
    free = {rank: [(0, 1024)] for rank in range(3)}

    def take(members, nbytes):
        begin = library.first_fit([free[rank] for rank in members], nbytes)
        for rank in members if begin is not None else ():
            library._take(free[rank], begin, begin + nbytes)
        return begin

    assert [take([0, 1], 256), take([1, 2], 256), take([0, 2], 256)] == [0, 256, 512]
    assert take([0, 1, 2], 512) is None
    library._give_back(free[0], 512, 768)
    library._give_back(free[2], 512, 768)
    assert take([0, 1, 2], 512) == 512


@pytest.mark.parametrize(("nodes", "size"), [(16, 8), (128, 8)])
def test_tiles_across_are_as_large_as_the_scratch_allows(nodes, size, scratch=64 << 20):
    context = context_for(size, scratch=scratch, nodes=nodes, rules=tuning.GPU)
    rings, channels, pairs = context.rules.rings, context.rules.channels, nodes * size
    assert 16 * rings * nodes * context.rail_slot == scratch  # 16 slots of each, in and out, in two stages
    assert 16 * channels * pairs * context.pair_slot == scratch // 2
    geometry = ACROSS_NODES["all_reduce"][-1].geometry(model.call_of("all_reduce", 1 << 30, pairs), context)
    assert 2 * geometry.constants["TILE"] == context.rail_slot
    lanes = rails.rail_bytes(rings, nodes, context.rail_slot) + rails.rail_bytes(channels, pairs, context.pair_slot)
    assert lanes < 1.52 * scratch


def test_bitcode_is_found_in_either_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("NVSHMEM_HOME", str(tmp_path))
    folder = tmp_path / "lib"
    folder.mkdir()
    with pytest.raises(tdccl.InitError, match="no bitcode for sm_90, but for nothing"):
        library.device_library(90)
    for arch in (80, 90, 100):
        (folder / f"libnvshmem_device_sm_{arch}.bc").touch()
    assert library.device_library(90).endswith("sm_90.bc") and library.device_library(103).endswith("sm_100.bc")
    (folder / "libnvshmem_device.bc").touch()
    assert library.device_library(90).endswith("libnvshmem_device.bc")
