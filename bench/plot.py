"""Pictures from the bench's JSON: `python -m bench.plot bench/results/*.json [--folder bench/plots]`."""

import argparse
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator
from PIL import Image

from bench import reading
from bench.collectives import COLLECTIVES
from bench.reading import COLUMNS, PICTURES, Setup, Table

_PANELS = {"time_us": "time, us", "busbw": "bus bandwidth, GB/s"}
_LOOKS = {  # colours of Okabe and Ito's palette: the colour-blind tell them apart too
    "plain": {"color": "#0072B2", "marker": "o"},
    "symmetric": {"color": "#009E73", "marker": "s"},
    "nccl": {"color": "#D55E00", "marker": "^"},
    "symm": {"color": "#CC79A7", "marker": "D"},
    "gloo": {"color": "#000000", "marker": "v"},
}
_COLLECTIVES = dict(zip(COLLECTIVES, _LOOKS.values(), strict=True))  # where each has a line
_MAIN = {"linewidth": 1.6, "markersize": 4.5}
_ASIDE = {"linewidth": 0.9, "markersize": 3, "linestyle": "--"}


def main() -> None:
    """Writes one picture a collective and number of ranks, one of bandwidth against blocks, one of fused operators."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="written by `python -m bench ... -J FILE`")
    parser.add_argument("--folder", type=Path, default=PICTURES, help=f"where pictures go (default {PICTURES})")
    options = parser.parse_args()
    try:
        draw(reading.read(options.files), options.folder)
    except ValueError as error:
        parser.error(str(error))


def draw(reports: Iterable[dict], folder: Path) -> None:
    """Writes the reports' pictures into the folder; the same reports make the same bytes."""
    pictures = figures(reports)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        drawn = io.BytesIO()
        picture.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
        # 64 colours are a third of the bytes, and pictures stay in the repository.
        Image.open(drawn).convert("RGB").quantize(64).save(folder / name, optimize=True)


def figures(reports: Iterable[dict]) -> dict[str, Figure]:
    """{file name: picture}. Raises ValueError if two kinds of host would be drawn under one name."""
    reports, found = list(reports), {}
    for setup in reading.setups(reports):
        tables = sorted(setup.tables(), key=lambda table: table.mode == "graph")  # the last of one name counts
        shared = {setup.picture(table): table for table in tables}
        pictures = {name: figure(setup, table) for name, table in shared.items()} | _blocks_figures(setup)
        if taken := found.keys() & pictures.keys():
            raise ValueError(f"{min(taken)} would show {setup.title}, and another host too: draw them in two folders")
        found |= pictures
    return found | _overlap_figures(reports)


def _overlap_figures(reports: list[dict]) -> dict[str, Figure]:
    """{file name: picture of how many times faster fused operators are}, one a kind of host."""
    rows: dict[str, list[dict]] = defaultdict(list)
    for kind in ("fused", "attention"):
        for report in reading.newest(reports, kind):
            rows[reading.overlap_picture(report)] += [row for row in report[kind] if _gain(row)]
    return {name: overlap_figure(listed) for name, listed in rows.items() if listed}


def _gain(row: dict) -> float | None:
    """How many times faster a fused operator is than what it is measured beside, the fastest of several."""
    return min(row["speedup_over"].values()) if "speedup_over" in row else row.get("speedup")


def overlap_figure(rows: list[dict]) -> Figure:
    """A bar a row: its speedup over torch with its peer one after the other, beside the most that hiding can give."""
    picture = Figure(figsize=(9, 1 + 0.2 * len(rows)), layout="constrained")
    axes = picture.subplots()
    case = [row.get("mlp") or row["name"] for row in rows]
    few = [f", {row['tokens']} tokens" if "mlp" in row else "" for row in rows]
    places = range(len(rows), 0, -1)
    axes.barh(places, [*map(_gain, rows)], color=_LOOKS["plain"]["color"], height=0.7, label="measured")
    bounds = [(row["ideal"], place) for row, place in zip(rows, places) if "ideal" in row]
    axes.scatter(*zip(*bounds), color=_LOOKS["nccl"]["color"], marker="|", s=60, label="all hidden, same kernels")
    names = [f"{row['operator']}, {of}{tokens}" for row, of, tokens in zip(rows, case, few)]
    axes.set_yticks(places, names, fontsize=7)
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.set_title("times faster than torch, one after the other", fontsize=9)
    axes.grid(color="0.9", linewidth=0.6, axis="x")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)
    return picture


