"""Bad input is refused before anything is launched, says what is wrong, and leaves the communicator usable."""

import contextlib
import errno
import math
import os
import re
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pool
import pytest
import torch

import tdccl
from bench import launch
from tdccl import tuning
from tdccl.transport import bootstrap


def bad_calls(comm):
    """(call, words that its message must contain)."""
    size = comm.size

    def make(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, device=comm.device)

    x = make(size * 2, 3)
    elsewhere = torch.ones(4, device="meta")
    both = make(2 * size + 3)
    return [
        (lambda: comm.all_reduce(x, make(5)), ["recv has 5 elements", f"expected {x.numel()}"]),
        (lambda: comm.all_gather(x, make(7)), ["recv has 7 elements", "expected"]),
        (lambda: comm.reduce_scatter(x, make(x.numel() + 1)), ["send has", "expected"]),
        (lambda: comm.reduce_scatter(make(size + 1) if size > 1 else make()), ["multiple of the"]),
        (lambda: comm.all_reduce(x, x.double()), ["float32", "float64", "equal dtypes"]),
        (lambda: comm.all_reduce(x.t()), ["not contiguous", "contiguous()"]),
        (lambda: comm.all_reduce(x.to_sparse()), ["sparse", "to_dense()"]),
        (lambda: comm.all_reduce(elsewhere), ["meta", str(comm.device)]),
        (lambda: comm.all_reduce(x, op="median"), ["'median'", "sum"]),
        (lambda: comm.all_reduce(x, op="xor"), ["xor is not defined for torch.float32"]),
        (lambda: comm.all_reduce(make(4, dtype=torch.bool)), ["sum is not defined for bool"]),
        (lambda: comm.all_reduce(make(4, dtype=torch.complex64)), ["complex64 cannot be reduced"]),
        (lambda: comm.broadcast(x, size), [f"root is {size}", f"0 to {size - 1}"]),
        (lambda: comm.broadcast(x, -1), ["root is -1"]),
        (lambda: comm.all_to_all(make(size * 2 + 1) if size > 1 else make()), ["multiple of the"]),
        (lambda: comm.all_to_all(x, None, [1] * size), ["both"]),
        (lambda: comm.all_to_all(x, None, [1] * size, [1] * size), ["rows", "sum(send_splits)"]),
        (lambda: comm.all_to_all(x, None, [2] * (size + 1), [2] * size), ["counts >= 0"]),
        (lambda: comm.all_to_all(x, make(1), [2] * size, [2] * size), ["recv has 1 elements", "recv_splits"]),
        (lambda: comm.all_to_all(x, x, [2] * size, [2] * size), ["overlaps"]),
        (lambda: comm.all_reduce(x.view(-1)[1:], x.view(-1)[:-1]), ["overlap", "the same buffer"]),
        (lambda: comm.all_gather(both[1:3], both[: 2 * size]), ["overlap", "expected"]),
        (lambda: comm.all_reduce([1, 2]), ["list", "expected a torch tensor"]),
        (lambda: comm.explain("gossip", x), ["gossip", "all_reduce"]),
        (lambda: comm.explain(["all_reduce"], x), ["is not one of", "all_reduce"]),
        (lambda: comm.has_message_from(size), [f"has_message_from: source is {size}", f"0 to {size - 1}"]),
        (lambda: comm.symmetric(x), ["empty()"]),
        (lambda: comm.scatter(x, None), ["recv is a NoneType"]),
        (lambda: comm.all_reduce(x, stream="fast"), ["stream is a str", "an int"]),
        (lambda: comm.all_to_all(x, None, 2, [2] * size), ["send_splits is 2", f"{size} counts"]),
        (lambda: comm.all_gather(x, None, 2 * size), ["recv_splits is", f"{size} counts"]),
        (lambda: comm.reduce_scatter(x, None, "sum", 2), ["send_splits is 2", f"{size} counts"]),
        (lambda: comm.all_reduce(x, timeout=math.nan), ["all_reduce: timeout is nan", "seconds > 0"]),
        (lambda: comm.gather(x, timeout="5"), ["gather: timeout is '5'", "seconds > 0"]),
        (lambda: comm.send(x, (comm.rank + 1) % size, timeout=-1), ["send_recv: timeout is -1"]),
        (
            lambda: comm.send(x, comm.rank),
            [f"rank {comm.rank} sends itself", f"[{4 * x.numel()}] bytes", "takes in []"],
        ),
        (lambda: comm.recv(x, comm.rank), [f"rank {comm.rank} sends itself messages of []"]),
        (lambda: comm.limit_waits(-1), ["limit_waits: timeout is -1"]),
        (lambda: comm.send_recv([x], []), ["send_recv: a message is", "expected (tensor, the other rank)"]),
        (lambda: comm.shrink(size), [f"shrink: exclude is {size}", "expected ranks"]),
        (lambda: comm.split("red"), ["rank 0 gave color 'red'", "whole numbers"]),
        (lambda: comm.split(0, "a" if comm.rank == size - 1 else 0), [f"rank {size - 1} gave", "key 'a'"]),
        (lambda: comm.split(lambda: 0), ["whole numbers"]),  # which cannot be told to other ranks
        (lambda: comm.empty(2.5), ["empty: got shape 2.5"]),
        (lambda: comm.empty((1 << 62, 2)), ["empty: got shape", "2**63"]),
        (lambda: comm.lend(None), ["lend: got shape None"]),
    ]


