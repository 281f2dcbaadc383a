"""Attention over all ranks' keys, and the products around it, beside what they are made of: `bench.overlap` runs these
operators, too."""

import functools

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from tdccl import environment
from tdccl.overlap import all_to_all_gemm, flash_decode, gather_kv_attention, gemm_all_to_all
from tdccl.timing import slowest

# (tokens of all ranks, heads, KV heads, dim); without tokens those that `--tokens` says. In emulation toys.
_GPU = {
    "gather_kv_attention": {
        "4K": (4096, 8, 8, 128),
        "8K": (8192, 32, 8, 128),
        "32K": (32768, 32, 8, 128),
        "32K, 8 heads": (32768, 8, 2, 128),
    },
    "flash_decode": {
        "32K": (1 << 15, 32, 8, 128),
        "256K": (1 << 18, 32, 8, 128),
        "1M": (1 << 20, 32, 8, 128),
    },
    "gemm_all_to_all": {"32 heads": (32, 8, 128), "64 heads": (64, 8, 128)},
    "all_to_all_gemm": {"32 heads": (32, 8, 128), "64 heads": (64, 8, 128)},
}
_TOYS = {"gather_kv_attention": (96, 2, 1, 64), "flash_decode": (192, 2, 1, 64)}
_TOYS |= dict.fromkeys(["gemm_all_to_all", "all_to_all_gemm"], (6, 3, 16))
OPERATORS = [*_GPU]

_TOLERANCE = 0.03

# Of attention backward: in rows of its own, of the same cases.
GRADIENT = "gather_kv_attention, backward"

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _all_to_all(recv: torch.Tensor, send: torch.Tensor) -> None:
    """By NCCL; recv in any shape."""
    dist.all_to_all_single(recv.view(-1), send.view(-1))


def cases(operator: str) -> dict[str, tuple[int, ...]]:
    """The cases of an operator by name; of others there are none here."""
    if operator not in OPERATORS:
        return {}
    return {"toy": _TOYS[operator]} if environment.emulated() else _GPU[operator]


def _flash(q, k, v, causal: bool = False):
    """torch's FlashAttention of [B, heads, .., dim]: (out, log-sum-exp [B, heads, queries]); last query sees all."""
    if q.device.type == "cuda":
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)[:2]
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for each in (k, v))
    scores = q.float() @ k.mT * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).to(q.dtype), scores.logsumexp(-1)


def _cudnn(q, k, v, causal: bool = False):
    """The same by cuDNN, whose causal mask wants as many keys as queries."""
    before = k.shape[2] - q.shape[2]
    if causal and before:
        earlier = _cudnn(q, k[:, :, :before], v[:, :, :before])
        return _merge((earlier, _cudnn(q, k[:, :, before:], v[:, :, before:], True)))
    out, log = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)[:2]
    return out, log.view(out.shape[:3])


def _flash_backward(gradient, q, k, v, out, log, causal: bool = False):
    """The gradients of q, k and v by torch's FlashAttention, of what `_flash` takes and gives."""
    if q.device.type == "cuda":
        lengths, no_seed = (None, None, q.shape[2], k.shape[2]), q.new_empty(2, dtype=torch.int64)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            gradient, q, k, v, out, log, *lengths, 0.0, causal, no_seed, no_seed
        )
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    q, k, v, out, gradient = (each.float() for each in (q, k, v, out, gradient))
    k, v = (each.repeat_interleave(group, dim=1) for each in (k, v))
    weights = (q @ k.mT * scale - log[..., None]).exp()
    weights = weights.tril(k.shape[2] - q.shape[2]) if causal else weights
    slopes = weights * (gradient @ v.mT - (gradient * out).sum(-1, keepdim=True)) * scale
    of_k, of_v = (
        (each.mT @ right).unflatten(1, (-1, group)).sum(2) for each, right in ((slopes, q), (weights, gradient))
    )
    return slopes @ k, of_k, of_v


