"""A tensor-parallel layer of torch's functional collectives, compiled: the pass puts the overlapped operators into it.

torchrun --nproc-per-node 2 tests/compiled_products.py
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch._dynamo.backends.common import aot_autograd

sys.path.insert(0, str(Path(__file__).parent.parent))
if not hasattr(dist.Backend, "TDCCL"):
    import tdccl.torch_entry

    tdccl.torch_entry.register()
from tdccl.overlap.patterns import FuseProducts

ROWS, BATCH, HIDDEN, INNER = 5, 3, 16, 24


def layer(x, up, down):
    """[rows, batch, hidden] sharded along the rows, as sequence parallelism has it."""
    gathered = functional.all_gather_tensor(x, 0, dist.group.WORLD)
    inner = torch.relu(gathered @ up)
    return functional.reduce_scatter_tensor(inner @ down.t(), "sum", 0, dist.group.WORLD)


def with_other_uses(x, up, down):
    """What the graph needs between, or what is no sum of bfloat16, stays as it is."""
    gathered = functional.all_gather_tensor(x, 0, dist.group.WORLD)
    wide = functional.all_gather_tensor(x.float(), 0, dist.group.WORLD)
    least = functional.reduce_scatter_tensor((gathered @ up) @ down.t(), "min", 0, dist.group.WORLD)
    return gathered.float().sum() + (wide @ up.float()).sum() + least.float().sum()


def compiled(body, fuse: FuseProducts, left: list):
    """The body with the pass; `left` gets the calls of functional collectives that are in its graph afterwards."""

    def compile_graph(module, inputs):
        fuse(module.graph)
        left.extend(node for node in module.graph.nodes if "_c10d_functional" in str(node.target))
        module.recompile()
        return module

    return torch.compile(body, backend=aot_autograd(fw_compiler=compile_graph), fullgraph=True)


def main() -> None:
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("tdccl")
    generator = torch.Generator().manual_seed(dist.get_rank())
    shapes = (ROWS, BATCH, HIDDEN), (HIDDEN, INNER), (HIDDEN, INNER)
    values = [torch.randn(*shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]
    for body, expected, others in ((layer, 2, 0), (with_other_uses, 0, 6)):
        fuse, left = FuseProducts(), []
        torch._dynamo.reset()
        with torch.no_grad():
            result = compiled(body, fuse, left)(*values)
            torch.testing.assert_close(result, body(*values), atol=0.5, rtol=0.03)
        assert fuse.fused == expected and len(left) == others, f"{body.__name__}: {fuse.fused} fused, left {left}"
    print(f"rank {dist.get_rank()}: ok")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
