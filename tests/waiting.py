"""How test bodies wait for their ranks, and what these have to be told where one does not come."""

import pytest
import torch

import tdccl


def settle(comm):
    """Waits for this rank's work, and raises what went wrong in it."""
    if comm.device.type == "cuda":
        torch.cuda.synchronize()
    comm.check()


def settle_all(comm):
    """As `settle`, and waits for the others to be done with looking at their buffers."""
    if comm.device.type == "cuda":
        torch.cuda.synchronize()
    comm._bootstrap.barrier()
    comm.check()


def check_told(comm, name: str, prepare) -> None:
    """All ranks call once, then all but rank 0 again: these are told, within the timeout.

    name: new for each use. prepare(group) gives the call on that communicator.
    """
    group = tdccl.Communicator(comm._bootstrap.subgroup([*range(comm.size)], name), comm.device, 2.0)
    call = prepare(group)
    call()  # all have come once: the memory is there
    if comm.rank:
        with pytest.raises(tdccl.TdcclError):
            call()
            settle(group)
    comm._bootstrap.barrier()
    group.destroy()
