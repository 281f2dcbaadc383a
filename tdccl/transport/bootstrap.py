"""How ranks find each other before they share memory: one small interface over a Store, MPI, or a TCP address."""

import atexit
import contextlib
import itertools
import operator
import os
import pickle
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tdccl import environment
from tdccl.errors import InitError, TdcclError


class Bootstrap(ABC):
    """Rank, size, and a way to hand small objects to all; every method is collective over its ranks.

    interrupt   is called again and again while ranks are waited for; what it raises ends the wait
    world_rank  this process's rank in the group that this one is a part of, or its rank here if it is of none
    """

    rank: int
    size: int
    world_rank: int
    interrupt: Callable[[], None] = staticmethod(lambda: None)

    @abstractmethod
    def exchange(self, value: Any, timeout: float | None = None) -> list[Any]:
        """Every rank's (picklable) value, in rank order. Raises InitError, naming who did not come within `timeout`
        seconds (None: as long as it was made for)."""

    @abstractmethod
    def subgroup(self, members: list[int], name: str) -> "Bootstrap":
        """A bootstrap among `members` (ranks of this one, in their new order); called by members alone."""

    def barrier(self) -> None:
        """Returns once all ranks have called it."""
        self.exchange(None)

    @abstractmethod
    def store(self, name: str):
        """A torch.distributed Store of these ranks' own, for a thread of its own; None where there can be none.
        Collective."""

    @abstractmethod
    def close(self) -> None:
        """Takes leave of the other ranks; after it this rank's process may end without harm to them."""


def _missing(absent: list[int], size: int, seconds: float) -> InitError:
    ranks = ", ".join(map(str, absent))
    error = InitError(
        f"rank{'s' if len(absent) > 1 else ''} {ranks} of {size} did not come within the timeout of {seconds:g} s. "
        "Are all of them started, with the same size and the same address?"
    )
    error.absent = tuple(absent)
    return error


class _Requests:
    """The threads that wait at a store: one that is inside a request when the interpreter ends takes the process with
    it, so at the end of the main thread's program all others are told to stop."""

    def __init__(self):
        self._waiting: list[int] = []
        self._over = False

    @contextlib.contextmanager
    def one(self):
        """Around what waits."""
        self._waiting.append(threading.get_ident())
        try:
            self.check()
            yield
        finally:
            self._waiting.remove(threading.get_ident())

    def check(self) -> None:
        """Raises InitError in a thread that has to stop."""
        if self._over and threading.current_thread() is not threading.main_thread():
            raise InitError("the program has ended while this thread waited for other ranks")

    def stop(self) -> None:
        """At the end: returns when the threads have stopped, or soon."""
        self._over, deadline = True, time.monotonic() + 1
        while self._waiting and time.monotonic() < deadline:
            time.sleep(1e-3)

    def forget(self) -> None:
        """In a forked child, which has but one thread."""
        self._waiting.clear()


_requests = _Requests()
atexit.register(_requests.stop)
os.register_at_fork(after_in_child=_requests.forget)


