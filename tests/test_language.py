"""Kernels of users: the device functions of `tdccl.language`, alone and together."""

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pool
import pytest
import torch
import triton
import triton.language as tl
from waiting import settle, settle_all

import tdccl
import tdccl.language as shmem
from tdccl import environment
from tdccl.decisions import layout
from tdccl.language import packets
from tdccl.language.signals import may_go_on


@triton.jit
def shift_right(team, buffer, signals, source, count, arrivals, BLOCK: tl.constexpr):
    """Puts `source` into the right neighbour's buffer and tells it by a signal of the user's own."""
    epoch = shmem.begin(team)
    right = (team.rank + 1) % team.size
    left = (team.rank + team.size - 1) % team.size
    index = tl.arange(0, BLOCK)
    epoch = shmem.barrier_block(team, epoch, 1)
    values = tl.load(source + index, mask=index < count)
    tl.store(shmem.symm_at(buffer, right, tl.float32) + index, values, mask=index < count)
    shmem.fence()
    shmem.signal_op(shmem.symm_at(signals, right, tl.int64), 1, "add")
    shmem.signal_wait(team, shmem.symm_at(signals, team.rank, tl.int64), arrivals, left)
    shmem.end(team, epoch)


def check_shift(comm):
    buffer, signals = comm.empty(100), comm.empty(2, torch.int64)
    for round in range(3):
        source = torch.arange(100, dtype=torch.float32, device=comm.device) + 1000 * comm.rank + round
        arguments = (comm.team, comm.symmetric(buffer), comm.symmetric(signals), source, 100, round + 1)
        shift_right[(1,)](*arguments, BLOCK=128)
        comm.barrier()
        left = (comm.rank - 1) % comm.size
        assert buffer.tolist() == [index + 1000 * left + round for index in range(100)]
        comm.barrier()
    assert signals[0].item() == 3


def test_put_and_signal(ranks, world):
    ranks.run(check_shift, world)


@triton.jit
def patience_of(team, patient, first):
    """Whether a wait may go on after each of some polls, of which `first` is the number of the first."""
    epoch = shmem.begin(team)
    polls, started, all_go = first, tl.zeros([], tl.int64), 1
    for _ in range(8):
        polls += 1
        go, started = may_go_on(team, polls, started)
        all_go = all_go & go.to(tl.int32)
    tl.store(patient, all_go)
    shmem.end(team, epoch)


@triton.jit
def deadline_of(team, told):
    go, _ = may_go_on(team, 0, tl.full([], 0, tl.int64))
    tl.store(told, go.to(tl.int32))


def check_deadline(comm):
    """The poll that finds it passed is the last one: else a wait could end well, and its rank be taken for failed."""
    told = torch.ones(1, dtype=torch.int32, device=comm.device)
    group = comm.split(0)
    deadline_of[(1,)](group.team._replace(timeout=0), told)
    assert told.item() == 0
    group.abort()


def test_a_deadline_ends_the_wait_that_finds_it(ranks):
    ranks.run(check_deadline, 1)


def check_just_too_late(comm):
    """What comes between the deadline and the last look at it has come too late, and its rank is named."""
    group, x = comm.split(0), torch.ones(8)

    def passes(team, polls, started):
        comm._bootstrap.barrier()  # rank 1 makes its call
        comm._bootstrap.barrier()
        return may_go_on(team._replace(timeout=0), polls, started)

    if comm.rank == 0:
        with mock.patch.object(packets, "may_go_on", passes), pytest.raises(tdccl.Timeout, match="for rank 1") as told:
            group.all_reduce(x)
        assert told.value.rank == 1
    else:
        comm._bootstrap.barrier()
        group.all_reduce(x)
        comm._bootstrap.barrier()
    comm._bootstrap.barrier()
    group.abort()


@pytest.mark.skipif(not environment.emulated() or pool.LARGEST_WORLD < 2, reason="2 ranks, and waits that a test ends")
def test_who_comes_just_after_the_deadline_is_late(ranks):
    ranks.run(check_just_too_late, 2)


