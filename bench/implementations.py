"""What is timed: tdccl, and its peers in the same process on the same buffers."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from bench.collectives import Buffers, Case, Collective
from tdccl import Communicator, environment
from tdccl.timing import HostClock, clock_for
from tdccl.transport.bootstrap import Bootstrap

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "avg": dist.ReduceOp.AVG,
}


class Candidate(NamedTuple):
    """One way to do a case: its algorithm, the call, and the arrays that go in and come out."""

    algorithm: str
    call: Callable[[], object]
    send: torch.Tensor
    recv: torch.Tensor


class Implementation(Protocol):
    """What is measured by `clock` under `name`, with grids of at most `max_blocks`; a peer's own are not capped."""

    name: str
    clock: HostClock
    max_blocks: int | None

    def variants(self, collective: Collective) -> list[bool]:
        """The values of `in_place` that it has; empty if it lacks the collective."""

    def candidates(self, case: Case, buffers: Buffers) -> list[Candidate]:
        """The ways to do the case, of which the fastest counts; empty if there is none."""


class Tdccl:
    """tdccl itself."""

    name = "tdccl"

    def __init__(self, comm: Communicator, clock: HostClock):
        self._comm, self.clock = comm, clock

    @property
    def max_blocks(self) -> int | None:
        return self._comm.max_blocks

    def variants(self, collective: Collective) -> list[bool]:
        return collective.variants

    def candidates(self, case: Case, buffers: Buffers) -> list[Candidate]:
        comm, name = self._comm, case.collective.name
        send, recv = buffers.views(case)
        call = {
            "all_reduce": lambda: comm.all_reduce(send, recv, case.op),
            "all_gather": lambda: comm.all_gather(send, recv),
            "reduce_scatter": lambda: comm.reduce_scatter(send, recv, case.op),
            "broadcast": lambda: comm.broadcast(recv, case.root),
            "all_to_all": lambda: comm.all_to_all(send, recv),
        }[name]
        algorithm = comm.explain(name, send, recv, case.op or "sum", case.root).algorithm
        return [Candidate(algorithm, call, send, recv)]


class Distributed:
    """torch.distributed: NCCL on GPU tensors, Gloo on CPU tensors.

    Its all_reduce and broadcast are in place only; the others are measured out of place.
    """

    max_blocks = None

    def __init__(self, name: str, clock: HostClock, buffers: Buffers | None = None):
        self.name, self.clock, self._own = name, clock, buffers

    def variants(self, collective: Collective) -> list[bool]:
        return [collective.name in ("all_reduce", "broadcast")]

    def candidates(self, case: Case, buffers: Buffers) -> list[Candidate]:
        send, recv = (self._own or buffers).views(case)
        op = _REDUCE_OPS.get(case.op)
        call = {
            "all_reduce": lambda: dist.all_reduce(recv, op),
            "all_gather": lambda: _all_gather(recv, send),
            "reduce_scatter": lambda: _reduce_scatter(recv, send, op),
            "broadcast": lambda: dist.broadcast(recv, case.root),
            "all_to_all": lambda: dist.all_to_all_single(recv, send),
        }[case.collective.name]
        return [Candidate(self.name, call, send, recv)]


class TorchSymmetric:
    """torch symmetric memory's all_reduce, on its own symmetric buffer: one-shot to a second buffer, two-shot in
    place. Compared with tdccl's in place, whichever is the faster."""

    name = "symm"
    max_blocks = None

    def __init__(self, clock: HostClock, nbytes: int, device: torch.device):
        import torch.distributed._symmetric_memory as symmetric_memory

        self.clock = clock
        self._group = dist.group.WORLD.group_name
        self._buffer = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        symmetric_memory.rendezvous(self._buffer, self._group)
        self._result = torch.empty_like(self._buffer)

    def variants(self, collective: Collective) -> list[bool]:
        return [True] if collective.name == "all_reduce" else []

    def candidates(self, case: Case, _: Buffers) -> list[Candidate]:
        if case.op != "sum" or case.dtype not in (torch.float32, torch.bfloat16):
            return []
        operators, group = torch.ops.symm_mem, self._group
        buffer, result = (memory[: case.nbytes].view(case.dtype) for memory in (self._buffer, self._result))

        def one_shot():
            operators.one_shot_all_reduce_out(buffer, "sum", group, result)

        def two_shot():
            operators.two_shot_all_reduce_(buffer, "sum", group)

        return [Candidate("one_shot", one_shot, buffer, result), Candidate("two_shot", two_shot, buffer, buffer)]


def ours(comm: Communicator, bootstrap: Bootstrap, graph: bool) -> Tdccl:
    """tdccl with the clock for what it runs on."""
    return Tdccl(comm, clock_for(comm, bootstrap, graph))


def peers(names: list[str], comm: Communicator, bootstrap: Bootstrap, graph: bool, nbytes: int):
    """(the peers that can run here, notes on those that cannot); collective. Makes torch's default group.

    nbytes is the largest message.
    """
    notes = {name: reason for name in names if (reason := _missing(name, bootstrap.size))}
    names = [name for name in names if name not in notes]
    if not names:
        return [], notes
    environment.forbid_multicast_to_others()
    backends = {"cpu:gloo" if name == "gloo" else "cuda:nccl" for name in names}
    dist.init_process_group(
        ",".join(sorted(backends)), store=_shared_store(bootstrap), rank=bootstrap.rank, world_size=bootstrap.size
    )
    clock = clock_for(comm, bootstrap, graph)
    made = {
        "nccl": lambda: Distributed("nccl", clock),
        "symm": lambda: TorchSymmetric(clock, nbytes, comm.device),
        "gloo": lambda: Distributed("gloo", HostClock(bootstrap), None if environment.emulated() else _on_cpu(nbytes)),
    }
    return [made[name]() for name in names], notes


def _missing(name: str, ranks: int) -> str | None:
    """Why a peer cannot run here, or None."""
    if name == "gloo":
        return None
    if environment.emulated():
        return "needs GPUs, and this is emulation"
    if ranks > torch.cuda.device_count():
        return f"needs a GPU a rank, and {ranks} ranks share {torch.cuda.device_count()}"
    return None


def _on_cpu(nbytes: int) -> Buffers:
    return Buffers(torch.empty(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8))


def _shared_store(bootstrap: Bootstrap) -> dist.Store:
    """A store for torch's group on a port of this host, whichever launcher started the ranks."""
    host = "127.0.0.1"  # tdccl's ranks are on one host
    if bootstrap.rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        bootstrap.exchange(store.port)
        return store
    return dist.TCPStore(host, bootstrap.exchange(None)[0], is_master=False)