def check_bad_input(comm):
    for number, (call, words) in enumerate(bad_calls(comm)):
        with pytest.raises(tdccl.ArgumentError) as raised:
            call()
        missing = [word for word in words if word not in str(raised.value)]
        assert not missing, f"case {number}: {missing} not in: {raised.value}"
    x = torch.full((3,), 1.0, device=comm.device)
    assert comm.all_reduce(x).tolist() == [comm.size] * 3


def test_bad_input_is_refused(ranks, world):
    ranks.run(check_bad_input, world)


def check_other_views(comm):
    size = comm.size
    x, y = (torch.ones(size, size + 1, device=comm.device) for _ in range(2))
    z, gathered = (torch.ones(count, dtype=torch.complex64, device=comm.device) for count in (3, 3 * size))
    for _ in range(2):
        comm.all_reduce(x, y)
        comm.all_to_all(x, y)
        comm.all_gather(z, gathered)
    for call, words in [
        (lambda: comm.all_reduce(torch._neg_view(x), y), "lazy view"),
        (lambda: comm.all_reduce(x, torch._neg_view(y)), "lazy view"),
        (lambda: comm.all_gather(z.conj(), gathered), "lazy view"),
        (lambda: comm.all_gather(z, gathered.conj()), "lazy view"),
        (lambda: comm.all_reduce(x.view(torch.int32), y), "equal dtypes"),
        (lambda: comm.all_reduce(x[:, :1], y[:, :1]), "not contiguous" if size > 1 else None),
        (lambda: comm.all_reduce(x, y[:-1]), "elements"),
        (lambda: comm.all_to_all(x.view(size + 1, size), y), "multiple of the" if size > 1 else None),
    ]:
        with pytest.raises(tdccl.ArgumentError, match=words) if words else contextlib.nullcontext():
            call()


def test_other_views_of_memory_on_which_a_call_was_right_are_refused(ranks, world):
    ranks.run(check_other_views, world)


def check_sizes_of_empty(comm):
    if comm.size > 1:
        with pytest.raises(tdccl.ArgumentError, match="different sizes"):
            comm.empty(10 + comm.rank)
    assert comm.empty(10).shape == (10,)


def test_symmetric_memory_must_have_one_size(ranks, world):
    ranks.run(check_sizes_of_empty, world)


