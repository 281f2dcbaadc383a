"""Dispatch and combine for few tokens, as in decoding: one launch and one round of signals each."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tdccl import environment
from tdccl.communicator import Communicator
from tdccl.ep import low_latency
from tdccl.ep.expert_parallel import Dispatched
from tdccl.ep.experts import Experts, power_of_two
from tdccl.ep.workspace import Workspace
from tdccl.errors import ArgumentError

_BLOCKS = 128
_SLICES = 4  # of a row at most, one a block
_TILE = 4 if environment.emulated() else 1  # tokens that a block sends at once
_TAKEN = 4 if environment.emulated() else 8  # rows that it takes, or sends back, at once
_TILE_BYTES = 64 << 10  # of registers, for rows under way
_OTHERS = 512  # entries of a routing to which one token's are compared at once
_ENTRIES = 32  # of all sources' routings that a block looks at at once, at least


@dataclass(eq=False)
class BatchedPlan:
    """A routing, and what a dispatch by it finds out: int32 tensors on the device.

    tokens      n, of this rank
    topk_idx    [n, top_k]: the routing; it must stay as it is until the combine
    sizes       [ranks]: tokens of each rank
    placed      [ranks, max_tokens, top_k]: expert * ranks * max_tokens + row of what came here, -1 where nothing did
    source      [local experts, ranks * max_tokens]: rank * max_tokens + token of each row of each expert
    counts      [local experts]: how many rows each has
    made_for    the sizes of the `LowLatency` that made it, and of all that take it
    dispatched  whether a dispatch by it was launched, or captured, to its end: else a combine is refused
    """

    tokens: int
    topk_idx: torch.Tensor
    sizes: torch.Tensor
    placed: torch.Tensor
    source: torch.Tensor
    counts: torch.Tensor
    made_for: str
    dispatched: bool = False


class LowLatency(Experts):
    """`ExpertParallel` for few tokens: a row goes to each of its experts by itself, into the layout "batched".

    Expert e is on rank e // (num_experts / ranks). The fewer max_tokens, the more blocks share a row. All memory is
    allocated here, once; calls are asynchronous on the current stream (or `stream`), can be captured in CUDA graphs,
    and never wait on the host. All ranks dispatch and combine in turns, with any number of tokens each. Errors as in
    `ExpertParallel`.
    """

    def __init__(
        self,
        comm: Communicator,
        max_tokens: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        max_blocks: int | None = None,
    ):
        """Collective, with the same arguments on all ranks, which are those of `ExpertParallel`; but top_k may be more
        than num_experts, for routings with -1."""
        comm.check_one_node("LowLatency")
        blocks = min(_BLOCKS, comm.multiprocessors) if max_blocks is None else max_blocks
        super().__init__(comm, max_tokens, hidden, num_experts, top_k, dtype, blocks)
        self._places, self._columns = power_of_two(top_k), max(4, power_of_two(self.local_experts))
        self._blocks = blocks
        entries = -(-max_tokens * top_k // 4) * 4
        slots = comm.size * max_tokens * top_k
        self._dispatching = Workspace(
            comm,
            blocks,
            {
                "rows": 2 * _rounded(slots * hidden * dtype.itemsize),
                "scales": 2 * _rounded(slots * self.groups * 4),
                "notes": 2 * _SLICES * comm.size * entries * 4,
                "counts": 2 * blocks * comm.size * (self._columns + 4) * 4,
            },
        )
        self._combining = Workspace(comm, blocks, {"rows": 2 * max_tokens * top_k * hidden * dtype.itemsize})

    def plan(self, topk_idx: torch.Tensor) -> BatchedPlan:
        """What a dispatch and a combine need. topk_idx: int64 or int32 [n, top_k], n <= max_tokens, -1: none."""
        self.check()
        tokens, ranks = self._check_routing(topk_idx), self.comm.size
        return BatchedPlan(
            tokens,
            topk_idx,
            self._empty((ranks,), torch.int32),
            self._empty((ranks, self.max_tokens, self.top_k), torch.int32),
            self._empty((self.local_experts, self.max_rows), torch.int32),
            self._empty((self.local_experts,), torch.int32),
            self.made_for,
        )

    def dispatch(
        self,
        x: torch.Tensor,
        plan: BatchedPlan,
        *,
        quant: str | None = None,
        out: torch.Tensor | None = None,
        hook: bool = False,
        stream: Any = None,
    ) -> "Dispatched | tuple[Dispatched, Callable[[], None]]":
        """Sends each token to each of its experts.

        x: [n, hidden] of the object's dtype. quant: None, "fp8_128" (a scale amax / 448 for each 128 elements, amax at
        least 1e-4) or "fp8_128_ue8m0" (rounded up to a power of two).

        Returns rows [local experts, ranks * max_tokens, hidden], of each expert the first `counts`, by (source rank,
        source token); scales likewise; what is past the counts is not written. No weights: they stay for `combine`.
        out: the rows. hook: only send, and return (what will come, a function that receives it); call that before any
        other call of this object.
        """
        self.check()
        self.check_plan(plan, BatchedPlan)
        self._check(x, "x", (plan.tokens, self.hidden), (self.dtype,))
        self._check_quant(quant)
        payload = self.dtype if quant is None else torch.float8_e4m3fn
        shape = (self.local_experts, self.max_rows)
        rows = self._empty((*shape, self.hidden), payload, stream) if out is None else out
        self._check(rows, "out", (*shape, self.hidden), (payload,))
        words = self._scale_words(quant)
        scales = self._empty((*shape, words), torch.int32, stream)
        unit = 512 if quant == "fp8_128_ue8m0" else 128
        slicing = self._slicing(unit, payload)
        constants = {
            **slicing, "QUANT": quant or "", "SCALES": words, "SCALE_SLICE": slicing["SLICE"] // unit,
            "SCALE_TILE": slicing["PADDED"] // unit,
            "CHUNK": max(1, min(_OTHERS // self._places, power_of_two(self.max_tokens))),
            "EXPERT_TILE": power_of_two(self.num_experts), "COLUMNS": self._columns,
            "ALIGN": math.gcd(16, self.hidden * payload.itemsize), **self._given(plan),
        }  # fmt: skip
        tensors = (
            x, plan.topk_idx, rows, scales, plan.placed, plan.source, plan.counts, plan.sizes, self._complaints,
        )  # fmt: skip
        finish = self._run(
            self._dispatching, "ep_dispatch", low_latency.dispatch, self._dtype_name, _warps(slicing), constants,
            tensors, (plan.tokens,), x.numel(), hook, stream, plan,
        )  # fmt: skip
        if quant == "fp8_128":
            scales = scales.view(torch.float32)
        result = Dispatched(rows, scales if words else None, None, plan.counts, None, plan.source)

        def receive() -> None:
            finish()
            plan.dispatched = True

        if hook:
            return result, receive
        receive()
        return result

    def combine(
        self,
        h: torch.Tensor,
        plan: BatchedPlan,
        weights: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        hook: bool = False,
        stream: Any = None,
    ) -> Any:
        """Adds up what the experts made of each token, times its weights: [n, hidden].

        h: [local experts, ranks * max_tokens, hidden] of the object's dtype, rows where the dispatch by `plan` had put
        them. weights: float32 [n, top_k]. out: [n, hidden]. hook as in `dispatch`. Raises ArgumentError before the
        dispatch; of one that was captured, the graph has to be replayed first, which is not checked.

        Sums are fp32, in top-k order, each product rounded; the last is rounded to the dtype.
        """
        self.check()
        self.check_plan(plan, BatchedPlan)
        self._check(h, "h", (self.local_experts, self.max_rows, self.hidden), (self.dtype,))
        self._check(weights, "weights", (plan.tokens, self.top_k), (torch.float32,))
        if out is None:
            out = self._empty((plan.tokens, self.hidden), self.dtype, stream)
        self._check(out, "out", (plan.tokens, self.hidden), (self.dtype,))
        if not plan.dispatched:
            raise ArgumentError(
                "combine: no dispatch by this plan has ended, expected one that says where rows go; call dispatch with "
                "this plan, and its hook if it has one, first"
            )
        slicing = self._slicing(128, self.dtype)
        constants = {**slicing, **self._given(plan)}
        tensors = (h, plan.placed, plan.sizes, plan.topk_idx, weights, out, self._complaints)
        finish = self._run(
            self._combining, "ep_combine", low_latency.combine, self._dtype_name, _warps(slicing), constants,
            tensors, (plan.tokens,), out.numel(), hook, stream, plan,
        )  # fmt: skip
        return (out, finish) if hook else out

    def _given(self, plan: BatchedPlan) -> dict[str, int]:
        return {
            "IDX": plan.topk_idx.itemsize * 8, "TOP_K": self.top_k, "PLACES": self._places, "TOKENS": self.max_tokens,
            "EXPERTS": self.num_experts, "RANKS": power_of_two(self.comm.size), "TILE": _TILE,
        }  # fmt: skip

    def _slicing(self, unit: int, payload: torch.dtype) -> dict[str, int]:
        """How a row is cut into slices, of whole units of elements, and how many rows are taken at once."""
        units = -(-self.hidden // unit)
        blocks = max(1, min(_SLICES, units, self._blocks // self.max_tokens))  # for a row: more where tokens are few
        slices = power_of_two(blocks + 1) // 2
        width = -(-units // slices) * unit
        padded = max(512, power_of_two(width))
        taken = max(1, _TILE_BYTES // (padded * payload.itemsize))
        return {
            "WIDTH": self.hidden, "SLICE": width, "SLICES": slices, "PADDED": padded,
            "ENTRIES": max(_ENTRIES, power_of_two(self.comm.size) * self._places),
            "TAKEN": min(_TAKEN, power_of_two(taken + 1) // 2),
        }  # fmt: skip


def _warps(slicing: dict[str, int]) -> int:
    return 1 if environment.emulated() else 8 if slicing["PADDED"] > 4096 else 4


def _rounded(nbytes: int) -> int:
    return -(-nbytes // 16) * 16
