"""Copy engines as producers: they move rows to peers while the multiprocessors compute.

A copy's places are fixed when a graph is captured. So there is one buffer where kernels have two in turns, and no rank
copies before all have begun the call, when their last product is over: they `meet`. Nor can a copy write the epoch of
its call: it copies the word in which `meet` has left it.
"""

import concurrent.futures
import contextlib
import ctypes

import torch
import triton
import triton.language as tl

import tdccl.language as shmem
from tdccl import environment
from tdccl.communicator import Communicator
from tdccl.language.team import DEAD
from tdccl.overlap.workspace import Workspace
from tdccl.runtime.launch import keyed

# Copies are for shards of so many bytes: the signal behind each piece costs a copy engine some 2 us.
LEAST_BYTES = 2500 if environment.emulated() else 4 << 20
COPIERS = 1  # the multiprocessor for what copies wait with


@triton.jit
def meet(team, starts, epoch):
    """One block. Advances `epoch` (*i64) to this call's, and waits until all ranks have begun it.

    starts:   Symmetric, int64 [size], a word a rank.
    Ordering: release and acquire at sys scope: what peers did before this call is over.
    """
    now = tl.load(epoch) + 1
    ranks = tl.arange(0, shmem.MAX_RANKS)
    peers = (ranks < team.size) & (ranks != team.rank)
    words = tl.load(starts.bases + ranks, mask=peers, other=0) + starts.offset + 8 * team.rank
    value = tl.full([shmem.MAX_RANKS], 0, tl.int64) + now
    shmem.fence()
    tl.atomic_xchg(words.to(tl.pointer_type(tl.int64)), value, mask=peers, sem="release", scope="sys")
    own = shmem.symm_at(starts, team.rank, tl.int64, 8) + ranks
    go = shmem.wait_counters(team, own, value, peers, shmem.USER, now)
    tl.store(epoch, tl.where(go, now, now - DEAD))  # a copy of a past epoch passes for nothing


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["told"])
def await_tiles(team, told, tiles, epoch):
    """One block. Waits until a product has told of so many tiles at `told` (*i64), and sets that back to zero.

    Ordering: acquire at sys scope, block barrier; what follows on the stream sees the tiles.
    """
    seen = shmem.signal_wait(team, told, tiles, team.rank)
    if seen < tiles:
        tl.store(epoch, tl.load(epoch) - DEAD)
    tl.store(told, tl.full([], 0, tl.int64))


class Copies:
    """What one call copies, on the stream that is current when a method is called.

    space   the call's workspace, made with `copied`
    """

    def __init__(self, comm: Communicator, space: Workspace):
        self.comm, self.space = comm, space
        if not space.loaded:  # as a call that copies nothing, because later a product would wait for what is loaded
            with torch.cuda.device(comm.device) if comm.device.type == "cuda" else contextlib.nullcontext():
                self.meet()
                self.await_tiles(0, 0, 0)
                space.epochs += 1
            space.loaded = True
        self._targets = comm.addresses_of(space.buffer)
        self._signals = comm.addresses_of(space.signals)

    def meet(self) -> None:
        """Returns, on the stream, when all ranks have begun the call."""
        keyed(meet)[(1,)](self.comm.team, self.space.starts_on_all_ranks, self.space.epoch, num_warps=1)

    def await_tiles(self, owner: int, piece: int, tiles: int) -> None:
        """Returns, on the stream, when a product has told of all tiles of a piece of the owner's rows."""
        keyed(await_tiles)[(1,)](self.comm.team, self.space.told[owner, piece:], tiles, self.space.epoch, num_warps=1)

    def send(self, pe: int, source: torch.Tensor, first: int, piece: int) -> None:
        """Copies a contiguous tensor to element `first` of the buffer of rank `pe`, then tells it of that piece."""
        target = self._targets[pe] + first * source.itemsize
        _copy(target, source.data_ptr(), source.numel() * source.itemsize, self.comm.device)
        word = self._signals[pe] + 8 * (self.comm.rank * self.space.most + piece)
        _copy(word, self.space.epoch.data_ptr(), 8, self.comm.device)


def _copy(target: int, source: int, nbytes: int, device: torch.device) -> None:
    if device.type != "cuda":
        ctypes.memmove(target, source, nbytes)
        return
    from cuda.bindings import runtime

    from tdccl.transport.p2p import check

    kind, stream = runtime.cudaMemcpyKind.cudaMemcpyDefault, torch.cuda.current_stream(device).cuda_stream
    check(runtime.cudaMemcpyAsync(target, source, nbytes, kind, stream), "cudaMemcpyAsync")


_sides: dict[tuple[torch.device, int], "torch.cuda.Stream"] = {}


def side_of(current: "torch.cuda.Stream") -> "torch.cuda.Stream":
    """The stream beside this one: what waits on it holds up nothing that other streams have there."""
    place = current.device, current.cuda_stream
    if place not in _sides:
        _sides[place] = torch.cuda.Stream(current.device, priority=-1)
    return _sides[place]


def beside(device: torch.device, moving, computing, moving_first: bool) -> None:
    """Calls `moving` on a stream of its own, from where the current one stands now, and `computing` on the current one,
    which then waits for both. In emulation a stream is a thread.

    A kernel is loaded only when nothing runs: what may have to be loaded must not come after what waits for it.
    """
    if device.type != "cuda":
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            moved = thread.submit(moving)
            computing()
        moved.result()
        return
    current = torch.cuda.current_stream(device)
    side = side_of(current)
    side.wait_stream(current)

    def on_side():
        with torch.cuda.stream(side):
            moving()

    try:
        for launch in (on_side, computing) if moving_first else (computing, on_side):
            launch()
    finally:
        current.wait_stream(side)
