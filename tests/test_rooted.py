"""reduce, gather, scatter and uneven all_gather: right bits at the root, nothing written elsewhere."""

import random

import cases
import pytest
import reference
import torch

import tdccl

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float64]


def poisoned(comm, count, dtype):
    return torch.full((count * dtype.itemsize,), 0x5A, dtype=torch.uint8, device=comm.device).view(dtype)


def untouched(tensor) -> bool:
    return bool((tensor.view(torch.uint8) == 0x5A).all())


def check_reduce(comm, dtype):
    for seed, count in enumerate([1, 7, 1000, 4097, 30_011, (cases.SCRATCH_MB << 20) // dtype.itemsize + 5]):
        root = seed % comm.size
        everyone = reference.inputs(seed, comm.size, count, dtype, comm.device)
        expected = reference.ordered(everyone, "sum")
        send, recv = everyone[comm.rank].clone(), poisoned(comm, count, dtype)
        result = comm.reduce(send, recv, "sum", root)
        in_place = comm.reduce(send, send, "sum", root)
        made = comm.reduce(everyone[comm.rank], op="sum", root=root)
        if comm.rank == root:
            assert result is recv and in_place is send
            assert all(reference.same_bits(each, expected) for each in (recv, send, made)), (dtype, count)
        else:
            assert result is in_place is made is None
            assert untouched(recv) and reference.same_bits(send, everyone[comm.rank]), (dtype, count)
        comm._bootstrap.barrier()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_gives_the_bits_of_all_reduce_at_the_root(ranks, dtype, world):
    ranks.run(check_reduce, world, dtype=dtype)


def check_moves(comm):
    for seed, count in enumerate([0, 1, 7, 1000, 20_011]):
        root, dtype = seed % comm.size, [torch.float32, torch.uint8, torch.complex128][seed % 3]
        everyone = reference.inputs(seed, comm.size, count * comm.size, dtype, comm.device)
        gathered = comm.gather(everyone[comm.rank][:count], None, root)
        if comm.rank == root:
            assert reference.same_bits(gathered, torch.cat([values[:count] for values in everyone]))
        else:
            assert gathered is None
        share = poisoned(comm, count, dtype)
        assert comm.scatter(everyone[root] if comm.rank == root else None, share, root) is share
        assert reference.same_bits(share, everyone[root][comm.rank * count : (comm.rank + 1) * count])
        comm._bootstrap.barrier()


def test_gather_and_scatter(ranks, world):
    ranks.run(check_moves, world)


def check_uneven(comm):
    shared = random.Random(3)
    for step in range(6):
        rows = [shared.choice([0, 1, 5, 800]) for _ in range(comm.size)]
        everyone = reference.inputs(step, comm.size, 800 * 3, torch.bfloat16, comm.device)
        pieces = [values.view(-1, 3)[:count] for values, count in zip(everyone, rows)]
        result = comm.all_gather(pieces[comm.rank], None, rows)
        assert reference.same_bits(result, torch.cat(pieces)), rows
        comm._bootstrap.barrier()
    x = torch.ones(3, 2, device=comm.device)
    for call, text in (
        (lambda: comm.all_gather(x, None, [3] * (comm.size + 1)), "recv_splits"),
        (lambda: comm.all_gather(x, None, [2] * comm.size), "send has 3 rows"),
        (lambda: comm.reduce(x, root=comm.size), "root is"),
        (lambda: comm.gather(x, x[:1], comm.rank), "gather: recv has 2 elements"),
        (lambda: comm.scatter(x[:1], x, comm.rank), "scatter: send has 2 elements"),
    ):
        with pytest.raises(tdccl.ArgumentError, match=text):
            call()


def test_uneven_all_gather(ranks, world):
    ranks.run(check_uneven, world)


def check_uneven_reduction(comm, dtype):
    shared = random.Random(5)
    for step in range(4):
        rows = [shared.choice([0, 1, 5, 300]) for _ in range(comm.size)]
        everyone = reference.inputs(step, comm.size, sum(rows) * 3, dtype, comm.device)
        expected = reference.ordered(everyone, "sum").view(-1, 3).split(rows)[comm.rank]
        send = everyone[comm.rank].view(-1, 3)
        assert reference.same_bits(comm.reduce_scatter(send, None, "sum", rows), expected), rows
        recv = poisoned(comm, rows[comm.rank] * 3, dtype)
        assert comm.reduce_scatter(send, recv, send_splits=rows) is recv
        assert reference.same_bits(recv, expected.reshape(-1)), rows
        comm._bootstrap.barrier()
    x = torch.ones(3, 2, device=comm.device)
    for call, text in (
        (lambda: comm.reduce_scatter(x, send_splits=[3] * (comm.size + 1)), "send_splits is"),
        (lambda: comm.reduce_scatter(x, send_splits=[2] * comm.size), "sum.send_splits. = "),
        (lambda: comm.reduce_scatter(x, x.flatten()[:1], send_splits=[3] + [0] * (comm.size - 1)), "by send_splits"),
    ):
        with pytest.raises(tdccl.ArgumentError, match=text):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_uneven_reduce_scatter(ranks, world, dtype):
    ranks.run(check_uneven_reduction, world, dtype=dtype)
