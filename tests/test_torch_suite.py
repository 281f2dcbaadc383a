"""torch's own suite for a backend, held against `torch_suite.txt`.

Each test that passes at some place (a gate and a number of ranks) runs once, at one of its places in turn.
TDCCL_TEST_WHOLE=1 runs all tests at all places, and so finds those that newly pass: some 10 minutes on two cores.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WHOLE = os.environ.get("TDCCL_TEST_WHOLE", "0") != "0"
PLACES = list(itertools.product(("gloo", "mpi"), (2, 3, 4)))


def read_table() -> dict[tuple[str, int], dict[str, str]]:
    """At each place, the outcome that each test should have."""
    table = {place: {} for place in PLACES}
    lines = (HERE / "torch_suite.txt").read_text().splitlines()
    sections = "\n".join(line for line in lines if not line.startswith("#")).strip().split("\n\n")
    for section in sections:
        head, _, tests = section.partition("\n")
        outcome, *where = head.partition(":")[0].split()
        for gate, ranks in PLACES:
            if {*where} <= {gate, str(ranks)}:
                table[gate, ranks] |= dict.fromkeys(tests.split(), outcome)
    return table


TABLE = read_table()
PASSING = sorted({test for tests in TABLE.values() for test, outcome in tests.items() if outcome == "passed"})


def share(place) -> list[str]:
    """The tests whose turn it is to run at this place."""
    tests = []
    for turn, test in enumerate(PASSING):
        passes_at = [place for place in PLACES if TABLE[place][test] == "passed"]
        if passes_at[turn % len(passes_at)] == place:
            tests.append(test)
    return tests


@pytest.fixture(scope="module")
def found(request) -> dict[tuple[str, int], dict[str, tuple[str, str]]]:
    """By place, the outcome of each test that ran, and why; of all places that are wanted, as it takes seconds to
    begin."""
    pytest.importorskip("expecttest", reason="torch's tests need it")
    wanted = [item.callspec.params for item in request.session.items if getattr(item, "callspec", None)]
    places = [place for place in PLACES if {"gate": place[0], "ranks": place[1]} in wanted]
    asked = [f"{gate}:{ranks}" + ("" if WHOLE else f":{','.join(share((gate, ranks)))}") for gate, ranks in places]
    command = [sys.executable, str(HERE / "torch_suite.py"), *asked]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-5000:]}"
    outcomes = {place: {} for place in places}
    for line in done.stdout.splitlines():
        where, outcome, test, why = line.split(" ", 3)
        gate, _, ranks = where.partition(":")
        outcomes[gate, int(ranks)][test] = outcome, why
    return outcomes


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the table is that of torch 2.13")
@pytest.mark.timeout(3600 if WHOLE else 600)
@pytest.mark.parametrize("gate, ranks", PLACES)
def test_outcomes_are_those_of_the_table(gate, ranks, found):
    expected, outcomes = TABLE[gate, ranks], found[gate, ranks]
    asked = expected if WHOLE else share((gate, ranks))
    complaints = [f"{test} did not run" for test in asked if test not in outcomes]
    for test, (outcome, why) in outcomes.items():
        listed = expected.get(test)
        if listed is None:
            complaints.append(f"{test} is not in the table ({outcome}: {why})")
        elif outcome == "passed" != listed:
            complaints.append(f"{test} newly passes; in the table it is {listed}")
        elif outcome != listed:
            repeat = f"python tests/torch_suite.py {gate}:{ranks}:{test}"
            complaints.append(f"{test} newly {outcome}: {why}\n    repeat with: {repeat}")
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


def test_as_many_pass_as_promised():
    assert len(PASSING) >= 116
    assert sorted(itertools.chain.from_iterable(map(share, PLACES))) == PASSING
