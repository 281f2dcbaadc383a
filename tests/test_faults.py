"""No fault hangs the ranks, none corrupts what they hold, and nothing is left behind."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from unittest import mock

import pool
import pytest
import reference
import torch
from test_process_group import MPIRUN

import tdccl
from bench import crew, fault_table
from tdccl.communicator import Communicator
from tdccl.membership import Membership
from tdccl.transport import bootstrap
from tdccl.transport.bootstrap import StoreBootstrap
from tdccl.transport.symmetric_memory import together

LONG = pytest.mark.skipif(os.environ.get("TDCCL_LONG", "0") == "0", reason="long: TDCCL_LONG=1 runs it")
SOON = 1.0 if crew.ON_GPU else 5.0  # seconds beyond the timeout; in emulation the tests' ranks share their cores
NEEDS_TWO = pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs two ranks")


@pytest.fixture(scope="module")
def mortals():
    """Ranks of which each fault may kill one."""
    made = crew.Crew(min(3, pool.LARGEST_WORLD))
    yield made
    made.close()


@NEEDS_TWO
@pytest.mark.parametrize("fault", fault_table.table(), ids=lambda fault: fault.name.replace(" ", "_"))
def test_fault(mortals, fault):
    """The right error in time, survivors that go on, and nothing left: see `crew.Crew.run`."""
    if "no scratch" in fault.name and 0 < torch.cuda.device_count() < min(3, pool.LARGEST_WORLD):
        pytest.skip("ranks that share a GPU share its memory")
    outcome = mortals.run(fault)
    if fault.timed:
        assert outcome.seconds < fault.waited + SOON, outcome


# ---- calls that look like faults ---------------------------------------------------------------------


def not_a_number(comm):
    """NaN and Inf pass through, and neither spoils its neighbours: packets carry their flags beside any bits."""
    results = []
    for dtype, count, op in (
        (torch.float32, 100, "sum"), (torch.float32, 20_000, "max"),
        (torch.bfloat16, 100, "min"), (torch.bfloat16, 20_000, "sum"), (torch.float64, 100, "sum"),
    ):  # fmt: skip
        x = torch.ones(count, dtype=dtype, device=comm.device)
        x[3 * comm.rank] = float("nan")
        x[3 * comm.rank + 1] = float("-inf")
        x[-1] = float("inf") * (-1) ** comm.rank
        everyone = comm.all_gather(x).view(comm.size, count)
        assert reference.same_bits(everyone[comm.rank], x)
        reduced = comm.all_reduce(x, op=op)
        assert torch.equal(reduced.isnan(), reference.ordered(list(everyone), op).isnan()), (dtype, count, op)
        assert reduced[2] == (comm.size if op == "sum" else 1), (dtype, count, op)
        results.append(reduced.cpu())
    return results


def test_nan_and_inf(ranks, world):
    first, *others = ranks.run(not_a_number, world)
    assert all(reference.same_bits(mine, its) for other in others for mine, its in zip(first, other))


def inverted_order(comm):
    """Two communicators on two streams (threads in emulation), first the one, on other ranks first the other."""
    pair = [comm.split(0), comm.split(0)]
    xs = [torch.full((50_000,), float(comm.rank + i), device=comm.device) for i in range(2)]
    order = [0, 1] if comm.rank % 2 else [1, 0]
    results = [None, None]

    def call(i):
        for _ in range(3):
            results[i] = pair[i].all_reduce(xs[i])

    if comm.device.type == "cuda":
        for i in order:
            with torch.cuda.stream(torch.cuda.Stream()):
                call(i)
        torch.cuda.synchronize()
    else:
        threads = {i: threading.Thread(target=call, args=(i,)) for i in order}
        for i in order:
            threads[i].start()
            time.sleep(0.2)
        for thread in threads.values():
            thread.join()
    for i in range(2):
        assert (results[i] == sum(range(comm.size)) + comm.size * i).all()
        pair[i].destroy()


def test_two_communicators_in_inverted_order(ranks, world):
    ranks.run(inverted_order, world)


def bad_timeouts(comm):
    x = torch.ones(4, device=comm.device)
    for refused in (0, -1, float("nan"), "5"):
        with pytest.raises(tdccl.ArgumentError, match=f"timeout is {refused!r}, expected seconds > 0"):
            comm.all_reduce(x, timeout=refused)
        with pytest.raises(tdccl.ArgumentError, match=f"init: timeout is {refused!r}, expected seconds > 0"):
            tdccl.init(store=torch.distributed.HashStore(), rank=0, size=1, device=comm.device, timeout=refused)
    for seconds in (50, 1e10, float("inf")):  # the last two have no room in nanoseconds
        assert comm.all_reduce(x, timeout=seconds).tolist() == [comm.size] * 4
    with tdccl.init(store=torch.distributed.HashStore(), rank=0, size=1, device=comm.device, timeout=1e10) as alone:
        assert alone.all_reduce(x).tolist() == [1] * 4
    with pytest.raises(tdccl.ArgumentError, match="exclude is"):
        comm.shrink(exclude=[comm.rank])
    with pytest.raises(tdccl.ArgumentError, match="exclude is"):
        comm.shrink(exclude=[comm.size])
    assert comm.all_reduce(x).tolist() == [comm.size] * 4


def test_a_refused_timeout_or_shrink_changes_nothing(ranks, world):
    ranks.run(bad_timeouts, world)


def interrupted(comm, part, wait):
    group, last = comm.split(0), comm.rank == comm.size - 1
    stopped = mock.patch.object(getattr(group, part), wait, side_effect=KeyboardInterrupt)
    start = time.monotonic()
    if last:
        with stopped, pytest.raises(KeyboardInterrupt):
            group.destroy()
    else:
        group.destroy()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("where", [("_interpreted", "wait_for"), ("_bootstrap", "barrier")], ids=["call", "barrier"])
def test_nobody_waits_for_a_rank_that_is_stopped_while_it_destroys(ranks, world, where):
    """While it waits for a call of another thread, or for the other ranks."""
    part, wait = where
    ranks.run(interrupted, world, part=part, wait=wait)


def destroyed_instead(comm, gone):
    """Rank 2 is left out; of the other two one destroys the communicator in place of shrinking it."""
    group = comm.split(0)
    group.abort()
    start = time.monotonic()
    if comm.rank in (gone, 2):
        group.destroy()
    else:
        with pytest.raises(tdccl.InitError, match=f"rank {gone} has destroyed the communicator; exclude it as well"):
            group.shrink(exclude=[2])
        with group.shrink(exclude=[gone, 2]) as alone:
            assert alone.size == 1
    assert time.monotonic() - start < 10


@pytest.mark.skipif(pool.LARGEST_WORLD < 3, reason="needs three ranks")
@pytest.mark.parametrize("gone", [0, 1])
def test_shrink_does_not_wait_for_who_has_destroyed_the_communicator(ranks, gone):
    ranks.run(destroyed_instead, 3, gone=gone)


def test_an_exchange_to_which_all_have_come_outlives_a_fault():
    """A rank that has met with all may go on and abort before a slower one has seen that all were there."""
    store = torch.distributed.HashStore()
    slow, fast = (StoreBootstrap(store, rank, 2, timeout=10) for rank in range(2))

    def abort():
        raise tdccl.Aborted("by rank 1", rank=1)

    def come_and_abort():
        assert fast.exchange("fast") == ["slow", "fast"]
        abort()

    slow.interrupt = come_and_abort
    assert slow.exchange("slow") == ["slow", "fast"]
    slow.interrupt = abort
    with pytest.raises(tdccl.Aborted):
        slow.exchange("rank 1 does not come")


def test_memory_that_a_rank_was_refused_is_not_kept_by_the_error():
    class Memory:
        pass

    def hold():
        memory = Memory()

        def step():
            raise tdccl.InitError(f"no room beside {memory}")

        return weakref.ref(memory), step

    gc.disable()
    try:
        memory, step = hold()
        with pytest.raises(tdccl.InitError, match="no room"):
            together(StoreBootstrap(torch.distributed.HashStore(), 0, 1, timeout=10), step)
        del step
        assert memory() is None
    finally:
        gc.enable()


def given_up(comm):
    """Rank 0 gives up making a communicator while rank 1 is slow."""
    if comm.rank > 1:
        return
    bootstrap, start = comm._bootstrap.subgroup([0, 1], "given up"), time.monotonic()

    def give_up():
        if time.monotonic() > start + 1:
            raise tdccl.DestroyedError("by who makes it")

    def share_late(self):
        time.sleep(3)
        return share(self)

    share = Membership._share_memory
    if comm.rank == 0:
        bootstrap.interrupt = give_up
        with pytest.raises(tdccl.DestroyedError):
            Communicator(bootstrap, comm.device, 30)
        assert time.monotonic() - start < 2.5
    else:
        with mock.patch.object(Membership, "_share_memory", share_late), pytest.raises(tdccl.InitError, match="rank 0"):
            Communicator(bootstrap, comm.device, 30)


@NEEDS_TWO
def test_who_makes_a_communicator_may_give_up_while_ranks_are_slow(ranks):
    ranks.run(given_up, 2)


# ---- life and death of communicators and processes ---------------------------------------------------


def come_and_go(comm, count):
    """Communicators made and destroyed leave nothing behind: no memory, descriptor, mapping or thread."""
    x = torch.ones(10, device=comm.device)

    def life(number):
        passing = comm.split(0)
        assert passing.all_reduce(x).tolist() == [comm.size] * 10
        if number % 10 == 1:
            passing.empty(1000)
        if number % 10 == 2:
            comm.barrier()  # the others have made their calls
            passing.abort()
        passing.destroy()
        passing.destroy()

    def footprint():
        gc.collect()
        free = torch.cuda.mem_get_info(comm.device)[0] if crew.ON_GPU else 0
        return crew.footprint(), free

    for number in range(3):
        life(number)
    comm.barrier()
    before, free = footprint()
    for number in range(count):
        life(number)
    comm.barrier()
    crew.check_footprint(before)
    assert footprint()[1] >= free - (64 << 20)


def test_50_communicators(ranks):
    ranks.run(come_and_go, min(3, pool.LARGEST_WORLD), count=50)


@LONG
@pytest.mark.timeout(1800)
def test_1000_communicators(ranks):
    ranks.run(come_and_go, min(3, pool.LARGEST_WORLD), seconds=1500, count=1000)


def fork(comm):
    child = os.fork()
    if not child:
        try:
            comm.abort()  # none of the child's business
            comm.barrier()
        except tdccl.DestroyedError as error:
            os._exit(0 if "forked" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert comm.all_reduce(torch.ones(3, device=comm.device)).tolist() == [comm.size] * 3


def test_a_forked_child_is_told_and_its_parent_goes_on(ranks, world):
    ranks.run(fork, world)


PROGRAM = """
import os, sys, threading, time
import torch, torch.distributed as dist, tdccl
store = dist.FileStore(sys.argv[1], 2)
comm = tdccl.init(store=store, rank=int(sys.argv[2]), size=2, timeout=100)
x = torch.ones(1000, device=comm.device)
assert comm.all_reduce(x)[0].item() == 2
"""


def start(folder, ending, ranks=2):
    program = PROGRAM + ending
    environment = {**os.environ, "PYTHONPATH": str(pool.ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, f"{folder}/store", str(rank)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip


@NEEDS_TWO
def test_a_program_may_end_without_destroy(tmp_path):
    for process in start(tmp_path, "comm.barrier()\nprint('bye', time.time())"):
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and "Error" not in errors, errors
        assert time.time() - float(out.split()[-1]) < 20


@NEEDS_TWO
def test_an_exception_ends_all_programs(tmp_path):
    """Also where the rank that raises holds the default store's file, and a thread still runs."""
    ending = """
threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
if comm.rank == 1:
    raise ValueError("a user's own")
comm.barrier()
if comm.device.type == "cuda":
    torch.cuda.synchronize()
    comm.check()
"""
    first, second = (process.communicate(timeout=60)[1] for process in start(tmp_path, ending))
    assert "ValueError" in second and "PeerFailure: rank 1" in first