def check_destroyed(comm):
    other = comm.split(0)
    x = torch.ones(3, device=comm.device)
    assert other.all_reduce(x).tolist() == [comm.size] * 3
    memory = other.empty(3)
    other.destroy()
    other.destroy()
    for use in (
        lambda: other.all_reduce(x),
        lambda: other.symmetric(memory),
        lambda: other.addresses_of(memory),
        lambda: other.limit_blocks(1),
        lambda: other.limit_waits(1),
    ):
        with pytest.raises(tdccl.DestroyedError, match="destroyed"):
            use()
    assert comm.all_reduce(x).tolist() == [comm.size] * 3


def test_use_after_destroy(ranks, world):
    ranks.run(check_destroyed, world)


def check_equal_colors(comm):
    """Whole numbers of whatever type are one color, and any that counts is a split."""
    size, kinds = comm.size, (1, np.int64(1), torch.tensor(1), True)
    with comm.split(kinds[comm.rank % 4]) as group:
        x = torch.arange(2 * size, device=comm.device)
        counts = np.full(size, 2)
        assert group.all_to_all(x, None, counts, iter(counts)).tolist() == [2 * comm.rank, 2 * comm.rank + 1] * size
        assert group.empty(torch.tensor([2, 3])).shape == (2, 3)


def test_whole_numbers_are_those_of_any_library(ranks, world):
    ranks.run(check_equal_colors, world)


def check_subgroups(comm):
    """Overlapping groups, made in an order of their own and used in turns."""
    halves = comm.split(comm.rank % 2)
    reverse = comm.split(0, key=-comm.rank)
    some = comm.split(0 if comm.rank < 2 else None)
    for _ in range(3):
        x = torch.full((1000,), float(comm.rank), device=comm.device)
        members = range(comm.rank % 2, comm.size, 2)
        assert halves.all_reduce(x)[0].item() == sum(members)
        assert reverse.all_gather(x[:1]).tolist() == [float(rank) for rank in reversed(range(comm.size))]
        if some is not None:
            assert some.all_reduce(x)[0].item() == sum(range(min(2, comm.size)))
    assert (some is None) == (comm.rank >= 2)
    for group in (halves, reverse, some):
        if group is not None:
            group.destroy()


def test_subgroups(ranks, world):
    ranks.run(check_subgroups, world)


def check_arrays(comm):
    """NumPy in emulation, CuPy on GPUs, and anything with DLPack or __cuda_array_interface__."""
    if comm.device.type == "cpu":
        library = np
    else:
        library = pytest.importorskip("cupy")
        library.cuda.Device(comm.device.index).use()
    x = library.full((4, 5), comm.rank + 1, dtype="float32")
    total = sum(range(1, comm.size + 1))
    assert type(comm.all_reduce(x)) is type(x)
    assert (comm.all_reduce(x) == total).all()
    assert comm.all_reduce(x, x) is x and (x == total).all()

    class Exporter:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **kwargs):
            return self.array.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    assert (comm.all_reduce(Exporter(torch.ones(3, device=comm.device))) == comm.size).all()


def test_arrays_of_other_frameworks(ranks, world):
    ranks.run(check_arrays, world)


def check_explain(comm):
    rows = torch.ones(2 * comm.size, 3, device=comm.device)
    for collective in ("all_to_all_vdev", "reduce", "barrier", "send_recv"):
        assert str(comm.explain(collective, rows)).startswith(collective)
    with pytest.raises(tdccl.ArgumentError, match="root is 99"):
        comm.explain("broadcast", rows, root=99)
    small = comm.explain("all_reduce", torch.ones(10, device=comm.device))
    assert (small.algorithm, small.path) == ("one_shot_ll", "packets")
    big = torch.ones(1 << 20, device=comm.device)
    assert comm.explain("all_reduce", big, big).path == "staged"
    assert "grid" in str(small) and "not two_shot_pull" in str(comm.explain("all_reduce", big))
    buffer = comm.empty(1 << 20)
    given, direct = comm.table, [tuning.Row(None, "two_shot_pull", {})]
    comm.use_table(tuning.Table("the test", {"all_reduce": {"symmetric": direct}}))  # whatever is fastest here
    try:
        assert comm.explain("all_reduce", buffer, buffer).path == "symmetric"
        assert comm.explain("all_reduce", buffer, big).path == "staged"
        assert "because: the test" in str(comm.explain("all_reduce", buffer, buffer))
    finally:
        comm.use_table(given)


