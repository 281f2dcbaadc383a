"""What the ranks are about to call, compared before anything is launched: TDCCL_DEBUG=1."""

import itertools
from typing import Any, NamedTuple

from tdccl.errors import Mismatch
from tdccl.runtime.recorder import worded


class Proposal(NamedTuple):
    """The next call of a rank.

    number      of the collective, counted from 1
    count       elements, or None if ranks may have different counts; then `splits` says what goes where
    send, recv  where they lie, in words; None where it does not matter
    splits      elements that it sends to each rank, and those that it receives from each
    """

    number: int
    collective: str
    dtype: str
    op: str | None
    root: int | None
    count: int | None
    send: str | None
    recv: str | None
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None

    def __str__(self) -> str:
        count = sum(self.splits[0]) if self.count is None and self.splits else self.count or 0
        return f"call {self.number}, {worded(self.collective, count, self.dtype, self.op, self.root)}"


def check_alike(everyone: list) -> None:
    """Raises Mismatch, on all ranks alike, unless they are about to make the same call."""
    fields = _differing(everyone) or _unmatched_splits(everyone)
    if fields:
        calls = (f"rank {rank}: {proposal}" for rank, proposal in enumerate(everyone))
        raise Mismatch(
            "\n  ".join(["the ranks are about to make different calls; nothing is launched", *fields, *calls])
        )


def _differing(everyone: list) -> list[str]:
    """A line for each field that is not the same on all ranks."""
    if not all(isinstance(proposal, Proposal) for proposal in everyone):
        others = [rank for rank, proposal in enumerate(everyone) if not isinstance(proposal, Proposal)]
        return [f"no collective but empty, lend, split, register or a block of symmetric memory: {_ranks(others)}"]
    lines = []
    for name in Proposal._fields[:-1]:
        having: dict[Any, list[int]] = {}
        for rank, proposal in enumerate(everyone):
            having.setdefault(getattr(proposal, name), []).append(rank)
        if len(having) > 1:
            shown = {None: "by splits"} if name == "count" else {}
            told = (f"{shown.get(value, value)} on {_ranks(ranks)}" for value, ranks in having.items())
            lines.append(f"{name}: " + ", ".join(told))
    return lines


def _unmatched_splits(everyone: list[Proposal]) -> list[str]:
    if everyone[0].splits is None:
        return []
    pairs = itertools.product(range(len(everyone)), repeat=2)
    counts = ((pair, everyone[pair[0]].splits[0][pair[1]], everyone[pair[1]].splits[1][pair[0]]) for pair in pairs)
    return [
        f"splits: rank {source} sends {sent} elements to rank {target}, which expects {expected}"
        for (source, target), sent, expected in counts
        if sent != expected
    ]


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
