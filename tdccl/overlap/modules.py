"""Layers of tensor-parallel models, made of the fused operators.

Column-parallel layers have rows of the weight, so each rank computes columns of the result; row-parallel ones have
columns, so each rank computes a summand of it. One after the other they need no communication in between. What goes
in and comes out is *replicated*, the same on all ranks, or *scattered*, each rank having its share of the rows
(sequence parallelism): this is for every call to say, as decoders prefill and decode with the same weights.
"""

import torch
from torch import nn
from torch.nn import functional

from tdccl.communicator import Communicator
from tdccl.errors import ArgumentError
from tdccl.overlap.all_gather_gemm import all_gather_gemm
from tdccl.overlap.all_reduce_rms_norm import all_reduce_rms_norm
from tdccl.overlap.gemm_all_reduce import gemm_all_reduce
from tdccl.overlap.gemm_reduce_scatter import gemm_reduce_scatter


class _Linear(nn.Module):
    """What both have: this rank's shard of a weight [out_features, in_features], of whole rows or columns."""

    def __init__(self, comm: Communicator, in_features: int, out_features: int, dtype: torch.dtype, dimension: int):
        super().__init__()
        shape = [out_features, in_features]
        if shape[dimension] % comm.size:
            name = ("out_features", "in_features")[dimension]
            raise ArgumentError(
                f"{type(self).__name__}: {name} is {shape[dimension]}, expected a multiple of the {comm.size} ranks"
            )
        shape[dimension] //= comm.size
        self.comm, self.dimension = comm, dimension
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=comm.device))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    @torch.no_grad()
    def load(self, weight: torch.Tensor) -> None:
        """Takes this rank's shard of the whole weight [out_features, in_features], which may be on any device."""
        self.weight.copy_(weight.chunk(self.comm.size, self.dimension)[self.comm.rank])


class ColumnParallelLinear(_Linear):
    """A linear layer of which each rank has rows of the weight, and computes columns of the result.

    weight: [out_features / size, in_features], bfloat16 or float16, drawn from this rank's generator; see `load`.
    Raises ArgumentError where the ranks do not divide out_features.
    """

    def __init__(self, comm: Communicator, in_features: int, out_features: int, dtype: torch.dtype = torch.bfloat16):
        super().__init__(comm, in_features, out_features, dtype, 0)

    def forward(self, x: torch.Tensor, scattered: bool = False) -> torch.Tensor:
        """[rows, out_features / size] of replicated x [rows, in_features], or of scattered x [rows / size, in_features]
        by `all_gather_gemm`. The gradient of x is summed over the ranks by the operator's counterpart."""
        if scattered:
            return all_gather_gemm(self.comm, x, self.weight.t())
        return _Replicated.apply(x, self.weight, self.comm)


class _Replicated(torch.autograd.Function):
    """x @ weight.t() of the same x on all ranks, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, weight, comm):
        ctx.comm = comm
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x = gemm_all_reduce(ctx.comm, gradient, weight) if ctx.needs_input_grad[0] else None
        of_weight = gradient.t() @ x if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


class RowParallelLinear(_Linear):
    """A linear layer of which each rank has columns of the weight, and computes a summand of the result.

    weight: [out_features, in_features / size], bfloat16 or float16, drawn from this rank's generator; see `load`.
    Raises ArgumentError where the ranks do not divide in_features.
    """

    def __init__(self, comm: Communicator, in_features: int, out_features: int, dtype: torch.dtype = torch.bfloat16):
        super().__init__(comm, in_features, out_features, dtype, 1)

    def forward(self, x: torch.Tensor, result: str = "replicated") -> torch.Tensor:
        """Of this rank's columns x [rows, in_features / size]: [rows, out_features] "replicated" by `gemm_all_reduce`,
        [rows / size, out_features] "scattered" by `gemm_reduce_scatter`, or this rank's summand [rows, out_features],
        "partial", for an `AllReduceRMSNorm`. Raises ArgumentError where result is none of these."""
        if result == "replicated":
            return gemm_all_reduce(self.comm, x, self.weight.t())
        if result == "scattered":
            return gemm_reduce_scatter(self.comm, x, self.weight.t())
        if result != "partial":
            raise ArgumentError(f"RowParallelLinear: result is {result!r}, expected replicated, scattered or partial")
        return functional.linear(x, self.weight)


class AllReduceRMSNorm(nn.Module):
    """RMSNorm of a residual to which all ranks' summands are added. weight: [width], ones at first."""

    def __init__(self, comm: Communicator, width: int, eps: float = 1e-6, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.comm, self.eps = comm, eps
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype, device=comm.device))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        """(normed, new residual) by `all_reduce_rms_norm`, without gradients; without a residual the norm of x alone,
        which nobody sums. x, residual: [.., width]."""
        if residual is None:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return all_reduce_rms_norm(self.comm, x, residual, self.weight, self.eps)
