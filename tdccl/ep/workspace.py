"""What the kernels of expert parallelism are launched with: a team of their own, and symmetric buffers."""

import ctypes
import itertools
from typing import Any

import torch

from tdccl import transport
from tdccl.communicator import Communicator
from tdccl.decisions import layout, rails
from tdccl.runtime.algorithm import Geometry, team_of
from tdccl.runtime.launch import Arguments, bind
from tdccl.runtime.recorder import PLAIN, described

_numbers = itertools.count()


class Workspace:
    """A team with epochs of its own, so that its calls and the communicator's collectives are in nobody's way.

    offsets  bytes from the team's heap to each of the buffers, by name; kernels get them as `buffers`

    Across nodes the team and the buffers are those of this rank's node.
    """

    def __init__(self, comm: Communicator, blocks: int, buffers: dict[str, int], slot_bytes: int = 0):
        """Collective. buffers: bytes of each, by name; zeroed. slot_bytes: of the slots of lanes to other nodes, for
        kernels that have a `rail`; 0: without."""
        self.comm, self.blocks = comm, blocks
        team = team_of(comm._context, comm._team.backend)
        self._team = team._replace(blocks=blocks, packets=0, rings=0, ring_bytes=0, channels=0, slot_bytes=0)
        end, self.offsets = _rounded(layout.heap_bytes(self._team)), {}
        for name, nbytes in buffers.items():
            self.offsets[name] = end
            end += _rounded(nbytes)
        self._memory = comm._allocate(end)
        comm._add(self._memory)
        self._sizes = buffers
        self._team = self._team._replace(
            heap=self._memory.peers.data_ptr(),
            local=self._memory.address,
            rank=comm._node.rank,
            control=comm._team.control,
            timeout=comm._team.timeout,
        )
        self._stop_word = ctypes.c_int64.from_address(self._memory.address + layout.STOP_BYTE.value)
        self._rail = self._make_rail(slot_bytes) if slot_bytes else None
        self._lane = ("ep", next(_numbers))
        self._launches: dict[tuple, Any] = {}

    def _make_rail(self, slot_bytes: int):
        comm, nodes = self.comm, len(self.comm.topology.nodes)
        nbytes = rails.rail_bytes(self.blocks, nodes, slot_bytes)
        lanes, _ = transport.allocate_across(comm._bootstrap, nbytes, comm.device)
        comm._add(lanes)
        return comm._rails[False]._replace(local=lanes.address, slot_bytes=slot_bytes)

    def local(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """This rank's buffer of that name, flat."""
        start = self.offsets[name]
        return self._memory.local[start : start + self._sizes[name]].view(dtype)

    def launch(
        self, called: str, kernel, dtype: str, warps: int, constants: dict[str, Any],
        tensors: tuple[torch.Tensor | int | None, ...], sizes: tuple[int, ...], elements: int, stream,
    ) -> None:  # fmt: skip
        """Launches a kernel with these tensors' addresses (None: 0, for what it does not look at) and sizes.

        called: as it is recorded, with so many elements of `dtype`, Triton's name of the kernel's DTYPE.
        """
        comm = self.comm
        key = (kernel, dtype, warps, *constants.values())
        with comm._turn:
            start = self._launches.get(key)
            if start is None:
                start = self._launches[key] = self._bind(kernel, dtype, warps, constants, len(tensors), len(sizes))
            start.assign("tensors", tuple(map(_address, tensors)))
            if sizes:  # not every kernel takes any
                start.assign("sizes", sizes)
            what = described(called, "ep", dtype, None, None, PLAIN, PLAIN, True, elements, elements)
            comm._start(what, start, 0, 0, stream, (self._lane,))
            if comm._emulated and self._stop_word.value:
                comm.raise_fault()

    def _bind(self, kernel, dtype: str, warps: int, constants: dict[str, Any], tensors: int, sizes: int):
        # Offsets as constants would end up in the pointers' sums, and with them what is known of their alignment.
        counts = {"tensors": (0,) * tensors, "sizes": (0,) * sizes, "buffers": tuple(self.offsets.values())}
        geometry = Geometry(dtype, self.blocks, warps, False, counts, constants)
        with self.comm._on_device():
            return bind(kernel, Arguments(kernel, geometry, (), None, rail=self._rail), self._team, geometry, {})


def _address(tensor: torch.Tensor | int | None) -> int:
    if tensor is None or isinstance(tensor, int):
        return tensor or 0
    return tensor.data_ptr()


def _rounded(nbytes: int) -> int:
    return -(-nbytes // 256) * 256
