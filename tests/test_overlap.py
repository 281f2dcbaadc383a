"""Communication fused with computation: the operators, the tile layer, and its swizzles."""

import gc
import itertools
import json
import random
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from unittest import mock

import pool
import pytest
import torch
import triton
import triton.language as tl
from waiting import check_told

import tdccl
from tdccl import environment
from tdccl.language import overlap
from tdccl.overlap import all_gather_gemm, all_to_all_gemm, gemm_all_to_all, gemm_reduce_scatter

# Rows of a rank, K, N: whole tiles, ragged ones, rows that no 16-byte access fits, one row.
SHAPES = [(32, 64, 64), (37, 40, 72), (17, 33, 35), (1, 8, 8), (50, 7, 130)]
COPIED = (80, 16, 16) if environment.emulated() else (2100, 1096, 1096)  # so large that copy engines move it
if not environment.emulated():
    SHAPES += [(2100, 1100, 1096), (1500, 2048, 2056)]
OPERATORS = {
    "all_gather_gemm": all_gather_gemm,
    "gemm_reduce_scatter": gemm_reduce_scatter,
    "gemm_all_to_all": gemm_all_to_all,
    "all_to_all_gemm": all_to_all_gemm,
}
WORLDS = (2, 3)


def matrices(comm, operator: str, shape, dtype, transposed: bool, seed: int):
    """(a, b) of every rank."""
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _rank in range(comm.size):
        height = rows * (comm.size if operator in ("gemm_reduce_scatter", "all_to_all_gemm") else 1)
        a = torch.randn(height, depth, generator=generator)
        inner = depth * (comm.size if operator == "all_to_all_gemm" else 1)
        outer = columns * (comm.size if operator == "gemm_all_to_all" else 1)
        b = torch.randn(*((outer, inner) if transposed else (inner, outer)), generator=generator)
        pairs.append(
            (a.to(comm.device, dtype), b.t().to(comm.device, dtype) if transposed else b.to(comm.device, dtype))
        )
    return pairs


def expected(comm, operator: str, pairs, rank: int) -> torch.Tensor:
    """What a rank should get, computed in fp32."""
    if operator == "all_gather_gemm":
        return torch.cat([a for a, _ in pairs]).float() @ pairs[rank][1].float()
    if operator == "gemm_all_to_all":
        return torch.cat([a.float() @ b.float().chunk(comm.size, 1)[rank] for a, b in pairs])
    if operator == "all_to_all_gemm":
        return torch.cat([a.chunk(comm.size)[rank] for a, _ in pairs], 1).float() @ pairs[rank][1].float()
    return sum(a.float() @ b.float() for a, b in pairs).chunk(comm.size)[rank]


def check(comm, operator: str, shape, dtype, transposed: bool, seed: int) -> torch.Tensor:
    pairs = matrices(comm, operator, shape, dtype, transposed, seed)
    result = OPERATORS[operator](comm, *pairs[comm.rank])
    wanted = expected(comm, operator, pairs, comm.rank)
    tolerance = 4e-2 if dtype is torch.bfloat16 else 6e-3
    scale = shape[1] ** 0.5
    assert result.dtype is dtype and result.shape == wanted.shape
    torch.testing.assert_close(result.float() / scale, wanted / scale, atol=tolerance, rtol=tolerance)
    return result


