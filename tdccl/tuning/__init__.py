"""Which algorithm at which size, in which shape: rules, the tables that override them, and where a table comes from."""

from tdccl.tuning.products import Products, Shape
from tdccl.tuning.rules import BESIDE_COMPUTATION, EMULATION, GPU, LITTLE_SCRATCH, Rules
from tdccl.tuning.table import EMULATED, Row, Table, products_for, table_for

__all__ = [
    "BESIDE_COMPUTATION", "EMULATED", "EMULATION", "GPU", "LITTLE_SCRATCH", "Products", "Row", "Rules", "Shape",
    "Table", "products_for", "table_for",
]  # fmt: skip
