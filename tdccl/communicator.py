"""The direct API: `tdccl.init` makes a `Communicator`, whose methods are the collectives."""

import functools
import itertools
import math
import operator
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import profiler

from tdccl import environment, transport
from tdccl.calls import AGAIN, Calls, overlap, shown
from tdccl.decisions import layout, rails
from tdccl.errors import ArgumentError, DestroyedError, TdcclError
from tdccl.membership import seconds_of
from tdccl.runtime import arrays
from tdccl.runtime.algorithm import Call, team_of
from tdccl.runtime.arenas import Arenas
from tdccl.runtime.loans import Loans
from tdccl.runtime.plan import Choice
from tdccl.runtime.recorder import PLAIN, described
from tdccl.transport.bootstrap import Bootstrap, StoreBootstrap, discover

if environment.emulated():
    import tdccl.runtime.emulation  # noqa: F401  before a user launches a kernel of his own

_made: list[weakref.ref] = []  # by `init`, in this order
_named: weakref.WeakValueDictionary[str, "Communicator"] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_DESTROYED = "this communicator is destroyed; make a new one with tdccl.init"


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

    Raises ArgumentError: a timeout that is none; InitError: ranks missing (named) or different, more than 8 on a host,
    memory not shared, and on several hosts no NVSHMEM.
    """
    timeout = seconds_of("init", timeout)
    communicator = Communicator(discover(mpi, store, rank, size, timeout), device, timeout, max_blocks)
    _made.append(weakref.ref(communicator, _made.remove))
    return communicator


def latest() -> "Communicator | None":
    """The communicator that `init` made last, of those alive. Not by `split`: ranks may be in different parts."""
    alive = [communicator for made in _made if (communicator := made()) and not communicator._destroyed]
    return alive[-1] if alive else None


def named(name: str) -> "Communicator":
    """The communicator of this process with that `name`. Raises DestroyedError if it is gone."""
    try:
        return _named[name]
    except KeyError:
        raise DestroyedError(f"the communicator {name!r} of this call is gone; keep a reference to it") from None


class Communicator(Calls):
    """Collectives over the ranks that made it together. A context manager: leaving it destroys it, and if it is by an
    exception, aborts it before.

    Arrays are torch tensors, CuPy arrays, or anything with DLPack or `__cuda_array_interface__`, contiguous, on
    this rank's device. Calls are asynchronous: work goes on `stream` (None: torch's current one, for CuPy arrays too;
    a torch or CuPy stream; an int, of a stream that lives until the next call on another one has been made), and each
    of its waits may last `timeout` seconds (None: the communicator's). Every rank
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
        super().__init__(bootstrap, device, timeout, max_blocks, scratch)
        self._arenas = Arenas(bootstrap, self.device, self._allocate, self._segments, self._regions)
        self._loans = Loans(bootstrap, self.device, self.empty)
        self._splits = 0
        # Operators of torch.library find this object by it; what is compiled for a size must not pass for another.
        self.name = f"tdccl{next(_numbers)} of {self.size}"
        _named[self.name] = self

    # ---- collectives -----------------------------------------------------------------------------------

    def all_reduce(
        self, send: Any, recv: Any = None, op: str = "sum", *, stream: Any = None, timeout: float | None = None
    ) -> Any:
        """recv = op over all ranks' `send`, the same bits on every rank; returns recv.

        send, recv: equal shape and dtype; recv may be send (in place); None makes a new one.
        op: sum, avg, min, max, prod (numbers); and, or, xor (integers, bool). 16-bit floats are accumulated in
        fp32, in rank order. An NVSwitch that adds (`explain` tells) does so in its own order, and rounds.
        """
        key = self._again("all_reduce", op, timeout, send, recv, stream)
        if key is AGAIN:
            return recv
        source, target, result = self._pair("all_reduce", send, recv, lambda shape: shape, stream)
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
        key = self._again("all_gather", None, timeout, send, recv, stream)
        if key is AGAIN:
            return recv
        source, target, result = self._pair("all_gather", send, recv, lambda shape: _scaled(shape, self.size), stream)
        self._run("all_gather", source, target, source.numel(), stream=stream, timeout=timeout, key=key)
        return result

    def reduce_scatter(
        self,
        send: Any,
        recv: Any = None,
        op: str = "sum",
        send_splits: list[int] | None = None,
        *,
        stream: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """recv = op over all ranks' pieces of `send` that belong to this rank; returns recv.

        send: [size * d, ...], or any shape with size times the elements of recv. recv: [d, ...]; it may be this
        rank's piece of send (in place). op as in `all_reduce`. send_splits: how many rows are for each rank, if not
        equally many; then send: [sum(send_splits), ...], and it goes as pieces of the largest size, which are packed.
        """
        if send_splits is not None:
            return self._reduce_scatter_uneven(send, recv, op, send_splits, stream, timeout)
        key = self._again("reduce_scatter", op, timeout, send, recv, stream)
        if key is AGAIN:
            return recv

        def shape_of_recv(shape):
            if not shape or shape[0] % self.size:
                raise ArgumentError(
                    f"reduce_scatter: send has shape {tuple(shape)}, its first dimension must be a multiple "
                    f"of the {self.size} ranks (or give recv)"
                )
            return (shape[0] // self.size, *shape[1:])

        source, target, result = self._pair("reduce_scatter", send, recv, shape_of_recv, stream, shrinks=True)
        arrays.check_reduction("reduce_scatter", op, source.dtype)
        self._run("reduce_scatter", source, target, target.numel(), op=op, stream=stream, timeout=timeout, key=key)
        return result

    def broadcast(self, buf: Any, root: int = 0, *, stream: Any = None, timeout: float | None = None) -> Any:
        """`buf` of rank `root` ends in `buf` of all ranks; returns buf. Any shape and dtype."""
        key = self._again("broadcast", root, timeout, buf, buf, stream)
        if key is AGAIN:
            return buf
        tensor = self._checked("broadcast", "buf", arrays.as_tensor(buf, "buf", written=True))
        root = self._checked_rank("broadcast", "root", root)
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
        if send_splits is None and recv_splits is None:
            key = self._again("all_to_all", getattr(send, "shape", None), timeout, send, recv, stream)
            if key is AGAIN:
                return recv
        source = self._checked("all_to_all", "send", arrays.as_tensor(send, "send"))
        if (send_splits is None) != (recv_splits is None):
            raise ArgumentError("all_to_all: give both send_splits and recv_splits, or neither")
        if send_splits is None:
            source, target, result = self._pair("all_to_all", send, recv, lambda shape: shape, stream)
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
        shape = (sum(splits[1]), *source.shape[1:])
        source, target, result = self._pair(
            "all_to_all", send, recv, lambda _: shape, stream, expected=math.prod(shape)
        )
        if overlap(source, target):
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
        if overlap(source, target):
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
        root = self._checked_rank("reduce", "root", root)
        if self.rank == root:
            source, target, result = self._pair("reduce", send, recv, lambda shape: shape, stream)
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
        root = self._checked_rank("gather", "root", root)
        if self.rank == root:
            source, target, result = self._pair("gather", send, recv, lambda shape: _scaled(shape, self.size), stream)
        else:
            source = target = self._checked("gather", "send", arrays.as_tensor(send, "send"))
            result = None
        self._move_by_root("gather", source, target, source.numel(), root, stream, timeout)
        return result

    def scatter(self, send: Any, recv: Any, root: int = 0, *, stream: Any = None, timeout: float | None = None) -> Any:
        """recv of rank i = piece i of rank root's `send`; returns recv. recv: [d, ...]; send: [size * d, ...] on rank
        `root`, not overlapping recv; elsewhere it is not looked at."""
        root = self._checked_rank("scatter", "root", root)
        source = target = self._checked("scatter", "recv", arrays.as_tensor(recv, "recv", written=True))
        if self.rank == root:
            source, target, _ = self._pair("scatter", send, recv, lambda shape: shape, stream, shrinks=True)
        self._move_by_root("scatter", source, target, target.numel(), root, stream, timeout)
        return recv

    def _checked_rank(self, method: str, name: str, rank: Any) -> int:
        if not hasattr(rank, "__index__") or not 0 <= operator.index(rank) < self.size:
            raise ArgumentError(f"{method}: {name} is {rank!r}, expected a rank from 0 to {self.size - 1}")
        return operator.index(rank)

    def _move_by_root(self, collective: str, source, target, count: int, root: int, stream, timeout) -> None:
        """A gather or scatter of `count` elements a rank is an all_to_all in which most pieces are empty."""
        if source is not target and overlap(source, target):
            raise ArgumentError(f"{collective}: recv overlaps send")
        one = tuple(count * (rank == root) for rank in range(self.size))
        everyone = (count * (self.rank == root),) * self.size
        splits = (one, everyone) if collective == "gather" else (everyone, one)
        self._run(
            "all_to_all", source, target, 0, root=root, splits=splits, stream=stream, timeout=timeout, called=collective
        )

    def _all_gather_uneven(self, send, recv, recv_splits, stream, timeout):
        counts = self._counts("all_gather", "recv_splits", recv_splits)
        source = self._checked("all_gather", "send", arrays.as_tensor(send, "send"))
        rows = source.shape[0] if source.dim() else 1
        if counts[self.rank] != rows:
            raise ArgumentError(f"all_gather: send has {rows} rows, recv_splits says {counts[self.rank]} of this rank")
        row = math.prod(source.shape[1:])
        shape = (sum(counts), *source.shape[1:])
        source, target, result = self._pair(
            "all_gather", send, recv, lambda _: shape, stream, expected=math.prod(shape)
        )
        if overlap(source, target):
            raise ArgumentError("all_gather: recv overlaps send; in place it takes equal pieces only")
        splits = ((rows * row,) * self.size, tuple(count * row for count in counts))
        self._run("all_gather", source, target, 0, splits=splits, stream=stream, timeout=timeout)
        return result

    def _reduce_scatter_uneven(self, send, recv, op, send_splits, stream, timeout):
        counts = self._counts("reduce_scatter", "send_splits", send_splits)
        source = self._checked("reduce_scatter", "send", arrays.as_tensor(send, "send"))
        if not source.dim() or source.shape[0] != sum(counts):
            raise ArgumentError(
                f"reduce_scatter: send has shape {tuple(source.shape)}, expected sum(send_splits) = {sum(counts)} rows"
            )
        shape, own = source.shape[1:], counts[self.rank]
        with self._on(stream):
            if recv is None:
                target = source.new_empty((own, *shape))
                recv = arrays.like(target, send)
            else:
                target = self._checked("reduce_scatter", "recv", arrays.as_tensor(recv, "recv", written=True))
                if target.dtype != source.dtype or target.numel() != own * math.prod(shape):
                    raise ArgumentError(
                        f"reduce_scatter: recv is {target.dtype} {tuple(target.shape)}, expected {source.dtype} with "
                        f"{own * math.prod(shape)} elements by send_splits"
                    )
            pieces = source.new_zeros((self.size, max(counts), *shape))
            for piece, part in zip(pieces, source.split(counts)):
                piece[: len(part)].copy_(part)
            reduced = self.reduce_scatter(pieces, torch.empty_like(pieces[0]), op, stream=stream, timeout=timeout)
            target.view(own, *shape).copy_(reduced[:own])
        return recv

    def barrier(self, *, stream: Any = None, timeout: float | None = None) -> None:
        """Work after it on `stream` starts only when all ranks' streams have come to theirs."""
        self.check()
        nothing = self._heap.local[:0]
        self._run("barrier", nothing, nothing, 0, stream=stream, timeout=timeout)

    # ---- messages between two ranks --------------------------------------------------------------------

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
        each other at once. The k-th message to a rank is the k-th that this rank receives from here.

        The messages of a call go in step: a large one that nobody takes in holds the others up. Where its receiver
        comes only after something that depends on one of the others, give each a call and a stream of its own.
        """
        timeout = None if timeout is None else seconds_of("send_recv", timeout)
        out = self._messages("send", sends)
        into = self._messages("recv", recvs, written=True)
        local = out.pop(self.rank, []), into.pop(self.rank, [])
        sent, received = ([tensor.numel() * tensor.itemsize for tensor in each] for each in local)
        if sent != received:
            raise ArgumentError(
                f"send_recv: rank {self.rank} sends itself messages of {sent} bytes, but takes in {received} here"
            )
        rounds = max(map(len, [*out.values(), *into.values()]), default=0)
        for source, target in zip(*local):
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
        source = self._checked_rank("has_message_from", "source", source)
        if self._rails is not None:
            lane = self._pairs_start + source * rails.lane_bytes(self._context.pair_slot)
            words = self._lanes.local[lane : lane + rails.LANE_WORD_BYTES.value].view(torch.int64)
            return rails.has_come(words.tolist())
        start = layout.heap_bytes(team_of(self._context, "")._replace(channels=0))
        words = self._heap.local[start : start + 32 * layout.MAX_RANKS.value].view(torch.int64)
        _, received, arrived, _ = words.view(4, -1)[:, source].tolist()
        return arrived > received

    def _messages(self, name: str, listed, written: bool = False) -> dict[int, list[torch.Tensor]]:
        """The checked tensors of messages by the other rank, empty ones left out."""
        found: dict[int, list[torch.Tensor]] = {}
        for message in listed:
            if not isinstance(message, tuple | list) or len(message) != 2:
                raise ArgumentError(f"send_recv: a message is {message!r}, expected (tensor, the other rank)")
            array, rank = message
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
        own = tuple(lanes) if self._emulated or len(lanes) == 1 else None
        call = Call("send_recv", 0, "u8", None, 0, alignment, None, (own, None), False, timeout=timeout)
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
            launch = shown(what, launch)
        # Without the lock: it may wait for a peer that waits for another lane of this rank.
        self._interpret(launch, 0, 0)
        self._recorder.end(index)

    def _described_messages(self, out: dict[int, torch.Tensor], into: dict[int, torch.Tensor], nbytes: int) -> bytes:
        if len(out) + len(into) > 1:
            return described("send_recv", "transfer", torch.uint8, None, None, PLAIN, PLAIN, True, nbytes, nbytes)
        ((rank, tensor),) = (out or into).items()
        name = "send" if out else "recv"
        return described(name, "transfer", tensor.dtype, None, rank, PLAIN, PLAIN, True, tensor.numel(), nbytes)

    # ---- memory, groups, inspection --------------------------------------------------------------------

    def empty(self, shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor in symmetric memory, zeroed; collective, with the same size on all ranks.

        Collectives on it (or on views of it) take the zero-copy algorithms, until `destroy`.
        """
        self.check()
        shape = arrays.checked_shape("empty", shape, dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        sizes = self._bootstrap.exchange(nbytes)
        if len(set(sizes)) > 1:
            raise ArgumentError(f"empty: the ranks ask for different sizes in bytes: {sizes}")
        segment = self._allocate(max(16, nbytes))
        self._add(segment)
        return segment.local[:nbytes].view(dtype).view(shape)

    def lend(self, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Like `empty`, flat, with any content, and its memory is lent again when the tensor and its views are gone: so
        keep one of them until an asynchronous call with it has been waited for.

        Not in a graph's capture: what is lent there is lent again while the graph may yet be replayed.

        All ranks make and free such tensors alike. They wait for each other where there is no free memory of that size,
        and in every 512th call, to compare where their tensors lay. A gc.collect() on every rank frees those that are
        in reference cycles alike.

        Raises ArgumentError, on every rank: the sizes, or the places of earlier tensors, differ; InitError: other ranks
        did not need new memory, as this one does.
        """
        self.check()
        return self._loans.tensor(math.prod(arrays.checked_shape("lend", numel, dtype)), dtype)

    def register(self, pool: "torch.cuda.MemPool") -> None:
        """Makes a torch memory pool symmetric memory: what it holds now, and tensors that go there later; collective.

            pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(pool):
                model = Model().cuda()
            comm.register(pool)

        All ranks make and free tensors of the same sizes in the pool, in the same order, now and later; so keep those
        that a torch group's `async_op=True` call was given, for torch reuses what another stream has used when it finds
        that one done, which differs between ranks. Where the pool has grown since, register it again. It is kept until
        `destroy`; several communicators may register it.

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
                share = functools.partial(p2p.share, self._node, address, nbytes, self.device, pool)
                self._add(self._on_each_node(share))

    def placing(self):
        """The context of `tdccl.symmetric(self)`."""
        self.check()
        return self._arenas.block()

    def _add(self, memory: transport.SymmetricMemory) -> None:
        self._segments.append(memory)
        self._regions.add(transport.Region(memory.address, memory.address + memory.nbytes, memory))

    def symmetric(self, tensor: torch.Tensor):
        """The kernel argument through which a kernel reaches all ranks' copies of a tensor in symmetric memory."""
        segment = self._segment_with(tensor, "symmetric")
        from tdccl.language import Symmetric

        return Symmetric(segment.peers, tensor.data_ptr() - segment.address)

    def addresses_of(self, tensor: torch.Tensor) -> list[int]:
        """Where every rank's copy of a tensor in symmetric memory lies for this process: for copy engines."""
        segment = self._segment_with(tensor, "addresses_of")
        return [address + tensor.data_ptr() - segment.address for address in segment.addresses]

    def _segment_with(self, tensor: torch.Tensor, method: str) -> transport.SymmetricMemory:
        self.check_not_destroyed()  # its memory may be gone, that of the peers
        segment = None
        if isinstance(tensor, torch.Tensor):
            segment = self._segment_of(tensor.data_ptr(), tensor.numel() * tensor.itemsize)
        if segment is None:
            raise ArgumentError(
                f"{method}: expected a tensor in this communicator's symmetric memory: made by its empty(), under "
                "tdccl.symmetric(), or in a pool given to its register()"
            )
        return segment

    def split(self, color: int | None, key: int = 0) -> "Communicator | None":
        """One new communicator for each color, ranks ordered by (key, rank); collective. None takes no part.

        Raises ArgumentError, on every rank: a color or a key is no whole number.
        """
        self.check()
        self._splits += 1
        everyone = self._bootstrap.exchange((color if color is None else _whole(color), _whole(key)))
        for rank, (its_color, its_key) in enumerate(everyone):
            if isinstance(its_color, str) or isinstance(its_key, str):
                raise ArgumentError(
                    f"split: rank {rank} gave color {its_color} and key {its_key}, expected whole numbers, or no color"
                )
        color, key = everyone[self.rank]
        if color is None:
            return None
        members = sorted(
            (rank for rank in range(self.size) if everyone[rank][0] == color),
            key=lambda rank: (everyone[rank][1], rank),
        )
        subgroup = self._bootstrap.subgroup(members, f"split{self._splits}/{color}")
        return Communicator(subgroup, self.device, self.timeout, self.max_blocks, self._scratch)

    def explain(self, collective: str, send: Any, recv: Any = None, op: str = "sum", root: int = 0) -> "Explanation":
        """Which algorithm, grid, workspace and path a call with these arrays would take, and why; not collective.

        collective: all_reduce, all_gather, reduce_scatter, broadcast, all_to_all (of equal pieces), all_to_all_vdev,
        reduce, barrier or send_recv. send, recv, op, root: as the method takes them. Raises ArgumentError.
        """
        self.check()
        if not isinstance(collective, str) or collective not in self._algorithms:
            raise ArgumentError(f"explain: {collective!r} is not one of {', '.join(self._algorithms)}")
        source = self._checked(collective, "send", arrays.as_tensor(send, "send"))
        target = source if recv is None else self._checked(collective, "recv", arrays.as_tensor(recv, "recv"))
        chunk = target if collective == "reduce_scatter" else source
        pieces = self.size if collective == "all_to_all" or (collective == "reduce_scatter" and recv is None) else 1
        reduces = "reduce" in collective
        if reduces:
            arrays.check_reduction(collective, op, source.dtype)
        if collective in ("broadcast", "reduce"):
            root = self._checked_rank(collective, "root", root)
        call = self._call(collective, source, target, chunk.numel() // pieces, op if reduces else None, root, None)
        if collective == "all_to_all_vdev":
            row = math.prod(source.shape[1:]) * source.itemsize
            sizes = row, source.numel() * source.itemsize, target.numel() * target.itemsize
            call = call._replace(count=0, on_device=(0, 0, *sizes))
        return Explanation(call, self._choose(call), self._heap.nbytes)

    # ---- its end ------------------------------------------------------------------------------------------

    def shrink(self, exclude: list[int]) -> "Communicator":
        """A communicator of the ranks that are not in `exclude`, in their order; only these call it, all of them.

        It works after any fault, in the same processes, whether or not a store or MPI still does, because the ranks
        meet anew at a port of the first of them. This communicator is then destroyed: calls under way and those of
        excluded ranks that live raise Aborted. If it fails, it may be called again, to exclude more.

        Raises ArgumentError: not ranks, or this one among them; InitError: a rank did not come, excludes others, or
        has destroyed this communicator; PeerFailure: one that is not excluded has died.
        """
        store, members = self.meet(exclude)
        world_rank = self._bootstrap.world_rank
        bootstrap = StoreBootstrap(
            store, members.index(self.rank), len(members), self.timeout, "tdccl/shrink", world_rank
        )
        bootstrap.interrupt = functools.partial(self._check_coming, members)
        try:
            smaller = Communicator(bootstrap, self.device, self.timeout, self.max_blocks, self._scratch)
        except BaseException:
            self._control.announce(0, 0)  # nobody is there any more
            raise
        self.destroy()
        return smaller

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
        bootstrap = self._bootstrap
        try:
            with self._interpreted:
                self._interpreted.wait_for(lambda: not self._interpreting)
            if not self._emulated:
                torch.cuda.synchronize(self.device)
            if self._abort_word.value:
                bootstrap = None
            else:
                bootstrap.barrier()  # no peer's kernel writes here any more
        except TdcclError:
            bootstrap = None
        except BaseException:  # KeyboardInterrupt, or a kernel's: the others need not wait for this rank
            self._control.fail(layout.ABORTED, self.rank)
            raise
        self._plans.clear()
        self._calls.clear()
        self._recorder.close()
        for memory in filter(None, [*self._segments, self._heap, self._lanes]):
            memory.release(bootstrap, self._control.peers_gone)
        self._segments.clear()
        self.team = self._team = None  # they hold on to the scratch
        with self._on_device():
            self._control.leave()
        self._end_watch()
        if self._heartbeat is not None:
            self._heartbeat.leave()
        if bootstrap is not None:
            bootstrap.close()
        self._bootstrap = self._arenas = self._loans = self._store = None  # a store may end with its last user

    def __enter__(self) -> "Communicator":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            self.abort()  # the others may wait for calls that this rank will not make
        self.destroy()

    def __repr__(self) -> str:
        return f"Communicator(rank={self.rank}, size={self.size}, device={self.device})"


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


def _whole(value: Any) -> int | str:
    """A whole number, or words for what is none, which ranks can exchange."""
    try:
        return operator.index(value)
    except TypeError:
        return repr(value)


def _scaled(shape, size: int):
    return (size, *shape[1:]) if not shape else (shape[0] * size, *shape[1:])
