"""The few blocks that push a shard to the peers, beside the kernel that consumes what the peers push."""

import torch

from tdccl import environment
from tdccl.communicator import Communicator

# Few, for the computation takes longer than they do. It leaves them their multiprocessors, so that they run whichever
# of the two comes first.
PUSHERS = 8
PUSH_WARPS = 8
PIECE = PUSH_WARPS * 32 * 16 * 8


def pushers(comm: Communicator) -> int:
    """How many blocks push."""
    if comm.size == 1:
        return 0
    return 1 if environment.emulated() else PUSHERS


def piece() -> int:
    """Elements that a pusher has in flight: 16 times 16 bytes a thread, so that few blocks fill the link."""
    return 1024 if environment.emulated() else PIECE


_sides: dict[torch.device, "torch.cuda.Stream"] = {}


def beside(device: torch.device, push, compute) -> None:
    """Runs `push` on a stream of its own, as soon as the current one has come here, and `compute` on the current one,
    which then waits for both."""
    if device.type != "cuda":
        push()
        compute()
        return
    if device not in _sides:
        _sides[device] = torch.cuda.Stream(device, priority=-1)
    side, current = _sides[device], torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        push()
    compute()
    current.wait_stream(side)
