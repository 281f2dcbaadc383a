"""The torch backend: `torch_face.py` under both launchers, and the entry point by which torch finds it."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tdccl.errors import ArgumentError

CHECKOUT = Path(__file__).parent.parent
LONG = pytest.mark.skipif(os.environ.get("TDCCL_LONG", "0") == "0", reason="long: TDCCL_LONG=1 runs it")
BODY = str(CHECKOUT / "tests" / "torch_face.py")
MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def run(*command, path=(CHECKOUT,), **variables) -> str:
    """Output of a command, started as from a fresh shell; fails with it unless the command exits with 0."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONWARNINGS": "ignore::FutureWarning", **variables}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280
    )
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}"
    return done.stdout


def torchrun(ranks: int, **variables) -> str:
    return run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", BODY, **variables
    )


def mpirun(ranks: int, *command) -> str:
    as_root = [f"{runtime}_ALLOW_RUN_AS_ROOT{again}" for runtime in ("OMPI", "PRTE") for again in ("", "_CONFIRM")]
    return run(MPIRUN, "--oversubscribe", "-n", str(ranks), *command, **dict.fromkeys(as_root, "1"))


# 2 ranks are what mpirun starts.
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=LONG), 3])
def test_under_torchrun(ranks):
    assert torchrun(ranks).count(": ok") == ranks


def test_cpu_tensors_go_to_gloo():
    assert torchrun(2, TDCCL_EMULATE="0", CUDA_VISIBLE_DEVICES="").count(": ok") == 2


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install tdccl[mpi]")
def test_under_mpirun():
    pytest.importorskip("mpi4py")
    assert mpirun(2, sys.executable, BODY).count(": ok") == 2


def test_entry_point_registers_and_stays_light(installed):
    program = """
import sys
sys.modules["numpy"] = None                 # torch itself imports NumPy where it can
import torch, torch.distributed as dist
assert dist.Backend.TDCCL == "tdccl" and dist.Backend.backend_capability["tdccl"] == ["cpu", "cuda"]
heavy = {"triton", "mpi4py", "tdccl.process_group", "tdccl.communicator"} & sys.modules.keys()
assert not heavy, heavy
"""
    run(sys.executable, "-W", "error::UserWarning:tdccl", "-c", program, path=(installed, CHECKOUT))


def test_init_process_group_without_import_of_tdccl(installed):
    program = """
import torch, torch.distributed as dist
dist.init_process_group("tdccl", init_method="tcp://localhost:0", rank=0, world_size=1)
tensor = torch.ones(3, device="cuda" if torch.cuda.is_available() else "cpu")
dist.all_reduce(tensor)
assert tensor.tolist() == [1, 1, 1]
dist.destroy_process_group()
"""
    run(sys.executable, "-c", program, path=(installed, CHECKOUT))


def test_abort_ends_the_wait_for_ranks_that_have_not_come(installed):
    program = """
import threading, time
import torch, torch.distributed as dist
import tdccl
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
dist.init_process_group("tdccl", store=store, rank=0, world_size=2)
group, told = dist.group.WORLD, []

def call():
    try:
        dist.all_reduce(torch.ones(3, device="cuda" if torch.cuda.is_available() else "cpu"))
    except tdccl.DestroyedError as error:
        told.append(error)

thread = threading.Thread(target=call, daemon=True)
thread.start()
time.sleep(2)
assert thread.is_alive()
aborting = threading.Thread(target=group.abort, daemon=True)
aborting.start()
thread.join(10)
aborting.join(10)
assert told and not aborting.is_alive()
"""
    run(sys.executable, "-c", program, path=(installed, CHECKOUT))


def test_a_broken_installation_does_not_break_torch(installed):
    program = "import torch.distributed as dist; dist.Backend.register_backend = None; " \
              "import tdccl.torch_entry; del dist.Backend.TDCCL; tdccl.torch_entry.register()"  # fmt: skip
    assert "not available" in run(sys.executable, "-c", program, path=(installed, CHECKOUT))


@pytest.mark.parametrize("value", ["[a, b]", "[a, [b]]", "{'x': a, 'y': b}", "[a, None, b]"])
def test_tensors_in_the_value_of_a_future_are_found(value):
    """As torch finds them by pickling; it asks us for those in lists."""
    import tdccl.process_group  # noqa: F401

    a, b = torch.ones(2), torch.ones(3)
    found = torch._jit_internal._extract_tensors(eval(value, {"a": a, "b": b}))
    assert len(found) == 2 and found[0] is a and found[1] is b


def test_event_of_a_work_serves_another_once_that_is_gone(monkeypatch):
    from tdccl import process_group

    monkeypatch.setattr(process_group, "_Event", mock.Mock)
    stream = SimpleNamespace(device_index="a GPU that no other test has")
    first, second = (process_group.Work([], None, stream) for _ in range(2))
    events = [work.mark_end() for work in (first, second)]
    assert events[0] is not events[1] and first.mark_end() is events[0]
    del first
    third = process_group.Work([], None, stream)
    assert third.mark_end() is events[0]
    assert events[0].record.call_args_list == [mock.call(stream)] * 2


def test_memory_is_kept_for_what_a_call_has_begun_before_it_fails(monkeypatch):
    from tdccl import process_group

    monkeypatch.setattr(process_group, "OnStream", contextlib.nullcontext)
    group = SimpleNamespace(_begin=lambda *_: (None, 1, None), _beside=mock.Mock(), _work=mock.Mock())
    refused = mock.Mock(side_effect=ArgumentError("the second tensor"))
    with pytest.raises(ArgumentError):
        process_group.ProcessGroup._compose(group, None, ["inputs"], ["outputs"], refused)
    group._work.assert_called_once_with(None, ["inputs"], ["outputs"])


LONG_EXCHANGE = """
from mpi4py import MPI
import tdccl
from tdccl.transport.bootstrap import MPIBootstrap

bootstrap = MPIBootstrap(MPI.COMM_WORLD, timeout=20)
for length in (1, 100_000, 3_000_000):
    told = bootstrap.exchange(bytes([bootstrap.rank]) * (length * (1 + bootstrap.rank)))
    assert [len(each) for each in told] == [length * (1 + rank) for rank in range(bootstrap.size)]
    assert all(each[-1] == rank for rank, each in enumerate(told))

def aborted():
    raise tdccl.Aborted("by a rank that has met with all", rank=1)

bootstrap.interrupt, bootstrap._GRACE = aborted, 10
assert bootstrap.exchange(bootstrap.rank) == list(range(bootstrap.size))
bootstrap._GRACE, value = 0.1, bytes(1_000_000)
if bootstrap.rank == 0:
    MPI.COMM_WORLD.Barrier()  # the others have given up: nobody takes its value
try:
    bootstrap.exchange(value)
except tdccl.Aborted:
    print("given up")
if bootstrap.rank:
    MPI.COMM_WORLD.Barrier()
# What nobody has taken does not pass for what comes after it: not of this one, of a part of it, of one made again.
bootstrap = MPIBootstrap(MPI.COMM_WORLD, timeout=20)
part = bootstrap.subgroup([*range(bootstrap.size)], "part")
for each in (part, bootstrap, part):
    assert each.exchange((each is part, bootstrap.rank)) == [(each is part, rank) for rank in range(bootstrap.size)]
print(f"rank {bootstrap.rank} was told all")
"""


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install tdccl[mpi]")
def test_ranks_of_mpi_exchange_values_of_any_length():
    said = mpirun(3, sys.executable, "-c", LONG_EXCHANGE)
    assert said.count("was told all") == 3 and said.count("given up") >= 2, said
