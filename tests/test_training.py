"""The examples, and torch's ways to train in parallel, learn on "tdccl" what they learn on Gloo, or NCCL on GPUs."""

import contextlib
import json
import math
import os
import socket
import sys
import traceback
from unittest import mock

import pool
import pytest
import torch
from test_process_group import CHECKOUT, LONG, run

REFERENCE = "nccl" if torch.cuda.is_available() and os.environ.get("TDCCL_EMULATE", "0") == "0" else "gloo"


EVERYWHERE = ["data_parallel", "sharded", "spread", "pipelines", "collectives", "compiled"]


def torchrun(ranks: int, program: str, *arguments, path=(CHECKOUT,), **variables) -> str:
    if ranks > pool.LARGEST_FOR_NCCL:
        pytest.skip(f"{pool.LARGEST_FOR_NCCL} GPUs")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return run(*launcher, str(CHECKOUT / program), *arguments, path=path, **variables)


# By default README's commands make this comparison, see test_readme.py.
@LONG
@pytest.mark.parametrize(
    "program, ranks, options", [("train_ddp", 4, ["--bf16"]), ("train_fsdp2", 3, []), ("train_fsdp2", 4, ["--bf16"])]
)
def test_example_has_the_loss_curve_of_another_backend(program, ranks, options, installed):
    command = [f"examples/{program}.py", "--backend=tdccl", f"--compare-with={REFERENCE}", *options]
    assert "differ by at most" in torchrun(ranks, *command, path=(CHECKOUT, installed))


@pytest.mark.parametrize("losses, agree", [([3.0, 2.0], True), ([3.0, 2.1], False), ([3.0, math.nan], False)])
def test_example_compares_all_losses(losses, agree, monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT / "examples")
    import training

    curves = iter([losses, [3.0, 2.0]])
    monkeypatch.setattr(training, "train", lambda *_: next(curves))
    monkeypatch.setattr(sys, "argv", ["train", "--compare-with=gloo"])
    monkeypatch.setenv("RANK", "1")
    with contextlib.nullcontext() if agree else pytest.raises(SystemExit, match="differ by at most"):
        training.main(None)


def check_training(comm, kinds: list[str], port: int):
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": comm.size}
    launcher |= {"RANK": comm.rank, "LOCAL_RANK": comm.rank}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in launcher.items()}):
        import torch_training

        failed = {name: error for name, error in torch_training.outcomes(kinds).items() if error is not None}
    words = (f"{name}:\n{''.join(traceback.format_exception(error))}" for name, error in failed.items())
    assert not failed, "\n".join(words)


@pytest.mark.parametrize(
    "size, kinds",
    [
        (2, EVERYWHERE),
        (3, ["spread"]),
        (4, ["two_dimensions"]),
        pytest.param(3, EVERYWHERE, marks=LONG),
        pytest.param(4, EVERYWHERE, marks=LONG),
    ],
)
def test_training(ranks, size, kinds):
    if size > pool.LARGEST_WORLD:
        pytest.skip(f"{pool.LARGEST_WORLD} GPUs")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks.run(check_training, size, kinds=kinds, port=port)


def test_bench_measures_backends_in_turns(tmp_path):
    options = ["--vs=gloo", "--calls=1", "--steps=1", "--sequences=1", "-J", str(tmp_path / "torch.json")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run(*launcher, "-m", "bench.torch_backend", *options, TDCCL_EMULATE="1")
    figures = json.loads((tmp_path / "torch.json").read_text())["figures"]
    measured = {(figure["what"], figure["impl"]) for figure in figures if figure["value"] > 0}
    for what in ("host time of asynchronous dist.all_reduce, 64 KiB", "FSDP2 step, 1 x 16 tokens a rank"):
        assert {(what, "tdccl"), (what, "gloo")} <= measured


@LONG
def test_training_compiled_by_inductor():
    cases = ["functional_compiled", "collectives_compiled", "compiled"]
    assert torchrun(2, "tests/torch_training.py", *cases, COMPILER="inductor").count(" ok") == 2
