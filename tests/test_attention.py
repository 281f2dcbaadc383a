"""Attention over what the ranks have of keys and values, against plain fp32 attention over all of it."""

import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pool
import pytest
import torch
from waiting import check_told, settle_all

import tdccl
from tdccl import environment
from tdccl.overlap import flash_decode, gather_kv_attention
from tdccl.overlap.attention import attend
from tdccl.overlap.gather_kv_attention import positions
from tdccl.overlap.gather_kv_attention import reference as plain_prefill
from tdccl.overlap.workspace import _kept

WORLDS = (2, 3)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def close(result: torch.Tensor, wanted: torch.Tensor) -> None:
    assert result.shape == wanted.shape and result.dtype == wanted.dtype
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result.float(), wanted.float(), atol=tolerance, rtol=tolerance)


# Heads, KV heads, dim, and each rank's lengths of each sequence, by the place of the rank.
DECODES = [
    (4, 2, 64, [[70, 1], [5, 0], [33, 64], [0, 8]]),
    (3, 3, 128, [[0], [130], [17], [2]]),
    (16, 1, 64, [[3, 0, 9], [0, 0, 40], [65, 0, 1], [1, 0, 1]]),
]


def decode_problem(comm, case, dtype, seed):
    """(q, [(k, v, lengths) of each rank]); what is past the lengths is NaN, for nobody may look at it."""
    heads, kv_heads, dim, lengths = case
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(lengths[0]), heads, dim, generator=generator).to(comm.device, dtype)
    shards = []
    for mine in lengths[: comm.size]:
        room = max(mine) + 3 * (mine[0] % 2)
        pair = torch.randn(2, len(mine), room, kv_heads, dim, generator=generator).to(comm.device, dtype)
        for sequence, length in enumerate(mine):
            pair[:, sequence, length:] = float("nan")
        shards.append((*pair, torch.tensor(mine, dtype=torch.int32, device=comm.device)))
    return q, shards


def decode_expected(q, shards):
    """All ranks' keys one after another, in one attention."""
    rows = []
    for sequence in range(q.shape[0]):
        k, v = (torch.cat([shard[part][sequence, : shard[2][sequence]] for shard in shards])[None] for part in range(2))
        seen = torch.ones(1, dtype=torch.bool, device=q.device)
        rows.append(attend(q[sequence][None, None], k, v, seen, q.shape[-1] ** -0.5)[0, 0])
    return torch.stack(rows)


def check_decode(comm):
    delay = random.Random(comm.rank)
    for seed, case in enumerate(DECODES):
        time.sleep(delay.choice([0, 0, 0.02]))
        q, shards = decode_problem(comm, case, (torch.bfloat16, torch.float16)[seed % 2], seed)
        result = flash_decode(comm, q, *shards[comm.rank])
        close(result, decode_expected(q, shards))
        same = comm.all_gather(result)
        assert all(torch.equal(other, result) for other in same.chunk(comm.size))
        assert torch.equal(flash_decode(comm, q, *shards[comm.rank], torch.empty_like(q)), result)


def test_decode_over_ragged_lengths_gives_all_ranks_the_same_bits(ranks, world):
    ranks.run(check_decode, world)


# Sequences, positions of a rank, heads, KV heads, dim, causal, zig-zag: whole tiles, ragged ones, few positions.
PREFILLS = [
    (1, 64, 2, 1, 64, True, True),
    (2, 46, 3, 3, 64, True, True),
    (1, 35, 4, 2, 128, True, False),
    (2, 19, 2, 2, 64, False, False),
    (1, 2, 1, 1, 64, True, True),
    (1, 40, 2, 1, 64, False, True),
]


def prefill_problem(comm, case, dtype, seed):
    """Each rank's (q, k, v)."""
    batch, rows, heads, kv_heads, dim, *_ = case
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(batch, rows, count, dim, generator=generator).to(comm.device, dtype)
            for count in (heads, kv_heads, kv_heads)
        ]
        for _ in range(comm.size)
    ]


def in_order(comm, case, shards):
    """The ranks' shards, joined in the order of their positions."""
    order = torch.cat([positions(comm, rank, case[1], case[6]) for rank in range(comm.size)])
    assert order.sort().values.tolist() == list(range(case[1] * comm.size))
    joined = torch.cat(shards, dim=1)
    return torch.empty_like(joined).index_copy_(1, order, joined)


