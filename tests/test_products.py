"""Tiles of products: a table decides where it has something near, on all ranks alike, and the tuner writes it."""

import json
import os
import subprocess
import sys
from unittest import mock

import pool
import pytest
import torch
from test_mismatch import another
from test_overlap import COPIED, OPERATORS, expected, matrices

import tdccl
from tdccl import decisions, environment, membership, tune, tune_products, tuning
from tdccl.errors import InitError
from tdccl.overlap import all_gather_gemm, all_gather_grouped_gemm, gemm_all_reduce, route
from tdccl.overlap.all_gather_grouped_gemm import reference as grouped_reference
from tdccl.overlap.gemm import prepare
from tdccl.tune_products import Measured, Task, rows_of, shapes, tasks
from tdccl.tuning import Products, Shape, table
from tdccl.tuning.products import Row, parse, shared_bytes

RULE, OTHER = Shape(128, 256, 64, 4, 8, 8), Shape(128, 256, 64, 3, 8, 16)


def row(kind="many", rows=8192, columns=4096, depth=4096, transposed=False, shape=OTHER):
    return Row(kind, rows, columns, depth, transposed, shape)


def listed(*rows):
    return [{**each._asdict(), "shape": each.shape._asdict(), "us": 1.0} for each in rows]


def written(path, *rows, gpu="emulation"):
    path.write_text(json.dumps({"gpu": gpu, "products": listed(*rows)}))
    return str(path)


def test_the_nearest_sizes_decide_and_the_rule_where_none_are_near():
    far = row(rows=1 << 20, shape=OTHER._replace(stages=2))
    found = Products("a test", (row(), row(columns=8192, shape=OTHER._replace(group=4)), far))
    for sizes, shape in [
        ((8192, 4096, 4096), OTHER),
        ((4096, 5000, 2048), OTHER),
        ((8192, 7000, 4096), OTHER._replace(group=4)),
        ((2048, 1024, 16384), OTHER),  # each by a factor of 4
        ((2047, 4096, 4096), RULE),
        ((8192, 4096, 16385), RULE),
        ((8192, 1023, 4096), RULE),
        ((1 << 21, 4096, 4096), far.shape),
    ]:
        assert found.shape("many", *sizes, False, RULE) == found.shape("many", *sizes, False, RULE) == shape, sizes
    assert found.shape("few", 8192, 4096, 4096, False, RULE) == RULE
    lower = RULE._replace(rows=64)
    assert found.shape("many", 8192, 4096, 4096, False, lower) == lower  # tiles are as high as the rule says
    narrow = Products("a test", (row(columns=256, shape=OTHER), row(columns=64, shape=OTHER._replace(columns=128))))
    assert narrow.shape("many", 8192, 128, 4096, False, RULE).columns == 128  # not half of it beyond the matrix


def test_where_ranks_differ_in_depth_only_what_they_share_decides_how_they_cut():
    wide, shallow = OTHER._replace(group=4), OTHER._replace(stages=2)
    rows = (row(depth=512, shape=wide), row(depth=2048), row(depth=8192, shape=shallow), row(columns=8192, shape=wide))
    found = Products("a test", rows)
    for depth, shape in [(8, OTHER), (512, OTHER), (5000, shallow), (1 << 20, shallow)]:
        assert found.shape("many", 8192, 4500, depth, False, RULE, shared=False) == shape, depth
    assert found.shape("many", 8192, 4500, 512, False, RULE) == wide
    assert found.shape("many", 8192, 1000, 512, False, RULE, shared=False) == RULE


