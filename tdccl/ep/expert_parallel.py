"""Dispatch and combine for mixtures of experts, on rows that are spread over the ranks of a communicator."""

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tdccl import environment
from tdccl.communicator import Communicator
from tdccl.decisions import layout as heap
from tdccl.decisions import rails
from tdccl.ep import across, routing, throughput
from tdccl.ep.experts import Experts, power_of_two
from tdccl.ep.workspace import Workspace
from tdccl.errors import ArgumentError, DestroyedError
from tdccl.runtime import arrays

LAYOUTS = ("compact", "expert")
_BLOCKS = 128
_UNROLL = 1 if environment.emulated() else 2
_WARPS = 1 if environment.emulated() else 16
_CHUNK = 8  # tokens of a block that are taken while the next are under way
_numbers = itertools.count()
_Layout = dict[str, tuple[int, tuple[int, ...]]]  # of each array of a plan the first word, and the shape
_named: "weakref.WeakValueDictionary[str, ExpertParallel]" = weakref.WeakValueDictionary()


def named(name: str) -> "ExpertParallel":
    """The object of this process with that `name`. Raises DestroyedError if it is gone."""
    try:
        return _named[name]
    except KeyError:
        raise DestroyedError(f"the ExpertParallel {name!r} of this call is gone; keep a reference to it") from None


class Plan:
    """Where the rows of a routing go: made by `ExpertParallel.plan`, used by any number of dispatches and combines.

    All but the first three are int32 tensors on the device, views of the fourth, made when they are asked for. Sizes: R
    ranks, T max_tokens, K top_k, L experts a rank; across nodes, N of them with W ranks each.

    tokens          n, of this rank
    align           of which the offsets are multiples
    made_for        the sizes of the `ExpertParallel` that made it, and of all that take it
    memory          of all the others, which are views of it
    sent_row        [n, R]: the compact row of a token on each rank, -1 where it does not go; across nodes [N * T, W]:
                    on each rank of this node, of the tokens of the rank with this place in each node
    sent_node       [n, N]: whether a token goes to a node, as 1 or 0; across nodes only
    recv_row        [R, T]: the compact row here of each token of each rank, -1 where it does not come
    topk_idx        [R * T, K]: the experts of a compact row as numbered here, -1 for those of other ranks
    expert_row      [R * T, K]: the expert rows of a compact row, -1 likewise
    source          [R * T]: rank * T + token of a compact row, -1 past the last
    expert_source   [most expert rows]: the same of an expert row, -1 between the experts too
    sizes           [R]: tokens of each rank
    received        [R]: compact rows from each rank
    sent            [R]: compact rows to each; on one node only
    counts          [L]: rows of each expert here
    offsets         [L + 1]: the expert row at which each begins, and where the last ends
    """

    tokens: int
    align: int
    made_for: str
    memory: torch.Tensor
    sent_row: torch.Tensor
    sent_node: torch.Tensor
    recv_row: torch.Tensor
    topk_idx: torch.Tensor
    expert_row: torch.Tensor
    source: torch.Tensor
    expert_source: torch.Tensor
    sizes: torch.Tensor
    received: torch.Tensor
    sent: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, memory: torch.Tensor, tokens: int, align: int, made_for: str, layout: _Layout):
        self.memory, self.tokens, self.align, self.made_for = memory, tokens, align, made_for
        self._layout, self._address = layout, memory.data_ptr()

    def __getattr__(self, name: str) -> torch.Tensor:
        start, shape = self.__dict__.get("_layout", {}).get(name, (0, None))
        if shape is None:
            raise AttributeError(f"a Plan has no {name}")
        view = self.memory[start : start + math.prod(shape)].view(shape)
        self.__dict__[name] = view
        return view

    def addresses(self, *names: str) -> tuple[int, ...]:
        """Where arrays of these names begin."""
        return tuple(self._address + 4 * self._layout[name][0] for name in names)