class StoreBootstrap(Bootstrap):
    """Over a torch.distributed Store."""

    def __init__(
        self, store, rank: int, size: int, timeout: float, prefix: str = "tdccl", world_rank: int | None = None
    ):
        if not 0 <= rank < size:
            raise InitError(f"rank is {rank}, expected 0 to {size - 1}")
        self.rank, self.size = rank, size
        self.world_rank = rank if world_rank is None else world_rank
        # Waiting on a client locks it: one's own lets other threads go on with theirs.
        self._store, self._origin = store.clone(), store  # a server lives as long as its first client
        self._timeout, self._prefix = timeout, prefix
        self._round = 0

    def exchange(self, value: Any, timeout: float | None = None) -> list[Any]:
        with _requests.one():
            return self._exchange(value, self._timeout if timeout is None else timeout)

    def _exchange(self, value: Any, seconds: float) -> list[Any]:
        self._round += 1
        keys = [f"{self._prefix}/{self._round}/{rank}" for rank in range(self.size)]
        try:
            if self._round == 1 and self._store.add(f"{self._prefix}/claims/{self.rank}", 1) > 1:
                raise InitError(f"rank {self.rank} of {self.size} is there already: start each rank once")
            self._store.set(keys[self.rank], pickle.dumps(value))
            self._wait(keys, seconds)
            values = [pickle.loads(self._store.get(key)) for key in keys]
            if self._round > 2:  # all have written the last round, so all have read the one before
                self._store.delete_key(f"{self._prefix}/{self._round - 2}/{self.rank}")
        except TdcclError:
            raise
        except RuntimeError as error:
            self._await_interrupt()
            raise InitError(f"the store is gone; has the process that holds it died? ({error})") from error
        return values

    def _wait(self, keys: list[str], seconds: float) -> None:
        """Polls, because a wait of the store can be neither interrupted nor cut short without a warning in the log."""
        deadline, pause = time.monotonic() + seconds, 1e-4
        while not self._store.check(keys):
            try:
                _requests.check()
                self.interrupt()
            except TdcclError:
                if self._store.check(keys):  # a rank that went on from here met with it: the next call's concern
                    return
                raise
            if time.monotonic() > deadline:
                absent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise _missing(absent, self.size, seconds)
            time.sleep(pause)
            pause = min(pause * 1.5, 5e-3)

    def _await_interrupt(self) -> None:
        """The store may have died with a peer's process, and word of that is on its way and says more."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            self.interrupt()
            time.sleep(0.01)

    def close(self) -> None:
        # Rank 0's process may hold the store: it leaves last, but does not wait long for one that has crashed.
        with contextlib.suppress(RuntimeError):
            if self.rank:
                self._store.set(f"{self._prefix}/left/{self.rank}", b"")
            else:
                others = [f"{self._prefix}/left/{rank}" for rank in range(1, self.size)]
                self._store.wait(others, timedelta(seconds=10))

    def store(self, name: str):
        import torch.distributed as dist

        return dist.PrefixStore(f"{self._prefix}/{name}", self._origin.clone())

    def subgroup(self, members: list[int], name: str) -> "StoreBootstrap":
        prefix, rank = f"{self._prefix}/{name}", members.index(self.rank)
        return StoreBootstrap(self._origin, rank, len(members), self._timeout, prefix, self.world_rank)


class _Mail:
    """What passes by an mpi4py communicator, by labels: of an exchange that a fault has ended messages are still on
    their way, and must not pass for those of another."""

    _TAG = 21473

    def __init__(self, comm):
        self._comm, self._lock = comm, threading.Lock()
        self._arriving: dict[int, Any] = {}  # by source: the request for a message whose label is not known yet
        self._come: dict[tuple[int, Any], Any] = {}
        self._leaving: list[Any] = []  # requests, which own what they send
        self.made = 0  # bootstraps by this communicator

    def send(self, value: Any, label: Any, target: int) -> Any:
        """Returns what `has_left` takes."""
        with self._lock:
            request = self._comm.isend((label, value), target, self._TAG)
            self._leaving = [each for each in (*self._leaving, request) if not each.test()[0]]
            return request

    def has_left(self, request: Any) -> bool:
        """Whether what was sent needs no more calls of MPI here."""
        with self._lock:
            return request.test()[0]

    def receive(self, label: Any, source: int) -> list[Any]:
        """[the value that `source` has sent under this label], once; [] if it has not come."""
        with self._lock:
            while (key := (source, label)) not in self._come and self._advance(source):
                pass
            return [self._come.pop(key)] if key in self._come else []

    def _advance(self, source: int) -> bool:
        """Takes in the next message of a rank; returns whether one had come."""
        if source not in self._arriving:  # its length must be known first: a plain irecv takes 32 KiB at most
            message = self._comm.improbe(source=source, tag=self._TAG)
            if message is None:
                return False
            self._arriving[source] = message.irecv()
        done, received = self._arriving[source].test()
        if done:
            del self._arriving[source]
            label, value = received
            self._come[source, label] = value
        return done

    @classmethod
    def of(cls, comm) -> "_Mail":
        """The one of this communicator of MPI, with which it lives."""
        from mpi4py import MPI

        if cls._key is None:
            cls._key = MPI.Comm.Create_keyval()
        mail = comm.Get_attr(cls._key)
        if mail is None:
            mail = cls(comm)
            comm.Set_attr(cls._key, mail)
        return mail

    _key: int | None = None


class MPIBootstrap(Bootstrap):
    """Over an mpi4py communicator: messages between pairs, because a collective of MPI has no deadline."""

    # Seconds that what was sent before a fault may take to arrive after word of it.
    _GRACE = 0.05

    def __init__(self, comm, timeout: float, members: list[int] | None = None, name: str | None = None):
        self._comm, self._timeout, self._mail = comm, timeout, _Mail.of(comm)
        self._members = list(range(comm.Get_size())) if members is None else members
        self.rank, self.size = self._members.index(comm.Get_rank()), len(self._members)
        self.world_rank = comm.Get_rank()
        if name is None:  # all ranks make theirs in the same order
            self._mail.made += 1
            name = str(self._mail.made)
        self._name, self._round = name, 0

    def exchange(self, value: Any, timeout: float | None = None) -> list[Any]:
        self._round += 1
        seconds = self._timeout if timeout is None else timeout
        label, values = (self._name, self._round), {self.rank: value}
        pending = [rank for rank in range(self.size) if rank != self.rank]
        leaving = {rank: self._mail.send(value, label, self._members[rank]) for rank in pending}
        deadline, fault = time.monotonic() + seconds, None
        while True:
            for rank in pending:
                for received in self._mail.receive(label, self._members[rank]):
                    values[rank] = received
            pending = [rank for rank in pending if rank not in values]
            leaving = {rank: request for rank, request in leaving.items() if not self._mail.has_left(request)}
            if not pending and not leaving:
                return [values[rank] for rank in range(self.size)]
            try:
                if fault is None:
                    self.interrupt()
            except TdcclError as error:
                deadline, fault = time.monotonic() + self._GRACE, error
            if time.monotonic() > deadline:
                raise fault or _missing(sorted({*pending, *leaving}), self.size, seconds)
            time.sleep(0.0002)

    def store(self, name: str):
        """At rank 0; the others reach it by its host's name. None if rank 0 cannot listen, or not all reach it."""
        store = None
        if self.rank == 0:
            with contextlib.suppress(RuntimeError):  # the others hear of it at once
                store = open_store("localhost", 0, True, self._timeout)
        host, port = self.exchange((socket.gethostname(), store and store.port))[0]
        if self.rank and port:
            with contextlib.suppress(RuntimeError):
                store = open_store(host, port, False, min(10.0, self._timeout))
        everywhere = all(self.exchange(store is not None))
        return store if everywhere else None

    def close(self) -> None:
        """Nothing to do: mpirun's processes take leave in MPI_Finalize."""

    def subgroup(self, members: list[int], name: str) -> "MPIBootstrap":
        world = [self._members[rank] for rank in members]
        return MPIBootstrap(self._comm, self._timeout, world, f"{self._name}/{name}")


