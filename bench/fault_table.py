"""The fault table: what each rank does in a fault, and what is to be seen of it."""

import os
import resource
import signal
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import tdccl
from bench.crew import LONG, ON_GPU, SETTLED, Fault, Part, Seen, Strike, tensor, verify
from tdccl import Communicator
from tdccl.transport.bootstrap import StoreBootstrap


def _wait_for_rank_0(comm: Communicator) -> None:
    """A call that rank 0 does not make."""
    if comm.rank:
        comm.all_reduce(tensor(comm))
    else:
        while True:
            comm.check()
            time.sleep(1e-3)


def _while_others_wait(part: Part) -> Seen:
    comm = part.init()
    verify(comm)
    part.say("here")
    if part.hit:
        time.sleep(LONG)
    seen = part.watch(comm, lambda: comm.all_reduce(tensor(comm)))
    part.go_on(comm)
    return seen


def _in_calls(part: Part) -> Seen:
    comm = part.init()
    x = tensor(comm)
    part.say("here")
    while not (seen := part.watch(comm, lambda: comm.all_reduce(x))).error:
        pass
    part.go_on(comm)
    return seen


def _between_calls(part: Part) -> Seen:
    comm = part.init()
    verify(comm)
    part.say("here")
    if part.hit:
        time.sleep(LONG)
    while not (seen := part.watch(comm, lambda: time.sleep(1e-3))).error:
        pass
    assert part.watch(comm, lambda: comm.all_reduce(tensor(comm))).error == seen.error
    part.go_on(comm)
    return seen


def _in_init(part: Part) -> Seen:
    """Killed after the first exchange, when the others wait for its memory."""
    if part.hit:
        tdccl.transport.allocate = lambda *_: (part.say("here"), time.sleep(LONG))
        part.init()
    try:
        part.say("here")
        part.init()
    except tdccl.InitError as error:
        seen = Seen("InitError", str(error), None, time.monotonic())
    with _anew(part, [rank for rank in range(part.size) if rank != part.victim]) as comm:
        verify(comm)
    return seen


def _in_destroy(part: Part) -> Seen:
    comm = part.init()
    verify(comm)
    part.say("here")
    if part.hit:
        time.sleep(LONG)
    comm.destroy()
    seen = Seen("", "", None, time.monotonic())
    with _anew(part, [rank for rank in range(part.size) if rank != part.victim]) as smaller:
        verify(smaller)
    return seen


