"""Data parallel training of a small GPT: every rank has the whole model, gradients are averaged.

torchrun --nproc-per-node 4 examples/train_ddp.py --backend tdccl
"""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import main


class Autocast(nn.Module):
    """The model, computing in bfloat16 where that is safe."""

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__()
        self.model, self.kind = model, device.type

    def forward(self, tokens):
        with torch.autocast(self.kind, torch.bfloat16):
            return self.model(tokens)


def parallelize(model, options, device):
    model = Autocast(model, device) if options.bf16 else model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


if __name__ == "__main__":
    main(parallelize)