def test_layouts_have_a_row_each_and_are_cut_alike():
    deep = OTHER._replace(depth=128, stages=2)
    both = Products("a test", (row(), row(transposed=True, shape=deep)))
    for transposed, shape in ((False, OTHER), (True, deep)):
        assert both.shape("many", 8192, 4096, 4096, transposed, RULE) == shape
    one = Products("a test", (row(), row(columns=4608, transposed=True, shape=deep)))
    assert one.shape("many", 8192, 4096, 4096, True, RULE) == OTHER  # the nearest sizes, whatever was measured there
    assert len({both.digest(), one.digest(), Products("another test", both.rows).digest()}) == 2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": "tall"}, "'tall': expected a product of many, few, grouped"),
        ({"rows": 0}, "rows: 0 is not a whole number above 0"),
        ({"transposed": 1}, "transposed: 1 is neither true nor false"),
        ({"shape": {**RULE._asdict(), "columns": 96}}, "columns of a shape: 96 is not a power of two"),
        ({"shape": {**RULE._asdict(), "depth": 8}}, "depth of a shape: 8 is not"),
        ({"shape": {**RULE._asdict(), "warps": 64}}, "warps: 64 is more than the 32"),
        ({"shape": {**RULE._asdict(), "stages": 5}}, "takes 245800 bytes of shared memory, a block has 232448"),
        ({"shape": Shape(16, 32, 16, 151, 4, 8)._asdict()}, "takes 233144 bytes of shared memory"),  # by its barriers
        ({"shape": Shape(128, 512, 32, 4, 16, 8)._asdict()}, "a tile has 65536 sums, a block has registers for 32768"),
        ({"shape": {"rows": 128}}, "missing 5 required"),
        ({"kind": "grouped", "shape": RULE._replace(depth=128, stages=2)._asdict()}, "depth: 128 is more than the 64"),
    ],
)
def test_a_row_that_is_none_is_refused(tmp_path, monkeypatch, change, words):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"gpu": "emulation", "products": [{**listed(row())[0], **change}]}))
    monkeypatch.setenv("TDCCL_TUNING", str(path))
    with pytest.raises(InitError, match="is no tuning table") as raised:
        table.products_for("emulation")
    assert words in str(raised.value)


LARGEST = Shape(128, 128, 64, 7, 8, 8), Shape(128, 256, 64, 4, 32, 8)
COMPILED = """
import json, sys
import fused_variants as fused

for shape in map(fused.Shape._make, json.loads(sys.argv[1])):
    constants = {"DTYPE": fused.tl.bfloat16, "DESCRIPTORS": True, "TRANSPOSED": True, "COPIED": False}
    constants |= {name.upper(): getattr(shape, name) for name in ("columns", "depth", "stages", "group")}
    operands = fused.operands_of(shape, True, True)
    kernel = fused.compiled(fused.multiply_gathered, constants, {"odd", "K"}, shape.warps, shape.rows, operands)
    print(kernel.metadata.shared)
"""


def test_the_largest_shapes_of_a_table_compile_and_take_the_memory_that_was_checked():
    command, variables = [sys.executable, "-c", COMPILED, json.dumps(LARGEST)], {**os.environ, "PYTHONPATH": "tests"}
    run = subprocess.run(command, cwd=pool.ROOT, env=variables, capture_output=True, text=True, check=True)
    assert [*map(int, run.stdout.split())] == [shared_bytes(shape) + 8 * shape.stages for shape in LARGEST]
    parse({"products": listed(*(row(rows=8192 >> i, shape=shape) for i, shape in enumerate(LARGEST)))}, "a test")


def test_a_file_with_both_kinds_of_rows_has_both_checked(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"gpu": "emulation", "products": listed(row()), "rows": []}))
    with pytest.raises(InitError, match="is no tuning table"):
        table.read(path)


def test_without_a_gpu_or_emulation_the_tuner_says_so(monkeypatch):
    monkeypatch.setattr(environment, "emulated", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InitError, match="there is no GPU"):
        decisions.device_of(None, 0)


@pytest.mark.parametrize("shape", [OTHER, OTHER._replace(columns=128), OTHER._replace(group=4)])
def test_rows_of_one_size_by_which_ranks_would_cut_apart_are_refused(shape):
    with pytest.raises(ValueError, match="one row for each layout"):
        parse({"products": listed(row(), row(transposed=shape != OTHER, shape=shape))}, "a test")


