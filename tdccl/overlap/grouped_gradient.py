"""The gradient of the experts' matrices: for each expert the sum over its rows of what went in times what came back."""

import torch
import triton
import triton.language as tl

from tdccl import environment
from tdccl.communicator import named
from tdccl.overlap.gemm import DTYPES, dense
from tdccl.overlap.routing import Routing, Sizes, local_of, padded_tokens
from tdccl.runtime.launch import keyed

# Rows of a step, and rows and columns of a tile of the gradient.
_ROWS, _TILE = (16, 32) if environment.emulated() else (64, 128)


@triton.jit
def multiply_rows(
    tables, left, right, out, K, N, DTYPE: tl.constexpr, TOP_K: tl.constexpr, LEFT_BY_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out [experts, K, N] = of each expert the sum over its rows of left [.., K] (transposed) times right [.., N].

    One of both has a row for each row of the routing, the other, which LEFT_BY_TOKEN says, one for each token of all
    ranks. Grid: tiles of [K, N], experts. Ordering: plain accesses.
    """
    across = (N + TILE - 1) // TILE
    expert = tl.program_id(1)
    k = tl.program_id(0) // across * TILE + tl.arange(0, TILE)
    n = tl.program_id(0) % across * TILE + tl.arange(0, TILE)
    first, last = tl.load(tables.offsets + expert), tl.load(tables.offsets + expert + 1)
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < last
        token = tl.load(tables.source + row, mask=live, other=0) // TOP_K
        of_left, of_right = (token, row) if LEFT_BY_TOKEN else (row, token)
        a = left + of_left.to(tl.int64)[:, None] * K + k[None, :]
        b = right + of_right.to(tl.int64)[:, None] * N + n[None, :]
        a = tl.load(a, mask=live[:, None] & (k < K)[None, :], other=0)
        b = tl.load(b, mask=live[:, None] & (n < N)[None, :], other=0)
        total = tl.dot(tl.trans(a), b, total)
    place = (tl.zeros([], tl.int64) + expert) * K * N + k.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + place, total.to(DTYPE), mask=(k < K)[:, None] & (n < N)[None, :])


@torch.library.custom_op("tdccl::grouped_gradient", mutates_args=())
def grouped_gradient(
    tokens: torch.Tensor, rows: torch.Tensor, memory: torch.Tensor, comm: str, sizes: list[int], tokens_first: bool
) -> torch.Tensor:
    """[experts here, K, N]: of each expert the sum over its rows of one's row, transposed, times the other's.

    tokens: this rank's, [tokens, ..], which are gathered from all. rows: [routing.rows, ..]. tokens_first: whether K is
    of tokens and N of rows, or the other way round. Sums are fp32, the result is of the dtype of `tokens`.
    """
    routing = Routing(named(comm), Sizes(*sizes), memory, None)
    out = _result(tokens, rows, memory, comm, sizes, tokens_first)
    if routing.rows == 0:
        return out.zero_()
    everyone = routing.comm.all_gather(padded_tokens(tokens, routing.sizes.most))
    left, right = (everyone, dense(rows)) if tokens_first else (dense(rows), everyone)
    depth, columns = out.shape[1:]
    grid = (triton.cdiv(depth, _TILE) * triton.cdiv(columns, _TILE), len(out))
    if out.numel():
        with routing.comm._on_device():
            keyed(multiply_rows)[grid](
                routing.tables, left, right, out, depth, columns,
                DTYPE=DTYPES[out.dtype], TOP_K=routing.sizes.top_k,
                LEFT_BY_TOKEN=tokens_first, ROWS=_ROWS, TILE=_TILE, num_warps=8,
            )  # fmt: skip
    return out


@grouped_gradient.register_fake
def _result(tokens, rows, memory, comm, sizes, tokens_first):
    left, right = (tokens, rows) if tokens_first else (rows, tokens)
    local = local_of(named(comm).size, Sizes(*sizes))
    return tokens.new_empty(local, left.shape[1], right.shape[1])
