"""What tensor-parallel layers end with: a product and its all-reduce, an all-reduce and its normalisation."""

import json
import random
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from unittest import mock

import pool
import pytest
import torch
from test_training import LONG, torchrun
from waiting import check_told

import tdccl
from tdccl import environment
from tdccl.overlap import all_reduce_rms_norm, gemm_all_reduce
from tdccl.overlap.all_reduce_rms_norm import reference as all_reduce_rms_norm_reference
from tdccl.overlap.all_reduce_rms_norm import shots_for
from tdccl.overlap.modules import AllReduceRMSNorm, ColumnParallelLinear, RowParallelLinear

WORLDS = (2, 3)
# M, K, N: few rows in one shot, in two; more tiles than blocks; many rows; rows that no 16-byte access fits; one.
SHAPES = [(16, 64, 64), (31, 200, 72), (5, 40, 300), (70, 40, 72), (33, 7, 35), (1, 8, 8)]
if not environment.emulated():  # where a few is more, as are tiles and blocks
    SHAPES += [(1, 7168, 8192), (100, 1000, 5128), (256, 512, 8192), (130, 77, 999), (1000, 264, 4104), (700, 33, 611)]


def matrices(comm, shape, dtype, transposed: bool, seed: int):
    """(a, b) of every rank."""
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _rank in range(comm.size):
        a = torch.randn(rows, depth, generator=generator)
        b = torch.randn(*((columns, depth) if transposed else (depth, columns)), generator=generator)
        a, b = a.to(comm.device, dtype), b.to(comm.device, dtype)
        pairs.append((a, b.t() if transposed else b))
    return pairs


def same_on_all_ranks(comm, tensor) -> bool:
    everyone = comm.all_gather(tensor.contiguous().view(torch.int16).view(1, -1))
    return bool((everyone == everyone[0]).all())


def check_product(comm, shape, dtype, transposed, seed):
    pairs = matrices(comm, shape, dtype, transposed, seed)
    result = gemm_all_reduce(comm, *pairs[comm.rank])
    wanted = sum(a.float() @ b.float() for a, b in pairs)
    tolerance = (4e-2 if dtype is torch.bfloat16 else 6e-3) * (comm.size * shape[1]) ** 0.5
    assert result.dtype is dtype
    torch.testing.assert_close(result.float(), wanted, atol=tolerance, rtol=tolerance)
    assert same_on_all_ranks(comm, result), shape
    return result


def check_few_multiprocessors(comm):
    """More blocks would add up than there are: the product still has some."""
    with mock.patch.object(import_module("tdccl.overlap.gemm_all_reduce"), "FOLDERS", 4 * comm.multiprocessors):
        check_product(comm, (70, 40, 72) if environment.emulated() else (700, 40, 72), torch.bfloat16, False, 1)


def test_many_rows_on_few_multiprocessors(ranks):
    ranks.run(check_few_multiprocessors, 2)


def check_one_multiprocessor(comm):
    group = comm.split(0)
    many = (70, 40, 72) if environment.emulated() else (700, 40, 72)
    with mock.patch.object(group, "multiprocessors", 1):
        for shape in SHAPES[:2]:
            check_product(group, shape, torch.bfloat16, False, 1)
        with pytest.raises(tdccl.ArgumentError, match="gemm_all_reduce: a rank has 1 multiprocessor"):
            check_product(group, many, torch.bfloat16, False, 1)
    check_product(group, many, torch.bfloat16, False, 1)
    group.destroy()


def test_many_rows_on_one_multiprocessor_are_refused(ranks):
    ranks.run(check_one_multiprocessor, 2)


