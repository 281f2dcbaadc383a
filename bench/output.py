"""What rank 0 says: a table read like nccl-tests', and tidy JSON."""

import argparse
import contextlib
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
import triton

import tdccl
from bench.collectives import Case
from tdccl import Communicator, environment
from tdccl.transport import Topology


@dataclass(frozen=True)
class Result:
    """One measurement. wrong: elements on all ranks, None if unchecked."""

    case: Case
    impl: str
    algorithm: str
    mode: str
    placement: str
    max_blocks: int | None
    time_us: float
    wrong: int | None

    def as_json(self) -> dict:
        case = self.case
        algbw, busbw = case.bandwidths(self.time_us)
        return {
            "collective": case.collective.name,
            "bytes": case.nbytes,
            "dtype": case.dtype_name,
            "op": case.op,
            "mode": self.mode,
            "placement": self.placement,
            "in_place": case.in_place,
            "max_blocks": self.max_blocks,
            "impl": self.impl,
            "algorithm": self.algorithm,
            "time_us": float(f"{self.time_us:.5g}"),
            "algbw": float(f"{algbw:.5g}"),
            "busbw": float(f"{busbw:.5g}"),
            "wrong": self.wrong,
        }


class Output:
    """Prints on rank 0 and remembers the results; the other ranks only count wrong elements."""

    def __init__(self, options: argparse.Namespace, comm: Communicator):
        self._leads = comm.rank == 0
        self._shows_progress = self._leads and sys.stderr.isatty()
        self._path = options.json
        self._run = describe(comm.size, comm.device, options.command, comm.topology)
        self._results: list[Result] = []
        self._notes: set[str] = set()
        self._peers: list[str] = []
        versions = ", ".join(f"{name} {version}" for name, version in self._run["versions"].items() if version)
        self._say(f"# {self._run['command']}\n# {self._run['host']}; {comm.size} ranks\n# {versions}")

    def begin(self, collective: str, placement: str, mode: str, max_blocks: int | None, peers: list[str]) -> None:
        """Opens the table of one collective; `peers` get two columns each."""
        self._peers = peers
        variant = f"{'time':>9} {'algbw':>7} {'busbw':>7} {'#wrong':>6}"
        units = f"{'(us)':>9} {'(GB/s)':>7} {'(GB/s)':>7} {'':>6}"
        named = [f"{peer:>9} {'ratio':>6}" for peer in peers]
        cap = "" if max_blocks is None else f", max_blocks {max_blocks}"
        self._say(f"#\n# {collective}, {placement} buffers, {mode}{cap}\n#")
        self._line("#", _case("", "", "", "", ""), f"{'out-of-place':^32}", f"{'in-place':^32}")
        self._line("#", _case("size", "count", "type", "redop", "root"), variant, variant, f"{'algorithm':<20}", *named)
        unit = [f"{'(us)':>9} {'':>6}"] * len(peers)
        self._line("#", _case("(B)", "(elements)", "", "", ""), units, units, f"{'':<20}", *unit)

    def row(self, by_implementation: list[list[Result]]) -> None:
        """One line: tdccl's results come first, then each peer's."""
        ours, *others = by_implementation
        self._results += itertools.chain(*by_implementation)
        self.progress("")
        case = ours[0].case
        variants = {result.case.in_place: result for result in ours}
        theirs = {results[0].impl: results[0] for results in others if results}
        self._line(
            " ",
            _case(case.nbytes, case.count, case.dtype_name, case.op or "none", case.root),
            _measured(variants.get(False)),
            _measured(variants.get(True)),
            f"{'/'.join(dict.fromkeys(result.algorithm for result in ours)):<20}",
            *[_compared(theirs.get(peer), variants) for peer in self._peers],
        )

    def end(self) -> int:
        """Prints the sums, writes the JSON; returns the exit status."""
        wrong = Counter()
        for result in self._results:
            wrong[result.impl] += result.wrong or 0
        for peer, count in wrong.items():
            if peer != "tdccl" and count:
                self.note(f"{peer} made {count} wrong elements")
        busbw = [result.case.bandwidths(result.time_us)[1] for result in self._results if result.impl == "tdccl"]
        self._say(f"#\n# Out of bounds values : {wrong['tdccl']} {'FAILED' if wrong['tdccl'] else 'OK'}")
        self._say(f"# Avg bus bandwidth    : {statistics.fmean(busbw) if busbw else 0:.4g}")
        if self._leads and self._path:
            report = {**self._run, "rows": [result.as_json() for result in self._results]}
            self._path.write_text(json.dumps(report, indent=1) + "\n")
        return 1 if wrong.total() else 0

    def note(self, text: str) -> None:
        """Says something once."""
        if text not in self._notes:
            self._notes.add(text)
            self.progress("")
            self._say(f"# {text}")

    def progress(self, text: str) -> None:
        """Shows what is being measured, in one line of a terminal; "" clears it."""
        if self._shows_progress:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def _line(self, *cells: str) -> None:
        self._say("  ".join(cells).rstrip())

    def _say(self, text: str) -> None:
        if self._leads:
            print(text, flush=True)


