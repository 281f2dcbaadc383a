"""Attention as all its operators share it: a tile of queries against tiles of keys, softmax as it goes, parts merged.

Logarithms and powers are of base 2, for which there is an instruction. (FlashAttention-2's algorithm, and
flash-decoding's log-sum-exp of parts.)
"""

import math

import torch
import triton
import triton.language as tl

from tdccl.communicator import Communicator
from tdccl.errors import ArgumentError

HEAD_DIMS = (64, 128)
LOG2_E = math.log2(math.e)
# What no score is below, yet finite: a row that has seen no key needs no case of its own.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def no_keys(ROWS: tl.constexpr, DIM: tl.constexpr):
    """(highest score, sum of weights, weighted sum of values) of rows that have seen no key: fp32."""
    return tl.full([ROWS], _LOWEST, tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DIM], tl.float32)


@triton.jit
def see(q, k, v, seen, scale, top, total, out, MASKED: tl.constexpr):
    """`no_keys`, or what it has become, after a tile of keys more.

    q: [ROWS, DIM]. k, v: [KEYS, DIM]. seen: bool [ROWS, KEYS], which keys a row sees, looked at if MASKED. scale: of
    scores, times LOG2_E, above 0. Ordering: none; it computes.
    """
    scores = tl.dot(q, k.T)
    if MASKED:
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    kept = tl.exp2(top - higher)
    total = total * kept + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(v.dtype), v, out * kept[:, None])
    return higher, total, out


@triton.jit
def mean(total, out):
    """The result of rows; of those that saw no key, 0. Ordering: none."""
    return out / tl.where(total == 0, 1.0, total)[:, None]


@triton.jit
def log_sum(top, total):
    """Logarithm of base 2 of the sum of exp2 of all scores of rows; of those that saw no key, -inf. Ordering: none."""
    return top + tl.log2(total)


@triton.jit
def weights_of(parts):
    """How much each of the parts that a tuple of `log_sum`s describes counts in their union, as a tuple that sums up to
    1, or to 0 where none of them has seen a key. Ordering: none; the same bits for the same arguments."""
    top = parts[0]
    for part in tl.static_range(1, len(parts)):
        top = tl.maximum(top, parts[part])
    top = tl.maximum(top, _LOWEST)
    total = tl.exp2(parts[0] - top)
    for part in tl.static_range(1, len(parts)):
        total += tl.exp2(parts[part] - top)
    total = tl.where(total == 0, 1.0, total)
    weights = ()
    for part in tl.static_range(len(parts)):
        weights = weights + (tl.exp2(parts[part] - top) / total,)
    return weights


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """Plain attention in fp32: what the kernels compute.

    q: [B, Q, heads, dim]. k, v: [B, K, KV heads, dim], where heads is a multiple of KV heads. seen: bool, broadcast to
    [B, heads, Q, K]: which keys a query sees; 0 is the result of one that sees none.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = (each.float().repeat_interleave(groups, dim=2) for each in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * scale
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype)


def check_heads(operator: str, comm: Communicator, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises ArgumentError unless q [.., heads, dim] can attend to k and v [B, K, KV heads, dim]."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        right = tensor.dtype in (torch.bfloat16, torch.float16) and tensor.dtype == q.dtype
        if not right or tensor.device != comm.device or tensor.shape[-1:] != q.shape[-1:]:
            raise ArgumentError(
                f"{operator}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected q, k and v "
                f"of one dtype, bfloat16 or float16, and one size of heads, on {comm.device}"
            )
    if q.shape[-1] not in HEAD_DIMS:
        raise ArgumentError(f"{operator}: heads have {q.shape[-1]} elements, expected one of {HEAD_DIMS}")
    if k.dim() != 4 or k.shape != v.shape or k.shape[0] != q.shape[0]:
        raise ArgumentError(
            f"{operator}: k is {tuple(k.shape)}, v is {tuple(v.shape)}; expected both to be "
            f"[{q.shape[0]}, keys, KV heads, {q.shape[-1]}], of q's batch"
        )
    if not k.shape[2] or q.shape[-2] % k.shape[2]:
        raise ArgumentError(f"{operator}: q has {q.shape[-2]} heads, expected a multiple of the {k.shape[2]} KV heads")


def scale_of(operator: str, scale: float | None, dim: int) -> float:
    """The factor of scores that was given, or 1 / sqrt(dim). Raises ArgumentError."""
    if scale is None:
        return dim**-0.5
    if not scale > 0:
        raise ArgumentError(f"{operator}: scale is {scale}, expected a number above 0")
    return float(scale)
