"""Expert parallelism: where rows arrive, bit by bit, and what their combination adds up to."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import ep_reference as reference
import pool
import pytest
import torch
from reference import same_bits

import tdccl
from tdccl import environment
from tdccl.ep import ExpertParallel, LowLatency, autograd, batched, routing

LONG = pytest.mark.skipif(os.environ.get("TDCCL_LONG", "0") == "0", reason="long: TDCCL_LONG=1 runs it")
WORLDS = (2, 3)
WILD = 1 << 30  # in no array of a plan


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


def low_latency(comm, *sizes):
    """A `LowLatency`, or None across nodes."""
    return LowLatency(comm, *sizes) if len(comm.topology.nodes) == 1 else None


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

    h, bias = copied.rows * (rank + 2), (x.nan_to_num(3.0), x.nan_to_num(5.0) * 3)
    expected = reference.combined(
        [{t: problem.x[s][t] * (peer + 2) for s, t in reference.compact_rows(problem, peer) if s == rank}
         for peer in range(comm.size)],
        len(x), hidden, x.dtype, bias, comm.device, comm.topology.nodes,
    )  # fmt: skip
    assert same_bits(ep.combine(h, plan, bias=bias), expected)
    y, carried = ep.combine(copied.rows, plan, carry=r.weights)
    assert same_bits(carried, torch.where(idx >= 0, weights, torch.zeros_like(weights)))

    landed = ep.dispatch(x, plan)
    landed.rows.mul_(rank + 2)
    assert same_bits(ep.combine(landed.rows, plan, bias=bias), expected)

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
    assert same_bits(y, reference.combined(gathered, len(x), hidden, x.dtype, (), comm.device, comm.topology.nodes))


def check_quantised_layouts(comm):
    """fp8 rows and scales in every layout, quantised on the way or before."""
    for hidden, quant in ((320, "fp8_128"), (1088, "fp8_128_ue8m0")):
        given, problem = shape_of(comm, 5, hidden=hidden, max_tokens=6)
        problem.x[0][:1] = 0
        ep = ExpertParallel(comm, 6, hidden, given["experts"], given["top_k"])
        plan, x = ep.plan(problem.idx[comm.rank]), problem.x[comm.rank]
        before, scale = reference.quantised(x, quant == "fp8_128_ue8m0")
        before = before, reference.packed(scale) if quant == "fp8_128_ue8m0" else scale
        compact = [problem.x[s][t] for s, t in reference.compact_rows(problem, comm.rank)]
        by_expert = [problem.x[s][t] for rows in reference.expert_rows(problem, comm.rank) for s, t, _ in rows]
        out = torch.empty(ep.max_rows, hidden, dtype=torch.float8_e4m3fn, device=comm.device)
        for sent, layout, into in ((compact, "compact", None), (compact, "compact", out), (by_expert, "expert", None)):
            for r in (
                ep.dispatch(x, plan, None, layout, quant=quant, out=into),
                ep.dispatch(before, plan, None, layout),
            ):
                if sent:
                    check_quantised(r.rows[: len(sent)], r.scales[: len(sent)], torch.stack(sent), quant)


def test_fp8(ranks, world):
    ranks.run(check_quantised_layouts, world)


def check_rounds(comm, align):
    ep = None
    for seed in range(2):
        given, problem = shape_of(comm, seed, max_tokens=16)
        ep = ep or ExpertParallel(comm, given["max_tokens"], given["hidden"], given["experts"], given["top_k"])
        check_round(comm, ep, problem, align)


def test_rows_arrive_in_order_and_combine_bitwise(ranks, world):
    ranks.run(check_rounds, world, align=1 + 3 * (world % 2))


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


def check_low_latency(comm, quant, hidden, tokens):
    given, _ = shape_of(comm, 0, hidden=hidden, max_tokens=tokens)
    low = LowLatency(comm, tokens, hidden, given["experts"], given["top_k"], max_blocks=8)
    for seed in range(2):
        check_batched(comm, low, shape_of(comm, seed, hidden=hidden, max_tokens=tokens)[1], quant)


@pytest.mark.parametrize(
    "quant, hidden, tokens",
    [(None, 64, 24), (None, 640, 2), ("fp8_128", 320, 12), ("fp8_128", 640, 1), ("fp8_128_ue8m0", 1088, 3)],
)
def test_few_tokens(ranks, world, quant, hidden, tokens):
    """Many tokens have whole rows, few have rows in slices."""
    ranks.run(check_low_latency, world, quant=quant, hidden=hidden, tokens=tokens)


def check_small_steps(comm, quant, hidden, tokens, blocks, tile):
    """Blocks with more to do than they look at, compare, send or take at once."""
    with mock.patch.multiple(batched, _TILE=tile, _TAKEN=2, _ENTRIES=1, _OTHERS=4):
        given, problem = shape_of(comm, 1, hidden=hidden, max_tokens=tokens, tokens=[tokens] * comm.size)
        low = LowLatency(comm, tokens, hidden, given["experts"], given["top_k"], max_blocks=blocks)
        check_batched(comm, low, problem, quant)
        check_batched(comm, low, shape_of(comm, 2, hidden=hidden, max_tokens=tokens)[1], quant)


@pytest.mark.parametrize(
    "quant, hidden, tokens, blocks, tile",
    [(None, 64, 7, 2, 2), ("fp8_128", 320, 3, 7, 1)],
    ids=["few blocks", "blocks left over"],
)
def test_few_tokens_in_small_steps(ranks, world, quant, hidden, tokens, blocks, tile):
    ranks.run(check_small_steps, world, quant=quant, hidden=hidden, tokens=tokens, blocks=blocks, tile=tile)


def by_hand(comm, rows):
    """A problem with these experts, by rank and token; rows of tokens without any are NaN."""
    made = reference.random_problem(1, list(map(len, rows)), 64, 2 * comm.size, 2, device=comm.device)
    idx = [torch.tensor(of_rank, dtype=torch.int32, device=comm.device).view(-1, 2) for of_rank in rows]
    for rank, of_rank in enumerate(idx):
        made.x[rank][of_rank.max(1).values < 0] = float("nan")
    return made._replace(idx=idx)


def corners(size):
    """Experts by rank and token, two a token, two a rank."""
    last = 2 * size - 1
    return {
        "nobody has tokens": [[]] * size,
        "one rank has tokens": [[[0, last], [1, last - 1]]] + [[]] * (size - 1),
        "no token has experts": [[[-1, -1]] * 3] * size,
        "some tokens have none": [[[-1, -1], [last, -1], [-1, 0]]] * size,
        "all to one expert": [[[last, -1]] * 4] * size,
        "all to one rank": [[[1, 0]] * 4] * size,
        "as many as there may be": [[[rank, (rank + 1) % (last + 1)]] * 4 for rank in range(size)],
        "different counts": [[[rank, last]] * (rank % 5) for rank in range(size)],
    }


def check_corners(comm):
    ep = ExpertParallel(comm, 4, 64, 2 * comm.size, 2, max_blocks=3)
    low = low_latency(comm, 4, 64, 2 * comm.size, 2)
    for name, rows in corners(comm.size).items():
        problem = by_hand(comm, rows)
        try:
            check_round(comm, ep, problem, align=3)
            if low:
                check_batched(comm, low, problem)
        except AssertionError as error:
            raise AssertionError(name) from error


def test_corners(ranks, world):
    ranks.run(check_corners, world)


def check_shapes(comm):
    """Rows of many sizes, one expert a rank, one place and more places than ranks."""
    for hidden, experts, top_k in ((2880, 1, 1), (7168, 2, 2), (64, 8, 7), (24, 3, 3)):
        given = {"tokens": [1] * comm.size, "hidden": hidden, "experts": experts * comm.size, "max_tokens": 1}
        given["top_k"] = min(top_k, given["experts"])
        _, problem = shape_of(comm, hidden, **given)
        check_round(comm, ExpertParallel(comm, 1, hidden, given["experts"], given["top_k"]), problem)
        if low := low_latency(comm, 1, hidden, given["experts"], given["top_k"]):
            check_batched(comm, low, problem)


def test_shapes(ranks, world):
    ranks.run(check_shapes, world)


def check_refusals(comm):
    """What is wrong is said, what can be is done, and nothing is written where it must not be."""
    experts = 2 * comm.size
    wrong = torch.tensor([[0, 1], [experts, 1], [experts - 1, experts - 1], [-7, 0]], device=comm.device)
    taken = torch.tensor([[0, 1], [-1, 1], [experts - 1, -1], [-1, 0]], device=comm.device)
    x = torch.randn(4, 64, device=comm.device).bfloat16()
    ep = ExpertParallel(comm, 4, 64, experts, 2)
    low = low_latency(comm, 4, 64, experts, 2)
    for made, dispatch in ((ep, lambda p: ep.dispatch(x, p)), (low, lambda p: low.dispatch(x, p))):
        if made is None:
            continue
        plan = made.plan(wrong)
        if made is low:
            found = dispatch(plan).counts.clone()
        else:
            wait(comm)
            with pytest.raises(tdccl.ArgumentError, match=r"row [123] of topk_idx"):
                made.check()
            found = made.plan(taken).counts.clone()
            assert torch.equal(plan.counts, found)
        wait(comm)
        if made is low:
            with pytest.raises(tdccl.ArgumentError, match=r"row [123] of topk_idx"):
                made.check()
            assert torch.equal(dispatch(low.plan(taken)).counts, found)
    plan = ep.plan(taken)
    rows = int(plan.counts.sum())
    room = torch.full((ep.max_rows, 64), 7.0, dtype=x.dtype, device=comm.device)
    ep.dispatch(x, plan, None, "expert", out=room[: max(1, rows - 1)])
    wait(comm)
    assert (room[max(1, rows - 1) :] == 7).all()
    if rows > 1:
        with pytest.raises(tdccl.ArgumentError, match=f"{rows} rows came"):
            ep.check()
    for call, text in (
        (lambda: ep.plan(torch.zeros(5, 2, dtype=torch.int64, device=comm.device)), "at most max_tokens = 4"),
        (lambda: ep.plan(taken[:, :1].contiguous()), "topk_idx is torch.int64"),
        (lambda: ep.plan(taken, align=0), "align is 0"),
        (lambda: ep.dispatch(x[:3], plan), "x is torch.bfloat16"),
        (lambda: ep.dispatch(x.float(), plan), "x is torch.float32"),
        (lambda: ep.dispatch(x, plan, layout="batched"), "layout is 'batched'"),
        (lambda: ep.dispatch(x, plan, quant="fp4"), "quant is 'fp4'"),
        (lambda: ExpertParallel(comm, 4, 64, 2 * comm.size, 3 * comm.size), "top_k is"),
        (lambda: ExpertParallel(comm, 4 + comm.rank, 64, 2 * comm.size, 0), "top_k is 0"),
    ):
        with pytest.raises(tdccl.ArgumentError, match=text):
            call()
    if low:
        with pytest.raises(tdccl.ArgumentError, match=r"h is torch\.bfloat16"):
            low.combine(x, low.plan(taken), torch.ones(4, 2, device=comm.device))
        check_combine_before_dispatch(comm, low, taken, x)
        check_plans_of_others(comm, ep, low, taken, x)
    comm._bootstrap.barrier()


def check_combine_before_dispatch(comm, low, idx, x):
    """It is refused, where a dispatch has only sent, too; then the dispatch goes on."""
    plan, weights = low.plan(idx), torch.ones(4, 2, device=comm.device)
    again = LowLatency(comm, 4, 64, low.num_experts, 2)
    h = torch.zeros(low.local_experts, low.max_rows, 64, dtype=x.dtype, device=comm.device)
    with pytest.raises(tdccl.ArgumentError, match="combine: no dispatch by this plan has ended"):
        low.combine(h, plan, weights)
    found, receive = low.dispatch(x, plan, hook=True)
    for each in (low, again):
        with pytest.raises(tdccl.ArgumentError, match="combine: no dispatch by this plan has ended"):
            each.combine(h, plan, weights)
    receive()
    assert same_bits(again.combine(found.rows, plan, weights), low.combine(found.rows, replace(plan), weights))


def check_plans_of_others(comm, ep, low, idx, x):
    """A plan is refused where its rows may have no room, and taken where they have."""
    plan, sizes = ep.plan(idx, align=2), (64, ep.num_experts, 2)
    equal, larger = ExpertParallel(comm, 4, *sizes), ExpertParallel(comm, 5, *sizes)
    rows = ep.dispatch(x, plan).rows.clone()
    assert same_bits(equal.combine(rows, plan), ep.combine(rows, plan))
    few, planned, weights = LowLatency(comm, 5, *sizes), autograd.plan(ep, idx, align=2), torch.ones(4, 2)
    for layout in ("compact", "expert"):
        most = ep.most_rows(layout, 2)
        wanted = autograd.dispatch(ep, x, planned, weights.to(comm.device), layout)
        given = autograd.dispatch(ep, x, planned, weights.to(comm.device), layout, rows=most + 3)
        for kept, padded in zip(wanted, given):
            assert same_bits(padded[:most], kept) and len(padded) == most + 3 and not padded[most:].any()
    arrived = few.dispatch(x, few.plan(idx)).rows
    for call, text in (
        (lambda: larger.dispatch(x, plan), "plan is for ranks .* max_tokens 4.*; expected one for .* max_tokens 5"),
        (lambda: larger.combine(rows, plan), "max_tokens 5"),
        (lambda: larger.plan_of(plan.memory, 4, 2), "the memory of the plan is"),
        (lambda: ep.plan_of(plan.memory, 4, 1 + ep.max_rows), "the memory of the plan is"),
        (lambda: autograd.dispatch(larger, x, planned), "max_tokens 5"),
        (lambda: autograd.combine(larger, rows, planned), "max_tokens 5"),
        (lambda: autograd.combine(ep, rows, planned, 4), "layout is 4"),
        (lambda: ep.dispatch(x, plan, out=x.new_empty(ep.max_rows + 1, 64)), "at most the"),
        (lambda: autograd.dispatch(ep, x[:3], planned), "the plan's 4 tokens"),
        (lambda: few.dispatch(x, low.plan(idx)), "max_tokens 5"),
        (lambda: few.combine(arrived, low.plan(idx), weights.to(comm.device)), "max_tokens 5"),
        (lambda: low.dispatch(x, plan), "plan is Plan"),
        (lambda: ep.dispatch(x, low.plan(idx)), "plan is BatchedPlan"),
    ):
        with pytest.raises(tdccl.ArgumentError, match=text):
            call()


def wait(comm):
    """For what was launched to have ended, on all ranks."""
    wait_here(comm)
    comm._bootstrap.barrier()


def wait_here(comm):
    if not environment.emulated():
        torch.cuda.synchronize(comm.device)


def test_what_is_wrong_is_said(ranks, world):
    ranks.run(check_refusals, world)


def check_hooks(comm):
    """Halves give what wholes give, and nothing comes between them."""
    given, problem = shape_of(comm, 3, max_tokens=6)
    sizes = 6, given["hidden"], given["experts"], given["top_k"]
    idx, x, weights = (of_ranks[comm.rank] for of_ranks in problem[:3])
    ep, low = ExpertParallel(comm, *sizes), low_latency(comm, *sizes)
    plan = ep.plan(idx)
    arrived = int(plan.received.sum())
    whole = ep.dispatch(x, plan).rows[:arrived].clone()
    r, receive = ep.dispatch(x, plan, hook=True)
    with pytest.raises(tdccl.ArgumentError, match="call the hook of the last ep_dispatch first"):
        ep.combine(r.rows, plan)
    comm.barrier()  # on the communicator's own memory
    receive()
    assert same_bits(r.rows[:arrived], whole)
    whole = ep.combine(r.rows.clone(), plan)
    y, receive = ep.combine(r.rows.clone(), plan, hook=True)
    plan = weakref.ref(plan)
    assert plan(), "the second half reads it: its memory must not be another's by then"
    receive()
    assert same_bits(y, whole) and not plan()
    for _ in range(3 if low else 0):
        plan = low.plan(idx)
        r, receive_next = low.dispatch(x, plan, hook=True)
        receive()  # again: it has received
        with pytest.raises(tdccl.ArgumentError, match="call the hook"):
            low.dispatch(x, plan)
        receive_next()
        y, receive = low.combine(r.rows, plan, weights, hook=True)
        receive()
        assert same_bits(y, low.combine(low.dispatch(x, plan).rows, plan, weights))


def test_halves(ranks, world):
    ranks.run(check_hooks, world)


def check_one_ahead(comm):
    """What the next dispatch sends, quantised and routed otherwise, is here before this rank has taken the last."""
    given, problem = shape_of(comm, 2, hidden=512, max_tokens=2, tokens=[2] * comm.size)
    _, other = shape_of(comm, 3, hidden=512, max_tokens=2, tokens=[1] * comm.size)
    low = LowLatency(comm, 2, given["hidden"], given["experts"], given["top_k"], max_blocks=8)  # 4 slices, or 1
    x, other_x, idx, other_idx = (each[comm.rank] for each in (problem.x, other.x, problem.idx, other.idx))
    rows = reference.expert_rows(problem, comm.rank)
    quants = (None, "fp8_128_ue8m0", "fp8_128", None)
    for slow, (quant, following) in enumerate(itertools.pairwise(quants)):
        slow %= comm.size
        last, receive = low.dispatch(x, low.plan(idx), quant=quant, hook=True)
        if comm.rank != slow:
            receive()
            _, receive_next = low.dispatch(other_x, low.plan(other_idx), quant=following, hook=True)
        comm.barrier()
        if comm.rank == slow:
            receive()
            _, receive_next = low.dispatch(other_x, low.plan(other_idx), quant=following, hook=True)
        receive_next()
        assert last.counts.tolist() == list(map(len, rows))
        for expert, of_expert in enumerate(rows):
            sent = torch.stack([problem.x[s][t] for s, t, _ in of_expert]) if of_expert else x[:0]
            if quant is None:
                assert same_bits(last.rows[expert, : len(sent)], sent)
            else:
                check_quantised(last.rows[expert, : len(sent)], last.scales[expert, : len(sent)], sent, quant)


def test_a_peer_one_call_ahead(ranks, world):
    ranks.run(check_one_ahead, world)


def check_garbage(comm):
    """Whatever peers say of their rows, the kernels stay inside the plan's tensors and the caller's."""
    given, problem = shape_of(comm, 6, max_tokens=6, tokens=[6] * comm.size)
    low = LowLatency(comm, 6, given["hidden"], given["experts"], given["top_k"], max_blocks=5)
    idx, x, weights = (of_ranks[comm.rank] for of_ranks in problem[:3])
    generator = torch.Generator().manual_seed(comm.rank)
    words = [low._dispatching.local(name, torch.int32) for name in ("notes", "counts")]
    for bound in (2, 8, 40, 1 << 31):  # few and many of these numbers are possible ones
        made = low.plan(idx)
        plan, fences = made, []
        for name in ("sizes", "placed", "source", "counts"):
            kept = getattr(made, name)
            fenced = torch.full((3, kept.numel() + -kept.numel() % 4), WILD, dtype=torch.int32, device=comm.device)
            fences += [fenced[0], fenced[1, kept.numel() :], fenced[2]]
            plan = replace(plan, **{name: fenced[1, : kept.numel()].view(kept.shape)})
        rows = torch.full((3 * low.local_experts, low.max_rows, low.hidden), 7.0, dtype=x.dtype, device=comm.device)
        out = rows[low.local_experts : 2 * low.local_experts]
        _, receive = low.dispatch(x, plan, out=out, hook=True)
        wait(comm)
        for each in words:
            each.copy_(torch.randint(-bound, bound, each.shape, generator=generator))
        receive()
        wait(comm)
        assert all((fence == WILD).all() for fence in fences)
        assert (rows[: low.local_experts] == 7).all() and (rows[2 * low.local_experts :] == 7).all()
        assert (plan.sizes >= 0).all() and (plan.sizes <= low.max_tokens).all()
        assert (plan.counts >= 0).all() and (plan.counts <= low.max_rows).all()
        placed = plan.placed[plan.placed != WILD]  # not where sources told the blocks different numbers of tokens
        assert (placed >= -1).all() and (placed < low.local_experts * low.max_rows).all()
        low.combine(out, plan, weights)
        low.combine(out, replace(plan, sizes=torch.full_like(plan.sizes, WILD)), weights)
        wait(comm)
    check_batched(comm, low, problem)


def check_torn_plan(comm):
    """A peer that comes too late, and changes its routing while it is read, leads to no place outside the plan."""
    ep = ExpertParallel(comm, 6, 64, comm.size, 2, max_blocks=3)
    idx = torch.tensor([[0, 1]] * 6, device=comm.device)
    generator = torch.Generator().manual_seed(comm.rank)
    launch, words = ep._planning.launch, [ep._planning.local(name, torch.int32) for name in ("routing", "sizes")]

    def torn(called, kernel, *arguments):
        launch(called, kernel, *arguments)
        if kernel is routing.exchange:
            wait(comm)
            words[0].copy_(torch.randint(-1, comm.size, words[0].shape, generator=generator).clamp(max=1))
            words[1].copy_(torch.randint(-9, 40, words[1].shape, generator=generator))

    for _ in range(8):
        with mock.patch.object(ep._planning, "launch", torn):
            plan = ep.plan(idx)
        wait(comm)
        arrays = (plan.recv_row, ep.max_rows), (plan.expert_row, ep.most_expert_rows()), (plan.sizes, 7)
        arrays += (plan.source, ep.max_rows), (plan.expert_source, ep.max_rows)
        assert all((array >= -1).all() and (array < end).all() for array, end in arrays)


@pytest.mark.parametrize("check", [check_garbage, check_torn_plan], ids=["few tokens", "plan"])
def test_garbage_of_peers_leads_nowhere(ranks, world, check):
    ranks.run(check, world)


def check_late(comm):
    """Who gave up waiting for a rank writes nothing to a landing buffer that the rank may still be reading."""
    _, problem = shape_of(comm, 4, max_tokens=6, tokens=[6] * comm.size, experts=comm.size, top_k=1, hidden=64)
    idx, x, last = problem.idx[comm.rank], problem.x[comm.rank], comm.size - 1
    for again in (lambda ep, plan: ep.dispatch(-x, plan), lambda ep, plan: ep.combine(-ep.landing, plan)):
        hurried = comm.split(0)
        hurried.timeout = 1
        group = hurried.split(0)  # whose kernels' waits are as short
        ep = ExpertParallel(group, 6, 64, comm.size, 1)
        plan = ep.plan(idx)
        ep.dispatch(x, plan)
        wait(comm)
        kept = ep.landing.clone()
        comm._bootstrap.barrier()
        if comm.rank != last:
            with pytest.raises(tdccl.Timeout):
                again(ep, plan)
                wait_here(comm)
                ep.check()
        wait(comm)
        assert same_bits(ep.landing, kept)
        for each in (group, hurried):
            each.destroy()


def test_a_late_rank_keeps_its_rows(ranks):
    ranks.run(check_late, min(2, pool.LARGEST_WORLD))


def recorded(call):
    """What repeats a call on the same memory: the replay of a graph, or the call itself where there are no graphs."""
    call()
    if environment.emulated():
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def check_many(comm, rounds):
    """Back to back, with skew, changed routing and token counts, two objects in turns."""
    made = []
    for number, tokens in enumerate((2, 5)):
        sizes = tokens, 64, 2 * comm.size, 2
        ep, low = ExpertParallel(comm, *sizes), low_latency(comm, *sizes)
        counts = [(tokens + rank) % tokens + 1 for rank in range(comm.size)]
        problem = reference.random_problem(number, counts, 64, 2 * comm.size, 2, device=comm.device)
        idx, x, weights = (of_ranks[comm.rank].clone() for of_ranks in problem[:3])
        results = {}

        def call(ep=ep, low=low, idx=idx, x=x, weights=weights, results=results):
            plan = ep.plan(idx)
            results["many"] = ep.combine(ep.dispatch(x, plan).rows, plan)
            if low:
                plan = low.plan(idx)
                results["few"] = low.combine(low.dispatch(x, plan).rows, plan, weights)

        made.append((recorded(call), counts, idx, x, weights, results))
    skew = random.Random(comm.rank)
    for turn in range(rounds):
        again, counts, idx, x, weights, results = made[turn % 2]
        problem = reference.random_problem(100 + turn, counts, 64, 2 * comm.size, 2, device=comm.device)
        for kept, new in zip((idx, x, weights), problem[:3]):
            kept.copy_(new[comm.rank])
        if turn % 16 < 2:
            time.sleep(skew.random() / 100)
        again()
        ranks_of = torch.stack([((idx >= 0) & (idx // 2 == rank)).any(1) for rank in range(comm.size)], 1).sum(1)
        times = x.float() * ranks_of[:, None] + 0.0  # no -0
        assert same_bits(results["many"], times.to(x.dtype)), turn
        total = torch.zeros(len(x), 64, device=comm.device)
        for k in range(2):
            total += torch.where(idx[:, k, None] >= 0, x.float() * weights[:, k, None], torch.zeros_like(total))
        assert "few" not in results or same_bits(results["few"], total.to(x.dtype)), turn


def test_back_to_back(ranks, world):
    ranks.run(check_many, world, rounds=4)


@LONG
def test_a_thousand_back_to_back(ranks, world):
    ranks.run(check_many, world, seconds=3600, rounds=1000)


@LONG
@pytest.mark.skipif(not environment.emulated(), reason="eight GPUs")
def test_eight_ranks():
    eight = pool.RankPool(8)
    try:
        for body, arguments in ((check_corners, {}), (check_quantised_layouts, {}), (check_many, {"rounds": 10})):
            eight.run(body, 8, 1200, **arguments)
    finally:
        eight.close()


@pytest.mark.parametrize(
    "target",
    [
        ("cuda", "90", "32"),
        pytest.param(("cuda", "100", "32"), marks=LONG),
        pytest.param(("hip", "gfx942", "64"), marks=LONG),
    ],
    ids=["sm_90", "sm_100", "gfx942"],
)
def test_kernels_compile_and_access_16_bytes(target):
    kernels = compiled(1, 4, target)
    assert {kernel["name"] for kernel in kernels} >= {
        "routing.exchange", "routing.place", "throughput.dispatch", "throughput.combine", "low_latency.dispatch",
        "low_latency.combine",
    }  # fmt: skip
    if target[0] == "cuda":
        check_accesses(kernels)


def compiled(nodes, width, target) -> list[dict]:
    program = Path(__file__).with_name("ep_variants.py")
    command = [sys.executable, program, str(nodes), str(width), *target]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check_accesses(kernels):
    for kernel in kernels:
        assert not kernel["narrow"], kernel
        assert not kernel.get("divergent"), kernel
        if kernel["moves"]:
            assert "128" in kernel["loads"] and "128" in kernel["stores"], kernel


def test_bench(tmp_path):
    program = [sys.executable, "-m", "bench", "ep", "--tokens", "2", "-J", str(tmp_path / "ep.json")]
    run = subprocess.run(program, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "# Wrong results : 0 OK" in run.stdout
    found = json.loads((tmp_path / "ep.json").read_text())
    assert all(row["time_us"] > 0 for row in found["ep"])


def misaligned(tensor):
    """A view of equal values that is contiguous, but does not begin at a multiple of 16 bytes."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