def test_a_table_of_the_environment_goes_before_and_each_kind_is_found(tmp_path, monkeypatch):
    assert table.products_for("emulation").rows == ()  # the rule's tiles, without one
    mine, others = written(tmp_path / "mine.json", row()), written(tmp_path / "others.json", gpu="NVIDIA H200")
    plain = {"broadcast": {"plain": [{"upto": None, "algorithm": "push_ll"}]}}
    collectives = tmp_path / "collectives.json"
    collectives.write_text(json.dumps({"gpu": "emulation", "world": 2, "rows": plain}))
    monkeypatch.setenv("TDCCL_TUNING", os.pathsep.join([others, mine, str(collectives)]))
    assert table.products_for("emulation") == Products("measured on emulation (mine.json)", (row(),))
    assert table.products_for("NVIDIA H200").source == "measured on NVIDIA H200 (others.json)"
    assert table.products_for("Some GPU 9000").rows == ()
    assert decisions.table_for("emulation", 2).source == "measured on 2 x emulation (collectives.json)"
    assert decisions.table_for("emulation", 3).source == "emulation"


@pytest.mark.parametrize("path", sorted(table._FOLDER.glob("*-products.json")), ids=lambda path: path.stem)
def test_a_table_of_the_package_is_for_the_gpu_that_names_it(path):
    made = table.read(path)
    assert f"{made['gpu'].replace(' ', '-')}-products" == path.stem
    assert table.products_for(made["gpu"]).rows


def check_apart(comm):
    mine = Products("a test", (row(),) if comm.rank else ())
    with _having(mine), pytest.raises(InitError, match="they must be equal"), another(comm, 5.0):
        pass
    with _having(Products(f"of rank {comm.rank}", (row(),))), another(comm, 5.0) as other:
        assert other.products.rows == (row(),)


def _having(products):
    return mock.patch.object(membership.tuning, "products_for", lambda gpu: products)


def test_ranks_with_different_tables_are_refused(ranks):
    ranks.run(check_apart, 2)


class Everywhere(Products):
    """Has the same at all sizes, but for the steps, which are shorter where the right operand is transposed."""

    def shape(self, kind, rows, columns, depth, transposed, rule, shared=True):
        return Shape(rule.rows, 16, 16 if transposed else 32, 2, 4, 3)


def check_measured_shapes(comm, sizes):
    """Ranks whose right operands are laid out otherwise get the same result."""
    given = comm.products
    try:
        for operator, call in OPERATORS.items():
            for seed, shape in enumerate(sizes):
                pairs = matrices(comm, operator, shape, torch.bfloat16, False, seed)
                wanted, (a, b) = expected(comm, operator, pairs, comm.rank), pairs[comm.rank]
                b = b.t().contiguous().t() if comm.rank % 2 else b
                comm.use_products(given)
                plain = call(comm, a, b)
                comm.use_products(Everywhere("a test"))
                assert prepare(comm, a, b, 40, 40).shape[1:] == (16, 16 if comm.rank % 2 else 32, 2, 4, 3)
                for result in (plain, call(comm, a, b), call(comm, a, b)):
                    torch.testing.assert_close(result.float(), wanted, atol=0.06 * shape[1] ** 0.5, rtol=0.04)
        check_all_reduce(comm)
        check_grouped(comm)
    finally:
        comm.use_products(given)


