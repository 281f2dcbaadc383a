"""The examples, and torch's ways to train in parallel, learn on "tdccl" what they learn on Gloo, or NCCL on GPUs."""

import os
import sys

import pool
import pytest
import torch
from test_process_group import CHECKOUT, run

LONG = pytest.mark.skipif(os.environ.get("TDCCL_LONG", "0") == "0", reason="long: TDCCL_LONG=1 runs it")
REFERENCE = "nccl" if torch.cuda.is_available() and os.environ.get("TDCCL_EMULATE", "0") == "0" else "gloo"


EVERYWHERE = ["data_parallel", "sharded", "spread", "pipelines", "collectives", "compiled"]


def torchrun(ranks: int, program: str, *arguments, path=(CHECKOUT,), **variables) -> str:
    if ranks > pool.LARGEST_WORLD:
        pytest.skip(f"{pool.LARGEST_WORLD} GPUs")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return run(*launcher, str(CHECKOUT / program), *arguments, path=path, **variables)


@pytest.mark.parametrize(
    "program, ranks, options",
    [
        ("train_ddp", 2, ["--steps=5"]),
        ("train_fsdp2", 2, ["--steps=5"]),
        pytest.param("train_ddp", 4, ["--bf16"], marks=LONG),
        pytest.param("train_fsdp2", 3, [], marks=LONG),
        pytest.param("train_fsdp2", 4, ["--bf16"], marks=LONG),
    ],
)
def test_example_has_the_loss_curve_of_another_backend(program, ranks, options, installed):
    command = [f"examples/{program}.py", "--backend=tdccl", f"--compare-with={REFERENCE}", *options]
    assert "differ by at most" in torchrun(ranks, *command, path=(CHECKOUT, installed))


@pytest.mark.parametrize(
    "ranks, kinds",
    [
        (2, EVERYWHERE),
        (3, ["spread"]),
        (4, ["two_dimensions"]),
        pytest.param(3, EVERYWHERE, marks=LONG),
        pytest.param(4, EVERYWHERE, marks=LONG),
    ],
)
def test_training(ranks, kinds):
    assert torchrun(ranks, "tests/torch_training.py", *kinds).count(" ok") == ranks


@LONG
def test_training_compiled_by_inductor():
    cases = ["functional_compiled", "collectives_compiled", "compiled"]
    assert torchrun(2, "tests/torch_training.py", *cases, COMPILER="inductor").count(" ok") == 2
