"""The torch.distributed backend: translates torch's objects to `Communicator` calls and back."""

import atexit
import collections
import concurrent.futures
import contextlib
import queue
import threading
import time
import types
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import ReduceOp
from torch.futures import Future

from tdccl import environment, tuning
from tdccl.communicator import Communicator
from tdccl.errors import ArgumentError, DestroyedError, InitError, TdcclError, Timeout
from tdccl.membership import seconds_of, survivors
from tdccl.runtime.arenas import nothing_placed
from tdccl.runtime.streams import aside, current_stream, own_stream
from tdccl.transport.bootstrap import StoreBootstrap

# By hash, which of a ReduceOp is its number: it takes half as long to ask as the number itself.
_OPS = {
    hash(ReduceOp.SUM): "sum", hash(ReduceOp.AVG): "avg", hash(ReduceOp.MIN): "min", hash(ReduceOp.MAX): "max",
    hash(ReduceOp.PRODUCT): "prod", hash(ReduceOp.BAND): "and", hash(ReduceOp.BOR): "or", hash(ReduceOp.BXOR): "xor",
}  # fmt: skip
_ON_BOOL = {"sum": "or", "max": "or", "min": "and", "prod": "and"}  # a bool is a truth value, as NCCL has it

_NONE = timedelta(0)  # the timeout of a call that was given one is longer
_COALESCED, _ALLGATHER = c10d.AllreduceCoalescedOptions(), c10d.AllgatherOptions()
_REDUCE_SCATTER, _ALL_TO_ALL = c10d.ReduceScatterOptions(), c10d.AllToAllOptions()

_Allreduce, _Broadcast, _Reduce = c10d.AllreduceOptions, c10d.BroadcastOptions, c10d.ReduceOptions
_Allgather, _ReduceScatter = c10d.AllgatherOptions, c10d.ReduceScatterOptions
_Gather, _Scatter, _Barrier = c10d.GatherOptions, c10d.ScatterOptions, c10d.BarrierOptions
# What a program may give in the place of options, in this order; then a timeout.
_GIVEN = {
    _Allreduce: ["reduceOp"], _Broadcast: ["rootRank"], _Reduce: ["rootRank", "reduceOp"], _Allgather: [],
    _ReduceScatter: ["reduceOp"], _Gather: ["rootRank"], _Scatter: ["rootRank"], _Barrier: [],
}  # fmt: skip
_FIELDS = {"op": "reduceOp", "root": "rootRank"}  # by torch's names of arguments, where they are others


class OnStream:
    """`with torch.cuda.stream(stream)` in a tenth of its time, which is longer than a small collective takes."""

    __slots__ = ("_before", "_device", "_stream")

    def __init__(self, stream: torch.cuda.Stream):
        self._stream = stream

    def __enter__(self) -> None:
        stream = self._stream
        self._device = torch._C._cuda_getDevice()
        self._before = torch._C._cuda_getCurrentStream(stream.device_index)
        torch._C._cuda_setStream(stream.stream_id, stream.device_index, stream.device_type)

    def __exit__(self, *_) -> None:
        torch._C._cuda_setStream(*self._before)
        if self._device != self._before[1]:
            torch._C._cuda_setDevice(self._device)


_Future = torch._C.Future  # what torch's own backends return, too
_Event = torch._C._CudaEventBase  # torch.cuda.Event, without a layer of Python in every call


# By GPU, streams of groups that are gone.
_idle: dict[int, list] = collections.defaultdict(list)


class Beside:
    """A stream of a group's own, beside the caller's."""

    def __init__(self, device: torch.device):
        self._index, self._lock = device.index, threading.Lock()
        try:
            self.stream = _idle[device.index].pop()
        except IndexError:
            self.stream = own_stream(device.index)
        self.handle = self.stream.cuda_stream
        self._last = _nobody
        self._event = _Event()  # one for all, as a wait keeps what it stood for when it was made

    def __del__(self, idle=_idle):  # at the end of the process the module has no names any more
        idle[self._index].append(self.stream)

    def follow(self, event=None) -> None:
        """What it is given from now on waits for the event, or for what the caller's current stream has been given."""
        last = self._last()
        if last is not None:
            last.mark_end()
        with self._lock:
            if event is None:
                event = self._event
                event.record(current_stream(self._index))
            event.wait(self.stream)

    def ends_with(self, work: "Work") -> None:
        """Until it is given more, and so is told to follow, the end of `work` is where this stream is."""
        self._last = weakref.ref(work)


def _nobody() -> None:
    """Like the weak reference to a Work that is gone."""


# By GPU, events of Works that are gone: to make and destroy one takes CUDA microseconds.
_spare: dict[int, list] = collections.defaultdict(list)