def check_uneven_shares(comm):
    """Ranks have columns of their own number of one matrix, forward and backward; a table cuts by depth, too."""
    given = comm.products
    shallow, deep = (Shape(16, columns, 32, 1, 4, group) for columns, group in ((16, 4), (32, 2)))
    rows = comm.size * 40
    comm.use_products(
        Products("a test", (row("many", rows, 64, 32, False, shallow), row("many", rows, 64, 160, False, deep)))
    )
    try:
        for widths in ((32, 160, 96, 64), (36, 32, 8, 3)):
            generator = torch.Generator().manual_seed(9)
            sizes = widths[: comm.size]
            shards, rights, weights = (
                [torch.randn(*shape, generator=generator).bfloat16().to(comm.device) for shape in shapes]
                for shapes in ([(40, 64)] * comm.size, [(64, size) for size in sizes], [(rows, size) for size in sizes])
            )
            a, b = shards[comm.rank].requires_grad_(), rights[comm.rank].requires_grad_()
            all_gather_gemm(comm, a, b).backward(weights[comm.rank])
            of_all = sum(each.float() @ other.detach().float().t() for each, other in zip(weights, rights))
            of_b = torch.cat(shards).detach().float().t() @ weights[comm.rank].float()
            torch.testing.assert_close(a.grad.float(), of_all.chunk(comm.size)[comm.rank], atol=0.5, rtol=0.04)
            torch.testing.assert_close(b.grad.float(), of_b, atol=0.5, rtol=0.04)
    finally:
        comm.use_products(given)


def test_ranks_with_columns_of_different_number_compute_gradients(ranks):
    ranks.run(check_uneven_shares, min(3, pool.LARGEST_WORLD))


def check_all_reduce(comm):
    for rows in (5, 40):
        generator = torch.Generator().manual_seed(comm.rank)
        a, b = (torch.randn(*shape, generator=generator).bfloat16().to(comm.device) for shape in ((rows, 64), (48, 64)))
        b = b.t() if comm.rank % 2 else b.t().contiguous()
        result = gemm_all_reduce(comm, a, b)
        wanted = comm.all_reduce((a.float() @ b.float()).bfloat16().float())
        torch.testing.assert_close(result.float(), wanted, atol=0.4, rtol=0.04)


def check_grouped(comm):
    generator = torch.Generator().manual_seed(3)
    idx = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(20)]).to(comm.device)
    x, b = (torch.randn(*shape, generator=generator).bfloat16().to(comm.device) for shape in ((20, 32), (3, 32, 48)))
    routing = route(comm, idx, experts=3)
    wanted = grouped_reference(routing, x, b)
    torch.testing.assert_close(all_gather_grouped_gemm(x, b, routing)[: len(wanted)], wanted, atol=0.4, rtol=0.04)


def test_operators_compute_the_same_in_measured_shapes(ranks):
    sizes = [(37, 40, 72), COPIED] if environment.emulated() else [(1500, 2048, 2056)]
    ranks.run(check_measured_shapes, min(3, pool.LARGEST_WORLD), sizes=sizes)


def test_the_tuner_tries_the_rule_first_and_what_a_table_may_have():
    with mock.patch.object(environment, "emulated", lambda: False):
        for task in [
            Task("many", "all_gather_gemm", 8192, 7168, 4096, False),
            Task("many", "all_gather_gemm", 64, 7168, 4096, True),
            *(Task("few", "gemm_all_reduce", rows, 8192, 14336, True) for rows in (1, 32, 64, 128, 256)),
            *(Task("grouped", "all_gather_grouped_gemm", rows, 768, 2048, True) for rows in (64, 512)),
        ]:
            tried = shapes(task)
            assert tried[0] == task.rule() and len({*tried}) == len(tried) >= 6
            assert {shape.rows for shape in tried} == {task.rule().rows}
            for shape in tried:
                parse({"products": listed(task.row(shape))}, "a test")
        assert {shape.columns for shape in shapes(Task("many", "all_gather_gemm", 8192, 128, 4096, False))} == {128}


