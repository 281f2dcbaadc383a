"""The table of what works under torch.distributed, made from the tests themselves.

python tests/what_works.py run -J FILE [--ranks 2,3,4]   runs them here, and writes what passed on how many ranks
python tests/what_works.py table FILE ... [--readme README.md]   prints the table, or puts it between README's markers
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import torch

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

_PROGRAMS = ("torch_face.py", "torch_training.py")
_GROUPS = {
    "data_parallel": "data parallel: DDP, ZeRO",
    "sharded": "sharded: FSDP, FSDP2, checkpoints",
    "two_dimensions": "meshes of two dimensions",
    "spread": "tensor and sequence parallel, DTensor",
    "pipelines": "pipelines",
    "collectives": "collectives compiled and differentiated",
    "compiled": "training under torch.compile",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/what_works.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the tests and write what passed")
    run.add_argument("-J", "--json", type=Path, required=True, metavar="FILE")
    run.add_argument("--ranks", default="2,3,4", help="numbers of ranks (default: %(default)s)")
    table = commands.add_parser("table", help="make the table from such files")
    table.add_argument("files", nargs="+", type=Path)
    table.add_argument("--readme", type=Path, help="replace what stands between its markers of `works`")
    options = parser.parse_args()
    if options.command == "run":
        options.json.write_text(json.dumps(measure([*map(int, options.ranks.split(","))]), indent=1) + "\n")
        return
    text = markdown([json.loads(path.read_text()) for path in options.files])
    if options.readme is None:
        print(text)
    else:
        from bench.report import replaced

        options.readme.write_text(replaced(options.readme.read_text(), text, "works"))


def measure(worlds: list[int]) -> dict:
    """Runs the programs on each number of ranks; {"ran", "passed": {case: ranks}, "failed": {case: ranks}}."""
    from bench.output import describe
    from tdccl import environment

    device = torch.device("cpu") if environment.emulated() else torch.device("cuda", 0)
    command = f"python tests/what_works.py run --ranks {','.join(map(str, worlds))}"
    passed, failed = defaultdict(list), defaultdict(list)
    for program, ranks in itertools.product(_PROGRAMS, worlds):
        kinds = [] if program == "torch_face.py" else [kind for kind in _GROUPS if ranks in _possible(kind, worlds)]
        said = Counter(re.findall(r"works: (\w+)", _run(program, ranks, kinds)))
        works = {case for case, times in said.items() if times == ranks}
        for case in [case for kind in kinds for case in _cases_of(kind)] or _faces():
            (passed if case in works else failed)[case].append(ranks)
        print(f"{program} on {ranks} ranks: {len(works)} cases passed", flush=True)
    return {**describe(max(worlds), device, command), "passed": passed, "failed": failed}


def _possible(kind: str, worlds: list[int]) -> list[int]:
    """Those numbers of ranks on which such cases can run."""
    return [ranks for ranks in worlds if kind != "two_dimensions" or (ranks >= 4 and ranks % 2 == 0)]


def _run(program: str, ranks: int, arguments: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        entry = Path(folder, "tdccl-0.dist-info")  # as if tdccl were installed
        entry.mkdir()
        (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: tdccl\nVersion: 0\n")
        (entry / "entry_points.txt").write_text("[torch.backends]\ntdccl = tdccl.torch_entry:register\n")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), folder]), "PATIENCE": "500"}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*launcher, str(TESTS / program), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    return done.stdout


def _faces() -> list[str]:
    """Names of the cases of torch_face.py."""
    import torch_face

    return [case.__name__ for case in torch_face.EVERYWHERE]


def _cases_of(kind: str) -> list[str]:
    import torch_training

    return [case.__name__ for case in torch_training.CASES[kind]]


def markdown(reports: list[dict]) -> str:
    """One row a group of cases, one column a report: how many of them passed, on which numbers of ranks."""
    heads = [_head(report) for report in reports]
    lines = [["what", *heads, "cases"], ["---"] * (len(heads) + 2)]
    groups = {
        "calls and groups": _faces(),
        **{words: _cases_of(kind) for kind, words in _GROUPS.items()},
    }
    for words, cases in groups.items():
        names = ", ".join(case.replace("_", " ") for case in cases)
        lines.append([words, *(_cell(report, cases) for report in reports), names])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _head(report: dict) -> str:
    where = "emulation" if report["gpu"] is None else report["host"].partition(",")[0]
    return f"{where}, torch {report['versions']['torch'].partition('+')[0]}"


def _cell(report: dict, cases: list[str]) -> str:
    """All that was run passed on these numbers of ranks; what did not is named."""
    passed, failed = report["passed"], report["failed"]
    worlds = sorted({ranks for case in cases for ranks in passed.get(case, [])})
    if not worlds:
        return "not run"
    broken = [f"{case} (on {', '.join(map(str, failed[case]))})" for case in cases if case in failed]
    but = f" but {', '.join(broken)}".replace("_", " ") if broken else ""
    return f"all{but} pass on {', '.join(map(str, worlds))} ranks"


if __name__ == "__main__":
    main()
