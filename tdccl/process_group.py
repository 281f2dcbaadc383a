"""The torch.distributed backend: translates torch's objects to `Communicator` calls and back."""

import collections
import contextlib
import threading
import types

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import ReduceOp
from torch.futures import Future

from tdccl import environment
from tdccl.communicator import Communicator
from tdccl.errors import ArgumentError, DestroyedError, TdcclError
from tdccl.transport.bootstrap import StoreBootstrap

_OPS = {
    ReduceOp(ReduceOp.SUM): "sum", ReduceOp(ReduceOp.AVG): "avg", ReduceOp(ReduceOp.MIN): "min",
    ReduceOp(ReduceOp.MAX): "max", ReduceOp(ReduceOp.PRODUCT): "prod", ReduceOp(ReduceOp.BAND): "and",
    ReduceOp(ReduceOp.BOR): "or", ReduceOp(ReduceOp.BXOR): "xor",
}  # fmt: skip
_ON_BOOL = {"sum": "or", "max": "or", "min": "and", "prod": "and"}  # a bool is a truth value, as NCCL has it

_ALLREDUCE, _COALESCED = c10d.AllreduceOptions(), c10d.AllreduceCoalescedOptions()
_BROADCAST, _BARRIER = c10d.BroadcastOptions(), c10d.BarrierOptions()
_ALLGATHER, _REDUCE_SCATTER, _ALL_TO_ALL = c10d.AllgatherOptions(), c10d.ReduceScatterOptions(), c10d.AllToAllOptions()

# How often this process made a group: a store outlives its groups, and one made again must not read old keys.
_lives: collections.Counter = collections.Counter()


class Work(dist.Work):
    """A collective: on the group's own stream, or complete as far as the host can tell (no stream)."""

    def __init__(self, outputs=None, stream=None):
        super().__init__()
        self._outputs = outputs
        self._stream = stream
        self._event = stream.record_event() if stream else None
        self._future = None

    def wait(self, timeout=None) -> bool:
        """Makes the current stream wait, not the host."""
        if self._event is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._event)
        return True

    synchronize = block_current_stream = wait

    def is_completed(self) -> bool:
        return self._event is None or self._event.query()

    is_success = is_completed

    def exception(self):
        return None

    def result(self) -> list[torch.Tensor]:
        if self._outputs is None:
            raise ArgumentError("a synchronous call keeps no result and no future; make it with async_op=True")
        return self._outputs

    def get_future(self) -> Future:
        if self._future is None:
            outputs = self.result()
            devices, context = [], contextlib.nullcontext()
            if self._stream is not None:
                devices, context = [self._stream.device], torch.cuda.stream(self._stream)
            future = Future(devices=devices)
            with context:  # the result is ready where this stream is now
                future.set_result(outputs)
            self._future = future
        return self._future


class BarrierWork(Work):
    """Its wait blocks the host, as torch documents for barriers on GPUs."""

    def __init__(self, communicator: Communicator, stream=None):
        super().__init__([], stream)
        self._communicator = communicator

    def wait(self, timeout=None) -> bool:
        if self._event is not None:
            self._event.synchronize()
            self._communicator.check()  # a barrier that gave up must not look passed
        return True


# Work of synchronous calls: it is ordered on the caller's stream, so there is nothing to wait for.
_DONE = Work()


