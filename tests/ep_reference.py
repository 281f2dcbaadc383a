"""What a dispatch and a combine must give, computed on one rank from all ranks' inputs."""

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """Everyone's inputs: by rank the routing [n, top_k], the rows [n, hidden] and the weights [n, top_k]."""

    idx: list[torch.Tensor]
    x: list[torch.Tensor]
    weights: list[torch.Tensor]
    experts: int

    @property
    def local(self) -> int:
        return self.experts // len(self.idx)


def random_problem(seed, tokens, hidden, experts, top_k, dtype=torch.bfloat16, drop=0.1, device="cpu") -> Problem:
    """tokens: of each rank. drop: how likely a place has no expert."""
    generator = torch.Generator().manual_seed(seed)
    idx, x, weights = [], [], []
    for count in tokens:
        scores = torch.rand(count, experts, generator=generator)
        chosen = scores.topk(top_k, dim=1).indices
        chosen[torch.rand(count, top_k, generator=generator) < drop] = -1
        idx.append(chosen.to(device))
        x.append(torch.randn(count, hidden, generator=generator).to(dtype).to(device))
        weights.append(torch.rand(count, top_k, generator=generator).to(device))
    return Problem(idx, x, weights, experts)


def compact_rows(problem: Problem, rank: int) -> list[tuple[int, int]]:
    """(source rank, token) of each compact row on `rank`."""
    return [
        (source, token)
        for source, idx in enumerate(problem.idx)
        for token, row in enumerate(idx.tolist())
        if any(expert >= 0 and expert // problem.local == rank for expert in row)
    ]


def expert_rows(problem: Problem, rank: int) -> list[list[tuple[int, int, int]]]:
    """(source rank, token, place in top-k) of each row of each expert on `rank`."""
    rows = [[] for _ in range(problem.local)]
    for source, idx in enumerate(problem.idx):
        for token, row in enumerate(idx.tolist()):
            for place, expert in enumerate(row):
                if expert >= 0 and expert // problem.local == rank:
                    rows[expert % problem.local].append((source, token, place))
    return rows


def quantised(x: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn, float32 scales a token and 128 elements)."""
    count, hidden = x.shape
    groups = -(-hidden // 128)
    wide = torch.zeros(count, groups * 128, device=x.device)
    wide[:, :hidden] = x.float()
    wide = wide.view(count, groups, 128)
    amax = wide.abs().amax(2).clamp(1e-4)
    scale, factor = amax / torch.full_like(amax, 448.0), torch.full_like(amax, 448.0) / amax
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        exponent = exponent - (mantissa == 0.5).int()
        scale, factor = (torch.ldexp(torch.ones_like(scale), sign * exponent) for sign in (1, -1))
    rows = (wide * factor[:, :, None]).flatten(1)[:, :hidden].to(torch.float8_e4m3fn)
    return rows, scale


def combined(
    rows_of_rank: list[dict], tokens: int, hidden: int, dtype, biases=(), device="cpu", nodes=()
) -> torch.Tensor:
    """rows_of_rank: by rank {token: its row}, added up as `ExpertParallel.combine` says. nodes: the ranks of each, if
    they are several, whose sums are rounded before they are added up."""
    total = torch.zeros(tokens, hidden, device=device)
    for bias in biases:
        total += bias.float()
    if len(nodes) < 2:
        return _added(total, rows_of_rank).to(dtype)
    for ranks in nodes:
        total += _added(torch.zeros_like(total), [rows_of_rank[rank] for rank in ranks]).to(dtype).float()
    return total.to(dtype)


def _added(total: torch.Tensor, rows_of_rank: list[dict]) -> torch.Tensor:
    for rows in rows_of_rank:
        added = torch.zeros_like(total)
        for token, row in rows.items():
            added[token] = row.float()
        total = total + added
    return total


def packed(scales: torch.Tensor) -> torch.Tensor:
    """Powers of two as UE8M0: four exponents in an int32, the first lowest; past the last that of zeros."""
    count, groups = scales.shape
    of_zeros = int(quantised(torch.zeros(1, 128), True)[1].view(torch.int32)) >> 23
    exponents = torch.full((count, -(-groups // 4) * 4), of_zeros, dtype=torch.int64, device=scales.device)
    exponents[:, :groups] = scales.contiguous().view(torch.int32) >> 23
    shifted = exponents.unflatten(1, (-1, 4)) << torch.tensor([0, 8, 16, 24], device=scales.device)
    return shifted.sum(2).to(torch.int32)