def check_shapes(comm, operator):
    delay = random.Random(comm.rank)
    for seed, shape in enumerate(SHAPES + SHAPES[:2]):  # larger and smaller ones in turns share memory and signals
        time.sleep(delay.choice([0, 0, 0.02]))
        dtype = (torch.bfloat16, torch.float16)[seed // 2 % 2]
        check(comm, operator, shape, dtype, seed % 3 == 0, seed)


def check_bits(comm, operator):
    """The same bits in every run; those of gemm_reduce_scatter are those of a product and then reduce_scatter."""
    delay = random.Random(comm.rank)
    results = []
    for _ in range(3):
        time.sleep(delay.choice([0, 0, 0.02]))
        results.append(check(comm, operator, (37, 32, 40), torch.bfloat16, False, 7))
    assert all(torch.equal(result, results[0]) for result in results)
    plain = import_module(f"tdccl.overlap.{operator}").reference
    wanted = plain(comm, *matrices(comm, operator, (37, 32, 40), torch.bfloat16, False, 7)[comm.rank])
    torch.testing.assert_close(results[0], wanted, atol=0.2, rtol=0.04)
    if operator == "gemm_reduce_scatter" and comm.device.type == "cpu":
        a, b = matrices(comm, operator, (37, 32, 40), torch.bfloat16, False, 7)[comm.rank]
        product = (a.float() @ b.float()).bfloat16()  # K is one step, which the interpreter multiplies in fp32
        assert torch.equal(results[0], comm.reduce_scatter(product))


@pytest.mark.parametrize("operator", OPERATORS)
def test_ragged_shapes_with_ranks_that_come_late(ranks, world, operator):
    ranks.run(check_shapes, world, operator=operator)


def check_one_multiprocessor(comm):
    """What runs beside a product is refused before anything is launched; the rest works on one block."""
    group = comm.split(0)
    with mock.patch.object(group, "multiprocessors", 1):
        for operator, shape in itertools.product(OPERATORS, [(37, 40, 72), COPIED]):
            if operator in ("gemm_reduce_scatter", "gemm_all_to_all"):
                check(group, operator, shape, torch.bfloat16, False, 1)
            else:
                with pytest.raises(tdccl.ArgumentError, match=f"{operator}: a rank has 1 multiprocessor"):
                    check(group, operator, shape, torch.bfloat16, False, 1)
    assert group.all_reduce(torch.ones(4, device=group.device))[0] == group.size
    group.destroy()


def test_on_one_multiprocessor_nothing_runs_beside_a_product(ranks):
    ranks.run(check_one_multiprocessor, 2)


@pytest.mark.parametrize("operator", OPERATORS)
def test_bits_are_the_same_in_every_run(ranks, operator):
    ranks.run(check_bits, pool.LARGEST_WORLD, operator=operator)


@triton.jit
def orders(team, listed, rows, tiles, total, TILE: tl.constexpr, NODE: tl.constexpr):
    """Each swizzle's order, a row each."""
    for position in range(tl.num_programs(0) * 0, tiles * team.size):
        tl.store(listed + position, overlap.from_own_rank(team, position, tiles))
        tl.store(listed + 1000 + position, overlap.from_next_rank(team, position, tiles))
        tl.store(listed + 4000 + position, overlap.from_other_node(team, position, tiles, NODE))
    for position in range(tl.num_programs(0) * 0, total):
        tl.store(listed + 2000 + position, overlap.straddling_last(team, position, rows, TILE))
        tl.store(listed + 3000 + position, overlap.straddling_first(team, position, rows, TILE))


def check_orders(comm):
    for rows, tile in [(8, 4), (10, 4), (7, 4), (3, 4), (1, 4), (13, 8), (9, 16), (5, 1)]:
        tiles, total = -(-rows // tile), -(-rows * comm.size // tile)
        listed = torch.full((5, 1000), -1, dtype=torch.int32, device=comm.device)
        node = 2 if comm.size % 2 == 0 else 1
        orders[(1,)](comm.team, listed, rows, tiles, total, TILE=tile, NODE=node)
        own, following, last, first, other_node = listed.tolist()
        ranks = [(comm.rank + step) % comm.size for step in range(comm.size + 1)]
        assert own[: tiles * comm.size] == [r * tiles + t for r in ranks[:-1] for t in range(tiles)]
        assert following[: tiles * comm.size] == [r * tiles + t for r in ranks[1:] for t in range(tiles)]
        owned = [tile // tiles for tile in other_node[: tiles * comm.size : tiles]]
        assert other_node[: tiles * comm.size] == [r * tiles + t for r in owned for t in range(tiles)]
        assert sorted(owned) == [*range(comm.size)] and owned[-1] == comm.rank
        assert {rank // node for rank in owned[-node:]} == {comm.rank // node}
        assert owned[0] // node == (comm.rank // node + 1) % (comm.size // node)
        owners = {
            t: {min(row, rows * comm.size - 1) // rows for row in (t * tile, t * tile + tile - 1)} for t in range(total)
        }
        straddling = [t for t in owners if len(owners[t]) > 1]

        def whole(order, owners=owners):
            return [t for rank in order for t in owners if owners[t] == {rank}]

        assert last[:total] == whole(ranks[:-1]) + straddling, (rows, tile)
        assert first[:total] == straddling + whole(ranks[1:]), (rows, tile)


def test_swizzles(ranks, world):
    ranks.run(check_orders, world)


@triton.jit
def places(shards, listed):
    """Where the tiles of two ranks begin, and how many elements they have, by the variable of a loop itself."""
    for tile in range(2 * overlap.tiles_of(shards)):
        tl.store(listed + 2 * tile, overlap.offset_of(shards, tile))
        tl.store(listed + 2 * tile + 1, overlap.elements_of(shards, tile))


def check_places(comm):
    listed = torch.zeros(4, 2, dtype=torch.int64, device=comm.device)
    places[(1,)](overlap.shards_of(7, 12, 4), listed)
    assert listed.tolist() == [[0, 48], [48, 36], [96, 48], [144, 36]]


def test_a_loop_over_tiles_asks_where_they_are(ranks):
    ranks.run(check_places, 1)


@triton.jit
def pull_all(team, epochs, shards, signals, x, gathered, result, PIECE: tl.constexpr):
    """Every rank offers its tiles, and fetches all the others' when they are told of."""
    epoch = overlap.begin(team, epochs)
    tiles = overlap.tiles_of(shards)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        mine = team.rank * tiles + tile
        overlap.push(shards, x, gathered, mine, team.rank, tl.float32, PIECE)
        for pe in range(team.size):
            overlap.notify(shards, signals, mine, pe, epoch)
    for step in range(team.size):
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            theirs = overlap.from_own_rank(team, step * tiles + tile, tiles)
            if overlap.wait(team, shards, signals, theirs, epoch):
                overlap.pull(shards, gathered, result, theirs, overlap.owner_of(shards, theirs), tl.float32, PIECE)
    overlap.end(epochs, epoch)


def check_pull(comm):
    for rows, columns, tile in [(8, 5, 4), (7, 12, 4), (1, 1, 16)]:
        shards = overlap.shards_of(rows, columns, tile)
        padded = -(-rows // tile) * tile
        gathered, signals = comm.empty((comm.size, padded, columns)), comm.empty((comm.size, 8), torch.int64)
        epochs = torch.zeros(2, dtype=torch.int64, device=comm.device)
        result = torch.zeros(comm.size, padded, columns, device=comm.device)
        symmetric = comm.symmetric(signals), comm.symmetric(gathered)
        for round in range(2):
            wanted = torch.arange(comm.size * rows * columns, dtype=torch.float32, device=comm.device)
            wanted = wanted.view(comm.size, rows, columns) + round
            x = wanted[comm.rank].clone()
            pull_all[(2,)](comm.team, epochs, shards, symmetric[0], x, symmetric[1], result, PIECE=16)
            assert torch.equal(result[:, :rows], wanted)
            comm.barrier()


def test_tiles_are_pulled(ranks, world):
    ranks.run(check_pull, world)


def check_gradients(comm):
    """Against the same in one process, in fp32."""
    for operator in OPERATORS:
        pairs = matrices(comm, operator, (19, 24, 40), torch.bfloat16, "reduce" in operator, 3)
        a, b = (tensor.clone().requires_grad_() for tensor in pairs[comm.rank])
        result = OPERATORS[operator](comm, a, b)
        weight = torch.arange(result.numel(), device=comm.device).view_as(result) % 3 - 1.0
        (result * weight).float().sum().backward()
        wholes = [[tensor.float().requires_grad_() for tensor in pair] for pair in pairs]
        sum((expected(comm, operator, wholes, rank) * weight).sum() for rank in range(comm.size)).backward()
        for mine, whole in zip((a, b), wholes[comm.rank]):
            torch.testing.assert_close(mine.grad.float(), whole.grad, atol=0.5, rtol=0.05)


def test_gradients(ranks, world):
    ranks.run(check_gradients, world)


def check_refused(comm):
    a, b = (torch.ones(shape, dtype=torch.bfloat16, device=comm.device) for shape in ((4, 8), (8, 4)))
    with pytest.raises(tdccl.ArgumentError, match="bfloat16 or float16"):
        all_gather_gemm(comm, a.float(), b.float())
    with pytest.raises(tdccl.ArgumentError, match="as many columns"):
        all_gather_gemm(comm, b, b)
    with pytest.raises(tdccl.ArgumentError, match="multiple of the 3 ranks"):
        gemm_reduce_scatter(comm, a, b)
    with pytest.raises(tdccl.ArgumentError, match="b has 4 columns, expected a multiple of the 3 ranks"):
        gemm_all_to_all(comm, a, b)
    with pytest.raises(tdccl.ArgumentError, match="3 times as many rows of b"):
        all_to_all_gemm(comm, a[:3], b)
    with pytest.raises(tdccl.ArgumentError, match="out is"):
        all_gather_gemm(comm, a, b, out=b)


def test_what_cannot_be_multiplied_is_refused(ranks):
    if pool.LARGEST_WORLD < 3:
        pytest.skip("needs 3 ranks")
    ranks.run(check_refused, 3)


def test_kernels_multiply_on_tensor_cores_without_spills():
    program = Path(__file__).with_name("fused_variants.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    pushing, multiplying = {"push_shard", "push_rows"}, {"gathered", "scattered", "exchanged", "collected"}
    assert {kernel["name"] for kernel in kernels} == pushing | {f"multiply_{name}" for name in multiplying}
    for kernel in kernels:
        assert not any(kernel["spills_in_loops"]) and kernel["shared"] <= 227 << 10, kernel
        assert kernel["spills"] <= 2, kernel  # Triton 3.6 puts a word aside at the start of one
        assert not kernel["divergent"], kernel
        if kernel["name"] in pushing:
            assert "128" in kernel["loads"] and "128" in kernel["stores"], kernel
        else:
            assert kernel["wgmma"], kernel
            assert "128" in kernel["stores"] or not kernel["by_descriptors"], kernel


def check_absent(comm, operator, shape):
    a, b = matrices(comm, operator, shape, torch.bfloat16, False, 1)[comm.rank]
    check_told(comm, f"{operator}{shape[0]}", lambda group: lambda: OPERATORS[operator](group, a, b))


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
@pytest.mark.parametrize("shape", [(20, 16, 16), COPIED], ids=["pushed", "copied"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_rank_that_never_comes_is_told(ranks, operator, shape):
    ranks.run(check_absent, 2, operator=operator, shape=shape)


def check_compiled(comm):
    """torch.compile sees the operators, their shapes and their gradients, and which communicator they are given."""
    a, b = matrices(comm, "all_gather_gemm", (8, 16, 24), torch.bfloat16, False, 5)[comm.rank]

    def layer(group, x, up):
        return gemm_reduce_scatter(group, all_gather_gemm(group, x, up).relu(), up.t())

    def turned(group, x, up):
        return gemm_all_to_all(group, all_to_all_gemm(group, x, up.t()), up)

    wide = b.repeat(1, 2 * comm.size)[:, : a.shape[1] * comm.size]
    for body, pair, groups in ((layer, (a, b), (comm, comm.split(comm.rank), comm)), (turned, (a, wide), (comm,))):
        compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
        for group in groups:
            results = []
            for call in (compiled, body):  # the compiled one first: nothing need be there before it
                leaves = [tensor.clone().requires_grad_() for tensor in pair]
                result = call(group, *leaves)
                result.sum().backward()
                results.append((result, *(leaf.grad for leaf in leaves)))
            for mine, eager in zip(*results):
                assert torch.equal(mine, eager), (body.__name__, group)


def test_torch_compile_sees_the_operators(ranks):
    ranks.run(check_compiled, min(2, pool.LARGEST_WORLD))


def check_second_order(comm):
    a, b = (torch.ones(2, 2, dtype=torch.bfloat16, device=comm.device, requires_grad=True) for _ in range(2))
    gradients = torch.autograd.grad(all_gather_gemm(comm, a, b).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gather_rows"):
        gradients[0].sum().backward()


def test_gradients_of_gradients_are_refused(ranks):
    ranks.run(check_second_order, min(2, pool.LARGEST_WORLD))


def check_gone(comm):
    a, b = (torch.ones(2, 2, dtype=torch.bfloat16, device=comm.device, requires_grad=True) for _ in range(2))
    group = comm.split(comm.rank)
    result = all_gather_gemm(group, a, b)
    group.destroy()
    del group
    gc.collect()
    with pytest.raises(tdccl.DestroyedError, match="is gone"):
        result.sum().backward()


def test_a_gradient_after_the_communicator_is_gone_is_refused(ranks):
    ranks.run(check_gone, min(2, pool.LARGEST_WORLD))


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
def test_a_pass_of_the_compiler_finds_the_patterns():
    program = str(Path(__file__).with_name("compiled_products.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launcher, program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count(": ok") == 2, done.stdout + done.stderr


def check_replay(comm, shape):
    """A graph of both, replayed after new input and mixed with eager calls."""
    rows, depth, columns = shape
    a, b = matrices(comm, "all_gather_gemm", shape, torch.bfloat16, False, 6)[comm.rank]
    down = b.t().contiguous()
    hidden = torch.empty(comm.size * rows, columns, dtype=torch.bfloat16, device=comm.device)
    result = torch.empty(rows, depth, dtype=torch.bfloat16, device=comm.device)

    def layer():
        all_gather_gemm(comm, a, b, hidden)
        gemm_reduce_scatter(comm, hidden, down, result)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
        layer()
    for factor in (1, 2, -1):
        a.mul_(factor)
        layer()
        eager = hidden.clone(), result.clone()
        hidden.zero_()
        result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(hidden, eager[0]) and torch.equal(result, eager[1])


@pytest.mark.parametrize("shape", [(200, 128, 264), COPIED], ids=["pushed", "copied"])
@pytest.mark.skipif(environment.emulated(), reason="CUDA graphs need a GPU")
def test_graphs_replay(ranks, world, shape):
    ranks.run(check_replay, world, shape=shape)
