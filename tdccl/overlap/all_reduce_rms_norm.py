"""All-reduce fused with what decoders do next: add the residual, and normalise by the root of the mean square.

one_shot     every rank sends its rows to all, as packets, and adds up all         small messages
two_shot     every rank adds up its part of each row, and sends the sums to all    middle sizes, more than two ranks
all_reduce   that of the communicator, then a kernel for the rest                  large messages

A block has a whole row, so it normalises what it has added up without a word to another block.
"""

import ctypes
import weakref
from typing import NamedTuple

import torch
import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl import environment
from tdccl.communicator import Communicator, named
from tdccl.decisions import layout
from tdccl.errors import ArgumentError
from tdccl.overlap.gemm import DTYPES
from tdccl.runtime.launch import keyed

# Bytes of all rows up to which they go as packets, and what one shot may send more than two.
PACKETS_UPTO = 1 << 12 if environment.emulated() else 3 << 19
ONE_SHOT_MORE = 1 << 9 if environment.emulated() else 9 << 15
WORDS_UPTO = 1 << 14  # of all ranks, that a block holds in registers
WARPS = 16


def reference(
    comm: Communicator, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `all_reduce_rms_norm` computes, one after the other."""
    total = residual + comm.all_reduce(x)
    return torch.nn.functional.rms_norm(total, (x.shape[-1],), weight, eps), total


@triton.jit
def one_shot(
    team, x, residual, weight, normed, total, rows, width, part, eps,
    DTYPE: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block sends its rows of x to all, adds up what all sent, and does the rest. part: a row's words.

    Waits:    block b for block b of every peer, once a row.
    Ordering: none needed, the flag travels in the word.
    Reuse:    each row has an epoch of its own; packet slots alternate by its parity; each rank hears from all in it.
    """
    epoch = shmem.resume(team)
    place = tl.arange(0, WORDS)
    mask = place < shmem.words_in(width, DTYPE, WIDE)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        epoch = shmem.following(epoch)
        own = shmem.load_words(_row_of(x, row, width), place, width, DTYPE, WIDE)
        for distance in tl.static_range(1, team.size):  # rank + 1 first: no two ranks on one target
            shmem.put_words(team, epoch, own, place, mask, (team.rank + distance) % team.size)
        words, epoch = shmem.get_words(team, epoch, own, place, mask)
        summed = shmem.fold_words(words, "sum", DTYPE)
        _normalise_row((summed,), residual, weight, normed, total, row, width, part, eps, DTYPE, WORDS, WIDE)
    shmem.end(team, epoch)


@triton.jit
def two_shot(
    team, x, residual, weight, normed, total, rows, width, part, eps,
    DTYPE: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block cuts its rows into parts of `part` words, sends each to its rank, adds up the own one, sends the sum to
    all, and does the rest.

    Waits:    block b for block b of every peer, twice a row: for their parts, for their sums.
    Ordering: none needed, the flag travels in the word.
    Reuse:    as `one_shot`; parts and sums have slots of their own, and go out in full, also from beyond the row's end.
    """
    epoch = shmem.resume(team)
    place = tl.arange(0, WORDS)
    mask = place < part
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        epoch = shmem.following(epoch)
        start = _row_of(x, row, width)
        for distance in tl.static_range(1, team.size):
            pe = (team.rank + distance) % team.size
            words = shmem.load_words(start, pe * part + place, _end_of(pe, part, width, DTYPE), DTYPE, WIDE)
            shmem.put_words(team, epoch, words, place, mask, pe)
        end = _end_of(team.rank, part, width, DTYPE)
        own = shmem.load_words(start, team.rank * part + place, end, DTYPE, WIDE)
        words, epoch = shmem.get_words(team, epoch, own, place, mask)
        summed = shmem.fold_words(words, "sum", DTYPE)
        for distance in tl.static_range(1, team.size):
            shmem.put_words(team, epoch, summed, WORDS + place, mask, (team.rank + distance) % team.size)
        sums, epoch = shmem.get_words(team, epoch, summed, WORDS + place, mask)
        _normalise_row(sums, residual, weight, normed, total, row, width, part, eps, DTYPE, WORDS, WIDE)
    shmem.end(team, epoch)


@triton.jit
def _row_of(matrix, row, width):
    """Pointer to the first element of a row. Ordering: none."""
    return matrix + (tl.zeros([], tl.int64) + row) * width


@triton.jit
def _end_of(number, part, width, DTYPE: tl.constexpr):
    """How many elements of a row there are up to the end of a part of so many words."""
    return tl.minimum((number + 1) * part * (32 // DTYPE.primitive_bitwidth), width)


@triton.jit
def _normalise_row(
    sums, residual, weight, normed, total, row, width, part, eps,
    DTYPE: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """total = residual + sums (words, a part each), rounded; normed = total over the root of its mean square, weighted.

    Ordering: plain loads and stores.
    """
    LANES: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    place = tl.arange(0, WORDS)
    squares = tl.zeros([WORDS], tl.float32)
    parts = ()
    for number in tl.static_range(len(sums)):
        end = _end_of(number, part, width, DTYPE)
        before = shmem.load_words(_row_of(residual, row, width), number * part + place, end, DTYPE, WIDE)
        words = tl.zeros([WORDS], tl.int32)
        for lane in tl.static_range(LANES):
            value = shmem.lane_of(before, lane, DTYPE).to(tl.float32)
            value = (value + shmem.lane_of(sums[number], lane, DTYPE).to(tl.float32)).to(DTYPE)
            words |= shmem.lane_word(value, lane, DTYPE)
            squares += value.to(tl.float32) * value.to(tl.float32)
        shmem.store_words(_row_of(total, row, width), number * part + place, words, end, DTYPE, WIDE)
        parts = parts + (words,)
    scale = tl.rsqrt(tl.sum(squares) / width + eps)
    for number in tl.static_range(len(sums)):
        end = _end_of(number, part, width, DTYPE)
        factors = shmem.load_words(weight, number * part + place, end, DTYPE, WIDE)
        words = tl.zeros([WORDS], tl.int32)
        for lane in tl.static_range(LANES):
            value = shmem.lane_of(parts[number], lane, DTYPE).to(tl.float32) * scale
            value *= shmem.lane_of(factors, lane, DTYPE).to(tl.float32)
            words |= shmem.lane_word(value.to(DTYPE), lane, DTYPE)
        shmem.store_words(_row_of(normed, row, width), number * part + place, words, end, DTYPE, WIDE)


@triton.jit
def add_and_normalise(summed, residual, weight, normed, total, width, eps, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """The same for a row of any width, a block a row, of sums in memory. Ordering: plain loads and stores."""
    row = tl.program_id(0)
    squares = tl.zeros([TILE], tl.float32)
    for start in range(0, width, TILE):
        place = start + tl.arange(0, TILE)
        mask = place < width
        value = tl.load(_row_of(residual, row, width) + place, mask=mask, other=0).to(tl.float32)
        value += tl.load(_row_of(summed, row, width) + place, mask=mask, other=0).to(tl.float32)
        value = value.to(DTYPE)
        tl.store(_row_of(total, row, width) + place, value, mask=mask)
        squares += value.to(tl.float32) * value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares) / width + eps)
    tl.debug_barrier()  # a thread may read what another has stored
    for start in range(0, width, TILE):
        place = start + tl.arange(0, TILE)
        mask = place < width
        value = tl.load(_row_of(total, row, width) + place, mask=mask, other=0).to(tl.float32) * scale
        value *= tl.load(weight + place, mask=mask, other=0).to(tl.float32)
        tl.store(_row_of(normed, row, width) + place, value.to(DTYPE), mask=mask)


def all_reduce_rms_norm(
    comm: Communicator, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, total): total = residual + the sum of all ranks' x, normed = RMSNorm of it; on the current stream.

    x: [.., width] bfloat16, float16 or float32, contiguous. residual: as x, the same on all ranks. weight: [width], of
    that dtype. Both results are new, as x, and the same bits on all ranks and in every run: the sum is that of
    `all_reduce`; residual and sum are added in fp32 and rounded to the dtype; the norm of that is computed in fp32.
    Without gradients. The first call of a larger width allocates symmetric memory, up to 34 MiB, and is
    collective: it must not be in a graph's capture. Raises ArgumentError, and what any call of `comm` raises.
    """
    return torch.ops.tdccl.all_reduce_rms_norm(x, residual, weight, eps, comm.name)


class _Packets:
    """A team of its own, with packet slots of so many words."""

    def __init__(self, comm: Communicator, slot: int):
        comm.check_one_node("communication fused with computation")
        constants = {"blocks": comm.multiprocessors, "packets": slot}
        constants |= dict.fromkeys(("rings", "ring_bytes", "channels", "slot_bytes"), 0)
        memory = comm._allocate(layout.heap_bytes(comm._team._replace(**constants)))
        comm._add(memory)
        constants = {name: tl.constexpr(value) for name, value in constants.items()}
        self.slot = slot
        self.team = comm.team._replace(heap=memory.peers, local=memory.local.view(torch.int8), **constants)
        self.stop_word = ctypes.c_int64.from_address(memory.address + layout.STOP_BYTE.value)


_kept: weakref.WeakKeyDictionary[Communicator, list[_Packets]] = weakref.WeakKeyDictionary()


def _packets(comm: Communicator, slot: int) -> _Packets:
    """The last one made, if it is large enough; those before it stay, for graphs that were captured with them."""
    kept = _kept.setdefault(comm, [])
    if not kept or kept[-1].slot < slot:
        if comm.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ArgumentError(
                "all_reduce_rms_norm: its first call of this width allocates, which a graph cannot hold; call it once "
                "before capture"
            )
        kept.append(_Packets(comm, slot))
    return kept[-1]


class Shots(NamedTuple):
    """A kernel that sends packets: the words of a part of a row, of the tile that holds it, and of a packet slot."""

    kernel: object
    part: int
    tile: int
    slot: int


def shots_for(rows: int, width: int, itemsize: int, size: int) -> Shots | None:
    """How rows of so many elements go; None: by the communicator's all_reduce."""
    nbytes = rows * width * itemsize
    words = -(-width * itemsize // 4)
    part = -(-words // (16 * size)) * 16  # whole 64 bytes
    # No fewer places than one warp has threads, 64 at most: see `get_words`.
    tile, tile_of_part = (max(64, triton.next_power_of_2(count)) for count in (words, part))
    one, two = Shots(one_shot, words, tile, tile), Shots(two_shot, part, tile_of_part, 2 * tile_of_part)
    more = 2 * (size - 1) * (size - 2) // size
    fits = [shots for shots in (one, two) if shots.slot * size <= WORDS_UPTO]
    if nbytes > PACKETS_UPTO or not fits:
        return None
    return fits[0] if more * nbytes <= ONE_SHOT_MORE else fits[-1]


def add_and_normalise_rows(summed, residual, weight, normed, total, eps: float) -> None:
    """`all_reduce_rms_norm` of what is summed already, into `normed` and `total`."""
    width = summed.shape[-1]
    keyed(add_and_normalise)[(summed.numel() // width,)](
        summed, residual, weight, normed, total, width, eps,
        DTYPE=DTYPES[summed.dtype], TILE=min(triton.next_power_of_2(width), 4096),
    )  # fmt: skip


def _compute(comm: Communicator, x, residual, weight, eps: float, normed, total) -> None:
    width = x.shape[-1]
    rows = x.numel() // width
    shots = shots_for(rows, width, x.itemsize, comm.size)
    if shots is None:
        summed = comm.all_reduce(x, torch.empty_like(x))
        with comm._on_device():
            add_and_normalise_rows(summed, residual, weight, normed, total, eps)
        return
    packets = _packets(comm, shots.slot)
    wide = width * x.itemsize % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (x, residual, weight))

    def launch():
        keyed(shots.kernel)[(min(rows, packets.team.blocks.value),)](
            packets.team, x, residual, weight, normed, total, rows, width, shots.part, eps,
            DTYPE=DTYPES[x.dtype], WORDS=shots.tile, WIDE=wide, num_warps=max(1, min(WARPS, shots.tile // 64)),
        )  # fmt: skip

    comm.start_fused("all_reduce", "all_reduce_rms_norm", x, launch)
    if environment.emulated() and packets.stop_word.value:
        comm.raise_fault()


def _check(comm: Communicator, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises ArgumentError unless the three go together."""
    if x.dtype not in DTYPES or x.device != comm.device or not x.is_contiguous() or x.dim() == 0:
        raise ArgumentError(
            f"all_reduce_rms_norm: x is {x.dtype} {tuple(x.shape)}, strides {x.stride()}, on {x.device}; expected "
            f"bfloat16, float16 or float32 [.., width], contiguous, on {comm.device}"
        )
    for name, tensor, shape in (("residual", residual, x.shape), ("weight", weight, x.shape[-1:])):
        alike = tensor.shape == shape and tensor.dtype == x.dtype and tensor.device == x.device
        if not alike or not tensor.is_contiguous():
            raise ArgumentError(
                f"all_reduce_rms_norm: {name} is {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, on "
                f"{tensor.device}; expected {x.dtype} {tuple(shape)}, contiguous, on {x.device}"
            )


@torch.library.custom_op("tdccl::all_reduce_rms_norm", mutates_args=())
def _operator(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, comm: str
) -> tuple[torch.Tensor, torch.Tensor]:
    communicator = named(comm)
    _check(communicator, x, residual, weight)
    normed, total = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        _compute(communicator, x, residual, weight, eps, normed, total)
    return normed, total


@_operator.register_fake
def _fake(x, residual, weight, eps, comm):
    return torch.empty_like(x), torch.empty_like(x)
