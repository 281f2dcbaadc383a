"""The direct API: `tdccl.init` makes a `Communicator`, whose methods are the collectives."""

import atexit
import contextlib
import ctypes
import functools
import math
import operator
import os
import socket
import sys
import threading
import time
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import profiler

from tdccl import __version__, environment, transport, tuning
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
from tdccl.runtime import agreement, arrays, bare, watcher
from tdccl.runtime.algorithm import Call, Context, context_of, team_of
from tdccl.runtime.arenas import Arenas
from tdccl.runtime.loans import Loans
from tdccl.runtime.plan import Choice, Plan, choose
from tdccl.runtime.recorder import PLAIN, ROOTED, Recorder, account, described, name_of, place_of, placed
from tdccl.transport.bootstrap import Bootstrap, StoreBootstrap, discover, open_store

layout = bare.read("tdccl.language.team")
ALGORITHMS = bare.read("tdccl.collectives").ALGORITHMS

if environment.emulated():
    import tdccl.runtime.emulation  # noqa: F401  before a user launches a kernel of his own

_announced = False
_made: list[weakref.ref] = []  # by `init`, in this order
_alive: weakref.WeakSet["Communicator"] = weakref.WeakSet()
_inherited: list["Communicator"] = []  # from the process that this one was forked from
_MOST_PLANS = 4096
_DESTROYED = "this communicator is destroyed; make a new one with tdccl.init"
_FORKED = "this communicator belongs to the process that this one was forked from; make a new one with tdccl.init"
_COMPARISON = 6  # a kind of wait that no kernel has: the ranks' comparison of their next calls


def init(
    mpi=None, *, store=None, rank=None, size=None, device=None, timeout: float = 600.0, max_blocks: int | None = None
) -> "Communicator":
    """Makes a communicator over all ranks; every rank calls it.

    mpi      an mpi4py communicator, or
    store    a torch.distributed Store, with `rank` and `size`, or
    nothing  TDCCL_INIT=tcp://host:port, torchrun's environment or mpirun's, in this order
    device   this rank's GPU; default: GPUs in the order of the ranks of this host
    timeout  seconds, for ranks to come and for every wait of a kernel
    max_blocks  the largest grid of a collective, to leave the other multiprocessors of a GPU to computation;
                default: TDCCL_MAX_BLOCKS, else what is fastest

    Raises InitError: ranks missing (named) or different, more than 8 ranks, several hosts, memory not shared.
    """
    communicator = Communicator(discover(mpi, store, rank, size, timeout), device, timeout, max_blocks)
    _made.append(weakref.ref(communicator, _made.remove))
    return communicator


