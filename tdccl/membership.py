"""Who the ranks of a communicator are, that they decide alike, and that they fail together."""

import atexit
import contextlib
import functools
import numbers
import os
import socket
import sys
import time
import weakref
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from tdccl import __version__, environment, transport, tuning
from tdccl.decisions import (
    ACROSS_NODES,
    ALGORITHMS,
    context_for,
    device_of,
    forced_algorithms,
    layout,
    rail_for,
    rails,
    table_across,
    table_for,
)
from tdccl.errors import Aborted, ArgumentError, DestroyedError, InitError, Mismatch, PeerFailure, TdcclError, Timeout
from tdccl.runtime import heartbeat, watcher
from tdccl.runtime.algorithm import team_of
from tdccl.runtime.heartbeat import Heartbeat
from tdccl.runtime.recorder import Recorder, account
from tdccl.runtime.streams import aside
from tdccl.transport.bootstrap import Bootstrap, open_store
from tdccl.transport.symmetric_memory import together

_announced = False
_alive: weakref.WeakSet["Membership"] = weakref.WeakSet()
_inherited: list["Membership"] = []  # from the process that this one was forked from
_FORKED = "this communicator belongs to the process that this one was forked from; make a new one with tdccl.init"
_FOR_EVER = 1e9  # seconds: thirty years
COMPARISON = 6  # a kind of wait that no kernel has: the ranks' comparison of their next calls


