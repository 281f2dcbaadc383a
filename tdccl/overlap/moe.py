"""The feed-forward layer of a mixture of experts, on the fused operators."""

from collections.abc import Callable

import torch

from tdccl.communicator import Communicator
from tdccl.ep import ExpertParallel
from tdccl.errors import ArgumentError
from tdccl.overlap.all_gather_grouped_gemm import all_gather_grouped_gemm
from tdccl.overlap.grouped_gemm_reduce_scatter import grouped_gemm_reduce_scatter
from tdccl.overlap.routing import route, route_experts


def swiglu(rows: torch.Tensor) -> torch.Tensor:
    """[rows, 2 N] -> [rows, N]: the second half times silu of the first."""
    gate, up = rows.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


class MoE(torch.nn.Module):
    """Gated experts over the ranks of a communicator; each rank gives its own tokens and gets them back.

    up    parameter [experts here, hidden, 2 x intermediate here]: gate, then up
    down  parameter [experts here, intermediate here, hidden]

    With a communicator every rank has a part of each expert; with an ExpertParallel whole ones, those that are its own.
    The layer has no router: `forward` takes what a model's own chose.
    """

    def __init__(
        self,
        over: Communicator | ExpertParallel,
        hidden: int,
        intermediate: int,
        experts: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        activation: Callable[[torch.Tensor], torch.Tensor] = swiglu,
    ):
        """hidden, intermediate: elements of a token, and of a whole expert. experts: on all ranks together. activation:
        [rows, 2 N] -> [rows, N]. Raises ArgumentError where they do not divide by the ranks, or are not those of the
        ExpertParallel. Matrices have random values, others on each rank; load your own."""
        super().__init__()
        self.over, self.activation = over, activation
        sharded = isinstance(over, ExpertParallel)
        comm = over.comm if sharded else over
        if sharded and (experts, hidden, dtype) != (over.num_experts, over.hidden, over.dtype):
            raise ArgumentError(
                f"MoE: {experts} experts, hidden {hidden}, {dtype}, but the ExpertParallel is for {over.num_experts}, "
                f"{over.hidden}, {over.dtype}"
            )
        divided, what = (experts, "experts") if sharded else (intermediate, "intermediate")
        if divided % comm.size:
            raise ArgumentError(f"MoE: {what} is {divided}, expected a multiple of {comm.size} ranks")
        self.experts = experts
        here, part = (experts // comm.size, intermediate) if sharded else (experts, intermediate // comm.size)

        def matrices(rows: int, columns: int, fan_in: int) -> torch.nn.Parameter:
            values = torch.empty(here, columns, rows, dtype=dtype, device=comm.device)
            return torch.nn.Parameter(values.normal_(std=fan_in**-0.5).transpose(1, 2))  # rows of K are contiguous

        self.up, self.down = matrices(hidden, 2 * part, hidden), matrices(part, hidden, intermediate)

    def forward(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum over a token's experts: [tokens, hidden].

        x: [tokens, hidden], equally many tokens on all ranks, or what the ExpertParallel allows. topk_idx: int64 or
        int32 [tokens, top_k]. topk_weights: float32 [tokens, top_k]. Raises as the operators do.
        """
        if isinstance(self.over, ExpertParallel):
            routing = route_experts(self.over, topk_idx, topk_weights)
        else:
            routing = route(self.over, topk_idx, topk_weights, experts=self.experts)
        rows = all_gather_grouped_gemm(x, self.up, routing)
        return grouped_gemm_reduce_scatter(self.activation(rows), self.down, routing)
