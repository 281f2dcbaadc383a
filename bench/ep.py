"""Expert parallelism: dispatch and combine, checked and timed, beside what does the same without them.

mpirun -n 4 python -m bench ep -G -J FILE
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import tdccl
from bench import ep_kernels
from bench.output import describe, given
from tdccl import Communicator, environment
from tdccl.ep import ExpertParallel, LowLatency
from tdccl.timing import Effort, clock_for, slowest
from tdccl.transport.bootstrap import Bootstrap, discover, launched

# The numbers of the models that most use this: 7168 wide, 8 of 256 experts; 2880 wide, 4 of 128.
_GPU = {"tokens": "4096,128,32,8,1", "shapes": "7168/8/256,2880/4/128", "iters": 10, "warmup": 3}
_EMULATION = {"tokens": "16,1", "shapes": "256/2/8", "iters": 1, "warmup": 0}


_FEW = 512  # tokens up to which the way for few is measured


class Shape(NamedTuple):
    hidden: int
    top_k: int
    experts: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


class Case:
    """One rank's share of a random routing: every token goes to `top_k` experts, all equally likely."""

    def __init__(self, comm: Communicator, shape: Shape, tokens: int, seed: int):
        generators = [torch.Generator().manual_seed(seed * 64 + rank) for rank in range(comm.size)]
        everyone = [
            torch.rand(tokens, shape.experts, generator=each).topk(shape.top_k, dim=1).indices for each in generators
        ]
        self.shape, self.tokens, self.local = shape, tokens, shape.experts // comm.size
        self.idx = everyone[comm.rank].to(comm.device)
        generator = torch.Generator(comm.device).manual_seed(seed * 64 + comm.rank)
        self.x = torch.randn(tokens, shape.hidden, device=comm.device, generator=generator).bfloat16()
        self.weights = torch.rand(tokens, shape.top_k, device=comm.device, generator=generator)
        goes = torch.zeros(tokens, comm.size, dtype=torch.bool, device=comm.device)
        goes.scatter_(1, self.idx // self.local, True)
        self.copies = int(goes.sum())
        self.by_node = goes.unflatten(1, (-1, comm.topology.width)).sum(2)  # copies of each token inside each
        self.remote = self.copies - int(goes[:, comm.rank].sum())
        if self.by_node.shape[1] > 1:  # one copy a node
            self.remote = int((self.by_node > 0).sum() - (self.by_node[:, comm.topology.node] > 0).sum())


class Bench:
    """Measures and collects; every method is collective."""

    def __init__(self, options: argparse.Namespace, comm: Communicator, bootstrap: Bootstrap):
        self.comm, self.bootstrap, self.options = comm, bootstrap, options
        self.clock = clock_for(comm, bootstrap, options.graph)
        self.effort = Effort(options.iters, options.warmup, 3 if environment.emulated() else 7)
        self.rows: list[dict] = []
        self.wrong = 0

    def say(self, text: str) -> None:
        if self.comm.rank == 0:
            print(text, flush=True)

    def measure(self, what: str, impl: str, case: Case, call: Callable, nbytes: int = 0, counted: int = 0) -> None:
        """Times a call; nbytes: what this rank puts on the wire, counted: with what stays here, as DeepEP counts."""
        time = slowest(self.clock, self.bootstrap, call, lambda: None, self.effort)
        wire, counted = (max(sizes) for sizes in zip(*self.bootstrap.exchange((nbytes, counted))))
        row = {
            "what": what, "impl": impl, "shape": str(case.shape), "tokens": case.tokens, "mode": self.clock.mode,
            "time_us": float(f"{time:.5g}"), "wire_bytes": wire, "counted_bytes": counted,
        }  # fmt: skip
        self.rows.append(row)
        rate = f"{wire / time / 1e3:8.2f}" if wire else f"{'':8}"
        shared = f"{counted / time / 1e3:8.2f}" if counted else f"{'':8}"
        self.say(f"{case.shape!s:>14} {case.tokens:>6} {impl:<8} {what:<34} {time:>10.2f} {rate} {shared}")

    def check(self, what: str, holds: bool) -> None:
        """Notes a wrong result on any rank."""
        if not all(self.bootstrap.exchange(bool(holds))):
            self.wrong += 1
            self.say(f"# WRONG: {what}")


def throughput(bench: Bench, ep: ExpertParallel, case: Case) -> None:
    """Plan, dispatch and combine of `ExpertParallel`."""
    comm, shape = bench.comm, case.shape
    row, scaled = shape.hidden * 2, shape.hidden + -(-shape.hidden // 128) * 4
    plan = ep.plan(case.idx)
    rows = len(plan.source)
    out = torch.empty(rows, shape.hidden, dtype=torch.bfloat16, device=comm.device)
    by_expert = torch.empty(ep.most_expert_rows(), shape.hidden, dtype=torch.bfloat16, device=comm.device)
    y = torch.empty_like(case.x)

    _check_throughput(bench, ep, case)

    def whole():
        again = ep.plan(case.idx)
        r = ep.dispatch(case.x, again, case.weights)
        ep.combine(r.rows, again, out=y)

    wire, counted = (count * row for count in (case.remote, case.copies))
    in_fp8 = case.remote * scaled, case.copies * scaled
    for what, call, sizes in (
        ("plan", lambda: ep.plan(case.idx), (0, 0)),
        ("dispatch bf16", lambda: ep.dispatch(case.x, plan), (wire, counted)),
        ("dispatch bf16, weights", lambda: ep.dispatch(case.x, plan, case.weights), (wire, counted)),
        ("dispatch bf16, copied out", lambda: ep.dispatch(case.x, plan, out=out), (wire, counted)),
        ("dispatch bf16, by expert", lambda: ep.dispatch(case.x, plan, None, "expert", out=by_expert), (wire, counted)),
        ("dispatch fp8", lambda: ep.dispatch(case.x, plan, quant="fp8_128"), in_fp8),
        ("combine bf16, in the landing buffer", lambda: ep.combine(ep.landing, plan, out=y), (wire, counted)),
        ("combine bf16", lambda: ep.combine(out, plan, out=y), (wire, counted)),
        ("combine bf16, by expert", lambda: ep.combine(by_expert, plan, None, "expert", out=y), (wire, counted)),
        ("plan, dispatch, combine bf16", whole, (2 * wire, 2 * counted)),
    ):
        bench.measure(what, "tdccl", case, call, *sizes)


def _check_throughput(bench: Bench, ep: ExpertParallel, case: Case) -> None:
    """Rows against all ranks' rows, gathered; a combination of equal rows against its multiple."""
    comm = bench.comm
    plan = ep.plan(case.idx)
    everyone = comm.all_gather(case.x)
    r = ep.dispatch(case.x, plan, case.weights)
    arrived = int(r.counts.sum())
    bench.check(
        "rows of a dispatch", torch.equal(r.rows[:arrived], everyone[_tokens(r.source[:arrived], ep.max_tokens, case)])
    )
    expected = torch.zeros_like(case.x, dtype=torch.float32)
    for copies in case.by_node.unbind(1):
        sums = torch.zeros_like(expected)
        for number in range(comm.topology.width):
            sums = torch.where(copies[:, None] > number, sums + case.x.float(), sums)
        expected += sums.bfloat16().float() if len(comm.topology.nodes) > 1 else sums
    bench.check("combine of a dispatch", torch.equal(ep.combine(r.rows, plan), expected.bfloat16()))
    r = ep.dispatch(case.x, plan, case.weights, "expert")
    valid = r.source >= 0
    bench.check("rows by expert", torch.equal(r.rows[valid], everyone[_tokens(r.source[valid], ep.max_tokens, case)]))
    total = int(valid.sum())
    copied = ep.dispatch(case.x, plan, out=torch.empty_like(ep.landing))
    bench.check(
        "rows of a dispatch, copied",
        torch.equal(copied.rows[:arrived], everyone[_tokens(plan.source[:arrived], ep.max_tokens, case)]),
    )
    bench.check("expert rows are counted", total == int(plan.counts.sum()))
    quantised = ep.dispatch(case.x, plan, quant="fp8_128")
    scales = quantised.scales[:arrived].repeat_interleave(128, 1)[:, : ep.hidden]
    near = quantised.rows[:arrived].float() * scales
    exact = everyone[_tokens(plan.source[:arrived], ep.max_tokens, case)].float()
    error = (near - exact).abs().max() if arrived else torch.zeros(())
    bench.check("fp8 rows", bool(error <= exact.abs().max() / 16) if arrived else True)
    ep.check()


def low_latency(bench: Bench, low: LowLatency, case: Case) -> None:
    """Dispatch and combine of `LowLatency`."""
    comm, shape = bench.comm, case.shape
    plan = low.plan(case.idx)
    r = low.dispatch(case.x, plan)
    everyone = comm.all_gather(case.x)
    valid = torch.arange(low.max_rows, device=comm.device) < r.counts[:, None]
    bench.check(
        "rows of a few tokens", torch.equal(r.rows[valid], everyone[_tokens(r.source[valid], low.max_tokens, case)])
    )
    sums = torch.zeros_like(case.x, dtype=torch.float32)
    for k in range(shape.top_k):
        sums += case.x.float() * case.weights[:, k, None]
    bench.check("combine of a few tokens", torch.equal(low.combine(r.rows, plan, case.weights), sums.bfloat16()))
    fp8 = low.dispatch(case.x, plan, quant="fp8_128")
    near = fp8.rows[valid].float() * fp8.scales[valid].repeat_interleave(128, 1)[:, : shape.hidden]
    exact = everyone[_tokens(fp8.source[valid], low.max_tokens, case)].float()
    bench.check("fp8 rows of a few tokens", not near.numel() or (near - exact).abs().max() <= exact.abs().max() / 16)
    low.check()

    y = torch.empty_like(case.x)
    pairs = case.idx.numel()
    remote = pairs - int((case.idx // case.local == comm.rank).sum())
    row, scaled = shape.hidden * 2, shape.hidden + -(-shape.hidden // 128) * 4

    def whole():
        low.dispatch(case.x, plan, quant="fp8_128", out=fp8.rows)
        low.combine(r.rows, plan, case.weights, out=y)

    for what, call, size in (
        ("few: dispatch bf16", lambda: low.dispatch(case.x, plan, out=r.rows), row),
        ("few: dispatch fp8", lambda: low.dispatch(case.x, plan, quant="fp8_128", out=fp8.rows), scaled),
        ("few: combine bf16", lambda: low.combine(r.rows, plan, case.weights, out=y), row),
        ("few: dispatch fp8, combine bf16", whole, row + scaled),
    ):
        bench.measure(what, "tdccl", case, call, remote * size, pairs * size)


def _tokens(source: torch.Tensor, max_tokens: int, case: Case) -> torch.Tensor:
    """Which rows of all ranks' tokens, gathered, `source` means."""
    return (source // max_tokens * case.tokens + source % max_tokens).long()


def rivals(bench: Bench, case: Case) -> None:
    """All rows to all ranks and back: what there is without expert parallelism; on NCCL if it was asked for."""
    comm, hidden = bench.comm, case.shape.hidden
    gathered = comm.empty((comm.size * case.tokens, hidden), torch.bfloat16)
    y = torch.empty_like(case.x)
    nbytes = (comm.size - 1) * case.x.numel() * 2
    bench.measure("all_gather", "tdccl", case, lambda: comm.all_gather(case.x, gathered), nbytes)
    bench.measure("reduce_scatter", "tdccl", case, lambda: comm.reduce_scatter(gathered, y), nbytes)
    if not bench.options.nccl:
        return
    plain = torch.empty(comm.size * case.tokens, hidden, dtype=torch.bfloat16, device=comm.device)
    bench.measure("all_gather", "nccl", case, lambda: dist.all_gather_into_tensor(plain, case.x), nbytes)
    bench.measure("reduce_scatter", "nccl", case, lambda: dist.reduce_scatter_tensor(y, plain), nbytes)
    permuted(bench, case, y)


def permuted(bench: Bench, case: Case, y: torch.Tensor) -> None:
    """NCCL's all_to_all_single of rows put in the order of their experts, one for each (token, expert), and back.

    The splits are known to the host before, which in truth costs a copy and a wait.
    """
    comm = bench.comm
    flat = case.idx.flatten()
    order = flat.argsort(stable=True)
    token = order // case.shape.top_k
    sent = torch.bincount(flat // case.local, minlength=comm.size).tolist()
    received = [splits[comm.rank] for splits in bench.bootstrap.exchange(sent)]
    experts = [torch.empty(0)] * comm.size
    everyone = bench.bootstrap.exchange(flat[order].cpu())
    for source in range(comm.size):
        experts[source] = everyone[source][everyone[source] // case.local == comm.rank]
    by_expert = torch.cat(experts).argsort(stable=True).to(comm.device)
    back = by_expert.argsort()
    send = torch.empty(len(order), case.shape.hidden, dtype=torch.bfloat16, device=comm.device)
    recv = torch.empty(sum(received), case.shape.hidden, dtype=torch.bfloat16, device=comm.device)
    rows = torch.empty_like(recv)
    weights = case.weights.flatten()[order, None].bfloat16()

    def dispatch():
        torch.index_select(case.x, 0, token, out=send)
        dist.all_to_all_single(recv, send, received, sent)
        torch.index_select(recv, 0, by_expert, out=rows)

    def combine():
        torch.index_select(rows, 0, back, out=recv)
        dist.all_to_all_single(send, recv, sent, received)
        y.zero_().index_add_(0, token, send * weights)

    nbytes = (len(order) - sent[comm.rank]) * case.shape.hidden * 2
    bench.measure("permute and all_to_all_single", "nccl", case, dispatch, nbytes)
    bench.measure("all_to_all_single and unpermute", "nccl", case, combine, nbytes)


def run(options: argparse.Namespace, comm: Communicator, bootstrap: Bootstrap) -> int:
    """Measures all that the options ask for and destroys `comm`; collective. 1 if anything is wrong, else 0."""
    if environment.emulated():
        torch.set_num_threads(1)  # ranks share the cores
    if options.nccl:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
        port = bootstrap.exchange(store.port if store else None)[0]
        store = store or dist.TCPStore("127.0.0.1", port, is_master=False)
        environment.forbid_multicast_to_others()
        dist.init_process_group("nccl", store=store, rank=comm.rank, world_size=comm.size, device_id=comm.device)
    bench = Bench(options, comm, bootstrap)
    described = describe(comm.size, comm.device, options.command, comm.topology)
    bench.say(f"# {options.command}\n# {described['host']}; {comm.size} ranks; {bench.clock.mode}")
    head = f"{'shape':>14} {'tokens':>6} {'impl':<8} {'what':<34} {'time':>10} {'wire':>8} {'counted':>8}"
    bench.say(f"{head}\n{'':>64} {'(us)':>10} {'(GB/s)':>8} {'(GB/s)':>8}")
    nodes, width = len(comm.topology.nodes), comm.topology.width
    few = [tokens for tokens in options.tokens if tokens <= _FEW and nodes == 1]
    for shape in options.shapes:
        sizes = shape.hidden, shape.experts, shape.top_k
        if nodes > 1 and not environment.emulated():  # with NVSHMEM's bitcode each kernel takes seconds
            if comm.rank == 0:
                major, minor = torch.cuda.get_device_capability(comm.device)
                made = ep_kernels.Sizes(nodes, width, max(options.tokens), *sizes, comm.multiprocessors)
                ep_kernels.warm(made, 10 * major + minor)
            bootstrap.barrier()
        ep = ExpertParallel(comm, max(options.tokens), *sizes)  # for all numbers of tokens: one compilation
        for seed, tokens in enumerate(options.tokens):
            case = Case(comm, shape, tokens, seed)
            throughput(bench, ep, case)
            if tokens in few:
                low_latency(bench, LowLatency(comm, tokens, *sizes), case)  # which cuts rows by it
            rivals(bench, case)
    bench.say(f"# Wrong results : {bench.wrong} {'FAILED' if bench.wrong else 'OK'}")
    if options.json and comm.rank == 0:
        options.json.write_text(json.dumps({**described, "rows": [], "ep": bench.rows}, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()
    comm.destroy()
    return 1 if bench.wrong else 0


def main(arguments: list[str]) -> int:
    """Runs on the ranks of mpirun or torchrun, or on one rank if there is no launcher."""
    options = _options(arguments)
    comm = tdccl.init() if launched() else tdccl.init(store=dist.HashStore(), rank=0, size=1)
    if not launched():
        return run(options, comm, comm._bootstrap)
    bootstrap = discover(timeout=comm.timeout)
    bootstrap.interrupt = comm.raise_fault  # nobody waits for a rank that has ended
    return run(options, comm, bootstrap)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench ep", description=__doc__)
    add = parser.add_argument
    add("--tokens", type=_numbers, help="of each rank, as 4096,128")
    add("--shapes", type=_shapes, help="hidden/top-k/experts, as 7168/8/256,2880/4/128")
    add("-n", "--iters", type=int, help="calls timed together")
    add("-w", "--warmup", type=int, help="calls before that, not timed")
    add("-G", "--graph", action="store_true", help="time replays of a CUDA graph that holds the timed calls")
    add("-J", "--json", metavar="FILE", type=Path, help="also write the results to FILE")
    add("--nccl", action="store_true", help="measure NCCL beside, in the same run")
    parser.set_defaults(**(_EMULATION if environment.emulated() else _GPU))
    options = parser.parse_args(arguments)
    if environment.emulated() and (options.graph or options.nccl):
        parser.error("-G and --nccl need GPUs: leave them out in emulation")
    options.command = f"python -m bench {given()}"
    return options


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _shapes(text: str) -> list[Shape]:
    return [Shape(*map(int, shape.split("/"))) for shape in text.split(",")]