def _cudnn_backward(gradient, q, k, v, out, log, causal: bool = False):
    """The same by cuDNN, in two parts where `_cudnn` has two."""
    before = k.shape[2] - q.shape[2]
    if causal and before:
        earlier = _cudnn_backward(gradient, q, k[:, :, :before], v[:, :, :before], out, log)
        later = _cudnn_backward(gradient, q, k[:, :, before:], v[:, :, before:], out, log, True)
        return earlier[0] + later[0], *(torch.cat(each, 2) for each in zip(earlier[1:], later[1:]))
    no_seed, lengths = q.new_empty((), dtype=torch.int64), (None, None, q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        gradient, q, k, v, out, log[..., None], no_seed, no_seed, None, *lengths, 0.0, causal
    )


def _merge(parts):
    """One (out, log-sum-exp) of two, in fp32, for large values may cancel."""
    (left, left_log), (right, right_log) = parts
    weight = torch.sigmoid(left_log - right_log)[..., None]
    return torch.lerp(right.float(), left.float(), weight), torch.logaddexp(left_log, right_log)


class _Prefill:
    """Causal attention of a sequence in zig-zag shards: by tdccl, and as torch and NCCL put it together."""

    def __init__(self, comm, random, tokens: int, heads: int, kv_heads: int, dim: int):
        self.comm, self.rows, size = comm, tokens // comm.size, comm.size
        self.half = self.rows // 2
        self.q = random(self.rows, heads * dim).view(1, self.rows, heads, dim) * 20
        pair = random(2 * self.rows, kv_heads * dim).view(2, 1, self.rows, kv_heads, dim) * 20
        self.pair, self.gathered = pair, pair.new_empty(size, *pair.shape)
        self.ordered = pair.new_empty(2, 1, 2 * size, self.half, kv_heads, dim)
        self.received = pair.new_empty(2, *pair.shape)
        self.out, self.expected = torch.empty_like(self.q), torch.empty_like(self.q)

    def gather(self) -> None:
        _all_gather(self.gathered.flatten(0, 1), self.pair)

    def in_order(self) -> torch.Tensor:
        """[2, 1, KV heads, tokens, dim]: the gathered keys and values in the order of the sequence."""
        pieces = self.gathered.unflatten(3, (2, self.half)).permute(3, 1, 2, 0, 4, 5, 6)
        self.ordered[:, :, : self.comm.size] = pieces[0]
        self.ordered[:, :, self.comm.size :] = pieces[1].flip(2)
        return self.ordered.flatten(2, 3).transpose(2, 3)

    def pieces(self):
        """(which of this rank's positions, which of all tokens these see) of its first and of its second piece."""
        size, rank = self.comm.size, self.comm.rank
        for place, number in enumerate((rank, 2 * size - 1 - rank)):
            yield slice(place * self.half, (place + 1) * self.half), slice((number + 1) * self.half)

    def attend_gathered(self, attend=_flash) -> list[tuple]:
        """The keys in the order of the sequence; then each of both pieces with what it sees, as much on every rank."""
        k, v = self.in_order()
        kept = []
        for mine, seen in self.pieces():
            kept.append(attend(self.q[:, mine].transpose(1, 2), k[:, :, seen], v[:, :, seen], causal=True))
            self.expected[:, mine] = kept[-1][0].transpose(1, 2)
        return kept

    def gather_then_attend(self, attend=_flash) -> None:
        self.gather()
        self.attend_gathered(attend)

    def gather_then_differentiate(self, kept: list[tuple], differentiate=_flash_backward) -> tuple:
        """The gradients of q, k and v; `kept` is what attention gave for both pieces, q that of its result."""
        self.gather()
        k, v = self.in_order()
        of_q, of_pair = torch.empty_like(self.q), torch.zeros_like(self.ordered)
        of_k, of_v = of_pair.flatten(2, 3).transpose(2, 3)
        for (mine, seen), (out, log) in zip(self.pieces(), kept):
            q = self.q[:, mine].transpose(1, 2)
            parts = differentiate(q, q, k[:, :, seen], v[:, :, seen], out, log, causal=True)
            of_q[:, mine] = parts[0].transpose(1, 2)
            of_k[:, :, seen] += parts[1]
            of_v[:, :, seen] += parts[2]
        size = self.comm.size
        pieces = torch.stack([of_pair[:, :, :size], of_pair[:, :, size:].flip(2)], 3)
        self.scatter(pieces.permute(2, 0, 1, 3, 4, 5, 6).flatten(3, 4).contiguous())
        return of_q, *self.received[0]

    def scatter(self, pairs: torch.Tensor) -> None:
        """received[0] = the sum of all ranks' [this rank] of [size, *pair.shape]"""
        _reduce_scatter(self.received[0], pairs.flatten(0, 1))

    def ring(self, attend=_flash) -> None:
        """Keys go around from rank to rank, while each attends to those that it has."""
        comm, here = self.comm, self.pair
        merged, tail = None, None
        q = self.q.transpose(1, 2)
        for step in range(comm.size):
            coming = self.received[step % 2]
            if step + 1 < comm.size:
                works = dist.batch_isend_irecv(
                    [
                        dist.P2POp(dist.isend, here, (comm.rank + 1) % comm.size),
                        dist.P2POp(dist.irecv, coming, (comm.rank - 1) % comm.size),
                    ]
                )
            owner = (comm.rank - step) % comm.size
            k, v = here.transpose(2, 3)
            if step == 0:
                merged = attend(q, k, v, causal=True)
            elif owner < comm.rank:  # all see its first piece, none its second
                merged = _merge((merged, attend(q, k[:, :, : self.half], v[:, :, : self.half])))
            else:  # the second piece sees both of its
                out, log = merged
                tail = _merge(((out[:, :, self.half :], log[:, :, self.half :]), attend(q[:, :, self.half :], k, v)))
                merged = tuple(torch.cat([whole[:, :, : self.half], part], 2) for whole, part in zip(merged, tail))
            if step + 1 < comm.size:
                for work in works:
                    work.wait()
                here = coming
        self.expected.copy_(merged[0].transpose(1, 2))


