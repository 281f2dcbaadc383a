"""Markdown tables from the bench's JSON: `python -m bench.report results/*.json [--readme README.md]`."""

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

from bench import model_error, reading
from bench.reading import COLUMNS, PICTURES, Setup, Table

_COLUMNS = ("plain", "symmetric", "nccl")


def main() -> None:
    """Prints the tables, or puts them between the markers of a README."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="written by `python -m bench ... -J FILE` or bench.faults")
    parser.add_argument("--readme", type=Path, help=f"replace what stands between {_marks('bench')} in this file, and "
                        "likewise for faults, ep, fused, attention and nodes, if there are files for them")  # fmt: skip
    options = parser.parse_args()
    try:
        reports = reading.read(options.files)
    except ValueError as error:
        parser.error(str(error))
    beside = options.readme and options.readme.parent
    texts = {"bench": markdown(reports, beside), "faults": faults(reports)}
    texts |= {"ep": expert_parallel(reports), "fused": fused(reports, beside), "attention": attention(reports)}
    texts["nodes"] = across_nodes(reports)
    texts = {name: text for name, text in texts.items() if text}
    if options.readme is None:
        print("\n\n".join(texts.values()))
        return
    document = options.readme.read_text()
    try:
        for name, text in texts.items():
            document = replaced(document, text, name)
    except ValueError as error:
        parser.error(f"{options.readme}: {error}")
    options.readme.write_text(document)


def _marks(name: str) -> str:
    return f"<!-- {name}:begin --> and <!-- {name}:end -->"


def replaced(document: str, text: str, name: str = "bench") -> str:
    """The document with `text` between the markers of that name. Raises ValueError unless both are there once, in
    order."""
    begin, end = _marks(name).split(" and ")
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in after:
        raise ValueError(f"expected {_marks(name)}, each once")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def markdown(reports: Iterable[dict], beside: Path | None = None) -> str:
    """All tables: for each kind of host and number of ranks, the collectives by size, the bandwidths, and
    then these against the number of blocks.

    beside: the folder of a document that is to show the pictures that `python -m bench.plot` put there.
    """
    return "\n\n".join(_section(setup, beside) for setup in reading.setups(reports))


def faults(reports: Iterable[dict]) -> str:
    """For each kind of host and number of ranks the newest table of faults, "" if there is none."""
    return "\n\n".join(map(_faults, reading.newest(reports, "faults")))


def expert_parallel(reports: Iterable[dict]) -> str:
    """Likewise, the times of dispatch and combine, and of what does the same."""
    return "\n\n".join(map(_expert_parallel, reading.newest(reports, "ep")))


def fused(reports: Iterable[dict], beside: Path | None = None) -> str:
    """Likewise, the times of products fused with communication, and of their parts; `beside` as in `markdown`."""
    newest = reading.newest(reports, "fused")
    pictures = dict.fromkeys(map(reading.overlap_picture, newest))
    shown = [line for name in pictures for line in _shows("fused operators", name, beside)]
    return "\n\n".join([*map(_fused, newest), *shown])


def attention(reports: Iterable[dict]) -> str:
    """Likewise, the times of attention over all ranks' keys, and of what does the same."""
    return "\n\n".join(map(_attention, reading.newest(reports, "attention")))


def across_nodes(reports: Iterable[dict]) -> str:
    """Likewise, the times of each algorithm across nodes."""
    return "\n\n".join(map(_across_nodes, reading.newest(reports, "nodes")))