def test_explain_names_the_path(ranks, world):
    if world != 3:
        ranks.run(check_explain, world)


def straggle(rank, folder, queue, over):
    import torch.distributed as dist

    comm = tdccl.init(store=dist.FileStore(f"{folder}/store", 2), rank=rank, size=2, timeout=3)
    x = torch.ones(10, device=comm.device)
    comm.all_reduce(x)
    started = time.monotonic()
    try:
        if rank == 0:
            comm.all_reduce(x)
            if comm.device.type == "cuda":
                torch.cuda.synchronize()
            comm.all_reduce(x)
    except tdccl.Timeout as error:
        queue.put((time.monotonic() - started, str(error)))
        with pytest.raises(tdccl.Timeout):
            comm.barrier()
    queue.put(None)
    over.wait(100)


def test_a_missing_call_ends_in_a_timeout_that_names_the_rank(tmp_path):
    context = launch.processes()
    queue, over = context.Queue(), context.Event()
    processes = [context.Process(target=straggle, args=(rank, str(tmp_path), queue, over)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=120) for _ in range(3)]
    over.set()
    for process in processes:
        process.join(60)
    ((seconds, message),) = [answer for answer in answers if answer]
    assert 2.5 < seconds < 30 and "for rank 1" in message and "3 s" in message, (seconds, message)


def come_late(rank, folder, queue, over):
    import torch.distributed as dist

    comm = tdccl.init(store=dist.FileStore(f"{folder}/store", 3), rank=rank, size=3, timeout=4)
    x = torch.full((60_000,), 1.0, device=comm.device)
    comm.all_reduce(x)
    time.sleep(6 if rank == 1 else 0)
    try:
        result = comm.all_reduce(x)
        if comm.device.type == "cuda":
            torch.cuda.synchronize()
        comm.check()
        queue.put((rank, None, result.ne(3).sum().item()))
    except tdccl.Timeout as error:
        queue.put((rank, str(error), 0))
    over.wait(100)  # a rank that ended would be told of as such


@pytest.mark.skipif(pool.LARGEST_WORLD < 3, reason="needs three ranks")
def test_a_rank_that_comes_too_late_is_told_rather_than_given_garbage(tmp_path):
    context = launch.processes()
    queue, over = context.Queue(), context.Event()
    processes = [context.Process(target=come_late, args=(rank, str(tmp_path), queue, over)) for rank in range(3)]
    for process in processes:
        process.start()
    answers = sorted(queue.get(timeout=100) for _ in processes)
    over.set()
    for process in processes:
        process.join(30)
    assert all(message for _, message, _ in answers), answers
    # Rank 2 may give up first; what rank 0 then waits for in vain is rank 2's data.
    assert "for rank 1" in answers[0][1] or "rank 1 has not come" in answers[0][1], answers


PROGRAM = """
import sys; sys.path.insert(0, {root!r})
import tdccl
from tdccl import tuning
try:
    tdccl.init({arguments})
except tdccl.InitError as error:
    print(error)
"""


def init_error(arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI", "PMI", "RANK", "WORLD"))}
    program = PROGRAM.format(root=str(pool.ROOT), arguments=arguments)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=100).stdout


def test_init_names_the_ranks_that_do_not_come():
    message = init_error("rank=0, size=3, timeout=2", TDCCL_INIT="tcp://127.0.0.1:29641")
    assert "ranks 1, 2 of 3 did not come within the timeout of 2 s" in message


def test_init_without_a_launcher_says_what_to_do():
    assert "torchrun or mpirun" in init_error("")


def test_init_checks_its_address():
    assert "expected tcp://host:port" in init_error("rank=0, size=1", TDCCL_INIT="somewhere")