def check_patience(comm):
    for first in (0, 2**31 - 5, -5):  # a 32-bit count of polls overflows within minutes
        patient = torch.zeros(1, dtype=torch.int32, device=comm.device)
        patience_of[(1,)](comm.team, patient, first)
        assert patient.item() == 1, first


def test_a_wait_outlasts_its_count_of_polls(ranks):
    ranks.run(check_patience, 1)


@triton.jit
def all_max(team, x, result, count, TILE: tl.constexpr):
    """The largest of all ranks' x, element by element, by LL packets."""
    epoch = shmem.begin(team)
    place = tl.arange(0, TILE)
    index = tl.program_id(0) * TILE + place
    own = shmem.load_words(x, index, count, tl.float32, True)
    for step in tl.static_range(1, team.size):
        shmem.put_words(team, epoch, own, place, index < count, (team.rank + step) % team.size)
    words, epoch = shmem.get_words(team, epoch, own, place, index < count)
    shmem.store_words(result, index, shmem.fold_words(words, "max", tl.float32), count, tl.float32, True)
    shmem.end(team, epoch)


def check_all_max(comm):
    for round in range(5):
        x = torch.arange(500, dtype=torch.float32, device=comm.device) * (-1) ** (comm.rank + round)
        result = torch.empty_like(x)
        all_max[(2,)](comm.team, x, result, 500, TILE=256)
        comm.barrier()
        best = range(500) if comm.size > 1 or round % 2 == 0 else [-i for i in range(500)]
        assert result.tolist() == list(best)
        assert comm.all_reduce(torch.ones(9, device=comm.device)).tolist() == [comm.size] * 9


def test_packets_beside_the_communicators_own_calls(ranks, world):
    ranks.run(check_all_max, world)


@triton.jit
def count_arrivals(team, counter, seen):
    """Every rank adds to rank 0's counter, which waits for all of them."""
    epoch = shmem.begin(team)
    shmem.fence()
    shmem.signal_op(shmem.symm_at(counter, 0, tl.int64), 1, "add", "relaxed")
    if team.rank == 0:
        total = shmem.signal_wait(team, shmem.symm_at(counter, 0, tl.int64), team.size, 0, "eq")
        tl.store(seen, total)
    epoch = shmem.barrier_block(team, epoch, 1)
    shmem.end(team, epoch)


def check_count(comm):
    counter = comm.empty(2, torch.int64)
    seen = torch.zeros(1, dtype=torch.int64, device=comm.device)
    count_arrivals[(1,)](comm.team, comm.symmetric(counter), seen)
    comm.barrier()
    assert seen.item() == (comm.size if comm.rank == 0 else 0)


def test_signals_add_up(ranks, world):
    ranks.run(check_count, world)


def check_epoch_wraps(comm):
    """Epochs are 32 bits: calls go on being right past 2**32 of them."""
    group = comm.split(0)
    blocks = group.team.blocks.value
    words = group._heap.local[: blocks * (128 + 256)].view(torch.int64)
    epochs, signals = words[: blocks * 16 : 16], words[blocks * 16 :]
    epochs.fill_(2**32 - 4)
    signals.fill_(-4 << 32)
    group._bootstrap.barrier()
    x = torch.full((20_000,), 1.0, device=comm.device)
    for step in range(8):
        assert (group.all_reduce(x + step) == comm.size * (1 + step)).all(), step
        assert (group.all_reduce(x[:9] + step) == comm.size * (1 + step)).all(), step
        assert (group.broadcast(x + comm.rank, 0) == 1).all(), step
    assert 2 <= epochs[0].item() < 100
    group.destroy()


def test_epochs_wrap_around(ranks, world):
    ranks.run(check_epoch_wraps, world)


def check_old_signals(comm):
    """Calls by packets leave the signals of staged ones as they are: for billions of them, in hours."""
    group = comm.split(0)
    x = torch.full((20_000,), 1.0, device=comm.device)
    for behind in (2**31 - 10, 2**31 + 10, 2**32 - 1000):
        group._heap.local[: group.team.blocks.value * 128].view(torch.int64)[::16].fill_(behind)
        settle_all(group)
        if comm.rank == 0:
            time.sleep(0.5)
        assert (group.all_reduce(x) == comm.size).all(), behind
        settle_all(group)
    group.destroy()


