"""Attention over what the ranks have of keys and values, against plain fp32 attention over all of it."""

import random
import time

import torch

from tdccl.overlap import flash_decode, gather_kv_attention
from tdccl.overlap.attention import attend
from tdccl.overlap.gather_kv_attention import positions
from tdccl.overlap.gather_kv_attention import reference as plain_prefill

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


def prefill_expected(comm, case, shards):
    """All of it in one attention, its positions put in order; this rank's rows."""
    rows, (dim, causal, zigzag) = case[1], case[4:]
    order = torch.cat([positions(comm, rank, rows, zigzag) for rank in range(comm.size)])
    assert order.sort().values.tolist() == list(range(rows * comm.size))
    whole = []
    for part in zip(*shards):
        joined = torch.cat(part, dim=1)
        whole.append(torch.empty_like(joined).index_copy_(1, order, joined))
    seen = torch.ones(rows * comm.size, rows * comm.size, dtype=torch.bool, device=comm.device)
    result = attend(*whole, seen.tril() if causal else seen, dim**-0.5)
    return result[:, positions(comm, comm.rank, rows, zigzag)]


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
