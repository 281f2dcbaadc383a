"""Compiles the kernels of expert parallelism as they are launched, without a GPU. Run as a program by `test_ep`,
because a process either interprets or compiles: `python ep_variants.py cuda 90 32` prints a line of JSON a kernel."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["TDCCL_EMULATE"] = "0"

import torch
import variants
from triton.backends.compiler import GPUTarget

from tdccl.ep import batched, expert_parallel
from tdccl.runtime.algorithm import Geometry, team_of
from tdccl.runtime.launch import Arguments, compile_kernel

RANKS, TOKENS = 4, 8


class CompilingWorkspace:
    """In place of a `Workspace`: what would be launched is compiled and told of."""

    target: GPUTarget

    def __init__(self, comm, blocks: int, buffers: dict[str, int]):
        self.blocks, self.buffers = blocks, buffers

    def local(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self.buffers[name], dtype=torch.uint8).view(dtype)

    def launch(self, called, kernel, dtype, warps, constants, tensors, sizes, elements, stream) -> None:
        given = {"tensors": tensors, "sizes": sizes, "buffers": self.buffers}
        counts = {name: (0,) * len(values) for name, values in given.items()}
        geometry = Geometry(dtype, self.blocks, warps, False, counts, constants)
        team = team_of(variants.context_of(RANKS), self.target.backend)
        team = team._replace(packets=0, rings=0, ring_bytes=0, channels=0, slot_bytes=0)
        compiled = compile_kernel(kernel, Arguments(kernel, geometry, (), None), team, warps, self.target)
        facts = {"name": f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}", "multimem": None}
        print(variants.told(facts | {"moves": kernel.fn.__name__ in ("dispatch", "combine")}, compiled), flush=True)


def main(backend: str, arch: str, warp: str) -> None:
    CompilingWorkspace.target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp))
    expert_parallel.Workspace = batched.Workspace = CompilingWorkspace
    bootstrap = SimpleNamespace(exchange=lambda mine: [mine] * RANKS)
    topology = SimpleNamespace(nodes=[range(RANKS)])
    comm = SimpleNamespace(
        size=RANKS, rank=0, device=torch.device("cpu"), topology=topology, check=lambda: None, _bootstrap=bootstrap
    )
    sizes = TOKENS, 7168, 256, 8
    idx, x, weights = torch.zeros(TOKENS, 8).long(), torch.zeros(TOKENS, 7168).bfloat16(), torch.zeros(TOKENS, 8)
    ep = expert_parallel.ExpertParallel(comm, *sizes)
    plan = ep.plan(idx, 128)
    rows = torch.empty(ep.most_expert_rows(128), 7168, dtype=torch.bfloat16)
    ep.dispatch(x, plan)
    ep.dispatch(x, plan, weights, "expert", out=rows)
    ep.combine(ep.landing, plan)
    ep.combine(rows, plan, rows[:, 0].float().contiguous(), "expert")
    low = batched.LowLatency(comm, *sizes)
    plan = low.plan(idx)
    low.combine(low.dispatch(x, plan).rows, plan, weights)
    if backend == "cuda":  # gfx942 has another fp8
        ep.dispatch(x, ep._new_plan(TOKENS, 1), quant="fp8_128")
        low.dispatch(x, plan, quant="fp8_128_ue8m0")


if __name__ == "__main__":
    main(*sys.argv[1:])
