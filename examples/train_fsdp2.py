"""Fully sharded training of a small GPT: every rank has a part of each parameter, and gathers a block when it is due.

torchrun --nproc-per-node 4 examples/train_fsdp2.py --backend tdccl
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import main


def parallelize(model, options, device):
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32) if options.bf16 else None
    shard = {"mesh": mesh, "mp_policy": precision or MixedPrecisionPolicy()}
    for module in (*model.blocks, model):
        fully_shard(module, **shard)
        if dist.get_backend() == "tdccl":  # its collectives then copy nothing
            module.set_allocate_memory_from_process_group_for_comm(True)
    return model


if __name__ == "__main__":
    main(parallelize)
