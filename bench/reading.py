"""The bench's JSON as reports and pictures take it: runs by kind of host, tables, and rows that may be compared."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PICTURES = Path("bench/plots")  # seen from README
COLUMNS = {"plain": "tdccl", "symmetric": "tdccl symmetric", "nccl": "NCCL", "symm": "torch symm", "gloo": "Gloo"}

_KEY = ("collective", "bytes", "dtype", "op", "mode", "placement", "in_place", "impl", "max_blocks")
_USUAL = ("sum", "bfloat16", "graph")  # what goes unsaid in a picture's name


class Table(NamedTuple):
    """What rows that differ in size and implementation have in common."""

    collective: str
    dtype: str
    op: str | None
    mode: str

    @property
    def title(self) -> str:
        """The table in words."""
        how = "in a CUDA graph" if self.mode == "graph" else "eager"
        return ", ".join(filter(None, (self.collective, self.op, self.dtype, how)))


@dataclass(frozen=True)
class Setup:
    """What one kind of host measured with one number of ranks: the newest report, and of equal rows the newest.

    capped: the rows with a cap on blocks, which are in no table by size
    under_torch: the newest report of `python -m bench.torch_backend`, if there is one
    """

    report: dict
    rows: list[dict]
    capped: list[dict]
    under_torch: dict | None

    @property
    def title(self) -> str:
        """Where and when, in words."""
        return f"{self.report['host']}; {self.report['world']} ranks; {self.report['date'][:10]}"

    def tables(self) -> list[Table]:
        """The tables that have rows of tdccl: Gloo is timed eagerly whatever tdccl is."""
        return list(dict.fromkeys(_table_of(row) for row in self.rows if row["impl"] == "tdccl"))

    def points(self, table: Table) -> dict[int, dict[str, dict]]:
        """{bytes: {one of COLUMNS: row}} by size, all in place or none: as the peers' are."""
        rows = [row for row in self.rows if _table_of(row) == table]
        in_place = _as_peers(rows)
        found: dict[int, dict[str, dict]] = {}
        # A peer's rows on plain buffers come last, and so they count if there are any.
        for row in sorted(rows, key=lambda row: row["placement"] == "plain"):
            if row["in_place"] is in_place:
                column = row["placement"] if row["impl"] == "tdccl" else row["impl"]
                found.setdefault(row["bytes"], {})[column] = row
        return dict(sorted(found.items()))

    def by_blocks(self) -> dict[tuple[Table, str], dict[int, dict]]:
        """{(table, placement): {cap: row}} at the table's largest size with a cap; in place as `points` has it."""
        found: dict[tuple[Table, str], dict[int, dict]] = {}
        for table in dict.fromkeys(map(_table_of, self.capped)):
            in_place = _as_peers([row for row in (*self.rows, *self.capped) if _table_of(row) == table])
            rows = [row for row in self.capped if _table_of(row) == table and row["in_place"] is in_place]
            largest = max((row["bytes"] for row in rows), default=0)
            for row in sorted(rows, key=lambda row: row["max_blocks"]):
                if row["bytes"] == largest:
                    found.setdefault((table, row["placement"]), {})[row["max_blocks"]] = row
        return found

    def picture(self, table: Table) -> str:
        """The file name of the picture in which the table is drawn; modes share one."""
        return self._file(table.collective, table.op, table.dtype)

    def blocks_picture(self, table: Table) -> str:
        """The file name of the picture of bandwidth against blocks that has the table; collectives share one."""
        return self._file("blocks", table.op, table.dtype, table.mode)

    def _file(self, subject: str, *details: str | None) -> str:
        unusual = [detail for detail in details if detail and detail not in _USUAL]
        return "-".join((_place(self.report), subject, *unusual)) + ".png"


def setups(reports: Iterable[dict]) -> list[Setup]:
    """The reports by kind of host and number of ranks; each row says in "run" which run it is of."""
    latest: dict[tuple, dict] = {}
    rows: dict[tuple, dict[tuple, dict]] = defaultdict(dict)
    under_torch: dict[tuple, dict] = {}
    # The others have tables of their own.
    measured = [report for report in reports if report.get("rows") or report.get("figures")]
    for report in sorted(measured, key=lambda report: report["date"]):
        kind = report["host"], report["world"]
        if report["rows"] or kind not in latest:
            latest[kind] = report
        if report.get("figures"):
            under_torch[kind] = report
        for row in report["rows"]:
            row = {"max_blocks": None, **row, "run": report["date"]}  # older reports have no caps
            rows[kind][tuple(row[name] for name in _KEY)] = row
    return [_setup(report, list(rows[kind].values()), under_torch.get(kind)) for kind, report in latest.items()]


def newest(reports: Iterable[dict], kind: str) -> Iterable[dict]:
    """The newest report with rows under `kind` for each kind of host, number of ranks and set of fused operators."""
    found = {}
    for report in sorted((report for report in reports if kind in report), key=lambda report: report["date"]):
        operators = sorted({row.get("operator", "") for row in report[kind]})
        found[report["host"], report["world"], tuple(operators)] = report
    return found.values()


def read(paths: Iterable[Path]) -> list[dict]:
    """The reports in files that `python -m bench ... -J FILE` and `python -m bench.faults -J FILE` wrote. Raises
    ValueError, naming the file, where there is none or it holds something else."""
    return [_read(path) for path in paths]


def _read(path: Path) -> dict:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(report, dict) or "host" not in report:
        raise ValueError(f"{path} is no report of the bench; its -J FILE writes them")
    return report


def overlap_picture(report: dict) -> str:
    """The file name of the picture of what fused operators gain on the report's kind of host."""
    return f"{_place(report)}-overlap.png"


def size(nbytes: float) -> str:
    """Bytes in words: 64 KiB."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.4g} {unit}"
    return f"{nbytes:g} B"


def _place(report: dict) -> str:
    return f"{report['world']}x{_model(report['gpu'])}"


def _model(gpu: str | None) -> str:
    """The word that tells a GPU from others of its maker: H200, MI300X."""
    word = re.search(r"\w*\d\w*", gpu or "")
    return word[0] if word else "GPU" if gpu else "CPU"


def _setup(report: dict, rows: list[dict], under_torch: dict | None) -> Setup:
    capped = [row for row in rows if row["max_blocks"] is not None]
    return Setup(report, [row for row in rows if row["max_blocks"] is None], capped, under_torch)


def _as_peers(rows: list[dict]) -> bool:
    """Whether a table's rows are compared in place: as the peers' are, else only where nothing is out of place."""
    theirs = {row["in_place"] for row in rows if row["impl"] != "tdccl"}
    return max(theirs) if theirs else min((row["in_place"] for row in rows), default=False)


def _table_of(row: dict) -> Table:
    return Table(row["collective"], row["dtype"], row["op"], row["mode"])