def _case(nbytes, count, dtype, op, root) -> str:
    return f"{nbytes:>11} {count:>11} {dtype:>9} {op:>6} {root:>5}"


def _measured(result: Result | None) -> str:
    if result is None:
        return f"{'N/A':>9} {'N/A':>7} {'N/A':>7} {'N/A':>6}"
    algbw, busbw = result.case.bandwidths(result.time_us)
    wrong = "N/A" if result.wrong is None else result.wrong
    return f"{_figure(result.time_us):>9} {_figure(algbw):>7} {_figure(busbw):>7} {wrong:>6}"


def _figure(value: float) -> str:
    """Two decimals, or five for the bandwidths of emulation."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.5f}"


def _compared(peer: Result | None, ours: dict[bool, Result]) -> str:
    """A peer's time, and how often tdccl's of the same placement goes into it."""
    if peer is None:
        return f"{'N/A':>9} {'N/A':>6}"
    return f"{peer.time_us:>9.2f} {peer.time_us / ours[peer.case.in_place].time_us:>6.2f}"


def describe(ranks: int, device: torch.device, command: str, topology: Topology | None = None) -> dict:
    """What was run where; topology: how the ranks lie on nodes, if that may be on several. Nothing in it names the
    host."""
    processor = f"{os.cpu_count()} x {_processor()}"
    gpu = None if environment.emulated() else torch.cuda.get_device_name(device)
    gpus = torch.cuda.device_count()
    sharing = " that ranks share" if gpus < ranks else ""
    host = f"emulation, {processor}" if gpu is None else f"{gpus} x {gpu}{sharing}, {processor}"
    return {
        "host": host + (_lying(topology) if topology is not None else ""),
        "gpu": gpu,
        "world": ranks,
        "versions": {
            "tdccl": tdccl.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "nccl": None if gpu is None else ".".join(map(str, torch.cuda.nccl.version())),
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def _lying(topology: Topology) -> str:
    """How the ranks lie on nodes, if on several."""
    if len(topology.nodes) == 1:
        return ""
    lying = f"; as {len(topology.nodes)} nodes of {topology.width} drawn inside the host"
    if environment.node_size() is None:
        return lying.replace(" drawn inside the host", "")
    if environment.emulated():
        return f"{lying}: emulated, not a network"
    shared = torch.cuda.device_count() < sum(map(len, topology.nodes))
    return f"{lying}: NVSHMEM {'inside a GPU' if shared else 'over NVLink'}, not a network"


def given() -> str:
    """This program's arguments; of an absolute path the last part, for folders are of no interest to others."""
    return shlex.join(os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:])


def _processor() -> str:
    """The CPU's model as Linux names it, or its architecture."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
