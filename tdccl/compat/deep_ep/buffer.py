"""DeepEP's `Buffer`, over `tdccl.ep`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tdccl import environment
from tdccl.communicator import Communicator
from tdccl.compat.deep_ep.handles import Handle, LowLatencyHandle
from tdccl.compat.deep_ep.utils import EventHandle, EventOverlap, SideStream
from tdccl.ep import ExpertParallel, LowLatency
from tdccl.ep.experts import aligned, once, power_of_two
from tdccl.errors import ArgumentError, PeerFailure, Timeout
from tdccl.transport.bootstrap import discover

_TIMEOUT = 600.0  # seconds, of communicators that are made for a Buffer, as in tdccl.init
_INDICES = (torch.int64, torch.int32)
_MOST_PENDING = 2  # low-latency calls of one kind whose hooks are to come

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Event = EventOverlap | None


@dataclasses.dataclass
class Config:
    """DeepEP's tuning of its queues, of which there are none here: kept, and without effect."""

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0 bytes: see `Buffer`."""
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0 bytes: see `Buffer`."""
        return 0


class Buffer:
    """Expert-parallel dispatch and combine on one host, with the arguments and results of DeepEP's Buffer.

    What differs:
    - Any hidden size, number of ranks up to 8, top-k and number of experts that the ranks divide; bfloat16, float16 and
      float32. All results are the same bits in every run.
    - Memory is taken as calls need it, whatever the sizes given here, and kept until `destroy`: for the tokens of the
      first call, then for twice as many whenever a rank has more than any before, and again for other experts, top-k or
      hidden sizes, or after `set_num_sms`. A call that needs more is collective in doing so, and cannot be captured in
      a CUDA graph: begin with the largest.
    - With `num_worst_tokens`, a rank may dispatch at most num_worst_tokens / ranks tokens, and all ranks give the same.
    - Handles are sequences of DeepEP's elements, to be passed back as they are; the elements are made when looked at.
    - `config`, and what concerns InfiniBand, is accepted and has no effect. `set_num_sms` is a limit for the normal
      mode's kernels; until it is called they take what is fastest.
    - Errors are tdccl's: ArgumentError before anything is launched; NotImplementedError for what there is not (more
      than one host, LogFMT, times of waits per rank, the raw buffer).
    - A rank that is waited for too long ends in Timeout on all, one that dies in PeerFailure. Those that are left then
      mask it, together, and go on with low-latency calls; it does not come back.
    """

    num_sms: int = 20
    _max_blocks: int | None = None

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ):
        """Collective.

        group: a torch process group of any backend, or a tdccl Communicator, or None and an mpi4py communicator as
        `comm`. Raises as `tdccl.init`; ValueError without any; NotImplementedError where ranks are on several nodes.
        """
        if group is None and comm is None:
            raise ArgumentError("Buffer: give a process group, or an mpi4py communicator as comm=")
        self.group = comm if group is None else group
        self._comm = _communicator(group, comm)
        several = len(self._comm.topology.nodes) > 1
        _refuse(several, "Buffer: its ranks are on several nodes; tdccl.ep.ExpertParallel goes across")
        self.rank, self.group_size = self._comm.rank, self._comm.size
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self.enable_shrink = enable_shrink
        self._side = SideStream(self._comm.device)
        self._members = tuple(range(self.group_size))  # not masked: their ranks in the group, by those in _comm
        self._most_tokens = 1
        self._normal: dict[tuple, ExpertParallel] = {}
        self._low_latency: dict[tuple, list[LowLatency]] = {}
        self._pending: set[LowLatency] = set()

    def destroy(self) -> None:
        """Frees all memory; collective. Without it, that happens when the process ends."""
        self._comm.destroy()

    # ---- settings --------------------------------------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether there is fp8: yes."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """At most so many multiprocessors for the normal mode's kernels, from each Buffer's next memory on."""
        Buffer.num_sms = Buffer._max_blocks = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event behind what is on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A Config, of no effect."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """A Config, of no effect."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """0 bytes: no size need be given, see `Buffer`."""
        return 0

    def get_comm_stream(self) -> "torch.cuda.Stream | None":
        """The stream of calls with async_finish; None in emulation, which has none."""
        return self._side.stream

    def get_local_buffer_tensor(self, *_, **__):
        """Raises NotImplementedError."""
        raise NotImplementedError("get_local_buffer_tensor: there is no raw buffer; take tdccl's comm.empty()")

    def internode_dispatch(self, *_, **__):
        """Raises NotImplementedError."""
        raise NotImplementedError("internode_dispatch: there is one host only; call dispatch")

    def internode_combine(self, *_, **__):
        """Raises NotImplementedError."""
        raise NotImplementedError("internode_combine: there is one host only; call combine")

    # ---- normal mode -----------------------------------------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: Event = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor, EventOverlap]:
        """How many tokens go where; nothing is sent.

        topk_idx: int64 or int32 [n, top_k], -1 for none; what is no expert counts for none, too. Returns
        (num_tokens_per_rank int32 [ranks], None, num_tokens_per_expert int32 [num_experts], is_token_in_rank bool
        [n, ranks], event).
        """
        if num_experts % self.group_size:
            raise ArgumentError(f"num_experts is {num_experts}, expected a multiple of {self.group_size} ranks")

        def call():
            idx = _experts(topk_idx, num_experts)
            per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=idx.device)  # the first: none
            per_expert.scatter_add_(0, idx.flatten() + 1, torch.ones_like(idx, dtype=torch.int32).flatten())
            in_rank = torch.zeros(len(idx), self.group_size + 1, dtype=torch.bool, device=idx.device)
            in_rank.scatter_(1, idx // (num_experts // self.group_size) + 1, True)
            in_rank = in_rank[:, 1:].contiguous()
            return in_rank.sum(0, dtype=torch.int32), None, per_expert[1:], in_rank

        made, event = self._side.run(call, (topk_idx,), previous_event, async_finish)
        return *made, event

    def dispatch(
        self,
        x: Rows,
        handle: Handle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Event = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, list[int] | None, Handle | None, EventOverlap]:
        """Sends each token once to each rank that has one of its experts.

        x: [n, hidden], or (float8_e4m3fn [n, hidden], scales float32 or int32 [n, at most a word for 128 elements]).
        handle: of an earlier dispatch, whose routing is taken again; then no other tensors. Else the three tensors of
        `get_dispatch_layout`, and topk_idx, int64 or int32, with topk_weights, float32 [n, top_k], or neither.

        Returns (recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, event). Rows are by
        (source rank, source token). recv_topk_idx: experts as numbered here, -1 for those of other ranks, whose weights
        are 0. The list is of this rank's experts, rounded up to `expert_alignment`; for it the host waits. With
        `num_worst_tokens` it does not, recv_x has so many rows, the list is empty, and recv_topk_idx is -1 behind the
        last row. With `handle`: (recv_x, None, None, None, None, event).
        """
        self._check_whole()
        if handle is not None:
            _check_handle(handle, Handle)
            if topk_idx is not None or topk_weights is not None:
                raise ArgumentError("dispatch: a handle is given, so expected neither topk_idx nor topk_weights")

            def again():
                return (self._scatter(x, handle.sizes, handle.plan, handle.rows, None)[0],)

            (received,), event = self._side.run(again, (x, handle), previous_event, async_finish)
            return received, None, None, None, None, event

        layout = (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
        if any(each is None for each in layout):
            raise ArgumentError(
                "dispatch: expected a handle, or num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert; "
                "get_dispatch_layout makes them"
            )
        if (topk_idx is None) != (topk_weights is None) or (num_worst_tokens and topk_idx is None):
            raise ArgumentError("dispatch: expected both topk_idx and topk_weights, or neither and no num_worst_tokens")

        def call():
            return self._dispatch(x, layout, topk_idx, topk_weights, expert_alignment, num_worst_tokens)

        made, event = self._side.run(call, (x, layout, topk_idx, topk_weights), previous_event, async_finish)
        return *made, event

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: Event = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """The sum of the rows that all ranks have for each token, without weights.

        x: [rows of recv_x, hidden]. topk_weights: float32 [rows, top_k], added up likewise. bias: one or two
        [n, hidden] that are added. Sums are fp32, the biases first, then the ranks in rank order.

        Returns (combined_x [n, hidden], combined_topk_weights [n, top_k] or None, event).
        """
        self._check_whole()
        _check_handle(handle, Handle)
        biases = () if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
        if len(x) != handle.rows:
            raise ArgumentError(f"combine: x has {len(x)} rows, expected the {handle.rows} of the dispatch")

        def call():
            ep = self._expert_parallel(x.shape[1], x.dtype, handle.sizes)
            carry = None if topk_weights is None else aligned(topk_weights)
            made = ep.combine(x, handle.plan, bias=biases, carry=carry)
            return (made, None) if carry is None else made

        made, event = self._side.run(call, (x, handle, topk_weights, biases), previous_event, async_finish)
        return *made, event

    def _dispatch(self, x: Rows, layout, topk_idx, topk_weights, alignment: int, worst: int) -> tuple:
        per_rank, in_rank, per_expert = layout
        tokens, ranks, experts = len(in_rank), self.group_size, len(per_expert)
        if worst:
            rows, counts, most = worst, [], -(-worst // ranks)
            if worst < ranks * tokens:
                raise ArgumentError(
                    f"dispatch: num_worst_tokens is {worst}, expected at least {ranks} ranks x {tokens} tokens"
                )
        else:
            rows, counts, most = self._received(tokens, per_rank, per_expert)
            counts = [-(-count // alignment) * alignment for count in counts]
        if topk_idx is None:  # every rank as one expert
            idx, experts = torch.where(in_rank, torch.arange(ranks, device=in_rank.device), -1), ranks
        else:
            idx = aligned(topk_idx)
        sizes = (self._room(most), experts, idx.shape[1])
        hidden = (x if isinstance(x, torch.Tensor) else x[0]).shape[1]
        plan = self._expert_parallel(hidden, _wide(x), sizes).plan(idx)
        received, weights = self._scatter(x, sizes, plan, rows, topk_weights)
        local = None if topk_idx is None else plan.topk_idx[:rows].to(topk_idx.dtype)
        return received, local, weights, counts, Handle(plan, sizes, self.rank, rows, in_rank)

    def _scatter(self, x: Rows, sizes, plan, rows: int, weights) -> tuple[Rows, torch.Tensor | None]:
        """(what arrives of x in so many rows, with its scales if it has any; the weights beside it)."""
        payload, x = (x, x) if isinstance(x, torch.Tensor) else (x[0], (x[0], aligned(x[1])))
        ep = self._expert_parallel(payload.shape[1], _wide(x), sizes)
        out = payload.new_empty(rows, payload.shape[1])
        found = ep.dispatch(x, plan, None if weights is None else aligned(weights), out=out)
        return found.rows if found.scales is None else (found.rows, found.scales), found.weights

    def _received(self, tokens: int, per_rank: torch.Tensor, per_expert: torch.Tensor) -> tuple[int, list[int], int]:
        """(rows that come here, rows of each expert here, the most tokens of a rank), for which the host waits."""
        own = torch.full((1,), tokens, dtype=torch.int32, device=per_rank.device)
        told = self._comm.all_gather(torch.cat([own, per_rank.int(), per_expert.int()]))
        told = told.view(self.group_size, -1).cpu()
        self._comm.check()
        of_ranks, of_experts = told[:, 1 : self.group_size + 1], told[:, self.group_size + 1 :]
        here = of_experts.view(self.group_size, self.group_size, -1)[:, self.rank]
        return int(of_ranks[:, self.rank].sum()), here.sum(0).tolist(), int(told[:, 0].max())

    def _room(self, most: int) -> int:
        """For how many tokens a rank memory is taken, where there are `most`: at first hardly more, then twice as many
        as before, because handles and graphs keep what was taken for fewer."""
        if most > self._most_tokens:
            step = max(1, power_of_two(most) // 8)
            self._most_tokens = max(-(-most // step) * step, 2 * self._most_tokens)
        return self._most_tokens

    def _expert_parallel(self, hidden: int, dtype: torch.dtype, sizes: tuple[int, int, int]) -> ExpertParallel:
        """For these rows, and max_tokens, num_experts and top_k; made at the first call."""
        key = (hidden, dtype, *sizes, Buffer._max_blocks)
        found = self._normal.get(key)
        if found is None:
            tokens, experts, top_k = sizes
            found = ExpertParallel(self._comm, tokens, hidden, experts, top_k, dtype, max_blocks=Buffer._max_blocks)
            self._normal[key] = found
        return found

    # ---- low latency -----------------------------------------------------------------------------------------

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Does nothing: there is nothing that would have to be clean."""

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, torch.Tensor, LowLatencyHandle, EventOverlap, Callable[[], None] | None]:
        """Sends each token to each of its experts; the host waits for nothing.

        x: [n, hidden], n <= num_max_dispatch_tokens_per_rank. topk_idx: int64 or int32 [n, top_k], -1 for none.
        cumulative_local_expert_recv_stats: int32 [local experts], to which the counts are added.
        use_fp8: e4m3 with a scale for each 128 elements, rounded up to a power of two if `round_scale`, and then if
        `use_ue8m0` four exponents in an int32.

        Returns (recv_x, recv_count, handle, event, hook). recv_x: [local experts, ranks * max, hidden], of each expert
        the first recv_count rows, by (source rank, source token); or a tuple of it and its scales [local experts,
        ranks * max, words], where a word's rows lie next to each other. recv_count: int32 [local experts]. hook: with
        `return_recv_hook`, what makes the rows arrive; until then they are on their way, of two calls at most.
        """
        _refuse(dispatch_wait_recv_cost_stats is not None, "dispatch_wait_recv_cost_stats: waits are not timed by rank")
        if use_ue8m0 and not round_scale:
            raise ArgumentError("low_latency_dispatch: use_ue8m0 needs round_scale=True")
        _check_finish(async_finish, return_recv_hook)
        most, hidden = num_max_dispatch_tokens_per_rank, x.shape[1]
        quant = None if not use_fp8 else "fp8_128_ue8m0" if round_scale else "fp8_128"

        def call():
            low = self._idle(most, hidden, num_experts, topk_idx.shape[1], x.dtype)
            plan = low.plan(self._routing(topk_idx, num_experts))
            found, finish = self._half(low, low.dispatch(x, plan, quant=quant, hook=return_recv_hook), return_recv_hook)
            rows, scales, room = found.rows, None, self.group_size * most
            if room > low.max_rows:
                rows = rows.new_empty(low.local_experts, room, hidden)
            if use_fp8:
                words, dtype = (found.scales.shape[2], torch.int32) if use_ue8m0 else (low.groups, torch.float32)
                scales = torch.empty(low.local_experts, words, room, dtype=dtype, device=x.device).transpose(1, 2)

            def receive():
                finish()
                if rows is not found.rows:
                    rows[:, : low.max_rows] = found.rows
                if use_fp8:
                    arrived = _unpacked(found.scales, low.groups) if round_scale and not use_ue8m0 else found.scales
                    scales[:, : low.max_rows] = arrived
                if cumulative_local_expert_recv_stats is not None:
                    cumulative_local_expert_recv_stats.add_(found.counts)

            hook = once(receive) if return_recv_hook else receive()
            handle = LowLatencyHandle(plan, self._members, self.group_size, most, hidden, num_experts)
            return (rows, scales) if use_fp8 else rows, found.counts, handle, hook

        used = (x, topk_idx, cumulative_local_expert_recv_stats)
        (*made, hook), event = self._side.run(call, used, None, async_finish)
        return *made, event, hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None] | None]:
        """The sum of what the experts made of each token, times their weights: fp32, in top-k order.

        x: [local experts, ranks * max, hidden], rows where the dispatch had put them; with `zero_copy` what
        `get_next_low_latency_combine_buffer` gave is taken instead. topk_idx, topk_weights (float32): [n, top_k]; n and
        the experts as dispatched, or -1 for what is left out. out: [n, hidden].

        Returns (combined_x [n, hidden], event, hook); hook as in `low_latency_dispatch`.
        """
        _refuse(use_logfmt, "use_logfmt: rows go as they are")
        _refuse(combine_wait_recv_cost_stats is not None, "combine_wait_recv_cost_stats: waits are not timed by rank")
        _check_finish(async_finish, return_recv_hook)
        _check_handle(handle, LowLatencyHandle)
        _check_routing(topk_idx, handle.plan.topk_idx)
        if zero_copy and handle.buffer is None:
            raise ArgumentError(
                "low_latency_combine: zero_copy, but get_next_low_latency_combine_buffer was not called"
            )
        if handle.members != self._members:
            raise ArgumentError("low_latency_combine: the handle is of a dispatch before a rank was masked")
        h = handle.buffer if zero_copy else x

        def call():
            low = self._idle(handle.max_tokens, handle.hidden, handle.num_experts, topk_idx.shape[1], h.dtype)
            plan = dataclasses.replace(handle.plan, topk_idx=self._routing(topk_idx, handle.num_experts))
            rows = h if len(self._members) == self.group_size else h[:, : low.max_rows].contiguous()
            made = low.combine(rows, plan, aligned(topk_weights), out=out, hook=return_recv_hook)
            combined, finish = self._half(low, made, return_recv_hook)
            return combined, once(finish) if return_recv_hook else None

        (combined, hook), event = self._side.run(call, (h, topk_idx, topk_weights, handle, out), None, async_finish)
        return combined, event, hook

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """bfloat16 [local experts, ranks * max, hidden], to be filled for a combine with `zero_copy`.

        No combine copies rows before it sends them; this one is for those who ask for it.
        """
        _check_handle(handle, LowLatencyHandle)
        if handle.buffer is None:
            shape = (len(handle.plan.counts), self.group_size * handle.max_tokens, handle.hidden)
            handle.buffer = torch.empty(shape, dtype=torch.bfloat16, device=self._comm.device)
        return handle.buffer

    def _idle(self, max_tokens: int, hidden: int, num_experts: int, top_k: int, dtype: torch.dtype) -> LowLatency:
        """One of which no hook is to come; made where there is none."""
        if num_experts % self.group_size:
            raise ArgumentError(f"num_experts is {num_experts}, expected a multiple of {self.group_size} ranks")
        num_experts = num_experts // self.group_size * len(self._members)
        key = (max_tokens, hidden, num_experts, top_k, dtype)
        made = self._low_latency.setdefault(key, [])
        for low in made:
            if low not in self._pending:
                return low
        if len(made) == _MOST_PENDING:
            raise ArgumentError(f"{_MOST_PENDING} low-latency calls are on their way: call the hook of one first")
        made.append(LowLatency(self._comm, max_tokens, hidden, num_experts, top_k, dtype))
        return made[-1]

    def _routing(self, topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
        """The routing in numbers of the experts that are left."""
        if len(self._members) == self.group_size:
            return aligned(topk_idx)
        local = num_experts // self.group_size
        numbers = torch.full((num_experts + 1,), -1, device=topk_idx.device)  # the last: of none
        for member, rank in enumerate(self._members):
            numbers[rank * local : (rank + 1) * local] = member * local + torch.arange(local, device=topk_idx.device)
        return numbers[_experts(topk_idx, num_experts)]

    def _half(self, low: LowLatency, made, hook: bool) -> tuple[Any, Callable[[], None]]:
        """(the result, what receives it) of a call to `low` that was or was not split."""
        if not hook:
            return made, lambda: None
        result, receive = made
        self._pending.add(low)

        def finish():
            receive()
            self._pending.discard(low)

        return result, finish

    # ---- masks -----------------------------------------------------------------------------------------------

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """With `mask`, leaves a rank out of the low-latency calls to come: its experts get and add nothing.

        Collective among the ranks that are left, after a fault or without one; before, calls under way and handles are
        lost, and the normal mode ends. Raises as `Communicator.shrink`; ArgumentError for what is no rank;
        NotImplementedError to unmask a masked rank.
        """
        if not 0 <= rank_to_mask < self.group_size:
            raise ArgumentError(f"rank_to_mask is {rank_to_mask}, expected one of 0 .. {self.group_size - 1}")
        if mask == (rank_to_mask not in self._members):
            return
        _refuse(not mask, "low_latency_update_mask_buffer: a masked rank does not come back; make a new Buffer")
        self._comm = self._comm.shrink([self._members.index(rank_to_mask)])
        self._members = tuple(rank for rank in self._members if rank != rank_to_mask)
        self._normal.clear()
        self._low_latency.clear()
        self._pending.clear()

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Writes 1 for each rank that is masked, or has died or been waited for too long and ought to be; else 0.

        mask_status: int32 [ranks].
        """
        left = set(self._members)
        try:
            self._comm.check()
        except (PeerFailure, Timeout) as fault:
            left.discard(self._members[fault.rank])
        mask_status.copy_(torch.tensor([int(rank not in left) for rank in range(self.group_size)]))

    def low_latency_clean_mask_buffer(self) -> None:
        """Nothing; NotImplementedError where a rank is masked."""
        for rank in range(self.group_size):
            self.low_latency_update_mask_buffer(rank, False)

    def _check_whole(self) -> None:
        _refuse(len(self._members) < self.group_size, "a rank is masked, which the normal mode does not know")


def _communicator(group: Any, mpi: Any) -> Communicator:
    """One of the Buffer's own over the same ranks, to be destroyed with it."""
    if isinstance(group, dist.ProcessGroup):
        from tdccl.process_group import ProcessGroup

        group = group.communicator if isinstance(group, ProcessGroup) else group
    if isinstance(group, Communicator):
        return group.split(0)
    device = None if environment.emulated() else torch.cuda.current_device()
    if group is None:
        return Communicator(discover(mpi, timeout=_TIMEOUT), device, _TIMEOUT)
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            f"Buffer: group is {type(group).__name__}, expected a torch process group or a tdccl Communicator"
        )
    store = dist.PrefixStore("tdccl/deep_ep", dist.distributed_c10d._get_process_group_store(group))
    bootstrap = discover(store=store, rank=group.rank(), size=group.size(), timeout=_TIMEOUT)
    return Communicator(bootstrap, device, _TIMEOUT)


