"""What a dispatch leaves for the combine and for later dispatches."""

import functools
from collections.abc import Sequence

import torch

from tdccl.ep import BatchedPlan, Plan


class _Handle(Sequence):
    """A tuple in DeepEP's order, which is computed only if somebody looks into it."""

    elements: tuple

    def __len__(self) -> int:
        return len(self.elements)

    def __getitem__(self, index):
        return self.elements[index]


class Handle(_Handle):
    """(rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix, recv_src_idx, is_token_in_rank,
    send_head).

    rank_prefix_matrix [ranks, ranks]: in the column of this rank, rows here from the first ranks; -1 in others, which
    this rank does not know. There is one channel. recv_src_idx [rows]: the token on its rank, -1 where no row is.
    send_head [tokens, ranks]: the row of a token on each rank, or -1.
    """

    def __init__(self, plan: Plan, sizes: tuple[int, int, int], rank: int, rows: int, is_token_in_rank: torch.Tensor):
        """sizes: max_tokens, num_experts and top_k that the plan is for. rows: those of recv_x."""
        self.plan, self.sizes, self.rank, self.rows = plan, sizes, rank, rows
        self.is_token_in_rank = is_token_in_rank
        self.memory = (plan.memory, is_token_in_rank)

    @functools.cached_property
    def elements(self) -> tuple:
        plan, ranks = self.plan, len(self.plan.received)
        prefix = plan.memory.new_full((ranks, ranks), -1)
        prefix[:, self.rank] = plan.received.cumsum(0)
        source = plan.source[: self.rows]
        token = torch.where(source < 0, source, source % self.sizes[0])
        return (
            prefix,
            plan.sent[:, None],
            torch.zeros_like(plan.sent)[:, None],
            token,
            self.is_token_in_rank,
            plan.sent_row,
        )


class LowLatencyHandle(_Handle):
    """(src_info, layout_range, num_max_dispatch_tokens_per_rank, hidden, num_experts).

    src_info int32 [local experts, rows]: the token of a row on its rank. layout_range int64 [local experts, ranks]: the
    first row of each rank << 32 | how many. Look at these two after the hook only.
    """

    def __init__(
        self, plan: BatchedPlan, members: tuple[int, ...], ranks: int, max_tokens: int, hidden: int, num_experts: int
    ):
        """members: those of all `ranks` that are not masked."""
        self.plan, self.members, self.ranks = plan, members, ranks
        self.max_tokens, self.hidden, self.num_experts = max_tokens, hidden, num_experts
        self.memory = (plan.topk_idx, plan.sizes, plan.placed, plan.source, plan.counts)
        self.buffer: torch.Tensor | None = None  # for a combine with zero_copy

    @functools.cached_property
    def elements(self) -> tuple:
        source = self.plan.source
        row = torch.arange(source.shape[1], device=source.device)
        member = torch.where(row < self.plan.counts[:, None], source // self.max_tokens, len(self.members))
        of_rank = torch.tensor([*self.members, self.ranks], device=source.device)[member.long()]
        counts = torch.zeros(len(source), self.ranks + 1, dtype=torch.int64, device=source.device)
        counts = counts.scatter_add_(1, of_rank, torch.ones_like(of_rank))[:, : self.ranks]
        ranges = counts.cumsum(1) - counts << 32 | counts
        return source % self.max_tokens, ranges, self.max_tokens, self.hidden, self.num_experts
