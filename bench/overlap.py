"""Products and attention fused with communication beside what they are made of: the computation alone, communication
alone, one after the other. By torch and NCCL, and by tdccl.

torchrun --nproc-per-node 4 -m bench.overlap -J FILE
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import tdccl
from bench import attention, moe
from bench.output import describe, given
from tdccl import Communicator, environment
from tdccl.overlap import all_gather_gemm, all_reduce_rms_norm, gemm_all_reduce, gemm_reduce_scatter
from tdccl.overlap.all_reduce_rms_norm import add_and_normalise_rows
from tdccl.overlap.all_reduce_rms_norm import reference as all_reduce_rms_norm_reference
from tdccl.timing import Effort, GpuClock, HostClock, clock_for, slowest
from tdccl.transport.bootstrap import StoreBootstrap

# (intermediate, hidden) of the MLPs of decoders; in emulation a toy.
_GPU = {
    "7B": (11008, 4096),
    "8B": (14336, 4096),
    "70B": (28672, 8192),
    "72B": (29568, 8192),
    "405B": (53248, 16384),
}
_EMULATION = {"toy": (72, 40)}
_TOLERANCE = 0.03

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Bench(attention.Attention):
    """Times and checks the operators; rank 0 prints, and keeps the rows."""

    def __init__(self, comm: Communicator, bootstrap: StoreBootstrap, options: argparse.Namespace):
        self.comm, self.alone, self.bootstrap, self.options = comm, comm.split(comm.rank), bootstrap, options
        self.clock = clock_for(comm, bootstrap, graph=True)
        self.rows: list[dict] = []
        self.wrong = 0

    def all_gather_gemm(self, name: str, intermediate: int, hidden: int) -> None:
        """The MLP's first product: all tokens times this rank's columns."""
        comm, tokens = self.comm, self.options.tokens
        a = self._random(tokens // comm.size, hidden)
        b = self._random(hidden, intermediate // comm.size)
        gathered = a.new_empty(tokens, hidden)
        out, reference = a.new_empty(tokens, b.shape[1]), a.new_empty(tokens, b.shape[1])

        def one_after_the_other():
            _all_gather(gathered, a)
            torch.mm(gathered, b, out=reference)

        ways = {
            "communication, torch": lambda: _all_gather(gathered, a),
            "communication, tdccl": lambda: comm.all_gather(a, gathered),
            "product, torch": lambda: torch.mm(gathered, b, out=reference),
            "product, tdccl": lambda: all_gather_gemm(self.alone, gathered, b, out),
            "both, torch": one_after_the_other,
            "both, tdccl": lambda: all_gather_gemm(comm, a, b, out),
        }
        self._measure("all_gather_gemm", name, ways, out, reference)
        if self.options.torch_fused:
            self._torch_fused("all_gather_gemm", name, lambda group: self._fused_gather(a, b, group))

    def gemm_reduce_scatter(self, name: str, intermediate: int, hidden: int) -> None:
        """The MLP's second product: partial sums of all tokens, scattered."""
        comm, tokens = self.comm, self.options.tokens
        a = self._random(tokens, intermediate // comm.size)
        b = self._random(intermediate // comm.size, hidden)
        partial = a.new_empty(tokens, hidden)
        out, reference = (a.new_empty(tokens // comm.size, hidden) for _ in range(2))

        def one_after_the_other():
            torch.mm(a, b, out=partial)
            _reduce_scatter(reference, partial)

        ways = {
            "communication, torch": lambda: _reduce_scatter(reference, partial),
            "communication, tdccl": lambda: comm.reduce_scatter(partial, out),
            "product, torch": lambda: torch.mm(a, b, out=partial),
            "product, tdccl": lambda: gemm_reduce_scatter(self.alone, a, b, partial),
            "both, torch": one_after_the_other,
            "both, tdccl": lambda: gemm_reduce_scatter(comm, a, b, out),
        }
        self._measure("gemm_reduce_scatter", name, ways, out, reference)
        if self.options.torch_fused:
            self._torch_fused("gemm_reduce_scatter", name, lambda group: self._fused_scatter(a, b, group))

    def gemm_all_reduce(self, name: str, intermediate: int, hidden: int) -> None:
        """The MLP's second product where every rank goes on with all tokens: of a few, as in decoding, and of many."""
        comm = self.comm
        b = self._random(hidden, intermediate // comm.size).t()  # as linear layers have their weights
        for tokens in (*self.options.few, self.options.tokens):
            a = self._random(tokens, intermediate // comm.size)
            partial, out, reference = (a.new_empty(tokens, hidden) for _ in range(3))

            def one_after_the_other(a=a, reference=reference):
                torch.mm(a, b, out=reference)
                dist.all_reduce(reference)

            ways = {
                "communication, torch": lambda partial=partial: dist.all_reduce(partial),
                "communication, tdccl": lambda partial=partial: comm.all_reduce(partial, partial),
                "product, torch": lambda a=a, partial=partial: torch.mm(a, b, out=partial),
                "product, tdccl": lambda a=a, partial=partial: gemm_all_reduce(self.alone, a, b, partial),
                "both, torch": one_after_the_other,
                "both, tdccl": lambda a=a, out=out: gemm_all_reduce(comm, a, b, out),
            }
            self._measure("gemm_all_reduce", name, ways, out, reference, tokens)

    def all_reduce_rms_norm(self, name: str, intermediate: int, hidden: int) -> None:
        """What follows it: the all-reduce, the residual's addition and the norm, beside a kernel for the latter two."""
        comm = self.comm
        weight = self._random(1, hidden)[0] + 1
        for tokens in self.options.few:
            x = self._random(tokens, hidden)
            residual = comm.broadcast(self._random(tokens, hidden))
            reference = all_reduce_rms_norm_reference(comm, x, residual, weight)[0]
            found: list[torch.Tensor] = []
            summed, total, normed = (torch.zeros_like(x) for _ in range(3))

            def norm(arrays=(summed, residual, weight, normed, total)):
                add_and_normalise_rows(*arrays, 1e-6)

            def one_after_the_other(summed=summed, norm=norm):
                dist.all_reduce(summed)
                norm()

            def fused(found=found, x=x, residual=residual):
                found[:] = all_reduce_rms_norm(comm, x, residual, weight)[:1]

            ways = {
                "communication, torch": lambda summed=summed: dist.all_reduce(summed),
                "communication, tdccl": lambda summed=summed: comm.all_reduce(summed, summed),
                "norm, torch": norm,
                "both, torch": one_after_the_other,
                "both, tdccl": fused,
            }
            self._measure("all_reduce_rms_norm", name, ways, lambda found=found: found[0], reference, tokens)

    def _random(self, rows: int, columns: int) -> torch.Tensor:
        generator = torch.Generator(self.comm.device).manual_seed(self.comm.rank)
        values = torch.randn(rows, columns, generator=generator, device=self.comm.device, dtype=torch.bfloat16)
        return values * 0.05

    def _measure(self, operator: str, name: str, ways: dict[str, Callable], out, reference, tokens=None) -> None:
        ways["both, torch"]()
        ways["both, tdccl"]()
        wrong = self._count_wrong(out, reference)
        times = {}
        for way, call in ways.items():
            times[way] = slowest(self.clock, self.bootstrap, call, lambda: None, self.options.effort)
        ways["both, torch"]()
        wrong += self._count_wrong(out, reference)  # what the last replay left
        self.wrong += wrong
        parts = [time for way, time in times.items() if way.endswith(", torch") and way != "both, torch"]
        row = {
            "operator": operator,
            "mlp": name,
            "tokens": tokens or self.options.tokens,
            "times_us": {way: float(f"{time:.5g}") for way, time in times.items()},
            "speedup": round(times["both, torch"] / times["both, tdccl"], 3),
            "ideal": round(sum(parts) / max(parts), 3),
            "hidden": round((sum(parts) - times["both, tdccl"]) / min(parts), 3),
            "wrong": wrong,
        }
        if "product, tdccl" in times:
            row["product_ratio"] = round(times["product, torch"] / times["product, tdccl"], 3)
        self._add(row)

    def _count_wrong(
        self, out: torch.Tensor | Callable[[], torch.Tensor], reference: torch.Tensor | Callable[[], torch.Tensor]
    ) -> int:
        """Elements on all ranks that differ by more than rounding in another order does; either may be looked up."""
        out, reference = (each() if callable(each) else each for each in (out, reference))
        apart = (out.float() - reference.float()).abs()
        mine = int((~(apart <= _TOLERANCE * (reference.float().abs() + reference.float().std()))).sum())
        return sum(self.bootstrap.exchange(mine))

    def _torch_fused(self, operator: str, name: str, make: Callable) -> None:
        """torch's own fused operator, whose calls a graph does not hold."""
        clock = HostClock(self.bootstrap) if environment.emulated() else GpuClock(self.bootstrap, self.comm)
        time = slowest(clock, self.bootstrap, make(dist.group.WORLD.group_name), lambda: None, self.options.effort)
        times = {"both, torch's fused operator": float(f"{time:.5g}")}
        self._add({"operator": operator, "mlp": name, "tokens": self.options.tokens, "times_us": times})

    def _fused_gather(self, a, b, group) -> Callable:
        import torch.distributed._symmetric_memory as symmetric_memory

        shard = symmetric_memory.empty(*a.shape, dtype=a.dtype, device=a.device)
        symmetric_memory.rendezvous(shard, group)
        return lambda: torch.ops.symm_mem.fused_all_gather_matmul(shard.copy_(a), [b], 0, group)

    def _fused_scatter(self, a, b, group) -> Callable:
        return lambda: torch.ops.symm_mem.fused_matmul_reduce_scatter(a, b, "sum", 0, group)

    def _add(self, row: dict) -> None:
        self.rows.append(row)
        if self.comm.rank == 0:
            print(json.dumps(row), flush=True)


def main() -> int:
    options = _options()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    environment.forbid_multicast_to_others()
    if not environment.emulated():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if environment.emulated() else "nccl")
    store = dist.distributed_c10d._get_default_store()
    comm = tdccl.init(store=dist.PrefixStore("overlap", store), rank=rank, size=size)
    bench = Bench(comm, StoreBootstrap(dist.PrefixStore("bench", store), rank, size, comm.timeout), options)
    for name in options.mlp:
        for operator in options.operators:
            if operator not in attention.OPERATORS:
                getattr(bench, operator)(name, *options.shapes[name])
    for operator in options.operators:
        for name, case in attention.cases(operator).items():
            getattr(bench, operator)(name, *case)
    for name in options.moe:
        moe.measure(bench, name)
    if options.json and rank == 0:
        report = describe(size, comm.device, options.command)
        attended = [row for row in bench.rows if row["operator"] in (*attention.OPERATORS, attention.GRADIENT)]
        kinds = {"fused": [row for row in bench.rows if row not in attended], "attention": attended}
        kinds = {kind: rows for kind, rows in kinds.items() if rows}
        options.json.write_text(json.dumps({**report, "rows": [], **kinds}, indent=1) + "\n")
    comm.barrier()
    dist.destroy_process_group()
    return 1 if bench.wrong else 0


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description=__doc__)
    shapes = _EMULATION if environment.emulated() else _GPU
    products = ["all_gather_gemm", "gemm_reduce_scatter", "gemm_all_reduce", "all_reduce_rms_norm"]
    operators = [*products, *attention.OPERATORS]
    parser.add_argument("--mlp", type=_names, default=list(shapes), help=f"of {','.join(shapes)}")
    parser.add_argument("--operators", type=lambda text: text.split(","), default=operators, help=",".join(operators))
    experts = list(moe.SHAPES)
    help_with_experts = f"layers of mixtures of experts, of {','.join(experts)}"
    parser.add_argument("--moe", type=_names, default=experts, help=help_with_experts)
    parser.add_argument("--tokens", type=int, default=48 if environment.emulated() else 8192)
    few = [1, 5] if environment.emulated() else [1, 8, 32, 64, 128, 256]
    parser.add_argument(
        "--few", type=lambda text: [*map(int, text.split(","))], default=few, metavar="TOKENS,..", help="of a decoder"
    )
    parser.add_argument("--torch-fused", action="store_true", help="also time torch's fused operators")
    parser.add_argument("-J", "--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    options.shapes = shapes
    options.effort = Effort(1, 0, 1) if environment.emulated() else Effort(10, 3, 5)
    options.command = f"torchrun --nproc-per-node {os.environ['WORLD_SIZE']} -m bench.overlap {given()}".rstrip()
    return options


if __name__ == "__main__":
    sys.exit(main())
