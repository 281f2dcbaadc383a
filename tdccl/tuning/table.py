"""Tables: for each collective and placement, which algorithm and shape is the fastest up to which size.

A table is measured by `python -m tdccl.tune` for one kind of GPU and one number of ranks. Where there is none, the
cost model that is fitted to all measured tables makes one (`tdccl.tuning.model`). Tables of products' tiles lie beside
them (`tdccl.tuning.products`).
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from tdccl import environment
from tdccl.errors import InitError
from tdccl.tuning import products
from tdccl.tuning.products import Products
from tdccl.tuning.rules import Rules

_FOLDER = Path(__file__).parent / "tables"
EMULATED = "emulation"  # in place of the name of a GPU
PLACEMENTS = ("plain", "symmetric")
# Those that say how large the heap is cannot change from call to call.
_POWERS = {"packet_tile", "packet_warps", "warps", "tile", "small_tile"}
_LEAST = {"tile": 16, "small_tile": 16}  # bytes: two of the largest elements
_MOST_WARPS = 32
_CHANGEABLE = {field.name for field in fields(Rules)} - {"heap_blocks", "packets", "rings", "channels", "slot_bytes"}


class Row(NamedTuple):
    """Up to `upto` bytes (None: any number) take `algorithm`, with `changes` of the rules."""

    upto: int | None
    algorithm: str
    changes: dict[str, int]


Rows = dict[str, dict[str, list[Row]]]  # {collective: {placement: rows by growing size}}


@dataclass(frozen=True)
class Table:
    """rows; in their place, for grids of at most so many blocks, `capped`; source says in words where all come from."""

    source: str
    rows: Rows
    capped: dict[int, Rows] = field(default_factory=dict)

    def row(self, collective: str, placement: str, nbytes: int, blocks: int | None = None) -> Row | None:
        """The row for a chunk (or message) of `nbytes` on at most `blocks` blocks (None: any number), or None if the
        table knows nothing of such calls."""
        caps = [cap for cap in self.capped if blocks is not None and blocks <= cap]
        section = self.capped[min(caps)] if caps else self.rows
        rows = section.get(collective, {}).get(placement, ())
        return next((row for row in rows if row.upto is None or nbytes <= row.upto), None)

    def algorithms(self, collective: str) -> set[str]:
        """Names of all that it may choose."""
        sections = (self.rows, *self.capped.values())
        return {row.algorithm for section in sections for rows in section.get(collective, {}).values() for row in rows}

    def digest(self) -> str:
        """Equal on two ranks exactly if they decide alike."""
        return hashlib.sha256(json.dumps([self.rows, self.capped], sort_keys=True).encode()).hexdigest()[:16]


# (collective, algorithm, bytes of a chunk, ranks) -> bytes that the busiest rank sends
Sent = Callable[[str, str, int, int], float]


def table_for(gpu: str, world: int, multicast: bool, sent: Sent) -> Table:
    """The table for this kind of GPU, or for "emulation", and number of ranks, with multicast between them or without;
    `sent` is for the cost model.

    In order: one of `TDCCL_TUNING`, one of the package, one that the cost model makes. Where none was measured with
    multicast, the model adds to the one without.
    Raises InitError for a file of TDCCL_TUNING that is not a table.
    """
    for path, made in _made("rows", package_files()):
        alike = gpu == EMULATED or made.get("multicast", False) == multicast
        if made["gpu"] == gpu and made["world"] == world and alike:
            return parse(made, f"measured on {world} x {gpu} ({Path(path).name})")
    if gpu == EMULATED:
        return parse(json.loads((_FOLDER / "emulation.json").read_text()), EMULATED)
    from tdccl.tuning import model  # needs numpy, and only here

    if multicast:
        return model.with_multicast(table_for(gpu, world, False, sent), world, sent)
    return model.table(gpu, world, sent)


def products_for(gpu: str) -> Products:
    """The products measured on this kind of GPU, or in "emulation": in TDCCL_TUNING, or in the package; else none.
    Raises InitError for a file of TDCCL_TUNING that is not a table."""
    for path, made in _made("products", sorted(_FOLDER.glob("*-products.json"))):
        if made["gpu"] == gpu:
            return products.parse(made, f"measured on {gpu} ({Path(path).name})")
    return Products("by rule, for nothing was measured")


def _made(section: str, package: list[Path]) -> Iterable[tuple[str | Path, dict[str, Any]]]:
    """Paths and contents of the tables that have that section: those of TDCCL_TUNING, then these of the package."""
    given = [(path, read(path)) for path in environment.tuning_tables()]
    ours = [(path, json.loads(path.read_text())) for path in package]
    return [*(each for each in given if section in each[1]), *ours]


def merged(rows: Iterable[Row]) -> list[Row]:
    """Rows of growing size without those that their successor also covers; the last is for any size."""
    kept: list[Row] = []
    for row in rows:
        if kept and kept[-1][1:] == row[1:]:
            kept.pop()
        kept.append(row)
    return [*kept[:-1], kept[-1]._replace(upto=None)]


def package_files() -> list[Path]:
    """The measured tables that come with the package."""
    return sorted(_FOLDER.glob("*-[0-9].json"))


def read(path: str | Path) -> dict[str, Any]:
    """The JSON of a table of either kind, checked. Raises InitError if it cannot be read or is not a table."""
    try:
        made = json.loads(Path(path).read_text())
        if not isinstance(made["gpu"], str):
            raise TypeError("gpu must be a name")
        if "products" in made:
            products.parse(made, str(path))
        if "rows" in made or "products" not in made:
            parse(made, str(path))
            if not isinstance(made["world"], int):
                raise TypeError("world must be a number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InitError(f"{path} is no tuning table ({reason}); `python -m tdccl.tune` writes them") from error
    return made


def dumped(made: dict[str, Any]) -> str:
    """A table's JSON, one row and one measurement a line."""

    def lines(value: Any, depth: int) -> str:
        inner = value.values() if isinstance(value, dict) else value
        if depth == 0 or not any(isinstance(each, dict | list) for each in inner):
            return json.dumps(value)
        if isinstance(value, dict):
            listed = [
                f"{json.dumps(key)}: {lines(each, depth - 1) if isinstance(each, dict | list) else json.dumps(each)}"
                for key, each in value.items()
            ]
        else:
            listed = [json.dumps(each) for each in value]
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        return opening + "\n" + ",\n".join(listed) + "\n" + closing

    return lines(made, 5) + "\n"


