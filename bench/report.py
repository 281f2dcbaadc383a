"""Markdown tables from the bench's JSON: `python -m bench.report results/*.json [--readme README.md]`."""

import argparse
import json
from pathlib import Path

_BEGIN, _END = "<!-- bench:begin -->", "<!-- bench:end -->"


def main() -> None:
    """Prints the tables, or puts them between the markers of a README."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="written by `python -m bench ... -J FILE`")
    parser.add_argument("--readme", type=Path, help=f"replace what stands between {_BEGIN} and {_END} in this file")
    options = parser.parse_args()
    text = markdown([json.loads(path.read_text()) for path in options.files])
    if options.readme is None:
        print(text)
        return
    try:
        options.readme.write_text(replaced(options.readme.read_text(), text))
    except ValueError as error:
        parser.error(f"{options.readme}: {error}")


def replaced(document: str, text: str) -> str:
    """The document with `text` between the markers. Raises ValueError unless both are there once, in order."""
    before, begin, rest = document.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end or _BEGIN in rest or _END in after:
        raise ValueError(f"expected {_BEGIN} and, after it, {_END}, each once")
    return f"{before}{_BEGIN}\n\n{text}\n\n{_END}{after}"


def markdown(reports: list[dict]) -> str:
    """All tables: for each kind of host and number of ranks, the collectives by size and then the bandwidths."""
    sections = {}
    for report in sorted(reports, key=lambda report: report["date"]):  # of equal rows the newest counts
        found = sections.setdefault((report["host"], report["world"]), {"report": report, "rows": {}})
        found["report"] = report
        for row in report["rows"]:
            found["rows"][tuple(row[name] for name in _KEY)] = {**row, "run": report["date"]}
    return "\n\n".join(_section(found["report"], list(found["rows"].values())) for found in sections.values())


_COLUMNS = ("plain", "symmetric", "nccl")
_KEY = ("collective", "bytes", "dtype", "op", "mode", "placement", "in_place", "impl")


def _section(report: dict, rows: list[dict]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    parts = [f"{report['host']}; {report['world']} ranks; {versions}; {report['date'][:10]}"]
    # Gloo is timed eagerly whatever tdccl is, so what a table holds goes by tdccl's rows.
    tables = {_table_of(row): None for row in rows if row["impl"] == "tdccl"}
    points = {table: _points(table, rows) for table in tables}
    parts += [f"**{_title(table)}**\n\n{_by_size(points[table])}" for table in tables]
    return "\n\n".join([*parts, f"**busbw at the largest size, GB/s**\n\n{_bandwidths(points)}"])


def _table_of(row: dict) -> tuple:
    return row["collective"], row["dtype"], row["op"], row["mode"]


def _title(table: tuple) -> str:
    collective, dtype, op, mode = table
    how = "in a CUDA graph" if mode == "graph" else "eager"
    return ", ".join(filter(None, (collective, op, dtype, how)))


def _points(table: tuple, rows: list[dict]) -> dict[int, dict[str, dict]]:
    """{bytes: {"plain", "symmetric", "nccl": row}} of one table, all in place or none: as NCCL's are."""
    rows = [row for row in rows if _table_of(row) == table]
    as_nccl = {row["in_place"] for row in rows if row["impl"] == "nccl"}
    in_place = max(as_nccl) if as_nccl else min(row["in_place"] for row in rows)
    found: dict[int, dict[str, dict]] = {}
    for row in rows:
        if row["in_place"] is not in_place or row["impl"] not in ("tdccl", "nccl"):
            continue
        column = row["placement"] if row["impl"] == "tdccl" else "nccl"
        if column == "nccl" and row["placement"] == "symmetric":
            found.setdefault(row["bytes"], {}).setdefault(column, row)  # NCCL's on plain buffers count, if there are
        else:
            found.setdefault(row["bytes"], {})[column] = row
    return dict(sorted(found.items()))


def _by_size(points: dict[int, dict[str, dict]]) -> str:
    lines = []
    for nbytes, row in points.items():
        times = [row[column]["time_us"] if column in row else None for column in _COLUMNS]
        lines.append([_size(nbytes), *map(_figure, times), _ratio(row)])
    return _grid(["size", "tdccl, us", "tdccl symmetric, us", "NCCL, us", "NCCL / tdccl"], lines)


def _ratio(row: dict[str, dict]) -> str:
    """NCCL's time over tdccl's on plain buffers, or symmetric ones if that is all; only of one and the same run."""
    ours, nccl = row.get("plain") or row.get("symmetric"), row.get("nccl")
    if ours is None or nccl is None or ours["run"] != nccl["run"]:
        return ""
    return f"{nccl['time_us'] / ours['time_us']:.2f}"


def _bandwidths(points: dict[tuple, dict[int, dict[str, dict]]]) -> str:
    lines = []
    for table, sizes in points.items():
        nbytes, row = max(sizes.items())
        busbw = [row[column]["busbw"] if column in row else None for column in _COLUMNS]
        lines.append([_title(table), _size(nbytes), *map(_figure, busbw)])
    return _grid(["", "size", "tdccl", "tdccl symmetric", "NCCL"], lines)


def _grid(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def _figure(value: float | None) -> str:
    """Three significant digits, more only before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _size(nbytes: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.4g} {unit}"
    return f"{nbytes} B"


if __name__ == "__main__":
    main()
