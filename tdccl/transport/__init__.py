"""Whose memory can be reached, and how. Knows nothing of collectives."""

import torch

from tdccl.environment import emulated
from tdccl.transport.bootstrap import Bootstrap
from tdccl.transport.control import Control
from tdccl.transport.multicast import Multicast, multicast_between
from tdccl.transport.symmetric_memory import Region, Regions, SymmetricMemory
from tdccl.transport.topology import Topology, place_of, topology_of

__all__ = [
    "Bootstrap",
    "Control",
    "Multicast",
    "Region",
    "Regions",
    "SymmetricMemory",
    "Topology",
    "allocate",
    "allocate_across",
    "multicast_between",
    "place_of",
    "topology_of",
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


def allocate_across(bootstrap: Bootstrap, nbytes: int, device: torch.device) -> tuple[SymmetricMemory, list[int]]:
    """(`nbytes` zeroed bytes a rank, which NVSHMEM's calls reach from other nodes; each rank's PE); collective."""
    if emulated():
        from tdccl.transport import network as provider
    else:
        from tdccl.transport import nvshmem as provider
    return provider.allocate(bootstrap, nbytes, device)
