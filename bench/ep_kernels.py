"""The kernels of expert parallelism as they are launched, to be compiled without a GPU and without other ranks."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from bench.compiling import on_all_cores
from tdccl.decisions import context_for, rail_for
from tdccl.ep import ExpertParallel, LowLatency, batched, expert_parallel
from tdccl.runtime.algorithm import Geometry, team_of
from tdccl.runtime.launch import Arguments, Team, compile_kernel
from tdccl.transport.topology import topology_of


class Launch(NamedTuple):
    """A kernel, with what it would be launched with."""

    kernel: object
    arguments: Arguments
    team: Team
    warps: int

    @property
    def name(self) -> str:
        function = self.kernel.fn
        return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"

    def compile(self, target):
        """Triton's CompiledKernel; needs no GPU."""
        return compile_kernel(self.kernel, self.arguments, self.team, self.warps, target)


class _Workspace:
    """In place of a `Workspace`: notes what would be launched."""

    def __init__(self, comm, blocks: int, buffers: dict[str, int], slot_bytes: int = 0):
        self.comm, self.blocks, self.buffers = comm, blocks, buffers
        self._rail = rail_for(comm._context)._replace(slot_bytes=slot_bytes) if slot_bytes else None

    def local(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self.buffers[name], dtype=torch.uint8).view(dtype)

    def launch(self, called, kernel, dtype, warps, constants, tensors, sizes, elements, stream) -> None:
        given = {"tensors": tensors, "sizes": sizes, "buffers": self.buffers}
        counts = {name: (0,) * len(values) for name, values in given.items()}
        geometry = Geometry(dtype, self.blocks, warps, False, counts, constants)
        team = team_of(self.comm._context, self.comm.backend)
        team = team._replace(blocks=self.blocks, packets=0, rings=0, ring_bytes=0, channels=0, slot_bytes=0)
        arguments = Arguments(kernel, geometry, (), None, rail=self._rail)
        self.comm.launches.append(Launch(kernel, arguments, team, warps))


class Sizes(NamedTuple):
    """What the objects of expert parallelism are made with, on `nodes` nodes of `width` ranks, and the largest grid."""

    nodes: int
    width: int
    max_tokens: int
    hidden: int
    experts: int
    top_k: int
    most_blocks: int | None = None


def launches(sizes: Sizes, backend: str = "cuda", fp8: bool = True) -> list[Launch]:
    """One launch of each distinct kernel of the calls that `bench.ep` makes."""
    ranks, context = sizes.nodes * sizes.width, context_for(sizes.width, sizes.most_blocks, nodes=sizes.nodes)
    comm = SimpleNamespace(
        size=ranks, rank=0, device=torch.device("cpu"), check=lambda: None, check_one_node=lambda _: None,
        all_gather=lambda *_, **__: None, _on=lambda _: nullcontext(),
        topology=topology_of(0, [str(rank // sizes.width) for rank in range(ranks)]), launches=[], backend=backend,
        multiprocessors=context.rules.blocks, _context=context,
        _bootstrap=SimpleNamespace(exchange=lambda mine: [mine] * ranks),
    )  # fmt: skip
    with (
        mock.patch.object(expert_parallel, "Workspace", _Workspace),
        mock.patch.object(batched, "Workspace", _Workspace),
    ):
        _many(comm, sizes, fp8)
        if sizes.nodes == 1:
            _few(comm, sizes, fp8)
    return [*{repr((each.name, each.arguments.key(), each.warps)): each for each in comm.launches}.values()]


def _many(comm, sizes: Sizes, fp8: bool) -> None:
    tokens, hidden, experts, top_k = sizes[2:6]
    idx, weights = torch.zeros(tokens, top_k, dtype=torch.int64), torch.zeros(tokens, top_k)
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    ep = ExpertParallel(comm, tokens, hidden, experts, top_k)
    plan = ep.plan(idx)
    rows = torch.empty(ep.most_expert_rows(), hidden, dtype=torch.bfloat16)
    compact = torch.empty_like(ep.landing)
    ep.dispatch(x, plan)
    ep.dispatch(x, plan, weights)
    ep.dispatch(x, plan, out=compact)
    ep.dispatch(x, plan, None, "expert", out=rows)
    ep.dispatch(x, plan, weights, "expert", out=rows)
    if fp8:
        ep.dispatch(x, plan, quant="fp8_128")
    ep.combine(ep.landing, plan)
    ep.combine(compact, plan)
    ep.combine(rows, plan, None, "expert")


def _few(comm, sizes: Sizes, fp8: bool) -> None:
    tokens, hidden, experts, top_k = sizes[2:6]
    x, weights = torch.empty(tokens, hidden, dtype=torch.bfloat16), torch.zeros(tokens, top_k)
    low = LowLatency(comm, tokens, hidden, experts, top_k)
    plan = low.plan(torch.zeros(tokens, top_k, dtype=torch.int64))
    low.combine(low.dispatch(x, plan).rows, plan, weights)
    if fp8:
        low.dispatch(x, plan, quant="fp8_128")
        low.dispatch(x, plan, quant="fp8_128_ue8m0")


def warm(sizes: Sizes, arch: int) -> None:
    """Compiles them all into Triton's cache, on all cores at once."""
    on_all_cores(_warm, [(sizes, arch, number) for number in range(len(launches(sizes)))])


def _warm(sizes: Sizes, arch: int, number: int) -> None:
    launches(sizes)[number].compile(GPUTarget("cuda", arch, 32))
