"""The backend "tdccl" of torchcomms: `torchcomms.new_comm("tdccl", device, name)`. Imported by torchcomms alone.

torchcomms loads this module by its entry point. The methods and their arguments are those it asks of a backend written
in Python; each hands on to tdccl's torch.distributed group.
"""

import functools
import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torchcomms
from torch._C import _distributed_c10d as c10d

from tdccl import torch_entry
from tdccl.errors import ArgumentError, InitError
from tdccl.process_group import ProcessGroup


class Backend(torchcomms.TorchCommBackend):
    """One communicator of torchcomms, over the ranks that the launcher's environment counts."""

    def __init__(self):
        super().__init__()
        self._group: ProcessGroup | None = None

    def init(self, device: torch.device, name: str, options) -> None:
        """Joins the other ranks over `options.store`, or over the launcher's rendezvous if it is None."""
        store, rank, size = _rendezvous(options)
        given = c10d._DistributedBackendOptions()
        given.store, given.timeout, given.group_id = dist.PrefixStore(name, store), options.timeout, name
        given.group_rank, given.group_size, given.global_ranks_in_group = rank, size, []
        self._take(ProcessGroup(given), device)

    def _take(self, group: ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        if device.type == "cuda":
            group.bound_device_id = device

    def finalize(self) -> None:
        self._group.shutdown()

    def get_rank(self) -> int:
        return self._group.rank()

    def get_size(self) -> int:
        return self._group.size()

    def get_backend_name(self) -> str:
        return "tdccl"

    def get_comm_name(self) -> str:
        return self._group.getGroupName()

    def split(self, ranks: list[int], name: str, options) -> "Backend":
        """The communicator of these ranks of this one, of which the caller is one."""
        part = Backend()
        part._take(self._group.split_group(ranks, options.timeout, group_name=name), self._device)
        return part

    def all_reduce(self, tensor, op, async_op):
        return self._group.allreduce([tensor], _options(c10d.AllreduceOptions, async_op, reduceOp=_op(op)))

    def reduce(self, tensor, root, op, async_op):
        options = _options(c10d.ReduceOptions, async_op, reduceOp=_op(op), rootRank=root)
        return self._group.reduce([tensor], options)

    def broadcast(self, tensor, root, async_op):
        return self._group.broadcast([tensor], _options(c10d.BroadcastOptions, async_op, rootRank=root))

    def all_gather(self, tensor_list, tensor, async_op):
        return self._group.allgather([tensor_list], [tensor], _options(c10d.AllgatherOptions, async_op))

    all_gather_v = all_gather

    def all_gather_single(self, output, input, async_op):
        return self._group._allgather_base(output, input, _options(c10d.AllgatherOptions, async_op))

    def reduce_scatter(self, output, input_list, op, async_op):
        options = _options(c10d.ReduceScatterOptions, async_op, reduceOp=_op(op))
        return self._group.reduce_scatter([output], [input_list], options)

    reduce_scatter_v = reduce_scatter

    def reduce_scatter_single(self, output, input, op, async_op):
        options = _options(c10d.ReduceScatterOptions, async_op, reduceOp=_op(op))
        return self._group._reduce_scatter_base(output, input, options)

    def all_to_all(self, output_tensor_list, input_tensor_list, async_op):
        return self._group.alltoall(output_tensor_list, input_tensor_list, _options(c10d.AllToAllOptions, async_op))

    def all_to_all_single(self, output, input, async_op):
        return self.all_to_all_v_single(output, input, [], [], async_op)

    def all_to_all_v_single(self, output, input, output_split_sizes, input_split_sizes, async_op):
        options = _options(c10d.AllToAllOptions, async_op)
        return self._group.alltoall_base(output, input, output_split_sizes, input_split_sizes, options)

    def gather(self, output_tensor_list, input_tensor, root, async_op):
        outputs = [output_tensor_list] if self.get_rank() == root else []
        return self._group.gather(outputs, [input_tensor], _options(c10d.GatherOptions, async_op, rootRank=root))

    def scatter(self, output_tensor, input_tensor_list, root, async_op):
        inputs = [input_tensor_list] if self.get_rank() == root else []
        return self._group.scatter([output_tensor], inputs, _options(c10d.ScatterOptions, async_op, rootRank=root))

    def barrier(self, async_op):
        return self._group.barrier(_options(c10d.BarrierOptions, async_op, device=self._device))

    def send(self, tensor, dst, async_op):
        return _message(self._group.send([tensor], dst), async_op)

    def recv(self, tensor, src, async_op):
        return _message(self._group.recv([tensor], src), async_op)


def _rendezvous(options):
    """(store, rank, size) of all ranks."""
    if options.store is None:
        return _launchers_rendezvous(options.timeout)
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE"}:
        raise InitError("new_comm(store=...) also needs RANK and WORLD_SIZE in the environment")
    return options.store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@functools.cache
def _launchers_rendezvous(timeout: timedelta):
    torch_entry.register()  # under mpirun, too
    return next(dist.rendezvous("env://", timeout=timeout))


def _op(op) -> dist.ReduceOp:
    if op.type.name == "PREMUL_SUM":
        raise ArgumentError("torchcomms tells no backend in Python the factor of a PREMUL_SUM; multiply, and use SUM")
    return dist.ReduceOp(getattr(dist.ReduceOp, op.type.name))


def _options(kind, async_op: bool, **fields):
    options = kind()
    options.asyncOp = async_op
    for name, value in fields.items():
        setattr(options, name, value)
    return options


def _message(work, async_op: bool):
    if async_op:
        return work
    work.wait()
    return None


torchcomms.register_backend("tdccl", Backend)
