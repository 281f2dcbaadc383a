"""The backend of torchcomms, driven by the calls that torchcomms makes. What it needs of the package is made here."""

import contextlib
import enum
import os
import sys
import types
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist


def stand_in() -> types.ModuleType:
    """What tdccl's adapter uses of torchcomms: the base class, the registry, and the kinds of reduction."""
    module = types.ModuleType("torchcomms")
    module.TorchCommBackend = type("TorchCommBackend", (), {})
    module.RedOpType = enum.Enum("RedOpType", "SUM PRODUCT MIN MAX BAND BOR BXOR PREMUL_SUM AVG")
    module.backends = {}
    module.register_backend = module.backends.__setitem__
    return module


@contextlib.contextmanager
def new_comm(comm, name: str):
    """As torchcomms.new_comm("tdccl", device, name), over the ranks of `comm`; with the stand-in beside it."""
    module = stand_in()
    environment = {"RANK": str(comm.rank), "WORLD_SIZE": str(comm.size)}
    with mock.patch.dict(sys.modules, torchcomms=module), mock.patch.dict(os.environ, environment):
        sys.modules.pop("tdccl.torchcomms_backend", None)
        import tdccl.torchcomms_backend  # noqa: F401  it registers itself

        backend = module.backends["tdccl"]()
        store = dist.PrefixStore(f"torchcomms/{comm.size}", comm._bootstrap._store)
        backend.init(comm.device, name, types.SimpleNamespace(store=store, timeout=timedelta(seconds=30)))
        yield backend, lambda kind: types.SimpleNamespace(type=module.RedOpType[kind])
        backend.finalize()


def waited(work) -> None:
    if work is not None:
        work.wait()


def check_calls(comm):
    rank, size = comm.rank, comm.size
    everyone = range(size)
    new = lambda *values: torch.tensor(values, dtype=torch.float32, device=comm.device)  # noqa: E731
    with new_comm(comm, "all") as (backend, op):
        assert (backend.get_rank(), backend.get_size()) == (rank, size)
        assert (backend.get_backend_name(), backend.get_comm_name()) == ("tdccl", "all")
        for async_op in (False, True):
            x = new(rank, 2.0)
            waited(backend.all_reduce(x, op("SUM"), async_op))
            assert x.tolist() == [sum(everyone), 2.0 * size]
            x = new(rank)
            waited(backend.all_reduce(x, op("MAX"), async_op))
            assert x.item() == size - 1
            x = new(rank + 1)
            waited(backend.reduce(x, size - 1, op("SUM"), async_op))
            assert rank < size - 1 or x.item() == sum(everyone) + size
            x = new(rank)
            waited(backend.broadcast(x, size - 1, async_op))
            assert x.item() == size - 1

            pieces = [new(-1.0) for _ in everyone]
            waited(backend.all_gather(pieces, new(rank), async_op))
            assert [piece.item() for piece in pieces] == [*everyone]
            uneven = [new(*[-1.0] * (r + 1)) for r in everyone]
            waited(backend.all_gather_v(uneven, new(*[rank] * (rank + 1)), async_op))
            assert [piece.tolist() for piece in uneven] == [[r] * (r + 1) for r in everyone]
            whole = new(*[-1.0] * size)
            waited(backend.all_gather_single(whole, new(rank), async_op))
            assert whole.tolist() == [*everyone]

            part = new(-1.0)
            waited(backend.reduce_scatter(part, [new(r) for r in everyone], op("SUM"), async_op))
            assert part.item() == rank * size
            waited(backend.reduce_scatter_single(part, new(*everyone), op("AVG"), async_op))
            assert part.item() == rank
            ragged = new(*[-1.0] * (rank + 1))
            waited(backend.reduce_scatter_v(ragged, [new(*[1.0] * (r + 1)) for r in everyone], op("SUM"), async_op))
            assert ragged.tolist() == [size] * (rank + 1)

            moved = [new(-1.0) for _ in everyone]
            waited(backend.all_to_all(moved, [new(10 * rank + r) for r in everyone], async_op))
            assert [piece.item() for piece in moved] == [10 * r + rank for r in everyone]
            waited(backend.all_to_all_single(whole, new(*[10 * rank + r for r in everyone]), async_op))
            assert whole.tolist() == [10 * r + rank for r in everyone]
            rows = new(*[-1.0] * (size * (rank + 1)))  # every rank sends rank r r + 1 rows
            sent = new(*[rank for r in everyone for _ in range(r + 1)])
            splits = [rank + 1] * size, [r + 1 for r in everyone]
            waited(backend.all_to_all_v_single(rows, sent, *splits, async_op))
            assert rows.tolist() == [r for r in everyone for _ in range(rank + 1)]

            gathered = [new(-1.0) for _ in everyone] if rank == 0 else []
            waited(backend.gather(gathered, new(rank), 0, async_op))
            assert [piece.item() for piece in gathered] == ([*everyone] if rank == 0 else [])
            waited(backend.scatter(part, [new(r + 5) for r in everyone] if rank == 0 else [], 0, async_op))
            assert part.item() == rank + 5
            waited(backend.barrier(async_op))

        received = new(-1.0)
        sending = backend.send(new(rank), (rank + 1) % size, True)
        backend.recv(received, (rank - 1) % size, False)
        waited(sending)
        assert received.item() == (rank - 1) % size
        with pytest.raises(ValueError, match="PREMUL_SUM"):
            backend.all_reduce(new(1.0), op("PREMUL_SUM"), False)

        part = backend.split([*everyone][::-1], "reversed", types.SimpleNamespace(timeout=timedelta(seconds=30)))
        assert (part.get_rank(), part.get_comm_name()) == (size - 1 - rank, "reversed")
        x = new(part.get_rank())
        part.broadcast(x, 0, False)
        assert x.item() == 0
        part.finalize()


def test_every_call(ranks, world):
    if world > 1:  # nobody sends to himself
        ranks.run(check_calls, world)