def _title(report: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    return f"{report['host']}; {report['world']} ranks; {report['date'][:10]}; {versions}"


def _expert_parallel(report: dict) -> str:
    parts = [_title(report)]
    for shape in dict.fromkeys(row["shape"] for row in report["ep"]):
        rows = [row for row in report["ep"] if row["shape"] == shape]
        tokens = sorted({row["tokens"] for row in rows})
        times = {(row["impl"], row["what"], row["tokens"]): row["time_us"] for row in rows}
        lines = []
        for impl, what in dict.fromkeys((row["impl"], row["what"]) for row in rows):
            of_what = (times.get((impl, what, count)) for count in tokens)
            lines.append(
                [f"{COLUMNS.get(impl, impl)}: {what}", *("" if time is None else _figure(time) for time in of_what)]
            )
        hidden, top_k, experts = shape.split("/")
        head = f"hidden {hidden}, top-{top_k} of {experts}, {rows[0]['mode']}; us with tokens a rank of"
        parts.append(_grid([head, *map(str, tokens)], lines))
    return "\n\n".join(parts)


def _fused(report: dict) -> str:
    names = list(dict.fromkeys(name for row in report["fused"] for name in row["times_us"]))
    lines = []
    for row in report["fused"]:
        times = (_figure(row["times_us"][name]) if name in row["times_us"] else "" for name in names)
        gains = (f"{row[name]:.2f}" if name in row else "" for name in ("speedup", "ideal"))  # not of torch's own
        lines.append([f"{row['operator']}, {row['mlp']}, {row['tokens']}", *times, *gains])
    head = ["us, by model and tokens", *names, "speedup", "of at most"]
    return f"{_title(report)}\n\n" + _grid(head, lines)


def _attention(report: dict) -> str:
    parts = [_title(report)]
    for operator in dict.fromkeys(row["operator"] for row in report["attention"]):
        rows = [row for row in report["attention"] if row["operator"] == operator]
        lines = [
            [way, *(_figure(row["times_us"][way]) if way in row["times_us"] else "" for row in rows)]
            for way in dict.fromkeys(way for row in rows for way in row["times_us"])
        ]
        parts.append(_grid([f"{operator}, us", *(row.get("name", row.get("mlp")) for row in rows)], lines))
    return "\n\n".join(parts)


def _across_nodes(report: dict) -> str:
    times: dict[tuple, dict[str, float]] = {}
    for row in report["nodes"]:
        if row["dtype"] == "bfloat16" and row["in_place"] == (row["collective"] == "broadcast"):  # always in place
            times.setdefault((row["collective"], row["algorithm"], row["bytes"]), {})[row["mode"]] = row["time_us"]
    compared = model_error.compare(report)
    for point, microseconds in zip(compared.points, compared.predicted) if compared else ():
        times[point.collective, point.algorithm, point.nbytes]["model"] = microseconds
    lines = [
        [f"{collective}, {algorithm}", reading.size(nbytes)]
        + [_figure(by_mode[mode]) if mode in by_mode else "" for mode in ("eager", "graph", "model")]
        for (collective, algorithm, nbytes), by_mode in times.items()
    ]
    head = ["bfloat16", "size", "eager, us", "in a CUDA graph, us", "by the model, us"]
    return "\n\n".join([_title(report), _grid(head, lines), *([compared.summary()] if compared else [])])


def _faults(report: dict) -> str:
    lines = []
    for row in report["faults"]:
        beyond = [each - row["waited_s"] for each in row["seconds"]]
        least, most = (f"{each:.2g}" for each in (min(beyond, default=0), max(beyond, default=0)))
        seconds = least if least == most else f"{least} to {most}"
        after = f"{row['waited_s']:g} + {seconds}" if row["waited_s"] else seconds
        lines.append([row["fault"], row["error"] or "nothing", after if beyond else ""])
    return f"{_title(report)}\n\n" + _grid(["fault", "what the others see", "after, s"], lines)


def _section(setup: Setup, beside: Path | None) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in setup.report["versions"].items() if version)
    parts = [f"{setup.title}; {versions}"]
    points = {table: _shown(setup.points(table)) for table in setup.tables()}
    for table, by_size in points.items():
        parts += [f"**{table.title}**", *_picture(setup, table, beside), _by_size(by_size)]
    if points:
        parts += ["**busbw at the largest size, GB/s**", _bandwidths(points)]
    return "\n\n".join(parts + _blocks(setup, beside) + _under_torch(setup.under_torch))


def _shown(points: dict[int, dict[str, dict]]) -> dict[int, dict[str, dict]]:
    """Less the sizes at which there is but Gloo, which has no column."""
    return {nbytes: row for nbytes, row in points.items() if row.keys() - {"gloo"}}


