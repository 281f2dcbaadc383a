"""Mixtures of experts: the routing's tables, and the operators that multiply while tokens travel."""

import itertools
import json
import random
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pool
import pytest
import torch
from waiting import check_told

import tdccl
from tdccl import environment
from tdccl.ep import ExpertParallel
from tdccl.overlap import MoE, all_gather_grouped_gemm, grouped_gemm_reduce_scatter, route, route_experts

WORLDS = (2, 3)


class Problem(NamedTuple):
    """All ranks' inputs, by rank; matrices of a rank [experts here, K, N] and [experts here, N, K]."""

    idx: list[torch.Tensor]
    weights: list[torch.Tensor]
    x: list[torch.Tensor]
    up: list[torch.Tensor]
    down: list[torch.Tensor]
    experts: int
    sharded: bool

    def first_expert(self, rank: int) -> int:
        return rank * len(self.up[rank]) if self.sharded else 0

    def rows_of(self, rank: int) -> list[list[tuple[int, int, int]]]:
        """(source rank, token, place) of each row of each expert there: nearest ranks first."""
        rows = [[] for _ in self.up[rank]]
        for distance in range(len(self.idx)):
            source = (rank + distance) % len(self.idx)
            for (token, place), expert in _entries(self.idx[source]):
                local = expert - self.first_expert(rank)
                if 0 <= local < len(rows):
                    rows[local].append((source, token, place))
        return rows


def _entries(idx: torch.Tensor):
    return [((token, place), expert) for token, row in enumerate(idx.tolist()) for place, expert in enumerate(row)]


# How experts are chosen; K and N that are whole steps, and ragged ones.
KINDS = ("random", "one expert", "few experts", "none on rank 0", "some none")
SHAPES = [(24, 2, 64, 64), (19, 1, 33, 35), (1, 2, 16, 24), (33, 4, 96, 40), (5, 3, 40, 72)]


def problem_of(comm, seed, kind, shape, sharded=False, tokens=None, dtype=torch.bfloat16) -> Problem:
    """shape: tokens of a rank, top_k, K, N."""
    most, top_k, depth, columns = shape
    size = comm.size
    experts = 2 * size if sharded else 5
    tokens = tokens or [most] * size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(comm.device, dtype)

    idx = [torch.rand(count, experts, generator=generator).topk(min(top_k, experts), 1).indices for count in tokens]
    for rank, chosen in enumerate(idx):
        if kind == "one expert":
            chosen.fill_(experts - 1)
        elif kind == "few experts":
            chosen %= 2
        elif kind == "some none":
            chosen[torch.rand(chosen.shape, generator=generator) < 0.4] = (-1, experts, -7)[rank % 3]
        elif kind == "none on rank 0" and rank == 0:
            chosen.fill_(-1)
    weights = [torch.rand(chosen.shape, generator=generator).to(comm.device) for chosen in idx]
    here = experts // size if sharded else experts
    x = [normal(count, depth) for count in tokens]
    up = [normal(here, depth, columns) for _ in range(size)]
    down = [normal(here, depth, columns).transpose(1, 2) for _ in range(size)]
    return Problem([chosen.to(comm.device) for chosen in idx], weights, x, up, down, experts, sharded)


def routing_of(comm, problem, weighted=True):
    idx, weights = problem.idx[comm.rank], problem.weights[comm.rank] if weighted else None
    if not problem.sharded:
        return route(comm, idx, weights, experts=problem.experts)
    ep = ExpertParallel(comm, max(1, *map(len, problem.idx)), problem.x[0].shape[1], problem.experts, idx.shape[1])
    return route_experts(ep, idx, weights)


def check_tables(comm, problem, routing):
    by_expert = problem.rows_of(comm.rank)
    rows = [row for listed in by_expert for row in listed]
    tables, sizes = routing.tables, routing.sizes
    begins = [0, *itertools.accumulate(map(len, by_expert))]
    assert tables.offsets.tolist() == begins
    numbers = [(source * sizes.most + token) * sizes.top_k + place for source, token, place in rows]
    assert tables.source[: len(rows)].tolist() == numbers
    where = torch.full((routing.rows,), -1)
    where[torch.tensor(numbers, dtype=torch.long)] = torch.arange(len(rows))
    assert tables.position.flatten().tolist() == where.tolist()
    distances = [(source - comm.rank) % comm.size for source, _, _ in rows]
    tiles = [
        (max(distances[row : min(row + routing.height, end)]), expert, row, min(routing.height, end - row))
        for expert, (begin, end) in enumerate(itertools.pairwise(begins))
        for row in range(begin, end, routing.height)
    ]
    listed = [(distance, *rest) for *rest, distance in tables.tiles[: len(tiles)].tolist()]
    assert listed == sorted(tiles)
    assert tables.stages.tolist() == [sum(t[0] < distance for t in tiles) for distance in range(comm.size + 1)]


