"""README's programs run as README says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cases
import pool
import pytest
from test_training import REFERENCE

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
PROGRAMS = {re.match(r"# (\S+\.py)", text).group(1): text for kind, text in BLOCKS if kind == "python"}
LINES = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
COMMANDS = [line.removeprefix("./run ") for line in LINES if line.startswith(("./run mpirun", "./run torchrun"))]


# On as many GPUs as there are; in emulation few ranks show, too, that a command runs.
RANKS = 2 if cases.FEW else pool.LARGEST_WORLD


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_readme(command, installed):
    for name, text in PROGRAMS.items():
        (installed / name).write_text(text)
    (installed / "examples").symlink_to(ROOT / "examples")
    words = shlex.split(command, comments=True)
    words[2] = str(RANKS)
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    variables = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{installed}", OMP_NUM_THREADS="1")
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for layer in ("OMPI", "PRTE"):
        variables[f"{layer}_ALLOW_RUN_AS_ROOT"] = variables[f"{layer}_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    if words[0] == "mpirun":
        words.insert(1, "--oversubscribe")
    training = "examples/train" in command
    if training:
        words.append(f"--compare-with={REFERENCE}")
    run = subprocess.run(words, cwd=installed, env=variables, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "differ by at most" in run.stdout or not training


def test_every_program_of_readme_is_started_by_it():
    assert all(any(name in command for command in COMMANDS) for name in PROGRAMS)
