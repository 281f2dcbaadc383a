"""What the training examples share: options, the loop, and the comparison of two backends."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from gpt import GPT, Batches, sentences, tokens_of
from torch.nn import functional

from tdccl import environment


def main(parallelize: Callable) -> None:
    """Trains the model that `parallelize(model, options, device)` spreads over the ranks."""
    options = _options()
    losses = train(parallelize, options, options.backend)
    if options.compare_with:
        expected = train(parallelize, options, options.compare_with)
        worst = (torch.tensor(losses) - torch.tensor(expected)).abs().max().item()  # NaN if any of them is
        tolerance = 0.05 if options.bf16 else 1e-4
        verdict = f"{options.backend} and {options.compare_with} differ by at most {worst:.1e}"
        if not worst <= tolerance:
            raise SystemExit(f"{verdict}, more than {tolerance}")
        _say(verdict)


def train(parallelize: Callable, options: argparse.Namespace, backend: str) -> list[float]:
    """The loss at every step, averaged over the ranks."""
    device = _device()
    environment.forbid_multicast_to_others()
    dist.init_process_group(backend)
    torch.manual_seed(options.seed)  # all ranks begin with the same parameters
    model = GPT(options.layers, options.width, options.heads, options.context).to(device)
    model = parallelize(model, options, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    text = Path(options.text).read_text() if options.text else sentences()
    batches = Batches(tokens_of(text), options.batch, options.context, seed=options.seed + 1 + dist.get_rank())
    losses = []
    for step in range(options.steps):
        tokens, targets = batches.next(device)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        _say(f"{backend}, step {step}: loss {losses[-1]:.4f}")
    dist.barrier()
    if backend == "gloo":
        time.sleep(0.5)  # its threads may still hold tensors, and must not when the process ends
    dist.destroy_process_group()
    return losses


def _device() -> torch.device:
    if not torch.cuda.is_available() or os.environ.get("TDCCL_EMULATE", "0") != "0":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _say(text: str) -> None:
    if os.environ["RANK"] == "0":
        print(text, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backend", default="tdccl", help="of torch.distributed: tdccl, nccl, gloo")
    parser.add_argument("--compare-with", metavar="BACKEND", help="train again with it: the losses must be the same")
    parser.add_argument("--text", metavar="FILE", help="what to learn, instead of sentences made up here")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; parameters stay fp32")
    for name, default in {"steps": 10, "layers": 2, "width": 32, "heads": 4, "context": 32, "batch": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=3e-3, help="the learning rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()
