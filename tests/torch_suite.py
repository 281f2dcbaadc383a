"""torch's own suite for a backend, `DistributedTest`, on tdccl in emulation: what `test_torch_suite.py` starts.

python tests/torch_suite.py GATE:RANKS[:TEST,...] ...     prints a line for each test: where, its outcome, its name, why

A test runs only if its gate, a condition on the name of the backend, lets it, and the gates know torch's own
backends alone. So the suite is told that it tests gloo or mpi, and groups that it makes by this name are tdccl's.
"""

import argparse
import functools
import os
import re
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

CHECKOUT = Path(__file__).parent.parent


def settle(gate: str, ranks: int, folder: str) -> None:
    """Sets what torch's modules read from the environment when they are imported, and later."""
    os.environ |= {
        "BACKEND": gate,
        "WORLD_SIZE": str(ranks),
        "INIT_METHOD": f"file://{folder}/store",
        "DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": "60",
        "PYTORCH_PRINT_REPRO_ON_FAILURE": "0",
        "OMP_NUM_THREADS": "1",
        "TDCCL_EMULATE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    sys.path.insert(0, str(CHECKOUT))


def substitute(gate: str) -> None:
    """Makes torch build a group of tdccl where it is asked for one of the gate's backend."""
    import torch.distributed as dist

    import tdccl.torch_entry

    tdccl.torch_entry.register()  # run from a checkout: no entry point is installed

    def by_tdccl(make, position):
        @functools.wraps(make)
        def made(*args, **kwargs):
            args = ["tdccl" if i == position and arg == gate else arg for i, arg in enumerate(args)]
            if kwargs.get("backend") == gate:
                kwargs["backend"] = "tdccl"
            return make(*args, **kwargs)

        return made

    def monitored_barrier(*args, **kwargs):
        with mock.patch.object(dist.distributed_c10d, "get_backend", lambda group: "gloo"):
            return refuses_by_name(*args, **kwargs)

    dist.init_process_group = by_tdccl(dist.init_process_group, 0)
    dist.new_group = by_tdccl(dist.new_group, 2)
    refuses_by_name, dist.monitored_barrier = dist.monitored_barrier, monitored_barrier  # torch's takes gloo alone


def suite() -> type:
    """The suite, whose ranks are forks of this process, so that each test finds everything imported."""
    import torch
    from torch.testing._internal.distributed.distributed_test import DistributedTest, TestDistBackend

    import tdccl.collectives
    import tdccl.process_group
    import tdccl.runtime.emulation  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork

    class Suite(TestDistBackend, DistributedTest._DistTestBase):
        def setUp(self):
            super().setUp()
            self._start_processes(torch.multiprocessing.get_context("fork").Process)

    return Suite


class Report(unittest.TestResult):
    """Writes each outcome at once: to `lines` in one line, and the whole text of a failure to stderr."""

    def __init__(self, lines, where: str):
        super().__init__()
        self._lines, self._where = lines, where

    def _write(self, outcome: str, test, why: str = "") -> None:
        print(self._where, outcome, test.id().rpartition(".")[2], why, file=self._lines, flush=True)

    def addSuccess(self, test):
        self._write("passed", test)

    def addSkip(self, test, reason):
        self._write("skipped", test, reason)

    def addFailure(self, test, raised):
        text = str(raised[1])
        print(f"\n{test.id()}: {text}", file=sys.stderr, flush=True)
        # The text quotes the tracebacks of the ranks: what they end with says most.
        errors = re.findall(r"^[\w.]*(?:Error|Timeout|Failure|Aborted|Exception)\b.*", text, re.MULTILINE)
        self._write("failed", test, (errors or text.splitlines() or [""])[-1])

    addError = addFailure


def run(place: str, lines) -> None:
    """The tests of one place; in a process of its own, as torch's modules take the gate for good."""
    gate, ranks, *asked = place.split(":")
    with tempfile.TemporaryDirectory() as folder:
        settle(gate, int(ranks), folder)
        substitute(gate)
        tests = suite()
        names = asked[0].split(",") if asked else unittest.TestLoader().getTestCaseNames(tests)
        unittest.TestSuite(map(tests, names)).run(Report(lines, f"{gate}:{ranks}"))


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("places", nargs="+", metavar="GATE:RANKS[:TEST,...]")
    asked = parser.parse_args()
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # tests print too, and their ranks
    settle(gate="gloo", ranks=1, folder="")
    import torch.testing._internal.common_distributed  # what takes seconds, once for all places

    import tdccl.process_group
    import tdccl.runtime.emulation  # noqa: F401

    for place in asked.places:
        each = torch.multiprocessing.get_context("fork").Process(target=run, args=(place, lines))
        each.start()
        each.join()
        if each.exitcode:
            raise SystemExit(f"{place} exited with {each.exitcode}")


if __name__ == "__main__":
    main()
