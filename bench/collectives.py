"""What is measured: the collectives, what a size means for each, and the buffers that a call takes."""

from dataclasses import dataclass

import torch

DTYPES = {
    "int8": torch.int8, "uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64, "half": torch.float16,
    "float": torch.float32, "double": torch.float64, "bfloat16": torch.bfloat16,
}  # fmt: skip
OPS = ("sum", "prod", "min", "max", "avg")


@dataclass(frozen=True)
class Collective:
    """One collective as nccl-tests sees it.

    pieces        the message is cut into one piece a rank, and the printed count is a piece's
    piece         "send" or "recv" if that buffer is one piece; the others hold the whole message
    out_of_place  can be called so; tdccl's broadcast cannot, its one buffer is both
    in_place      is called so too: on one buffer, or with the piece in its place of the whole
    """

    name: str
    reduces: bool = False
    rooted: bool = False
    pieces: bool = True
    piece: str | None = None
    out_of_place: bool = True
    in_place: bool = True

    @property
    def variants(self) -> list[bool]:
        """The values of `in_place` that can be measured."""
        return [False] * self.out_of_place + [True] * self.in_place

    def bus_factor(self, ranks: int) -> float:
        """busbw / algbw: what the busiest link carries, as a share of the message."""
        if self.rooted:
            return 1.0
        return (1 if self.pieces else 2) * (ranks - 1) / ranks


COLLECTIVES = {
    collective.name: collective
    for collective in (
        Collective("all_reduce", reduces=True, pieces=False),
        Collective("all_gather", piece="send"),
        Collective("reduce_scatter", reduces=True, piece="recv"),
        Collective("broadcast", rooted=True, pieces=False, out_of_place=False),
        Collective("all_to_all", in_place=False),
    )
}


@dataclass(frozen=True)
class Case:
    """One call to measure. `limit` is the size asked for; `nbytes` is what it comes to in whole, aligned pieces."""

    collective: Collective
    limit: int
    dtype_name: str
    op: str | None
    root: int
    rank: int
    ranks: int
    in_place: bool

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def count(self) -> int:
        """Elements, of one piece where the message is cut into pieces: those are multiples of 16 bytes."""
        elements = self.limit // self.dtype.itemsize
        if not self.collective.pieces:
            return elements
        unit = 16 // self.dtype.itemsize
        return elements // self.ranks // unit * unit

    @property
    def whole(self) -> int:
        """Elements of the whole message."""
        return self.count * (self.ranks if self.collective.pieces else 1)

    @property
    def nbytes(self) -> int:
        """The larger of the send and receive totals of one rank."""
        return self.whole * self.dtype.itemsize

    def bandwidths(self, microseconds: float) -> tuple[float, float]:
        """(algbw, busbw) in GB/s."""
        algbw = self.nbytes / microseconds / 1e3
        return algbw, algbw * self.collective.bus_factor(self.ranks)


@dataclass(frozen=True)
class Buffers:
    """Memory for the largest message, twice, as bytes; each case takes its views of it."""

    send: torch.Tensor
    recv: torch.Tensor

    def views(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """(send, recv) of the case; in place a piece lies where it belongs in the whole, as NCCL has it."""
        send = self.send[: case.nbytes].view(case.dtype)
        recv = self.recv[: case.nbytes].view(case.dtype)
        if case.in_place:
            send = recv
        own = slice(case.rank * case.count, (case.rank + 1) * case.count) if case.in_place else slice(case.count)
        if case.collective.piece == "send":
            send = send[own]
        elif case.collective.piece == "recv":
            recv = recv[own]
        return send, recv