class Work(dist.Work):
    """A collective: on a stream, or complete as far as the host can tell (no stream).

    The event at its end is recorded when somebody asks for it, or more is put on the stream: mostly never, as DDP drops
    the Work as soon as it has the future, which has an event of its own.
    """

    __slots__ = ("_communicator", "_event", "_future", "_outputs", "_stream")

    def __init__(self, outputs=None, communicator=None, stream=None):
        super().__init__()
        self._outputs = outputs
        self._communicator = communicator
        self._stream = stream
        self._event = self._future = None

    def mark_end(self):
        """The event at its end."""
        if self._event is None:
            try:
                event = _spare[self._stream.device_index].pop()
            except IndexError:
                event = _Event()
            event.record(self._stream)
            self._event = event
        return self._event

    def __del__(self, spare=_spare):  # at the end of the process the module has no names any more
        if self._event is not None:  # who waits for it waits for what it stood for when told so
            spare[self._stream.device_index].append(self._event)

    def wait(self, timeout=None) -> bool:
        """Makes the current stream wait; the host only if there is a timeout, and for no longer than that.

        Raises Timeout if the call has not ended by then, which it still may; and what has failed the communicator.
        """
        if self._stream is not None:
            event = self.mark_end()
            if timeout:
                self._wait_on_host(timeout.total_seconds())
            event.wait(current_stream(self._stream.device_index))
        if self._communicator is not None:
            self._communicator.raise_fault()
        return True

    synchronize = block_current_stream = wait

    def _wait_on_host(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.mark_end().query():
            if time.monotonic() > deadline:
                raise Timeout(f"wait: the call has not ended within {seconds:g} s")
            time.sleep(5e-5)

    def is_completed(self) -> bool:
        return self._stream is None or self.mark_end().query()

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self):
        """What has failed the communicator, if this call has ended."""
        if self._communicator is not None and self.is_completed():
            try:
                self._communicator.raise_fault()
            except TdcclError as error:
                return error
        return None

    def result(self) -> list[torch.Tensor]:
        if self._outputs is None:
            raise ArgumentError("a synchronous call keeps no result and no future; make it with async_op=True")
        return self._outputs

    def get_future(self) -> Future:
        if self._future is None:
            outputs = self.result()
            if self._stream is None:
                self._future = _Future([])
                self._future.set_result(outputs)
            else:
                self._future = _Future([self._stream.device])
                # The result is ready where this stream is now, for which a future looks only if a tensor is in it.
                with OnStream(self._stream):
                    self._future.set_result(outputs or [torch.empty(0, device=self._stream.device)])
        return self._future


class BarrierWork(Work):
    """Its wait blocks the host, as torch documents for barriers on GPUs."""

    __slots__ = ()

    def wait(self, timeout=None) -> bool:
        if self._stream is not None:
            if timeout:
                self._wait_on_host(timeout.total_seconds())
            self.mark_end().synchronize()
            self._communicator.raise_fault()  # a barrier that gave up must not look passed
        return True


class MessageWork(Work):
    """A message on a GPU; on the receiver's side it knows the sender."""

    source = -1

    def _source_rank(self) -> int:
        return self.source


class HostWork(MessageWork):
    """A message in emulation: a call that another thread makes. Or several, which were coalesced."""

    def __init__(self, calls: list[concurrent.futures.Future], outputs: list[torch.Tensor]):
        super().__init__(outputs)
        self.calls = calls

    def wait(self, timeout=None) -> bool:
        seconds = timeout.total_seconds() if timeout else None
        if concurrent.futures.wait(self.calls, seconds).not_done:
            raise Timeout(f"wait: the message has not come within {seconds:g} s")
        for call in self.calls:
            call.result()
        return True

    synchronize = block_current_stream = wait

    def is_completed(self) -> bool:
        return all(call.done() for call in self.calls)

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self):
        return next(filter(None, (call.exception() for call in self.calls if call.done())), None)

    def get_future(self) -> Future:
        ends = [Future() for _ in self.calls]
        for call, ended in zip(self.calls, ends):
            call.add_done_callback(lambda _, ended=ended: ended.set_result(None))

        def outcome(_):
            self.wait()  # raises what a call raised: a future that was given an error crashes C++
            return self._outputs

        return torch.futures.collect_all(ends).then(outcome)


class TurnWork(HostWork):
    """A receive that another thread begins in its turn, for it or one before it has yet to learn who sends to it."""

    def _begun(self) -> MessageWork:
        return self.calls[0].result()

    def wait(self, timeout=None) -> bool:
        return super().wait(timeout) and self._begun().wait(timeout)

    synchronize = block_current_stream = wait

    def is_completed(self) -> bool:
        return super().is_completed() and (super().exception() is not None or self._begun().is_completed())

    def exception(self):
        return super().exception() or (self._begun().exception() if super().is_completed() else None)

    def get_future(self) -> Future:
        """Waits until the receive has been begun."""
        return self._begun().get_future()

    def _source_rank(self) -> int:
        return self._begun().source


class GpuLane:
    """Messages to or from one rank, on a stream of their own: other ranks' messages do not wait for them."""

    def __init__(self, communicator: Communicator):
        self._communicator = communicator
        self._beside = Beside(communicator.device)

    def submit(self, call, tensor, after=None) -> MessageWork:
        """after: an event, in the place of what the caller's current stream has been given."""
        stream = self._beside.stream
        self._beside.follow(after)
        with OnStream(stream):
            call(self._communicator)
        tensor.record_stream(stream)
        work = MessageWork([tensor], self._communicator, stream)
        self._beside.ends_with(work)
        return work

    def idle(self) -> bool:
        return self._beside.stream.query()

    def close(self) -> None:
        """Nothing to do: a stream ends with its last reference."""


class HostLane:
    """The same in emulation, where a kernel that waits keeps its thread."""

    def __init__(self, communicator: Communicator):
        self._communicator = communicator
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._last = None
        # A daemon, unlike an executor's: a message that never comes must not hold up the end of the process.
        self._thread = threading.Thread(target=self._serve, name="tdccl-message", daemon=True)
        self._thread.start()

    def submit(self, call, tensor, after=None) -> HostWork:
        self._last = concurrent.futures.Future()
        self._calls.put((call, self._last))
        return HostWork([self._last], [tensor])

    def idle(self) -> bool:
        return self._last is None or self._last.done()

    def close(self) -> None:
        """Ends the thread once it has made what was submitted."""
        ends_now = self.idle()
        self._calls.put(None)
        if ends_now:
            self._thread.join(1)  # a thread that frees tensors while the interpreter ends takes the process with it

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            call, pending = item
            try:
                pending.set_result(call(self._communicator))
            except BaseException as error:
                pending.set_exception(error)


class Coalesced(threading.local):
    """The messages that this thread has begun since `_start_coalescing`; None where it has begun no block."""

    messages: list[MessageWork] | None = None


# Work of synchronous calls: it is ordered on the caller's stream, so there is nothing to wait for.
_DONE = Work()