def context_for(size: int, max_blocks: int | None = None, scratch: int | None = None) -> Context:
    """What algorithms know of a communicator of `size` ranks with so many bytes of scratch (None: as the environment
    says). Raises InitError if it is too small for them."""
    rules = _capped(tuning.EMULATION if environment.emulated() else tuning.GPU, max_blocks)
    scratch = scratch or environment.scratch_bytes()
    if scratch < tuning.LITTLE_SCRATCH and not environment.emulated():
        rules = replace(rules, packets=rules.packets // 4, channels=rules.channels // 4)  # leave some to the rings
    context = context_of(size, scratch, rules)
    if context.ring_bytes < 16 << 10:
        raise InitError(f"TDCCL_SCRATCH_MB={scratch >> 20} is too little for {size} ranks")
    return context


def table_for(gpu: str, size: int, multicast: bool = False) -> tuning.Table:
    """The tuning table for this GPU and number of ranks, with multicast between them or without. Raises InitError if it
    names what there is not."""

    def sent(collective: str, name: str, nbytes: int, ranks: int) -> float:
        return next(a for a in ALGORITHMS[collective] if a.name == name).sent(ranks) * nbytes

    table = tuning.table_for(gpu, size, multicast, sent)
    for collective in table.rows:
        known = [algorithm.name for algorithm in ALGORITHMS.get(collective, ())]
        if unknown := table.algorithms(collective) - {*known}:
            raise InitError(f"{table.source}: {collective} by {', '.join(unknown)}: expected {', '.join(known)}")
    return table


def latest() -> "Communicator | None":
    """The communicator that `init` made last, of those alive. Not by `split`: ranks may be in different parts."""
    alive = [communicator for made in _made if (communicator := made()) and not communicator._destroyed]
    return alive[-1] if alive else None


class Communicator:
    """Collectives over the ranks that made it together. A context manager: leaving it destroys it, and if it is by an
    exception, aborts it before.

    Arrays are torch tensors, CuPy arrays, or anything with DLPack or `__cuda_array_interface__`, contiguous, on
    this rank's device. Calls are asynchronous: work goes on `stream` (None: the framework's current one; an int;
    a torch or CuPy stream), and each of its waits may last `timeout` seconds (None: the communicator's). Every rank
    makes the same calls with the same sizes in the same order, and an array that lies in symmetric memory (`empty`,
    `tdccl.symmetric`, `register`) on one rank lies at the same place of it on all.

    All calls raise ArgumentError before anything is launched, DestroyedError after `destroy` and in a forked child;
    Timeout once a wait has lasted too long: longer than the communicator's timeout, or than `timeout` seconds of the
    call; PeerFailure once the process of another rank has ended; Aborted once some rank has called `abort`. Where ranks
    do not share a pid namespace, only a timeout tells of another's end. With TDCCL_DEBUG=1 collectives raise Mismatch
    before anything is launched where the ranks are about to make different ones.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        device: torch.device | str | int | None,
        timeout: float,
        max_blocks: int | None = None,
        scratch: int | None = None,
    ):
        _announce_emulation(bootstrap.rank)
        self.rank, self.size = bootstrap.rank, bootstrap.size
        self.timeout = timeout
        if self.size > layout.MAX_RANKS.value:
            raise InitError(f"{self.size} ranks: one communicator takes up to {layout.MAX_RANKS.value}")
        self._bootstrap = bootstrap
        self._emulated = environment.emulated()
        self._scratch = scratch
        self._debug = environment.debug()
        self._agree(device, max_blocks)
        self._plan_with(transport.multicast_between(bootstrap, self.device))
        self._control = transport.Control(bootstrap, pinned=not self._emulated)
        self._abort_word = self._control.abort
        self._dead: set[int] = set()
        self._destroyed = ""  # the words of the error, once it is
        self._dumped = False
        self._recorder = Recorder(bootstrap)
        self._end_watch = self._watch_peers()
        self._heap = self._allocate_heap()
        if self.multicast.kind == "switch" and not self._heap.multicast:
            self._plan_with(transport.Multicast(None, "the driver refused to make a multicast object"))
        self._segments: list[transport.SymmetricMemory] = []
        self._regions = transport.Regions()
        self._arenas = Arenas(bootstrap, self.device, self.multicast, self._segments, self._regions)
        self._loans = Loans(bootstrap, self.device, self.empty)
        self._plans: dict[Call, Plan] = {}
        self._calls: dict[tuple, tuple] = {}  # made before, on these very arrays,
        self._calls_on: Any = None  # and while symmetric memory was this
        self._lock = threading.RLock()
        self._streams: dict[Any, int] = {}  # where each lane's last call went
        self._splits = 0
        self._interpreting: list[int] = []  # threads, in emulation
        self._interpreted = threading.Condition()
        self._stop_word = ctypes.c_int64.from_address(self._heap.address + layout.STOP_BYTE.value)
        self._team = self._make_team()
        _alive.add(self)

    def _plan_with(self, multicast: transport.Multicast) -> None:
        """Lets algorithms and table know what the ranks have of multicast."""
        self.multicast = multicast
        self._context = self._context._replace(multicast=multicast)
        self.table = table_for(self.gpu, self.size, multicast.kind == "switch")

    def _agree(self, device, max_blocks: int | None) -> None:
        """Decides what calls depend on, and checks that all ranks fit together and will decide alike."""
        host = f"{socket.gethostname()}/{_boot_id()}"
        mine = {"tdccl": __version__, "emulated": self._emulated}
        error = None
        try:
            mine |= self._decide(device, max_blocks)
        except InitError as refused:  # told to the others, who would wait for this rank
            mine, error = {**mine, "error": str(refused)}, refused
        everyone = self._bootstrap.exchange((host, mine))
        if error is not None:
            raise error
        for rank, (other_host, other) in enumerate(everyone):
            if other != mine:
                raise InitError(f"rank {rank} has {other}, rank {self.rank} has {mine}: they must be equal")
            if other_host != host:
                raise InitError(f"rank {rank} is on host {other_host}, rank {self.rank} on {host}: one host only")

    def _decide(self, device, max_blocks: int | None) -> dict[str, Any]:
        """Sets what calls depend on; returns what of it must be equal on all ranks."""
        self._forced = _forced_algorithms()
        self.max_blocks = environment.most_blocks() if max_blocks is None else max_blocks
        self._context = context_for(self.size, self.max_blocks, self._scratch)
        self.device = _device(device, self.rank)
        self.gpu = tuning.EMULATED if self._emulated else torch.cuda.get_device_name(self.device)
        self.table = table_for(self.gpu, self.size)
        equal = {"scratch": self._context.ring_bytes, "TDCCL_ALGO": self._forced, "max_blocks": self.max_blocks}
        return {**equal, "debug": self._debug, "tuning": self.table.digest()}

    def _make_team(self) -> layout.Team:
        """What tdccl's own kernels get."""
        backend = "emulation" if environment.emulated() else "cuda"
        return team_of(self._context, backend)._replace(
            heap=self._heap.peers.data_ptr(),
            local=self._heap.address,
            rank=self.rank,
            control=self._control.words.data_ptr(),
            timeout=int(self.timeout * 1e9),
        )

    # ---- faults ------------------------------------------------------------------------------------

    def _watch_peers(self):
        """Has the deaths of the peers told to this communicator as long as it lives, and their faults end the waits of
        its bootstrap; returns what ends that."""
        this = weakref.ref(self)

        def interrupt():
            if communicator := this():
                communicator.raise_fault()

        self._bootstrap.interrupt = interrupt
        pids = [(rank, pid) for rank, pid in enumerate(self._control.pids) if pid not in (None, os.getpid())]
        watches = [watcher.watch(pid, functools.partial(_peer_died, this, rank)) for rank, pid in pids]
        return weakref.finalize(self, _end_watches, watches)

    def _allocate_heap(self) -> transport.SymmetricMemory:
        """Scratch; if a rank can get none, no other waits for it."""
        try:
            return self._allocate(layout.heap_bytes(team_of(self._context, "")))
        except BaseException as error:
            self._control.fail(layout.ABORTED, self.rank)
            self._end_watch()
            self._control.leave()
            if isinstance(error, Aborted | PeerFailure):
                raise InitError(f"rank {error.rank} could not get its scratch, or died: see what it says") from error
            raise

    def abort(self) -> None:
        """Ends the kernels of this communicator that are running, within 100 ms, here and on the other ranks; there and
        here later calls raise Aborted. From any thread; waits for nobody. `destroy` then frees what the rank has."""
        if not self._destroyed:
            self._control.fail(layout.ABORTED, self.rank)

    def shrink(self, exclude: list[int]) -> "Communicator":
        """A communicator of the ranks that are not in `exclude`, in their order; only these call it, all of them.

        It works after any fault, in the same processes, whether or not a store or MPI still does, because the ranks
        meet anew at a port of the first of them. This communicator is then destroyed: calls under way and those of
        excluded ranks that live raise Aborted. If it fails, it may be called again, to exclude more.

        Raises ArgumentError: not ranks, or this one among them; InitError: a rank did not come, or excludes others;
        PeerFailure: one that is not excluded has died.
        """
        store, members = self.meet(exclude)
        bootstrap = StoreBootstrap(store, members.index(self.rank), len(members), self.timeout, "tdccl/shrink")
        bootstrap.interrupt = functools.partial(self._check_alive, members)
        smaller = Communicator(bootstrap, self.device, self.timeout, self.max_blocks, self._scratch)
        self.destroy()
        return smaller

    def meet(self, exclude: list[int]) -> tuple[Any, list[int]]:
        """What `shrink` begins with: aborts, and returns a new Store among the ranks that are not in `exclude`, and
        those ranks. Raises as `shrink`."""
        members = survivors(self.rank, self.size, exclude)
        if self._destroyed:
            raise DestroyedError(self._destroyed)
        self.abort()
        mask, first = sum(1 << rank for rank in members), members[0]
        if self.rank == first:
            store = open_store("127.0.0.1", 0, True, self.timeout)
            self._control.announce(mask, store.port)
            return store, members
        deadline = time.monotonic() + self.timeout
        while not (port := self._control.announced(first, mask)):
            self._check_alive(members)
            if time.monotonic() > deadline:
                raise InitError(
                    f"shrink: rank {first} did not come within {self.timeout:g} s, or does not exclude just {exclude}"
                )
            time.sleep(1e-3)
        return open_store("127.0.0.1", port, False, self.timeout), members

    def _check_alive(self, members: list[int]) -> None:
        for rank in self._dead.intersection(members):
            raise PeerFailure(f"shrink: rank {rank} has died, too; exclude it as well", rank)

    @functools.cached_property
    def team(self):
        """First argument of users' own communicating kernels, a `tdccl.language.Team` (which imports Triton)."""
        import triton.language as tl

        from tdccl.language import Team

        plain = self._team
        addresses = {"heap": self._heap.peers, "local": self._heap.local.view(torch.int8)}
        addresses["control"] = self._control.words
        constants = {name: tl.constexpr(getattr(plain, name)) for name in plain._fields[5:]}
        return Team(**{**plain._asdict(), **addresses, **constants})

    # ---- collectives -------------------------------------------------------------------------------

    def all_reduce(
        self, send: Any, recv: Any = None, op: str = "sum", *, stream: Any = None, timeout: float | None = None
    ) -> Any:
        """recv = op over all ranks' `send`, the same bits on every rank; returns recv.

        send, recv: equal shape and dtype; recv may be send (in place); None makes a new one.
        op: sum, avg, min, max, prod (numbers); and, or, xor (integers, bool). 16-bit floats are accumulated in
        fp32, in rank order. An NVSwitch that adds (`explain` tells) does so in its own order, and rounds.
        """
        key = ("all_reduce", op, timeout, arrays.signature(send, recv))
        if self._again(key, stream):
            return recv
        source, target, result = self._pair("all_reduce", send, recv, lambda shape: shape)
        arrays.check_reduction("all_reduce", op, source.dtype)
        self._run("all_reduce", source, target, source.numel(), op=op, stream=stream, timeout=timeout, key=key)
        return result

    def all_gather(
        self,
        send: Any,
        recv: Any = None,
        recv_splits: list[int] | None = None,
        *,
        stream: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """recv = all ranks' `send`, one after another in rank order; returns recv.

        send: [d, ...], any dtype. recv: [size * d, ...], or any shape with size times as many elements; send
        may be this rank's piece of it (in place). recv_splits: how many rows each rank sends, if not all equally many;
        then recv: [sum(recv_splits), ...], and not in place.
        """
        if recv_splits is not None:
            return self._all_gather_uneven(send, recv, recv_splits, stream, timeout)
        key = ("all_gather", None, timeout, arrays.signature(send, recv))
        if self._again(key, stream):
            return recv
        source, target, result = self._pair("all_gather", send, recv, lambda shape: _scaled(shape, self.size))
        self._run("all_gather", source, target, source.numel(), stream=stream, timeout=timeout, key=key)
        return result

    def reduce_scatter(
        self, send: Any, recv: Any = None, op: str = "sum", *, stream: Any = None, timeout: float | None = None
    ) -> Any:
        """recv = op over all ranks' pieces of `send` that belong to this rank; returns recv.

        send: [size * d, ...], or any shape with size times the elements of recv. recv: [d, ...]; it may be this
        rank's piece of send (in place). op as in `all_reduce`.
        """

        key = ("reduce_scatter", op, timeout, arrays.signature(send, recv))
        if self._again(key, stream):
            return recv

        def shape_of_recv(shape):
            if not shape or shape[0] % self.size:
                raise ArgumentError(
                    f"reduce_scatter: send has shape {tuple(shape)}, its first dimension must be a multiple "
                    f"of the {self.size} ranks (or give recv)"
                )
            return (shape[0] // self.size, *shape[1:])

        source, target, result = self._pair("reduce_scatter", send, recv, shape_of_recv, shrinks=True)
        arrays.check_reduction("reduce_scatter", op, source.dtype)
        self._run("reduce_scatter", source, target, target.numel(), op=op, stream=stream, timeout=timeout, key=key)
        return result

    def broadcast(self, buf: Any, root: int = 0, *, stream: Any = None, timeout: float | None = None) -> Any:
        """`buf` of rank `root` ends in `buf` of all ranks; returns buf. Any shape and dtype."""
        key = ("broadcast", root, timeout, arrays.signature(buf, buf))
        if self._again(key, stream):
            return buf
        tensor = self._checked("broadcast", "buf", arrays.as_tensor(buf, "buf", written=True))
        root = self._checked_root("broadcast", root)
        if self.size > 1:
            self._run("broadcast", tensor, tensor, tensor.numel(), root=root, stream=stream, timeout=timeout, key=key)
        return buf

    def all_to_all(
        self,
        send: Any,
        recv: Any = None,
        send_splits: list[int] | None = None,
        recv_splits: list[int] | None = None,
        *,
        stream: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """Rank i's j-th piece of `send` becomes rank j's i-th piece of `recv`; returns recv.

        Pieces are cut along the first dimension: equal ones, or `send_splits` and `recv_splits` rows for each
        rank, where rank i's send_splits[j] is rank j's recv_splits[i]. recv may be send if all pieces are equal.
        """
        key = ("all_to_all", None, timeout, arrays.signature(send, recv))
        if send_splits is None and recv_splits is None and self._again(key, stream):
            return recv
        source = self._checked("all_to_all", "send", arrays.as_tensor(send, "send"))
        if (send_splits is None) != (recv_splits is None):
            raise ArgumentError("all_to_all: give both send_splits and recv_splits, or neither")
        if send_splits is None:
            source, target, result = self._pair("all_to_all", send, recv, lambda shape: shape)
            if source.numel() and (source.dim() == 0 or source.shape[0] % self.size):
                raise ArgumentError(
                    f"all_to_all: send has shape {tuple(source.shape)}, its first dimension must be a multiple of "
                    f"the {self.size} ranks (or give splits)"
                )
            self._run(
                "all_to_all", source, target, source.numel() // self.size, stream=stream, timeout=timeout, key=key
            )
            return result
        splits, row = self._row_splits(source, send_splits, recv_splits)
        shape = (sum(recv_splits), *source.shape[1:])
        source, target, result = self._pair("all_to_all", send, recv, lambda _: shape, expected=math.prod(shape))
        if _overlap(source, target):
            raise ArgumentError("all_to_all: recv overlaps send; in place it takes equal pieces only")
        splits = tuple(tuple(count * row for count in counts) for counts in splits)
        self._run("all_to_all", source, target, 0, splits=splits, stream=stream, timeout=timeout)
        return result

    def all_to_all_vdev(
        self,
        send: Any,
        recv: Any,
        send_splits: Any,
        recv_splits_offsets: Any,
        *,
        stream: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """all_to_all with splits that live on the device, read when the kernel runs; returns recv.

        The meaning is that of torch.ops.symm_mem.all_to_all_vdev, in any memory:
        send, recv: [rows, ...], rows of equal shape and dtype; recv has room for whatever may come.
        send_splits: int64 [size], rows of send for each rank, one after another.
        recv_splits_offsets: int64 [2, size], written: rows from each rank, and where in recv they begin.

        What is asked to be sent past the end of send is not sent. What does not fit into recv is not written, and
        recv_splits_offsets still tells of it.
        """
        tensors = {
            "send": arrays.as_tensor(send, "send"),
            "recv": arrays.as_tensor(recv, "recv", written=True),
            "send_splits": arrays.as_tensor(send_splits, "send_splits"),
            "recv_splits_offsets": arrays.as_tensor(recv_splits_offsets, "recv_splits_offsets", written=True),
        }
        source, target, splits, received = (self._checked("all_to_all_vdev", *each) for each in tensors.items())
        if source.dtype != target.dtype or not source.dim() or source.shape[1:] != target.shape[1:]:
            raise ArgumentError(
                f"all_to_all_vdev: send is {source.dtype} {tuple(source.shape)}, recv is {target.dtype} "
                f"{tuple(target.shape)}; expected rows of equal dtype and shape"
            )
        row = math.prod(source.shape[1:]) * source.itemsize
        if row == 0:
            raise ArgumentError(f"all_to_all_vdev: send has shape {tuple(source.shape)}: rows without elements")
        for name, count in (("send_splits", self.size), ("recv_splits_offsets", 2 * self.size)):
            if tensors[name].dtype is not torch.int64 or tensors[name].numel() != count:
                raise ArgumentError(
                    f"all_to_all_vdev: {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, expected int64 "
                    f"with {count} elements"
                )
        if _overlap(source, target):
            raise ArgumentError("all_to_all_vdev: recv overlaps send")
        sizes = (row, source.numel() * source.itemsize, target.numel() * target.itemsize)
        on_device = (splits.data_ptr(), received.data_ptr(), *sizes)
        self._run("all_to_all_vdev", source, target, 0, stream=stream, timeout=timeout, on_device=on_device)
        return recv

    def reduce(
        self,
        send: Any,
        recv: Any = None,
        op: str = "sum",
        root: int = 0,
        *,
        stream: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """recv of rank `root` = op over all ranks' `send`; the bits are those of `all_reduce`. Returns recv there, None
        elsewhere, where recv is not looked at. recv may be send; None makes a new one."""
        root = self._checked_root("reduce", root)
        if self.rank == root:
            source, target, result = self._pair("reduce", send, recv, lambda shape: shape)
        else:
            source = target = self._checked("reduce", "send", arrays.as_tensor(send, "send"))
            result = None
        arrays.check_reduction("reduce", op, source.dtype)
        self._run("reduce", source, target, source.numel(), op=op, root=root, stream=stream, timeout=timeout)
        return result

    def gather(
        self, send: Any, recv: Any = None, root: int = 0, *, stream: Any = None, timeout: float | None = None
    ) -> Any:
        """recv of rank `root` = all ranks' `send`, one after another; returns recv there, None elsewhere, where recv is
        not looked at. send: [d, ...]; recv: [size * d, ...], not overlapping send."""
        root = self._checked_root("gather", root)
        if self.rank == root:
            source, target, result = self._pair("gather", send, recv, lambda shape: _scaled(shape, self.size))
        else:
            source = target = self._checked("gather", "send", arrays.as_tensor(send, "send"))
            result = None
        self._move_by_root("gather", source, target, source.numel(), root, stream, timeout)
        return result

    def scatter(self, send: Any, recv: Any, root: int = 0, *, stream: Any = None, timeout: float | None = None) -> Any:
        """recv of rank i = piece i of rank root's `send`; returns recv. recv: [d, ...]; send: [size * d, ...] on rank
        `root`, not overlapping recv; elsewhere it is not looked at."""
        root = self._checked_root("scatter", root)
        if self.rank == root:
            source, target, _ = self._pair("scatter", send, recv, lambda shape: shape, shrinks=True)
        else:
            source = target = self._checked("scatter", "recv", arrays.as_tensor(recv, "recv", written=True))
        self._move_by_root("scatter", source, target, target.numel(), root, stream, timeout)
        return recv

    def _checked_root(self, collective: str, root: Any) -> int:
        if not hasattr(root, "__index__") or not 0 <= operator.index(root) < self.size:
            raise ArgumentError(f"{collective}: root is {root!r}, expected a rank from 0 to {self.size - 1}")
        return operator.index(root)

    def _move_by_root(self, collective: str, source, target, count: int, root: int, stream, timeout) -> None:
        """A gather or scatter of `count` elements a rank is an all_to_all in which most pieces are empty."""
        if source is not target and _overlap(source, target):
            raise ArgumentError(f"{collective}: recv overlaps send")
        one = tuple(count * (rank == root) for rank in range(self.size))
        everyone = (count * (self.rank == root),) * self.size
        splits = (one, everyone) if collective == "gather" else (everyone, one)
        self._run(
            "all_to_all", source, target, 0, root=root, splits=splits, stream=stream, timeout=timeout, called=collective
        )

    def _all_gather_uneven(self, send, recv, recv_splits, stream, timeout):
        counts = list(recv_splits)
        source = self._checked("all_gather", "send", arrays.as_tensor(send, "send"))
        if len(counts) != self.size or not all(hasattr(count, "__index__") and count >= 0 for count in counts):
            raise ArgumentError(f"all_gather: recv_splits is {counts}, expected {self.size} counts >= 0")
        rows = source.shape[0] if source.dim() else 1
        if counts[self.rank] != rows:
            raise ArgumentError(f"all_gather: send has {rows} rows, recv_splits says {counts[self.rank]} of this rank")
        row = math.prod(source.shape[1:])
        shape = (sum(counts), *source.shape[1:])
        source, target, result = self._pair("all_gather", send, recv, lambda _: shape, expected=math.prod(shape))
        if _overlap(source, target):
            raise ArgumentError("all_gather: recv overlaps send; in place it takes equal pieces only")
        splits = ((rows * row,) * self.size, tuple(operator.index(count) * row for count in counts))
        self._run("all_gather", source, target, 0, splits=splits, stream=stream, timeout=timeout)
        return result

    def barrier(self, *, stream: Any = None, timeout: float | None = None) -> None:
        """Work after it on `stream` starts only when all ranks' streams have come to theirs."""
        self.check()
        nothing = self._heap.local[:0]
        self._run("barrier", nothing, nothing, 0, stream=stream, timeout=timeout)

    # ---- messages between two ranks ----------------------------------------------------------------

    def send(self, send: Any, to: int, *, stream: Any = None, timeout: float | None = None) -> None:
        """Sends an array of any shape and dtype to rank `to`, which calls `recv` for as many bytes.

        Messages of one pair arrive in order. Only these two ranks take part; a large message waits for its receiver.
        """
        self.send_recv([(send, to)], [], stream=stream, timeout=timeout)

    def recv(self, recv: Any, source: int, *, stream: Any = None, timeout: float | None = None) -> Any:
        """Receives what rank `source` sends into `recv`; returns recv."""
        self.send_recv([], [(recv, source)], stream=stream, timeout=timeout)
        return recv

    def send_recv(
        self,
        sends: list[tuple[Any, int]],
        recvs: list[tuple[Any, int]],
        *,
        stream: Any = None,
        timeout: float | None = None,
    ) -> None:
        """Sends each array to its rank and receives each from its, all under way together, so that ranks may send to
        each other at once. The k-th message to a rank is the k-th that this rank receives from here."""
        out = self._messages("send", sends)
        into = self._messages("recv", recvs, written=True)
        local = zip(out.pop(self.rank, []), into.pop(self.rank, []))
        rounds = max(map(len, [*out.values(), *into.values()]), default=0)
        for source, target in local:
            if source.numel() * source.itemsize != target.numel() * target.itemsize:
                raise ArgumentError(f"send_recv: rank {self.rank} sends itself what it does not receive")
            with self._on(stream):
                target.view(-1).view(torch.uint8).copy_(source.view(-1).view(torch.uint8))
        for number in range(rounds):
            now = (
                {rank: listed[number] for rank, listed in each.items() if number < len(listed)} for each in (out, into)
            )
            self._transfer(*now, stream, timeout)

    def has_message_from(self, source: int) -> bool:
        """Whether a message of rank `source` has begun to arrive that no `recv` which has ended took."""
        self.check()
        start = layout.heap_bytes(team_of(self._context, "")._replace(channels=0))
        words = self._heap.local[start : start + 32 * layout.MAX_RANKS.value].view(torch.int64)
        _, received, arrived, _ = words.view(4, -1)[:, source].tolist()
        return arrived > received

    def _messages(self, name: str, listed, written: bool = False) -> dict[int, list[torch.Tensor]]:
        """The checked tensors of messages by the other rank, empty ones left out."""
        found: dict[int, list[torch.Tensor]] = {}
        for array, rank in listed:
            tensor = self._checked("send_recv", name, arrays.as_tensor(array, name, written=written))
            if not hasattr(rank, "__index__") or not 0 <= operator.index(rank) < self.size:
                raise ArgumentError(f"send_recv: the other rank is {rank!r}, expected one from 0 to {self.size - 1}")
            if tensor.numel():
                found.setdefault(operator.index(rank), []).append(tensor)
        return found

    def _transfer(self, out: dict[int, torch.Tensor], into: dict[int, torch.Tensor], stream, timeout) -> None:
        """Launches one round of messages, at most one to and one from each rank."""
        sizes = {id(tensor): tensor.numel() * tensor.itemsize for tensor in (*out.values(), *into.values())}
        low = functools.reduce(operator.or_, (t.data_ptr() | sizes[id(t)] for t in (*out.values(), *into.values())))
        alignment = min(16, low & -low)
        lanes = [("to", rank) for rank in out] + [("from", rank) for rank in into]
        # Lanes go on in threads of their own in emulation: each has a plan, so that none changes another's arguments.
        lane = lanes[0] if len(lanes) == 1 else None
        call = Call("send_recv", 0, "u8", None, 0, alignment, None, (lane, None), False, timeout=timeout)
        unit = min(8, alignment)

        def column(messages, value):
            return tuple(value(messages[rank]) if rank in messages else 0 for rank in range(self.size))

        with self._lock:
            launch = self._plan(call).launch
            for name, messages in (("send", out), ("recv", into)):
                launch.assign(f"{name}s", column(messages, torch.Tensor.data_ptr))
                launch.assign(f"{name}_counts", column(messages, lambda tensor: sizes[id(tensor)] // unit))
            what = self._described_messages(out, into, sum(sizes.values()))
            if not self._emulated:
                self._start(what, launch, 0, 0, stream, lanes, collectives=0)
                return
            index = self._recorder.note(what, 0, collectives=0)
        if profiler._is_profiler_enabled:
            launch = _shown(what, launch)
        self._interpret(
            launch, 0, 0
        )  # without the lock: it may wait for a peer that waits for another lane of this rank
        self._recorder.end(index)

    def _described_messages(self, out: dict[int, torch.Tensor], into: dict[int, torch.Tensor], nbytes: int) -> bytes:
        if len(out) + len(into) > 1:
            return described("send_recv", "transfer", torch.uint8, None, None, PLAIN, PLAIN, True, nbytes, nbytes)
        ((rank, tensor),) = (out or into).items()
        name = "send" if out else "recv"
        return described(name, "transfer", tensor.dtype, None, rank, PLAIN, PLAIN, True, tensor.numel(), nbytes)

    # ---- memory, groups, inspection ---------------------------------------------------------------

    def empty(self, shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor in symmetric memory, zeroed; collective, with the same size on all ranks.

        Collectives on it (or on views of it) take the zero-copy algorithms, until `destroy`.
        """
        self.check()
        shape = (shape,) if hasattr(shape, "__index__") else tuple(shape)
        if not isinstance(dtype, torch.dtype) or not all(hasattr(d, "__index__") and d >= 0 for d in shape):
            raise ArgumentError(
                f"empty: got shape {shape} and dtype {dtype}, expected whole numbers >= 0 and a torch.dtype"
            )
        nbytes = math.prod(shape) * dtype.itemsize
        sizes = self._bootstrap.exchange(nbytes)
        if len(set(sizes)) > 1:
            raise ArgumentError(f"empty: the ranks ask for different sizes in bytes: {sizes}")
        segment = self._allocate(max(16, nbytes))
        self._add(segment)
        return segment.local[:nbytes].view(dtype).view(shape)

    def lend(self, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Like `empty`, flat, with any content, and its memory is lent again when the tensor and its views are gone.

        All ranks make and free such tensors alike. They wait for each other where there is no free memory of that size,
        and in every 64th call, to compare where their tensors lay.

        Raises ArgumentError, on every rank: the sizes, or the places of earlier tensors, differ.
        """
        self.check()
        return self._loans.tensor(numel, dtype)

    def register(self, pool: "torch.cuda.MemPool") -> None:
        """Makes a torch memory pool symmetric memory: what it holds now, and tensors that go there later; collective.

            pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(pool):
                model = Model().cuda()
            comm.register(pool)

        All ranks make and free tensors of the same sizes in the pool, in the same order, now and later. Where it has
        grown since, register it again. The pool is kept until `destroy`; several communicators may register it.

        Raises ArgumentError, on all ranks and with nothing registered: the pools differ, or CUDA IPC cannot share
        them; and in emulation, which knows no pools.
        """
        self.check()
        if environment.emulated():
            raise ArgumentError(
                "register: memory pools are torch.cuda's, and this is emulation; tdccl.symmetric() works in both"
            )
        if not isinstance(pool, torch.cuda.MemPool):
            raise ArgumentError(f"register: pool is {type(pool).__name__}, expected a torch.cuda.MemPool")
        from tdccl.transport import p2p, pools

        segments = pools.segments_of(pool, self.device)
        pools.check_alike(self._bootstrap.exchange([segment.layout for segment in segments]))
        for segment in segments:
            address, nbytes = segment.address, segment.layout.nbytes
            if self._segment_of(address, nbytes) is None:
                self._add(p2p.share(self._bootstrap, address, nbytes, self.device, pool))

    def placing(self):
        """The context of `tdccl.symmetric(self)`."""
        self.check()
        return self._arenas.block()

    def _allocate(self, nbytes: int) -> transport.SymmetricMemory:
        return transport.allocate(self._bootstrap, nbytes, self.device, self.multicast)

    def _add(self, memory: transport.SymmetricMemory) -> None:
        self._segments.append(memory)
        self._regions.add(transport.Region(memory.address, memory.address + memory.nbytes, memory))

    def symmetric(self, tensor: torch.Tensor):
        """The kernel argument through which a kernel reaches all ranks' copies of a tensor in symmetric memory."""
        segment = None
        if isinstance(tensor, torch.Tensor):
            segment = self._segment_of(tensor.data_ptr(), tensor.numel() * tensor.itemsize)
        if segment is None:
            raise ArgumentError(
                "symmetric: expected a tensor in this communicator's symmetric memory: made by its empty(), under "
                "tdccl.symmetric(), or in a pool given to its register()"
            )
        from tdccl.language import Symmetric

        return Symmetric(segment.peers, tensor.data_ptr() - segment.address)

    def split(self, color: int | None, key: int = 0) -> "Communicator | None":
        """One new communicator for each color, ranks ordered by (key, rank); collective. None takes no part."""
        self.check()
        self._splits += 1
        everyone = self._bootstrap.exchange((color, key))
        if color is None:
            return None
        members = sorted(
            (rank for rank in range(self.size) if everyone[rank][0] == color),
            key=lambda rank: (everyone[rank][1], rank),
        )
        subgroup = self._bootstrap.subgroup(members, f"split{self._splits}/{color}")
        return Communicator(subgroup, self.device, self.timeout, self.max_blocks, self._scratch)

    def explain(self, collective: str, send: Any, recv: Any = None, op: str = "sum", root: int = 0) -> "Explanation":
        """Which algorithm, grid, workspace and path a call with these arrays would take, and why."""
        self.check()
        if collective not in ALGORITHMS:
            raise ArgumentError(f"explain: {collective!r} is not one of {', '.join(ALGORITHMS)}")
        source = self._checked(collective, "send", arrays.as_tensor(send, "send"))
        target = source if recv is None else self._checked(collective, "recv", arrays.as_tensor(recv, "recv"))
        chunk = {"reduce_scatter": target, "all_to_all": source}.get(collective, source)
        pieces = self.size if collective == "all_to_all" or (collective == "reduce_scatter" and recv is None) else 1
        reduces = "reduce" in collective
        if reduces:
            arrays.check_reduction(collective, op, source.dtype)
        call = self._call(collective, source, target, chunk.numel() // pieces, op if reduces else None, root, None)
        return Explanation(call, self._choose(call), self._heap.nbytes)

    def limit_blocks(self, max_blocks: int | None) -> None:
        """From the next call on a collective has at most so many blocks (None: as many as are fastest), to leave the
        other multiprocessors to computation; every rank has to be given the same. Raises ArgumentError below 1."""
        try:
            self._context = context_for(self.size, max_blocks, self._scratch)._replace(multicast=self.multicast)
        except InitError as error:
            raise ArgumentError(f"limit_blocks: {error}") from error
        self.max_blocks = max_blocks
        self._plans.clear()
        self._calls.clear()

    def use_table(self, table: tuning.Table) -> None:
        """Decides by another tuning table from the next call on; every rank has to be given the same."""
        self.table = table
        self._plans.clear()
        self._calls.clear()

    def check(self) -> None:
        """Raises DestroyedError after `destroy`, and Timeout, PeerFailure or Aborted after a fault; every call does
        this first. On a GPU a timeout shows when the kernel has ended: call it after a synchronisation."""
        if self._destroyed:
            raise DestroyedError(self._destroyed)
        self.raise_fault()

    def dump(self, folder: str | os.PathLike) -> str:
        """Writes the last 1024 calls of this rank, and of those of its peers that it can see, to a file in `folder`,
        which is made if need be; returns its path. `python -m tdccl.trace` reads it. Works after a failure too."""
        if self._destroyed:
            self.check()
        return str(self._recorder.dump(folder, None))

    def _dump_for(self, error: TdcclError) -> None:
        """Writes the last calls where TDCCL_TRACE_DIR says, once."""
        folder = environment.trace_folder()
        if folder and not self._dumped:
            self._dumped = True
            with contextlib.suppress(OSError):  # the error itself says more
                self._recorder.dump(folder, f"{type(error).__name__}: {error}")

    def raise_fault(self) -> None:
        """Raises Timeout, PeerFailure or Aborted after a fault, even if `destroy` has been called since."""
        if not self._abort_word.value:
            return
        error = self._fault()
        self._dump_for(error)
        raise error

    def _fault(self) -> TdcclError:
        """What the abort word and the record beside it say."""
        fault = dict(zip(layout.FAULT_FIELDS, self._control.words.tolist()))
        code, rank = fault["abort"] & 0xFF, fault["abort"] >> 8
        calls = account(self._recorder.histories())
        if code == layout.ABORTED:
            what = f"rank {rank} aborted this communicator; make a new one with tdccl.init or by its shrink()"
            return Aborted("\n  ".join([what, *calls]), rank)
        if code == layout.PEER_DIED:
            what = f"rank {rank} (pid {self._control.pids[rank]}) died; shrink(exclude=[{rank}]) goes on without it"
            return PeerFailure("\n  ".join([what, *calls]), rank)
        if code == layout.GRID_TOO_LARGE:
            blocks = self._context.rules.heap_blocks
            return TdcclError(
                f"a kernel was launched with more than team.blocks = {blocks} blocks; its results are wrong"
            )
        kinds = {0: "data", 1: "result", 2: "barrier", 3: "a user's signal", 4: "packets", 5: "a message"}
        if fault["kind"] == _COMPARISON:
            what = f"to compare call {fault['epoch']}"
        else:
            what = f"block {fault['block']}, {kinds[fault['kind']]} of epoch {fault['epoch']} "
            what += f"(expected {fault['expected']:#x}, seen {fault['seen']:#x})"
        self._control.share()
        waited = f"rank {rank} waited {fault['timeout'] / 1e9:g} s for rank {fault['peer']}: {what}"
        return Timeout("\n  ".join([waited, *calls]))

    def destroy(self) -> None:
        """Ends all use: waits for this rank's work, then frees scratch and symmetric memory; collective.

        Tensors that lie there stay valid, and are plain; a graph with calls of this communicator must not be replayed
        any more. After a failure, here or in between, it waits for nobody, and on a GPU what a peer may still have
        mapped is freed later: when that peer has left too and a communicator is made.

        Raises TdcclError inside a call of this thread, where only a signal handler can be: `abort` there.
        """
        if self._destroyed:
            return
        with self._interpreted:
            if threading.get_ident() in self._interpreting:
                raise TdcclError("destroy: called by a signal handler inside a call; abort there, and destroy after it")
            if self._destroyed:
                return
            self._destroyed = _DESTROYED
            self._interpreted.wait_for(lambda: not self._interpreting)
        if not self._emulated:
            torch.cuda.synchronize(self.device)
        bootstrap = None if self._abort_word.value else self._bootstrap
        try:
            if bootstrap is not None:
                bootstrap.barrier()  # no peer's kernel writes here any more
        except TdcclError:
            bootstrap = None
        self._plans.clear()
        self._calls.clear()
        self._recorder.close()
        for memory in [*self._segments, self._heap]:
            memory.release(bootstrap, self._control.peers_gone)
        self._segments.clear()
        self.team = self._team = None  # they hold on to the scratch
        with self._on_device():
            self._control.leave()
        self._end_watch()
        if bootstrap is not None:
            bootstrap.close()
        self._bootstrap = self._arenas = self._loans = None  # a store may end with its last user

    def __enter__(self) -> "Communicator":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            self.abort()  # the others may wait for calls that this rank will not make
        self.destroy()

    def __repr__(self) -> str:
        return f"Communicator(rank={self.rank}, size={self.size}, device={self.device})"

    # ---- how a call is checked and launched ---------------------------------------------------------

    def _checked(self, collective: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self.check()
        if tensor.device != self.device:
            raise ArgumentError(f"{collective}: {name} is on {tensor.device}, expected {self.device}")
        if tensor.is_conj() or tensor.is_neg():
            raise ArgumentError(f"{collective}: {name} is a lazy view; pass resolve_conj() and resolve_neg() of it")
        if not tensor.is_contiguous():
            raise ArgumentError(
                f"{collective}: {name} is not contiguous (shape {tuple(tensor.shape)}, strides {tensor.stride()}); "
                "pass a contiguous() copy"
            )
        return tensor

    def _pair(self, collective, send, recv, shape_of_recv, shrinks=False, expected=None):
        """(send, recv) as checked tensors, and what to return to the user."""
        source = self._checked(collective, "send", arrays.as_tensor(send, "send"))
        if recv is None:
            target = torch.empty(tuple(shape_of_recv(source.shape)), dtype=source.dtype, device=source.device)
            return source, target, arrays.like(target, send)
        target = self._checked(collective, "recv", arrays.as_tensor(recv, "recv", written=True))
        if target.dtype != source.dtype:
            raise ArgumentError(f"{collective}: send is {source.dtype}, recv is {target.dtype}; expected equal dtypes")
        if expected is not None:
            if target.numel() != expected:
                raise ArgumentError(
                    f"{collective}: recv has {target.numel()} elements, expected {expected} by recv_splits"
                )
            return source, target, recv
        small, large, names = (target, source, "send") if shrinks else (source, target, "recv")
        ranks = 1 if collective in ("all_reduce", "all_to_all", "reduce") else self.size
        if large.numel() != ranks * small.numel():
            times = f"{ranks} ranks x {small.numel()} = " if ranks > 1 else ""
            raise ArgumentError(
                f"{collective}: {names} has {large.numel()} elements, expected {times}{ranks * small.numel()}"
            )
        return source, target, recv

    def _row_splits(self, source, send_splits, recv_splits):
        for name, splits in (("send_splits", send_splits), ("recv_splits", recv_splits)):
            counts = list(splits)
            if len(counts) != self.size or not all(hasattr(count, "__index__") and count >= 0 for count in counts):
                raise ArgumentError(f"all_to_all: {name} is {counts}, expected {self.size} counts >= 0")
        rows = source.shape[0] if source.dim() else 0
        if sum(send_splits) != rows:
            raise ArgumentError(f"all_to_all: send has {rows} rows, expected sum(send_splits) = {sum(send_splits)}")
        if send_splits[self.rank] != recv_splits[self.rank]:
            raise ArgumentError(
                f"all_to_all: rank {self.rank} sends itself {send_splits[self.rank]} rows but expects "
                f"{recv_splits[self.rank]}"
            )
        counts = (send_splits, recv_splits)
        return tuple(tuple(map(operator.index, splits)) for splits in counts), math.prod(source.shape[1:])

    def _call(self, collective, source, target, count, op, root, splits) -> Call:
        send, recv = source.data_ptr(), target.data_ptr()
        low = (send | recv) & 15
        segments, multicast_alignment = (None, None), 16
        if self._segments:
            segments = (
                self._segment_of(send, source.numel() * source.itemsize),
                self._segment_of(recv, target.numel() * target.itemsize),
            )
            if self.multicast.kind is not None:
                multicast_alignment = self._multicast_alignment(segments, (send, recv))
        if op is None:
            dtype, size = "u8", source.itemsize
            count *= size
            if splits is not None:
                splits = tuple(tuple(n * size for n in counts) for counts in splits)
        else:
            dtype = arrays.TRITON_NAMES[source.dtype]
        in_place = _overlap(source, target)
        if in_place and source is not target:
            self._check_in_place(collective, source, target)
        alignment = 16 if low == 0 else low & -low
        return Call(
            collective, count, dtype, op, root, alignment, splits, segments, in_place,
            multicast_alignment=multicast_alignment,
        )  # fmt: skip

    def _multicast_alignment(self, segments, addresses) -> int:
        """`Call.multicast_alignment`."""
        found = [(segment, address) for segment, address in zip(segments, addresses) if segment is not None]
        if self.multicast.kind == "switch" and not all(segment.multicast for segment, _ in found):
            return 0
        return min((16 if address % 16 == 0 else address & -address for _, address in found), default=16)

    def _check_in_place(self, collective, source, target) -> None:
        """Overlapping is only in place if the smaller buffer is this rank's piece of the larger, or both are one."""
        small, large = sorted((source, target), key=torch.Tensor.numel)
        piece = 0 if small.numel() == large.numel() else self.rank * small.numel() * small.itemsize
        if small.data_ptr() - large.data_ptr() != piece:
            raise ArgumentError(
                f"{collective}: send and recv overlap, but not in place; expected "
                + ("the same buffer" if piece == 0 else f"rank {self.rank}'s piece of the larger one")
            )

    def _places(self, call: Call, *tensors: torch.Tensor) -> tuple[int, ...]:
        """Where send and recv lie, as they are recorded."""
        if call.segments == (None, None):
            return PLAIN, PLAIN
        return tuple(
            PLAIN if segment is None else place_of(self._segments.index(segment), tensor.data_ptr() - segment.address)
            for tensor, segment in zip(tensors, call.segments)
        )

    def _segment_of(self, address: int, nbytes: int):
        return self._regions.find(address, nbytes)

    def _choose(self, call: Call) -> Choice:
        forced = self._forced.get(call.collective)
        return choose(ALGORITHMS[call.collective], call, self._context, self.table, forced)

    def _again(self, key: tuple, stream) -> bool:
        """Repeats a call on the same arrays, whose checks and plan are known; False if there was none."""
        try:
            ready = self._calls.get(key)
        except TypeError:  # an op or a root that is no key: it will be refused
            return False
        if ready is None or self._regions.table is not self._calls_on:
            return False
        if self._destroyed or self._abort_word.value:
            self.check()
        self._start(*ready, stream)
        return True

    def _run(
        self, collective, source, target, count,
        op=None, root=None, splits=None, stream=None, timeout=None, key=None, on_device=None, called=None,
    ) -> None:  # fmt: skip
        """Plans a call, starts it, and keeps it under `key`, whose last part is None for arrays to be checked anew.

        called: the collective's name to the user, if it is another.
        """
        empty = count == 0 and splits is None and on_device is None and collective != "barrier"
        if empty and not self._debug:
            return
        call = self._call(collective, source, target, count, op, root or 0, splits)
        call = call._replace(on_device=on_device, timeout=timeout)
        with self._lock:
            if self._debug:
                self._compare(called or collective, source, target, count, op, root, splits, call)
                if empty:
                    return
            plan = self._plan(call)
            uneven = splits is not None or on_device is not None
            elements = source.numel() if uneven else count
            what = described(
                called or collective, plan.choice.algorithm.name, source.dtype, op, root,
                *self._places(call, source, target), uneven, elements, elements * source.itemsize,
            )  # fmt: skip
            ready = (what, plan.launch, *plan.at(source.data_ptr(), target.data_ptr()))
            if key is not None and key[-1] is not None and not self._debug:
                if len(self._calls) >= _MOST_PLANS or self._regions.table is not self._calls_on:
                    self._calls, self._calls_on = {}, self._regions.table
                self._calls[key] = ready
            self._start(*ready, stream)

    def _plan(self, call: Call) -> Plan:
        plan = self._plans.get(call)
        if plan is None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()  # split lists may differ in every call
            team = self._team
            if call.timeout is not None:
                if not call.timeout > 0:
                    raise ArgumentError(f"{call.collective}: timeout is {call.timeout}, expected seconds > 0")
                team = team._replace(timeout=int(call.timeout * 1e9))
            with self._on_device():
                plan = self._plans[call] = Plan(self._choose(call), call, team, self._segments)
        return plan

    def _compare(self, collective, source, target, count, op, root, splits, call: Call) -> None:
        """Raises Mismatch on all ranks unless all are about to make this call, Timeout if one comes to none."""
        dtype = str(source.dtype).removeprefix("torch.")
        alike = collective not in ROOTED and splits is None and call.on_device is None
        if splits is not None:
            count = None
        elif call.on_device is not None:
            count = call.on_device[2] // source.itemsize  # of a row
        places = map(placed, self._places(call, source, target)) if alike else (None, None)
        number = self._recorder.collectives + 1
        mine = agreement.Proposal(number, collective, dtype, op, root, count, *places, splits)
        try:
            agreement.check_alike(self._bootstrap.exchange(mine))
        except Mismatch as error:
            self._dump_for(error)
            raise
        except InitError as error:
            if not error.absent:
                raise
            fault = {"peer": error.absent[0], "kind": _COMPARISON, "epoch": number, "timeout": int(self.timeout * 1e9)}
            words = [fault.get(name, 0) for name in layout.FAULT_FIELDS[1:]]
            self._control.words[1 : len(words) + 1] = torch.tensor(words)
            self._abort_word.value = layout.TIMED_OUT | self.rank << 8
            self.check()

    def _start(self, what: bytes, launch, send: int, recv: int, stream, lanes=("scratch",), collectives=1) -> None:
        """Launches on `stream`, after what was launched last in each of the lanes: calls in one lane share memory.

        what: the call as it is recorded.
        """
        if profiler._is_profiler_enabled:
            launch = _shown(what, launch)
        with self._lock:
            if self._emulated:
                index = self._recorder.note(what, 0)
                self._interpret(launch, send, recv)
                self._recorder.end(index)
                return
            index = self.device.index
            handle = torch._C._cuda_getCurrentRawStream(index) if stream is None else arrays.stream_handle(stream)
            for lane in lanes:
                if self._streams.get(lane) != handle:
                    self._follow(lane, handle)
            self._recorder.note(what, handle, collectives)
            if torch._C._cuda_getDevice() == index:
                launch(send, recv, handle)
            else:
                with self._on_device():
                    launch(send, recv, handle)

    def _interpret(self, launch, send: int, recv: int) -> None:
        """A launch in emulation, which is the call itself. A fault that no wait of it met is for the next call."""
        thread = threading.get_ident()
        with self._interpreted:
            if self._destroyed:
                raise DestroyedError(self._destroyed)
            self._interpreting.append(thread)
        try:
            launch(send, recv, 0)
            while self._stop_word.value:  # set before the abort word, if this rank's deadline was the first to pass
                self.raise_fault()
                time.sleep(1e-5)
        except TdcclError:
            raise
        except BaseException:  # KeyboardInterrupt, say: this rank is no longer where its peers think
            self.abort()
            raise
        finally:
            with self._interpreted:
                self._interpreting.remove(thread)
                self._interpreted.notify_all()

    def _on_device(self):
        return contextlib.nullcontext() if self._emulated else torch.cuda.device(self.device)

    def _on(self, stream):
        """torch's context of a stream in any form."""
        if self._emulated or stream is None:
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.ExternalStream(arrays.stream_handle(stream), self.device))

    def _follow(self, lane, handle: int) -> None:
        """A call on a new stream waits for those on the last one in its lane."""
        if torch.cuda.is_current_stream_capturing():
            return  # a graph is ordered with other work where it is replayed
        last = self._streams.get(lane)
        if last is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.ExternalStream(last, self.device))
            torch.cuda.ExternalStream(handle, self.device).wait_event(event)
        self._streams[lane] = handle


@dataclass(frozen=True)
class Explanation:
    """What `Communicator.explain` found; prints as a few lines."""

    call: Call
    choice: Choice
    scratch: int

    @property
    def algorithm(self) -> str:
        return self.choice.algorithm.name

    @property
    def path(self) -> str:
        """packets (LL), symmetric (zero-copy) or staged (through scratch)."""
        return self.choice.algorithm.path

    def __str__(self) -> str:
        geometry = self.choice.geometry
        constants = ", ".join(f"{name}={value}" for name, value in geometry.constants.items())
        access = "16-byte" if geometry.aligned else f"{geometry.dtype} element"
        lines = [
            f"{self.call.collective}: {self.call.nbytes} bytes a chunk -> {self.algorithm} ({self.path})",
            f"  because: {self.choice.source}",
            f"  grid {geometry.grid} blocks of {geometry.warps} warps, {constants}, {access} accesses",
            f"  scratch {self.scratch / 2**20:.1f} MiB, shared by all calls",
        ]
        if self.choice.algorithm.multimem is not None and self.call.op is not None:
            lines.append("  reduced in the switch: the bits need not be those of the other algorithms")
        lines += [f"  not {name}: {reason}" for name, reason in self.choice.passed_over.items()]
        return "\n".join(lines)


def survivors(rank: int, size: int, exclude: list[int]) -> list[int]:
    """The ranks of a shrunk group. Raises ArgumentError unless `exclude` are some of `size` ranks without `rank`."""
    excluded = set(exclude)
    if not excluded or not excluded <= set(range(size)) or rank in excluded:
        raise ArgumentError(
            f"shrink: exclude is {exclude}, expected ranks from 0 to {size - 1} without rank {rank}, which calls it"
        )
    return [member for member in range(size) if member not in excluded]


def _peer_died(this: "weakref.ref[Communicator]", rank: int) -> None:
    """Told by the watcher. One that has destroyed the communicator may go."""
    communicator = this()
    if communicator is not None and not communicator._control.has_left(rank):
        communicator._dead.add(rank)
        communicator._control.fail(layout.PEER_DIED, rank)  # everywhere: else the first to raise would seem the culprit


def _end_watches(watches: list) -> None:
    for end in watches:
        end()


@atexit.register
def _take_leave() -> None:
    """Tells the peers if this process ends without `destroy`: MPI would keep it waiting for those that wait for it."""
    left = [communicator for communicator in _alive if not communicator._destroyed]
    if left and "mpi4py.MPI" in sys.modules:
        time.sleep(watcher.GRACE)  # what they still wait for may have been sent
        for communicator in left:
            communicator._control.fail(layout.PEER_DIED, communicator.rank)


def _disown() -> None:
    """In a forked child: neither the peers nor the GPU know it."""
    _inherited.extend(_alive)  # never freed here
    for communicator in _inherited:
        communicator._destroyed = _FORKED


os.register_at_fork(after_in_child=_disown)


def _shown(what: bytes, launch):
    """`launch` as torch's profiler shows it, by the call's name."""
    name = f"tdccl:{name_of(what)}"

    def launch_shown(*arguments):
        with profiler.record_function(name):
            launch(*arguments)

    return launch_shown


def _forced_algorithms() -> dict[str, str]:
    forced = environment.forced_algorithms()
    for collective, name in forced.items():
        known = [algorithm.name for algorithm in ALGORITHMS.get(collective, ())]
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else f"a collective of {', '.join(ALGORITHMS)}"
            raise InitError(f"TDCCL_ALGO={collective}:{name}: expected {expected}")
    return forced


def _device(device, rank: int) -> torch.device:
    """This rank's device, made the current one. Raises InitError if it is none that kernels run on."""
    if environment.emulated():
        return torch.device("cpu")
    if device is None:
        device = rank % torch.cuda.device_count()
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        raise InitError(f"device is {device}, expected a GPU (TDCCL_EMULATE=1 runs on CPU tensors)")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device


def _capped(rules: tuning.Rules, max_blocks: int | None) -> tuning.Rules:
    if max_blocks is None:
        return rules
    if not hasattr(max_blocks, "__index__") or max_blocks < 1:
        raise InitError(f"max_blocks is {max_blocks!r}, expected a number of blocks from 1 to {rules.rings}")
    return replace(rules, blocks=min(rules.blocks, max_blocks))


def _scaled(shape, size: int):
    return (size, *shape[1:]) if not shape else (shape[0] * size, *shape[1:])


def _overlap(left: torch.Tensor, right: torch.Tensor) -> bool:
    start, other = left.data_ptr(), right.data_ptr()
    return start < other + right.numel() * right.itemsize and other < start + left.numel() * left.itemsize


def _boot_id() -> str:
    """Tells two hosts of the same name apart; containers on one kernel share it, and share memory too."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return str(os.getuid())


def _announce_emulation(rank: int) -> None:
    global _announced
    if environment.emulated() and not _announced and rank == 0:
        note = "tdccl: no GPU, kernels run in Triton's interpreter: for correctness, not for speed"
        print(note, file=sys.stderr, flush=True)
    _announced = True
