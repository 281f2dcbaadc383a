"""The model's schedules are what calls really send, and its times follow from them as its words say."""

import os
import subprocess
import sys

import pool
import pytest
import torch
from test_nodes import drawn

from tdccl import environment, model
from tdccl.decisions import ACROSS_NODES, context_for
from tdccl.hierarchical.schedule import Schedule, Stage, schedule_of
from tdccl.runtime.algorithm import Call
from tdccl.transport import network


def check_sent(comm):
    """For each algorithm the most bytes that a rank put across, as counted on the way, and as the schedule has them."""
    group, found = drawn(comm, 2), []
    sent, put = [], network.put_signal_nbi
    network.put_signal_nbi = lambda *numbers: (sent.append(numbers[2]), put(*numbers))
    try:
        for collective in model.COLLECTIVES:
            for algorithm in ACROSS_NODES[collective]:
                for count in (40, 30_000):
                    x = torch.ones(count * group.size, dtype=torch.float32)
                    reduces = "reduce" in collective
                    whole = x.numel() if collective in ("all_reduce", "broadcast") else count
                    counted = (whole, "fp32", "sum") if reduces else (4 * whole, "u8", None)
                    call = Call(collective, *counted, 0, 16, None, (None, None), False)
                    if algorithm.unfit(call, group._context) is not None:
                        continue
                    group._forced[collective] = algorithm.name
                    group.use_table(group.table)
                    sent.clear()
                    getattr(group, collective)(x[:count] if collective == "all_gather" else x)
                    del group._forced[collective]
                    data = sum(nbytes for nbytes in sent if nbytes > 8)  # without the words that a tile is taken
                    most = max(comm._bootstrap.exchange(data))
                    schedule = schedule_of(algorithm, call, group._context)
                    found.append((collective, count, most, sum(stage.across for stage in schedule.stages)))
    finally:
        network.put_signal_nbi = put
    return found


@pytest.mark.skipif(not environment.emulated() or pool.LARGEST_WORLD < 4, reason="counted in the emulated network")
def test_schedules_count_what_is_sent(ranks):
    found = ranks.run(check_sent, 4)[0]
    assert {collective for collective, *_ in found} == {*model.COLLECTIVES} and len(found) >= 11
    for collective, count, sent, planned in found:
        assert sent == planned, (collective, count, sent, planned)


LINKS = model.Links(inside=100, across=10, inside_us=1, across_us=5, message_us=0.5, launch_us=2)


def test_time_is_fill_and_then_the_slowest_of_a_step():
    across = Schedule(8, 10, 2, (Stage(0, 10_000_000),))  # a step: 1 MB at 10 GB/s
    assert model.predicted(across, 2, LINKS) == pytest.approx(2 + (2 + 5 + 100) + 9 * 100)
    inside = Schedule(8, 10, 2, (Stage(100_000_000, 0),))  # 10 MB at 100 GB/s
    assert model.predicted(inside, 2, LINKS) == pytest.approx(2 + (100 + 5 + 0.5) + 9 * 100)
    signals = Schedule(8, 10, 64, (Stage(0, 0),))
    assert model.predicted(signals, 64, LINKS) == pytest.approx(2 + (64 + 5 + 31.5) + 9 * 64)


@pytest.mark.parametrize("collective", model.COLLECTIVES)
def test_large_messages_go_at_the_speed_of_the_slower_link(collective):
    nodes, width, nbytes = 4, 8, 1 << 32
    _, ours = model.fastest(collective, nbytes, context_for(width, scratch=256 << 20, nodes=nodes), LINKS)
    rank_sends = (
        {
            "all_reduce": 2 * nbytes / width,
            "broadcast": 2 * nbytes / width,
            "all_gather": nbytes / width,
            "reduce_scatter": nbytes / width,
            "all_to_all": nbytes,
        }[collective]
        * (nodes - 1)
        / nodes
    )
    inside = {"all_reduce": 2, "broadcast": 2}.get(collective, 1) * nbytes * (width - 1) / width
    assert ours == pytest.approx(max(rank_sends / 10, inside / 100) / 1e3, rel=0.05)


def test_it_prints_a_table_up_to_1024_gpus():
    command = [sys.executable, "-m", "tdccl.model", "all_reduce", "all_to_all", "--nodes", "2,128", "-e", "30"]
    done = subprocess.run(command, cwd=pool.ROOT, env={**os.environ}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "# all_reduce on 128 nodes of 8" in done.stdout and "ring, us" in done.stdout and "tree, us" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.strip() and line.split()[0].isdigit()]
    assert len(rows) == 4 * 11
    for table in range(4):
        times = [float(row[1]) for row in rows[11 * table : 11 * table + 11]]
        assert times == sorted(times) and times[0] > 0