def _wide(x: Rows) -> torch.dtype:
    """The dtype in which rows like these come back."""
    return x.dtype if isinstance(x, torch.Tensor) else torch.bfloat16


def _experts(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The routing as int64, with -1 for all that is no expert: an index past the end would cost the CUDA context."""
    idx = topk_idx.long()
    return torch.where((idx >= 0) & (idx < num_experts), idx, -1)


def _unpacked(scales: torch.Tensor, groups: int) -> torch.Tensor:
    """UE8M0 words [.., words] as float32 [.., groups]."""
    return (scales.view(torch.uint8)[..., :groups].int() << 23).view(torch.float32)


def _check_handle(handle: Any, kind: type) -> None:
    if not isinstance(handle, kind):
        raise ArgumentError(f"handle is a {type(handle).__name__}, expected a {kind.__name__}, as it was returned")


def _check_routing(topk_idx: torch.Tensor, sent: torch.Tensor) -> None:
    """That of a combine is read by the sizes of the dispatch, whose routing was `sent`."""
    if topk_idx.shape != sent.shape or topk_idx.device != sent.device or topk_idx.dtype not in _INDICES:
        raise ArgumentError(
            f"low_latency_combine: topk_idx is {topk_idx.dtype} {tuple(topk_idx.shape)} on {topk_idx.device}, expected "
            f"int64 or int32 {tuple(sent.shape)} on {sent.device}, as in the dispatch that made the handle"
        )


def _refuse(asked: bool, what: str) -> None:
    if asked:
        raise NotImplementedError(what)


def _check_finish(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ArgumentError("expected async_finish or return_recv_hook, not both")
