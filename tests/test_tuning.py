"""Tables decide, the model stands in for them, and the tuner writes what decides the next time."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pool
import pytest
import torch

import tdccl
from tdccl import tune, tuning
from tdccl.collectives import ALGORITHMS
from tdccl.decisions import context_for, table_for
from tdccl.membership import Membership
from tdccl.runtime.algorithm import Call, Context
from tdccl.runtime.plan import choose
from tdccl.tuning import model, table


def call_of(collective, nbytes, symmetric=False, **others):
    segments = (object(), object()) if symmetric else (None, None)
    op, dtype, count = ("sum", "bf16", nbytes // 2) if "reduce" in collective else (None, "u8", nbytes)
    return Call(collective, count, dtype, op, 0, 16, None, segments, False)._replace(**others)


def chosen(rows, call, **changes):
    context = Context(4, 128 << 10, tuning.GPU)
    return choose(ALGORITHMS[call.collective], call, context, tuning.Table("a test", rows), **changes)


def rows_of(*rows):
    return {"all_gather": {"plain": [tuning.Row(*row) for row in rows]}}


def test_a_row_decides_up_to_its_size_and_shapes_the_grid():
    rows = rows_of((4096, "push_ll", {"packet_tile": 32}), (None, "staged", {"blocks": 1}))
    small, large = (chosen(rows, call_of("all_gather", nbytes)) for nbytes in (4096, 4112))
    assert (small.algorithm.name, small.geometry.constants["TILE"]) == ("push_ll", 32)
    assert (large.algorithm.name, large.geometry.grid) == ("staged", 1)
    assert large.source == "a test" and large.passed_over["push_ll"] == "a test"


def test_what_does_not_fit_is_passed_over():
    rows = {"all_gather": {"symmetric": [tuning.Row(None, "push", {})], "plain": [tuning.Row(None, "staged", {})]}}
    assert chosen(rows, call_of("all_gather", 1 << 20, symmetric=True)).algorithm.name == "push"
    assert chosen(rows, call_of("all_gather", 1 << 20)).algorithm.name == "staged"
    packets_for_all = rows_of((None, "push_ll", {}))
    choice = chosen(packets_for_all, call_of("all_gather", 1 << 30))
    assert choice.algorithm.name == "staged" and "words" in choice.passed_over["push_ll"]
    assert chosen(rows, call_of("all_gather", 1 << 20), forced="staged").source == "asked for"


@pytest.mark.parametrize("path", table.package_files(), ids=lambda path: path.stem)
def test_a_table_of_the_package_takes_every_size_by_an_algorithm_that_fits(path):
    made = table.read(path)
    assert f"{made['gpu'].replace(' ', '-')}-{made['world']}" == path.stem
    found = table_for(made["gpu"], made["world"])
    assert found.source.startswith("measured")
    for collective, placements in made["rows"].items():
        for placement in placements:
            for power in range(4, 33):
                row = found.row(collective, placement, 1 << power)
                assert row.algorithm in {algorithm.name for algorithm in ALGORITHMS[collective]}


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_an_unknown_gpu_gets_a_modelled_table(size):
    found = table_for("Some GPU 9000", size)
    assert found.source.startswith(f"modelled for {size} x Some GPU 9000")
    for collective in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all"):
        small, large = (found.row(collective, "plain", nbytes).algorithm for nbytes in (256, 1 << 30))
        assert small.endswith("ll") and not large.endswith("ll"), (collective, small, large)
    assert found.digest() == table_for("Some GPU 9000", size).digest()


def test_the_model_finds_the_numbers_that_made_the_times():
    true = model.Cost(2.0, 0.5, 0.003)
    points = [(ranks, sent, true.microseconds(ranks, sent)) for ranks in (2, 4, 8) for sent in (1e2, 1e4, 1e6, 1e8)]
    assert model.fit(points) == pytest.approx(true, rel=1e-6)
    alone = model.fit([point for point in points if point[0] == 4])
    assert alone.latency_a_peer == 0 and alone.microseconds(4, 1e6) == pytest.approx(true.microseconds(4, 1e6))
    falling = model.fit([(2, 10.0, 5.0), (2, 20.0, 4.0)])
    assert min(falling) >= 0


def test_rows_that_say_the_same_become_one():
    rows = [tuning.Row(1, "a", {}), tuning.Row(2, "a", {}), tuning.Row(3, "b", {}), tuning.Row(4, "b", {"tile": 1})]
    assert table.merged(rows) == [tuning.Row(2, "a", {}), tuning.Row(3, "b", {}), tuning.Row(None, "b", {"tile": 1})]


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        '{"gpu": "emulation", "world": 2}',
        '{"gpu": "emulation", "world": 2, "rows": {"all_reduce": {"plain": [{"upto": null}]}}}',
        '{"gpu": "emulation", "world": 2, "rows": {"all_reduce": {"plain": '
        '[{"upto": null, "algorithm": "two_shot_staged", "changes": {"rings": 3}}]}}}',
        *(
            '{"gpu": "emulation", "world": 2, "rows": {"all_reduce": {"plain": '
            f'[{{"upto": null, "algorithm": "two_shot_staged", "changes": {changes}}}]}}}}}}'
            for changes in (
                '{"blocks": 0}',
                '{"warps": 12}',
                '{"warps": 64}',
                '{"tile": 0}',
                '{"tile": 4}',
                '{"packet_tile": 64, "packet_warps": 4}',
            )
        ),
        '{"gpu": "emulation", "world": 2, "rows": {"all_reduce": {"plain": [{"upto": 9, "algorithm": "push_ll"}]}}}',
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, monkeypatch, text):
    path = tmp_path / "mine.json"
    path.write_text(text)
    monkeypatch.setenv("TDCCL_TUNING", str(path))
    with pytest.raises(tdccl.InitError, match="is no tuning table"):
        table_for("emulation", 2)


def test_a_table_with_unknown_algorithms_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    rows = {"broadcast": {"plain": [{"upto": None, "algorithm": "telepathy"}]}}
    path.write_text(json.dumps({"gpu": "emulation", "world": 2, "rows": rows}))
    monkeypatch.setenv("TDCCL_TUNING", str(path))
    with pytest.raises(tdccl.InitError, match="broadcast by telepathy: expected nvls_push, nvls_staged, push_ll"):
        table_for("emulation", 2)
    assert table_for("emulation", 3).source == "emulation"  # made for other ranks


@pytest.mark.parametrize("words", ["-b 12 -e 11", "-b -1", "-b 3 -e 3", "-f 0", "-c 0", "-o missing/mine.json", "-o ."])
def test_the_tuner_refuses_before_it_measures(words, capsys):
    with pytest.raises(SystemExit):
        tune._parse(["all_reduce", *words.split()])
    assert "expected" in capsys.readouterr().err


def test_the_tuner_writes_a_table_that_the_next_run_takes(tmp_path):
    path = tmp_path / "mine.json"
    program = (
        "import sys, torch.distributed as dist, tdccl; from tdccl import tune\n"
        "tune._LARGE = 1 << 12\n"
        f"tune.main(['all_gather', '-b', '10', '-e', '12', '-f', '2', '--caps', '1', '-o', {str(path)!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": str(pool.ROOT), "TDCCL_INIT": "tcp://127.0.0.1:29617", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program], env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said, _ = ranks[0].communicate(timeout=200)
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert f"wrote {path}" in said and said.count("all_gather") == 6
    made = table.read(path)
    assert (made["world"], {*made["rows"]["all_gather"]}) == (2, {"plain", "symmetric"})
    assert {*made["capped"]["1"]["all_gather"]} == {"plain", "symmetric"}
    assert all(point["time_us"] > 0 for point in made["measured"])
    assert {point["algorithm"] for point in made["measured"]} == {
        algorithm.name for algorithm in ALGORITHMS["all_gather"]
    }


def test_under_a_cap_its_own_rows_decide():
    rows, capped = rows_of((None, "push_ll", {})), rows_of((None, "staged", {}))
    found = tuning.Table("a test", rows, {16: capped, 32: rows})
    names = [found.row("all_gather", "plain", 1 << 20, blocks).algorithm for blocks in (None, 128, 33, 32, 17, 16, 1)]
    assert names == ["push_ll"] * 5 + ["staged"] * 2
    assert found.digest() != tuning.Table("a test", rows).digest()


def test_with_multicast_its_own_rows_decide_as_well():
    assert table_for("NVIDIA H200", 2, True).capped.keys() == table_for("NVIDIA H200", 2, False).capped.keys() != set()


def test_ranks_choose_alike_where_one_alone_has_a_result_in_symmetric_memory():
    rows = {
        placement: [tuning.Row(None, "two_shot_staged", {"tile": tile})]
        for placement, tile in (("plain", 16 << 10), ("symmetric", 4 << 10))
    }
    found, somewhere = tuning.Table("test", {"reduce": rows, "all_reduce": rows}), object()

    def tile(collective, segments):
        call = Call(collective, 60_000, "fp32", "sum", 0, 16, None, segments, False)
        return choose(ALGORITHMS[collective], call, context_for(3), found).geometry.constants["TILE"]

    assert tile("reduce", (None, somewhere)) == tile("reduce", (None, None))
    assert tile("all_reduce", (somewhere, somewhere)) != tile("all_reduce", (None, None))


def test_under_a_cap_blocks_that_are_fewer_have_larger_tiles():
    rows = {"all_gather": {"plain": [tuning.Row(None, "staged", {"blocks": 128, "tile": 8 << 10, "warps": 8})]}}
    call = call_of("all_gather", 1 << 26)
    context = Context(4, 128 << 10, replace(tuning.GPU, blocks=16))
    capped = choose(ALGORITHMS["all_gather"], call, context, tuning.Table("a test", rows)).geometry
    free = chosen(rows, call).geometry
    assert (free.grid, free.warps, free.constants["TILE"]) == (128, 8, (8 << 10) // 8)
    assert (capped.grid, capped.warps, capped.constants["TILE"]) == (16, 16, (32 << 10) // 8)


def test_the_tuner_prefers_few_blocks_where_they_are_as_fast():
    def measured(blocks, time_us):
        return tune.Measured("staged", {"blocks": blocks}, 0.0, time_us)

    close, apart = ([measured(128, 10.0), measured(32, other)] for other in (10.05, 11.0))
    points = [(1 << 20, close), (1 << 24, apart)]
    assert [row.changes["blocks"] for row in tune.rows_of(points)] == [32, 128]


def check_cap(comm):
    x = torch.ones(1 << 16, device=comm.device)
    try:
        comm.limit_blocks(1)
        assert comm.explain("all_reduce", x).choice.geometry.grid == 1
        assert (comm.all_reduce(x) == comm.size).all()
        comm.limit_blocks(2)
        assert (comm.all_reduce(x) == comm.size).all()
        with pytest.raises(tdccl.ArgumentError, match="max_blocks is 0"):
            comm.limit_blocks(0)
    finally:
        comm.limit_blocks(None)
    assert (comm.all_reduce(x) == comm.size).all()


def test_a_grid_can_be_capped(ranks, world):
    ranks.run(check_cap, world)


def check_shared_gpus(comm, gpus, blocks):
    """Ranks that share a GPU, as under CUDA's MPS, must fit on it together, or one would wait for what never starts."""
    with mock.patch.object(Membership, "_gpu_of", lambda self: gpus[self.rank]), comm.split(0) as sharing:
        assert sharing.multiprocessors == blocks
        assert sharing._context.rules.blocks == min(blocks, comm._context.rules.blocks)
        send = torch.arange(50_000, dtype=torch.int32, device=comm.device) + comm.rank
        expected = torch.arange(50_000, dtype=torch.int32, device=comm.device) * comm.size + sum(range(comm.size))
        assert torch.equal(sharing.all_reduce(send), expected)


@pytest.mark.parametrize(
    "gpus, blocks",
    [
        ([("a", 5), ("b", 5), ("c", 5), ("d", 5)], 5),
        ([("a", 5), ("a", 5), ("a", 5), ("b", 5)], 1),
        ([("a", 4), ("b", 3), ("a", 4), ("b", 3)], 1),
        ([("a", 2), ("a", 2), ("a", 2), ("a", 2)], 1),
    ],
)
def test_ranks_that_share_a_gpu_leave_each_other_room(ranks, gpus, blocks):
    if pool.LARGEST_WORLD < 4:
        pytest.skip("4 ranks")
    ranks.run(check_shared_gpus, 4, gpus=gpus, blocks=blocks)
