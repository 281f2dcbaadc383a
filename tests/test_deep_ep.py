"""DeepEP's interface: what its documentation says of arguments and results, computed here from all ranks' inputs."""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import ep_reference as reference
import pool
import pytest
import torch
from reference import same_bits
from test_ep import recorded

import tdccl
import tdccl.compat.deep_ep as deep_ep
from tdccl.compat.deep_ep import utils

TOKENS = ([5, 0, 7, 3], [0, 0, 0, 0], [9, 12, 1, 4])  # of each rank; the last need more memory
HIDDEN, TOP_K, LOCAL = 512, 3, 2
THREE = min(3, pool.LARGEST_WORLD)  # ranks, where other numbers of them would say no more

WORLDS = (2, 3)


@contextlib.contextmanager
def buffer_of(comm, **options):
    buffer = deep_ep.Buffer(comm, explicitly_destroy=True, **options)
    yield buffer
    buffer.destroy()


def problems(comm, dtype=torch.bfloat16, hidden=HIDDEN):
    for seed, tokens in enumerate(TOKENS):
        tokens = tokens[-comm.size :]
        problem = reference.random_problem(
            seed, tokens, hidden, LOCAL * comm.size, min(TOP_K, LOCAL * comm.size), dtype, drop=0.2, device=comm.device
        )
        problem.idx[0][:2] = -1  # rows without an expert
        yield problem


