"""`with tdccl.symmetric():` whole models in symmetric memory."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from tdccl import communicator
from tdccl.communicator import Communicator
from tdccl.errors import ArgumentError


@contextlib.contextmanager
def symmetric(comm: Any = None) -> Iterator[None]:
    """What torch allocates inside the block lies in symmetric memory of `comm`: its collectives copy nothing.

    comm: a Communicator, or a process group of backend "tdccl"; None: torch's default process group if its backend
    is "tdccl", else the communicator that `tdccl.init` made last, of those not destroyed.

    Collective: all ranks make tensors of the same sizes in the same order inside it. It takes new tensors on the
    communicator's device that operators of this thread return: factories, copies, `.to()`, and so a module's
    parameters and buffers. Their memory is not reused before the communicator is destroyed, and cannot be resized
    (`untyped_storage().resize_()` raises). Tensors stay valid after that, and are plain.

    Raises ArgumentError: no communicator found, or, on every rank, the ranks' tensors differ, or another rank has
    left the block by an exception. In the last two cases, and in the rank whose exception it was, the tensors made
    inside the block are usable, but are not symmetric memory.
    """
    with _communicator_of(comm).placing():
        yield


def _communicator_of(comm: Any) -> Communicator:
    if comm is None:
        comm = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if not _is_ours(comm):
            comm = communicator.latest()
    if comm is None:
        raise ArgumentError(
            "symmetric: no communicator; call tdccl.init or dist.init_process_group('tdccl') first, or give one"
        )
    if _is_ours(comm):
        return comm.communicator
    if not isinstance(comm, Communicator):
        raise ArgumentError(
            f"symmetric: comm is {comm!r}, expected a Communicator, a process group of backend 'tdccl', or None"
        )
    return comm


def _is_ours(group: Any) -> bool:
    """Whether it is a process group of backend "tdccl"."""
    if not isinstance(group, dist.ProcessGroup):
        return False
    from tdccl.process_group import ProcessGroup

    return isinstance(group, ProcessGroup)
