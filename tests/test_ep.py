"""Expert parallelism: where rows arrive, bit by bit, and what their combination adds up to."""

import ep_reference as reference
import pytest
import torch
from reference import same_bits

from tdccl.ep import ExpertParallel, LowLatency


def shape_of(comm, seed, **sizes):
    given = {"max_tokens": 24, "hidden": 64, "experts": 4 * comm.size, "top_k": 3, **sizes}
    generator = torch.Generator().manual_seed(seed)
    tokens = given.pop("tokens", None)
    if tokens is None:
        tokens = torch.randint(0, given["max_tokens"] + 1, (comm.size,), generator=generator).tolist()
    problem = reference.random_problem(
        seed, tokens, given["hidden"], given["experts"], given["top_k"], device=comm.device
    )
    return given, problem


def check_round(comm, ep, problem, align=1):
    """Plan, dispatch and combine in both layouts, all compared bitwise."""
    rank, hidden = comm.rank, ep.hidden
    idx, x, weights = problem.idx[rank], problem.x[rank], problem.weights[rank]
    plan = ep.plan(idx, align)

    compact = reference.compact_rows(problem, rank)
    r = ep.dispatch(x, plan, weights)
    sources = [source * ep.max_tokens + token for source, token in compact]
    assert r.source.tolist() == sources + [-1] * (ep.max_rows - len(sources))
    assert r.counts.tolist() == [sum(source == each for source, _ in compact) for each in range(comm.size)]
    arrived = torch.stack([problem.x[s][t] for s, t in compact]) if compact else x.new_empty(0, hidden)
    assert same_bits(r.rows[: len(compact)], arrived)
    for row, (source, token) in enumerate(compact):
        experts = [
            e % problem.local if e >= 0 and e // problem.local == rank else -1
            for e in problem.idx[source][token].tolist()
        ]
        assert plan.topk_idx[row].tolist() == experts
        kept = [w if e >= 0 else 0.0 for e, w in zip(experts, problem.weights[source][token].tolist())]
        assert r.weights[row].tolist() == kept
    copied = ep.dispatch(x, plan, out=torch.empty(ep.max_rows, hidden, dtype=x.dtype, device=comm.device))
    assert same_bits(copied.rows[: len(compact)], arrived)

    h = copied.rows * (rank + 2)
    expected = reference.combined(
        [{t: problem.x[s][t] * (peer + 2) for s, t in reference.compact_rows(problem, peer) if s == rank}
         for peer in range(comm.size)],
        len(x), hidden, x.dtype, (x, x), comm.device,
    )  # fmt: skip
    assert same_bits(ep.combine(h, plan, bias=(x, x)), expected)
    y, carried = ep.combine(copied.rows, plan, carry=r.weights)
    assert same_bits(carried, torch.where(idx >= 0, weights, torch.zeros_like(weights)))

    landed = ep.dispatch(x, plan)
    landed.rows.mul_(rank + 2)
    assert same_bits(ep.combine(landed.rows, plan, bias=(x, x)), expected)

    by_expert = reference.expert_rows(problem, rank)
    r = ep.dispatch(x, plan, weights, "expert")
    assert r.counts.tolist() == list(map(len, by_expert))
    start = 0
    for expert, rows in enumerate(by_expert):
        end = start + -(-len(rows) // align) * align
        assert r.offsets[expert : expert + 2].tolist() == [start, end]
        assert r.source[start:end].tolist() == [s * ep.max_tokens + t for s, t, _ in rows] + [-1] * (
            end - start - len(rows)
        )
        for row, (s, t, k) in enumerate(rows, start):
            assert same_bits(r.rows[row], problem.x[s][t]) and r.weights[row] == problem.weights[s][t, k]
        assert not r.rows[start + len(rows) : end].any()
        start = end
    assert (r.source[start:] == -1).all()

    factor = torch.where(r.source >= 0, torch.arange(len(r.source), device=comm.device) % 7, 1).to(x.dtype)
    y = ep.combine(r.rows * factor[:, None], plan, r.weights, "expert")
    gathered = []
    for peer in range(comm.size):
        rows, start = {}, 0
        for by_peer in reference.expert_rows(problem, peer):
            for row, (s, t, k) in enumerate(by_peer, start):
                if s == rank:
                    rows.setdefault(t, []).append((k, x[t] * (row % 7), weights[t, k]))
            start += -(-len(by_peer) // align) * align
        sums = {}
        for t, places in rows.items():
            total = torch.zeros(hidden, device=comm.device)
            for _, value, weight in sorted(places, key=lambda place: place[0]):
                total += value.float() * weight
            sums[t] = total.to(x.dtype)
        gathered.append(sums)
    assert same_bits(y, reference.combined(gathered, len(x), hidden, x.dtype, (), comm.device))


def check_rounds(comm, align):
    ep = None
    for seed in range(3):
        given, problem = shape_of(comm, seed)
        ep = ep or ExpertParallel(comm, given["max_tokens"], given["hidden"], given["experts"], given["top_k"])
        check_round(comm, ep, problem, align)


@pytest.mark.parametrize("align", [1, 4])
def test_rows_arrive_in_order_and_combine_bitwise(ranks, world, align):
    ranks.run(check_rounds, world, align=align)


def check_batched(comm, low, problem, quant=None):
    """Dispatch and combine of few tokens, compared bitwise."""
    rank, x, weights = comm.rank, problem.x[comm.rank], problem.weights[comm.rank]
    plan = low.plan(problem.idx[rank])
    r = low.dispatch(x, plan, quant=quant)
    by_expert = reference.expert_rows(problem, rank)
    assert r.counts.tolist() == list(map(len, by_expert))
    for expert, rows in enumerate(by_expert):
        assert r.source[expert, : len(rows)].tolist() == [s * low.max_tokens + t for s, t, _ in rows]
        if not rows:
            continue
        sent = torch.stack([problem.x[s][t] for s, t, _ in rows])
        if quant is None:
            assert same_bits(r.rows[expert, : len(rows)], sent)
        else:
            check_quantised(r.rows[expert, : len(rows)], r.scales[expert, : len(rows)], sent, quant)
    h = torch.full((low.local_experts, low.max_rows, low.hidden), float("nan"), dtype=x.dtype, device=comm.device)
    for expert, rows in enumerate(by_expert):
        for row, (s, t, _) in enumerate(rows):
            h[expert, row] = problem.x[s][t] * (rank * low.local_experts + expert + 1)
    y = low.combine(h, plan, weights)
    total = torch.zeros(len(x), low.hidden, device=comm.device)
    for k in range(low.top_k):
        idx = problem.idx[rank][:, k, None]
        made = (x * (idx + 1)).to(x.dtype).float() * weights[:, k, None]
        total += torch.where(idx >= 0, made, torch.zeros_like(made))
    assert same_bits(y, total.to(x.dtype))


def check_quantised(rows, scales, sent, quant):
    expected, scale = reference.quantised(sent, quant == "fp8_128_ue8m0")
    if quant == "fp8_128_ue8m0":
        scale = reference.packed(scale)
    assert same_bits(rows, expected) and same_bits(scales, scale)


def check_low_latency(comm, quant, hidden):
    given, _ = shape_of(comm, 0, hidden=hidden)
    low = LowLatency(comm, given["max_tokens"], hidden, given["experts"], given["top_k"])
    for seed in range(3):
        check_batched(comm, low, shape_of(comm, seed, hidden=hidden)[1], quant)


@pytest.mark.parametrize("quant, hidden", [(None, 64), ("fp8_128", 320), ("fp8_128_ue8m0", 1088)])
def test_few_tokens(ranks, world, quant, hidden):
    ranks.run(check_low_latency, world, quant=quant, hidden=hidden)
