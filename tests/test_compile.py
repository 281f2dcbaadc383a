"""Every kernel compiles for every target without a GPU, and moves 16 bytes an access where it may."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tdccl.collectives import ALGORITHMS

PROGRAM = Path(__file__).with_name("variants.py")


def compiled(*target) -> list[dict]:
    run = subprocess.run([sys.executable, PROGRAM, *target], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def names():
    return {f"{collective}.{algorithm.name}" for collective, table in ALGORITHMS.items() for algorithm in table}


@pytest.mark.parametrize("target", [("cuda", "90", "32"), ("cuda", "100", "32")], ids=["sm_90", "sm_100"])
def test_cuda_kernels_access_16_bytes(target):
    kernels = compiled(*target)
    assert {kernel["name"] for kernel in kernels} == names()
    for kernel in kernels:
        assert not kernel["narrow"], kernel
        if kernel["name"] != "barrier.signal_all":
            assert kernel["aligned"], kernel
            assert "128" in kernel["loads"], kernel
            assert "128" in kernel["stores"], kernel


def test_hip_kernels_compile():
    kernels = compiled("hip", "gfx942", "64")
    assert {kernel["name"] for kernel in kernels} == names()
    assert all(kernel["code"] for kernel in kernels)
