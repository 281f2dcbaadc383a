"""What an operator keeps between its calls: symmetric memory, signals and epochs; and what operators share."""

import math
import weakref

import torch

from tdccl.communicator import Communicator, named
from tdccl.errors import ArgumentError

_kept: weakref.WeakKeyDictionary[Communicator, dict] = weakref.WeakKeyDictionary()


class Workspace:
    """Symmetric memory of one operator of one communicator, for matrices of any shapes that fit.

    buffer   flat: `half` elements for calls of even epochs, then as many and a unit more for those of odd ones
    signals  int64 [size, most]: every word is set by one rank alone
    epochs   int64 [2, blocks], this rank's own: a row a kernel, a word a block
    partials fp32, flat, this rank's own, of any content
    arrivals int32 [most, 2], this rank's own: zeros between calls

    If it is `copied` (by copy engines), `buffer` has the first half alone, and there are:

    starts   int64 [size], symmetric: the last call that each rank has begun
    epoch    int64 [1], this rank's own: its last call
    told     int64 [size, most], this rank's own: how many tiles of each piece are done
    """

    def __init__(
        self, comm: Communicator, elements: int, unit: int, dtype: torch.dtype, most: int, blocks: int, copied: bool,
        partials: int,
    ):  # fmt: skip
        comm.check_one_node("communication fused with computation")
        self.half, self.most, self.copied = elements, most, copied
        self.buffer = comm.empty(elements if copied else 2 * elements + unit, dtype)
        self.signals = comm.empty((comm.size, most), torch.int64)
        self.epochs = torch.zeros((2, blocks), dtype=torch.int64, device=comm.device)
        self.partials = torch.empty(partials, device=comm.device)
        self.arrivals = torch.zeros((most, 2), dtype=torch.int32, device=comm.device)
        self.on_all_ranks = comm.symmetric(self.buffer)
        self.signals_on_all_ranks = comm.symmetric(self.signals)
        if copied:
            self.starts_on_all_ranks = comm.symmetric(comm.empty(comm.size, torch.int64))
            self.loaded = False
            self.epoch = torch.zeros(1, dtype=torch.int64, device=comm.device)
            self.told = torch.zeros((comm.size, most), dtype=torch.int64, device=comm.device)

    def odd(self, unit: int) -> int:
        """The element with which odd epochs begin, a multiple of `unit`, past what even ones of any shape use."""
        return 0 if self.copied else padded(self.half, unit)

    def holds(self, elements: int, unit: int, most: int, partials: int) -> bool:
        """Whether a call with so many elements, signals a rank, and partial sums fits."""
        fits = elements <= self.half and self.odd(unit) + elements <= self.buffer.numel()
        return fits and most <= self.most and partials <= self.partials.numel()


def workspace(
    comm: Communicator,
    operator: str,
    elements: int,
    unit: int,
    dtype: torch.dtype,
    most: int,
    blocks: int,
    copied: bool = False,
    partials: int = 0,
) -> Workspace:
    """The operator's workspace, of at least that size; a new one where it has outgrown the last, which is collective.

    Graphs that were captured before go on with the one they had; it is freed with the communicator. Raises
    ArgumentError where it would have to grow while a graph is captured.
    """
    kept = _kept.setdefault(comm, {}).setdefault((operator, dtype, copied), [])
    if kept and kept[-1].holds(elements, unit, most, partials):
        return kept[-1]
    if comm.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ArgumentError(
            f"{operator}: its first call of this size allocates, which a graph cannot hold; call it once before capture"
        )
    if kept:  # calls that are large in different ways must not outgrow each other's for ever
        last = kept[-1]
        elements, most = _outgrowing(elements, last.half), _outgrowing(most, last.most)
        partials = _outgrowing(partials, last.partials.numel())
    kept.append(Workspace(comm, elements, unit, dtype, most, blocks, copied, partials))
    return kept[-1]


@torch.library.custom_op("tdccl::gather_rows", mutates_args=())
def gather_rows(x: torch.Tensor, comm: str) -> torch.Tensor:
    """All ranks' rows, in rank order: for gradients, in which the compiler cannot follow a communicator's calls."""
    return named(comm).all_gather(x.contiguous())


@gather_rows.register_fake
def _(x, comm):
    return x.new_empty(named(comm).size * x.shape[0], *x.shape[1:])


@torch.library.custom_op("tdccl::exchange_columns", mutates_args=())
def exchange_columns(x: torch.Tensor, comm: str) -> torch.Tensor:
    """All ranks' columns, in rank order, of this rank's share of the rows of x: likewise."""
    communicator = named(comm)
    return torch.cat(communicator.all_to_all(x.contiguous()).chunk(communicator.size), dim=1)


@exchange_columns.register_fake
def _(x, comm):
    size = named(comm).size
    return x.new_empty(x.shape[0] // size, size * x.shape[1])


def _outgrowing(needed: int, had: int) -> int:
    """Half more than there was, at least: sizes that rise slowly would leave many workspaces behind."""
    return had if needed <= had else max(needed, had + had // 2)


def keep_operands(ctx, inputs, output) -> None:
    """What the gradients of an operator of (a, b, communicator's name) need: `setup_context` of register_autograd."""
    a, b, ctx.comm = inputs
    ctx.save_for_backward(a, b)


def check_operands(operator: str, comm: Communicator, a: torch.Tensor, b: torch.Tensor) -> None:
    """Raises ArgumentError unless a and b are matrices of a dtype that tensor cores multiply, on this rank's device."""
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dim() != 2 or tensor.dtype not in (torch.bfloat16, torch.float16) or tensor.device != comm.device:
            raise ArgumentError(
                f"{operator}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected a matrix of "
                f"bfloat16 or float16 on {comm.device}"
            )


def check_matrices(
    operator: str, comm: Communicator, a: torch.Tensor, b: torch.Tensor, rows: int = 1, columns: int = 1
) -> None:
    """Raises ArgumentError unless a [M, K] and b [K, N] can be multiplied, `rows` divides M, and `columns` N."""
    check_operands(operator, comm, a, b)
    if a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        raise ArgumentError(
            f"{operator}: a is {a.dtype} {tuple(a.shape)}, b is {b.dtype} {tuple(b.shape)}; expected equal dtypes, and "
            "as many columns of a as b has rows"
        )
    if a.shape[0] % rows:
        raise ArgumentError(f"{operator}: a has {a.shape[0]} rows, expected a multiple of the {rows} ranks")
    if b.shape[1] % columns:
        raise ArgumentError(f"{operator}: b has {b.shape[1]} columns, expected a multiple of the {columns} ranks")


def check_out(operator: str, out: torch.Tensor, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """`out` if the result can go there. Raises ArgumentError."""
    if tuple(out.shape) != shape or out.dtype != like.dtype or out.device != like.device or not out.is_contiguous():
        raise ArgumentError(
            f"{operator}: out is {out.dtype} {tuple(out.shape)}, strides {out.stride()}, on {out.device}; expected "
            f"{like.dtype} {shape}, contiguous, on {like.device}"
        )
    return out


def padded(count: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return math.ceil(count / unit) * unit
