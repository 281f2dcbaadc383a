"""Which algorithm at which size, in which shape: rules, the tables that override them, and where a table comes from."""

from tdccl.tuning.rules import BESIDE_COMPUTATION, EMULATION, GPU, LITTLE_SCRATCH, Rules
from tdccl.tuning.table import EMULATED, Row, Table, table_for

__all__ = ["BESIDE_COMPUTATION", "EMULATED", "EMULATION", "GPU", "LITTLE_SCRATCH", "Row", "Rules", "Table", "table_for"]
