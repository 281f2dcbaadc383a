"""What tensor-parallel layers end with: a product and its all-reduce, an all-reduce and its normalisation."""

import random
import time

import pool
import pytest
import torch

import tdccl
from tdccl import environment
from tdccl.overlap import all_reduce_rms_norm, gemm_all_reduce
from tdccl.overlap.all_reduce_rms_norm import algorithm_for
from tdccl.overlap.all_reduce_rms_norm import reference as all_reduce_rms_norm_reference

WORLDS = (2, 3)
# M, K, N: few rows in one shot, in two; more tiles than blocks; many rows; rows that no 16-byte access fits; one.
SHAPES = [(16, 64, 64), (31, 200, 72), (5, 40, 300), (70, 40, 72), (33, 7, 35), (1, 8, 8)]


def matrices(comm, shape, dtype, transposed: bool, seed: int):
    """(a, b) of every rank."""
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _rank in range(comm.size):
        a = torch.randn(rows, depth, generator=generator)
        b = torch.randn(*((columns, depth) if transposed else (depth, columns)), generator=generator)
        a, b = a.to(comm.device, dtype), b.to(comm.device, dtype)
        pairs.append((a, b.t() if transposed else b))
    return pairs


def same_on_all_ranks(comm, tensor) -> bool:
    everyone = comm.all_gather(tensor.contiguous().view(torch.int16).view(1, -1))
    return bool((everyone == everyone[0]).all())


def check_product(comm, shape, dtype, transposed, seed):
    pairs = matrices(comm, shape, dtype, transposed, seed)
    result = gemm_all_reduce(comm, *pairs[comm.rank])
    wanted = sum(a.float() @ b.float() for a, b in pairs)
    tolerance = (4e-2 if dtype is torch.bfloat16 else 6e-3) * (comm.size * shape[1]) ** 0.5
    assert result.dtype is dtype
    torch.testing.assert_close(result.float(), wanted, atol=tolerance, rtol=tolerance)
    assert same_on_all_ranks(comm, result), shape
    return result


def check_products(comm):
    delay = random.Random(comm.rank)
    for seed, shape in enumerate(SHAPES + SHAPES[:2]):  # larger and smaller ones in turns share memory and signals
        time.sleep(delay.choice([0, 0, 0.02]))
        check_product(comm, shape, (torch.bfloat16, torch.float16)[seed // 2 % 2], seed % 3 == 0, seed)


def test_products_of_ragged_shapes_with_ranks_that_come_late(ranks, world):
    ranks.run(check_products, world)


def norm_inputs(comm, rows, width, dtype, seed):
    """(x of every rank, residual, weight)."""
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(comm.size, rows, width, generator=generator).to(comm.device, dtype)
    residual, weight = torch.randn(rows, width, generator=generator), torch.rand(width, generator=generator)
    return xs, residual.to(comm.device, dtype), weight.to(comm.device, dtype)


# Rows, width: a row, few, more rows than blocks; so wide that no packets are used; no 16-byte access fits; one element.
ROWS = [(1, 64), (5, 40), (9, 96), (7, 600), (3, 37), (13, 1), (2, 20000)]


def check_norms(comm):
    delay = random.Random(comm.rank)
    taken = set()
    for seed, (rows, width) in enumerate(ROWS + ROWS[:3]):
        time.sleep(delay.choice([0, 0, 0.02]))
        dtype = (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
        xs, residual, weight = norm_inputs(comm, rows, width, dtype, seed)
        results = all_reduce_rms_norm(comm, xs[comm.rank], residual, weight, 1e-5)
        wanted = all_reduce_rms_norm_reference(comm, xs[comm.rank], residual, weight, 1e-5)
        assert torch.equal(results[1], wanted[1]), (rows, width)
        close = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
        torch.testing.assert_close(results[0], wanted[0], atol=close, rtol=close)
        assert all(same_on_all_ranks(comm, result) for result in results), (rows, width)
        taken.add(algorithm_for(rows, width, dtype.itemsize, comm.size))
    return taken


def test_norms_of_ragged_shapes_with_ranks_that_come_late(ranks, world):
    (taken, *_) = ranks.run(check_norms, world)
    assert taken == {"one_shot", "all_reduce"} | ({"two_shot"} if world > 2 else set())
