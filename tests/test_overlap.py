"""Communication fused with computation: the operators, the tile layer, and its swizzles."""

import random
import time

import pool
import pytest
import torch

from tdccl.overlap import all_gather_gemm, gemm_reduce_scatter

# Rows of a rank, K, N: whole tiles, ragged ones, rows that no 16-byte access fits, one row.
SHAPES = [(32, 64, 64), (37, 40, 72), (17, 33, 35), (1, 8, 8), (50, 7, 130)]
OPERATORS = {"all_gather_gemm": all_gather_gemm, "gemm_reduce_scatter": gemm_reduce_scatter}


def matrices(comm, operator: str, shape, dtype, transposed: bool, seed: int):
    """(a, b) of every rank."""
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _rank in range(comm.size):
        height = rows * (comm.size if operator == "gemm_reduce_scatter" else 1)
        a = torch.randn(height, depth, generator=generator)
        b = torch.randn(*((columns, depth) if transposed else (depth, columns)), generator=generator)
        pairs.append(
            (a.to(comm.device, dtype), b.t().to(comm.device, dtype) if transposed else b.to(comm.device, dtype))
        )
    return pairs


def expected(comm, operator: str, pairs) -> torch.Tensor:
    """What this rank should get, computed in fp32."""
    if operator == "all_gather_gemm":
        return torch.cat([a for a, _ in pairs]).float() @ pairs[comm.rank][1].float()
    return sum(a.float() @ b.float() for a, b in pairs).chunk(comm.size)[comm.rank]


def check(comm, operator: str, shape, dtype, transposed: bool, seed: int) -> torch.Tensor:
    pairs = matrices(comm, operator, shape, dtype, transposed, seed)
    result = OPERATORS[operator](comm, *pairs[comm.rank])
    wanted = expected(comm, operator, pairs)
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
    if operator == "gemm_reduce_scatter" and comm.device.type == "cpu":
        a, b = matrices(comm, operator, (37, 32, 40), torch.bfloat16, False, 7)[comm.rank]
        product = (a.float() @ b.float()).bfloat16()  # K is one step, which the interpreter multiplies in fp32
        assert torch.equal(results[0], comm.reduce_scatter(product))


@pytest.mark.parametrize("operator", OPERATORS)
def test_ragged_shapes_with_ranks_that_come_late(ranks, world, operator):
    ranks.run(check_shapes, world, operator=operator)


@pytest.mark.parametrize("operator", OPERATORS)
def test_bits_are_the_same_in_every_run(ranks, operator):
    ranks.run(check_bits, pool.LARGEST_WORLD, operator=operator)
