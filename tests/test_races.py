"""Many calls back to back: whatever the timing, the same right bits."""

import random
import time

import cases
import pytest
import reference
import torch

CALLS = 200


def dawdle(comm, seed):
    """Now and then, keeps this rank's host or its GPU from going on."""
    own = random.Random(seed * 31 + comm.rank)
    if own.random() < 0.1:
        time.sleep(own.random() * 0.02)
    if own.random() < 0.1 and comm.device.type == "cuda":
        torch.cuda._sleep(own.randrange(2_000_000))


def storm(comm, seed, alike=reference.same_bits):
    """Random collectives, sizes and dtypes, with random delays on random ranks; all ranks draw the same calls."""
    shared = random.Random(seed)
    results = []
    for call in range(CALLS):
        collective = shared.choice(["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "barrier"])
        dtype = shared.choice([torch.float32, torch.bfloat16, torch.int8, torch.float64])
        count = shared.choice([1, 5, 64, 1000, 4096, 20_000, 70_001])
        root = shared.randrange(comm.size)
        everyone = reference.inputs(seed * 1000 + call, comm.size, count * comm.size, dtype, comm.device)
        mine = slice(comm.rank * count, (comm.rank + 1) * count)
        send = everyone[comm.rank].clone()
        dawdle(comm, seed * 1000 + call)
        if collective == "all_reduce":
            results.append((call, comm.all_reduce(send), reference.ordered(everyone, "sum")))
        elif collective == "all_gather":
            results.append((call, comm.all_gather(send[:count]), torch.cat([values[:count] for values in everyone])))
        elif collective == "reduce_scatter":
            expected = reference.ordered([values[mine] for values in everyone], "sum")
            results.append((call, comm.reduce_scatter(send), expected))
        elif collective == "broadcast":
            results.append((call, comm.broadcast(send, root), everyone[root]))
        elif collective == "all_to_all":
            results.append((call, comm.all_to_all(send), torch.cat([values[mine] for values in everyone])))
        else:
            comm.barrier()
    for call, result, expected in results:
        assert alike(result, expected), f"seed {seed}, call {call}: {result.shape} {result.dtype}"


@pytest.mark.parametrize("seed", [1] if cases.FEW else [1, 2])
def test_back_to_back_calls_with_delays(ranks, seed, world):
    ranks.run(storm, world, seed=seed)


def repeat(comm):
    """The same input gives the same bits again and again, on every rank, by every algorithm."""
    x = reference.inputs(7, comm.size, 5000, torch.bfloat16, comm.device)[comm.rank]
    seen = {comm.all_reduce(x).cpu().view(torch.int16).sum().item() for _ in range(20)}
    return seen, comm.all_reduce(x).cpu()


def test_repeats_and_ranks_agree_on_the_bits(ranks, world):
    answers = ranks.run(repeat, world)
    assert all(len(seen) == 1 for seen, _ in answers)
    assert all(reference.same_bits(result, answers[0][1]) for _, result in answers)


def graphs(comm):
    """Two captured graphs and eager calls in any order, with inputs that change between replays."""
    stream = torch.cuda.Stream()
    x, y = (torch.zeros(70_001, device=comm.device) for _ in range(2))
    comm.all_reduce(x, y)
    captured = []
    for calls in (1, 2):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                comm.all_reduce(x, y)
                small = comm.all_reduce(x[:100])
        captured.append((graph, small))
    for step in range(30):
        graph, small = captured[(step * step // 3) % 2]
        x.fill_(comm.rank + step)
        graph.replay()
        expected = comm.size * step + sum(range(comm.size))
        eager = comm.all_gather(x[:10])
        torch.cuda.synchronize()
        assert (y == expected).all() and (small == expected).all(), step
        assert eager.view(comm.size, 10)[:, 0].tolist() == [rank + step for rank in range(comm.size)], step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_replay_with_new_inputs_mixed_with_eager_calls(ranks, world):
    ranks.run(graphs, world)


def streams(comm):
    """Calls from several streams, in every order, share one scratch."""
    choices = [torch.cuda.Stream() for _ in range(3)]
    order = random.Random(5)
    results = []
    for step in range(60):
        stream = order.choice(choices)
        with torch.cuda.stream(stream):
            x = torch.full((order.choice([10, 5000, 100_000]),), float(comm.rank + step), device=comm.device)
            results.append((step, comm.all_reduce(x, stream=order.choice([None, stream, stream.cuda_stream]))))
    torch.cuda.synchronize()
    for step, result in results:
        assert (result == comm.size * step + sum(range(comm.size))).all(), step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
def test_calls_from_several_streams(ranks, world):
    ranks.run(streams, world)