def test_a_signal_of_long_ago_does_not_pass_for_one_to_come(ranks):
    ranks.run(check_old_signals, min(3, pool.LARGEST_WORLD))


@triton.jit
def hear(team, fell):
    """Waits for packets that nobody sends; by how much the epoch to go on with is past."""
    epoch = shmem.begin(team)
    place = tl.arange(0, 256)
    _, after = shmem.get_words(team, epoch, place, place, place >= 0)
    tl.store(fell, epoch - after)


def check_nothing_is_made_of_garbage(comm):
    """A rank of which a wait has failed, and whose host has not looked yet, tells its peers nothing."""
    for name, kernel in (("packets", True), ("calls", False)):
        group = tdccl.Communicator(comm._bootstrap.subgroup([*range(comm.size)], name), comm.device, 1.0)
        x = torch.ones(300, device=comm.device)
        group.all_reduce(x)
        settle_all(group)
        if comm.rank == 0:
            fell = torch.zeros(1, dtype=torch.int64, device=comm.device)
            if kernel:
                hear[(1,)](group.team, fell)
                assert fell.item() > 0
            else:
                group._heap.local[layout.STOP_BYTE.value :][:8].view(torch.int64).fill_(1)
            with mock.patch.object(group, "_stop_word", SimpleNamespace(value=0)):
                if not kernel:
                    group.all_reduce(x)
        comm._bootstrap.barrier()
        if comm.rank:
            with pytest.raises(tdccl.TdcclError):
                group.all_reduce(x)
                settle(group)
        comm._bootstrap.barrier()
        group.destroy()


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
def test_nothing_is_made_of_garbage(ranks):
    ranks.run(check_nothing_is_made_of_garbage, 2)


def check_large_grid(comm):
    group = comm.split(0)
    x = torch.zeros(500, device=comm.device)
    blocks = group.team.blocks.value
    with pytest.raises(tdccl.TdcclError, match=r"more than team\.blocks"):
        for _ in range(3):
            lonely[(blocks + 1,)](group.team, x)
            settle(group)


@triton.jit
def lonely(team, x):
    """Talks to nobody, but counts as a call."""
    epoch = shmem.begin(team)
    tl.store(x + tl.program_id(0), epoch.to(tl.float32))
    shmem.end(team, epoch)


def test_a_grid_that_is_too_large_is_told(ranks, world):
    ranks.run(check_large_grid, world)


KEYS = """
import sys
from tdccl.collectives import ALGORITHMS
from tdccl.overlap.gather_kv_attention import attend_gathered
from tdccl.overlap.gemm_all_reduce import fold_and_share, multiply_tiles
from tdccl.runtime import bare, launch

kernels = {algorithm.name: bare.kernel_of(algorithm.kernel) for algorithm in ALGORITHMS["all_reduce"]}
kernels |= {kernel.__name__: kernel for kernel in (attend_gathered, fold_and_share, multiply_tiles)}
keys = {name: launch.keyed(kernels[name]).cache_key for name in sys.argv[1:]}
print(dict(sorted(keys.items())))
"""
LAUNCH = re.compile(r"^\s+(\S+)\[(?:\(.*,\)|grid)\]\(", re.MULTILINE)


@pytest.mark.parametrize(
    "order",
    [("one_shot_ll", "two_shot_staged"), ("attend_gathered", "fold_and_share", "multiply_tiles")],
    ids=["collectives", "fused"],
)
def test_a_kernel_has_one_key_in_tritons_cache_whatever_was_compiled_before_it(order):
    def keys(*order):
        command, variables = [sys.executable, "-c", KEYS, *order], os.environ | {"TDCCL_EMULATE": "0"}
        return subprocess.run(command, cwd=pool.ROOT, env=variables, capture_output=True, text=True, check=True).stdout

    assert keys(*order) == keys(*order[::-1]) != ""


def test_what_triton_launches_has_its_key():
    launched = [name for path in (pool.ROOT / "tdccl").rglob("*.py") for name in LAUNCH.findall(path.read_text())]
    assert len(launched) > 20 and all(name.startswith("keyed(") for name in launched), launched
