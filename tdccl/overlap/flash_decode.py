"""Distributed flash decode: the keys and values of each sequence are split over the ranks, the queries are everywhere.

Two launches: all multiprocessors attend to a part of this rank's keys each; then a few blocks merge these parts, send
the result as LL packets to all peers, and merge theirs, in rank order.
"""

import torch
import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl.communicator import Communicator, named
from tdccl.errors import ArgumentError
from tdccl.overlap.attention import (
    LOG2_E,
    attend,
    check_heads,
    log_sum,
    mean,
    no_keys,
    scale_of,
    see,
    weights_of,
)
from tdccl.overlap.gemm import DTYPES
from tdccl.overlap.workspace import check_out
from tdccl.runtime.launch import keyed

# Rows of a tile of queries: the smallest that tensor cores take; the heads of a group are in it.
_GROUP = 16
_KEYS = 64
_STAGES = 3
_WARPS = 4
# Blocks of the first launch that fit on a multiprocessor together.
_RESIDENT = 2
# Columns of a unit of the second launch, and the elements that a block of it holds at once.
_WIDTH = 64
_MERGED = 4096


def reference(
    comm: Communicator, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """What `flash_decode` computes, one after the other, where k and v have as many rows on every rank."""
    keys, values = (comm.all_gather(each.contiguous()[None]) for each in (k, v))  # [ranks, B, K, KV heads, dim]
    seen = torch.arange(k.shape[1], device=k.device) < comm.all_gather(lengths[None])[:, :, None]
    parts = (each.transpose(0, 1).flatten(1, 2) for each in (keys, values, seen))
    keys, values, seen = parts
    return attend(q[:, None], keys, values, seen[:, None, None], scale)[:, 0]


@triton.jit
def attend_splits(
    q, k, v, lengths, partial, logs, room, kv_heads, group, splits, k_batch, k_row, k_head, v_batch, v_row, v_head,
    scale, ROWS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Block (sequence, KV head, split) attends with that head's `group` queries to its split of the keys.

    partial: fp32 [B, heads, splits, DIM]. logs: fp32 [B, heads, splits]. ROWS: `group` and padding.
    Ordering: plain accesses; it communicates with nobody.
    """
    split, head = tl.program_id(0) % splits, tl.program_id(0) // splits % kv_heads
    sequence = tl.program_id(0) // splits // kv_heads
    row, column, key = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, KEYS)
    first_head = (sequence * kv_heads + head) * group
    queries = tl.load(q + (first_head + row)[:, None] * DIM + column[None, :], mask=(row < group)[:, None], other=0)
    length = tl.minimum(tl.maximum(tl.load(lengths + sequence), 0), room)
    share = tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS
    first, last = split * share, tl.minimum(split * share + share, length)
    k += sequence.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
    v += sequence.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
    top, total, out = no_keys(ROWS, DIM)
    for start in tl.range(first, last, KEYS, num_stages=STAGES):
        place, there = (start + key).to(tl.int64)[:, None], (start + key < last)[:, None]
        keys = tl.load(k + place * k_row + column[None, :], mask=there, other=0)
        values = tl.load(v + place * v_row + column[None, :], mask=there, other=0)
        top, total, out = see(queries, keys, values, (start + key < last)[None, :], scale, top, total, out, MASKED=True)
    part = (first_head + row) * splits + split
    tl.store(partial + part[:, None] * DIM + column[None, :], mean(total, out), mask=(row < group)[:, None])
    tl.store(logs + part, log_sum(top, total), mask=row < group)


@triton.jit
def merge_ranks(
    team, partial, logs, out, heads, splits,
    DTYPE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out [heads, DIM] = all ranks' parts, in rank order; each block takes units of ROWS heads and WIDTH columns.

    Waits:    block b for block b of every peer, once a unit, which is an epoch of its own.
    Ordering: LL packets, which need none; a block barrier between units.
    Reuse:    packets alternate by the parity of the epoch; each rank hears from all in each.
    """
    ACROSS: tl.constexpr = DIM // WIDTH
    for unit in range(tl.program_id(0), tl.cdiv(heads, ROWS) * ACROSS, tl.num_programs(0)):
        epoch = shmem.begin(team)
        row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        head, at = unit // ACROSS * ROWS + row, unit % ACROSS * WIDTH + column
        mean_here, log_here = _merge_splits(partial, logs, head, heads, splits, at, DIM, WIDTH, ROWS, PARTS)
        words = mean_here.to(tl.int32, bitcast=True)
        log_words = log_here.to(tl.int32, bitcast=True)[:, None] + column * 0
        place = row[:, None] * WIDTH + column[None, :]
        everywhere = (place >= 0) & (head < heads)[:, None]
        log_place, once = ROWS * WIDTH + row[:, None] + column * 0, everywhere & (column == 0)[None, :]
        for distance in tl.static_range(1, team.size):  # rank + 1 first: no two ranks on one target
            pe = (team.rank + distance) % team.size
            shmem.put_words(team, epoch, words, place, everywhere, pe)
            shmem.put_words(team, epoch, log_words, log_place, once, pe)
        log_words, epoch = shmem.get_words(team, epoch, log_words, log_place, once)
        words, epoch = shmem.get_words(team, epoch, words, place, everywhere)
        found = ()
        for rank in tl.static_range(team.size):
            of_row = tl.sum(tl.where(column == 0, log_words[rank], 0), axis=1)
            found = found + (of_row.to(tl.float32, bitcast=True),)
        weights = weights_of(found)
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for rank in tl.static_range(team.size):
            total += words[rank].to(tl.float32, bitcast=True) * weights[rank][:, None]
        tl.store(out + head[:, None] * DIM + at[None, :], total.to(DTYPE), mask=everywhere)
        shmem.end(team, epoch)
        tl.debug_barrier()  # the next unit reads the epoch


@triton.jit
def _merge_splits(
    partial, logs, head, heads, splits, column,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(mean [ROWS, WIDTH], log_sum [ROWS]) of this rank's splits, PARTS of them at once. Ordering: plain loads."""
    top, total, out = no_keys(ROWS, WIDTH)
    for first in range(0, splits, PARTS):
        split = first + tl.arange(0, PARTS)
        part = head[:, None] * splits + split[None, :]
        there = (head < heads)[:, None] & (split < splits)[None, :]
        found = tl.load(logs + part, mask=there, other=-float("inf"))
        values = tl.load(partial + part[:, :, None] * DIM + column[None, None, :], mask=there[:, :, None], other=0)
        higher = tl.maximum(top, tl.max(found, axis=1))
        weights, kept = tl.exp2(found - higher[:, None]), tl.exp2(top - higher)
        total = total * kept + tl.sum(weights, axis=1)
        out = out * kept[:, None] + tl.sum(values * weights[:, :, None], axis=1)
        top = higher
    return mean(total, out), log_sum(top, total)


def flash_decode(
    comm: Communicator,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """One query a sequence and head attends to the keys of all ranks; the same bits on every rank; current stream.

    q: [B, heads, dim] bfloat16 or float16, the same on every rank; dim 64 or 128. k, v: [B, K, KV heads, dim] of that
    dtype, this rank's part of every sequence, K as it likes, rows of dim elements contiguous and 16-byte aligned;
    heads is a multiple of KV heads, by at most 16. lengths: int32 [B] on the device, read when the kernel runs: how
    many rows of k and v there are, 0 to K, on this rank. out: [B, heads, dim], contiguous; None makes a new one. scale:
    of scores, above 0; None: 1 / sqrt(dim). Sums are fp32; 0 where no rank has a key. Forward only. Raises
    ArgumentError, and what any call of `comm` raises.
    """
    _check_queries(q)
    scale = scale_of("flash_decode", scale, q.shape[-1])
    if out is None:
        return torch.ops.tdccl.flash_decode(q, k, v, lengths, scale, comm.name)
    _check(comm, q, k, v, lengths)
    _compute(comm, q, k, v, lengths, check_out("flash_decode", out, tuple(q.shape), q), scale)
    return out


def _check_queries(q: torch.Tensor) -> None:
    if q.dim() != 3:
        raise ArgumentError(f"flash_decode: q is {tuple(q.shape)}, expected [B, heads, dim]")


def _check(comm: Communicator, q, k, v, lengths) -> None:
    comm.check_one_node("flash_decode")
    _check_queries(q)
    check_heads("flash_decode", comm, q, k, v)
    if q.shape[1] > _GROUP * k.shape[2]:
        raise ArgumentError(
            f"flash_decode: {q.shape[1]} heads share {k.shape[2]} KV heads, expected at most {_GROUP} to share one"
        )
    if lengths.dtype is not torch.int32 or lengths.shape != q.shape[:1] or lengths.device != comm.device:
        raise ArgumentError(
            f"flash_decode: lengths is {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}, expected int32 "
            f"[{q.shape[0]}] on {comm.device}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.stride(3) != 1 or tensor.data_ptr() % 16 or any(stride % 8 for stride in tensor.stride()[:3]):
            raise ArgumentError(
                f"flash_decode: {name} has strides {tensor.stride()} at address {tensor.data_ptr():#x}; expected rows "
                "of contiguous elements, each at a multiple of 16 bytes"
            )


def _compute(comm: Communicator, q, k, v, lengths, out, scale: float) -> None:
    if q.numel() == 0:
        return
    q, lengths = q.contiguous(), lengths.contiguous()
    (batch, heads, dim), kv_heads = q.shape, k.shape[2]
    splits = _splits(comm, batch * kv_heads, k.shape[1])
    partial = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    logs = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    units = batch * heads * (dim // _WIDTH)
    rows = _rows(comm, units)
    blocks = min(_most_blocks(comm), -(-batch * heads // rows) * (dim // _WIDTH))

    def decode():
        keyed(attend_splits)[(batch * kv_heads * splits,)](
            q, k, v, lengths, partial, logs, k.shape[1], kv_heads, heads // kv_heads, splits, *k.stride()[:3],
            *v.stride()[:3], scale * LOG2_E, ROWS=_GROUP, DIM=dim, KEYS=_KEYS, STAGES=_STAGES, num_warps=_WARPS,
        )  # fmt: skip
        keyed(merge_ranks)[(blocks,)](
            comm.team, partial, logs, out, batch * heads, splits,
            DTYPE=DTYPES[q.dtype], DIM=dim, WIDTH=_WIDTH, ROWS=rows, PARTS=_parts(splits, rows),
            num_warps=min(4, 2 * rows),
        )  # fmt: skip

    comm.start_fused("all_gather", "flash_decode", q, decode, scratch=True)


def _splits(comm: Communicator, pairs: int, room: int) -> int:
    """Into how many parts the keys of each of `pairs` sequences and heads are split, to fill the multiprocessors."""
    blocks = comm.multiprocessors * _RESIDENT
    return max(1, min(blocks // pairs, -(-room // _KEYS)))


def _most_blocks(comm: Communicator) -> int:
    return min(comm.team.blocks.value, comm.multiprocessors)


def _rows(comm: Communicator, units: int) -> int:
    """How many heads a unit has: a power of two, as many as give each block one unit, if its packets hold them."""
    wanted = triton.next_power_of_2(-(-units // _most_blocks(comm)))
    fit = comm.team.packets.value // (_WIDTH + 1)
    return max(1, min(wanted, 1 << (fit.bit_length() - 1)))


def _parts(splits: int, rows: int) -> int:
    return min(triton.next_power_of_2(splits), _MERGED // (rows * _WIDTH))


@torch.library.custom_op("tdccl::flash_decode", mutates_args=())
def _operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, scale: float, comm: str
) -> torch.Tensor:
    communicator = named(comm)
    _check(communicator, q, k, v, lengths)
    out = q.new_empty(q.shape)
    _compute(communicator, q, k, v, lengths, out, scale)
    return out


@_operator.register_fake
def _fake(q, k, v, lengths, scale, comm):
    return q.new_empty(q.shape)