def local_experts(problem, rank, row) -> list[int]:
    return [e % LOCAL if e >= 0 and e // LOCAL == rank else -1 for e in row.tolist()]


def gathered(tensors, rows):
    """tensors[source][token] of all rows."""
    return torch.stack([tensors[source][token] for source, token in rows]) if rows else tensors[0][:0]


def in_ranks(problem, rank):
    """For each token of a rank and each rank, whether it goes there."""
    ranks = range(len(problem.idx))
    tokens = [[any(e // LOCAL == to for e in row if e >= 0) for to in ranks] for row in problem.idx[rank].tolist()]
    return torch.tensor(tokens, dtype=torch.bool).view(-1, len(ranks))


def per_expert(problem, rank):
    return [int((problem.idx[rank] == expert).sum()) for expert in range(problem.experts)]


def check_layout(comm):
    with buffer_of(comm) as buffer:
        for problem in problems(comm):
            idx = problem.idx[comm.rank]
            per_rank, rdma, of_experts, in_rank, event = buffer.get_dispatch_layout(idx, problem.experts)
            assert in_rank.dtype is torch.bool and in_rank.cpu().equal(in_ranks(problem, comm.rank))
            assert per_rank.dtype is torch.int32 and per_rank.tolist() == in_rank.sum(0).tolist()
            assert of_experts.dtype is torch.int32 and of_experts.tolist() == per_expert(problem, comm.rank)
            assert rdma is None and event.event is None
            for none in (-7, problem.experts):
                strange = torch.where(idx < 0, none, idx).T.contiguous().T
                found = buffer.get_dispatch_layout(strange, problem.experts)
                assert found[2].equal(of_experts) and found[3].equal(in_rank)
        if comm.size > 1:
            with pytest.raises(tdccl.ArgumentError, match="multiple of"):
                buffer.get_dispatch_layout(idx, problem.experts + 1)


def test_layout(ranks, world):
    ranks.run(check_layout, world)


def layout_of(buffer, idx, experts) -> dict:
    names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
    return dict(zip(names, buffer.get_dispatch_layout(idx, experts)))


SENT = {
    "rows": lambda x: x,
    "fp8": lambda x: (reference.quantised(x, False)[0], reference.quantised(x, False)[1].T.contiguous().T),
    "fp8 ue8m0": lambda x: (reference.quantised(x, True)[0], reference.packed(reference.quantised(x, True)[1])),
    "fp8 a row": lambda x: (x.to(torch.float8_e4m3fn), x.float().abs().amax(1, keepdim=True)),
}


def check_arrived(received, sent, rows):
    """sent: by rank what its dispatch was given."""
    if not isinstance(sent[0], tuple):
        assert same_bits(received, gathered(sent, rows))
        return
    for part, parts in zip(received, zip(*sent)):
        assert same_bits(part[: len(rows)], gathered([each.contiguous() for each in parts], rows))


def check_dispatch(comm, kind):
    rank = comm.rank
    with buffer_of(comm) as buffer:
        for problem in problems(comm):
            sent = [SENT[kind](x) for x in problem.x]
            rows = reference.compact_rows(problem, rank)
            layout = layout_of(buffer, problem.idx[rank], problem.experts)
            received, idx, weights, counts, handle, event = buffer.dispatch(
                sent[rank], **layout, topk_idx=problem.idx[rank], topk_weights=problem.weights[rank], expert_alignment=4
            )
            check_arrived(received, sent, rows)
            expected = [local_experts(problem, rank, problem.idx[s][t]) for s, t in rows]
            assert idx.dtype is problem.idx[rank].dtype and idx.tolist() == expected
            kept = torch.where(idx >= 0, gathered(problem.weights, rows), torch.zeros_like(weights))
            assert same_bits(weights, kept)
            total = [sum(per_expert(problem, s)[rank * LOCAL + e] for s in range(comm.size)) for e in range(LOCAL)]
            assert counts == [-(-count // 4) * 4 for count in total]
            assert event.event is None

            prefix, _, _, token, in_rank, head = handle
            assert prefix[:, rank].tolist() == [sum(s <= to for s, _ in rows) for to in range(comm.size)]
            assert token.tolist() == [t for _, t in rows]
            assert in_rank is layout["is_token_in_rank"] and ((head >= 0) == in_rank).all()

            again = buffer.dispatch(sent[rank], handle)
            check_arrived(again[0], sent, rows)
            assert again[1:5] == (None, None, None, None)

            without = buffer.dispatch(sent[rank], **layout)
            check_arrived(without[0], sent, rows)
            assert without[1:3] == (None, None) and without[3] == total

            worst = comm.size * max(12, max(map(len, problem.x)))
            received, idx, weights, counts, handle, _ = buffer.dispatch(
                sent[rank], **layout, topk_idx=problem.idx[rank], topk_weights=problem.weights[rank],
                num_worst_tokens=worst,
            )  # fmt: skip
            first = received[0] if isinstance(received, tuple) else received
            assert len(first) == len(idx) == len(weights) == worst and counts == []
            cut = tuple(part[: len(rows)] for part in received) if isinstance(received, tuple) else first[: len(rows)]
            check_arrived(cut, sent, rows)
            assert idx[: len(rows)].tolist() == expected and (idx[len(rows) :] == -1).all()
            assert same_bits(weights[: len(rows)], kept)
            assert handle[3].tolist() == [t for _, t in rows] + [-1] * (worst - len(rows))


def test_dispatch(ranks, world):
    ranks.run(check_dispatch, world, kind="rows")


@pytest.mark.parametrize("kind", [kind for kind in SENT if kind != "rows"])
def test_dispatch_with_scales(ranks, kind):
    ranks.run(check_dispatch, THREE, kind=kind)


def check_combine(comm, dtype):
    rank = comm.rank
    with buffer_of(comm) as buffer:
        for problem in problems(comm, dtype):
            x = problem.x[rank]
            rows = reference.compact_rows(problem, rank)
            layout = layout_of(buffer, problem.idx[rank], problem.experts)
            routed = {"topk_idx": problem.idx[rank], "topk_weights": problem.weights[rank]}
            worst = {**routed, "num_worst_tokens": comm.size * 12}
            for options, biases in ((routed, ()), (worst, (x,)), ({}, (x, x + 1))):
                received, _, _, _, handle, event = buffer.dispatch(
                    x, **layout, **options, previous_event=buffer.capture(), async_finish=True
                )
                event.current_stream_wait()
                made = received * (rank + 2)
                made[len(rows) :] = float("nan")
                by_rank = [
                    {t: problem.x[s][t] * (peer + 2) for s, t in reference.compact_rows(problem, peer) if s == rank}
                    for peer in range(comm.size)
                ]
                bias = {0: None, 1: x, 2: biases}[len(biases)]
                combined, carried, event = buffer.combine(made, handle, bias=bias, async_finish=True)
                event.current_stream_wait()
                assert carried is None
                expected = reference.combined(by_rank, len(x), HIDDEN, dtype, biases, device=comm.device)
                assert same_bits(combined, expected)
            _, _, weights, _, handle, _ = buffer.dispatch(x, **layout, **routed)
            weights[:] = rank + 1  # where the expert is elsewhere, too
            combined, carried, event = buffer.combine(received, handle, weights)
            sums = (in_ranks(problem, rank) * torch.arange(1, comm.size + 1)).sum(1, keepdim=True)
            assert carried.cpu().equal(sums.float().expand(-1, weights.shape[1])) and event.event is None


def test_combine(ranks, world):
    ranks.run(check_combine, world, dtype=torch.bfloat16)


def test_combine_of_fp32(ranks):
    ranks.run(check_combine, THREE, dtype=torch.float32)


def check_settings(comm):
    """What has no effect is taken; a limit on multiprocessors changes no bit."""
    options = {"num_nvl_bytes": 1 << 30, "num_rdma_bytes": 1 << 30, "num_qps_per_rank": 8, "allow_mnnvl": True}
    *_, problem = problems(comm)
    x, found = problem.x[comm.rank], []
    try:
        for limit in (None, 4):
            with buffer_of(comm, **options) as buffer:
                if limit is not None:
                    deep_ep.Buffer.set_num_sms(limit)
                config = buffer.get_dispatch_config(comm.size)
                assert config == buffer.get_combine_config(comm.size) == deep_ep.Config(limit or 20, 6, 256)
                assert config.get_nvl_buffer_size_hint(2 * HIDDEN, comm.size) == 0
                assert config.get_rdma_buffer_size_hint(2 * HIDDEN, comm.size) == 0
                assert buffer.get_low_latency_rdma_size_hint(128, HIDDEN, comm.size, problem.experts) == 0
                buffer.clean_low_latency_buffer(128, HIDDEN, problem.experts)
                layout = layout_of(buffer, problem.idx[comm.rank], problem.experts)
                received, _, _, _, handle, _ = buffer.dispatch(x, **layout, config=config, async_finish=True)
                combined, _, event = buffer.combine(received, handle, config=config, async_finish=True)
                event.current_stream_wait()
                found.append((received, combined))
    finally:
        deep_ep.Buffer.num_sms, deep_ep.Buffer._max_blocks = 20, None
    assert all(map(same_bits, *found))


def test_settings(ranks):
    ranks.run(check_settings, min(2, pool.LARGEST_WORLD))


def check_memory(comm):
    """A landing buffer for the first call's tokens, and another only when there is not room enough."""
    hidden, experts = 64, LOCAL * comm.size
    with buffer_of(comm) as buffer:
        for tokens, expected in ((25, [28]), (3, [28]), (28, [28]), (29, [28, 56]), (56, [28, 56])):
            problem = reference.random_problem(0, [tokens] * comm.size, hidden, experts, 2, device=comm.device)
            x, layout = problem.x[comm.rank], layout_of(buffer, problem.idx[comm.rank], experts)
            received, *_, handle, _ = buffer.dispatch(x, **layout)
            times = in_ranks(problem, comm.rank).sum(1, keepdim=True).to(comm.device)
            assert same_bits(buffer.combine(received, handle)[0], (x.float() * times + 0.0).to(x.dtype))  # no -0
            assert [len(ep.landing) for ep in buffer._normal.values()] == [comm.size * each for each in expected]


def test_memory_is_for_the_tokens_there_are(ranks):
    ranks.run(check_memory, min(2, pool.LARGEST_WORLD))


def check_arguments(comm):
    with buffer_of(comm) as buffer:
        problem = list(problems(comm))[2]
        x, idx, weights = problem.x[comm.rank], problem.idx[comm.rank], problem.weights[comm.rank]
        layout = layout_of(buffer, idx, problem.experts)
        handle = buffer.dispatch(x, **layout)[4]
        rows, _, few, *_ = buffer.low_latency_dispatch(x, idx, 12, problem.experts, use_fp8=False)

        def few_back(topk_idx, given=few):
            return lambda: buffer.low_latency_combine(rows, topk_idx, weights, given)

        refused = [
            (few_back(idx[1:]), "as in the dispatch"),
            (few_back(idx[:, 1:]), "as in the dispatch"),
            (few_back(idx.float()), "torch.float32"),
            (few_back(idx, handle), "handle is a Handle, expected a LowLatencyHandle"),
            (few_back(idx, tuple(few)), "as it was returned"),
            (lambda: buffer.get_next_low_latency_combine_buffer(tuple(few)), "as it was returned"),
            (lambda: buffer.combine(x, tuple(handle)), "handle is a tuple, expected a Handle"),
            (lambda: buffer.dispatch(x, tuple(handle)), "as it was returned"),
            (lambda: buffer.dispatch(x), "get_dispatch_layout"),
            (lambda: buffer.dispatch(x, **layout, topk_idx=idx), "both topk_idx and topk_weights"),
            (lambda: buffer.dispatch(x, **layout, num_worst_tokens=99), "no num_worst_tokens"),
            (lambda: buffer.dispatch(x, handle, topk_idx=idx), "a handle is given"),
            (
                lambda: buffer.combine(x.new_empty(handle.rows + 1, HIDDEN), handle),
                "of the dispatch",
            ),
            (lambda: buffer.low_latency_dispatch(x, idx, 12, problem.experts, use_ue8m0=True), "round_scale=True"),
            (
                lambda: buffer.low_latency_dispatch(
                    x, idx, 12, problem.experts, async_finish=True, return_recv_hook=True
                ),
                "not both",
            ),
            (lambda: deep_ep.Buffer(None), "comm="),
            (lambda: deep_ep.Buffer("world"), "str"),
            (lambda: buffer.low_latency_update_mask_buffer(comm.size, True), f"expected one of 0 .. {comm.size - 1}"),
            (lambda: buffer.low_latency_update_mask_buffer(-1), "rank_to_mask is -1"),
        ]
        worst = {"topk_idx": idx, "topk_weights": weights, "num_worst_tokens": comm.size * len(x) - 1}
        refused.append((lambda: buffer.dispatch(x, **layout, **worst), f"{comm.size} ranks x {len(x)} tokens"))
        for call, words in refused:
            with pytest.raises(tdccl.ArgumentError, match=words):
                call()
        missing = [
            lambda: buffer.low_latency_dispatch(x, idx, 12, problem.experts, dispatch_wait_recv_cost_stats=idx),
            lambda: buffer.low_latency_combine(x, idx, weights, None, use_logfmt=True),
            lambda: buffer.internode_dispatch(x),
            lambda: buffer.get_local_buffer_tensor(torch.int8),
        ]
        for call in missing:
            with pytest.raises(NotImplementedError):
                call()


def test_what_is_refused(ranks):
    ranks.run(check_arguments, min(2, pool.LARGEST_WORLD))


def check_low_latency(comm, hooks):
    rank, most, hidden = comm.rank, 12, 640

    def done(event, hook):
        if hooks:
            hook()
        else:
            assert hook is None
            event.current_stream_wait()

    how = {"return_recv_hook": hooks, "async_finish": not hooks}
    with buffer_of(comm, low_latency_mode=True) as buffer:
        for problem in problems(comm, hidden=hidden):
            x, idx, weights = problem.x[rank], problem.idx[rank], problem.weights[rank]
            by_expert = reference.expert_rows(problem, rank)
            total = torch.zeros(len(x), hidden, device=comm.device)
            for k in range(idx.shape[1]):
                made = (x * (idx[:, k, None] + 1)).float() * weights[:, k, None]
                total += torch.where(idx[:, k, None] >= 0, made, torch.zeros_like(made))
            for fp8, rounded, packed in [(False, False, False), (True, False, False), (True, True, False), (True,) * 3]:
                stats = torch.full((LOCAL,), 100, dtype=torch.int32, device=comm.device)
                received, counts, handle, event, hook = buffer.low_latency_dispatch(
                    x, idx, most, problem.experts, use_fp8=fp8, round_scale=rounded, use_ue8m0=packed,
                    cumulative_local_expert_recv_stats=stats, **how,
                )  # fmt: skip
                done(event, hook)
                assert counts.dtype is torch.int32 and counts.tolist() == list(map(len, by_expert))
                assert stats.tolist() == [100 + len(rows) for rows in by_expert]
                info, ranges, *sizes = handle
                assert sizes == [most, hidden, problem.experts]
                values, scales = received if fp8 else (received, None)
                assert values.shape == (LOCAL, comm.size * most, hidden)
                if fp8:
                    assert scales.stride(1) == 1 and scales.shape[2] == (2 if packed else 5)
                for expert, rows in enumerate(by_expert):
                    assert info[expert, : len(rows)].tolist() == [t for _, t, _ in rows]
                    starts = [sum(s < source for s, _, _ in rows) for source in range(comm.size)]
                    lengths = [sum(s == source for s, _, _ in rows) for source in range(comm.size)]
                    assert (ranges[expert] >> 32).tolist() == starts
                    assert (ranges[expert] & 0xFFFFFFFF).tolist() == lengths
                    expected = gathered(problem.x, [(s, t) for s, t, _ in rows])
                    if fp8:
                        expected, factors = reference.quantised(expected, rounded)
                        factors = reference.packed(factors) if packed else factors
                        assert same_bits(scales[expert, : len(rows)].contiguous(), factors)
                    assert same_bits(values[expert, : len(rows)], expected)

            h = torch.full((LOCAL, comm.size * most, hidden), float("nan"), dtype=x.dtype, device=comm.device)
            for expert, rows in enumerate(by_expert):
                for row, (s, t, _) in enumerate(rows):
                    h[expert, row] = problem.x[s][t] * (rank * LOCAL + expert + 1)
            out = torch.empty_like(x)
            combined, event, hook = buffer.low_latency_combine(h, idx, weights, handle, out=out, **how)
            done(event, hook)
            assert combined is out and same_bits(out, total.to(x.dtype))
            buffer.get_next_low_latency_combine_buffer(handle)[:] = h
            combined, event, hook = buffer.low_latency_combine(h * 0, idx, weights, handle, zero_copy=True, **how)
            done(event, hook)
            assert same_bits(combined, total.to(x.dtype))
            left_out = torch.full_like(idx, -1)
            combined, event, hook = buffer.low_latency_combine(h, left_out, weights, handle, **how)
            done(event, hook)
            assert not combined.any()


@pytest.mark.parametrize("hooks", [True, False], ids=["hooks", "async"])
def test_low_latency(ranks, world, hooks):
    ranks.run(check_low_latency, world, hooks=hooks)


def check_two_batches(comm):
    """The second batch is sent before the hook of the first is called; a third has to wait."""
    with buffer_of(comm) as buffer:
        first, _, second = problems(comm)
        arrivals, stats = [], torch.zeros(LOCAL, dtype=torch.int32, device=comm.device)
        for problem in (second, first, second):
            x, idx = problem.x[comm.rank], problem.idx[comm.rank]
            arrivals.append(
                buffer.low_latency_dispatch(x, idx, 12, problem.experts, stats, use_fp8=False, return_recv_hook=True)
            )
            if len(arrivals) == 1:
                arrivals[0][4]()
        arrivals.pop(0)[4]()  # again: it has received, and is counted once
        assert stats.tolist() == list(map(len, reference.expert_rows(second, comm.rank)))
        with pytest.raises(tdccl.ArgumentError, match="call the hook of one first"):
            buffer.low_latency_dispatch(x, idx, 12, problem.experts, use_fp8=False)
        for problem, (received, counts, _, _, hook) in reversed(list(zip((first, second), arrivals))):
            hook()
            for expert, rows in enumerate(reference.expert_rows(problem, comm.rank)):
                assert counts[expert] == len(rows)
                expected = gathered(problem.x, [(s, t) for s, t, _ in rows])
                assert same_bits(received[expert, : len(rows)], expected)


def test_two_batches_under_way(ranks, world):
    ranks.run(check_two_batches, world)


def check_replay(comm):
    """A step of both modes, with everything asynchronous, repeated with other tokens and another routing."""
    hidden, experts, count = 64, LOCAL * comm.size, 3 + comm.rank
    problems = [
        reference.random_problem(seed, [3 + rank for rank in range(comm.size)], hidden, experts, 2, device=comm.device)
        for seed in range(3)
    ]
    idx, x, weights = (each[comm.rank].clone() for each in problems[0][:3])
    results = {}
    with buffer_of(comm) as buffer:

        def step():
            layout = layout_of(buffer, idx, experts)
            received, _, carried, _, handle, event = buffer.dispatch(
                x, **layout, topk_idx=idx, topk_weights=weights, num_worst_tokens=comm.size * (2 + comm.size),
                previous_event=buffer.capture(), async_finish=True,
            )  # fmt: skip
            event.current_stream_wait()
            *results["normal"], event = buffer.combine(received, handle, carried, async_finish=True)
            with event:
                received, _, handle, _, hook = buffer.low_latency_dispatch(
                    x, idx, 2 + comm.size, experts, use_fp8=False, return_recv_hook=True
                )
            hook()
            results["few"], event, _ = buffer.low_latency_combine(received, idx, weights, handle, async_finish=True)
            event.current_stream_wait()

        again = recorded(step)
        for problem in problems[1:]:
            for kept, new in zip((idx, x, weights), problem[:3]):
                kept.copy_(new[comm.rank])
            again()
            combined, carried = results["normal"]
            times = in_ranks(problem, comm.rank).sum(1, keepdim=True).to(comm.device)
            assert same_bits(combined, (x.float() * times + 0.0).to(x.dtype))  # no -0
            assert same_bits(carried, torch.where(idx >= 0, weights, torch.zeros_like(weights)))
            total = torch.zeros(count, hidden, device=comm.device)
            for k in range(2):
                total += torch.where(idx[:, k, None] >= 0, x.float() * weights[:, k, None], torch.zeros_like(total))
            assert same_bits(results["few"], total.to(x.dtype))


def test_replay(ranks, world):
    ranks.run(check_replay, world)


def check_mask(comm):
    """The last rank makes no more calls; the others notice, mask it, and go on."""
    hurried = comm.split(0)
    hurried.timeout = 2
    buffer = deep_ep.Buffer(hurried, low_latency_mode=True, enable_shrink=True)
    last, rank, most = comm.size - 1, comm.rank, 12
    problem = next(iter(problems(comm)))
    x, idx, weights = problem.x[rank], problem.idx[rank], problem.weights[rank]
    status = torch.full((comm.size,), -1, dtype=torch.int32, device=comm.device)
    before = buffer.low_latency_dispatch(x, idx, most, problem.experts, use_fp8=False)[2]
    buffer.low_latency_query_mask_buffer(status)
    assert not status.any()
    if rank != last:
        with pytest.raises(tdccl.Timeout):
            while True:
                buffer.low_latency_dispatch(x, idx, most, problem.experts, use_fp8=False)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * last + [1]
        buffer.low_latency_update_mask_buffer(last, True)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * last + [1]
        strange = torch.where(idx < 0, problem.experts, idx)
        for fp8, routing in ((False, idx), (True, strange)):
            received, counts, handle, _, _ = buffer.low_latency_dispatch(x, routing, most, problem.experts, use_fp8=fp8)
            values = received[0] if fp8 else received
            assert values.shape == (LOCAL, comm.size * most, HIDDEN) and handle[1].shape == (LOCAL, comm.size)
            made = torch.zeros(values.shape, dtype=x.dtype, device=comm.device)
            for expert, rows in enumerate(reference.expert_rows(problem, rank)):
                rows = [(s, t) for s, t, _ in rows if s != last]
                assert counts[expert] == len(rows)
                sent = gathered(problem.x, rows)
                expected = reference.quantised(sent, False) if fp8 else (sent,)
                found = [part[expert, : len(rows)].contiguous() for part in (received if fp8 else (received,))]
                assert all(map(same_bits, found, expected))
                made[expert, : len(rows)] = sent
        combined, _, _ = buffer.low_latency_combine(made, idx, weights, handle)
        total = torch.zeros(len(x), HIDDEN, device=comm.device)
        for k in range(idx.shape[1]):
            there = (idx[:, k, None] >= 0) & (idx[:, k, None] // LOCAL != last)
            total += torch.where(there, x.float() * weights[:, k, None], torch.zeros_like(total))
        assert same_bits(combined, total.to(x.dtype))
        with pytest.raises(tdccl.ArgumentError, match="before a rank was masked"):
            buffer.low_latency_combine(made, idx, weights, before)
        for call in (lambda: buffer.dispatch(x), buffer.low_latency_clean_mask_buffer):
            with pytest.raises(NotImplementedError):
                call()
    buffer.destroy()
    comm.barrier()
    hurried.destroy()


def test_a_rank_is_masked(ranks, world):
    if world == 1:
        pytest.skip("nobody is left")
    ranks.run(check_mask, world)


PROGRAM = """
import os
import sys
import torch
import torch.distributed as dist
import tdccl.compat.deep_ep

sys.modules["deep_ep"] = tdccl.compat.deep_ep
import deep_ep
from deep_ep.utils import EventHandle, EventOverlap

if torch.cuda.is_available():
    rank = os.environ.get("LOCAL_RANK") or os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]
    torch.cuda.set_device(int(rank) % torch.cuda.device_count())
if sys.argv[1] == "mpi":
    from mpi4py import MPI

    buffers = [deep_ep.Buffer(None, comm=MPI.COMM_WORLD, explicitly_destroy=True)]
else:
    dist.init_process_group(sys.argv[1])
    pair = dist.new_group([1, 0])
    buffers = [deep_ep.Buffer(group, explicitly_destroy=True) for group in (dist.group.WORLD, pair, pair)]
for buffer in buffers:
    device = buffer._comm.device
    x = torch.full((3, 64), buffer.rank + 1.0, dtype=torch.bfloat16, device=device)
    idx = torch.arange(2, device=device).expand(3, 2).contiguous()
    event = EventOverlap(EventHandle())
    *layout, event = buffer.get_dispatch_layout(idx, 2, previous_event=event, async_finish=True)
    event.current_stream_wait()
    assert layout[0].tolist() == [3, 3]
    received, counts, handle, event, hook = buffer.low_latency_dispatch(x, idx, 4, 2, use_fp8=False)
    assert counts.tolist() == [6] and received[0, :6, 0].tolist() == [1.0] * 3 + [2.0] * 3
    buffer.destroy()
print("ok")
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs two ranks")
@pytest.mark.parametrize("kind", ["gloo", "tdccl", "mpi"])
def test_kinds_of_groups(kind, tmp_path, installed):
    from test_process_group import CHECKOUT, MPIRUN, mpirun, run

    program = str(tmp_path / "program.py")
    Path(program).write_text(PROGRAM)
    if kind == "mpi":
        pytest.importorskip("mpi4py")
        if MPIRUN is None:
            pytest.skip("no mpirun: pip install tdccl[mpi]")
        output = mpirun(2, sys.executable, program, kind)
    else:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        output = run(*launcher, program, kind, path=(CHECKOUT, installed))
    assert output.count("ok") == 2


def test_calls_beside_wait_for_the_caller_s_stream_of_their_device(monkeypatch):
    """Whichever device is the current one."""
    here, elsewhere = mock.Mock(), mock.Mock()
    monkeypatch.setattr(utils.environment, "emulated", lambda: True)  # no stream of a GPU is made
    side = utils.SideStream(torch.device("cpu"))
    side.stream = mock.Mock(device=torch.device("cuda", 1))
    monkeypatch.setattr(utils.environment, "emulated", lambda: False)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: elsewhere if device is None else here)
    tensor = mock.Mock(spec=torch.Tensor)
    made, event = side.run(lambda: ("made",), (tensor,), None, async_finish=True)
    assert made == ("made",) and event.event is not None
    side.stream.wait_stream.assert_called_once_with(here)
    tensor.record_stream.assert_called_once_with(side.stream)