class _Decode:
    """One sequence, its keys split evenly over the ranks."""

    def __init__(self, comm, random, tokens: int, heads: int, kv_heads: int, dim: int):
        self.comm, rows = comm, tokens // comm.size
        q = random(1, heads * dim).view(1, heads, dim) * 20
        self.q = comm.broadcast(q)
        self.k, self.v = random(2 * rows, kv_heads * dim).view(2, 1, rows, kv_heads, dim) * 20
        self.lengths = torch.tensor([rows], dtype=torch.int32, device=q.device)
        self.out, self.expected = torch.empty_like(q), torch.empty_like(q)
        self.part = torch.empty(heads, dim + 1, dtype=torch.float32, device=q.device)
        self.parts = torch.empty(self.comm.size, heads, dim + 1, dtype=torch.float32, device=q.device)
        self.nbytes = 2 * self.k.numel() * self.k.itemsize

    def attend_here(self) -> None:
        out, log = _flash(self.q[:, :, None], self.k.transpose(1, 2), self.v.transpose(1, 2))
        self.part[:, :-1] = out[0, :, 0]
        self.part[:, -1] = log[0, :, 0]

    def gather_and_merge(self) -> None:
        _all_gather(self.parts.flatten(0, 1), self.part)
        weights = self.parts[:, :, -1:].softmax(0)
        self.expected[0] = (self.parts[:, :, :-1] * weights).sum(0)

    def both(self) -> None:
        self.attend_here()
        self.gather_and_merge()


def _row(operator: str, name: str, case, times: dict[str, float], wrong: int) -> dict:
    shape = dict(zip(("tokens", "heads", "kv_heads", "dim"), case))
    times_us = {way: float(f"{time:.5g}") for way, time in times.items()}
    return {"operator": operator, "name": name, **shape, "times_us": times_us, "wrong": wrong}