def _replaying(part: Part) -> Seen:
    comm = part.init()
    x, y = tensor(comm), tensor(comm)
    comm.all_reduce(x, y)
    torch.cuda.synchronize(comm.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.all_reduce(x, y)
    part.say("here")
    while not (seen := part.watch(comm, graph.replay)).error:
        pass
    part.go_on(comm)
    return seen


def _stopped_for_a_moment(part: Part) -> Seen:
    comm = part.init()
    part.say("here")
    deadline = time.monotonic() + 1
    while comm.all_reduce(torch.tensor([float(time.monotonic() < deadline)], device=comm.device)).item():
        pass
    seen = part.watch(comm, lambda: verify(comm))
    comm.destroy()
    return seen


def _stopped_for_long(part: Part) -> Seen:
    """The survivors shrink and go on; when the stopped rank is woken, theirs is another memory."""
    comm = part.init(timeout=2)
    x = tensor(comm)
    part.say("here")
    while not (seen := part.watch(comm, lambda: comm.all_reduce(x))).error:
        pass
    if part.hit:
        comm.destroy()
        part.say("woken")
        return seen
    smaller = comm.shrink(exclude=[part.victim])
    pool = smaller.empty(100_000)
    part.say("shrunk")
    deadline = time.monotonic() + 2
    going = torch.ones(1, device=smaller.device)
    while smaller.all_reduce(going).item() == smaller.size:
        verify(smaller)
        smaller.all_reduce(pool.fill_(1.0), pool)
        assert (pool == smaller.size).all(), "a rank of an older communicator wrote here"
        going.fill_(float(time.monotonic() < deadline))
    smaller.destroy()
    return seen


def _aborted_by_a_thread(part: Part) -> Seen:
    comm = part.init()
    verify(comm)
    part.meet()  # else it could meet a slow rank's last call

    def abort():
        time.sleep(SETTLED)
        part.say("struck")
        comm.abort()

    thread = threading.Thread(target=abort)
    if part.hit:
        thread.start()
    seen = part.watch(comm, lambda: _wait_for_rank_0(comm))
    if part.hit:
        thread.join()
    comm.destroy()
    with part.init() as again:
        verify(again)
    return seen


def _aborted_in_capture(part: Part) -> Seen:
    """A graph that is captured while the communicator is aborted can be replayed, and its waits end at once."""
    comm = part.init()
    x, y = tensor(comm), tensor(comm)
    comm.all_reduce(x, y)
    torch.cuda.synchronize(comm.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.all_reduce(x, y)
        part.meet()  # else the call would raise at once
        if part.hit:
            part.say("struck")
            comm.abort()
    seen = part.watch(comm, graph.replay)
    comm.destroy()
    with part.init() as again:
        verify(again)
    return seen


def _interrupted(part: Part) -> Seen:
    comm = part.init()
    verify(comm)  # the next call is soon inside its kernel
    part.say("here")
    seen = part.watch(comm, lambda: _wait_for_rank_0(comm))
    comm.destroy()
    with part.init() as again:
        verify(again)
    return seen


def _exiting(part: Part) -> Seen:
    comm = part.init()
    part.say("here")
    if part.hit:
        part.say("struck")
        raise SystemExit(1)
    seen = part.watch(comm, lambda: comm.all_reduce(tensor(comm)))
    part.go_on(comm)
    return seen


def _late_for_a_call(part: Part) -> Seen:
    """A call's own timeout counts, not the communicator's."""
    comm = part.init()
    verify(comm)
    if part.hit:
        part.say("struck")
        seen = part.watch(comm, lambda: time.sleep(2))
    else:
        seen = part.watch(comm, lambda: comm.all_reduce(tensor(comm), timeout=1))
    if part.hit:
        comm.destroy()
    else:
        part.go_on(comm)
    return seen


def _refused(part: Part, timeout: float = LONG) -> Seen:
    """An init that fails, and one after it that does not."""
    if part.hit:
        part.say("struck")
    try:
        part.init(timeout)
        seen = Seen("", "", None, time.monotonic())
    except tdccl.InitError as error:
        seen = Seen("InitError", str(error), None, time.monotonic())
    return seen


def _without_scratch(part: Part) -> Seen:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    hog = None
    if part.hit and ON_GPU:
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(free - (16 << 20), dtype=torch.uint8, device="cuda")
    elif part.hit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    seen = _refused(part)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    del hog
    if ON_GPU:
        torch.cuda.empty_cache()
    with part.init() as comm:
        verify(comm)
    return seen


def _of_another_version(part: Part) -> Seen:
    given = tdccl.membership.__version__
    tdccl.membership.__version__ = "0.0.1" if part.hit else given
    seen = _refused(part)
    tdccl.membership.__version__ = given
    with part.init() as comm:
        verify(comm)
    return seen


def _set_wrongly(part: Part) -> Seen:
    if part.hit:
        os.environ["TDCCL_ALGO"] = "all_reduce:by_magic"
    seen = _refused(part)
    os.environ.pop("TDCCL_ALGO", None)
    with part.init() as comm:
        verify(comm)
    return seen


def _missing(part: Part) -> Seen:
    if part.hit:
        part.say("struck")
        seen = Seen("", "", None, time.monotonic())
        time.sleep(2.5)
        part.store.add(f"tdccl/inits/{part.rank}", 1)  # it was started for the next one
    else:
        seen = _refused(part, timeout=2)
    with part.init() as comm:
        verify(comm)
    return seen


def _twice(part: Part) -> Seen:
    """The last process believes it is rank 0 of the others."""
    others = part.size - 1
    if part.hit:
        time.sleep(SETTLED)
        part.say("struck")
        try:
            Communicator(StoreBootstrap(part.store, 0, others, LONG, "twice"), None, LONG)
        except tdccl.InitError as error:
            return Seen("InitError", str(error), None, time.monotonic())
    with Communicator(StoreBootstrap(part.store, part.rank, others, LONG, "twice"), None, LONG) as comm:
        verify(comm)
        time.sleep(2 * SETTLED)
        verify(comm)
    return Seen("", "", None, time.monotonic())


def _with_the_store(part: Part) -> Seen:
    """The store is the victim's. Those who wait for it, rather than in a kernel, are told too."""
    port = dist.PrefixStore("port", part.store)
    if part.hit:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(port.get("port")), is_master=False)
    comm = tdccl.init(store=store, rank=part.rank, size=part.size, timeout=LONG)
    verify(comm)
    part.say("here")
    if part.hit:
        time.sleep(LONG)
    seen = part.watch(comm, lambda: comm.empty(100))
    part.go_on(comm)
    return seen


class TorchGroup:
    """What `Part` needs of a communicator, of torch's default group."""

    def __init__(self, part: Part, name: str, size: int):
        store = dist.PrefixStore(name, part.store)
        dist.init_process_group("tdccl", store=store, rank=part.rank, world_size=size, timeout=timedelta(seconds=LONG))
        self.device = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")
        self.check = dist.group.WORLD.communicator.check

    def verify(self) -> None:
        x = torch.ones(1000, device=self.device)
        dist.all_reduce(x)
        assert (x == dist.get_world_size()).all()


def _in_torch(part: Part) -> Seen:
    """The survivors shrink the default group, make a subgroup of it, and go on."""
    group = TorchGroup(part, "torch", part.size)
    group.verify()
    dist.new_group(list(range(part.size - 1)))  # which shrinking the default group ends
    part.say("here")
    if part.hit:
        time.sleep(LONG)
    x = torch.ones(1000, device=group.device)
    seen = part.watch(group, lambda: dist.all_reduce(x))
    tdccl.shrink(exclude=[part.victim])
    group.verify()
    everyone = dist.new_group(list(range(part.size - 1)))
    dist.all_reduce(x.fill_(1.0), group=everyone)
    assert (x == part.size - 1).all()
    dist.destroy_process_group()
    return seen


def _aborted_in_torch(part: Part) -> Seen:
    """One rank aborts all groups while a message never comes; the others destroy theirs, and all start again."""
    group = TorchGroup(part, "first", part.size)
    group.verify()
    work = dist.irecv(torch.ones(10, device=group.device), src=(part.rank + 1) % part.size)
    try:
        work.wait(timedelta(seconds=SETTLED))
        raise AssertionError("wait(timeout) returned without a message")
    except tdccl.Timeout:
        pass
    dist.group.WORLD.monitored_barrier()
    if part.hit:
        part.say("struck")
        dist.distributed_c10d._abort_process_group()
    seen = part.watch(group, work.wait)
    if not part.hit:
        dist.destroy_process_group()
    again = TorchGroup(part, "second", part.size)
    again.verify()
    dist.destroy_process_group()
    return seen


def _late_in_torch(part: Part) -> Seen:
    group = TorchGroup(part, "late", part.size)
    group.verify()
    if part.hit:
        part.say("struck")
        seen = part.watch(group, lambda: time.sleep(2))
    else:
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=1)
        x = torch.ones(1000, device=group.device)
        seen = part.watch(group, lambda: dist.group.WORLD.allreduce([x], options))
    dist.destroy_process_group()
    return seen