@dataclass(frozen=True, eq=False)
class Dispatched:
    """What a dispatch brought to this rank.

    rows     [rows, hidden]: of x's dtype, or float8_e4m3fn
    scales   None; or [rows, groups of 128]: float32, or int32 with four exponents each (UE8M0), the first lowest
    weights  None; or float32: compact [rows, top_k], 0 where the expert is not here; expert [rows]
    counts   int32: compact [ranks], rows from each; expert [local experts]
    offsets  int32, where each of these begins, and where the last ends; None if compact, whose rows have no gaps
    source   int32 [rows]: rank * max_tokens + token; -1 where there is no row
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor | None
    counts: torch.Tensor
    offsets: torch.Tensor | None
    source: torch.Tensor


class ExpertParallel(Experts):
    """Sends tokens to the ranks of their experts and brings back what the experts made of them.

    Expert e is on rank e // (num_experts / ranks). All memory is allocated here, once; calls are asynchronous on the
    current stream (or `stream`), can be captured in CUDA graphs, and never wait on the host. All ranks make the same
    calls in the same order, with any number of tokens each. Calls of different objects may go on at once.

    Errors: ArgumentError before anything is launched, where shapes, dtypes or devices are wrong. What only the device
    knows, wrong experts and rows beyond the memory given for them, is left out there, and raises ArgumentError in the
    first call (or `check`) after the kernel has ended. Faults of peers raise as in the communicator's own calls.
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
        """Collective, with the same arguments on all ranks.

        max_tokens: the most tokens that a rank ever has. hidden: elements of a row. num_experts: on all ranks together,
        a multiple of them. top_k: experts of a token. dtype: bfloat16, float16 or float32. max_blocks: the largest
        grid, to leave other multiprocessors to computation.
        """
        blocks = max_blocks
        if max_blocks is None:
            blocks = _BLOCKS if len(comm.topology.nodes) == 1 else comm._context.rules.rings
            blocks = min(blocks, comm.multiprocessors)
        super().__init__(comm, max_tokens, hidden, num_experts, top_k, dtype, blocks)
        if top_k > num_experts:
            raise ArgumentError(f"top_k is {top_k}, expected at most num_experts = {num_experts}")
        columns, places = power_of_two(self.local_experts), power_of_two(top_k)
        self._routing = {
            "TOKENS": max_tokens, "TOP_K": top_k, "EXPERTS": num_experts, "TILE": max(1, 128 // places),
            "PLACES": places,
        }  # fmt: skip
        self._counting = {**self._routing, "COLUMNS": columns, "SOURCES": power_of_two(comm.size)}
        entries = -(-max_tokens * top_k // 4) * 4
        row_bytes = {"rows": hidden * dtype.itemsize, "scales": self.groups * 4, "weights": top_k * 4}
        if self.nodes == 1:
            told = {"routing": 2 * comm.size * entries * 4, "sizes": 2 * blocks * comm.size * 4}
            slot_bytes, self._told = 0, None
        else:
            told = {}  # an all_gather does it
            self._told = self._empty((entries + 4,), torch.int32), self._empty((comm.size, entries + 4), torch.int32)
            record = sum(map(_in_sixteens, row_bytes.values()))
            slot_bytes, self._chunk = _slot(record, blocks, self.nodes)
        self._kernels, self._sent = (throughput, ["sent_row"])
        if self.nodes > 1:
            self._kernels, self._sent = across, ["sent_row", "sent_node"]
        self._planning = Workspace(comm, blocks, told)
        landing = {name: self.max_rows * nbytes for name, nbytes in row_bytes.items()}
        self._moving = Workspace(comm, blocks, landing, slot_bytes)
        self.landing = self._moving.local("rows", dtype).view(self.max_rows, hidden)
        width = columns + heap.MAX_RANKS.value
        self._layouts: dict[tuple[int, int], tuple[_Layout, int]] = {}
        # Operators of torch.library find this object by it; what is compiled for some sizes must not pass for others.
        self.name = f"ep{next(_numbers)}, {self.made_for}, hidden {hidden}"
        _named[self.name] = self
        self._counts = self._empty((blocks * comm.size * width,), torch.int32)

    # ---- plans -----------------------------------------------------------------------------------------------

    def most_expert_rows(self, align: int = 1) -> int:
        """The expert rows that a rank can get at most, whatever the routing."""
        return self.max_rows * min(self.top_k, self.local_experts) + self.local_experts * (align - 1)

    def most_rows(self, layout: str, align: int = 1) -> int:
        """The rows of either layout that a rank can get at most."""
        return self.most_expert_rows(align) if layout == "expert" else self.max_rows

    def plan(self, topk_idx: torch.Tensor, align: int = 1, *, stream: Any = None) -> Plan:
        """Finds where this rank's tokens go and what the others send here, all on the device.

        topk_idx: int64 or int32 [n, top_k], n <= max_tokens: the experts of each token, -1 for none. align: every
        expert's rows in the layout "expert" begin at a multiple of it.
        """
        self.check()
        tokens = self._check_routing(topk_idx)
        if not hasattr(align, "__index__") or align < 1:
            raise ArgumentError(f"plan: align is {align!r}, expected a whole number of rows >= 1")
        plan = self._new_plan(tokens, align, stream)
        if self.nodes == 1:
            inputs, gathered = (topk_idx, plan.memory, self._counts, self._complaints), None
            self._launch_planning(routing.exchange, self._counting, inputs, (tokens, plan.memory.numel()), stream)
        else:
            message, gathered = self._told
            inputs = topk_idx, message, plan.memory, self._complaints
            self._launch_planning(routing.write, self._routing, inputs, (tokens, plan.memory.numel()), stream)
            self.comm.all_gather(message, gathered, stream=stream)
            constants, inputs = {**self._counting, "NODES": self.nodes}, (gathered, self._counts)
            self._launch_planning(routing.count, constants, inputs, (self._node,), stream)
        blocks = power_of_two(self._planning.blocks)
        constants = {**self._counting, "ALIGN": align, "NODES": self.nodes, "BLOCKS": blocks}
        outputs = plan.addresses(
            "sent_row", "sent_node", "recv_row", "topk_idx", "expert_row", "source", "expert_source", "sizes", "counts",
            "offsets",
        )  # fmt: skip
        self._launch_planning(routing.place, constants, (self._counts, gathered, *outputs), (self._node,), stream)
        return plan

    def _launch_planning(self, kernel, constants: dict[str, Any], tensors, sizes, stream) -> None:
        """Of the first tensor's dtype."""
        name, elements = arrays.TRITON_NAMES[tensors[0].dtype], tensors[0].numel()
        warps = 1 if environment.emulated() else 8
        self._planning.launch("ep_plan", kernel, name, warps, constants, tensors, sizes, elements, stream)

    def _new_plan(self, tokens: int, align: int, stream: Any) -> Plan:
        layout, words = self._known_layout(tokens, align)
        return Plan(self._empty((words,), torch.int32, stream), tokens, align, self.made_for, layout)

    def plan_words(self, tokens: int, align: int) -> int:
        """Words of the memory of a plan; of symbolic sizes too."""
        return self._plan_layout(tokens, align)[1]

    def plan_of(self, memory: torch.Tensor, tokens: int, align: int) -> Plan:
        """The plan whose `memory` this is, made by an object of these sizes."""
        layout, words = self._known_layout(tokens, align)
        self._check(memory, "the memory of the plan", (words,), (torch.int32,))
        return Plan(memory, tokens, align, self.made_for, layout)

    def _known_layout(self, tokens: int, align: int) -> tuple[_Layout, int]:
        known = self._layouts.get((tokens, align))
        if known is None:
            known = self._layouts[tokens, align] = self._plan_layout(tokens, align)
        return known

    def _plan_layout(self, tokens: int, align: int) -> tuple[_Layout, int]:
        """Where the arrays of a plan begin (those that kernels get, at multiples of 16 bytes), and all their words."""
        ranks, rows, top_k = self.comm.size, self.max_rows, self.top_k
        passed = (tokens, ranks) if self.nodes == 1 else (self.nodes * self.max_tokens, ranks // self.nodes)
        shapes = {
            "sent_row": passed, "sent_node": (tokens if self.nodes > 1 else 0, self.nodes),
            "recv_row": (ranks, self.max_tokens), "topk_idx": (rows, top_k), "expert_row": (rows, top_k),
            "source": (rows,), "expert_source": (self.most_expert_rows(align),), "told": (3, ranks),
            "counts": (self.local_experts,), "offsets": (self.local_experts + 1,),
        }  # fmt: skip
        layout, end = {}, 0
        for name, shape in shapes.items():
            layout[name] = end, shape
            end += -(-math.prod(shape) // 4) * 4
        told, _ = layout.pop("told")
        for number, name in enumerate(("sizes", "received", "sent")[: 3 if self.nodes == 1 else 2]):
            layout[name] = told + number * ranks, (ranks,)
        return layout, end

    # ---- dispatch and combine --------------------------------------------------------------------------------

    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        plan: Plan,
        weights: torch.Tensor | None = None,
        layout: str = "compact",
        *,
        quant: str | None = None,
        out: torch.Tensor | None = None,
        hook: bool = False,
        stream: Any = None,
    ) -> "Dispatched | tuple[Dispatched, Callable[[], None]]":
        """Sends each token once to each rank that has one of its experts, across nodes once to each node.

        x: [n, hidden] of the object's dtype, n as in the plan; or (float8_e4m3fn [n, hidden], scales [n, words] of 4
        bytes). weights: float32 [n, top_k]. quant: None, "fp8_128" (a scale amax / 448 for each 128 elements, amax at
        least 1e-4) or "fp8_128_ue8m0" (rounded up to a power of two).

        layout "compact": a token is one row, by (source rank, source token). Without `out` the rows and scales stay in
        this object's landing buffer, and are valid until its next dispatch or combine. "expert": it is a row for each
        of its experts here, by (expert, source rank, source token), with zeros where `plan.align` leaves gaps.
        out: [rows, hidden], for so many rows, which are no more than `most_rows`; what does not fit is left out and
        complained of. Without it, "expert" makes one for the most. hook: only send, and return (what will come, a
        function that receives it); call that before any other call of this object.
        """
        self.check()
        self.check_plan(plan, Plan)
        x, scales, payload = self._checked_input(x, plan, quant)
        self._check_optional(weights, "weights", (plan.tokens, self.top_k), torch.float32)
        if layout not in LAYOUTS:
            raise ArgumentError(f"dispatch: layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
        words = scales.shape[1] if scales is not None else self._scale_words(quant)
        kept = layout == "compact" and out is None
        if kept:
            rows, out_scales = self._landed(payload, words)
        else:
            most = self.most_rows(layout, plan.align)
            if out is None:
                rows = self._empty((most, self.hidden), payload, stream)
            else:
                rows = self._check(out, "out", (None, self.hidden), (payload,))
            if len(rows) > most:
                raise ArgumentError(f"dispatch: out has {len(rows)} rows, expected at most the {most} that can come")
            out_scales = self._empty((len(rows), words), torch.int32, stream)
        out_weights = None
        if weights is not None:
            shape = (len(rows),) if layout == "expert" else (len(rows), self.top_k)
            out_weights = self._empty(shape, torch.float32, stream)
        constants = {
            **self._row_constants(), "QUANT": quant or "", "SCALES": words,
            "SCALE_TILE": self._scale_tile(quant, words), "WEIGHTED": weights is not None,
            "OUT": "landing" if kept else layout, "TOKENS": self.max_tokens, "LOCAL": self.local_experts,
            "ALIGN": plan.align, **self._walk(kept, _UNROLL, self.hidden * payload.itemsize, words * 4),
        }  # fmt: skip
        tensors = (
            x, scales, weights, *plan.addresses(*self._sent, "recv_row", "expert_row", "sizes", "counts", "offsets"),
            None if kept else rows, out_scales, out_weights, self._complaints,
        )  # fmt: skip
        name = "u8" if x.dtype is torch.float8_e4m3fn else self._dtype_name
        finish = self._run(
            self._moving, "ep_dispatch", self._kernels.dispatch, name, _WARPS, constants, tensors, (len(rows),),
            x.numel(), hook, stream, plan,
        )  # fmt: skip
        if words:
            out_scales = out_scales.view(torch.int32 if quant == "fp8_128_ue8m0" else torch.float32)
            if scales is not None:
                out_scales = out_scales.view(scales.dtype)
        expert = layout == "expert"
        result = Dispatched(
            rows,
            out_scales if words else None,
            out_weights,
            plan.counts if expert else plan.received,
            plan.offsets if expert else None,
            (plan.expert_source if expert else plan.source)[: len(rows)],
        )
        return (result, finish) if hook else result

    def combine(
        self,
        h: torch.Tensor,
        plan: Plan,
        weights: torch.Tensor | None = None,
        layout: str = "compact",
        *,
        bias: torch.Tensor | tuple[torch.Tensor, ...] = (),
        carry: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        hook: bool = False,
        stream: Any = None,
    ) -> Any:
        """The sum, for each token of this rank, of the rows that all ranks have for it: [n, hidden].

        h: [rows, hidden] of the object's dtype, in the layout of a dispatch by the same plan. weights: for the layout
        "expert", float32 [rows], multiplies them. bias: up to two tensors [n, hidden] that are added. carry: float32,
        in the shape of what a dispatch returns as weights; what is there goes back to the tokens beside the rows, is
        added up likewise, and (y, [n, top_k]) is returned. out: [n, hidden]. hook: only send, and return (what else
        would be returned, a function that receives it); call that before any other call of this object.

        h may be `landing`, into which then nothing is copied; fill it after a dispatch, and before any other call.

        Sums are fp32, and the same bits in every run: a rank's experts in top-k order, each product rounded, the sum
        rounded to the dtype; then the biases, and the ranks in rank order, rounded to the dtype. Across nodes the bits
        are others: the ranks of a node in rank order, rounded to the dtype; then the biases, and the nodes in order.
        """
        self.check()
        self.check_plan(plan, Plan)
        if layout not in LAYOUTS:
            raise ArgumentError(f"combine: layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
        expert = layout == "expert"
        self._check(h, "h", (None, self.hidden), (self.dtype,))
        self._check_optional(weights, "weights", (len(h),), torch.float32)
        if weights is not None and not expert:
            raise ArgumentError('combine: weights are for layout="expert"; multiply compact rows by theirs before')
        self._check_optional(carry, "carry", (len(h),) if expert else (len(h), self.top_k), torch.float32)
        biases = (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
        if len(biases) > 2:
            raise ArgumentError(f"combine: {len(biases)} biases, expected at most 2")
        for each in biases:
            self._check(each, "bias", (plan.tokens, self.hidden), (self.dtype,))
        if out is None:
            out = self._empty((plan.tokens, self.hidden), self.dtype, stream)
        self._check(out, "out", (plan.tokens, self.hidden), (self.dtype,))
        carried = None if carry is None else self._empty((plan.tokens, self.top_k), torch.float32, stream)
        zero_copy = not expert and h.data_ptr() == self.landing.data_ptr()
        constants = {
            **self._row_constants(), "WEIGHTED": weights is not None, "CARRY": carry is not None,
            "BIASES": len(biases), "LAYOUT": "landing" if zero_copy else layout, "TOKENS": self.max_tokens,
            **self._walk(zero_copy, 1 if expert else _UNROLL, self.hidden * self.dtype.itemsize),
        }  # fmt: skip
        tensors = (
            h, weights, carry, *(*biases, None, None)[:2],
            *plan.addresses(*self._sent, "recv_row", "expert_row", "sizes"), out, carried,
        )  # fmt: skip
        finish = self._run(
            self._moving, "ep_combine", self._kernels.combine, self._dtype_name, _WARPS, constants, tensors, (len(h),),
            out.numel(), hook, stream, plan,
        )  # fmt: skip
        result = out if carry is None else (out, carried)
        return (result, finish) if hook else result

    def _landed(self, dtype: torch.dtype, words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The landing buffer as rows of a dtype [max_rows, hidden] and as int32 scales, so many words a row."""
        rows = self._moving.local("rows", torch.uint8)[: self.max_rows * self.hidden * dtype.itemsize]
        scales = self._moving.local("scales", torch.int32)[: self.max_rows * words]
        return rows.view(dtype).view(self.max_rows, self.hidden), scales.view(-1, max(words, 1))

    def _checked_input(self, x, plan: Plan, quant: str | None):
        """(x, its scales as int32 or None, dtype of the rows that arrive)."""
        self._check_quant(quant)
        if isinstance(x, torch.Tensor):
            self._check(x, "x", (plan.tokens, self.hidden), (self.dtype,))
            return x, None, self.dtype if quant is None else torch.float8_e4m3fn
        if quant is not None:
            raise ArgumentError(f"dispatch: x has scales, so quant is {quant!r} too late; expected None")
        x, scales = x
        self._check(x, "x", (plan.tokens, self.hidden), (torch.float8_e4m3fn,))
        self._check(scales, "scales", (plan.tokens, None), (torch.float32, torch.int32))
        if scales.shape[1] > self.groups:
            raise ArgumentError(f"scales has {scales.shape[1]} words a token, expected at most {self.groups}")
        return x, scales, torch.float8_e4m3fn

    def _scale_tile(self, quant: str | None, words: int) -> int:
        """What `quantise` gives, or a power of two that is not below `words`."""
        if quant is None:
            return power_of_two(max(1, words))
        return self._padded() // (128 if quant == "fp8_128" else 512)

    def _padded(self) -> int:
        """Elements of a row's tile: a power of two, and at least four groups."""
        return max(512, power_of_two(self.hidden))

    def _walk(self, at_once: bool, unroll: int, row_bytes: int, scale_bytes: int = 0) -> dict[str, int]:
        """How a kernel walks tokens: in chunks, and across nodes in records with rows and scales of so many bytes."""
        if self.nodes == 1:
            return {"CHUNK": self.max_tokens if at_once else _CHUNK, "UNROLL": unroll}
        scales = _in_sixteens(row_bytes)
        weights = scales + _in_sixteens(scale_bytes)
        record = weights + _in_sixteens(self.top_k * 4)
        return {"CHUNK": self._chunk, "RECORD": record, "AT_SCALES": scales, "AT_WEIGHTS": weights}

    def _row_constants(self) -> dict[str, int]:
        return {
            "WIDTH": self.hidden, "PADDED": self._padded(), "TOP_K": self.top_k, "PLACES": power_of_two(self.top_k),
        }  # fmt: skip


def _in_sixteens(nbytes: int) -> int:
    """Rounded up to a multiple of 16."""
    return -(-nbytes // 16) * 16


def _slot(record: int, blocks: int, nodes: int) -> tuple[int, int]:
    """(bytes of a slot of the rail, records of so many bytes that it has room for, a power of two)."""
    room = rails.slot_bytes_within(environment.scratch_bytes(), blocks, nodes)
    records = 1 << (max(1, min(_CHUNK, room // record)).bit_length() - 1)
    return -(-records * record // 128) * 128, records
