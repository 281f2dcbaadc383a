"""`python -m tdccl.info` says what there is, and what would be chosen."""

import os
import re
import subprocess
import sys

import pool
import pytest
import torch

from tdccl.info import others


def info(*words, **variables) -> str:
    kept = {name: value for name, value in os.environ.items() if not re.search("NVLS|MULTICAST|SCRATCH", name)}
    command = [sys.executable, "-m", "tdccl.info", *words]
    done = subprocess.run(command, cwd=pool.ROOT, env=kept | variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_tells_of_this_host():
    said = info(TDCCL_EMULATE="1")
    assert f"torch {torch.__version__}" in said and "NVLink multicast: emulated" in said
    rows = {line.split("  ")[1]: line for line in said.splitlines() if line.startswith("  ")}
    assert "tiles of products: by rule" in said
    assert "one_shot_ll" in rows["1 KiB"] and "two_shot_staged / two_shot_pull" in rows["1 GiB"]


def test_it_tells_that_the_switch_is_left_alone():
    assert "NVLink multicast: not used, by TDCCL_NVLS=unicast" in info(TDCCL_EMULATE="0", TDCCL_NVLS="unicast")


def test_it_tells_on_which_nodes_the_ranks_are():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "-m", "tdccl.info"]
    variables = os.environ | {"TDCCL_NODE_SIZE": "2"}
    done = subprocess.run(launcher, cwd=pool.ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    nodes = [line.rpartition(": ")[2] for line in done.stdout.splitlines() if line.startswith("node ")]
    assert nodes == ["ranks 0 to 1", "ranks 2 to 3"]
    assert "otherwise" not in done.stdout
    assert "NVSHMEM: " in done.stdout and "2 nodes of 2 ranks" in done.stdout and "two_shot_rails" in done.stdout


def test_it_tells_which_ranks_have_other_versions():
    first, other = {"torch": "2.11", "nvidia-nvshmem-cu13": "3.4.5"}, {"torch": "2.11", "nvidia-nvshmem-cu13": "3.8.0"}
    assert others([first, first]) == []
    assert others([first, other, first, other]) == ["otherwise on ranks 1, 3: nvidia-nvshmem-cu13 3.8.0"]


@pytest.mark.parametrize("multicast", [False, True])
def test_it_tells_what_other_gpus_would_take(multicast):
    said = info("--gpu", "NVIDIA H200", "--ranks", "4", *["--multicast"] * multicast, NCCL_NVLS_ENABLE="0")
    assert "NVLink multicast: forbidden by NCCL_NVLS_ENABLE=0" in said
    assert "measured on 4 x NVIDIA H200" in said and ("NVLS modelled" in said) == multicast
    largest = next(line for line in said.splitlines() if line.startswith("  1 GiB"))
    assert ("nvls_two_shot_staged / nvls_two_shot" in largest) == multicast
