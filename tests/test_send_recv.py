"""Messages between two ranks: any size and dtype, both ways at once, many in flight, and nobody else takes part."""

import random
import time

import pytest
import reference
import torch
from waiting import settle, settle_all

import tdccl

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.complex128, torch.float8_e4m3fn]


def message(comm, seed, source, count, dtype):
    return reference.inputs(seed * 31 + source, 1, count, dtype, comm.device)[0]


def check_ring(comm):
    """Every rank sends to the next and receives from the last, in one call and in two."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for seed, (dtype, count) in enumerate([(d, c) for d in DTYPES for c in (1, 7, 1000, 70_001)]):
        mine, expected = (message(comm, seed, rank, count, dtype) for rank in (comm.rank, left))
        into = torch.full((count + 2,), 3, device=comm.device).to(dtype)
        before = into.clone()
        if count > 1000 or seed % 2 or comm.size == 1:
            comm.send_recv([(mine, right)], [(into[1:-1], left)])
        elif comm.rank % 2:
            comm.send(mine, right)
            comm.recv(into[1:-1], left)
        else:
            comm.recv(into[1:-1], left) if comm.rank + 1 < comm.size or comm.size % 2 == 0 else comm.send(mine, right)
            comm.send(mine, right) if comm.rank + 1 < comm.size or comm.size % 2 == 0 else comm.recv(into[1:-1], left)
        settle_all(comm)
        assert reference.same_bits(into[1:-1], expected), (dtype, count)
        assert reference.same_bits(into[:1], before[:1]) and reference.same_bits(into[-1:], before[-1:])


def test_ring_in_any_dtype_and_size(ranks, world):
    ranks.run(check_ring, world)


def check_pair_alone(comm):
    """Ranks 0 and 1 exchange while the others do nothing, far more than the channel holds."""
    if comm.rank > 1 or comm.size < 2:
        return
    for number in range(3):
        count = 300_001
        if comm.rank == 0:
            comm.send(message(comm, number, 0, count, torch.float32), 1)
        else:
            if number == 1:
                time.sleep(0.2)
            got = comm.recv(torch.empty(count, device=comm.device), 0)
            assert reference.same_bits(got, message(comm, number, 0, count, torch.float32)), number
    settle(comm)


def test_a_pair_needs_nobody_else(ranks, world):
    ranks.run(check_pair_alone, world)


def check_storm(comm, seed):
    """Random batches between random pairs, several messages a pair, with collectives and delays in between."""
    shared, own = random.Random(seed), random.Random(seed * 31 + comm.rank)
    for step in range(12):
        planned = [
            (shared.randrange(comm.size), shared.randrange(comm.size), shared.choice([1, 33, 4096, 20_000]))
            for _ in range(shared.randrange(1, 7))
        ]
        if own.random() < 0.3:
            time.sleep(own.random() * 0.02)
        sends, recvs, expected = [], [], []
        for number, (source, target, count) in enumerate(planned):
            values = message(comm, seed * 1000 + step * 50 + number, source, count, torch.int32)
            if source == comm.rank:
                sends.append((values, target))
            if target == comm.rank:
                recvs.append((torch.empty_like(values), source))
                expected.append(values)
        comm.send_recv(sends, recvs)
        total = comm.all_reduce(torch.ones(5, device=comm.device))
        for (got, source), values in zip(recvs, expected):
            assert reference.same_bits(got, values), (seed, step, source)
        assert (total == comm.size).all()


@pytest.mark.parametrize("seed", range(3))
def test_random_batches_between_random_pairs(ranks, seed, world):
    ranks.run(check_storm, world, seed=seed)


def check_bad_messages(comm):
    x = torch.ones(4, device=comm.device)
    for call, text in (
        (lambda: comm.send(x, comm.size), "the other rank is"),
        (lambda: comm.recv(x, -1), "the other rank is"),
        (lambda: comm.send(torch.ones(4, 4, device=comm.device).t(), 0), "not contiguous"),
        (lambda: comm.send_recv([(x, comm.rank)], [(x[:2], comm.rank)]), "sends itself"),
    ):
        with pytest.raises(tdccl.ArgumentError, match=text):
            call()
    comm.send_recv([(x * 3, comm.rank)], [(x, comm.rank)])
    assert (x == 3).all()
    comm.send(x[:0], 0)


def test_bad_messages_are_refused(ranks, world):
    ranks.run(check_bad_messages, world)


def check_graph(comm):
    """Captured transfers replay with new values."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    x, y = torch.zeros(50_000, device=comm.device), torch.zeros(50_000, device=comm.device)
    comm.send_recv([(x, right)], [(y, left)])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.send_recv([(x, right)], [(y, left)])
    for step in range(10):
        x.fill_(comm.rank + 10 * step)
        graph.replay()
        torch.cuda.synchronize()
        assert (y == left + 10 * step).all(), step
        comm._bootstrap.barrier()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_transfers_in_a_graph(ranks, world):
    ranks.run(check_graph, world)