def products_of(problem, rank) -> list[torch.Tensor]:
    """What each row is there after the first product, in fp32."""
    rows = enumerate(problem.rows_of(rank))
    return [problem.x[s][t].float() @ problem.up[rank][expert].float() for expert, listed in rows for s, t, _ in listed]


def check_layer(comm, problem, weighted=True):
    """Both operators, one after the other, against fp32; returns the second's result."""
    rank = comm.rank
    routing = routing_of(comm, problem, weighted)
    check_tables(comm, problem, routing)
    h = all_gather_grouped_gemm(problem.x[rank], problem.up[rank], routing)
    results = products_of(problem, rank)
    tolerance = 4e-2 if h.dtype is torch.bfloat16 else 6e-3
    scale = problem.x[0].shape[1] ** 0.5
    if results:
        wanted = torch.stack(results)
        torch.testing.assert_close(h[: len(wanted)].float() / scale, wanted / scale, atol=tolerance, rtol=tolerance)
    h = h / scale
    y = grouped_gemm_reduce_scatter(h, problem.down[rank], routing)
    assert y.dtype is h.dtype
    check_result(comm, problem, y, scale, weighted)
    return y


def check_result(comm, problem, y, divisor, weighted=True):
    """What both products made of this rank's tokens, against fp32; the first's results were divided."""
    rank = comm.rank
    wanted = torch.zeros(len(problem.x[rank]), problem.down[rank].shape[2], device=comm.device)
    for peer in range(comm.size):
        results = iter(products_of(problem, peer))
        for expert, rows in enumerate(problem.rows_of(peer)):
            for source, token, place in rows:
                row = next(results)
                if source == rank:
                    part = (row / divisor) @ problem.down[peer][expert].float()
                    wanted[token] += part * (problem.weights[rank][token, place] if weighted else 1)
    scale = float(wanted.norm()) / max(1, wanted.numel()) ** 0.5 or 1.0
    assert y.shape == wanted.shape
    tolerance = 8e-2 if y.dtype is torch.bfloat16 else 12e-3
    torch.testing.assert_close(y.float() / scale, wanted / scale, atol=tolerance, rtol=tolerance)


def check_kinds(comm, sharded):
    delay = random.Random(comm.rank)
    for seed, kind in enumerate(KINDS):  # larger and smaller ones in turns share memory and signals
        time.sleep(delay.choice([0, 0, 0.02]))
        dtype = (torch.bfloat16, torch.float16)[seed % 2]
        shape = SHAPES[seed % len(SHAPES)]
        tokens = [max(0, shape[0] - 2 * ((rank + seed) % 3)) for rank in range(comm.size)] if sharded else None
        if sharded and kind == "some none" and comm.size > 1:
            tokens[comm.size - 1] = 0
        problem = problem_of(comm, seed, kind, shape, sharded, tokens, dtype)
        check_layer(comm, problem, weighted=seed != 1)


@pytest.mark.parametrize("sharded", [False, True], ids=["parts of experts", "whole experts"])
def test_layers_with_ranks_that_come_late(ranks, world, sharded):
    ranks.run(check_kinds, world, sharded=sharded)


def check_few_multiprocessors(comm):
    """No more than half of them add up; with one alone both operators are refused."""
    group = comm.split(0)
    problem = problem_of(group, 2, "random", SHAPES[0])
    with mock.patch.object(import_module("tdccl.overlap.grouped_gemm_reduce_scatter"), "_reducers", lambda *_: 4):
        check_layer(group, problem)
    mine = [given[group.rank] for given in (problem.x, problem.up, problem.down)]
    routing = routing_of(group, problem)
    h = all_gather_grouped_gemm(*mine[:2], routing)
    with mock.patch.object(group, "multiprocessors", 1):
        for operator, rows, b in ((all_gather_grouped_gemm, *mine[:2]), (grouped_gemm_reduce_scatter, h, mine[2])):
            with pytest.raises(tdccl.ArgumentError, match=f"{operator.__name__}: a rank has 1 multiprocessor"):
                operator(rows, b, routing)
    check_layer(group, problem)
    group.destroy()


