"""Layers of mixtures of experts for `bench.overlap`: the fused operators beside NCCL's collectives and torch's grouped
products, where every rank has a part of each expert (tensor parallel), and where it has whole ones (expert parallel).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from tdccl import environment
from tdccl.ep import ExpertParallel
from tdccl.overlap import all_gather_grouped_gemm, grouped_gemm_reduce_scatter, route, route_experts
from tdccl.overlap.routing import Routing
from tdccl.timing import slowest

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    experts: int
    top_k: int


SHAPES = {
    "Qwen3-30B": Shape(2048, 768, 128, 8),
    "Qwen3-235B": Shape(4096, 1536, 128, 8),
    "Mixtral-8x7B": Shape(4096, 14336, 8, 2),
}
if environment.emulated():
    SHAPES = {"toy": Shape(40, 96, 12, 2)}


class Layer:
    """Random tokens, matrices and choices of experts of one rank, and what torch needs to do the same."""

    def __init__(self, bench, shape: Shape, sharded: bool):
        comm, size = bench.comm, bench.comm.size
        self.bench, self.comm, self.shape, self.sharded = bench, comm, shape, sharded
        self.tokens = bench.options.tokens // size
        generator = torch.Generator(comm.device).manual_seed(1)
        scores = torch.rand(self.tokens * size, shape.experts, device=comm.device, generator=generator)
        weights, idx = scores.topk(shape.top_k, dim=1)
        self.idx, self.weights = (each.chunk(size)[comm.rank].contiguous() for each in (idx, weights))
        self.ep = ExpertParallel(comm, self.tokens, shape.hidden, shape.experts, shape.top_k) if sharded else None
        self.plan = self.ep.plan(self.idx) if sharded else None
        self.routing = self.route()
        self.alone = self._alone(idx, weights)
        self.rows = int(self.routing.offsets[-1])
        part = shape.intermediate if sharded else shape.intermediate // size
        here = shape.experts // size if sharded else shape.experts
        self.up = bench._random(here * 2 * part, shape.hidden).view(here, 2 * part, shape.hidden).transpose(1, 2)
        self.down = bench._random(here * shape.hidden, part).view(here, shape.hidden, part).transpose(1, 2)
        self.ends = self.routing.offsets[1:].contiguous()
        self.token_of_row = self.routing.source[: self.rows] // shape.top_k
        position = self.routing.tables.position
        self.row_of_entry = position.clamp(min=0).flatten()
        self.factors = torch.where(position >= 0, self.routing.weights, 0.0).bfloat16()[:, None, :]

    def route(self) -> Routing:
        if self.sharded:
            return route_experts(self.ep, self.idx, self.weights)
        return route(self.comm, self.idx, self.weights, experts=self.shape.experts)

    def _alone(self, idx, weights) -> Routing:
        """The same rows for a communicator of one rank, on which nothing travels."""
        if self.sharded:
            local = self.shape.experts // self.comm.size
            first = self.comm.rank * local
            idx = torch.where((idx >= first) & (idx < first + local), idx - first, -1)
            return route(self.bench.alone, idx, weights, experts=local)
        return route(self.bench.alone, idx, weights, experts=self.shape.experts)

    def first(self, name: str) -> None:
        """Tokens of all ranks by the experts' first matrices."""
        comm, bench = self.comm, self.bench
        x = bench._random(self.tokens, self.shape.hidden)
        gathered = x.new_empty(self.tokens * comm.size, self.shape.hidden)
        out, apart = (x.new_empty(self.routing.rows, self.up.shape[2]) for _ in range(2))
        found = []  # the last result: torch's product takes no `out`

        def multiply():
            found[:] = [torch._grouped_mm(gathered.index_select(0, self.token_of_row), self.up, offs=self.ends)]

        ways = {
            "communication, torch": lambda: _all_gather(gathered, x),
            "communication, tdccl": lambda: comm.all_gather(x, gathered),
            "product, torch": multiply,
            "product, tdccl": lambda: all_gather_grouped_gemm(gathered, self.up, self.alone, apart),
            "both, torch": lambda: (_all_gather(gathered, x), multiply()),
            "both, tdccl": lambda: all_gather_grouped_gemm(x, self.up, self.routing, out),
        }
        if self.sharded:
            arrived = x.new_empty(self.ep.most_expert_rows(), self.shape.hidden)

            def dispatch():
                self.ep.dispatch(x, self.plan, None, "expert", out=arrived)
                torch._grouped_mm(arrived[: self.rows], self.up, offs=self.plan.offsets[1:])

            ways["dispatch of tdccl.ep, then torch's product"] = dispatch
        what = "dispatch + grouped GEMM" if self.sharded else "all_gather + grouped GEMM"
        bench._measure(what, name, ways, out[: self.rows], lambda: found[0])

    def second(self, name: str) -> None:
        """Rows by the experts' second matrices, added up and brought back."""
        comm, bench, shape = self.comm, self.bench, self.shape
        h = bench._random(self.routing.rows, self.down.shape[1])
        total = h.new_empty(self.tokens * comm.size, shape.hidden)
        out, reference = (h.new_empty(self.tokens, shape.hidden) for _ in range(2))
        apart = torch.empty_like(total)

        def multiply():
            rows = torch._grouped_mm(h[: self.rows], self.down, offs=self.ends).index_select(0, self.row_of_entry)
            torch.bmm(self.factors, rows.view(-1, shape.top_k, shape.hidden), out=total[:, None, :])

        ways = {
            "communication, torch": lambda: _reduce_scatter(reference, total),
            "communication, tdccl": lambda: comm.reduce_scatter(total, out),
            "product, torch": multiply,
            "product, tdccl": lambda: grouped_gemm_reduce_scatter(h, self.down, self.alone, apart),
            "both, torch": lambda: (multiply(), _reduce_scatter(reference, total)),
            "both, tdccl": lambda: grouped_gemm_reduce_scatter(h, self.down, self.routing, out),
        }
        if self.sharded:
            factors = torch.ones(self.rows, device=h.device)

            def combine():
                rows = torch._grouped_mm(h[: self.rows], self.down, offs=self.plan.offsets[1:])
                self.ep.combine(rows, self.plan, factors, "expert")

            ways["torch's product, then combine of tdccl.ep"] = combine
        what = "grouped GEMM + combine" if self.sharded else "grouped GEMM + reduce_scatter"
        bench._measure(what, name, ways, out, reference)

    def routed(self, name: str) -> None:
        """What comes before both: the choices and weights of all ranks, sorted by expert."""
        bench = self.bench
        everyone = self.idx.new_empty(self.tokens * self.comm.size, self.shape.top_k)
        weights = self.weights.new_empty(everyone.shape)
        experts = torch.arange(self.shape.experts + 1, device=everyone.device)

        def sort():
            _all_gather(everyone, self.idx)
            _all_gather(weights, self.weights)
            torch.searchsorted(torch.sort(everyone.flatten(), stable=True).values, experts)

        times = {"both, torch": self._time(sort), "both, tdccl": self._time(self.route)}
        what = f"routing, {'whole experts' if self.sharded else 'parts of experts'}"
        speedup = round(times["both, torch"] / times["both, tdccl"], 3)
        row = {"operator": what, "mlp": name, "tokens": bench.options.tokens, "times_us": times, "speedup": speedup}
        bench._add(row)

    def _time(self, call: Callable) -> float:
        time = slowest(self.bench.clock, self.bench.bootstrap, call, lambda: None, self.bench.options.effort)
        return float(f"{time:.5g}")


def measure(bench, name: str) -> None:
    """Times and checks the routing and both products of a layer, in both ways; collective."""
    for sharded in (False, True):
        layer = Layer(bench, SHAPES[name], sharded)
        layer.routed(name)
        layer.first(name)
        layer.second(name)