def check_products(comm):
    delay = random.Random(comm.rank)
    for seed, shape in enumerate(SHAPES + SHAPES[:2]):  # larger and smaller ones in turns share memory and signals
        time.sleep(delay.choice([0, 0, 0.02]))
        check_product(comm, shape, (torch.bfloat16, torch.float16)[seed // 2 % 2], seed % 3 == 0, seed)


def test_products_of_ragged_shapes_with_ranks_that_come_late(ranks, world):
    ranks.run(check_products, world)


def norm_inputs(comm, rows, width, dtype, seed):
    """(x of every rank, residual, weight)."""
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(comm.size, rows, width, generator=generator).to(comm.device, dtype)
    residual, weight = torch.randn(rows, width, generator=generator), torch.rand(width, generator=generator)
    return xs, residual.to(comm.device, dtype), weight.to(comm.device, dtype)


# Rows, width: a row, few, more rows than blocks; so wide that no packets are used; no 16-byte access fits; one element.
ROWS = [(1, 64), (5, 40), (9, 96), (7, 600), (3, 37), (13, 1), (2, 40000)]
if not environment.emulated():  # where two shots pay for more
    ROWS += [(256, 1024)]


def check_norms(comm):
    delay = random.Random(comm.rank)
    taken = set()
    for seed, (rows, width) in enumerate(ROWS + ROWS[:3]):
        time.sleep(delay.choice([0, 0, 0.02]))
        dtype = (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
        xs, residual, weight = norm_inputs(comm, rows, width, dtype, seed)
        results = all_reduce_rms_norm(comm, xs[comm.rank], residual, weight, 1e-5)
        wanted = all_reduce_rms_norm_reference(comm, xs[comm.rank], residual, weight, 1e-5)
        assert torch.equal(results[1], wanted[1]), (rows, width)
        close = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
        torch.testing.assert_close(results[0], wanted[0], atol=close, rtol=close)
        assert all(same_on_all_ranks(comm, result) for result in results), (rows, width)
        shots = shots_for(rows, width, dtype.itemsize, comm.size)
        taken.add(shots and shots.kernel.fn.__name__)
    return taken


def test_norms_of_ragged_shapes_with_ranks_that_come_late(ranks, world):
    (taken, *_) = ranks.run(check_norms, world)
    assert taken == {"one_shot", None} | ({"two_shot"} if world > 2 else set())


def check_bits(comm):
    """Of a product, the bits of it and then all_reduce; of both, the same bits in every run."""
    delay = random.Random(comm.rank)
    for shape in ((16, 64, 64), (70, 40, 72)):
        results = []
        for _ in range(3):
            time.sleep(delay.choice([0, 0, 0.02]))
            results.append(check_product(comm, shape, torch.bfloat16, False, 7))
        assert all(torch.equal(result, results[0]) for result in results)
    if comm.device.type == "cpu":  # K of (16, 32, 40) is one step, which the interpreter multiplies in fp32
        a, b = matrices(comm, (16, 32, 40), torch.bfloat16, False, 7)[comm.rank]
        product = (a.float() @ b.float()).bfloat16()
        assert torch.equal(gemm_all_reduce(comm, a, b), comm.all_reduce(product))
    xs, residual, weight = norm_inputs(comm, 5, 40, torch.bfloat16, 3)
    runs = [all_reduce_rms_norm(comm, xs[comm.rank], residual, weight) for _ in range(3)]
    assert all(torch.equal(run[i], runs[0][i]) for run in runs for i in range(2))


def test_bits_are_those_of_all_reduce_and_the_same_in_every_run(ranks):
    ranks.run(check_bits, min(3, pool.LARGEST_WORLD))


def check_counters(comm):
    """With more blocks than emulation has by itself, and tiles that are cut: each has a word to count its blocks."""
    module, spaces = import_module("tdccl.overlap.gemm_all_reduce"), []  # the package has a function of this name
    make = module._space
    space = mock.patch.object(module, "_space", lambda *how: spaces.append(make(*how)) or spaces[-1])
    with mock.patch.object(comm, "multiprocessors", 6), space:
        check_product(comm, (16, 96, 640), torch.bfloat16, False, 3)
    assert len(spaces[0].arrivals) >= 640 // 64, len(spaces[0].arrivals)


@pytest.mark.skipif(not environment.emulated(), reason="blocks are given for emulation")
def test_every_tile_that_is_cut_has_its_counter(ranks):
    ranks.run(check_counters, pool.LARGEST_WORLD)


def check_gradients(comm):
    """Against those of the summed product in one process, whose result's gradient is the same on all ranks."""
    pairs = matrices(comm, (19, 24, 40), torch.bfloat16, True, 3)
    a, b = (tensor.clone().requires_grad_() for tensor in pairs[comm.rank])
    result = gemm_all_reduce(comm, a, b)
    weight = torch.arange(result.numel(), device=comm.device).view_as(result) % 3 - 1.0
    (result * weight).float().sum().backward()
    wholes = [[tensor.float().requires_grad_() for tensor in pair] for pair in pairs]
    (sum(left @ right for left, right in wholes) * weight).sum().backward()
    for mine, whole in zip((a, b), wholes[comm.rank]):
        torch.testing.assert_close(mine.grad.float(), whole.grad, atol=0.1, rtol=0.02)


def test_gradients(ranks):
    ranks.run(check_gradients, min(2, pool.LARGEST_WORLD))


def check_compiled(comm):
    """torch.compile sees both operators and their shapes."""
    a, b = matrices(comm, (4, 16, 24), torch.bfloat16, False, 5)[comm.rank]
    residual = torch.ones(4, 24, dtype=torch.bfloat16, device=comm.device)
    weight = residual[0].clone()

    def layer(x, up):
        y = gemm_all_reduce(comm, x.relu(), up)
        return all_reduce_rms_norm(comm, y, residual, weight)[0] * 2

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(a, b), layer(a, b))


def test_torch_compile_sees_the_operators(ranks):
    ranks.run(check_compiled, min(2, pool.LARGEST_WORLD))


def check_refused(comm):
    x = torch.ones(4, 8, dtype=torch.bfloat16, device=comm.device)
    with pytest.raises(tdccl.ArgumentError, match="as many columns"):
        gemm_all_reduce(comm, x, x)
    with pytest.raises(tdccl.ArgumentError, match="out is"):
        gemm_all_reduce(comm, x, x.t(), out=x)
    with pytest.raises(tdccl.ArgumentError, match="contiguous"):
        all_reduce_rms_norm(comm, x.t(), x.t(), x[:, 0])
    with pytest.raises(tdccl.ArgumentError, match="residual is"):
        all_reduce_rms_norm(comm, x, x.float(), x[0])
    with pytest.raises(tdccl.ArgumentError, match="weight is"):
        all_reduce_rms_norm(comm, x, x, x)
    assert gemm_all_reduce(comm, x[:, :0], x[:0]).eq(0).all() and gemm_all_reduce(comm, x[:0], x.t()).shape == (0, 4)
    assert all_reduce_rms_norm(comm, x[:0], x[:0], x[0])[0].shape == (0, 8)


def test_what_does_not_fit_is_refused_and_what_is_empty_is_not(ranks):
    ranks.run(check_refused, min(2, pool.LARGEST_WORLD))


def test_kernels_multiply_on_tensor_cores_without_spills():
    program = Path(__file__).with_name("tensor_parallel_variants.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    products, folds = {"multiply_shares", "multiply_tiles"}, {"fold_and_share"}
    norms = {"one_shot", "two_shot", "add_and_normalise"}
    assert {kernel["name"] for kernel in kernels} == products | folds | norms
    for kernel in kernels:
        assert min(kernel["spills_in_loops"], default=0) == 0 and kernel["shared"] <= 227 << 10, kernel
        assert kernel["spills"] <= 10, kernel  # Triton 3.9 puts some words aside between tiles of 16 rows
        assert not kernel["divergent"], kernel
        assert bool(kernel["wgmma"] or kernel["mma"]) == (kernel["name"] in products), kernel
        assert "128" in kernel["stores"] or kernel["narrow"], kernel  # no 16-byte access fits every other one


def check_absent(comm, norm):
    a, b = matrices(comm, (20, 16, 16), torch.bfloat16, False, 1)[comm.rank]

    def prepare(group):
        return lambda: all_reduce_rms_norm(group, a, a, a[0]) if norm else gemm_all_reduce(group, a, b)

    check_told(comm, f"absent{norm}", prepare)


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs 2 ranks")
@pytest.mark.parametrize("norm", [False, True], ids=["product", "norm"])
def test_a_rank_that_never_comes_is_told(ranks, norm):
    ranks.run(check_absent, 2, norm=norm)


def check_replay(comm):
    """A graph of products of few rows and of many, and of norms, replayed after new input among eager calls."""
    generator = torch.Generator(comm.device).manual_seed(comm.rank)
    wide = torch.randn(264, 512, generator=generator, device=comm.device).bfloat16()
    ones = torch.ones(512, dtype=torch.bfloat16, device=comm.device)
    inputs = [torch.randn(rows, 264, generator=generator, device=comm.device).bfloat16() for rows in (3, 130, 600)]
    xs = [torch.randn(len(a), 512, generator=generator, device=comm.device).bfloat16() for a in inputs]
    residuals = [comm.broadcast(x.clone()) for x in xs]

    def layer():
        results = []
        for a, x, residual in zip(inputs, xs, residuals):
            results.append(gemm_all_reduce(comm, a, wide))
            results += all_reduce_rms_norm(comm, x, residual, ones)
        return results

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
        captured = layer()
    for factor in (1, 2, -1):
        for tensor in inputs + xs:
            tensor.mul_(factor)
        eager = layer()
        graph.replay()
        torch.cuda.synchronize()
        for result, wanted in zip(captured, eager):
            assert torch.equal(result, wanted)


@pytest.mark.skipif(environment.emulated(), reason="CUDA graphs need a GPU")
def test_graphs_replay(ranks, world):
    ranks.run(check_replay, world)


def check_modules(comm):
    """An MLP, replicated and scattered, against the same in one process: result, and gradients of input and weights."""
    generator = torch.Generator().manual_seed(11)
    size, rows, width, hidden = comm.size, 6, 16, 24
    up = torch.randn(hidden * size, width, generator=generator).to(comm.device) * 0.3
    down = torch.randn(width, hidden * size, generator=generator).to(comm.device) * 0.2
    tokens = torch.randn(rows * size, width, generator=generator).to(comm.device)
    first = ColumnParallelLinear(comm, width, hidden * size)
    second = RowParallelLinear(comm, hidden * size, width)
    first.load(up)
    second.load(down)
    exact_input, *exact = (tensor.bfloat16().float().requires_grad_() for tensor in (tokens, up, down))
    wanted = (exact_input @ exact[0].t()).relu() @ exact[1].t()
    wanted.sum().backward()
    close = {"atol": 6e-2, "rtol": 3e-2}
    for scattered in (False, True):
        x = (tokens.chunk(size)[comm.rank] if scattered else tokens).bfloat16().requires_grad_()
        y = second(first(x, scattered).relu(), "scattered" if scattered else "replicated")
        y.float().sum().backward()
        mine = slice(rows * comm.rank, rows * (comm.rank + 1)) if scattered else slice(None)
        torch.testing.assert_close(y.float(), wanted[mine], **close)
        torch.testing.assert_close(x.grad.float(), exact_input.grad[mine], **close)
        for layer, whole, dimension in ((first, exact[0], 0), (second, exact[1], 1)):
            of_shard = whole.grad.chunk(size, dimension)[comm.rank]
            torch.testing.assert_close(layer.weight.grad.float(), of_shard, atol=0.2, rtol=3e-2)
            layer.weight.grad = None
    norm = AllReduceRMSNorm(comm, width)
    with torch.no_grad():
        x = tokens.bfloat16()
        normed, total = norm(second(first(x).relu(), "partial"), x)
    torch.testing.assert_close(total.float(), wanted.detach() + x.float(), **close)
    torch.testing.assert_close(normed, norm(total))
    with pytest.raises(tdccl.ArgumentError, match="expected replicated, scattered or partial"):
        second(first(x), "whole")
    if size > 1:
        with pytest.raises(tdccl.ArgumentError, match="multiple of the"):
            ColumnParallelLinear(comm, 8, size + 1)


def test_modules(ranks, world):
    ranks.run(check_modules, world)


def write_weights(file: Path, seed: int) -> None:
    """A safetensors file with weights for the example's smallest size: the header's length, the header, the data."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed_tokens": (256, 64), "norm": (64,), "lm_head": (256, 64)}
    for layer in range(2):
        parts = {"q_proj": (128, 64), "k_proj": (64, 64), "v_proj": (64, 64), "o_proj": (64, 128)}
        parts |= {"q_norm": (16,), "k_norm": (16,)}
        shapes |= {f"layers.{layer}.self_attn.{name}": shape for name, shape in parts.items()}
        parts = {"mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
        parts |= {"input_layernorm": (64,), "post_attention_layernorm": (64,)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator) * shape[-1] ** -0.5 + (len(shape) == 1)
        content = values.bfloat16().view(torch.int16).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        prefix = "" if name == "lm_head" else "model."
        header[f"{prefix}{name}.weight"] = {"dtype": "BF16", "shape": [*shape], "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=LONG)])
def test_example_decodes_as_plain_torch_and_as_one_rank_does(ranks, tmp_path):
    write_weights(tmp_path / "model.safetensors", 5)
    command = ["examples/qwen3_tp.py", "--size=tiny", f"--weights={tmp_path}", "--prompt=8", "--tokens=4", "--batch=2"]
    outputs = [torchrun(count, *command) for count in (1, ranks)]
    (one,), (several,) = (re.findall("goes on with (.*)", output) for output in outputs)
    assert len(set(one.split())) > 1
    if environment.emulated():  # elsewhere sums of as many parts need not round alike, where two tokens are near a tie
        assert one == several


def test_bench(tmp_path):
    command = ["bench/overlap.py", "--operators=gemm_all_reduce,all_reduce_rms_norm", "--few=5", "--tokens=40"]
    torchrun(2, *command, "-J", str(tmp_path / "fused.json"))
    found = json.loads((tmp_path / "fused.json").read_text())["fused"]
    assert [(row["operator"], row["tokens"]) for row in found] == [
        ("gemm_all_reduce", 5), ("gemm_all_reduce", 40), ("all_reduce_rms_norm", 5),
        ("routing, parts of experts", 40), ("all_gather + grouped GEMM", 40), ("grouped GEMM + reduce_scatter", 40),
        ("routing, whole experts", 40), ("dispatch + grouped GEMM", 40), ("grouped GEMM + combine", 40),
    ]  # fmt: skip
    assert all(row.get("wrong", 0) == 0 and row["times_us"]["both, tdccl"] > 0 for row in found)
