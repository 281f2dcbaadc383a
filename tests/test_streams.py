"""On which device, and after what, calls are launched."""

import contextlib
import importlib
import weakref
from types import SimpleNamespace
from unittest import mock

import pool
import pytest
import test_moe
import torch

from tdccl import calls
from tdccl.ep import ExpertParallel
from tdccl.overlap import all_gather_grouped_gemm, all_reduce_rms_norm, gemm_all_reduce

norms = importlib.import_module("tdccl.overlap.all_reduce_rms_norm")  # the package has functions of these names
gradients = importlib.import_module("tdccl.overlap.grouped_gradient")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs and streams need a GPU")

# ---- the device --------------------------------------------------------------------------------------------


class Watched:
    """A kernel that notes whether each launch is made under a communicator's guard."""

    def __init__(self, kernel, guards):
        self.kernel, self.guards, self.launches = kernel, guards, []

    def __getitem__(self, grid):
        self.launches.append(bool(self.guards))
        return self.kernel[grid]


def check_device(comm):
    """Another device is the current one, where there is another."""
    problem = test_moe.problem_of(comm, 1, "random", (19, 1, 33, 35))
    routing = test_moe.routing_of(comm, problem)
    x, up = problem.x[comm.rank], problem.up[comm.rank].requires_grad_()
    rows, weight = 64 if comm.device.type == "cuda" else 2, torch.ones(8192, device=comm.device)
    residual = torch.zeros(rows, 8192, device=comm.device)
    guards, found = [], comm._on_device

    @contextlib.contextmanager
    def guarded():
        guards.append(None)
        with found():
            yield
        guards.pop()

    last, product = Watched(norms.add_and_normalise, guards), Watched(gradients.multiply_rows, guards)
    elsewhere = contextlib.nullcontext()
    if torch.cuda.device_count() > 1:
        elsewhere = torch.cuda.device((comm.device.index + 1) % torch.cuda.device_count())
    with (
        mock.patch.object(comm, "_on_device", guarded), mock.patch.object(norms, "add_and_normalise", last),
        mock.patch.object(gradients, "multiply_rows", product), elsewhere,
    ):  # fmt: skip
        normed, total = all_reduce_rms_norm(comm, residual + 1, residual, weight)
        all_gather_grouped_gemm(x, up, routing).sum().backward()
    assert total.eq(comm.size).all() and normed.allclose(weight)
    assert last.launches == [True] and product.launches == [True]


def test_kernels_beside_the_communicator_s_calls_run_on_its_device(ranks):
    ranks.run(check_device, min(2, pool.LARGEST_WORLD))


# ---- the order ---------------------------------------------------------------------------------------------


@pytest.fixture
def follow(monkeypatch):
    """Calls `_follow` of a communicator on streams 1, 2, .., of which those in `capturing` are in a graph's capture."""
    followed, capturing = [], set()
    order = SimpleNamespace(follow=lambda stream, before: followed.append((stream, before)))
    comm = SimpleNamespace(_streams={}, _captured={}, _order=order)
    monkeypatch.setattr(calls, "is_capturing", capturing.__contains__)

    def call(*streams):
        """What of these calls, one after the other, was made to wait for what."""
        followed.clear()
        for stream in streams:
            if comm._streams.get("lane") != stream:
                calls.Calls._follow(comm, "lane", stream)
        return followed[:]

    call.capturing = capturing
    return call


def test_calls_on_several_streams_wait_for_each_other(follow):
    assert follow(1, 1, 2, 2, 1) == [(2, 1), (1, 2)]


def test_branches_of_one_capture_wait_for_each_other(follow):
    follow(9)
    follow.capturing |= {1, 2}
    assert follow(1, 1, 2, 1) == [(2, 1), (1, 2)]
    follow.capturing.clear()
    assert follow(9) == []


def test_also_on_the_stream_of_earlier_calls(follow):
    follow(1)
    follow.capturing |= {1, 2}
    assert follow(1, 2, 1) == [(2, 1), (1, 2)]


def test_a_graph_does_not_wait_for_what_is_outside_it(follow):
    follow(9)
    follow.capturing.add(1)
    assert follow(1) == []
    follow.capturing.clear()
    follow.capturing.add(2)
    assert follow(2) == []
    follow.capturing.clear()
    assert follow(2) == [(2, 9)], "what was outside is still waited for outside"


def test_a_stream_that_will_be_waited_for_is_held(monkeypatch):
    """CuPy's are destroyed with their last reference, after which nothing can be recorded on them."""

    class Stream:
        def __init__(self, handle):
            self.cuda_stream = handle

    followed, capturing = [], set()
    comm = SimpleNamespace(
        _streams={}, _captured={}, _held={}, _index=0, _emulated=False, _turn=contextlib.nullcontext(),
        _order=SimpleNamespace(follow=lambda *streams: followed.append(streams)), _recorder=mock.Mock(),
    )  # fmt: skip
    comm._follow = lambda *given: calls.Calls._follow(comm, *given)
    monkeypatch.setattr(calls, "is_capturing", capturing.__contains__)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)

    def call(handle):
        stream = Stream(handle)
        calls.Calls._start(comm, b"", mock.Mock(), 0, 0, stream)
        return weakref.ref(stream)

    eager = call(1)
    capturing.add(2)
    captured = [call(2), call(2)]
    assert eager() and captured[0]()
    capturing.clear()
    assert call(3)() and followed == [(3, 1)]
    assert not eager() and not captured[0]()


def forked(comm):
    """Two branches of one graph, each with a collective and a fused product."""
    generator = torch.Generator(comm.device).manual_seed(comm.rank)
    a, b = (torch.randn(600, 600, generator=generator, device=comm.device).bfloat16() for _ in range(2))
    inputs = [torch.zeros(1 << 20, device=comm.device) for _ in range(2)]

    def layer(x):
        return comm.all_reduce(x), gemm_all_reduce(comm, a, b)

    wanted = layer(inputs[0])[1]
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        results = [layer(inputs[0])]
        with torch.cuda.stream(side):
            results.append(layer(inputs[1]))
        current.wait_stream(side)
    for step in range(50):
        for number, x in enumerate(inputs):
            x.fill_(comm.rank + step + number)
        graph.replay()
        for number, (total, product) in enumerate(results):
            assert (total == comm.size * (step + number) + sum(range(comm.size))).all(), (step, number)
            assert torch.equal(product, wanted), (step, number)
    comm.check()


@needs_gpu
def test_branches_of_a_graph_share_what_a_communicator_has(ranks, world):
    ranks.run(forked, world)


# ---- memory ------------------------------------------------------------------------------------------------


def planned_beside(comm):
    """A plan on a side stream, while the current one has yet to read what it has freed."""
    ep, side = ExpertParallel(comm, 64, 128, 2 * comm.size, 2), torch.cuda.Stream()
    idx = torch.zeros(64, 2, dtype=torch.int64, device=comm.device)
    idx[:, 1] = 1
    ep.plan(idx)
    torch.cuda.synchronize()
    freed = torch.full((ep.plan_words(64, 1),), 7, dtype=torch.int32, device=comm.device)
    torch.cuda._sleep(1_000_000_000)
    read = freed.clone()
    del freed
    plan = ep.plan(idx, stream=side)
    torch.cuda.synchronize()
    assert (read == 7).all()
    assert plan.sent.sum() == 64
    ep.check()


@needs_gpu
def test_what_a_call_makes_is_memory_of_its_stream(ranks, world):
    ranks.run(planned_beside, world)
