"""Inputs that look random and results that can be foretold: whole numbers small enough to be exact in every dtype."""

import torch

from bench.collectives import Case

_LARGEST = 120  # below 127: sums fit int8, and no value is the poison
_POISON = 0x7F  # every byte of it: 127 as int8, NaN or huge as a float
_CHUNK = 1 << 24  # elements made at once, so that checking 1 GiB does not take 8 more


def prepare(case: Case, send: torch.Tensor, recv: torch.Tensor, seed: int) -> None:
    """Poisons `recv`, so that what is not written is found, and fills `send` with this rank's input."""
    recv.view(torch.uint8).fill_(_POISON)
    if case.collective.rooted and case.rank != case.root:
        return
    own_piece = case.collective.piece == "send"
    for start, stop in _chunks(case.count if own_piece else case.whole):
        send[start:stop] = _input(case, case.rank, seed, start, stop, send.device)


def count_wrong(case: Case, recv: torch.Tensor, seed: int) -> int:
    """Elements of `recv` that differ from what the inputs of all ranks make."""
    wrong, written = 0, 0
    for sources, origin in _origins(case):
        for start, stop in _chunks(case.count):
            inputs = [_input(case, rank, seed, origin + start, origin + stop, recv.device) for rank in sources]
            expected = _reduce(case, inputs).to(case.dtype)
            wrong += int((recv[written + start : written + stop] != expected).sum())
        written += case.count
    return wrong


def _origins(case: Case) -> list[tuple[list[int], int]]:
    """For each run of `count` elements of recv: the ranks it comes from, and where it starts in their send."""
    everyone = list(range(case.ranks))
    own = case.rank * case.count
    return {
        "all_reduce": [(everyone, 0)],
        "all_gather": [([rank], 0) for rank in everyone],
        "reduce_scatter": [(everyone, own)],
        "broadcast": [([case.root], 0)],
        "all_to_all": [([rank], own) for rank in everyone],
    }[case.collective.name]


def _input(case: Case, rank: int, seed: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Elements start to stop of a rank's input, as int64: a hash of place, rank and seed, brought into range."""
    place = torch.arange(start, stop, device=device)
    mixed = place * 0x9E3779B1 + (rank * 0x85EBCA77 + seed * 0xC2B2AE3D)
    mixed = ((mixed ^ (mixed >> 32)) & 0x7FFFFFFF) * 0x27D4EB2F >> 16
    lowest, span, scale = _range(case)
    return (mixed % span + lowest) * scale


def _range(case: Case) -> tuple[int, int, int]:
    """(lowest, span, scale): inputs are (lowest + 0..span-1) * scale, so that no result leaves the exact range."""
    signed = case.dtype is not torch.uint8
    if case.op == "prod":
        return 1, 2, 1  # 2 to the number of ranks is exact in every float, and wraps alike in every integer
    scale = case.ranks if case.op == "avg" else 1  # a mean of multiples of the ranks is whole
    terms = case.ranks if case.op is not None else 1
    span = max(2, _LARGEST // (terms * scale))
    return (-(span // 2) if signed else 0), span, scale


def _reduce(case: Case, inputs: list[torch.Tensor]) -> torch.Tensor:
    if len(inputs) == 1:
        return inputs[0]
    stacked = torch.stack(inputs)
    if case.op == "avg":
        return stacked.sum(0) // case.ranks
    return {"sum": torch.sum, "prod": torch.prod, "min": torch.amin, "max": torch.amax}[case.op](stacked, 0)


def _chunks(count: int):
    return ((start, min(count, start + _CHUNK)) for start in range(0, count, _CHUNK))
