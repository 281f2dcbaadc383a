"""tdccl: collective communication for GPUs in Python, on stock Triton."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Loaded on first use: `import torch` loads this package by its entry point, and must stay light.
_HOMES = {
    "init": "tdccl.communicator",
    "Communicator": "tdccl.communicator",
    "Explanation": "tdccl.communicator",
    "symmetric": "tdccl.symmetric_allocation",
    "shrink": "tdccl.process_group",
    "TdcclError": "tdccl.errors",
    "ArgumentError": "tdccl.errors",
    "Mismatch": "tdccl.errors",
    "InitError": "tdccl.errors",
    "DestroyedError": "tdccl.errors",
    "Timeout": "tdccl.errors",
    "Aborted": "tdccl.errors",
    "PeerFailure": "tdccl.errors",
}
__all__ = [*_HOMES]

if TYPE_CHECKING:
    from tdccl.communicator import Communicator, Explanation, init
    from tdccl.errors import (
        Aborted,
        ArgumentError,
        DestroyedError,
        InitError,
        Mismatch,
        PeerFailure,
        TdcclError,
        Timeout,
    )
    from tdccl.process_group import shrink
    from tdccl.symmetric_allocation import symmetric


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tdccl' has no attribute {name!r}")