def check_gradients(comm, compiled):
    """A layer of experts learns by the bits that a copy on one rank of the same sums learns by, for any tokens."""
    counts = [[(rank + more) % 5 + 1 for rank in range(comm.size)] for more in range(1 + compiled)]
    given, _ = shape_of(comm, 7, max_tokens=5)
    ep = ExpertParallel(comm, 5, given["hidden"], given["experts"], given["top_k"], torch.float32)

    def layer(x, weights, idx, layout):
        plan = autograd.plan(ep, idx, align=3)
        room = ep.max_rows + 3 if layout == "compact" else None
        rows, factors = autograd.dispatch(ep, x, plan, weights, layout, rows=room)
        total = factors if layout == "expert" else factors.sum(1)
        return autograd.combine(ep, rows * total[:, None], plan, layout)

    run = {
        layout: torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic) if compiled else layer
        for layout, dynamic in (("compact", True), ("expert", None))  # None: from the second number of tokens on
    }
    for layout, tokens in itertools.product(run, counts):
        _, problem = shape_of(comm, 7, max_tokens=5, tokens=tokens)
        idx = misaligned(problem.idx[comm.rank])
        x, weights = (misaligned(each[comm.rank].float()).requires_grad_() for each in (problem.x, problem.weights))
        y = run[layout](x, weights, idx, layout)
        y.square().sum().backward()
        kept = torch.where(idx >= 0, weights.detach(), 0.0)
        total = kept.sum(1, keepdim=True)
        exact = x.detach() * total
        torch.testing.assert_close(y.detach(), exact)
        torch.testing.assert_close(x.grad, 2 * exact * total)
        of_weights = (2 * exact * x.detach()).sum(1, keepdim=True).expand_as(kept)
        torch.testing.assert_close(weights.grad, torch.where(idx >= 0, of_weights, 0.0))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients(ranks, world, compiled):
    if compiled and world != 2:
        pytest.skip("traced alike by any number of ranks")
    ranks.run(check_gradients, world, compiled=compiled)