ALL_REDUCE = """
import sys; sys.path.insert(0, {root!r})
import torch, tdccl
for _ in range(2):
    with tdccl.init(rank={rank}, size=2, timeout=60) as comm:
        print(comm.all_reduce(torch.ones(4, device=comm.device)).tolist())
"""


@pytest.mark.parametrize("timeout", [0, -1, math.nan, "60", None])
def test_init_checks_its_timeout(timeout):
    with pytest.raises(tdccl.ArgumentError, match=f"timeout is {timeout!r}, expected seconds > 0"):
        tdccl.init(store=torch.distributed.HashStore(), rank=0, size=1, timeout=timeout)


@pytest.mark.parametrize(
    "given, environment, message",
    [
        ({"store": "a store"}, {}, "store is 'a store', expected a torch.distributed Store"),
        ({"mpi": "comm"}, {}, "mpi is 'comm', expected an mpi4py communicator"),
        ({"store": True, "rank": 0}, {}, "also needs rank= and size="),
        ({"store": True, "rank": 1.0, "size": 2}, {}, "rank is 1.0 and size is 2, expected a rank from 0 to size - 1"),
        ({"store": True, "rank": 2, "size": 2}, {}, "rank is 2 and size is 2"),
        ({"rank": 3, "size": 2}, {"TDCCL_INIT": "tcp://127.0.0.1:29643"}, "rank is 3 and size is 2"),
        ({}, {"TDCCL_INIT": "tcp://127.0.0.1:29643", "RANK": "x", "WORLD_SIZE": "2"}, "rank is 'x'"),
        ({}, {"TDCCL_INIT": "tcp://127.0.0.1:29643"}, "also needs rank= and size=, or RANK and WORLD_SIZE"),
        ({"rank": 0, "size": 1}, {"TDCCL_INIT": "tcp://127.0.0.1:99999"}, "expected tcp://host:port"),
        ({}, {"RANK": "0", "WORLD_SIZE": "", "MASTER_ADDR": "", "MASTER_PORT": ""}, "torchrun's environment: rank is"),
    ],
)
def test_init_says_what_it_was_given(given, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if given.get("store") is True:
        given = {**given, "store": torch.distributed.HashStore()}
    with pytest.raises(tdccl.InitError, match=re.escape(message)):
        tdccl.init(**given, timeout=1)


def test_init_refuses_another_rank_than_the_launcher_says(monkeypatch):
    monkeypatch.setattr(bootstrap, "_stores", {})
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tdccl.InitError, match="given size=2, and those who started this process say 1"):
        tdccl.init(rank=0, size=2, timeout=1)
    with tdccl.init(rank=0, size=1) as comm:
        assert comm.size == 1


def test_init_by_a_tcp_address():
    programs = [ALL_REDUCE.format(root=str(pool.ROOT), rank=rank) for rank in range(2)]
    environment = {**os.environ, "TDCCL_INIT": "tcp://127.0.0.1:29642"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for program in programs
    ]
    for rank in ranks:
        assert rank.communicate(timeout=100)[0].count("[2.0, 2.0, 2.0, 2.0]") == 2


def check_short(comm):
    """Memory is short on the last rank: all are told, and all go on."""
    if comm.device.type == "cuda":
        from tdccl.transport import p2p as provider

        refused = provider.runtime.cudaError_t.cudaErrorMemoryAllocation, 0
        short = mock.patch.object(provider.runtime, "cudaMalloc", return_value=refused)
    else:
        from tdccl.transport import host as provider

        short = mock.patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    start, last = time.monotonic(), comm.size - 1
    with short if comm.rank == last else contextlib.nullcontext(), pytest.raises(tdccl.InitError) as told:
        provider.allocate(comm._node, 1 << 20, comm.device)
    assert time.monotonic() - start < 10
    assert str(told.value).startswith(f"rank {last} could not take part: ") == (comm.rank != last)
    assert comm.empty(10).eq(0).all()


def test_memory_that_is_short_on_one_rank_is_told_to_all(ranks, world):
    ranks.run(check_short, world)