def test_threads_stop_waiting_for_ranks_at_the_end_of_the_program(monkeypatch):
    """Else the interpreter's end, if it finds one inside a store's request, is a crash."""
    requests, errors = bootstrap._Requests(), []
    monkeypatch.setattr(bootstrap, "_requests", requests)
    waiting = StoreBootstrap(torch.distributed.HashStore(), 0, 2, timeout=100)

    def wait():
        with pytest.raises(tdccl.InitError) as raised:
            waiting.exchange(None)
        errors.append(str(raised.value))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    requests.stop()
    thread.join(5)
    assert errors == ["the program has ended while this thread waited for other ranks"]
    alone = StoreBootstrap(torch.distributed.HashStore(), 0, 1, timeout=100)
    assert alone.exchange("at exit") == ["at exit"]  # what a program does there itself


MPI_PROGRAM = """
import torch, tdccl
comm = tdccl.init(timeout=100)
x = torch.ones(1000, device=comm.device)
comm.all_reduce(x)
if comm.rank == 1:
    raise ValueError("a user's own")
comm.all_reduce(x)
if comm.device.type == "cuda":
    torch.cuda.synchronize()
    comm.check()
"""


@NEEDS_TWO
@pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install tdccl[mpi]")
def test_under_mpirun_a_rank_that_raises_ends_all():
    """MPI_Finalize of the rank that raises waits for the others, who wait for this rank in a kernel."""
    pytest.importorskip("mpi4py")
    names = [f"{runtime}_ALLOW_RUN_AS_ROOT{again}" for runtime in ("OMPI", "PRTE") for again in ("", "_CONFIRM")]
    environment = {**os.environ, **dict.fromkeys(names, "1"), "PYTHONPATH": str(pool.ROOT)}
    command = [MPIRUN, "--oversubscribe", "-n", "2", sys.executable, "-c", MPI_PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "ValueError" in done.stderr and "PeerFailure: rank 1" in done.stderr, done.stderr
