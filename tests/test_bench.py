"""The bench as its users start it, and the parts that judge and count."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import data, model_error, options, report
from bench.collectives import COLLECTIVES, DTYPES, OPS, Buffers, Case

ROOT = Path(__file__).parents[1]
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
AS_ROOT += ("PRTE_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM")


def bench(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TDCCL_EMULATE": "1", **dict.fromkeys(AS_ROOT, "1")}
    environment.pop("TDCCL_SCRATCH_MB", None)  # as users start it
    command = [*launcher, sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def case(
    name: str, rank: int = 0, ranks: int = 2, limit: int = 1024, dtype: str = "bfloat16", op="sum", in_place=False
):
    collective = COLLECTIVES[name]
    return Case(collective, limit, dtype, op if collective.reduces else None, 0, rank, ranks, in_place)


def buffers() -> Buffers:
    return Buffers(torch.zeros(4096, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8))


@pytest.mark.skipif(MPIRUN is None, reason="needs mpirun")
def test_under_mpirun():
    small = ("-b", "1K", "-e", "4K", "-n", "1", "-w", "0")
    done = bench("all_reduce", *small, launcher=(MPIRUN, "--oversubscribe", "-n", "2"))
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["1024", "4096"]
    assert "# Out of bounds values : 0 OK" in done.stdout
    assert "# Avg bus bandwidth" in done.stdout


@pytest.mark.parametrize("ranks", [5, 8] if os.environ.get("TDCCL_LONG", "0") != "0" else [8])
def test_worlds_up_to_eight(ranks):
    run = bench("all", "--ranks", str(ranks), "-b", "48", "-e", "48K", "-f", "1000", "-n", "1", "-w", "0")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Out of bounds values : 0 OK" in run.stdout


def test_spawns_its_ranks_and_writes_tidy_json(tmp_path):
    path = tmp_path / "results.json"
    done = bench(
        "all", "--ranks", "3", "-b", "2K", "-e", "2K", "-n", "1", "-w", "0",
        "--placement", "plain,symmetric", "--vs", "gloo,nccl", "-J", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "# nccl needs GPUs" in done.stdout
    found = json.loads(path.read_text())
    assert set(found) == {"host", "gpu", "world", "versions", "date", "command", "rows"}
    assert found["world"] == 3 and str(tmp_path) not in path.read_text()
    assert {row["collective"] for row in found["rows"]} == set(COLLECTIVES)
    assert {row["impl"] for row in found["rows"]} == {"tdccl", "gloo"}
    assert {row["placement"] for row in found["rows"]} == {"plain", "symmetric"}
    assert all(row["wrong"] == 0 and row["time_us"] > 0 and row["algorithm"] for row in found["rows"])
    assert "all_gather, bfloat16, eager" in report.markdown([found])


def test_measures_all_once_for_each_cap_and_peers_without_one(tmp_path):
    path = tmp_path / "results.json"
    small = ("--ranks", "2", "-b", "64K", "-e", "64K", "-n", "1", "-w", "0", "-J", str(path))
    done = bench("all_gather", *small, "--vs", "gloo", "--max-blocks", "2,none,1")
    assert done.returncode == 0, done.stderr
    heads = [line for line in done.stdout.splitlines() if "plain buffers" in line]
    shared = "# all_gather, plain buffers, eager"
    assert heads == [f"{shared}, max_blocks 2", shared, f"{shared}, max_blocks 1"]
    rows = [(row["impl"], row["max_blocks"], row["in_place"]) for row in json.loads(path.read_text())["rows"]]
    ours = [("tdccl", cap, in_place) for cap in (2, None, 1) for in_place in (False, True)]
    assert rows == [*ours[:4], ("gloo", None, False), *ours[4:]]


def test_caps_alone_leave_the_peers_out(capsys):
    assert run_alone("--vs", "gloo", "--max-blocks", "1") == 0
    said = capsys.readouterr().out
    assert "# --vs takes a pass without a cap" in said and "max_blocks 1" in said and "ratio" not in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("-b 1M -e 1K", "expected -b <= -e"),
        ("-b 1X", "expected bytes as"),
        ("--vs mpi", "expected some of"),
        ("--max-blocks 4,0", "'0', expected a whole number >= 1"),
        ("-G", "need a GPU"),
        ("--placement ,", "expected some of plain,symmetric"),
        ("-J missing/results.json", "there is no folder missing"),
    ],
)
def test_arguments_that_cannot_be(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(options.environment, "emulated", lambda: True)
    with pytest.raises(SystemExit):
        options.parse(["all_reduce", *arguments.split()])
    assert message in capsys.readouterr().err


def test_sizes_by_factor_and_by_step():
    assert options.sizes(options.parse(["all_reduce", "-b", "1K", "-e", "5K", "-f", "2"])) == [1024, 2048, 4096]
    assert options.sizes(options.parse(["all_reduce", "-b", "1K", "-e", "3K", "-i", "1K"])) == [1024, 2048, 3072]


@pytest.mark.parametrize(
    "name, nbytes, count, busbw",
    [
        ("all_reduce", 1024, 512, 1.5),
        ("all_gather", 1024, 128, 0.75),
        ("reduce_scatter", 1024, 128, 0.75),
        ("broadcast", 1024, 512, 1.0),
        ("all_to_all", 1024, 128, 0.75),
    ],
)
def test_bandwidth_and_sizes_as_nccl_tests_counts_them(name, nbytes, count, busbw):
    one = case(name, ranks=4)
    assert (one.nbytes, one.count) == (nbytes, count)
    assert one.bandwidths(nbytes / 1e3) == pytest.approx((1.0, busbw))  # nbytes in as many nanoseconds: 1 GB/s


def test_pieces_are_multiples_of_16_bytes():
    assert case("all_gather", ranks=3).nbytes == 1008


@pytest.mark.parametrize("name", COLLECTIVES)
def test_one_planted_wrong_element_is_found(name):
    one = case(name, rank=1)
    send, recv = buffers().views(one)
    data.prepare(one, send, recv, seed=7)
    assert data.count_wrong(one, recv, seed=7) == recv.numel(), "poison must not pass for a result"
    make_right(one, recv, seed=7)
    assert data.count_wrong(one, recv, seed=7) == 0
    recv[-1] += 1
    assert data.count_wrong(one, recv, seed=7) == 1
    assert data.count_wrong(one, recv, seed=8) > recv.numel() // 2, "an old result must not pass for a new one"


def make_right(one: Case, recv: torch.Tensor, seed: int) -> None:
    """What the collective should make of all ranks' inputs, in float64."""
    sent = []
    for rank in range(one.ranks):
        other = Case(one.collective, one.limit, one.dtype_name, one.op, one.root, rank, one.ranks, one.in_place)
        views = buffers().views(other)
        data.prepare(other, *views, seed)
        sent.append(views[0].double())
    pieces = slice(one.rank * one.count, (one.rank + 1) * one.count)
    result = {
        "all_reduce": lambda: sum(sent),
        "all_gather": lambda: torch.cat(sent),
        "reduce_scatter": lambda: sum(sent)[pieces],
        "broadcast": lambda: sent[one.root],
        "all_to_all": lambda: torch.cat([each[pieces] for each in sent]),
    }[one.collective.name]()
    recv.copy_(result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_results_are_exact_in_every_dtype(op, dtype):
    for ranks in (2, 3, 8):
        one = case("all_reduce", ranks=ranks, dtype=dtype, op=op)
        inputs = [data._input(one, rank, 5, 0, 1000, torch.device("cpu")) for rank in range(ranks)]
        result = data._reduce(one, inputs)
        for values in [*inputs, result] if op != "prod" or DTYPES[dtype].is_floating_point else inputs:
            assert torch.equal(values.to(DTYPES[dtype]).to(torch.int64), values)
        if op == "avg":
            assert torch.equal(result * ranks, sum(inputs))


def run_alone(*arguments: str) -> int:
    """The exit status of a run on one rank, in this process."""
    import tdccl
    from bench import sweep

    asked = options.parse(["all_reduce", "-e", "1K", "-n", "1", "-w", "0", *arguments])
    store = torch.distributed.HashStore()
    comm = tdccl.init(store=torch.distributed.PrefixStore("comm", store), rank=0, size=1)
    return sweep.run(asked, comm, tdccl.transport.bootstrap.StoreBootstrap(store, 0, 1, 10))


def test_a_wrong_result_fails_the_run(monkeypatch):
    import tdccl

    def wrong_all_reduce(self, send, recv, op):
        recv.copy_(send)
        recv[3] = 99

    monkeypatch.setattr(tdccl.Communicator, "all_reduce", wrong_all_reduce)
    assert run_alone() == 1


def row(impl, time, **changed):
    shape = {"collective": "all_reduce", "bytes": 1 << 20, "dtype": "bfloat16", "op": "sum", "mode": "graph"}
    shape |= {"placement": "plain", "in_place": True, "impl": impl, "algorithm": "", "time_us": time, "wrong": 0}
    return shape | {"algbw": 1.0, "busbw": 2.0} | changed


def run_of(*rows, date="2026-01-01T00:00:00"):
    where = {"host": "4 x NVIDIA H200", "gpu": "NVIDIA H200", "world": 4, "versions": {"tdccl": "0"}}
    return where | {"date": date, "rows": list(rows)}


def test_report_sets_tdccl_beside_nccl_of_the_same_run():
    one = run_of(row("tdccl", 10.0), row("tdccl", 7.0, in_place=False), row("nccl", 25.0))
    assert "| 1 MiB | 10 |  | 25 | 2.50 |" in report.markdown([one])
    newer = run_of(row("tdccl", 5.0), date="2026-01-02T00:00:00")
    assert "| 1 MiB | 5 |  | 25 |  |" in report.markdown([newer, one])


def test_report_has_a_column_for_torch_symmetric_memory_where_it_was_measured():
    found = report.markdown([run_of(row("tdccl", 10.0), row("symm", 8.0, busbw=3.0), row("nccl", 25.0))])
    assert "| size | tdccl, us | tdccl symmetric, us | NCCL, us | torch symm, us | NCCL / tdccl |" in found
    assert "| 1 MiB | 10 |  | 25 | 8 | 2.50 |" in found
    assert "| all_reduce, sum, bfloat16, in a CUDA graph | 1 MiB | 2 |  | 2 | 3 |" in found
    assert "symm," not in report.markdown([run_of(row("tdccl", 10.0))])


def test_report_leaves_out_sizes_that_only_gloo_has():
    rows = [row("tdccl", 10.0, mode="eager"), row("gloo", 99.0, mode="eager", bytes=1 << 30)]
    assert "GiB" not in report.markdown([run_of(*rows)])


def capped_run(date="2026-01-02T00:00:00"):
    """all_reduce at two sizes with three caps, in plain memory and, with two of them, in symmetric; no peers."""
    rows = [
        row("tdccl", 30.0, placement=placement, max_blocks=cap, bytes=kilobytes << 10, busbw=kilobytes / 1024 * share)
        for placement, shares in {"plain": {8: 200.0, 4: 150.0, 16: 180.0}, "symmetric": {4: 50.0, 8: 100.0}}.items()
        for kilobytes, (cap, share) in itertools.product((1024, 1), shares.items())
    ]
    return run_of(*rows, *({**each, "in_place": False, "busbw": 1e3} for each in rows), date=date)


def test_report_keeps_rows_with_a_cap_out_of_the_tables_by_size():
    old = run_of(row("tdccl", 10.0), row("nccl", 25.0))  # a report from before there were caps
    whole, _, capped = report.markdown([old, capped_run()]).partition("**busbw with at most so many blocks")
    assert "| 1 MiB | 10 |  | 25 | 2.50 |" in whole and "| 1 KiB |" not in whole
    named = "all_reduce, sum, bfloat16, in a CUDA graph"
    assert "|  | size | 4 | 8 | 16 |" in capped
    assert f"| {named}, plain | 1 MiB | 150 (75%) | 200 (100%) | 180 (90%) |" in capped
    assert f"| {named}, symmetric | 1 MiB | 50 (50%) | 100 (100%) |  |" in capped
    assert "blocks" not in report.markdown([old])


def test_report_of_caps_alone_has_no_other_table():
    found = report.markdown([capped_run()])
    assert "largest size" not in found and found.count("| --- |") == 1


def test_readers_say_which_file_is_no_report(plot, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "table.json").write_text('{"gpu": "H200"}')
    for file, complaint in [("none", "none.json cannot be read"), ("empty", "empty.json cannot be read"),
                            ("table", "table.json is no report of the bench; its -J FILE writes them")]:  # fmt: skip
        for tool in (report, plot, model_error):
            monkeypatch.setattr(sys, "argv", ["tool", str(tmp_path / f"{file}.json")])
            with pytest.raises(SystemExit):
                tool.main()
            assert complaint in capsys.readouterr().err


def test_report_replaces_what_is_between_the_markers():
    document = "a\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nb\n"
    replaced = report.replaced(document, "new")
    assert replaced == "a\n<!-- bench:begin -->\n\nnew\n\n<!-- bench:end -->\nb\n"
    with pytest.raises(ValueError, match="each once"):
        report.replaced("no markers", "new")


def test_report_has_the_newest_faults_and_no_mark_of_what_was_not_seen():
    rows = [
        {"fault": "kill -9", "error": "PeerFailure", "waited_s": 0, "seconds": [0.2, 0.31]},
        {"fault": "SIGSTOP", "error": "Timeout", "waited_s": 2, "seconds": [2.05]},
        {"fault": "nothing", "error": "", "waited_s": 0, "seconds": []},
    ]
    found = {**run_of(), "date": "2026-02-02T00:00:00", "faults": rows}
    del found["rows"]
    text = report.faults([{**found, "faults": [], "date": "2026-01-01T00:00:00"}, found])
    assert "| kill -9 | PeerFailure | 0.2 to 0.31 |" in text
    assert "| SIGSTOP | Timeout | 2 + 0.05 |" in text
    assert "| nothing | nothing |  |" in text
    assert not report.markdown([found]) and not report.faults([run_of(row("tdccl", 10.0))])


@pytest.fixture
def plot():
    pytest.importorskip("matplotlib")
    from bench import plot

    return plot


def small_run():
    """Each collective at two sizes by all; graphs, eager calls, and for all_reduce what must not be drawn."""
    rows = [row("tdccl", 1.0, in_place=False, mode=mode) for mode in ("graph", "eager")]
    rows += [row("nccl", 2.0, placement="symmetric")]
    for name, kilobytes in itertools.product(COLLECTIVES, (1024, 1)):
        point = {"collective": name, "bytes": kilobytes << 10}
        for impl, time in {"tdccl": 10.0, "nccl": 25.0, "symm": 15.0}.items():
            rows.append(row(impl, time * kilobytes, **point, busbw=time + kilobytes))
        rows.append(row("tdccl", 8.0, **point, placement="symmetric"))
        rows += [row(impl, time, **point, mode="eager") for impl, time in {"tdccl": 20.0, "gloo": 99.0}.items()]
    return run_of(*rows)


def test_plot_draws_each_collective_and_the_report_shows_it(plot, tmp_path):
    plot.draw([small_run()], tmp_path / "bench/plots")
    names = {f"4xH200-{name}.png" for name in COLLECTIVES}
    assert {path.name for path in (tmp_path / "bench/plots").iterdir()} == names
    found = report.markdown([small_run()], tmp_path)
    for name in COLLECTIVES:
        assert found.count(f"![{name}](bench/plots/4xH200-{name}.png)") == 1
    assert "![" not in report.markdown([small_run()], tmp_path / "elsewhere")


def test_plot_draws_the_rows_that_the_report_compares(plot):
    time, busbw = plot.figures([small_run()])["4xH200-all_reduce.png"].axes
    drawn = {line.get_label(): [list(values) for values in line.get_data()] for line in time.lines}
    sizes = [1 << 10, 1 << 20]
    assert drawn == {
        "tdccl": [sizes, [10.0, 10240.0]],
        "tdccl symmetric": [sizes, [8.0, 8.0]],
        "NCCL": [sizes, [25.0, 25600.0]],
        "torch symm": [sizes, [15.0, 15360.0]],
        "tdccl, eager": [sizes, [20.0, 20.0]],
        "Gloo, eager": [sizes, [99.0, 99.0]],
    }
    bandwidths = {line.get_label(): list(line.get_ydata()) for line in busbw.lines}
    assert bandwidths.keys() == drawn.keys() and bandwidths["tdccl"] == [11.0, 1034.0]
    dashed = {line.get_label() for line in time.lines if line.get_linestyle() == "--"}
    assert dashed == {"tdccl, eager", "Gloo, eager"}
    looks = {(line.get_color(), line.get_marker()) for line in time.lines}
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == 5


def test_plot_makes_the_same_bytes_again(plot, tmp_path):
    for folder in ("one", "two"):
        plot.draw([small_run()], tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_plot_keeps_apart_what_differs(plot):
    rows = [row("tdccl", 1.0), row("tdccl", 2.0, op="max"), row("tdccl", 3.0, dtype="float")]
    names = {"4xH200-all_reduce.png", "4xH200-all_reduce-max.png", "4xH200-all_reduce-float.png"}
    assert plot.figures([run_of(*rows)]).keys() == names
    emulated = run_of(*rows[:1]) | {"host": "emulation", "gpu": None}
    assert plot.figures([run_of(*rows), emulated]).keys() == names | {"4xCPU-all_reduce.png"}
    with pytest.raises(ValueError, match="two folders"):
        plot.figures([run_of(*rows), run_of(*rows) | {"host": "8 x NVIDIA H200"}])


def test_plot_draws_bandwidth_against_blocks_and_the_report_shows_it(plot, tmp_path):
    reports = [run_of(row("tdccl", 10.0), row("nccl", 25.0)), capped_run()]
    plot.draw(reports, tmp_path / "bench/plots")
    names = {"4xH200-all_reduce.png", "4xH200-blocks.png"}
    assert {path.name for path in (tmp_path / "bench/plots").iterdir()} == names
    assert "![busbw by blocks](bench/plots/4xH200-blocks.png)" in report.markdown(reports, tmp_path)
    (axes,) = plot.figures(reports)["4xH200-blocks.png"].axes
    drawn = {line.get_label(): [list(values) for values in line.get_data()] for line in axes.lines}
    assert drawn == {
        "all_reduce": [[4, 8, 16], [150.0, 200.0, 180.0]],
        "all_reduce symmetric": [[4, 8], [50.0, 100.0]],
    }
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"] and axes.get_xscale() == "log"
