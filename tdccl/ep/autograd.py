"""Dispatch and combine as differentiable operators, which torch.compile traces.

The backward of a dispatch is a combine by the same plan, and the other way round. Operators know an `ExpertParallel` by
its name, and a plan by its memory.
"""

from typing import NamedTuple

import torch

from tdccl.ep.expert_parallel import LAYOUTS, ExpertParallel, named
from tdccl.ep.experts import aligned
from tdccl.errors import ArgumentError


class Planned(NamedTuple):
    """A plan, for `dispatch` and `combine` below; its arrays are those of `ep.plan_of(memory, tokens, align)`."""

    memory: torch.Tensor
    tokens: int
    align: int
    made_for: str


def plan(ep: ExpertParallel, topk_idx: torch.Tensor, align: int = 1) -> Planned:
    """As `ep.plan(topk_idx, align)`."""
    return Planned(torch.ops.tdccl.ep_plan(topk_idx, ep.name, align), topk_idx.shape[0], align, ep.made_for)


def dispatch(
    ep: ExpertParallel,
    x: torch.Tensor,
    plan: Planned,
    weights: torch.Tensor | None = None,
    layout: str = "compact",
    *,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, their weights) of `ep.dispatch`, as new tensors, with zeros where no row came.

    Without weights their tensor is empty. rows: how many there is room for, by default for the most that can come.
    """
    ep.check_plan(plan, Planned)
    if x.shape[0] != plan.tokens:
        raise ArgumentError(f"dispatch: x has {x.shape[0]} rows, expected those of the plan's {plan.tokens} tokens")
    _check_layout("dispatch", layout)
    if rows is None:
        rows = ep.most_rows(layout, plan.align)
    return torch.ops.tdccl.ep_dispatch(x, weights, plan.memory, ep.name, plan.align, layout, rows)


def combine(ep: ExpertParallel, h: torch.Tensor, plan: Planned, layout: str = "compact") -> torch.Tensor:
    """`ep.combine` of rows [rows, hidden] to those of this rank's tokens."""
    ep.check_plan(plan, Planned)
    _check_layout("combine", layout)
    return torch.ops.tdccl.ep_combine(h, None, plan.memory, ep.name, plan.align, layout, plan.tokens)[0]


def _check_layout(name: str, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ArgumentError(f"{name}: layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")


@torch.library.custom_op("tdccl::ep_plan", mutates_args=())
def _plan(topk_idx: torch.Tensor, ep: str, align: int) -> torch.Tensor:
    return named(ep).plan(aligned(topk_idx), align).memory


@_plan.register_fake
def _(topk_idx, ep, align):
    return topk_idx.new_empty(named(ep).plan_words(topk_idx.shape[0], align), dtype=torch.int32)


@torch.library.custom_op("tdccl::ep_dispatch", mutates_args=())
def _dispatch(
    x: torch.Tensor, weights: torch.Tensor | None, plan: torch.Tensor, ep: str, align: int, layout: str, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    this = named(ep)
    out = x.new_zeros(rows, this.hidden)
    weights = None if weights is None else aligned(weights)
    room = out[: this.most_rows(layout, align)]  # what is past these stays zero
    r = this.dispatch(aligned(x), this.plan_of(plan, len(x), align), weights, layout, out=room)
    if weights is None:
        return out, x.new_empty(0, dtype=torch.float32)
    came = r.source >= 0
    factors = torch.where(came if layout == "expert" else came[:, None], r.weights, 0.0)
    if rows > len(factors):
        factors = torch.cat([factors, factors.new_zeros(rows - len(factors), *factors.shape[1:])])
    return out, factors


@_dispatch.register_fake
def _(x, weights, plan, ep, align, layout, rows):
    shape = (0,) if weights is None else (rows,) if layout == "expert" else (rows, named(ep).top_k)
    return x.new_empty(rows, x.shape[1]), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("tdccl::ep_combine", mutates_args=())
def _combine(
    h: torch.Tensor, carry: torch.Tensor | None, plan: torch.Tensor, ep: str, align: int, layout: str, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    this = named(ep)
    plan_here, most = this.plan_of(plan, tokens, align), this.most_rows(layout, align)
    h = aligned(h[:most])
    if carry is None:
        return this.combine(h, plan_here, layout=layout), h.new_empty(0, dtype=torch.float32)
    carry = carry[:most]
    if layout == "compact":  # a dispatch gives no weight of an expert elsewhere, so none has a gradient
        carry = torch.where(plan_here.topk_idx[: len(carry)] >= 0, carry, 0.0)
    return this.combine(h, plan_here, layout=layout, carry=aligned(carry))


@_combine.register_fake
def _(h, carry, plan, ep, align, layout, tokens):
    shape = (0,) if carry is None else (tokens, named(ep).top_k)
    return h.new_empty(tokens, h.shape[1]), h.new_empty(shape, dtype=torch.float32)


def _keep(ctx, inputs, output):
    rows, values, plan, ctx.ep, ctx.align, ctx.layout, _ = inputs
    ctx.weighted, ctx.count = values is not None, rows.shape[0]
    ctx.save_for_backward(plan)


def _back_by(operator):
    """The backward of one by the other: of as many rows, or tokens, as went in."""

    def backward(ctx, rows, values):
        (plan,) = ctx.saved_tensors
        values = values if ctx.weighted else None
        rows, values = operator(rows, values, plan, ctx.ep, ctx.align, ctx.layout, ctx.count)
        return rows, values if ctx.weighted else None, None, None, None, None, None

    return backward


_dispatch.register_autograd(_back_by(_combine), setup_context=_keep)
_combine.register_autograd(_back_by(_dispatch), setup_context=_keep)