def figure(setup: Setup, table: Table) -> Figure:
    """Time and bus bandwidth of the table against size; eager calls aside, if the table is not of these."""
    picture = Figure(figsize=(9, 4), layout="constrained")
    picture.suptitle(f"{table.title}\n{setup.title}", fontsize=10)
    panels = dict(zip(_PANELS, picture.subplots(1, len(_PANELS))))
    lines = [*_lines(setup, table, _MAIN)]
    if table.mode != "eager":
        lines += _lines(setup, table._replace(mode="eager"), _ASIDE, ", eager")
    for field, axes in panels.items():
        for rows, look in lines:
            axes.plot([row["bytes"] for row in rows], [row[field] for row in rows], **look)
        _dress(axes, _PANELS[field])
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(base=32 if high / low > 1024 else 2))  # 1 KiB, 32 KiB, 1 MiB
        axes.xaxis.set_major_formatter(lambda nbytes, _: reading.size(nbytes))
    times = panels["time_us"]
    times.set_yscale("log")
    times.yaxis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_formatter(LogFormatter())
    times.tick_params(which="both", labelsize=8)
    times.legend(fontsize=8)
    return picture


def blocks_figure(setup: Setup, lines: dict[tuple[Table, str], dict[int, dict]]) -> Figure:
    """Bus bandwidth against the largest grid, one line a collective and placement."""
    picture = Figure(figsize=(9, 4), layout="constrained")
    axes = picture.subplots()
    for (table, placement), rows in lines.items():
        dashed = placement == "symmetric"
        look = {**_COLLECTIVES[table.collective], **_MAIN, "linestyle": "--" if dashed else "-"}
        label = f"{table.collective} symmetric" if dashed else table.collective
        axes.plot([*rows], [row["busbw"] for row in rows.values()], **look, label=label)
    table = max((table for table, _ in lines), key=lambda table: table.op or "")  # one with an op, if there is one
    picture.suptitle(f"{table._replace(collective='bus bandwidth by blocks').title}\n{setup.title}", fontsize=10)
    sizes = dict.fromkeys(reading.size(row["bytes"]) for rows in lines.values() for row in rows.values())
    _dress(axes, f"bus bandwidth at {' or '.join(sizes)}, GB/s")
    axes.set_xlabel("blocks, at most", fontsize=8)
    caps = sorted(set().union(*lines.values()))
    axes.set_xticks(caps, map(str, caps))
    axes.set_ylim(bottom=0)
    picture.legend(fontsize=8, loc="outside right center")
    return picture


def _blocks_figures(setup: Setup) -> dict[str, Figure]:
    """{file name: picture of bandwidth against blocks}: what differs in op, dtype or mode lies apart."""
    lines: dict[str, dict] = defaultdict(dict)
    for (table, placement), rows in setup.by_blocks().items():
        lines[setup.blocks_picture(table)][table, placement] = rows
    return {name: blocks_figure(setup, shared) for name, shared in lines.items()}


def _lines(setup: Setup, table: Table, look: dict, remark: str = "") -> Iterator[tuple[list[dict], dict]]:
    """(rows by size, look) of each implementation that the table has."""
    points = setup.points(table).values()
    for column, name in COLUMNS.items():
        if rows := [row[column] for row in points if column in row]:
            yield rows, {**_LOOKS[column], **look, "label": name + remark}


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
