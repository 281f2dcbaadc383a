"""What tensor-parallel layers end with: a product and its all-reduce, an all-reduce and its normalisation."""

import random
import time

import pool
import pytest
import torch

import tdccl
from tdccl import environment
from tdccl.overlap import gemm_all_reduce

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
