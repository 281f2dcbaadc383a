"""Whose memory can be reached, and how. Knows nothing of collectives."""

import torch

from tdccl.environment import emulated
from tdccl.transport.bootstrap import Bootstrap
from tdccl.transport.control import Control
from tdccl.transport.multicast import Multicast, multicast_between
from tdccl.transport.symmetric_memory import Region, Regions, SymmetricMemory

__all__ = [
    "Bootstrap",
    "Control",
    "Multicast",
    "Region",
    "Regions",
    "SymmetricMemory",
    "allocate",
    "multicast_between",
]


def allocate(bootstrap: Bootstrap, nbytes: int, device: torch.device, multicast: Multicast) -> SymmetricMemory:
    """Symmetric memory of `nbytes` zeroed bytes a rank, by whatever connects these ranks; collective."""
    if emulated():
        from tdccl.transport import host as provider
    elif multicast.kind == "switch":
        from tdccl.transport import multicast as provider
    else:
        from tdccl.transport import p2p as provider
    return provider.allocate(bootstrap, nbytes, device)