class Backend:
    """What torch gets when it asks a group for the backend of a device: the shim, with what it has not."""

    # Where init_process_group was given a device, meshes of several dimensions want the default group split.
    supports_splitting = True
    options = None

    def __init__(self, shim, group: "ProcessGroup"):
        self._shim, self._group = shim, group

    def __getattr__(self, name: str):
        return getattr(self._shim, name)

    def eager_connect_single_device(self, device: torch.device) -> None:
        """Where a group is made for a device: all ranks are there, and need not be at the first call any more."""
        self._group.connect(device)

    def _nothing_to_do(self, device=None) -> None:
        """Groups need none but their members to connect, and have no sequence numbers."""

    perform_nocolor_split = _set_sequence_number_for_group = _nothing_to_do

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return (device.type == "cuda") != environment.emulated()

    def allocate_tensor(self, size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """FSDP2 draws its buffers here after `set_allocate_memory_from_process_group_for_comm(True)`."""
        return self._group.communicator.lend(size, dtype)


class ProcessGroup(dist.ProcessGroup):
    """A process group over a `Communicator`, which is made at the first collective, on its tensors' device.

    On a host with GPUs it moves CUDA tensors, and leaves CPU tensors to Gloo; in emulation it moves CPU tensors.
    A synchronous call goes on the current stream, `async_op=True` on the group's own.
    """

    def __init__(self, options, pg_options=None):
        rank, size = options.group_rank, options.group_size
        super().__init__(rank, size)
        members = self._members = tuple(options.global_ranks_in_group)
        # A store outlives its groups, and one made again must not read old keys.
        name = "-".join(map(str, ("tdccl", options.group_id, *members)))
        life = options.store.add(f"{name}/lives/{rank}", 1)
        self._store = dist.PrefixStore(f"{name}/{life}", options.store)
        self._name, self._timeout = options.group_id, options.timeout
        self._rank, self._ranks = rank, size
        self._gpu = not environment.emulated()
        # The first group that torch makes is its default one.
        self._scratch = environment.subgroup_scratch_bytes() if dist.is_initialized() else None
        self._lock, self._gloo_lock = threading.Lock(), threading.Lock()  # two: ranks may come to both in any order
        self._communicator: Communicator | None = None
        self._beside: Beside | None = None  # on a GPU, once there is a communicator
        self._gloo_group = None
        self._lanes: dict[tuple[str, int], GpuLane | HostLane] = {}
        self._turns: HostLane | None = None  # where receives are begun, once there was one from anyone
        self._backends: dict[torch.device, Backend] = {}  # FSDP2 asks for it in every allocation
        self._coalesced = Coalesced()
        self._barriers = 0
        self._ended = False
        self._register_shim(["cuda", "cpu"] if self._gpu else ["cpu"])

    def _register_shim(self, devices: list[str]) -> None:
        """Tells torch our devices, and makes calls that cannot reach Python fail rather than do nothing."""
        options = c10d.FakeProcessGroup.Options()
        options.error_on_collective = True
        shim = c10d.FakeProcessGroup._create_internal(self._rank, self._ranks, options)
        for device in devices:
            self._register_backend(torch.device(device), dist.ProcessGroup.BackendType.CUSTOM, shim)
        self._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)

    # ---- what torch asks of a group (its names) ------------------------------------------------------

    def getBackendName(self) -> str:
        return "tdccl"

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    def get_group_store(self):
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        """On a GPU host the CPU is among them for "cpu:gloo,cuda:tdccl" only: where it is, torch puts objects, barriers
        and what it makes by itself there, and saves checkpoints beside the training."""
        config = dist.distributed_c10d._world.pg_backend_config.get(self, "")
        if self._gpu and "cpu:gloo" not in config:
            return [torch.device("cuda")]
        return super()._device_types

    def _get_backend(self, device: torch.device) -> Backend:
        backend = self._backends.get(device)
        if backend is None:
            backend = self._backends[device] = Backend(super()._get_backend(device), self)
        return backend

    @property
    def communicator(self) -> Communicator:
        """The group's communicator; made now, by all ranks, if no collective has needed it yet."""
        return self._communicator or self.connect(None)

    def set_timeout(self, timeout: timedelta) -> None:
        """Of calls from now on that are given none, and of the wait for ranks to come if there was no call yet."""
        self._timeout = timeout
        if self._communicator is not None:
            self._communicator.limit_waits(timeout.total_seconds())

    def split_group(self, ranks, timeout=None, opts=None, group_name=None, group_desc=None, device_types=None):
        """The group of these ranks of this one; None on ranks that are not among them."""
        if self._rank not in ranks:
            return None
        options = c10d._DistributedBackendOptions()
        options.store = dist.PrefixStore(group_name, self._store)
        options.timeout, options.group_id = timeout or self._timeout, group_name
        options.group_rank, options.group_size = ranks.index(self._rank), len(ranks)
        options.global_ranks_in_group = [self._members[rank] if self._members else rank for rank in ranks]
        return ProcessGroup(options, opts)

    def shutdown(self) -> None:
        """Ends the group; collective, unless its communicator has failed: then nobody is waited for."""
        communicator = self._end()
        if communicator is not None:
            communicator.destroy()

    def abort(self) -> None:
        """Ends the group at once: calls under way on any rank end, and theirs to come raise Aborted."""
        communicator = self._end()
        if communicator is not None:
            communicator.abort()
            # Not here: torch aborts groups one after another, and the GPU has done its work only after the last.
            thread = threading.Thread(target=communicator.destroy, name="tdccl-destroy", daemon=True)
            thread.start()
            atexit.register(thread.join, 5)  # a thread that is in C++ when the interpreter ends takes it down

    def meet(self, exclude: list[int]):
        """A Store among the ranks that are not in `exclude`, and those ranks; what `shrink` begins with."""
        if self._communicator is not None:
            return self._communicator.meet(exclude)
        members = survivors(self._rank, self._ranks, exclude)
        return dist.PrefixStore("-".join(map(str, ("shrunk", *members))), self._store), members

    def _end(self) -> Communicator | None:
        """Lets go of everything; returns the communicator, if there was one."""
        self._ended = True  # also for a thread that waits for ranks to come, with the lock
        with self._lock:
            communicator, lanes = self._communicator, [*self._lanes.values(), *filter(None, [self._turns])]
            self._communicator, self._gloo_group, self._turns = None, None, None
            self._lanes.clear()
            self._backends.clear()
        for lane in lanes:
            lane.close()
        return communicator

    # ---- collectives ---------------------------------------------------------------------------------

    def allreduce(self, tensors, opts=None, *more, **named):
        if type(opts) is not _Allreduce:
            return self.allreduce(*_in_full(_Allreduce, [tensors], [opts, *more], named))
        (tensor,) = tensors
        if self._gpu and tensor.is_cpu:
            return self._gloo().allreduce(tensors, opts)
        if not tensor.is_contiguous():
            if tensor.is_sparse:
                with nothing_placed():
                    return self._allreduce_sparse(tensor, opts)
            tensor = _dense(tensor)
        source, op = _reduced("all_reduce", opts, tensor)
        comm, stream, timeout = self._begin(opts, tensor)
        comm.all_reduce(source, tensor, op, stream=stream, timeout=timeout)
        return _DONE if stream is None else self._work(comm, tensors if source is tensor else [source], tensors)

    def _allreduce_sparse(self, tensor, opts):
        """The union of all ranks' elements, those at the same place added in rank order. Always on the current stream:
        the host has to wait for the number of each rank's elements, on which the shape of the result depends."""
        if opts.reduceOp != ReduceOp.SUM:
            raise ArgumentError("all_reduce: a sparse tensor takes SUM alone")
        comm = self._communicator or self.connect(tensor.device)
        own = tensor.detach().coalesce()
        counts = comm.all_gather(torch.tensor([own._nnz()], device=own.device)).tolist()
        indices = comm.all_gather(own.indices().t().contiguous(), None, counts)
        values = comm.all_gather(own.values(), None, counts)
        with torch.no_grad():
            tensor.copy_(torch.sparse_coo_tensor(indices.t(), values, own.shape).coalesce())
        work = Work([tensor], comm, current_stream(comm.device.index) if self._gpu else None)
        if self._gpu:
            work.mark_end()
        return work

    def allreduce_coalesced(self, tensors, opts=_COALESCED):
        if self._gpu and tensors[0].is_cpu:
            return self._gloo().allreduce_coalesced(tensors, opts)

        def call(comm, **options):
            for tensor in map(_dense, tensors):
                source, op = _reduced("all_reduce", opts, tensor)
                comm.all_reduce(source, tensor, op, **options)

        return self._compose(opts, tensors, tensors, call)

    def broadcast(self, tensors, opts=None, *more, **named):
        if type(opts) is not _Broadcast:
            return self.broadcast(*_in_full(_Broadcast, [tensors], [opts, *more], named))
        (tensor,) = tensors
        if self._gpu and tensor.is_cpu:
            return self._gloo().broadcast(tensors, opts)
        comm, stream, timeout = self._begin(opts, tensor)
        comm.broadcast(_dense(tensor), opts.rootRank, stream=stream, timeout=timeout)
        return _DONE if stream is None else self._work(comm, tensors, tensors)

    def _allgather_base(self, output, input, opts=_ALLGATHER):
        if self._gpu and input.is_cpu:
            return self._gloo()._allgather_base(output, input, opts)
        comm, stream, timeout = self._begin(opts, input)
        comm.all_gather(input, output, stream=stream, timeout=timeout)
        return _DONE if stream is None else self._work(comm, [input], [output])

    def allgather_into_tensor_coalesced(self, outputs, inputs, opts=_ALLGATHER):
        if self._gpu and inputs[0].is_cpu:
            return self._gloo().allgather_into_tensor_coalesced(outputs, inputs, opts)

        def call(comm, **options):
            for output, input in zip(outputs, inputs):
                comm.all_gather(input, output, **options)

        return self._compose(opts, inputs, outputs, call)

    def allgather(self, outputs, inputs, opts=None, *more, **named):
        if type(opts) is not _Allgather:
            return self.allgather(*_in_full(_Allgather, [outputs, inputs], [opts, *more], named))
        (pieces,), (shard,) = outputs, inputs
        if self._gpu and shard.is_cpu:
            return self._gloo().allgather(outputs, inputs, opts)
        self._check_pieces("all_gather", "output", pieces, shard)
        counts = [piece.numel() for piece in pieces]
        if counts[self._rank] != shard.numel():
            raise ArgumentError(
                f"all_gather: output {self._rank} has {counts[self._rank]} elements, the input of that rank has "
                f"{shard.numel()}"
            )

        def call(comm, **options):
            gathered = torch.empty(sum(counts), dtype=shard.dtype, device=shard.device)
            even = len(set(counts)) == 1
            comm.all_gather(shard.contiguous().view(-1), gathered, None if even else counts, **options)
            _unpack(gathered, pieces)

        return self._compose(opts, inputs, pieces, call)

    def allgather_coalesced(self, outputs, inputs, opts=_ALLGATHER):
        """`outputs` are lists, one for each rank, each with an output for every input."""
        if self._gpu and inputs[0].is_cpu:
            return self._gloo().allgather_coalesced(outputs, inputs, opts)
        for rank, pieces in enumerate(outputs):
            if len(pieces) != len(inputs):
                raise ArgumentError(
                    f"all_gather_coalesced: {len(pieces)} outputs for rank {rank}, expected one for each of "
                    f"{len(inputs)} inputs"
                )
        by_input = [*zip(*outputs)]
        for pieces, shard in zip(by_input, inputs):
            self._check_pieces("all_gather_coalesced", "output", pieces, shard, shard.numel())

        def call(comm, **options):
            for pieces, shard in zip(by_input, inputs):
                _unpack(comm.all_gather(shard.contiguous().view(-1), **options), pieces)

        return self._compose(opts, inputs, [piece for pieces in outputs for piece in pieces], call)

    def _reduce_scatter_base(self, output, input, opts=_REDUCE_SCATTER):
        if self._gpu and input.is_cpu:
            return self._gloo()._reduce_scatter_base(output, input, opts)
        source, op = _reduced("reduce_scatter", opts, input)
        comm, stream, timeout = self._begin(opts, input)
        comm.reduce_scatter(*_real(op, source, output), op, stream=stream, timeout=timeout)
        return _DONE if stream is None else self._work(comm, [source], [output])

    def reduce_scatter_tensor_coalesced(self, outputs, inputs, opts=_REDUCE_SCATTER):
        if self._gpu and inputs[0].is_cpu:
            return self._gloo().reduce_scatter_tensor_coalesced(outputs, inputs, opts)

        def call(comm, **options):
            for output, input in zip(outputs, inputs):
                source, op = _reduced("reduce_scatter", opts, input)
                comm.reduce_scatter(*_real(op, source, output), op, **options)

        return self._compose(opts, inputs, outputs, call)

    def reduce_scatter(self, outputs, inputs, opts=None, *more, **named):
        if type(opts) is not _ReduceScatter:
            return self.reduce_scatter(*_in_full(_ReduceScatter, [outputs, inputs], [opts, *more], named))
        (shard,), (pieces,) = outputs, inputs
        if self._gpu and shard.is_cpu:
            return self._gloo().reduce_scatter(outputs, inputs, opts)
        self._check_pieces("reduce_scatter", "input", pieces, shard)
        counts = [piece.numel() for piece in pieces]

        def call(comm, **options):
            source, op = _reduced("reduce_scatter", opts, _pack(pieces))
            reduced = torch.empty_like(source[: counts[self._rank]])
            if len(set(counts)) == 1:
                comm.reduce_scatter(*_real(op, source, reduced), op, **options)
            else:  # one reduction a rank, as they are of different sizes
                for root, part in enumerate(source.split(counts)):
                    comm.reduce(*_real(op, part, reduced if root == self._rank else part), op, root, **options)
            _unpack(reduced, [shard])

        return self._compose(opts, pieces, outputs, call)

    def alltoall_base(self, output, input, output_splits=(), input_splits=(), opts=_ALL_TO_ALL):
        if self._gpu and input.is_cpu:
            return self._gloo().alltoall_base(output, input, output_splits, input_splits, opts)
        sends = receives = None
        if output_splits or input_splits:
            sends, receives = (list(splits) or self._equal_rows(t) for splits, t in
                               ((input_splits, input), (output_splits, output)))  # fmt: skip
        comm, stream, timeout = self._begin(opts, input)
        comm.all_to_all(input, output, sends, receives, stream=stream, timeout=timeout)
        return _DONE if stream is None else self._work(comm, [input], [output])

    def alltoall(self, outputs, inputs, opts=_ALL_TO_ALL):
        if self._gpu and inputs[0].is_cpu:
            return self._gloo().alltoall(outputs, inputs, opts)
        self._check_pieces("all_to_all", "input", inputs, inputs[0])
        self._check_pieces("all_to_all", "output", outputs, inputs[0])

        # Always with splits: pieces that look equal here may be uneven elsewhere, and all ranks must decide alike.
        sends, receives = ([piece.numel() for piece in pieces] for pieces in (inputs, outputs))

        def call(comm, **options):
            sent = _pack(inputs)
            received = torch.empty(sum(receives), dtype=sent.dtype, device=sent.device)
            comm.all_to_all(sent, received, sends, receives, **options)
            _unpack(received, outputs)

        return self._compose(opts, inputs, outputs, call)

    def reduce(self, tensors, opts=None, *more, **named):
        if type(opts) is not _Reduce:
            return self.reduce(*_in_full(_Reduce, [tensors], [opts, *more], named))
        (tensor,) = tensors
        if self._gpu and tensor.is_cpu:
            return self._gloo().reduce(tensors, opts)
        tensor = _dense(tensor)
        source, op = _reduced("reduce", opts, tensor)
        comm, stream, timeout = self._begin(opts, tensor)
        comm.reduce(*_real(op, source, tensor), op, opts.rootRank, stream=stream, timeout=timeout)
        return _DONE if stream is None else self._work(comm, [source], tensors)

    def gather(self, outputs, inputs, opts=None, *more, **named):
        if type(opts) is not _Gather:
            return self.gather(*_in_full(_Gather, [outputs, inputs], [opts, *more], named))
        (shard,), root = inputs, opts.rootRank
        if self._gpu and shard.is_cpu:
            return self._gloo().gather(outputs, inputs, opts)
        pieces = outputs[0] if self._rank == root else []
        if pieces:
            self._check_pieces("gather", "output", pieces, shard, shard.numel())

        def call(comm, **options):
            gathered = comm.gather(shard.contiguous().view(-1), None, root, **options)
            if gathered is not None:
                _unpack(gathered, pieces)

        return self._compose(opts, inputs, pieces, call)

    def scatter(self, outputs, inputs, opts=None, *more, **named):
        if type(opts) is not _Scatter:
            return self.scatter(*_in_full(_Scatter, [outputs, inputs], [opts, *more], named))
        (shard,), root = outputs, opts.rootRank
        if self._gpu and shard.is_cpu:
            return self._gloo().scatter(outputs, inputs, opts)
        pieces = inputs[0] if self._rank == root else []
        if pieces:
            self._check_pieces("scatter", "input", pieces, shard, shard.numel())

        def call(comm, **options):
            received = torch.empty(shard.numel(), dtype=shard.dtype, device=shard.device)
            comm.scatter(_pack(pieces) if pieces else None, received, root, **options)
            _unpack(received, [shard])

        return self._compose(opts, [shard, *pieces], outputs, call)

    # ---- messages between two ranks: always asynchronous, each peer and direction in a lane of its own ---

    # Tags are not looked at, as NCCL does not: messages from one rank to another arrive in the order of their sends.

    def send(self, tensors, to, tag=0):
        (tensor,) = tensors
        if self._gpu and tensor.is_cpu:
            return self._gloo().send(tensors, to, tag)
        return self._in_lane("to", to, tensor)

    def recv(self, tensors, source, tag=0):
        (tensor,) = tensors
        if self._gpu and tensor.is_cpu:
            return self._gloo().recv(tensors, source, tag)
        if self._turns is not None and not self._turns.idle():
            return self._in_turn(tensor, source)
        return self._in_lane("from", source, tensor)

    def recv_anysource(self, tensors, tag=0):
        (tensor,) = tensors
        if self._gpu and tensor.is_cpu:
            return self._gloo().recv_anysource(tensors, tag)
        return self._in_turn(tensor, None)

    def _in_turn(self, tensor: torch.Tensor, source: int | None) -> TurnWork:
        """A receive from `source`, None: from whoever sends first, that is begun when all before it have been."""
        if self._coalesced.messages is not None:
            raise ArgumentError("recv: a receive from any source, and one that waits for its turn, cannot be coalesced")
        communicator = self._communicator or self.connect(tensor.device)
        now = None
        if self._gpu:  # not what the program does there later: it may wait for the sender
            now = _Event()
            now.record(current_stream(communicator.device.index))

        def begin(communicator):
            sender = self._wait_for_message(communicator) if source is None else source
            work = self._in_lane("from", sender, tensor, now)
            work.source = sender
            return work

        with self._lock:
            self._check_not_ended()
            self._turns = self._turns or HostLane(communicator)
            return TurnWork(self._turns.submit(begin, tensor).calls, [tensor])

    def _wait_for_message(self, communicator: Communicator) -> int:
        """The rank whose message is there first, of those from which no `recv` is under way; blocks the host."""
        deadline = time.monotonic() + communicator.timeout
        while time.monotonic() < deadline:
            source = self._first_sender(communicator)
            if source is not None:
                return source
            time.sleep(1e-4)
        raise Timeout(f"recv: rank {self._rank} waited {communicator.timeout:g} s for a message of any rank")

    def _first_sender(self, communicator: Communicator) -> int | None:
        with self._lock:  # under which a group ends, and the memory that is looked at with it
            self._check_not_ended()
            for source in range(self._ranks):
                lane = self._lanes.get(("from", source))
                if source != self._rank and (lane is None or lane.idle()):
                    with aside(communicator.device):
                        come = communicator.has_message_from(source)
                    if come:
                        return source
        return None

    def _in_lane(self, way: str, rank: int, tensor: torch.Tensor, after=None) -> MessageWork:
        communicator = self._communicator or self.connect(tensor.device)
        with self._lock:
            lane = self._lanes.get((way, rank))
            if lane is None:
                lane = self._lanes[way, rank] = GpuLane(communicator) if self._gpu else HostLane(communicator)
        move, dense = Communicator.send if way == "to" else Communicator.recv, _dense(tensor)
        work = lane.submit(lambda comm: move(comm, dense, rank), tensor, after)
        if self._coalesced.messages is not None:
            self._coalesced.messages.append(work)
        return work

    def monitored_barrier(self, timeout=None, wait_all_ranks=False):
        """A barrier on the host that names the ranks which do not come within `timeout` (default: the group's).

        What it raises is in gloo's words, which programs look for.
        """
        if isinstance(timeout, c10d.BarrierOptions) or timeout is None or timeout.total_seconds() < 0:
            timeout = self._timeout
        self._barriers += 1
        store = dist.PrefixStore(f"monitored/{self._barriers}", self._store)
        store.set(str(self._rank), "here")
        missing = []
        if self._rank == 0:
            deadline = time.monotonic() + timeout.total_seconds()
            for rank in range(1, self._ranks):
                left = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
                try:
                    store.wait([str(rank)], left)
                except RuntimeError:
                    missing.append(rank)
                    if not wait_all_ranks:
                        break
            store.set("missing", ",".join(map(str, missing)))
        else:
            reached = f"Rank {self._rank} successfully reached monitoredBarrier, but received errors while waiting for"
            try:
                store.wait(["missing"], timeout * 2)
            except RuntimeError as error:
                raise RuntimeError(f"{reached} send/recv from rank 0: it did not come") from error
            if others := store.get("missing").decode():
                raise RuntimeError(f"{reached} send/recv from rank 0: it waited in vain for {others}")
        if missing:
            ranks = f"Ranks {', '.join(map(str, missing))}" if wait_all_ranks else f"Rank {missing[0]}"
            milliseconds = int(timeout.total_seconds() * 1000)
            raise RuntimeError(
                f"Rank 0 timed out in monitoredBarrier after {milliseconds} ms: {ranks} failed to pass monitoredBarrier"
            )

    def barrier(self, opts=None, **named):
        if type(opts) is not _Barrier:
            return self.barrier(*_in_full(_Barrier, [], [opts], named))
        device = opts.device
        if self._gpu and device is not None and device.type == "cpu":
            return self._gloo().barrier(opts)
        communicator = self._communicator or self.connect(device)
        seconds = opts.timeout.total_seconds() if opts.timeout > _NONE else None
        if not self._gpu:
            communicator.barrier(timeout=seconds)
            return BarrierWork([])
        stream = current_stream(communicator.device.index)
        if opts.asyncOp:
            self._beside.follow()
            stream = self._beside.stream
        communicator.barrier(stream=stream, timeout=seconds)
        work = BarrierWork([], communicator, stream)
        work.mark_end()
        return work

    def _start_coalescing(self, device) -> None:
        """Each call is one launch already; messages, which go in lanes of their own, are kept for `_end_coalescing`."""
        if self._gpu and device.type == "cpu":
            return self._gloo()._start_coalescing(device)  # which says that it cannot
        self._coalesced.messages = []

    def _end_coalescing(self, device):
        """One Work for all: the stream of asynchronous calls, made to wait for the others, ends when all have ended."""
        messages, self._coalesced.messages = self._coalesced.messages, None
        if not self._gpu:
            return HostWork([call for message in messages for call in message.calls], [])
        if self._beside is None:
            return Work([])  # all were Gloo's, or there were none
        self._beside.follow()
        for message in messages:
            message.mark_end().wait(self._beside.stream)
        work = Work([], self._communicator, self._beside.stream)
        work.mark_end()
        return work

    # torch 2.13's names
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base

    # ---- how a call is run ---------------------------------------------------------------------------

    def _begin(self, opts, tensor) -> tuple[Communicator, int | None, float | None]:
        """(communicator, stream, timeout) of a call on `tensor`; a synchronous one goes where the caller is: None."""
        communicator = self._communicator or self.connect(tensor.device)
        given = opts.timeout
        timeout = given.total_seconds() if given > _NONE else None
        if not opts.asyncOp:
            return communicator, None, timeout
        beside = self._beside
        if beside is None:
            return communicator, 0, timeout  # emulation knows no streams
        beside.follow()
        return communicator, beside.handle, timeout

    def _work(self, communicator, inputs, outputs) -> Work:
        """Of an asynchronous call that has been launched."""
        beside = self._beside
        if beside is None:
            return Work(list(outputs))  # it has ended, and well: what befalls a rank later is not its matter
        stream = beside.stream
        for tensor in outputs if inputs is outputs else (*inputs, *outputs):
            tensor.record_stream(stream)  # its memory may be freed, but not reused, before the stream is there
        work = Work(list(outputs), communicator, stream)
        beside.ends_with(work)
        return work

    def _compose(self, opts, inputs, outputs, call):
        """A `call(communicator, timeout=)` of several steps, which go where torch's current stream is."""
        comm, stream, timeout = self._begin(opts, inputs[0])
        try:
            with nothing_placed(), OnStream(self._beside.stream) if stream else contextlib.nullcontext():
                call(comm, timeout=timeout)
        except BaseException:
            if stream:
                self._work(comm, inputs, outputs)  # steps before may be under way, on memory that the caller drops
            raise
        return _DONE if stream is None else self._work(comm, inputs, outputs)

    def connect(self, device: torch.device | None) -> Communicator:
        """The communicator; made now, by all ranks, if there is none: a group without a device has one from its first
        call on, whose tensors tell the device."""
        with self._lock, nothing_placed():
            self._check_not_ended()
            if self._communicator is None:
                try:
                    self._communicator = self._meet_all(device)  # last: other threads look at it without the lock
                except InitError as error:
                    if error.absent:
                        error.args = (f"{error} A group's first call, be it a message of two, takes all of its ranks.",)
                    raise
            return self._communicator

    def _meet_all(self, device: torch.device | None) -> Communicator:
        seconds = seconds_of("init_process_group", self._timeout.total_seconds())
        world_rank = self._members[self._rank] if self._members else self._rank
        bootstrap = StoreBootstrap(self._store, self._rank, self._ranks, seconds, world_rank=world_rank)
        bootstrap.interrupt = self._check_not_ended
        blocks = environment.most_blocks() or tuning.BESIDE_COMPUTATION
        if not self._gpu:
            return Communicator(bootstrap, None, seconds, blocks, self._scratch)
        with torch.cuda.device(self.bound_device_id or device or torch.device("cuda")):
            device = torch.device("cuda", torch.cuda.current_device())
            communicator = Communicator(bootstrap, device, seconds, blocks, self._scratch)
            self._beside = Beside(device)
        return communicator

    def _check_not_ended(self) -> None:
        if self._ended:
            raise DestroyedError(f"process group {self._name!r} is destroyed")

    def _gloo(self):
        """The group for CPU tensors on a host with GPUs, made at its first call."""
        with self._gloo_lock:
            self._check_not_ended()
            if self._gloo_group is None:
                store = dist.PrefixStore("gloo", self._store)
                group = dist.ProcessGroup(store, self._rank, self._ranks)
                gloo = dist.ProcessGroupGloo(store, self._rank, self._ranks, timeout=self._timeout)
                group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
                group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
                self._gloo_group = group
            group = self._gloo_group
            self._check_not_ended()  # meanwhile: that lets go of the group
            return group

    def _check_pieces(self, collective, role, pieces, like, numel=None) -> None:
        """Lists are copied to and from one buffer; a copy would convert in silence what does not fit."""
        if len(pieces) != self._ranks:
            raise ArgumentError(
                f"{collective}: {len(pieces)} {role} tensors, expected one for each of {self._ranks} ranks"
            )
        for rank, piece in enumerate(pieces):
            if piece.dtype != like.dtype or piece.device != like.device:
                raise ArgumentError(
                    f"{collective}: {role} {rank} is {piece.dtype} on {piece.device}, "
                    f"expected {like.dtype} on {like.device}"
                )
            if numel is not None and piece.numel() != numel:
                raise ArgumentError(
                    f"{collective}: {role} {rank} has {piece.numel()} elements, expected {numel}: they must be even"
                )

    def _equal_rows(self, tensor) -> list[int]:
        rows = tensor.shape[0] if tensor.dim() else 0
        if rows % self._ranks:
            raise ArgumentError(f"all_to_all: {rows} rows without splits, expected a multiple of {self._ranks} ranks")
        return [rows // self._ranks] * self._ranks


def shrink(group: "ProcessGroup | None" = None, *, exclude: list[int]) -> ProcessGroup:
    """A process group of the ranks of `group` (None: torch's default one) that are not in `exclude`, in their order.

    exclude: ranks of that group. Only the others call it, all of them, after any fault; the group is aborted. Shrinking
    the default group makes a new default group, and aborts all others, because it renumbers the ranks: make them anew.

    Raises as `Communicator.shrink`. If the group has made no call yet, the ranks meet at its store: InitError if the
    process that holds that one is gone.
    """
    world = dist.distributed_c10d._world
    group = group or dist.group.WORLD
    if not isinstance(group, ProcessGroup):
        raise ArgumentError(f"shrink: group is {group!r}, expected a process group of backend 'tdccl'")
    store, members = group.meet(exclude)
    is_default = group is dist.group.WORLD
    ranks = list(range(len(members))) if is_default else [dist.get_process_group_ranks(group)[rank] for rank in members]
    backend, config = world.pg_map[group][0], world.pg_backend_config[group]
    options = c10d._DistributedBackendOptions()
    options.store, options.timeout, options.group_id = store, group._timeout, f"{group.getGroupName()}:shrunk"
    options.group_rank, options.group_size = members.index(group._rank), len(members)
    options.global_ranks_in_group = [] if is_default else ranks
    dist.distributed_c10d._abort_process_group(group)

    smaller = ProcessGroup(options)
    smaller.bound_device_id = group.bound_device_id
    if is_default:
        dist.distributed_c10d._update_default_pg(smaller)
    world.pg_map[smaller], world.pg_names[smaller] = (backend, store), options.group_id
    world.pg_backend_config[smaller] = config
    world.pg_group_ranks[smaller] = {rank: number for number, rank in enumerate(ranks)}
    tag = f"ptd:{options.group_id}"
    for each in ("", tag):
        world.tags_to_pg.setdefault(each, []).append(smaller)
    world.pg_to_tag[smaller] = tag
    c10d._register_process_group(options.group_id, smaller)
    return smaller


def _in_full(kind: type, tensors: list, given: list, named: dict) -> list:
    """The arguments as torch itself gives them, lists and options, of a call with bare tensors, an op, a root, or a
    timeout, all of which torch's own groups take, too."""
    options = kind()
    by_place = zip([*_GIVEN[kind], "timeout"], given)
    for field, value in (*by_place, *((_FIELDS.get(name, name), value) for name, value in named.items())):
        if value is not None:
            setattr(options, field, value)
    bare = any(isinstance(each, torch.Tensor) for each in tensors)
    return [*([each] if bare else each for each in tensors), options]


def _reduced(collective: str, opts, tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
    """(input, op) as the communicator takes them: of a PREMUL_SUM the sum of the input times its factor."""
    op = opts.reduceOp
    name = _OPS.get(hash(op))
    if name is None:
        if op != ReduceOp.PREMUL_SUM:
            raise ArgumentError(
                f"{collective}: {op.op.name} is not offered, expected SUM, AVG, MIN, MAX, PRODUCT, BAND, "
                "BOR, BXOR or PREMUL_SUM"
            )
        # torch 2.13 has it as an attribute.
        factor = op.factor if hasattr(op, "factor") else op.__getstate__()[1]
        return tensor * factor, "sum"
    return tensor, _ON_BOOL.get(name, name) if tensor.dtype is torch.bool else name


def _real(op: str, source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Complex numbers as pairs of real ones, where that makes no difference; torch does so for all_reduce alone."""
    if source.is_complex() and target.is_complex() and op in ("sum", "avg"):
        return torch.view_as_real(source.detach()), torch.view_as_real(target.detach())
    return source, target


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """One in channels_last as it lies in memory, for calls in which it lies so on all ranks; others as they are."""
    if not tensor.is_contiguous():
        for order in (torch.channels_last, torch.channels_last_3d):
            if tensor.is_contiguous(memory_format=order):
                return tensor.detach().as_strided((tensor.numel(),), (1,))
    return tensor


def _pack(pieces) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([piece.reshape(-1) for piece in pieces])


def _unpack(flat: torch.Tensor, pieces) -> None:
    parts = flat.split([piece.numel() for piece in pieces])
    with torch.no_grad():
        torch._foreach_copy_(list(pieces), [part.view(piece.shape) for part, piece in zip(parts, pieces)])


_tensors_by_pickling = torch._jit_internal._extract_tensors


def _tensors_in(value) -> list[torch.Tensor]:
    """What C++ asks of a future's value, when it is set and again when DDP reads it. torch pickles the value to find
    them, which takes longer than all else that the host does for a call; in a list they are in plain sight."""
    if type(value) is list and all([isinstance(element, torch.Tensor) for element in value]):
        return list(value)
    return _tensors_by_pickling(value)


torch._jit_internal._extract_tensors = _tensors_in


def _keep_from_compiler() -> None:
    """torch.compile runs what C++ calls back, DDP's broadcast for one, under Dynamo, which cannot trace a backend.

    torch.compiler.disable would do too, but imports the compiler, which takes seconds, and wraps every call.
    """
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameExecStrategy(dynamo._FrameAction.SKIP, dynamo._FrameAction.SKIP)  # callees, too
    classes = [ProcessGroup, OnStream, Beside, Work, *Work.__subclasses__(), HostWork, TurnWork]
    for member in (member for each in classes for member in vars(each).values()):
        if isinstance(member, types.FunctionType):
            dynamo.set_code_exec_strategy(member.__code__, skip)
    dynamo.set_code_exec_strategy(_tensors_in.__code__, skip)


_keep_from_compiler()
