"""What ranks of different hosts hear of each other: beats, faults, and the ends of processes."""

import os
import subprocess
import sys
import threading
import time

import pool
import pytest
import torch.distributed as dist
from test_process_group import MPIRUN

from tdccl import environment
from tdccl.runtime import heartbeat
from tdccl.runtime.heartbeat import Heartbeat
from tdccl.transport import Control
from tdccl.transport.bootstrap import StoreBootstrap


class Flaky:
    """A Store whose connection breaks when it is told to; a clone is another connection."""

    def __init__(self, store):
        self._store, self.broken, self.gone = store, False, threading.Event()

    def clone(self):
        if self.gone.is_set():
            raise RuntimeError("nobody listens")
        fresh = Flaky(self._store)
        fresh.gone = self.gone
        return fresh

    def __getattr__(self, name):
        if self.broken or self.gone.is_set():
            raise RuntimeError("connection reset by peer")
        return getattr(self._store, name)


@pytest.fixture
def pair(monkeypatch):
    """(beats, store) of two ranks that see nothing of each other, and the deaths that they were told of."""
    monkeypatch.setattr(heartbeat, "PERIOD", 0.02)
    monkeypatch.setattr(heartbeat, "SILENCE", 1.0)
    shared, died = dist.HashStore(), []
    made = []
    for rank in range(2):
        store = Flaky(shared)
        control = Control(StoreBootstrap(dist.HashStore(), 0, 1, 10), pinned=False, node=[0])
        made.append((Heartbeat(store, rank, 2, 1 - rank, rank == 0, control, died.append), store))
    yield made, died
    heartbeat.end_all()


def beats_of(store, rank):
    return store.get(f"beat/{rank}")


def test_a_failed_request_ends_no_beats(pair):
    ((_, first), (mine, second)), died = pair
    time.sleep(0.2)
    second.broken = True
    time.sleep(0.2)
    before = beats_of(first, 1)
    time.sleep(2 * heartbeat.SILENCE)
    assert beats_of(first, 1) != before and mine._thread.is_alive() and not died


def test_a_store_that_is_gone_is_given_up(pair):
    (_, (mine, second)), died = pair
    second.gone.set()
    mine._thread.join(5 * heartbeat.SILENCE)
    assert not mine._thread.is_alive()
    time.sleep(heartbeat.SILENCE)
    assert died == [1]  # to the other, which does not hear of it


@pytest.mark.parametrize("leaves", [True, False])
def test_only_who_says_so_has_left(pair, leaves):
    (_, (mine, _)), died = pair
    time.sleep(0.2)
    if leaves:
        mine.leave()
    else:
        mine.end_soon()
    time.sleep(3 * heartbeat.SILENCE)
    assert died == ([] if leaves else [1])


# ---- the ends of processes -----------------------------------------------------------------------------

PROGRAM = """
import atexit, sys, threading, time

def check_threads():
    running = [thread.name for thread in threading.enumerate() if "heartbeat" in thread.name]
    print("running at the end:", running)

atexit.register(check_threads)  # runs after those of modules that are imported later
import torch, tdccl
from tdccl.transport import topology
rank, raises = int(sys.argv[1]), int(sys.argv[2])
topology.boot_id = lambda: f"host {rank}"
comm = tdccl.init(rank=rank, size=3, timeout=100)
x = torch.ones(9)
assert comm.all_reduce(x).tolist() == [3] * 9
comm._bootstrap.barrier()
if rank == raises:
    raise ValueError("a user's own")
start = time.monotonic()
try:
    comm.all_reduce(x)
except tdccl.PeerFailure as failure:
    print("told of", failure.rank, "after", time.monotonic() - start)
comm.destroy()
"""


@pytest.mark.skipif(not environment.emulated(), reason="other hosts are emulated")
@pytest.mark.parametrize("raises", [0, 2], ids=["holder_of_the_store", "another"])
def test_an_exception_is_heard_of_on_other_hosts(raises):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = server.port
    del server
    variables = {**os.environ, "PYTHONPATH": str(pool.ROOT), "TDCCL_INIT": f"tcp://127.0.0.1:{port}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(raises)],
            env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        for rank, process in enumerate(processes):
            out, errors = process.communicate(timeout=100)
            assert "running at the end: []" in out, out + errors
            if rank == raises:
                assert "ValueError" in errors and process.returncode == 1, errors
            else:
                assert f"told of {raises}" in out and process.returncode == 0, out + errors
                assert float(out.split("after")[1].split()[0]) < 10, out
    finally:
        for process in processes:
            process.kill()


DEAF = """
import sys
from mpi4py import MPI
from tdccl.transport import bootstrap

def refuse(*_):
    raise RuntimeError("cannot listen")

mpi = bootstrap.discover(mpi=MPI.COMM_WORLD, timeout=100)
if mpi.rank == 0:
    bootstrap.open_store = refuse
before = MPI.Wtime()
assert mpi.store("beats") is None and MPI.Wtime() - before < 10
print("knows")
"""


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install tdccl[mpi]")
def test_all_know_at_once_that_rank_0_cannot_listen():
    pytest.importorskip("mpi4py")
    command = [MPIRUN, "--oversubscribe", "-n", "2", sys.executable, "-c", DEAF]
    variables = os.environ | {"PYTHONPATH": str(pool.ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("knows") == 2, done.stdout + done.stderr
