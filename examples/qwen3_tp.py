"""A decoder of Qwen3's architecture, tensor-parallel on all ranks: prefill and decoding by fused operators, beside the
same by plain torch with NCCL, or Gloo without a GPU. Both get the same tokens, and have to agree on the next ones.

torchrun --nproc-per-node 4 examples/qwen3_tp.py --size 8B
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import tdccl
from tdccl import environment
from tdccl.overlap.modules import AllReduceRMSNorm, ColumnParallelLinear, RowParallelLinear

EPS, THETA = 1e-6, 1e6
# How far logits may be apart, in their standard deviations: bfloat16 rounds each sum of each layer in another order.
TOLERANCE = 0.25

# torch 2.13 renamed them.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Config:
    """As published: https://huggingface.co/Qwen, config.json of each size."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int = 151936
    tied: bool = False  # the head has the weights of the embedding


SIZES = {
    "tiny": Config(64, 2, 8, 4, 16, 96, 256),
    "0.6B": Config(1024, 28, 16, 8, 128, 3072, tied=True),
    "1.7B": Config(2048, 28, 16, 8, 128, 6144, tied=True),
    "4B": Config(2560, 36, 32, 8, 128, 9728, tied=True),
    "8B": Config(4096, 36, 32, 8, 128, 12288),
    "14B": Config(5120, 40, 40, 8, 128, 17408),
    "32B": Config(5120, 64, 64, 8, 128, 25600),
}


# ---- the same layers by torch alone ----


