"""The few blocks that push a shard to the peers, beside the kernel that consumes what the peers push."""

from tdccl import environment
from tdccl.communicator import Communicator
from tdccl.errors import ArgumentError

# Few, for the computation takes longer than they do. It leaves them their multiprocessors, so that they run whichever
# of the two comes first.
PUSHERS = 8
PUSH_WARPS = 8
PIECE = PUSH_WARPS * 32 * 16 * 8


def few_of(comm: Communicator, most: int) -> int:
    """How many blocks the smaller of two kernels has that run side by side: `most`, if half of the multiprocessors that
    this rank may count on are as many."""
    return max(1, min(most, comm.multiprocessors // 2))


def left_by(operator: str, comm: Communicator, few: int) -> int:
    """How many blocks compute beside so few others. Raises ArgumentError, on all ranks alike, where none is left."""
    left = comm.multiprocessors - few
    if left < 1:
        raise ArgumentError(
            f"{operator}: a rank has {comm.multiprocessors} multiprocessor of its GPU, expected one that communicates "
            "and one that computes; let fewer ranks share the GPU, or call the product and the collective one after "
            "the other"
        )
    return left


def pushers(comm: Communicator) -> int:
    """How many blocks push."""
    if comm.size == 1:
        return 0
    return few_of(comm, 1 if environment.emulated() else PUSHERS)


def in_flight() -> int:
    """Elements that a pusher has in flight: 16 times 16 bytes a thread, so that few blocks fill the link."""
    return 1024 if environment.emulated() else PIECE