def test_both_layouts_get_tiles_that_are_the_best_for_both():
    wide, narrow, deep = RULE._replace(group=16), RULE._replace(columns=128), RULE._replace(depth=128, stages=2)

    def found(transposed, *times):
        task = Task("many", "all_gather_gemm", 8192, 4096, 4096, transposed)
        return Measured(task, 90.0, dict(zip((RULE, wide, narrow, deep), times)))

    def chosen(*layouts):
        return [each.shape for each in rows_of([found(bool(at), *times) for at, times in enumerate(layouts)])]

    assert chosen((100, 90, 80, 99.5), (100, 91, 120, 95)) == [wide, wide]  # narrow ones are faster in one layout only
    assert chosen((100, 99.5, 120, 99.5), (100, 99.5, 120, 95)) == [RULE, deep]
    assert chosen((100, 90, 80, 85)) == [narrow]
    assert [each.transposed for each in rows_of([found(True, 1, 1, 1, 1)])] == [True]


def test_sizes_are_measured_once_in_both_layouts():
    found = tasks([("all_gather_gemm", 40, 8, 8), ("gemm_reduce_scatter", 40, 8, 8), ("gemm_all_reduce", 5, 8, 8)])
    kinds = [("many", "all_gather_gemm")] * 2 + [("few", "gemm_all_reduce")] * 2
    assert [(task.kind, task.operator) for task in found] == kinds
    assert [task.transposed for task in found] == [False, True] * 2


@pytest.mark.parametrize(
    "words",
    [
        "--shapes 40,64",
        "--shapes 40,64,0",
        "--shapes 40,64,²",
        f"--shapes 40,64,{1 << 34}",
        "--shapes 40,64,30",
        "--shapes broadcast:40,64,32",
        "-o missing/a",
        "-o .",
    ],
)
def test_the_tuner_refuses_before_it_measures(words, capsys):
    with pytest.raises(SystemExit):
        tune.main(["products", *words.split()])
    assert "expected" in capsys.readouterr().err


def test_a_shape_whose_result_is_wrong_is_left_out(capsys):
    task = Task("many", "all_gather_gemm", 40, 32, 32, False)
    problem = object.__new__(tune_products.Problem)
    problem._scale, problem.out, problem.expected = 1.0, torch.ones(40, 32), torch.ones(40, 32)
    problem.by = lambda shape: lambda: problem.out[:, : 30 if shape == OTHER else 32].fill_(1.01)
    assert tune_products.right(problem, task, [RULE, OTHER]) == [RULE]
    assert f"{OTHER} is left out: 80 of 1280 elements are wrong" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"all_gather_gemm .*Shape.*: 80 of 1280 elements are wrong"):
        tune_products.right(problem, task, [OTHER, RULE])


def test_the_tuner_writes_a_table_that_the_next_run_takes(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    sizes = ["gemm_reduce_scatter:40,32,64", "5,32,64", "all_gather_grouped_gemm:10,32,32"]
    words = ["products", "--shapes", *sizes, "-o", str(path)]
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("TDCCL_TUNING", "OMPI_", "PMI"))
    }
    run = subprocess.run(
        [sys.executable, "-m", "tdccl.tune", *words], capture_output=True, text=True, timeout=200,
        env={**outside, "PYTHONPATH": str(pool.ROOT), "TDCCL_EMULATE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert f"wrote {path}" in run.stdout and run.stdout.count("torch ") == run.stdout.count("rule ") == 5
    made = table.read(path)
    assert made["gpu"] == "emulation" and [each["kind"] for each in made["products"]] == [
        *["many"] * 2,
        *["few"] * 2,
        "grouped",
    ]
    assert all(each["us"] > 0 and each["rule_us"] > 0 and each["torch_us"] > 0 for each in made["products"])
    monkeypatch.setenv("TDCCL_TUNING", str(path))
    found = tuning.products_for("emulation")
    assert found == Products("measured on emulation (mine.json)", parse(made, "").rows)
    if environment.emulated():
        with tdccl.init(store=torch.distributed.HashStore(), rank=0, size=1) as comm:
            assert comm.products == found