def _picture(setup: Setup, table: Table, beside: Path | None) -> list[str]:
    """The line that shows the table's picture; it holds the eager calls too, so once is enough."""
    return _shows(table.collective, setup.picture(table), beside) if table.mode == "graph" else []


def _shows(title: str, name: str, beside: Path | None) -> list[str]:
    """The line that shows the picture of that name, if it is there."""
    path = PICTURES / name
    return [f"![{title}]({path.as_posix()})"] if beside is not None and (beside / path).exists() else []


def _by_size(points: dict[int, dict[str, dict]]) -> str:
    columns = _columns(points.values())
    lines = []
    for nbytes, row in points.items():
        lines.append([reading.size(nbytes), *_figures(row, columns, "time_us"), _ratio(row)])
    return _grid(["size", *(f"{COLUMNS[column]}, us" for column in columns), "NCCL / tdccl"], lines)


def _columns(rows: Iterable[dict[str, dict]]) -> list[str]:
    """tdccl's and NCCL's, and that of torch's symmetric memory where it was measured: it has but the all_reduce."""
    return [*_COLUMNS, "symm"] if any("symm" in row for row in rows) else [*_COLUMNS]


def _ratio(row: dict[str, dict]) -> str:
    """NCCL's time over tdccl's on plain buffers, or symmetric ones if that is all; only of one and the same run."""
    ours, nccl = row.get("plain") or row.get("symmetric"), row.get("nccl")
    if ours is None or nccl is None or ours["run"] != nccl["run"]:
        return ""
    return f"{nccl['time_us'] / ours['time_us']:.2f}"


def _bandwidths(points: dict[Table, dict[int, dict[str, dict]]]) -> str:
    largest = {table: max(by_size.items()) for table, by_size in points.items()}
    columns = _columns(row for _, row in largest.values())
    lines = []
    for table, (nbytes, row) in largest.items():
        lines.append([table.title, reading.size(nbytes), *_figures(row, columns, "busbw")])
    return _grid(["", "size", *(COLUMNS[column] for column in columns)], lines)


def _blocks(setup: Setup, beside: Path | None) -> list[str]:
    """What there is of bandwidth against the number of blocks: pictures and one table."""
    found = setup.by_blocks()
    if not found:
        return []
    caps = sorted(set().union(*found.values()))
    lines = []
    for (table, placement), rows in found.items():
        size = reading.size(next(iter(rows.values()))["bytes"])
        lines.append([f"{table.title}, {placement}", size, *_shares(rows, caps)])
    names = dict.fromkeys(setup.blocks_picture(table) for table, _ in found)
    pictures = itertools.chain(*(_shows("busbw by blocks", name, beside) for name in names))
    title = "**busbw with at most so many blocks, GB/s and per cent of the row's best**"
    return [title, *pictures, _grid(["", "size", *map(str, caps)], lines)]


def _under_torch(report: dict | None) -> list[str]:
    """What was measured of torch.distributed on tdccl and its peers."""
    if report is None:
        return []
    figures = report["figures"]
    backends = list(dict.fromkeys(figure["impl"] for figure in figures))
    by_what: dict[str, dict[str, dict]] = {}
    for figure in figures:
        by_what.setdefault(f"{figure['what']}, {figure['unit']}", {})[figure["impl"]] = figure
    lines = [[what, *_figures(row, backends, "value")] for what, row in by_what.items()]
    return [
        f"**under torch.distributed, {report['date'][:10]}**",
        _grid(["", *(COLUMNS.get(name, name) for name in backends)], lines),
    ]


def _shares(rows: dict[int, dict], caps: list[int]) -> list[str]:
    best = max(row["busbw"] for row in rows.values())
    return [f"{_figure(rows[cap]['busbw'])} ({rows[cap]['busbw'] / best:.0%})" if cap in rows else "" for cap in caps]


def _figures(row: dict[str, dict], columns: list[str], field: str) -> list[str]:
    return [_figure(row[column][field]) if column in row else "" for column in columns]


def _grid(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def _figure(value: float) -> str:
    """Three significant digits, more only before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