class Membership:
    """The ranks of a communicator: they agree on what calls depend on, and a fault of one ends the waits of all."""

    def __init__(
        self,
        bootstrap: Bootstrap,
        device: torch.device | str | int | None,
        timeout: float,
        max_blocks: int | None,
        scratch: int | None,
    ):
        _announce_emulation(bootstrap.rank)
        self.rank, self.size = bootstrap.rank, bootstrap.size
        self.timeout = timeout
        self._bootstrap = bootstrap
        self._emulated = environment.emulated()
        self._scratch = scratch
        self._debug = environment.debug()
        self._agree(device, max_blocks)
        if len(self.topology.nodes) > 1:
            self._node = bootstrap.subgroup(self.topology.local, f"node{self.topology.node}")
            self._plan_with(transport.Multicast(None, "ranks are on several nodes"))
        else:
            self._node = bootstrap
            self._plan_with(transport.multicast_between(bootstrap, self.device, self._ranks_of_a_gpu))
        self._control = transport.Control(bootstrap, not self._emulated, self.topology.local)
        self._control.words[layout.FIRST_WORD.value] = self.topology.local[0]
        self._abort_word = self._control.abort
        self._dead: set[int] = set()
        self._destroyed = ""  # the words of the error, once it is
        self._dumped = False
        self._recorder: Recorder | None = None  # a peer may die before there is one
        self._heap = self._lanes = self._heartbeat = None
        self._end_watch = self._watch_peers()
        self._share_memory()
        _alive.add(self)

    def _agree(self, device, max_blocks: int | None) -> None:
        """Decides what calls depend on, and checks that all ranks fit together and will decide alike."""
        mine = {"tdccl": __version__, "emulated": self._emulated}
        place = error = None
        try:
            place = transport.place_of(self._bootstrap)
        except InitError as refused:
            mine, error = {**mine, "error": str(refused)}, refused
        self.topology = transport.topology_of(self.rank, self._bootstrap.exchange(place))
        try:
            mine |= self._decide(device, max_blocks)
        except Exception as refused:  # told to the others, who would wait for this rank
            mine, error = {**mine, "error": str(refused)}, refused
        everyone = self._bootstrap.exchange((mine, None if error else self._gpu_of()))
        if error is not None:
            raise error
        for rank, (other, _) in enumerate(everyone):
            if other != mine:
                raise InitError(f"rank {rank} has {other}, rank {self.rank} has {mine}: they must be equal")
        self._divide_gpus([gpu for _, gpu in everyone])

    def _decide(self, device, max_blocks: int | None) -> dict[str, Any]:
        """Sets what calls depend on; returns what of it must be equal on all ranks."""
        width = self.topology.width
        if width > layout.MAX_RANKS.value:
            raise InitError(f"{width} ranks on a node: one communicator takes up to {layout.MAX_RANKS.value}")
        self._forced = forced_algorithms()
        self.max_blocks = environment.most_blocks() if max_blocks is None else max_blocks
        self.device = device_of(device, self.topology.number_on_host)
        self.multiprocessors = self._gpu_of()[1]  # as if no other rank were on this GPU
        self._context = self._context_for(self.max_blocks)
        self.gpu = tuning.EMULATED if self._emulated else torch.cuda.get_device_name(self.device)
        self._algorithms = ALGORITHMS if self._context.nodes == 1 else ACROSS_NODES
        self.table = self._table_for(False)
        self.products = self._products_for()
        equal = {"scratch": self._context.ring_bytes, "TDCCL_ALGO": self._forced, "max_blocks": self.max_blocks}
        tables = [self._table_for(multicast).digest() for multicast in (False, True)]
        return {**equal, "debug": self._debug, "tuning": [*tables, self.products.digest()]}

    def _gpu_of(self) -> tuple[str, int]:
        """Which GPU this rank is on, and its number of multiprocessors."""
        if self._emulated:
            return f"emulated {self.rank}", tuning.EMULATION.blocks
        gpu = torch.cuda.get_device_properties(self.device)
        return str(gpu.uuid), gpu.multi_processor_count

    def _divide_gpus(self, gpus: list[tuple[str, int]]) -> None:
        """Counts for how many blocks, one a multiprocessor, each rank has room while all others run theirs."""
        ranks = {gpu: gpus.count(gpu) for gpu in gpus}
        self._ranks_of_a_gpu = max(ranks.values())
        self.multiprocessors = max(1, min(number // ranks[uuid, number] for uuid, number in ranks))
        self._context = self._context_for(self.max_blocks)

    def _context_for(self, max_blocks: int | None):
        context = context_for(self.topology.width, max_blocks, self._scratch, len(self.topology.nodes))
        rules = replace(context.rules, blocks=min(context.rules.blocks, self.multiprocessors))
        return context._replace(rules=rules)

    def _table_for(self, multicast: bool) -> tuning.Table:
        return table_for(self.gpu, self.size, multicast) if self._context.nodes == 1 else table_across()

    def _products_for(self) -> tuning.Products:
        return tuning.products_for(self.gpu) if self._context.nodes == 1 else tuning.Products("across nodes: none")

    def _plan_with(self, multicast: transport.Multicast) -> None:
        """Lets algorithms and table know what the ranks have of multicast."""
        self.multicast = multicast
        self._context = self._context._replace(multicast=multicast)
        self.table = self._table_for(multicast.kind == "switch")

    def _make_team(self) -> layout.Team:
        """What tdccl's own kernels get."""
        backend = "emulation" if environment.emulated() else "cuda"
        return team_of(self._context, backend)._replace(
            heap=self._heap.peers.data_ptr(),
            local=self._heap.address,
            rank=self._node.rank,
            control=self._control.words.data_ptr(),
            timeout=int(self.timeout * 1e9),
        )

    def _allocate_lanes(self) -> transport.SymmetricMemory:
        """What passes to other nodes goes through it: between likes, then between all pairs of ranks."""
        context = self._context
        self._pairs_start = rails.rail_bytes(context.rules.rings, context.nodes, context.rail_slot)
        of_pairs = rails.rail_bytes(context.rules.channels, self.size, context.pair_slot)
        memory, pes = transport.allocate_across(self._bootstrap, self._pairs_start + of_pairs, self.device)
        of_likes = [pes[rank] for rank in self.topology.rail]
        with aside(self.device):
            self._pes = {
                pairs: torch.tensor(numbers, dtype=torch.int32, device=self.device)
                for pairs, numbers in ((False, of_likes), (True, pes))
            }
        return memory

    def _make_rails(self):
        """What kernels that go to other nodes get besides the team, by whether every rank is a node to them; None if
        there are none."""
        if self._lanes is None:
            return None
        addresses = {False: self._lanes.address, True: self._lanes.address + self._pairs_start}
        numbers = {False: self.topology.node, True: self.rank}
        return {
            pairs: rail_for(self._context, pairs)._replace(
                local=addresses[pairs], pes=self._pes[pairs].data_ptr(), node=numbers[pairs]
            )
            for pairs in (False, True)
        }

    @functools.cached_property
    def team(self):
        """First argument of users' own communicating kernels, a `tdccl.language.Team` (which imports Triton); across
        nodes that of this rank's node."""
        import triton.language as tl

        from tdccl.language import Team

        plain = self._team
        addresses = {"heap": self._heap.peers, "local": self._heap.local.view(torch.int8)}
        addresses["control"] = self._control.words
        constants = {name: tl.constexpr(getattr(plain, name)) for name in plain._fields[5:]}
        return Team(**{**plain._asdict(), **addresses, **constants})

    def _watch_peers(self):
        """Has the deaths of the peers told to this communicator as long as it lives, and their faults end the waits of
        its bootstrap; returns what ends that."""
        this = weakref.ref(self)
        self._interrupt_by(self._bootstrap.interrupt)
        pids = [(rank, pid) for rank, pid in enumerate(self._control.pids) if pid not in (None, os.getpid())]
        watches = [watcher.watch(pid, functools.partial(_peer_died, this, rank)) for rank, pid in pids]
        return weakref.finalize(self, _end_watches, watches)

    def _interrupt_by(self, *others: Callable[[], None]) -> None:
        """A fault of this communicator ends the waits of its bootstraps, and so does what `others` raise."""
        this = weakref.ref(self)

        def interrupt():
            if communicator := this():
                communicator.raise_fault()
            for other in others:
                other()

        self._bootstrap.interrupt = self._node.interrupt = interrupt

    def _beat(self) -> tuple[Any, Heartbeat | None]:
        """(a Store, the beats that go through it) where ranks on several nodes do not see each other's processes."""
        if len(self.topology.nodes) == 1:
            return None, None
        after = ((self.rank + distance) % self.size for distance in range(1, self.size))
        unseen = [rank for rank in after if self._control.pids[rank] is None]
        if not any(self._bootstrap.exchange(bool(unseen))):
            return None, None
        store = self._bootstrap.store("beats")
        if store is None:
            return None, None  # the deadlines of waits remain
        died = functools.partial(_peer_died, weakref.ref(self))
        keeps, watched = 0 in (self.rank, self._bootstrap.world_rank), unseen[0] if unseen else None
        beats = Heartbeat(store.clone(), self.rank, self.size, watched, keeps, self._control, died)
        weakref.finalize(self, beats.end_soon).atexit = False  # `_take_leave` has more to say
        return store, beats

    def _share_memory(self) -> None:
        """The record of calls, scratch, and all that is made of it; if a rank can get none, no other waits for it."""
        try:
            self._recorder = Recorder(self._bootstrap)
            self._heap = self._allocate(layout.heap_bytes(team_of(self._context, "")))
            if self._context.nodes > 1:
                self._lanes = self._allocate_lanes()
            if self.multicast.kind == "switch" and not self._heap.multicast:
                self._plan_with(transport.Multicast(None, "the driver refused to make a multicast object"))
            self._team, self._rails = self._make_team(), self._make_rails()
            self._store, self._heartbeat = self._beat()
        except BaseException as error:
            self._control.fail(layout.ABORTED, self.rank)
            self._end_watch()
            for memory in filter(None, (self._heap, self._lanes)):
                memory.release(None, self._control.peers_gone)
            self._control.leave()
            if isinstance(error, Aborted | PeerFailure):
                raise InitError(f"rank {error.rank} could not get its scratch, or died: see what it says") from error
            raise
        self._interrupt_by()  # no longer by who makes it

    def _allocate(self, nbytes: int) -> transport.SymmetricMemory:
        return self._on_each_node(lambda: transport.allocate(self._node, nbytes, self.device, self.multicast))

    def _on_each_node(self, make: Callable[[], transport.SymmetricMemory]) -> transport.SymmetricMemory:
        """The memory of make(), which is collective among the ranks of a node; where one node can have none, all raise
        InitError."""
        if len(self.topology.nodes) == 1:
            return make()
        made: list[transport.SymmetricMemory] = []
        try:
            together(self._bootstrap, lambda: made.append(make()))
        except TdcclError:
            for memory in made:
                memory.release(self._node, self._control.peers_gone)
            raise
        return made[0]

    def abort(self) -> None:
        """Ends the kernels of this communicator that are running, within 100 ms, here and on the other ranks; there and
        here later calls raise Aborted. From any thread; waits for nobody. `destroy` then frees what the rank has."""
        if not self._destroyed:
            self._control.fail(layout.ABORTED, self.rank)
            if self._heartbeat is not None:
                self._heartbeat.hurry()

    def meet(self, exclude: list[int]) -> tuple[Any, list[int]]:
        """What `shrink` begins with: aborts, and returns a new Store among the ranks that are not in `exclude`, and
        those ranks. Raises as `shrink`."""
        members = survivors(self.rank, self.size, exclude)
        if self._destroyed:
            raise DestroyedError(self._destroyed)
        hidden = [rank for rank in members if self._control.pids[rank] is None]
        if hidden and self._store is None:
            raise InitError(
                f"shrink: ranks {hidden} are in another pid namespace, or on hosts that have no store in common, where "
                "it does not reach; make a new communicator with tdccl.init"
            )
        self.abort()
        if hidden:
            return self._meet_across(members), members
        group, first = zlib.crc32(repr(members).encode()) >> 1, members[0]
        if self.rank == first:
            store = open_store("127.0.0.1", 0, True, self.timeout)
            self._control.announce(group, store.port)
            return store, members
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            gone = self._gone(members)  # asked first: who has met here may destroy this communicator at once
            if port := self._control.announced(first, group):
                with contextlib.suppress(RuntimeError):  # it has died, or failed and will announce another port
                    store = open_store("127.0.0.1", port, False, min(2.0, self.timeout))
                    store.set_timeout(timedelta(seconds=self.timeout))
                    return store, members
            elif gone:
                raise gone
            self._check_alive(members)
            time.sleep(1e-3)
        raise InitError(
            f"shrink: rank {first} did not come within {self.timeout:g} s, or does not exclude just {exclude}"
        )

    def _meet_across(self, members: list[int]):
        """A new Store among ranks on several hosts, which find it by that through which they beat."""
        key, deadline = f"shrink/{members}", time.monotonic() + self.timeout
        try:
            if self.rank == members[0]:
                store = open_store("localhost", 0, True, self.timeout)
                self._store.set(key, f"{socket.gethostname()}:{store.port}")
                return store
            while time.monotonic() < deadline:
                if self._store.check([key]):
                    host, _, port = self._store.get(key).decode().rpartition(":")
                    with contextlib.suppress(RuntimeError):  # of an earlier attempt, which failed
                        store = open_store(host, int(port), False, min(2.0, self.timeout))
                        store.set_timeout(timedelta(seconds=self.timeout))
                        return store
                self._check_alive(members)
                time.sleep(1e-2)
        except TdcclError:
            raise
        except RuntimeError as error:
            raise InitError(f"shrink: the store at which the hosts met is gone ({error})") from error
        raise InitError(f"shrink: rank {members[0]} did not come within {self.timeout:g} s, or excludes other ranks")

    def _gone(self, members: list[int]) -> InitError | None:
        """The error that says who of `members` will not come to `shrink`, if anybody."""
        left = [rank for rank in members if self._control.has_left(rank)]
        return InitError(f"shrink: rank {left[0]} has destroyed the communicator; exclude it as well") if left else None

    def _check_coming(self, members: list[int]) -> None:
        """Raises unless all `members` may yet come to `shrink`."""
        self._check_alive(members)
        if gone := self._gone(members):
            raise gone

    def _check_alive(self, members: list[int]) -> None:
        for rank in self._dead.intersection(members):
            raise PeerFailure(f"shrink: rank {rank} has died, too; exclude it as well", rank)

    def check(self) -> None:
        """Raises DestroyedError after `destroy`, and Timeout, PeerFailure or Aborted after a fault; every call does
        this first. On a GPU a timeout shows when the kernel has ended: call it after a synchronisation."""
        self.check_not_destroyed()
        self.raise_fault()

    def check_not_destroyed(self) -> None:
        """Raises DestroyedError after `destroy`."""
        if self._destroyed:
            raise DestroyedError(self._destroyed)

    def check_one_node(self, what: str) -> None:
        """Raises ArgumentError where ranks are on several nodes, for what goes by their addresses alone."""
        if (nodes := len(self.topology.nodes)) > 1:
            raise ArgumentError(
                f"{what} is for the ranks of one node, these are on {nodes}: take split() for those of each"
            )

    def dump(self, folder: str | os.PathLike) -> str:
        """Writes the last 1024 calls of this rank, and of those of its peers that it can see, to a file in `folder`,
        which is made if need be; returns its path. `python -m tdccl.trace` reads it. Works after a failure too."""
        if self._destroyed:
            self.check()
        return str(self._recorder.dump(folder, None))

    def _dump_for(self, error: TdcclError) -> None:
        """Writes the last calls where TDCCL_TRACE_DIR says, of a fault once."""
        folder = environment.trace_folder()
        if folder and self._recorder is not None and not self._dumped:
            self._dumped = not isinstance(error, Mismatch)  # after which there may be more
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
        calls = account(self._recorder.histories()) if self._recorder is not None else []
        if code == layout.ABORTED:
            what = f"rank {rank} aborted this communicator; make a new one with tdccl.init or by its shrink()"
            return Aborted("\n  ".join([what, *calls]), rank)
        if code == layout.PEER_DIED:
            pid = self._control.pids[rank]
            which = f"rank {rank} (pid {pid}) died" if pid else f"rank {rank} on another host died, or fell silent"
            what = f"{which}; shrink(exclude=[{rank}]) goes on without it"
            return PeerFailure("\n  ".join([what, *calls]), rank)
        if code == layout.GRID_TOO_LARGE:
            blocks = self._context.rules.heap_blocks
            return TdcclError(
                f"a kernel was launched with more than team.blocks = {blocks} blocks; its results are wrong"
            )
        kinds = {
            0: "data",
            1: "result",
            2: "barrier",
            3: "a signal",
            4: "packets",
            5: "a message",
            7: "a tile across",
        }
        if fault["kind"] == COMPARISON:
            what = f"to compare call {fault['epoch']}"
        else:
            epoch = f" of epoch {fault['epoch']}" if fault["epoch"] else ""  # a signal need be of none
            what = f"block {fault['block']}, {kinds[fault['kind']]}{epoch} "
            what += f"(expected {fault['expected']:#x}, seen {fault['seen']:#x})"
        self._control.share()
        waited = f"rank {rank} waited {fault['timeout'] / 1e9:g} s for rank {fault['peer']}: {what}"
        return Timeout("\n  ".join([waited, *calls]), fault["peer"])


def seconds_of(what: str, timeout: float) -> float:
    """A timeout, cut to what fits into nanoseconds. Raises ArgumentError, about `what`, unless it is seconds > 0."""
    if not isinstance(timeout, numbers.Real) or not timeout > 0:
        raise ArgumentError(f"{what}: timeout is {timeout!r}, expected seconds > 0")
    return min(float(timeout), _FOR_EVER)


def survivors(rank: int, size: int, exclude: list[int]) -> list[int]:
    """The ranks of a shrunk group. Raises ArgumentError unless `exclude` are some of `size` ranks without `rank`."""
    excluded = set(exclude) if isinstance(exclude, Iterable) else set()
    if not excluded or not excluded <= set(range(size)) or rank in excluded:
        raise ArgumentError(
            f"shrink: exclude is {exclude}, expected ranks from 0 to {size - 1} without rank {rank}, which calls it"
        )
    return [member for member in range(size) if member not in excluded]


def _peer_died(this: "weakref.ref[Membership]", rank: int) -> None:
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
    """Tells the peers if this process ends without `destroy`, where they do not see that: on other hosts, and under
    MPI, which would keep it waiting for those that wait for it."""
    mpi = "mpi4py.MPI" in sys.modules
    left = [each for each in _alive if not each._destroyed and (mpi or each._heartbeat is not None)]
    if left:
        time.sleep(watcher.GRACE)  # what they still wait for may have been sent
        for communicator in left:
            communicator._control.fail(layout.PEER_DIED, communicator.rank)
    heartbeat.end_all()


def _disown() -> None:
    """In a forked child: neither the peers nor the GPU know it."""
    _inherited.extend(_alive)  # never freed here
    for communicator in _inherited:
        communicator._destroyed = _FORKED


os.register_at_fork(after_in_child=_disown)


def _announce_emulation(rank: int) -> None:
    global _announced
    if environment.emulated() and not _announced and rank == 0:
        note = "tdccl: no GPU, kernels run in Triton's interpreter: for correctness, not for speed"
        print(note, file=sys.stderr, flush=True)
    _announced = True