def attend_whole(comm, case, q, k, v):
    """All of it in one attention."""
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=comm.device)
    return attend(q, k, v, seen.tril() if case[5] else seen, case[4] ** -0.5)


def prefill_expected(comm, case, shards):
    """This rank's rows of it."""
    result = attend_whole(comm, case, *(in_order(comm, case, part) for part in zip(*shards)))
    return result[:, positions(comm, comm.rank, case[1], case[6])]


def check_prefill(comm):
    delay = random.Random(comm.rank)
    for seed, case in enumerate(PREFILLS + PREFILLS[:1]):  # larger and smaller ones in turns share memory and signals
        time.sleep(delay.choice([0, 0, 0.02]))
        shards = prefill_problem(comm, case, (torch.bfloat16, torch.float16)[seed // 2 % 2], seed)
        result = gather_kv_attention(comm, *shards[comm.rank], *case[5:])
        close(result, prefill_expected(comm, case, shards))
        again = gather_kv_attention(comm, *shards[comm.rank], *case[5:], torch.empty_like(result))
        assert torch.equal(again, result)
        q = shards[comm.rank][0]
        close(plain_prefill(comm, *shards[comm.rank], *case[5:], q.shape[-1] ** -0.5), result)


def test_prefill_of_ragged_shards_with_ranks_that_come_late(ranks, world):
    ranks.run(check_prefill, world)


# Pieces of several tiles of keys and of queries, with more positions than fill them and with fewer.
GRADIENTS = [(1, 134, 2, 1, 64, True, True), *PREFILLS, (2, 70, 2, 1, 64, True, False), (1, 80, 2, 2, 64, False, True)]


def gradients_of(comm, case, shard, weight):
    """Those of the queries, keys and values, of the sum of what comes out times the weight."""
    inputs = [each.detach().requires_grad_() for each in shard]
    return torch.autograd.grad(gather_kv_attention(comm, *inputs, *case[5:]), inputs, weight)


def gradients_problem(comm, case, dtype, seed):
    """(shards, weights) of all ranks."""
    shards = prefill_problem(comm, case, dtype, seed)
    return shards, [shard[0] for shard in prefill_problem(comm, case, dtype, seed + 100)]


def check_gradients(comm, cases):
    delay = random.Random(comm.rank)
    for seed, case in enumerate(cases):
        dtype = (torch.bfloat16, torch.float16)[seed // 2 % 2]
        shards, weights = gradients_problem(comm, case, dtype, seed)
        time.sleep(delay.choice([0, 0, 0.02]))
        found, again = (gradients_of(comm, case, shards[comm.rank], weights[comm.rank]) for _ in range(2))
        whole = [in_order(comm, case, part).float().requires_grad_() for part in zip(*shards)]
        weight = in_order(comm, case, weights).float()
        mine = positions(comm, comm.rank, case[1], case[6])
        wanted = torch.autograd.grad(attend_whole(comm, case, *whole), whole, weight)
        for name, result, same, right in zip("qkv", found, again, wanted):
            assert torch.equal(result, same) and result.dtype == dtype, f"{case}: of {name}"
            apart = (result.float() - right[:, mine]).abs().max() / right.abs().max()
            assert apart <= TOLERANCE[dtype] / 2, f"{case}: of {name}, {apart} of the largest"


def test_gradients_of_ragged_shards_with_ranks_that_come_late(ranks, world):
    ranks.run(check_gradients, world, cases=GRADIENTS)


def test_gradients_over_all_ranks(ranks):
    ranks.run(check_gradients, pool.LARGEST_WORLD, cases=GRADIENTS[1:2])


def check_one_multiprocessor(comm):
    """The block that pushes attends afterwards."""
    group = comm.split(0)
    with mock.patch.object(group, "multiprocessors", 1):
        check_gradients(group, PREFILLS[:1])
    group.destroy()


def test_attention_on_one_multiprocessor(ranks):
    ranks.run(check_one_multiprocessor, 2)


def check_beside_garbage(comm):
    """Neither what a sequence has nor what is left in the memory that ranks share comes into another's gradients."""
    case = (2, 46, 2, 1, 64, True, True)
    shards, weights = gradients_problem(comm, case, torch.bfloat16, 7)
    shard, weight = shards[comm.rank], weights[comm.rank]
    wanted = gradients_of(comm, case, shard, weight)
    for sequence in range(2):
        for each in (*shard, weight):
            each[1 - sequence] = float("nan")
        settle_all(comm)
        for space in itertools.chain(*_kept[comm].values()):
            if space.buffer.is_floating_point():
                space.buffer.fill_(float("nan"))
        settle_all(comm)
        found = gradients_of(comm, case, shard, weight)
        assert all(torch.equal(result[sequence], right[sequence]) for result, right in zip(found, wanted))
        shards, weights = gradients_problem(comm, case, torch.bfloat16, 7)
        shard, weight = shards[comm.rank], weights[comm.rank]


def test_gradients_have_nothing_of_what_is_beside_a_sequence(ranks, world):
    ranks.run(check_beside_garbage, world)


def some_of_both(comm, seed: int = 4, rows: int = 24):
    """Calls of both operators and of the gradient: (what they take, what they return, the calls), of this rank."""
    q, shards = decode_problem(comm, DECODES[0], torch.bfloat16, seed)
    prefill = prefill_problem(comm, (1, rows, 2, 1, 64), torch.bfloat16, seed)[comm.rank]
    outs = torch.empty_like(q), torch.empty_like(prefill[0]), *map(torch.empty_like, prefill)

    def call(group):
        flash_decode(group, q, *shards[comm.rank], outs[0])
        gather_kv_attention(group, *prefill, out=outs[1])
        options = True, True, 0.125, group.name
        kept = torch.ops.tdccl.gather_kv_attention(*prefill, *options)
        gradients = torch.ops.tdccl.gather_kv_attention_gradient(*prefill, *kept, prefill[0], *options)
        for out, gradient in zip(outs[2:], gradients):
            out.copy_(gradient)

    return (q, *shards[comm.rank], *prefill), outs, call


def check_with_other_calls(comm):
    """Decode shares packets and epochs with collectives: in turns, all are right."""
    _, outs, call = some_of_both(comm)
    call(comm)
    wanted = [out.clone() for out in outs]
    for number in range(3):
        total = comm.all_reduce(torch.full((5,), float(comm.rank + number), device=comm.device))
        call(comm)
        assert total.tolist() == [comm.size * (comm.size - 1) / 2 + comm.size * number] * 5
        assert all(map(torch.equal, outs, wanted))


def test_attention_and_collectives_in_turns(ranks, world):
    ranks.run(check_with_other_calls, world)


def check_compiled(comm):
    """torch.compile sees the operators, their shapes and gradients."""
    (q, k, v, lengths, *prefill), _, _ = some_of_both(comm)

    def layer(q, k, v, lengths, *prefill):
        return flash_decode(comm, q, k, v, lengths) * 2, gather_kv_attention(comm, *prefill) * 2

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = q, k, v, lengths, *(each.requires_grad_() for each in prefill)
    for eager, result in zip(layer(*inputs), compiled(*inputs)):
        assert torch.equal(result, eager)
    for eager, result in zip(*(torch.autograd.grad(body(*inputs)[1].sum(), prefill) for body in (layer, compiled))):
        assert torch.equal(result, eager)
    torch.library.opcheck(torch.ops.tdccl.gather_kv_attention.default, (*prefill, True, True, 0.125, comm.name))


def test_torch_compile_sees_the_operators(ranks):
    ranks.run(check_compiled, min(2, pool.LARGEST_WORLD))


def check_absent(comm):
    q, shards = decode_problem(comm, DECODES[0], torch.bfloat16, 1)
    prefill = prefill_problem(comm, (1, 8, 1, 1, 64), torch.bfloat16, 1)[comm.rank]
    check_told(comm, "decode", lambda group: lambda: flash_decode(group, q, *shards[comm.rank]))
    check_told(comm, "prefill", lambda group: lambda: gather_kv_attention(group, *prefill))
    options = True, True, 0.125, comm.name
    kept = torch.ops.tdccl.gather_kv_attention(*prefill, *options)

    def gradient(group):
        given = *prefill, *kept, prefill[0], *options[:-1], group.name
        return lambda: torch.ops.tdccl.gather_kv_attention_gradient(*given)

    check_told(comm, "gradient", gradient)


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
def test_a_rank_that_never_comes_is_told(ranks):
    ranks.run(check_absent, 2)


def check_refused(comm):
    (q, k, v, lengths, *prefill), _, _ = some_of_both(comm)
    keys, values = prefill[1:]
    refused = [
        ("q is .* expected .B, heads, dim", lambda: flash_decode(comm, q[None], k, v, lengths)),
        ("one dtype, bfloat16 or float16", lambda: flash_decode(comm, q.float(), k, v, lengths)),
        ("heads have 32 elements", lambda: flash_decode(comm, q[..., :32], k[..., :32], v[..., :32], lengths)),
        ("of q's batch", lambda: flash_decode(comm, q, k[:1], v[:1], lengths)),
        ("multiple of the 2 KV heads", lambda: flash_decode(comm, q[:, :3], k, v, lengths)),
        ("expected at most 16", lambda: flash_decode(comm, q.repeat(1, 9, 1), k, v, lengths)),
        ("lengths is torch.int64", lambda: flash_decode(comm, q, k, v, lengths.long())),
        ("k has strides", lambda: flash_decode(comm, q, k.mT.contiguous().mT, v, lengths)),
        ("scale is 0", lambda: flash_decode(comm, q, k, v, lengths, scale=0)),
        ("out is", lambda: flash_decode(comm, q, k, v, lengths, q[:1])),
        ("expected .B, S / size", lambda: gather_kv_attention(comm, q, keys, values)),
        ("a shard of the same ones", lambda: gather_kv_attention(comm, prefill[0][:, :4], keys, values)),
        ("an even number", lambda: gather_kv_attention(comm, *(each[:, :3] for each in prefill))),
    ]
    options = True, True, 0.125, comm.name
    good = [each[:, :4] for each in (prefill[0], keys, values)]
    out, logs = torch.ops.tdccl.gather_kv_attention(*good, *options)
    kept = {"q": good[0], "k": good[1], "v": good[2], "out": out, "logs": logs, "gradient": out}

    def gradient(**wrong):
        return lambda: torch.ops.tdccl.gather_kv_attention_gradient(*(kept | wrong).values(), *options)

    refused += [
        ("gradient: q has 3 positions", gradient(q=good[0][:, :3])),
        ("gradient: out is", gradient(out=out[:, :2])),
        ("gradient: logs is", gradient(logs=logs.bfloat16())),
        ("gradient: gradient is", gradient(gradient=out.float())),
    ]
    for reason, call in refused:
        with pytest.raises(tdccl.ArgumentError, match=reason):
            call()


def test_what_cannot_be_attended_to_is_refused(ranks):
    ranks.run(check_refused, 1)


def check_replay(comm):
    """A graph of both, replayed after new input and new lengths, and mixed with eager calls."""
    (q, _, _, lengths, *prefill), outs, call = some_of_both(comm, rows=600)
    call(comm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(comm)
        call(comm)
    for factor in (1, 2, -1):
        q.mul_(factor)
        prefill[0].mul_(factor)
        lengths.sub_(lengths.clamp(max=1))
        call(comm)
        eager = [out.clone() for out in outs]
        for out in outs:
            out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, outs, eager))


@pytest.mark.skipif(environment.emulated(), reason="CUDA graphs need a GPU")
def test_graphs_replay(ranks, world):
    ranks.run(check_replay, world)


def test_kernels_multiply_on_tensor_cores():
    program = Path(__file__).with_name("attention_variants.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = {}
    for line in run.stdout.splitlines():
        kernel = json.loads(line)
        kernels.setdefault(kernel["name"], []).append(kernel)
    multiplying = {"attend_gathered", "gradient_of_queries", "gradient_of_keys"}
    assert kernels.keys() == {"attend_splits", "merge_ranks", "push_pairs", *multiplying}
    for kernel in itertools.chain(*kernels.values()):
        assert kernel["shared"] <= 227 << 10, kernel
        assert not kernel["divergent"], kernel
        assert not kernel["spills"] or kernel["name"] in multiplying, kernel
    for kernel in itertools.chain(*map(kernels.get, multiplying)):
        assert kernel["wgmma"] and kernel["by_descriptors"], kernel
        assert kernel["spills_in_loops"][0] == 0, kernel  # masked loops may have some
    small, _ = kernels["attend_gathered"]
    assert 2 * (small["shared"] + 1024) <= 228 << 10  # two blocks of it are on a multiprocessor
    for kernel in kernels["attend_splits"] + kernels["push_pairs"] + kernels["gradient_of_keys"]:
        assert "128" in kernel["loads"] and "128" in kernel["stores"] and not kernel["narrow"], kernel
    assert all(kernel["mma"] for kernel in kernels["attend_splits"])
