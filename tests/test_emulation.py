"""The interpreter's arithmetic gives what a GPU gives: types of results, wrapping around, broadcasting."""

import operator

import pytest
import torch
import triton
import triton.language as tl

from tdccl import environment

if not environment.emulated():
    pytest.skip("of the interpreter", allow_module_level=True)
import tdccl.runtime.emulation  # noqa: F401  which communicators import when they are made

OPERATORS = ["add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne"]
SIZE = 64


@triton.jit
def every_operator(left, right, result, SIZE: tl.constexpr, NUMBER: tl.constexpr):
    """Each operator's SIZE results as int64, one after the other."""
    place = tl.arange(0, SIZE)
    a = tl.load(left + place)
    b = tl.load(right + place) if NUMBER is None else NUMBER
    tl.store(result + place, (a + b).to(tl.int64))
    tl.store(result + SIZE + place, (a - b).to(tl.int64))
    tl.store(result + 2 * SIZE + place, (a * b).to(tl.int64))
    tl.store(result + 3 * SIZE + place, (a < b).to(tl.int64))
    tl.store(result + 4 * SIZE + place, (a <= b).to(tl.int64))
    tl.store(result + 5 * SIZE + place, (a > b).to(tl.int64))
    tl.store(result + 6 * SIZE + place, (a >= b).to(tl.int64))
    tl.store(result + 7 * SIZE + place, (a == b).to(tl.int64))
    tl.store(result + 8 * SIZE + place, (a != b).to(tl.int64))


@pytest.mark.parametrize("number", [None, 3, -7, 1 << 30], ids=str)
@pytest.mark.parametrize("right", [torch.int32, torch.int64, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("left", [torch.int32, torch.int64], ids=str)
def test_arithmetic_of_integers(left, right, number):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-(1 << 31), (1 << 31) - 1, (SIZE,), generator=generator).to(left)
    b = torch.randint(0, 200, (SIZE,), generator=generator).to(right)
    b[: SIZE // 2] = a[: SIZE // 2].to(right)
    result = torch.zeros(len(OPERATORS), SIZE, dtype=torch.int64)
    every_operator[(1,)](a, b, result, SIZE=SIZE, NUMBER=number)
    other = b if number is None else number
    for row, name in zip(result, OPERATORS):
        expected = getattr(operator, name)(a, other).to(torch.int64)
        if right is torch.float32 and number is None and name in ("add", "sub", "mul"):
            assert torch.allclose(row.double(), expected.double()), name
        else:
            assert torch.equal(row, expected), f"{name}: {row[row != expected]} for {expected[row != expected]}"


@triton.jit
def broadcasting(matrix, scalar, result, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """result = matrix[i, j] where the scalar is not above i * j, else -1: by pointers and masks of all shapes."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    least = tl.load(scalar)
    place = i[:, None] * COLUMNS + j[None, :]
    wanted = (i[:, None] * j[None, :] >= least) & (i < ROWS)[:, None] & (least >= 0)
    values = tl.load(matrix + i.to(tl.int64)[:, None] * COLUMNS + j[None, :], mask=wanted, other=-1)
    tl.store(result + place, values)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_broadcasting_of_pointers_and_masks(dtype):
    matrix = torch.randint(0, 100, (16, 64), generator=torch.Generator().manual_seed(1))
    result = torch.zeros_like(matrix)
    broadcasting[(1,)](matrix, torch.tensor([99], dtype=dtype), result, ROWS=16, COLUMNS=64)
    kept = torch.arange(16)[:, None] * torch.arange(64)[None, :] >= 99
    assert torch.equal(result, torch.where(kept, matrix, -1))