class PlainColumnParallelLinear(nn.Module):
    def __init__(self, comm, in_features: int, out_features: int):
        super().__init__()
        self.size = comm.size
        self.weight = nn.Parameter(torch.empty(out_features // comm.size, in_features, device="meta"))

    def forward(self, x, scattered=False):
        if scattered:
            x, shard = x.new_empty(self.size * x.shape[0], x.shape[1]), x
            all_gather_single(x, shard)
        return functional.linear(x, self.weight)


class PlainRowParallelLinear(nn.Module):
    def __init__(self, comm, in_features: int, out_features: int):
        super().__init__()
        self.size = comm.size
        self.weight = nn.Parameter(torch.empty(out_features, in_features // comm.size, device="meta"))

    def forward(self, x, result):
        y = functional.linear(x, self.weight)
        if result == "partial":
            return y
        scattered = y.new_empty(y.shape[0] // self.size, y.shape[1])
        reduce_scatter_single(scattered, y)
        return scattered


class PlainAllReduceRMSNorm(nn.Module):
    def __init__(self, comm, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, device="meta"))

    def forward(self, x, residual=None):
        if residual is None:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        dist.all_reduce(x)
        total = residual + x
        return functional.rms_norm(total, self.weight.shape, self.weight, self.eps), total


FUSED = (ColumnParallelLinear, RowParallelLinear, AllReduceRMSNorm)
PLAIN = (PlainColumnParallelLinear, PlainRowParallelLinear, PlainAllReduceRMSNorm)


# ---- the model ----


class Rotary:
    """Cosines and sines of positions, and what they do to queries and keys [.., heads, head_dim]."""

    def __init__(self, positions: torch.Tensor, head_dim: int):
        frequencies = THETA ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
        angles = positions.float()[:, None] * frequencies
        self.cos, self.sin = (f(torch.cat([angles, angles], -1))[:, None] for f in (torch.cos, torch.sin))

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, -1)
        return (x * self.cos + torch.cat([-second, first], -1) * self.sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped queries; this rank has its share of the heads, and their keys and values in a cache of its own."""

    def __init__(self, config: Config, comm, kinds, batch: int, context: int):
        super().__init__()
        column, row, _ = kinds
        self.heads, self.kv_heads = config.heads // comm.size, config.kv_heads // comm.size
        self.dim, self.batch = config.head_dim, batch
        self.qkv = column(comm, config.hidden, (config.heads + 2 * config.kv_heads) * config.head_dim)
        self.out = row(comm, config.heads * config.head_dim, config.hidden)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.dim, EPS, device="meta") for _ in range(2))
        shape = (2, batch, self.kv_heads, context, self.dim)
        self.register_buffer("cache", torch.zeros(shape, dtype=torch.bfloat16, device=comm.device), persistent=False)

    def forward(self, x, rotary: Rotary, position, result: str):
        """x: [batch * tokens, hidden], or scattered, if the result is. position: of the one token a sequence that is
        decoded, on the device; None in a prefill, which begins at 0."""
        qkv = self.qkv(x, result == "scattered").view(self.batch, -1, self.heads + 2 * self.kv_heads, self.dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 2)
        q, k = rotary.turn(self.q_norm(q)), rotary.turn(self.k_norm(k))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        mask = None
        if position is None:
            self.cache[0, :, :, : k.shape[2]], self.cache[1, :, :, : v.shape[2]] = k, v
        else:
            self.cache[0].index_copy_(2, position, k)
            self.cache[1].index_copy_(2, position, v)
            k, v = self.cache
            mask = (torch.arange(k.shape[2], device=k.device) <= position)[None]
        y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(-1, self.heads * self.dim), result)


class MLP(nn.Module):
    def __init__(self, config: Config, comm, kinds):
        super().__init__()
        column, row, _ = kinds
        self.gate_up = column(comm, config.hidden, 2 * config.intermediate)
        self.down = row(comm, config.intermediate, config.hidden)

    def forward(self, x, result: str):
        gate, up = self.gate_up(x, result == "scattered").chunk(2, -1)
        return self.down(functional.silu(gate) * up, result)


class Layer(nn.Module):
    def __init__(self, config: Config, comm, kinds, batch: int, context: int):
        super().__init__()
        self.attention, self.mlp = Attention(config, comm, kinds, batch, context), MLP(config, comm, kinds)
        self.before_attention, self.before_mlp = (kinds[2](comm, config.hidden, EPS) for _ in range(2))


class Decoder(nn.Module):
    """batch sequences of at most `context` tokens; a rank's share of the weights."""

    def __init__(self, config: Config, comm, kinds, batch: int, context: int):
        super().__init__()
        self.comm, self.config, self.fused = comm, config, kinds is FUSED
        self.embedding = nn.Embedding(config.vocabulary, config.hidden, device="meta")
        self.layers = nn.ModuleList(Layer(config, comm, kinds, batch, context) for _ in range(config.layers))
        self.last = kinds[2](comm, config.hidden, EPS)
        self.head = nn.Parameter(torch.empty(config.vocabulary // comm.size, config.hidden, device="meta"))

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocabulary] that follow tokens [batch, length]; batch * length is a multiple of the ranks.
        Between the products each rank has its share of the tokens."""
        batch, length = tokens.shape
        rotary = Rotary(torch.arange(length, device=tokens.device), self.config.head_dim)
        x = self.embedding(tokens.flatten().chunk(self.comm.size)[self.comm.rank])
        for layer in self.layers:
            x = x + layer.attention(layer.before_attention(x), rotary, None, "scattered")
            x = x + layer.mlp(layer.before_mlp(x), "scattered")
        ends = torch.arange(1, batch + 1, device=x.device) * length - 1 - self.comm.rank * len(x)
        mine = ((ends >= 0) & (ends < len(x)))[:, None]
        x = torch.where(mine, x[ends.clamp(0, len(x) - 1)], 0)
        return self._logits(self.last(self._summed(x)))

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocabulary] that follow tokens [batch] at `position`, int64 [1]. All ranks have all tokens;
        what a layer adds to them is summed where it is normalised for the next one."""
        rotary = Rotary(position, self.config.head_dim)
        total = self.embedding(tokens)
        x = self.layers[0].before_attention(total)
        for layer, following in zip(self.layers, [*(each.before_attention for each in self.layers[1:]), self.last]):
            x, total = layer.before_mlp(layer.attention(x, rotary, position, "partial"), total)
            x, total = following(layer.mlp(x, "partial"), total)
        return self._logits(x)

    def _summed(self, x):
        if self.fused:
            return self.comm.all_reduce(x)
        dist.all_reduce(x)
        return x

    def _logits(self, x):
        mine = functional.linear(x, self.head)
        parts = mine.new_empty(self.comm.size, *mine.shape)
        self.comm.all_gather(mine, parts) if self.fused else all_gather_single(parts.flatten(0, 1), mine)
        return parts.transpose(0, 1).flatten(1)


# ---- its weights ----


class Random:
    """Weights drawn on the device: those of a name are the same for every number of ranks."""

    def __init__(self, device: torch.device, seed: int):
        self.device, self.seed = device, seed

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        if len(shape) == 1:  # of a norm
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        seed = self.seed + sum(ord(letter) * 31**place for place, letter in enumerate(name[:60])) % (1 << 40)
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device, generator=generator) * shape[-1] ** -0.5


class Safetensors:
    """Weights of a folder of safetensors files, mapped into memory: a header's length, the header, the data."""

    def __init__(self, folder: Path):
        self.found = {}
        for file in sorted(folder.glob("*.safetensors")):
            data = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
            start = 8 + int(data[:8].view(torch.int64))
            for name, entry in json.loads(bytes(data[8:start].tolist())).items():
                if name != "__metadata__":
                    begin, end = (start + offset for offset in entry["data_offsets"])
                    self.found[name] = data[begin:end], entry

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self.found:
            raise SystemExit(f"{name} is in no *.safetensors file of the folder, which has {len(self.found)} tensors")
        data, entry = self.found[name]
        if entry["dtype"] != "BF16" or entry["shape"] != [*shape]:
            raise SystemExit(f"{name} is {entry['dtype']} {entry['shape']}, expected BF16 {[*shape]}")
        return data.view(torch.bfloat16).view(shape)


@torch.no_grad()
def load(model: Decoder, config: Config, weights: Callable[..., torch.Tensor]) -> None:
    """Gives the model, whose layers are the fused ones, its share of the weights of Qwen3's names."""
    comm, hidden = model.comm, config.hidden

    def here(tensor):
        return nn.Parameter(tensor.to(comm.device))

    def mine(tensor):
        return here(tensor.chunk(comm.size)[comm.rank])

    def stacked(*whole):
        """Several column-parallel weights as one: this rank's rows of each."""
        return nn.Parameter(torch.cat([mine(each) for each in whole]))

    model.embedding.weight = here(weights("model.embed_tokens.weight", config.vocabulary, hidden))
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    model.head = mine(weights(head, config.vocabulary, hidden))
    model.last.weight = here(weights("model.norm.weight", hidden))
    sizes = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
    for number, layer in enumerate(model.layers):
        of = f"model.layers.{number}."
        names = [(f"{of}self_attn.{kind}_proj.weight", heads * config.head_dim) for kind, heads in sizes.items()]
        layer.attention.qkv.weight = stacked(*(weights(name, rows, hidden) for name, rows in names))
        columns = config.heads * config.head_dim
        layer.attention.out.load(weights(f"{of}self_attn.o_proj.weight", hidden, columns))
        layer.attention.q_norm.weight = here(weights(f"{of}self_attn.q_norm.weight", config.head_dim))
        layer.attention.k_norm.weight = here(weights(f"{of}self_attn.k_norm.weight", config.head_dim))
        names = (f"{of}mlp.gate_proj.weight", f"{of}mlp.up_proj.weight")
        layer.mlp.gate_up.weight = stacked(*(weights(name, config.intermediate, hidden) for name in names))
        layer.mlp.down.load(weights(f"{of}mlp.down_proj.weight", hidden, config.intermediate))
        layer.before_attention.weight = here(weights(f"{of}input_layernorm.weight", hidden))
        layer.before_mlp.weight = here(weights(f"{of}post_attention_layernorm.weight", hidden))


# ---- running it ----


class Generation:
    """A model with its inputs, in graphs on a GPU: one for a prefill, one for each token after it."""

    def __init__(self, model: Decoder, prompt: torch.Tensor):
        self.model, self.prompt = model, prompt
        self.tokens = torch.zeros(len(prompt), dtype=torch.int64, device=prompt.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=prompt.device)
        self.prefill = self._ready(lambda: model.prefill(self.prompt))
        self.decode = self._ready(lambda: model.decode(self.tokens, self.position))

    def _ready(self, call: Callable) -> Callable:
        """The call as a graph's replay, which returns where its result is."""
        if self.prompt.device.type == "cpu":
            return call
        for _ in range(2):  # compiles, and makes what a capture must not
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay():
            graph.replay()
            return result

        return replay

    def run(self, count: int, given: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [count, batch, vocabulary], the tokens [count, batch] that follow greedily); what is decoded is these
        tokens, or the `given` ones."""
        logits, chosen = [], []
        for step in range(count):
            if step:
                self.tokens.copy_((chosen if given is None else given)[step - 1])
                self.position.fill_(self.prompt.shape[1] + step - 1)
            logits.append((self.decode() if step else self.prefill()).float().clone())
            chosen.append(logits[-1].argmax(-1))
        return torch.stack(logits), torch.stack(chosen)


def compare(fused: Generation, plain: Generation, count: int) -> tuple[torch.Tensor, str]:
    """The tokens, and how far the two are apart; exits where that is more than rounding explains."""
    logits, tokens = fused.run(count)
    wanted, greedy = plain.run(count, tokens)
    apart = float((logits - wanted).abs().max() / wanted.std())
    if not apart <= TOLERANCE:
        raise SystemExit(f"logits are {apart:.3f} standard deviations apart, more than {TOLERANCE}")
    differ = tokens != greedy
    lead = wanted.gather(-1, greedy[..., None]) - wanted.gather(-1, tokens[..., None])
    if (lead / wanted.std() > 2 * apart).any():
        raise SystemExit("tokens differ by more than their logits do")
    said = f"{int((~differ).sum())} of {tokens.numel()} tokens alike, logits within {apart:.3f} standard deviations"
    if differ.any():
        said += f"; where tokens differ, plain torch itself has the two within {float(lead.max() / wanted.std()):.3f}"
    return tokens, said


def times(calls: dict[str, Callable], repetitions: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each call on the slowest rank, the median of repetitions in turns."""
    taken = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            dist.barrier()
            _wait(device)
            begin = time.perf_counter()
            call()
            _wait(device)
            slowest = torch.tensor([time.perf_counter() - begin], device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            taken[name].append(slowest.item() * 1e3)
    return {name: statistics.median(each) for name, each in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def generate(options: argparse.Namespace, config: Config, comm: tdccl.Communicator) -> None:
    """Runs both models, compares and times them. Their graphs end with it, as NCCL's groups wait for them."""
    context = options.prompt + options.tokens
    models = [Decoder(config, comm, kinds, options.batch, context) for kinds in (FUSED, PLAIN)]
    weights = Safetensors(options.weights) if options.weights else Random(comm.device, options.seed)
    load(models[0], config, weights)
    models[1].load_state_dict(models[0].state_dict(), assign=True)  # the same memory
    generator = torch.Generator().manual_seed(options.seed)
    prompt = torch.randint(config.vocabulary, (options.batch, options.prompt), generator=generator)
    fused, plain = (Generation(model, prompt.to(comm.device)) for model in models)
    tokens, said = compare(fused, plain, options.tokens)
    taken = {
        what: times({"fused": getattr(fused, what), "plain": getattr(plain, what)}, options.repetitions, comm.device)
        for what in ("prefill", "decode")
    }
    if comm.rank == 0:
        print(f"Qwen3-{options.size} on {comm.size} ranks, {options.batch} x {options.prompt} tokens: {said}")
        print(f"the first sequence goes on with {' '.join(map(str, tokens[:, 0].tolist()))}")
        for what, ms in taken.items():
            print(f"{what}: {ms['fused']:.3f} ms, plain torch {ms['plain']:.3f}: {ms['plain'] / ms['fused']:.2f}x")


def main() -> None:
    options = _options()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = SIZES[options.size]
    if config.kv_heads % size or options.batch * options.prompt % size:
        raise SystemExit(
            f"{size} ranks, expected a divisor of {config.kv_heads} and {options.batch} x {options.prompt}"
        )
    environment.forbid_multicast_to_others()
    if not environment.emulated():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if environment.emulated() else "nccl")
    store = dist.PrefixStore("qwen3", dist.distributed_c10d._get_default_store())
    with tdccl.init(store=store, rank=rank, size=size) as comm:
        generate(options, config, comm)
        dist.barrier()
    dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    small = environment.emulated()
    parser.add_argument("--size", choices=SIZES, default="tiny" if small else "8B")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="of *.safetensors; without it they are random")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--prompt", type=int, default=12 if small else 2048, help="tokens of each")
    parser.add_argument("--tokens", type=int, default=3 if small else 32, help="that each gets")
    parser.add_argument("--repetitions", type=int, default=1 if small else 11, help="of what is timed")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