_stores: dict[str, Any] = {}  # by address: rank 0 can listen at one only once
_inits = itertools.count(1)


def open_store(host: str, port: int, serves: bool, timeout: float):
    """A TCPStore at an address, served by this process (port 0: at a free one) or by another."""
    import torch.distributed as dist

    return dist.TCPStore(host, port, is_master=serves, timeout=timedelta(seconds=timeout), wait_for_workers=False)


def _tcp_store(host: str, port: int, rank: int, timeout: float):
    try:
        return open_store(host, port, rank == 0, timeout)
    except RuntimeError as error:
        role = "cannot listen" if rank == 0 else "found nobody listening (is rank 0 started?)"
        raise InitError(f"rank {rank} {role} at {host}:{port}: {error}") from error


def _torchrun_store(timeout: float):
    import torch.distributed as dist

    return next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))[0]


def _over_store(address: str, connect, rank: int, size: int, timeout: float) -> StoreBootstrap:
    """A bootstrap with keys of its own over the store at `address`: all ranks make theirs in the same order."""
    if address not in _stores:
        _stores[address] = connect()
    return StoreBootstrap(_stores[address], rank, size, timeout, f"tdccl/{next(_inits)}")


_TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_MPIRUN = {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE"}


def launched() -> bool:
    """Whether a launcher, or TDCCL_INIT, tells this process who the ranks are."""
    return bool(environment.rendezvous_address() or os.environ.keys() >= _TORCHRUN or _MPIRUN & os.environ.keys())


def _place(source: str, rank: Any, size: Any, also: str = "") -> tuple[int, int]:
    """Rank and size as numbers, which may be words of the environment. Raises InitError if they are none."""
    if rank is None or size is None:
        raise InitError(f"{source} also needs rank= and size={also}")
    try:
        place = tuple(int(each) if isinstance(each, str) else operator.index(each) for each in (rank, size))
    except (TypeError, ValueError):
        place = (0, 0)
    if not 0 <= place[0] < place[1]:
        raise InitError(f"{source}: rank is {rank!r} and size is {size!r}, expected a rank from 0 to size - 1")
    return place


def discover(mpi=None, store=None, rank: int | None = None, size: int | None = None, timeout: float = 60.0):
    """The bootstrap for what the caller gave, or for the launcher's environment.

    In order: `mpi` (an mpi4py communicator); `store` with rank and size; TDCCL_INIT=tcp://host:port with rank and
    size (given, or RANK and WORLD_SIZE); torchrun's environment; mpirun's. Raises InitError if there is none, or if it
    says another rank or size than the caller.
    """
    bootstrap = _discovered(mpi, store, rank, size, timeout)
    for name, given, found in (("rank", rank, bootstrap.rank), ("size", size, bootstrap.size)):
        if given is not None and given != found:
            raise InitError(f"init was given {name}={given}, and those who started this process say {found}")
    return bootstrap


def _discovered(mpi, store, rank: int | None, size: int | None, timeout: float) -> Bootstrap:
    variables = os.environ
    if mpi is not None:
        if not hasattr(mpi, "Get_attr"):
            raise InitError(f"init: mpi is {mpi!r}, expected an mpi4py communicator")
        return MPIBootstrap(mpi, timeout)
    if store is not None:
        if not hasattr(store, "compare_set"):
            raise InitError(f"init: store is {store!r}, expected a torch.distributed Store")
        rank, size = _place("init(store=...)", rank, size)
        made = store.add(f"tdccl/inits/{rank}", 1)  # an earlier communicator's keys must not pass for this one's
        return StoreBootstrap(store, rank, size, timeout, f"tdccl/{made}")
    if address := environment.rendezvous_address():
        rank, size = (
            variables.get("RANK") if rank is None else rank,
            variables.get("WORLD_SIZE") if size is None else size,
        )
        rank, size = _place(f"TDCCL_INIT={address}", rank, size, ", or RANK and WORLD_SIZE")
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        if not address.startswith("tcp://") or not host or not port.isdigit() or int(port) >= 1 << 16:
            raise InitError(f"TDCCL_INIT is {address!r}, expected tcp://host:port")
        return _over_store(address, lambda: _tcp_store(host, int(port), rank, timeout), rank, size, timeout)
    if variables.keys() >= _TORCHRUN:
        rank, size = _place("torchrun's environment", variables["RANK"], variables["WORLD_SIZE"])
        return _over_store("torchrun", lambda: _torchrun_store(timeout), rank, size, timeout)
    if variables.keys() & _MPIRUN:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise InitError("started by mpirun, but mpi4py is missing: pip install tdccl[mpi]") from error
        return MPIBootstrap(MPI.COMM_WORLD, timeout)
    raise InitError(
        "no launcher found: start with torchrun or mpirun, set TDCCL_INIT=tcp://host:port with rank= and "
        "size=, or pass mpi= or store="
    )
