"""Tiles of products: in which shape of tiles a product of a size that was measured on a kind of GPU was the fastest.

A table is measured by `python -m tdccl.tune products`. Rules of the operators decide where it has nothing near, and how
high tiles are everywhere: signals and memory go by that. What else ranks must cut alike follows from the sizes of a
product that all of them share, not from the layout of an operand, in which they may differ.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Products whose rows are many or few (`gemm_all_reduce`), and of an expert's rows, as many as it has on average.
KINDS = ("many", "few", "grouped")
# What was measured counts for products of up to so many times more, or fewer, rows, columns and depth.
NEAR = 4
_MOST_KNOWN = 1 << 14  # answers that are kept, so that a call takes one look
_SHARED_BYTES = 227 << 10  # that a block of sm_90 can have
_BARRIER_BYTES = 8  # of that, for each step in flight
_MOST_SUMS = 1 << 15  # of a tile: as many as half of a block's registers; by more some shapes do not compile
_MOST_WARPS = 32
_GROUPED_DEPTH = 64  # a longer step would reach into the next expert's rows


class Shape(NamedTuple):
    """Rows and columns of a tile of the result, the depth of a step, steps in flight, warps of a block, and how many
    tiles below each other are computed before the next column of tiles, to share what they load in the L2 cache."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    group: int


class Row(NamedTuple):
    """The fastest shape for [rows, depth] times [depth, columns] of 16-bit floats; transposed: of the right operand
    columns lie after columns."""

    kind: str
    rows: int
    columns: int
    depth: int
    transposed: bool
    shape: Shape

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.rows, self.columns, self.depth

    @property
    def cut(self) -> tuple[int, int, int]:
        """What ranks must have alike."""
        return self.shape.rows, self.shape.columns, self.shape.group


@dataclass(frozen=True)
class Products:
    """Rows of a table; source says in words where they come from."""

    source: str
    rows: tuple[Row, ...] = ()
    _known: dict = field(default_factory=dict, compare=False, repr=False)

    def shape(
        self, kind: str, rows: int, columns: int, depth: int, transposed: bool, rule: Shape, shared: bool = True
    ) -> Shape:
        """What was measured at the nearest sizes, with tiles as high as the rule's; the rule where nothing is near.

        shared: whether `depth` is the same on all ranks. Else only rows and columns decide how they cut.
        """
        if not self.rows:
            return rule
        asked = (kind, rows, columns, depth, transposed, rule, shared)
        found = self._known.get(asked)
        if found is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            found = self._known[asked] = self._nearest(*asked)
        return found

    def _nearest(
        self, kind: str, rows: int, columns: int, depth: int, transposed: bool, rule: Shape, shared: bool
    ) -> Shape:
        def apart(row: Row) -> list[float]:
            return [abs(math.log(there / asked)) for there, asked in zip(row.sizes, (rows, columns, depth))]

        deciding = 3 if shared else 2  # of a row's sizes
        near = [
            row
            for row in self.rows
            if row.kind == kind
            and row.shape.rows == rule.rows
            and row.shape.columns < 2 * columns
            and max(apart(row)[:deciding]) <= math.log(NEAR)
        ]
        if not shared and near:
            _, nearest = min((sum(apart(row)[:2]), row.sizes[:2]) for row in near)
            near = [row for row in near if row.sizes[:2] == nearest]
            cut = Counter(row.cut for row in near).most_common(1)[0][0]
            near = [row for row in near if row.cut == cut]
        ranked = [(sum(apart(row)), row.sizes, row.transposed != transposed, row.shape) for row in near]
        return min(ranked)[-1] if ranked else rule

    def digest(self) -> str:
        """Equal on two ranks exactly if they decide alike."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()[:16]


def parse(made: dict[str, Any], source: str) -> Products:
    """The products in a table's JSON. Raises ValueError, KeyError or TypeError if they are none."""
    rows = tuple(_row(**row) for row in made["products"])
    found: dict[tuple, Row] = {}
    for row in rows:
        other = found.setdefault((row.kind, *row.sizes), row)
        if other is not row and (other.transposed == row.transposed or other.cut != row.cut):
            raise ValueError(
                f"{row.kind}, {row.sizes}: expected one row for each layout, with tiles of as many rows and columns "
                "and in equal groups, for ranks may have different layouts"
            )
    return Products(source, rows)


def _row(kind: str, rows: int, columns: int, depth: int, transposed: bool, shape: dict[str, int], **_: Any) -> Row:
    if kind not in KINDS:
        raise ValueError(f"{kind!r}: expected a product of {', '.join(KINDS)}")
    if not isinstance(transposed, bool):
        raise TypeError(f"transposed: {transposed!r} is neither true nor false")
    found = Shape(**shape)
    numbers = {"rows": rows, "columns": columns, "depth": depth}
    for name, value in [*numbers.items(), *found._asdict().items()]:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: {value!r} is not a whole number above 0")
    for name in ("rows", "columns", "depth", "warps"):
        value = getattr(found, name)
        if value & (value - 1) or (name != "warps" and value < 16):
            raise ValueError(f"{name} of a shape: {value} is not a power of two that tensor cores take")
    if found.warps > _MOST_WARPS:
        raise ValueError(f"warps: {found.warps} is more than the {_MOST_WARPS} that a block can have")
    if kind == "grouped" and found.depth > _GROUPED_DEPTH:
        raise ValueError(f"depth: {found.depth} is more than the {_GROUPED_DEPTH} of a grouped product")
    if (sums := found.rows * found.columns) > _MOST_SUMS:
        raise ValueError(f"{found}: a tile has {sums} sums, a block has registers for {_MOST_SUMS}")
    if (needed := shared_bytes(found) + _BARRIER_BYTES * found.stages) > _SHARED_BYTES:
        raise ValueError(f"{found}: takes {needed} bytes of shared memory, a block has {_SHARED_BYTES}")
    return Row(kind, rows, columns, depth, transposed, found)


def shared_bytes(shape: Shape) -> int:
    """What the steps in flight take."""
    return (shape.rows + shape.columns) * shape.depth * 2 * shape.stages
