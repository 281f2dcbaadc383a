"""Whose memory can be reached, and how. Knows nothing of collectives."""

import torch

from tdccl.environment import emulated
from tdccl.transport.bootstrap import Bootstrap
from tdccl.transport.control import Control
from tdccl.transport.symmetric_memory import Region, Regions, SymmetricMemory

__all__ = ["Bootstrap", "Control", "Region", "Regions", "SymmetricMemory", "allocate"]


def allocate(bootstrap: Bootstrap, nbytes: int, device: torch.device) -> SymmetricMemory:
    """Symmetric memory of `nbytes` zeroed bytes a rank, by whatever connects these ranks; collective."""
    if emulated():
        from tdccl.transport import host as provider
    else:
        from tdccl.transport import p2p as provider
    return provider.allocate(bootstrap, nbytes, device)
