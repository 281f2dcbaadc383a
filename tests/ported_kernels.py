"""An all-gather and the product that waits for it, as one writes them for Triton-distributed: but for the import."""

import triton
import triton.language as tl

import tdccl.compat.triton_distributed as dl


@triton.jit
def push_rows(shard, gathered, ready, rows, K, SIZE: tl.constexpr):
    """One program a peer: copies this rank's rows there, and counts them in."""
    me, ranks = dl.rank(), dl.num_ranks()
    peer = (me + tl.program_id(0)) % ranks
    target = dl.symm_at(gathered, peer) + me * rows * K
    for start in range(0, rows * K, SIZE):
        index = start + tl.arange(0, SIZE)
        tl.store(target + index, tl.load(shard + index, mask=index < rows * K), mask=index < rows * K)
    dl.notify(ready + me, peer, signal=1, sig_op="add", comm_scope="intra_node")


@triton.jit
def multiply(
    gathered, b, c, ready, M, N, K, per_rank,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a tile, own rows first; tiles that straddle ranks wait for each of them."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    first = dl.rank() * per_rank // BLOCK_M
    tile_m = (tl.program_id(0) % tiles_m + first) % tiles_m
    i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    source = tile_m * BLOCK_M // per_rank
    last = (tl.minimum(tile_m * BLOCK_M + BLOCK_M, M) - 1) // per_rank
    token = dl.wait(ready + source, last - source + 1, "sys", "acquire", waitValue=1)
    rows = dl.consume_token(gathered + i[:, None] * K, token)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(rows + (start + k)[None, :], mask=(i < M)[:, None] & (start + k < K)[None, :], other=0)
        right = tl.load(
            b + (start + k)[:, None] * N + j[None, :], mask=(start + k < K)[:, None] & (j < N)[None, :], other=0
        )
        total += tl.dot(left, right)
    tl.store(c + i[:, None] * N + j[None, :], total.to(c.dtype.element_ty), mask=(i < M)[:, None] & (j < N)[None, :])