def _anew(part: Part, members: list[int]) -> Communicator:
    """A communicator of some of the ranks, which start anew."""
    bootstrap = StoreBootstrap(part.store, members.index(part.rank), len(members), LONG, "anew")
    return Communicator(bootstrap, None, LONG)


_KILL = (Strike("here", signal.SIGKILL),)
_DIED = ("rank {victim} ", "died", "shrink(exclude=[{victim}])")
_ABORTED = ("rank {victim} aborted",)
_STOP = Strike("here", signal.SIGSTOP)

FAULTS = [
    Fault("kill -9 while the others wait for it", _while_others_wait, "PeerFailure", _DIED, _KILL),
    Fault("kill -9 in the middle of collectives", _in_calls, "PeerFailure", _DIED, _KILL),
    Fault("kill -9 between calls", _between_calls, "PeerFailure", _DIED, _KILL),
    Fault("kill -9 during graph replay", _replaying, "PeerFailure", _DIED, _KILL, on="gpu"),
    Fault("kill -9 of the rank with the store", _with_the_store, "PeerFailure", _DIED, _KILL),
    Fault("kill -9 in init", _in_init, "InitError", ("rank {victim} ", "died"), _KILL),
    Fault("kill -9 while the others destroy", _in_destroy, "", (), _KILL),
    Fault("a rank raises between collectives", _exiting, "PeerFailure", _DIED, exits=True),
    Fault(
        "SIGSTOP, shorter than the timeout", _stopped_for_a_moment, "",
        strikes=(_STOP, Strike("here", signal.SIGCONT)), seen_by="all",
    ),
    Fault(
        "SIGSTOP, longer than the timeout", _stopped_for_long, "Timeout", ("waited 2 s for rank {victim}",), waited=2,
        strikes=(_STOP, Strike("shrunk", signal.SIGCONT, by_victim=False)),
    ),
    Fault("abort() by a thread", _aborted_by_a_thread, "Aborted", _ABORTED, seen_by="all"),
    Fault("abort() during capture", _aborted_in_capture, "Aborted", _ABORTED, seen_by="all", on="gpu"),
    Fault("torch.distributed: kill -9", _in_torch, "PeerFailure", _DIED, _KILL),
    Fault("torch.distributed: a group is aborted", _aborted_in_torch, "Aborted", _ABORTED),
    Fault(
        "torch.distributed: a call misses a rank, timeout=1", _late_in_torch, "Timeout", ("1 s for rank {victim}",),
        waited=1,
    ),
    Fault(
        "Ctrl-C in a call", _interrupted, "Aborted", _ABORTED,
        strikes=(Strike("here", signal.SIGINT),), on="emulation",
    ),
    Fault("a call misses a rank, timeout=1", _late_for_a_call, "Timeout", ("1 s for rank {victim}",), waited=1),
    Fault("init: a rank is missing, timeout=2", _missing, "InitError", ("rank {victim} of", "did not come"), waited=2),
    Fault("init: a rank is there twice", _twice, "InitError", ("rank 0 of", "already"), seen_by="victim"),
    Fault("init: a rank of another version", _of_another_version, "InitError", ("0.0.1", "equal"), seen_by="all"),
    Fault("init: a rank is set up wrongly", _set_wrongly, "InitError", ("by_magic",), seen_by="all"),
    Fault("init: no scratch on one rank", _without_scratch, "InitError", ("rank {victim} could not",)),
]  # fmt: skip


def table() -> list[Fault]:
    """The faults that can be tried here."""
    return [fault for fault in FAULTS if fault.on in ("both", "gpu" if ON_GPU else "emulation")]
