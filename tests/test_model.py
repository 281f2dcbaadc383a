"""The model's schedules are what calls really send, and its times follow from them as its words say."""

import subprocess
import sys

import pool
import pytest
import torch
from test_nodes import drawn

from bench import model_error
from bench.report import across_nodes
from tdccl import environment, model
from tdccl.decisions import ACROSS_NODES
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


def test_nodes_of_one_wait_for_no_signal_inside():
    for collective in model.COLLECTIVES:
        for algorithm in ACROSS_NODES[collective]:
            call = model.call_of(collective, 1 << 16, 2)
            if algorithm.unfit(call, model.context_of(2, 1)) is None:
                schedules = [schedule_of(algorithm, call, model.context_of(2, width)) for width in (1, 2)]
                assert schedules[0].turns == 0 < schedules[1].turns


@pytest.mark.parametrize("collective", model.COLLECTIVES)
def test_large_messages_go_at_the_speed_of_the_slower_link(collective):
    nodes, width, nbytes = 4, 8, 1 << 32
    _, ours = model.fastest(collective, nbytes, model.context_of(nodes, width, 256 << 20), LINKS)
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
    done = subprocess.run(command, cwd=pool.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "# all_reduce on 128 nodes of 8" in done.stdout and "ring, us" in done.stdout and "tree, us" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.strip() and line.split()[0].isdigit()]
    assert len(rows) == 4 * 11
    for table in range(4):
        times = [float(row[1]) for row in rows[11 * table : 11 * table + 11]]
        assert times == sorted(times) and times[0] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--nodes 1", "1 is less than 2"),
        ("--nodes 2,x", "--nodes"),
        ("--nodes 4096", "too little for 4096 nodes of 8 ranks"),
        ("--across 0", "0 is less than 0.001"),
        ("-b -1", "-1 is less than 1"),
    ],
)
def test_what_it_cannot_predict_it_says_in_a_line(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        model.main(words.split())
    assert ended.value.code == 2 and said in capsys.readouterr().err


def measured_by(links):
    """A report of bench.nodes_check on two nodes of two, whose times are the model's."""
    context, rows = model.context_of(2, 2), []
    for collective in model.COLLECTIVES:
        for nbytes in (1 << 10, 1 << 20, 1 << 26):
            call = model.call_of(collective, nbytes, 4)
            for algorithm in ACROSS_NODES[collective]:
                if algorithm.unfit(call, context) is None:
                    us = model.predicted(schedule_of(algorithm, call, context), 2, links)
                    row = {"collective": collective, "algorithm": algorithm.name, "bytes": nbytes, "time_us": us}
                    rows.append({**row, "mode": "graph", "dtype": "bfloat16", "in_place": collective == "broadcast"})
    where = {"host": "4 x GPU, 2 x CPU; as 2 nodes of 2 drawn inside the host", "gpu": "GPU", "world": 4}
    return {**where, "versions": {}, "date": "2026-01-01T00:00:00", "nodes": rows}


def test_links_are_found_again_in_times_that_the_model_made():
    report = measured_by(model.Links(across=40, across_us=4.5))
    found = model_error.compare(report)
    assert found.links.across == pytest.approx(40, rel=0.02) and found.links.across_us == pytest.approx(4.5)
    assert max(found.errors(False)) < 0.02 and len(found.predicted) == len(report["nodes"])
    gathered = next(row for row in report["nodes"] if row["collective"] == "all_gather")
    gathered["time_us"] *= 2
    found = model_error.compare(report)
    assert max(found.errors(False)) == pytest.approx(0.5, abs=0.01) and max(found.errors(True)) < 0.02
    text = across_nodes([report])
    assert text.endswith(found.summary()) and "50% at most" in text and "| by the model, us |" in text


def test_without_graphs_or_drawn_nodes_there_is_nothing_to_compare():
    report = measured_by(LINKS)
    assert model_error.compare({**report, "gpu": None}) is None
    assert model_error.compare({**report, "host": "2 x GPU"}) is None
    assert model_error.compare({**report, "nodes": [{**row, "mode": "eager"} for row in report["nodes"]]}) is None