class Attention:
    """What `bench.overlap.Bench` has of attention."""

    def gather_kv_attention(self, name: str, *case: int) -> None:
        problem, comm = _Prefill(self.comm, self._random, *case), self.comm
        q, (k, v), out = problem.q, problem.pair, problem.out
        alone = torch.empty_like(out)
        heads_first = [each.transpose(1, 2) for each in (q, k, v)]
        ways = {
            "communication, torch": problem.gather,
            "attention after it, torch": problem.attend_gathered,
            "all_gather then attention, torch": problem.gather_then_attend,
            "ring attention, torch": problem.ring,
            "tdccl": lambda: gather_kv_attention(comm, q, k, v, out=out),
            "the shard alone, torch": lambda: scaled_dot_product_attention(
                *heads_first, is_causal=True, enable_gqa=True
            ),
            "the shard alone, tdccl": lambda: gather_kv_attention(self.alone, q, k, v, zigzag=False, out=alone),
        }
        references = ["all_gather then attention, torch", "ring attention, torch"]
        if not environment.emulated():
            by_cudnn = {
                "all_gather then attention, cuDNN": functools.partial(problem.gather_then_attend, _cudnn),
                "ring attention, cuDNN": functools.partial(problem.ring, _cudnn),
            }
            ways |= by_cudnn
            references += by_cudnn
        times, wrong = self._timed(ways, references, problem)
        row = _row("gather_kv_attention", name, case, times, wrong)
        row["speedup_over"] = {way: round(times[way] / times["tdccl"], 3) for way in references}
        row["attention_ratio"] = round(times["the shard alone, torch"] / times["the shard alone, tdccl"], 3)
        self._add(row)
        self._gradient(name, case, problem)

    def _gradient(self, name: str, case: tuple[int, ...], problem: _Prefill) -> None:
        """Backward, the result's gradient being q; keys and values are gathered again, as tdccl does."""
        q, (k, v) = problem.q, problem.pair
        scale = q.shape[-1] ** -0.5

        def ours(comm, zigzag: bool):
            options = True, zigzag, scale, comm.name
            kept = torch.ops.tdccl.gather_kv_attention(q, k, v, *options)
            return lambda: torch.ops.tdccl.gather_kv_attention_gradient(q, k, v, *kept, q, *options)

        def composed(attend, differentiate):
            problem.gather()
            kept = [(out.to(q.dtype), log) for out, log in problem.attend_gathered(attend)]
            return functools.partial(problem.gather_then_differentiate, kept, differentiate)

        def alone(attend, differentiate):
            inputs = [each.transpose(1, 2) for each in (q, k, v)]
            kept = attend(*inputs, causal=True)
            return lambda: differentiate(inputs[0], *inputs, *kept, causal=True)

        def communicate():
            problem.gather()
            problem.scatter(problem.gathered)

        both = "all_gather, attention backward, reduce_scatter, "
        ways = {
            "communication, torch": communicate,
            f"{both}torch": composed(_flash, _flash_backward),
            "tdccl": ours(self.comm, True),
            "the shard alone, torch": alone(_flash, _flash_backward),
            "the shard alone, tdccl": ours(self.alone, False),
        }
        references = [f"{both}torch"]
        if not environment.emulated():
            ways[f"{both}cuDNN"] = composed(_cudnn, _cudnn_backward)
            ways["the shard alone, cuDNN"] = alone(_cudnn, _cudnn_backward)
            references.append(f"{both}cuDNN")
        wrong = sum(
            self._count_wrong(found, right)
            for reference in references
            for found, right in zip(ways["tdccl"](), ways[reference]())
        )
        times = {
            way: slowest(self.clock, self.bootstrap, call, lambda: None, self.options.effort)
            for way, call in ways.items()
        }
        self.wrong += wrong
        row = _row(GRADIENT, name, case, times, wrong)
        row["speedup_over"] = {way: round(times[way] / times["tdccl"], 3) for way in references}
        row["attention_ratio"] = round(times["the shard alone, torch"] / times["the shard alone, tdccl"], 3)
        self._add(row)

    def flash_decode(self, name: str, *case: int) -> None:
        problem = _Decode(self.comm, self._random, *case)
        inputs, alone = (problem.q, problem.k, problem.v, problem.lengths), torch.empty_like(problem.out)
        ways = {
            "communication, torch": problem.gather_and_merge,
            "attention, torch": problem.attend_here,
            "attention, tdccl": lambda: flash_decode(self.alone, *inputs, alone),
            "both, torch": problem.both,
            "both, tdccl": lambda: flash_decode(self.comm, *inputs, problem.out),
        }
        times, wrong = self._timed(ways, ["both, torch"], problem)
        row = _row("flash_decode", name, case, times, wrong)
        row["speedup"] = round(times["both, torch"] / times["both, tdccl"], 3)
        row["read_gb_s"] = float(f"{problem.nbytes / times['both, tdccl'] / 1e3:.4g}")
        self._add(row)

    def _timed(self, ways, references: list[str], problem) -> tuple[dict[str, float], int]:
        """Microseconds of each way, and how many elements of `out` differ from what each reference makes, before
        all is timed and after it."""
        ours = next(reversed([way for way in ways if way in ("tdccl", "both, tdccl")]))
        wrong = 0

        def check():
            nonlocal wrong
            for reference in references:
                problem.expected.zero_()
                ways[reference]()
                wrong += self._count_wrong_rows(problem.out, problem.expected)

        ways[ours]()
        check()
        times = {
            way: slowest(self.clock, self.bootstrap, call, lambda: None, self.options.effort)
            for way, call in ways.items()
        }
        check()  # of what the last replay left
        self.wrong += wrong
        return times, wrong

    def _count_wrong_rows(self, out: torch.Tensor, expected: torch.Tensor) -> int:
        """Elements on all ranks that differ by more than rounding does, which is in proportion to what is in a row: the
        fewer keys a query sees, the larger is its result."""
        apart, expected = (out.float() - expected.float()).abs(), expected.float()
        mine = int((~(apart <= _TOLERANCE * (expected.abs() + expected.std(-1, keepdim=True)))).sum())
        return sum(self.bootstrap.exchange(mine))

    def gemm_all_to_all(self, name: str, heads: int, kv_heads: int, dim: int) -> None:
        """Ulysses' projection to queries, keys and values; the hidden size is that of all heads."""
        size, tokens = self.comm.size, self.options.tokens
        rows = tokens // size
        a, b = self._random(rows, heads * dim), self._random(heads * dim, (heads + 2 * kv_heads) * dim)
        pieces = b.unflatten(1, (size, -1)).transpose(0, 1)
        product = a.new_empty(size, rows, pieces.shape[2])
        out, reference = (a.new_empty(tokens, pieces.shape[2]) for _ in range(2))
        whole = a.new_empty(rows, b.shape[1])

        def one_after_the_other():
            torch.matmul(a, pieces, out=product)
            _all_to_all(reference, product)

        ways = {
            "communication, torch": lambda: _all_to_all(reference, product),
            "communication, tdccl": lambda: self.comm.all_to_all(product, reference),
            "product, torch": lambda: torch.matmul(a, pieces, out=product),
            "product, tdccl": lambda: gemm_all_to_all(self.alone, a, b, whole),
            "both, torch": one_after_the_other,
            "both, tdccl": lambda: gemm_all_to_all(self.comm, a, b, out),
        }
        self._measure("gemm_all_to_all", name, ways, out, reference)

    def all_to_all_gemm(self, name: str, heads: int, kv_heads: int, dim: int) -> None:
        """Ulysses' projection of the heads' results; the hidden size is that of all heads."""
        size, tokens, hidden = self.comm.size, self.options.tokens, heads * dim
        a, b = self._random(tokens, hidden // size), self._random(hidden, hidden)
        received = a.new_empty(size, tokens // size, hidden // size)
        whole, out, reference = (a.new_empty(tokens // size, hidden) for _ in range(3))

        def multiply():
            torch.mm(whole, b, out=reference)

        def one_after_the_other():
            _all_to_all(received, a)
            whole.unflatten(1, (size, -1)).copy_(received.transpose(0, 1))
            multiply()

        ways = {
            "communication, torch": lambda: _all_to_all(received, a),
            "communication, tdccl": lambda: self.comm.all_to_all(a, received),
            "product, torch": multiply,
            "product, tdccl": lambda: all_to_all_gemm(self.alone, whole, b, out),
            "both, torch": one_after_the_other,
            "both, tdccl": lambda: all_to_all_gemm(self.comm, a, b, out),
        }
        self._measure("all_to_all_gemm", name, ways, out, reference)
