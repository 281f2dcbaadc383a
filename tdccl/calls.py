"""How a call of a communicator is checked, planned, recorded and launched."""

import contextlib
import ctypes
import math
import threading
import time
from typing import Any

import torch
from torch.autograd import profiler

from tdccl import compositions, transport, tuning
from tdccl.decisions import layout
from tdccl.errors import ArgumentError, DestroyedError, InitError, Mismatch, TdcclError
from tdccl.membership import COMPARISON, Membership, seconds_of
from tdccl.runtime import agreement, arrays
from tdccl.runtime.algorithm import Call
from tdccl.runtime.plan import Choice, Plan, choose
from tdccl.runtime.recorder import PLAIN, ROOTED, described, name_of, place_of, placed
from tdccl.runtime.streams import Order, is_capturing, stream_of

_MOST_PLANS = 4096
AGAIN = object()  # what `_again` returns of a call that it has made


class Calls(Membership):
    """Checks a call, plans it once, records and launches it."""

    def __init__(self, *membership):
        super().__init__(*membership)
        self._segments: list[transport.SymmetricMemory] = []
        self._regions = transport.Regions()
        self._plans: dict[Call, Plan] = {}
        self._calls: dict[tuple, tuple] = {}  # made before, on these very arrays,
        self._calls_on: Any = None  # and while symmetric memory was this
        self._lock = threading.RLock()
        # Of collectives. In emulation one that waits for its peers keeps it, and messages, which need the other, go on.
        self._turn = threading.RLock() if self._emulated else self._lock
        self._streams: dict[Any, int] = {}  # where each lane's last call went, if it was no graph's; else
        self._captured: dict[Any, tuple[int, int | None]] = {}  # where it went, and the last that was none
        self._held: dict[Any, list] = {}  # these streams as they were given: CuPy destroys one that nobody holds
        self._index = self.device.index
        self._order = None if self._emulated else Order(self._index)
        self._interpreting: list[int] = []  # threads, in emulation
        self._interpreted = threading.Condition()
        self._stop_word = ctypes.c_int64.from_address(self._heap.address + layout.STOP_BYTE.value)

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

    def _pair(self, collective, send, recv, shape_of_recv, stream, shrinks=False, expected=None):
        """(send, recv) as checked tensors, and what to return to the user. A new recv is memory of the `stream`."""
        source = self._checked(collective, "send", arrays.as_tensor(send, "send"))
        if recv is None:
            with self._on(stream):
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

    def _counts(self, collective: str, name: str, splits: Any) -> tuple[int, ...]:
        """A split list as whole numbers, one a rank."""
        counts = arrays.whole_numbers(splits)
        if counts is None or len(counts) != self.size:
            raise ArgumentError(f"{collective}: {name} is {splits!r}, expected {self.size} counts >= 0")
        return counts

    def _row_splits(self, source, send_splits, recv_splits):
        send_splits = self._counts("all_to_all", "send_splits", send_splits)
        recv_splits = self._counts("all_to_all", "recv_splits", recv_splits)
        rows = source.shape[0] if source.dim() else 0
        if sum(send_splits) != rows:
            raise ArgumentError(f"all_to_all: send has {rows} rows, expected sum(send_splits) = {sum(send_splits)}")
        if send_splits[self.rank] != recv_splits[self.rank]:
            raise ArgumentError(
                f"all_to_all: rank {self.rank} sends itself {send_splits[self.rank]} rows but expects "
                f"{recv_splits[self.rank]}"
            )
        return (send_splits, recv_splits), math.prod(source.shape[1:])

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
        in_place = overlap(source, target)
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
        addresses = [tensor.data_ptr() for tensor in tensors]
        if call.in_place:  # the larger one's: a rank's piece of it lies elsewhere on every rank
            addresses = [min(addresses)] * len(addresses)
        return tuple(
            PLAIN if segment is None else place_of(self._segments.index(segment), address - segment.address)
            for address, segment in zip(addresses, call.segments)
        )

    def _segment_of(self, address: int, nbytes: int):
        return self._regions.find(address, nbytes)

    def _choose(self, call: Call) -> Choice:
        algorithms = self._algorithms[call.collective]
        return choose(algorithms, call, self._context, self.table, self._forced.get(call.collective))

    def _again(self, collective: str, value: Any, timeout: float | None, send: Any, recv: Any, stream) -> Any:
        """Repeats a call on the same arrays, whose checks and plan are known: returns AGAIN, else the key to keep it
        under, None for arrays that are to be checked anew.

        value: the op or the root, or the shape if it has to be the same.
        """
        key = arrays.signature(collective, value, timeout, send, recv)
        try:
            ready = self._calls.get(key)
        except TypeError:  # an op or a root that is no key: it will be refused
            return None
        if ready is None or self._regions.table is not self._calls_on:
            return key
        if self._destroyed or self._abort_word.value:
            self.check()
        what, launch, source, target = ready
        self._start(what, launch, source, target, stream)
        return AGAIN

    def _run(
        self, collective, source, target, count,
        op=None, root=None, splits=None, stream=None, timeout=None, key=None, on_device=None, called=None,
    ) -> None:  # fmt: skip
        """Plans a call, starts it, and keeps it under `key`, unless that is None.

        called: the collective's name to the user, if it is another.
        """
        timeout = None if timeout is None else seconds_of(called or collective, timeout)
        empty = count == 0 and splits is None and on_device is None and collective != "barrier"
        if empty and not self._debug:
            return
        if collective == "reduce" and self._context.nodes > 1:
            compositions.reduce(self, source, target, op, root, stream, timeout)
            return
        call = self._call(collective, source, target, count, op, root or 0, splits)
        call = call._replace(on_device=on_device, timeout=timeout)
        with self._turn:
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
                if key is not None and not self._debug and not source.dtype.is_complex:
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
                team = team._replace(timeout=int(call.timeout * 1e9))
            with self._on_device():
                plan = self._plans[call] = Plan(self._choose(call), call, team, self._segments, self._rails)
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
        number, seconds = self._recorder.collectives + 1, call.timeout or self.timeout
        mine = agreement.Proposal(number, collective, dtype, op, root, count, *places, splits)
        try:
            agreement.check_alike(self._bootstrap.exchange(mine, seconds))
        except Mismatch as error:
            self._dump_for(error)
            raise
        except InitError as error:
            if not error.absent:
                raise
            fault = {"peer": error.absent[0], "kind": COMPARISON, "epoch": number, "timeout": int(seconds * 1e9)}
            words = [fault.get(name, 0) for name in layout.FAULT_FIELDS[1:]]
            self._control.words[1 : len(words) + 1] = torch.tensor(words)
            self._abort_word.value = layout.TIMED_OUT | self.rank << 8
            self.check()

    def _start(self, what: bytes, launch, send: int, recv: int, stream, lanes=("scratch",), collectives=1) -> None:
        """Launches on `stream`, after what was launched last in each of the lanes: calls in one lane share memory.

        what: the call as it is recorded.
        """
        if profiler._is_profiler_enabled:
            launch = shown(what, launch)
        with self._turn:
            if self._emulated:
                if stream is not None:
                    arrays.stream_handle(stream)  # what GPUs would refuse
                with self._lock:
                    index = self._recorder.note(what, 0)
                self._interpret(launch, send, recv)
                self._recorder.end(index)
                return
            index = self._index
            if stream is None:
                handle = torch._C._cuda_getCurrentRawStream(index)
            else:
                handle = stream if type(stream) is int else arrays.stream_handle(stream)
            for lane in lanes:
                if self._streams.get(lane) != handle:
                    self._follow(lane, handle)
                    held = self._held.setdefault(lane, [])
                    if lane in self._streams:  # else in a graph: what was outside will yet be waited for
                        held.clear()
                    held.append(stream)
            self._recorder.note(what, handle, collectives)
            if torch._C._cuda_getDevice() == index:
                launch(send, recv, handle)
            else:
                with self._on_device():
                    launch(send, recv, handle)

    def start_fused(self, collective: str, kernel: str, tensor: torch.Tensor, launch, scratch: bool = False) -> None:
        """Calls launch() as a call of this communicator, recorded as `collective` by `kernel`: on the current stream,
        after the last one of that kernel, with which it shares memory, and with scratch=True after the last collective,
        for its kernel takes the team's epochs; in emulation it raises what failed there."""
        self.check()
        nbytes = tensor.numel() * tensor.itemsize
        what = described(collective, kernel, tensor.dtype, None, None, PLAIN, PLAIN, False, tensor.numel(), nbytes)

        def whole(*_):
            try:
                launch()
            except TdcclError:
                raise
            except BaseException:  # some of its kernels may run: this rank is no longer where its peers think
                self.abort()
                raise

        self._start(what, whole, 0, 0, None, lanes=(kernel, "scratch") if scratch else (kernel,))

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
        return torch.cuda.stream(stream_of(arrays.stream_handle(stream), self._index))

    def _follow(self, lane, handle: int) -> None:
        """A call on a new stream waits for those on the last one in its lane: in a graph, which is ordered with other
        work where it is replayed, for those of that graph."""
        last = self._streams.get(lane)
        captured, last = self._captured.get(lane, (last, last))
        if is_capturing(handle):
            if captured not in (None, handle) and is_capturing(captured):
                self._order.follow(handle, captured)
            self._captured[lane] = handle, last
            self._streams.pop(lane, None)
            return
        if last not in (None, handle):
            self._order.follow(handle, last)
        self._captured.pop(lane, None)
        self._streams[lane] = handle

    def limit_blocks(self, max_blocks: int | None) -> None:
        """From the next call on a collective has at most so many blocks (None: as many as are fastest), to leave the
        other multiprocessors to computation; every rank has to be given the same. Raises ArgumentError below 1."""
        self.check_not_destroyed()
        try:
            self._context = self._context_for(max_blocks)._replace(multicast=self.multicast)
        except InitError as error:
            raise ArgumentError(f"limit_blocks: {error}") from error
        self.max_blocks = max_blocks
        self._plans.clear()
        self._calls.clear()

    def limit_waits(self, seconds: float) -> None:
        """From the next call on a wait of one that is given no timeout lasts so long at most. Raises ArgumentError."""
        self.check_not_destroyed()
        self.timeout = seconds_of("limit_waits", seconds)
        self._team = self._team._replace(timeout=int(self.timeout * 1e9))
        self._plans.clear()
        self._calls.clear()

    def use_table(self, table: tuning.Table) -> None:
        """Decides by another tuning table from the next call on; every rank has to be given the same."""
        self.table = table
        self._plans.clear()
        self._calls.clear()

    def use_products(self, products: tuning.Products) -> None:
        """Likewise of the tiles of products."""
        self.products = products


def shown(what: bytes, launch):
    """`launch` as torch's profiler shows it, by the call's name."""
    name = f"tdccl:{name_of(what)}"

    def launch_shown(*arguments):
        with profiler.record_function(name):
            launch(*arguments)

    return launch_shown


def overlap(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two contiguous tensors have a byte in common."""
    start, other = left.data_ptr(), right.data_ptr()
    return start < other + right.numel() * right.itemsize and other < start + left.numel() * left.itemsize
