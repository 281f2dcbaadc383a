"""Memory that exists on every rank of a group and that every rank can address."""

from collections.abc import Callable

import torch

from tdccl.transport.bootstrap import Bootstrap


class SymmetricMemory:
    """One segment a rank, all of the same size, each mapped by all ranks.

    local      this rank's segment, a uint8 tensor
    addresses  every rank's segment as this process sees it
    peers      the same as an int64 tensor on the device: the table that kernels read
    multicast  address through which all segments are written at once, or 0
    """

    def __init__(self, local: torch.Tensor, addresses: list[int], release: Callable[[Bootstrap | None], None]):
        self.local = local
        self.addresses = addresses
        self.peers = torch.tensor(addresses, dtype=torch.int64, device=local.device)
        self.multicast = 0
        self._release = release

    @property
    def address(self) -> int:
        return self.local.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.local.numel()

    def contains(self, address: int, nbytes: int) -> bool:
        """Whether the bytes at `address` lie within this rank's segment."""
        start = address - self.address
        return start >= 0 and start + nbytes <= self.nbytes

    def release(self, bootstrap: Bootstrap | None) -> None:
        """Unmaps the peers' segments and frees this rank's; no kernel may use them any more.

        Collective over `bootstrap`; None after a failure, when peers cannot be asked: then what a peer may still have
        mapped is left to the end of the process.
        """
        release, self._release = self._release, lambda bootstrap: None
        release(bootstrap)