def test_layers_on_few_multiprocessors(ranks):
    ranks.run(check_few_multiprocessors, 2)


def check_bits(comm):
    """The same in every run, and as one after the other."""
    delay = random.Random(comm.rank)
    problem = problem_of(comm, 7, "random", (24, 3, 32, 64))
    results = []
    for _ in range(3):
        time.sleep(delay.choice([0, 0, 0.02]))
        results.append(check_layer(comm, problem))
    assert all(torch.equal(result, results[0]) for result in results)


def test_bits_are_the_same_in_every_run(ranks):
    ranks.run(check_bits, pool.LARGEST_WORLD)


def check_gradients(comm, sharded):
    """Against the same in one process, in fp32."""
    tokens = [11, 0, 7, 4][: comm.size] if sharded else None
    problem = problem_of(comm, 4, "some none", (11, 2, 24, 40), sharded, tokens)
    problem = problem._replace(x=[x / 5 for x in problem.x], down=[down / 8 for down in problem.down])
    mine = [
        given[comm.rank].clone().requires_grad_() for given in (problem.x, problem.up, problem.down, problem.weights)
    ]
    x, up, down, weights = mine
    routing = routing_of(comm, problem._replace(weights=[weights] * comm.size))
    y = grouped_gemm_reduce_scatter(all_gather_grouped_gemm(x, up, routing), down, routing)
    (y * (torch.arange(y.numel(), device=comm.device).view_as(y) % 3 - 1)).float().sum().backward()

    wholes = [
        [one.detach().float().requires_grad_() for one in given]
        for given in (problem.x, problem.up, problem.down, problem.weights)
    ]
    total = 0
    for peer in range(comm.size):
        for expert, rows in enumerate(problem.rows_of(peer)):
            for source, token, place in rows:
                row = wholes[0][source][token] @ wholes[1][peer][expert] @ wholes[2][peer][expert]
                factor = (torch.arange(len(row), device=comm.device) + token * len(row)) % 3 - 1
                total = total + (row * factor).sum() * wholes[3][source][token, place]
    total.backward()
    for found, whole in zip(mine, wholes):
        wanted = whole[comm.rank].grad
        wanted = torch.zeros_like(whole[comm.rank]) if wanted is None else wanted
        scale = float(wanted.norm()) / max(1, wanted.numel()) ** 0.5 or 1.0
        torch.testing.assert_close(found.grad.float() / scale, wanted / scale, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("sharded", [False, True], ids=["parts of experts", "whole experts"])
def test_gradients(ranks, world, sharded):
    ranks.run(check_gradients, world, sharded=sharded)


def check_module(comm, sharded):
    """A layer learns, compiled or not, and refuses what cannot be shared out."""
    idx = torch.randint(0, 2 * comm.size, (9, 2), generator=torch.Generator().manual_seed(comm.rank)).to(comm.device)
    over = ExpertParallel(comm, 9, 32, 2 * comm.size, 2) if sharded else comm
    layer = MoE(over, 32, 16 * comm.size, 2 * comm.size)
    x = torch.randn(9, 32, device=comm.device, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(9, 2, device=comm.device, requires_grad=True)
    eager = layer(x, idx, weights)
    eager.float().square().sum().backward()
    eagerly = [tensor.grad.clone() for tensor in (x, weights, layer.up, layer.down)]
    for tensor in (x, weights, layer.up, layer.down):
        tensor.grad = None
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, idx, weights)
    compiled.float().square().sum().backward()
    assert torch.equal(compiled, eager)
    for tensor, wanted in zip((x, weights, layer.up, layer.down), eagerly):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(tensor.grad, wanted, atol=1e-3, rtol=2e-2)
    with pytest.raises(tdccl.ArgumentError, match="expected a multiple" if not sharded else "is for"):
        MoE(over, 32, 16 * comm.size + 1, 2 * comm.size + sharded)


@pytest.mark.parametrize("sharded", [False, True], ids=["parts of experts", "whole experts"])
def test_layers_learn(ranks, sharded):
    ranks.run(check_module, min(2, pool.LARGEST_WORLD), sharded=sharded)


def check_refused(comm):
    idx = torch.zeros(4, 2, dtype=torch.int64, device=comm.device)
    x, b = torch.ones(4, 8, device=comm.device).bfloat16(), torch.ones(3, 8, 4, device=comm.device).bfloat16()
    with pytest.raises(tdccl.ArgumentError, match="topk_idx is"):
        route(comm, idx.float(), experts=3)
    with pytest.raises(tdccl.ArgumentError, match="topk_weights is"):
        route(comm, idx, idx, experts=3)
    with pytest.raises(tdccl.ArgumentError, match="experts is 0"):
        route(comm, idx, experts=0)
    routing = route(comm, idx, experts=3)
    with pytest.raises(tdccl.ArgumentError, match="rows is"):
        all_gather_grouped_gemm(x.float(), b, routing)
    with pytest.raises(tdccl.ArgumentError, match=r"expected \[4, K\] and \[3, K, N\]"):
        all_gather_grouped_gemm(x, b[:2], routing)
    with pytest.raises(tdccl.ArgumentError, match="out is"):
        grouped_gemm_reduce_scatter(x.new_ones(routing.rows, 8), b, routing, out=x)
    ep = ExpertParallel(comm, 2, 8, 2 * comm.size, 2)
    with pytest.raises(tdccl.ArgumentError, match="at most 2"):
        route_experts(ep, idx)


def test_what_cannot_be_multiplied_is_refused(ranks):
    ranks.run(check_refused, min(2, pool.LARGEST_WORLD))


def check_absent(comm):
    def prepare(group):
        problem = problem_of(comm, 1, "random", (8, 1, 16, 16))
        inputs = problem.x[comm.rank], problem.up[comm.rank], routing_of(group, problem)
        return lambda: all_gather_grouped_gemm(*inputs)

    check_told(comm, "moe", prepare)


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
def test_a_rank_that_never_comes_is_told(ranks):
    ranks.run(check_absent, 2)


def check_replay(comm, sharded):
    """A graph of both and their routing, replayed after new choices of experts and mixed with eager calls."""
    problem = problem_of(comm, 3, "random", (300, 2, 128, 256), sharded)
    idx, x = problem.idx[comm.rank], problem.x[comm.rank]
    y = torch.empty(len(x), 128, dtype=torch.bfloat16, device=comm.device)
    ep = ExpertParallel(comm, len(x), 128, problem.experts, 2) if sharded else None

    def layer():
        weights = problem.weights[comm.rank]
        routing = route_experts(ep, idx, weights) if sharded else route(comm, idx, weights, experts=problem.experts)
        h = all_gather_grouped_gemm(x, problem.up[comm.rank], routing)
        grouped_gemm_reduce_scatter(h, problem.down[comm.rank], routing, y)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
        layer()
    for change in (0, 1, 3):
        idx.add_(change).remainder_(problem.experts)
        if change == 3:
            idx.fill_(comm.rank)  # all tokens of a rank to one expert
        layer()
        eager = y.clone()
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, eager)
        everyone = comm.all_gather(idx)
        check_result(comm, problem._replace(idx=list(everyone.view(comm.size, *idx.shape))), y, 1.0)


@pytest.mark.skipif(environment.emulated(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("sharded", [False, True], ids=["parts of experts", "whole experts"])
def test_graphs_replay_with_other_routings(ranks, world, sharded):
    ranks.run(check_replay, world, sharded=sharded)


def test_kernels_multiply_on_tensor_cores_without_spills():
    program = Path(__file__).with_name("moe_variants.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == {
        "exchange_choices", "place_entries", "push_tokens", "reduce_rows", "multiply_arriving", "multiply_backwards",
        "multiply_rows",
    }  # fmt: skip
    for kernel in kernels:
        assert not kernel["spills"] and kernel["shared"] <= 227 << 10, kernel
        assert not kernel["divergent"], kernel
        if kernel["name"] in ("push_tokens", "reduce_rows"):
            assert "128" in kernel["loads"] and "128" in kernel["stores"] and not kernel["narrow"], kernel
        if kernel["name"].startswith("multiply"):
            assert kernel["wgmma"], kernel
            assert ("128" in kernel["stores"] and not kernel["narrow"]) or not kernel["by_descriptors"], kernel