class Backend:
    """What torch gets when it asks a group for the backend of a device: the shim, which can allocate besides."""

    def __init__(self, shim, group: "ProcessGroup"):
        self._shim, self._group = shim, group

    def __getattr__(self, name: str):
        return getattr(self._shim, name)

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
        members = tuple(options.global_ranks_in_group)
        _lives[options.group_id, members] += 1
        life = "-".join(map(str, ("tdccl", _lives[options.group_id, members], *members)))
        self._store = dist.PrefixStore(life, options.store)
        self._name, self._timeout = options.group_id, options.timeout
        self._rank, self._ranks = rank, size
        self._gpu = not environment.emulated()
        self._lock = threading.Lock()
        self._communicator: Communicator | None = None
        self._stream = None
        self._gloo_group = None
        self._ended = False
        self._register_shim("cuda" if self._gpu else "cpu")

    def _register_shim(self, device: str) -> None:
        """Tells torch our device, and makes calls that cannot reach Python fail rather than do nothing."""
        options = c10d.FakeProcessGroup.Options()
        options.error_on_collective = True
        shim = c10d.FakeProcessGroup._create_internal(self._rank, self._ranks, options)
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

    def _get_backend(self, device: torch.device) -> Backend:
        return Backend(super()._get_backend(device), self)

    @property
    def communicator(self) -> Communicator:
        """The group's communicator; made now, by all ranks, if no collective has needed it yet."""
        return self._communicator or self._connect(None)

    def shutdown(self) -> None:
        """Ends the group; collective, unless its communicator has failed: then nobody is waited for."""
        with self._lock:
            communicator, self._communicator, self._gloo_group, self._ended = self._communicator, None, None, True
        if communicator is None:
            return
        try:
            communicator.check()
        except TdcclError:
            return
        communicator.destroy()

    def abort(self) -> None:
        """Ends the group on this rank, at once."""
        with self._lock:
            self._communicator, self._gloo_group, self._ended = None, None, True

    # ---- collectives ---------------------------------------------------------------------------------

    def allreduce(self, tensors, opts=_ALLREDUCE):
        (tensor,) = tensors
        if self._gpu and tensor.is_cpu:
            return self._gloo().allreduce(tensors, opts)
        op = _op("all_reduce", opts, tensor)
        return self._run(opts, tensors, tensors, Communicator.all_reduce, tensor, tensor, op)

    def allreduce_coalesced(self, tensors, opts=_COALESCED):
        if self._gpu and tensors[0].is_cpu:
            return self._gloo().allreduce_coalesced(tensors, opts)

        def call(comm):
            for tensor in tensors:
                comm.all_reduce(tensor, tensor, _op("all_reduce", opts, tensor))

        return self._run(opts, tensors, tensors, call)

    def broadcast(self, tensors, opts=_BROADCAST):
        (tensor,) = tensors
        if self._gpu and tensor.is_cpu:
            return self._gloo().broadcast(tensors, opts)
        root = opts.rootRank
        return self._run(opts, tensors, tensors, Communicator.broadcast, tensor, root)

    def _allgather_base(self, output, input, opts=_ALLGATHER):
        if self._gpu and input.is_cpu:
            return self._gloo()._allgather_base(output, input, opts)
        return self._run(opts, [input], [output], Communicator.all_gather, input, output)

    def allgather_into_tensor_coalesced(self, outputs, inputs, opts=_ALLGATHER):
        if self._gpu and inputs[0].is_cpu:
            return self._gloo().allgather_into_tensor_coalesced(outputs, inputs, opts)

        def call(comm):
            for output, input in zip(outputs, inputs):
                comm.all_gather(input, output)

        return self._run(opts, inputs, outputs, call)

    def allgather(self, outputs, inputs, opts=_ALLGATHER):
        (pieces,), (shard,) = outputs, inputs
        if self._gpu and shard.is_cpu:
            return self._gloo().allgather(outputs, inputs, opts)
        self._check_pieces("all_gather", "output", pieces, shard, shard.numel())

        def call(comm):
            gathered = torch.empty(self._ranks * shard.numel(), dtype=shard.dtype, device=shard.device)
            comm.all_gather(shard.contiguous(), gathered)
            _unpack(gathered, pieces)

        return self._run(opts, inputs, pieces, call)

    def _reduce_scatter_base(self, output, input, opts=_REDUCE_SCATTER):
        if self._gpu and input.is_cpu:
            return self._gloo()._reduce_scatter_base(output, input, opts)
        op = _op("reduce_scatter", opts, input)
        return self._run(opts, [input], [output], Communicator.reduce_scatter, input, output, op)

    def reduce_scatter_tensor_coalesced(self, outputs, inputs, opts=_REDUCE_SCATTER):
        if self._gpu and inputs[0].is_cpu:
            return self._gloo().reduce_scatter_tensor_coalesced(outputs, inputs, opts)

        def call(comm):
            for output, input in zip(outputs, inputs):
                comm.reduce_scatter(input, output, _op("reduce_scatter", opts, input))

        return self._run(opts, inputs, outputs, call)

    def reduce_scatter(self, outputs, inputs, opts=_REDUCE_SCATTER):
        (shard,), (pieces,) = outputs, inputs
        if self._gpu and shard.is_cpu:
            return self._gloo().reduce_scatter(outputs, inputs, opts)
        self._check_pieces("reduce_scatter", "input", pieces, shard, shard.numel())
        op = _op("reduce_scatter", opts, shard)

        def call(comm):
            reduced = torch.empty(shard.numel(), dtype=shard.dtype, device=shard.device)
            comm.reduce_scatter(_pack(pieces), reduced, op)
            _unpack(reduced, [shard])

        return self._run(opts, pieces, outputs, call)

    def alltoall_base(self, output, input, output_splits=(), input_splits=(), opts=_ALL_TO_ALL):
        if self._gpu and input.is_cpu:
            return self._gloo().alltoall_base(output, input, output_splits, input_splits, opts)
        if not (output_splits or input_splits):
            return self._run(opts, [input], [output], Communicator.all_to_all, input, output)
        sends, receives = (list(splits) or self._equal_rows(t) for splits, t in
                           ((input_splits, input), (output_splits, output)))  # fmt: skip
        return self._run(opts, [input], [output], Communicator.all_to_all, input, output, sends, receives)

    def alltoall(self, outputs, inputs, opts=_ALL_TO_ALL):
        if self._gpu and inputs[0].is_cpu:
            return self._gloo().alltoall(outputs, inputs, opts)
        self._check_pieces("all_to_all", "input", inputs, inputs[0])
        self._check_pieces("all_to_all", "output", outputs, inputs[0])

        # Always with splits: pieces that look equal here may be uneven elsewhere, and all ranks must decide alike.
        sends, receives = ([piece.numel() for piece in pieces] for pieces in (inputs, outputs))

        def call(comm):
            sent = _pack(inputs)
            received = torch.empty(sum(receives), dtype=sent.dtype, device=sent.device)
            comm.all_to_all(sent, received, sends, receives)
            _unpack(received, outputs)

        return self._run(opts, inputs, outputs, call)

    def barrier(self, opts=_BARRIER):
        device = opts.device
        if self._gpu and device is not None and device.type == "cpu":
            return self._gloo().barrier(opts)
        communicator = self._communicator or self._connect(device)
        if not self._gpu:
            communicator.barrier()
            return BarrierWork(communicator)
        stream = torch.cuda.current_stream(communicator.device)
        if opts.asyncOp:
            self._stream.wait_stream(stream)
            stream = self._stream
        communicator.barrier(stream=stream)
        return BarrierWork(communicator, stream)

    def _start_coalescing(self, device) -> None:
        """Nothing to prepare: each call is one launch already."""

    def _end_coalescing(self, device):
        """One Work for all: asynchronous calls share a stream, so its end now is the end of each of them."""
        return Work([], self._stream)

    # torch 2.13's names
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base

    # ---- how a call is run ---------------------------------------------------------------------------

    def _run(self, opts, inputs, outputs, call, *arguments):
        """Runs `call(communicator, *arguments)` where `opts` says: on the current stream, or on the group's own."""
        communicator = self._communicator or self._connect(inputs[0].device)
        if not opts.asyncOp:
            call(communicator, *arguments)
            return _DONE
        stream = self._stream
        if stream is None:
            call(communicator, *arguments)
            return Work(list(outputs))
        stream.wait_stream(torch.cuda.current_stream(communicator.device))
        with torch.cuda.stream(stream):
            call(communicator, *arguments)
        for tensor in (*inputs, *outputs):
            tensor.record_stream(stream)  # its memory may be freed, but not reused, before the stream is there
        return Work(list(outputs), stream)

    def _connect(self, device: torch.device | None) -> Communicator:
        """The communicator, made at the first call: only then is the device known."""
        with self._lock:
            if self._ended:
                raise DestroyedError(f"process group {self._name!r} is destroyed")
            if self._communicator is None:
                seconds = self._timeout.total_seconds()
                bootstrap = StoreBootstrap(self._store, self._rank, self._ranks, seconds)
                if not self._gpu:
                    self._communicator = Communicator(bootstrap, None, seconds)
                    return self._communicator
                device = self.bound_device_id or device or torch.device("cuda")
                with torch.cuda.device(device):
                    device = torch.device("cuda", torch.cuda.current_device())
                    communicator = Communicator(bootstrap, device, seconds)
                    self._stream = torch.cuda.Stream(device)
                self._communicator = communicator  # last: other threads look at it without the lock
            return self._communicator

    def _gloo(self):
        """The group for CPU tensors on a host with GPUs, made at its first call."""
        with self._lock:
            if self._ended:
                raise DestroyedError(f"process group {self._name!r} is destroyed")
            if self._gloo_group is None:
                store = dist.PrefixStore("gloo", self._store)
                group = dist.ProcessGroup(store, self._rank, self._ranks)
                gloo = dist.ProcessGroupGloo(store, self._rank, self._ranks, timeout=self._timeout)
                group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
                group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
                self._gloo_group = group
            return self._gloo_group

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
                    f"{collective}: {role} {rank} has {piece.numel()} elements, expected {numel}: lists must be even"
                )

    def _equal_rows(self, tensor) -> list[int]:
        rows = tensor.shape[0] if tensor.dim() else 0
        if rows % self._ranks:
            raise ArgumentError(f"all_to_all: {rows} rows without splits, expected a multiple of {self._ranks} ranks")
        return [rows // self._ranks] * self._ranks


def _op(collective: str, opts, tensor: torch.Tensor) -> str:
    name = _OPS.get(opts.reduceOp)
    if name is None:
        raise ArgumentError(
            f"{collective}: {opts.reduceOp.op.name} is not offered, expected SUM, AVG, MIN, MAX, PRODUCT, BAND, BOR or "
            "BXOR"
        )
    return _ON_BOOL.get(name, name) if tensor.dtype is torch.bool else name


def _pack(pieces) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([piece.reshape(-1) for piece in pieces])


def _unpack(flat: torch.Tensor, pieces) -> None:
    parts = flat.split([piece.numel() for piece in pieces])
    with torch.no_grad():
        torch._foreach_copy_(list(pieces), [part.view(piece.shape) for part, piece in zip(parts, pieces)])


def _refuse(name: str):
    def refuse(self, *args, **kwargs):
        raise ArgumentError(f'{name}: the backend "tdccl" does not offer it yet; nothing was sent')

    return refuse


# Refused by name: torch would hand them to the shim, whose error says nothing of tdccl.
for _name in (
    "send", "recv", "recv_anysource", "reduce", "gather", "scatter", "allgather_coalesced", "monitored_barrier",
):  # fmt: skip
    setattr(ProcessGroup, _name, _refuse(_name))


def _keep_from_compiler() -> None:
    """torch.compile runs what C++ calls back, DDP's broadcast for one, under Dynamo, which cannot trace a backend.

    torch.compiler.disable would do too, but imports the compiler, which takes seconds, and wraps every call.
    """
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameExecStrategy(dynamo._FrameAction.SKIP, dynamo._FrameAction.SKIP)  # callees, too
    for member in (*vars(ProcessGroup).values(), *vars(Work).values(), *vars(BarrierWork).values()):
        if isinstance(member, types.FunctionType):
            dynamo.set_code_exec_strategy(member.__code__, skip)


_keep_from_compiler()