def parse(made: dict[str, Any], source: str) -> Table:
    """The table in a table's JSON. Raises ValueError, KeyError or TypeError if it is not one."""
    return Table(source, _rows(made["rows"]), {int(cap): _rows(rows) for cap, rows in made.get("capped", {}).items()})


def _rows(made: dict[str, Any]) -> Rows:
    rows = {
        collective: {placement: [_row(row) for row in listed] for placement, listed in placements.items()}
        for collective, placements in made.items()
    }
    for collective, placements in rows.items():
        for placement, listed in placements.items():
            limits = [row.upto for row in listed]
            if limits and (limits.pop() is not None or limits != sorted(limits)):
                raise ValueError(f"{collective}, {placement}: rows go up to growing sizes, the last one to null")
    return rows


def _row(row: dict[str, Any]) -> Row:
    changes = dict(row.get("changes", {}))
    if unknown := changes.keys() - _CHANGEABLE:
        raise ValueError(f"{', '.join(sorted(unknown))}: a row may change {', '.join(sorted(_CHANGEABLE))}")
    for name, value in changes.items():
        if not isinstance(value, int) or value < (name != "whole_from"):
            raise ValueError(f"{name}: {value!r} is not a whole number above 0")
        if name in _POWERS and value & (value - 1):
            raise ValueError(f"{name}: {value} is not a power of two")
        if name in _LEAST and value < _LEAST[name]:
            raise ValueError(f"{name}: {value} is less than {_LEAST[name]}")
        if "warps" in name and value > _MOST_WARPS:
            raise ValueError(f"{name}: {value} is more than the {_MOST_WARPS} that a block can have")
    if changes.get("packet_tile", 1 << 30) < 32 * changes.get("packet_warps", 1):
        raise ValueError(f"{changes}: a block of packet_warps has more threads than packet_tile words")
    return Row(row["upto"], str(row["algorithm"]), changes)
