"""NVLS: who may use multicast, the device functions of multimem, and the algorithms, through all three faces.

In emulation the switch is emulated. On GPUs without multicast `conftest` asks for the unicast twins.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import types
import weakref

import cases
import multimem_kernels
import pool
import pytest
import reference
import test_races
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as torch_symmetric
import triton.language as tl
from test_collectives import Buffers, only
from test_process_group import run
from test_training import LONG
from waiting import settle, settle_all

import tdccl
from bench import implementations, nvls_check
from tdccl import environment, tuning
from tdccl.collectives import ALGORITHMS
from tdccl.decisions import table_for
from tdccl.errors import InitError
from tdccl.transport import Multicast, multicast, multicast_between
from tdccl.transport.bootstrap import StoreBootstrap
from tdccl.transport.symmetric_memory import free_kept

FORBIDDING = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TDCCL_NVLS": "0",
}
each_variable = pytest.mark.parametrize("name", FORBIDDING)


@pytest.fixture
def nothing_said(monkeypatch):
    for name in FORBIDDING:
        monkeypatch.delenv(name, raising=False)


@each_variable
def test_each_variable_forbids_whatever_the_others_say(nothing_said, monkeypatch, name):
    assert environment.multicast_forbidden_by() is None
    permitting = {"NCCL_NVLS_ENABLE": "1", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "0", "NVSHMEM_DISABLE_NVLS": "0"}
    for other, value in {**permitting, "TDCCL_NVLS": "1", name: FORBIDDING[name]}.items():
        monkeypatch.setenv(other, value)
    assert environment.multicast_forbidden_by() == f"{name}={FORBIDDING[name]}"


@pytest.mark.parametrize(
    "name, value, forbids",
    [
        ("NCCL_NVLS_ENABLE", "2", False),
        ("NCCL_NVLS_ENABLE", " 0", True),
        ("NCCL_NVLS_ENABLE", "00", True),
        ("NCCL_NVLS_ENABLE", "0x0", True),
        ("NCCL_NVLS_ENABLE", "disabled", True),
        ("NVSHMEM_DISABLE_NVLS", "01", True),
        ("TDCCL_NVLS", "none", True),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "true", True),
        ("NVSHMEM_DISABLE_NVLS", "YES", True),
        ("NVSHMEM_DISABLE_NVLS", "false", False),
        ("TDCCL_NVLS", "unicast", False),
        ("TDCCL_NVLS", "", False),
    ],
)
def test_spellings_of_the_variables(nothing_said, monkeypatch, name, value, forbids):
    monkeypatch.setenv(name, value)
    assert (environment.multicast_forbidden_by() is not None) == forbids


@each_variable
def test_a_variable_of_one_library_is_passed_on_to_the_others(nothing_said, monkeypatch, name):
    environment.forbid_multicast_to_others()
    assert not FORBIDDING.keys() & os.environ.keys()
    monkeypatch.setenv(name, FORBIDDING[name])
    for other in FORBIDDING:  # so that what is set is undone
        monkeypatch.setenv(other, os.environ.get(other, ""))
    environment.forbid_multicast_to_others()
    assert all(os.environ[other] == value for other, value in FORBIDDING.items() if other != "TDCCL_NVLS")


def test_another_value_of_our_own_variable_is_refused(nothing_said, monkeypatch):
    monkeypatch.setenv("TDCCL_NVLS", "maybe")
    with pytest.raises(InitError, match=r"expected 0 .* 1 .* or unicast"):
        environment.multimem_by_unicast()


FORBIDDEN = """
import os, sys, types
import torch
from tdccl.transport import multicast, multicast_between

bootstrap = types.SimpleNamespace(rank=0, size=2, exchange=lambda value: [value, (None, None)])
multicast.supported = lambda device: True
device = torch.device("cuda", 0)
assert multicast_between(bootstrap, device, 1).kind == "switch"
for name, value in {forbidding!r}.items():
    os.environ[name] = value
    found = multicast_between(bootstrap, device, 1)
    assert found.kind is None and found.reason == f"{{name}}={{value}} forbids it", found
    try:
        multicast.allocate(bootstrap, 4096, device)
    except multicast.InitError as error:
        assert f"{{name}}={{value}} forbids" in str(error)
    else:
        raise AssertionError(name)
    del os.environ[name]
assert not [module for module in sys.modules if "_symmetric_memory" in module]
"""


def test_where_it_is_forbidden_nothing_is_allocated_nor_imported():
    kept = {name: value for name, value in os.environ.items() if name not in FORBIDDING}
    program = FORBIDDEN.format(forbidding=FORBIDDING)
    subprocess.run([sys.executable, "-c", program], cwd=pool.ROOT, env=kept | {"TDCCL_EMULATE": "0"}, check=True)


def test_all_ranks_must_be_permitted_and_have_a_gpu_of_their_own(nothing_said, monkeypatch):
    monkeypatch.setattr(multicast, "emulated", lambda: False)
    monkeypatch.setattr(multicast, "supported", lambda device: True)
    for other, ranks_of_a_gpu, kind, reason in [
        (None, 1, "switch", "have it"),
        ("NCCL_NVLS_ENABLE=0 forbids it", 1, None, "NCCL_NVLS_ENABLE=0"),
        ("TDCCL_NVLS=unicast", 1, None, "unicast"),
        (None, 2, None, "share a GPU"),
    ]:
        bootstrap = types.SimpleNamespace(rank=0, size=2, exchange=lambda value, other=other: [value, (other, None)])
        found = multicast_between(bootstrap, torch.device("cuda", 0), ranks_of_a_gpu)
        assert found.kind == kind and reason in found.reason


def test_a_rank_whose_variable_has_no_such_value_keeps_no_other_waiting(nothing_said, monkeypatch):
    monkeypatch.setattr(multicast, "supported", lambda device: True)
    theirs = None, "TDCCL_NVLS is 'maybe'"
    bootstrap = types.SimpleNamespace(rank=0, size=2, exchange=lambda value: [value, theirs])
    with pytest.raises(InitError, match="rank 1 could not take part: TDCCL_NVLS is 'maybe'"):
        multicast_between(bootstrap, torch.device("cpu"), 1)
    exchanged = []
    bootstrap.exchange = lambda value: exchanged.append(value) or [value, (None, None)]
    monkeypatch.setenv("TDCCL_NVLS", "maybe")
    with pytest.raises(InitError, match="TDCCL_NVLS is 'maybe'"):
        multicast_between(bootstrap, torch.device("cpu"), 1)
    assert exchanged


# Who may name what: the permission, torch's symmetric memory, driver calls, and the instructions.
ONLY_IN = {
    r"NCCL_NVLS_ENABLE|TORCH_SYMM_MEM_DISABLE_MULTICAST|NVSHMEM_DISABLE_NVLS": {"tdccl/environment.py"},
    r"\b_symmetric_memory\b": {"tdccl/transport/multicast.py", "bench/implementations.py", "bench/overlap.py"},
    r"multicast_ptr|MULTICAST_SUPPORTED": {"tdccl/transport/multicast.py"},
    r"(?i)cuMulticast|mc_ptr|nvls_malloc|ncclMemAlloc": set(),
    r"multimem\.(ld_reduce|st|red)\.": {"tdccl/language/multimem.py"},
}


@pytest.mark.parametrize("pattern", ONLY_IN)
def test_nothing_else_in_the_tree_touches_multicast(pattern):
    listed = [*pool.ROOT.glob("tdccl/**/*.py"), *pool.ROOT.glob("bench/**/*.py"), *pool.ROOT.glob("examples/**/*.py")]
    naming = {str(path.relative_to(pool.ROOT)) for path in listed if re.search(pattern, path.read_text())}
    assert naming == ONLY_IN[pattern]


def test_the_peers_of_the_bench_are_told_before_they_start(nothing_said, monkeypatch):
    def start(*_, **__):
        raise StopIteration(os.environ["NCCL_NVLS_ENABLE"])

    for name in FORBIDDING:  # so that what is set is undone
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "1")
    monkeypatch.setattr(implementations, "_shared_store", lambda bootstrap: None)
    monkeypatch.setattr(implementations.dist, "init_process_group", start)
    with pytest.raises(StopIteration, match="0"):
        implementations.peers(["gloo"], None, types.SimpleNamespace(rank=0, size=2), False, 64)


def test_a_rendezvous_goes_round_by_round_whatever_its_numbers():
    """As torch does it: the ranks of this process and its peer have seen differently many rounds before."""
    store, found = dist.HashStore(), {}

    def rank_of(rank, first):
        bootstrap = StoreBootstrap(store, rank, 2, timeout=30)
        rounds = multicast.rounds_store(bootstrap)
        seen = dist.PrefixStore("carrier", rounds)  # C++, which calls what is Python's
        values = []
        for number in range(first, first + 3):
            seen.set(f"Symmetric/{number}/{rank}", f"{rank} in round {number - first}")
            seen.wait([f"Symmetric/{number}/{1 - rank}"])
            values.append(seen.get(f"Symmetric/{number}/{1 - rank}").decode())
        found[rank] = values

    threads = [threading.Thread(target=rank_of, args=(rank, first)) for rank, first in ((0, 5), (1, 17))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {rank: [f"{1 - rank} in round {number}" for number in range(3)] for rank in (0, 1)}


def both_allocate(monkeypatch, here=lambda rank, where: None) -> tuple[list, list]:
    """(what `multicast.allocate` returned, what it raised) on two threads for two ranks, which meet afterwards.

    torch's part is played by one that goes the same rounds. It calls here(rank, where) where something may go wrong.
    """
    store, made, said = dist.HashStore(), [None] * 2, [None] * 2
    stores, rounds_store = {}, multicast.rounds_store

    def rank():
        return int(threading.current_thread().name)

    def empty(nbytes, dtype, device):
        here(rank(), "memory")
        return torch.empty(nbytes, dtype=dtype)

    def rendezvous(local, name):
        rounds = dist.PrefixStore("carrier", stores[rank()])  # C++, which calls what is Python's
        for number in range(2):
            here(rank(), f"round {number}")
            rounds.set(f"{name}/{number}/{rank()}", "mine")
        here(rank(), "handle")
        refused = here(rank(), "multicast") == "refused"
        return types.SimpleNamespace(buffer_ptrs=[0, 0], offset=0, multicast_ptr=0 if refused else 1)

    def carry(bootstrap):
        stores[rank()] = made = rounds_store(bootstrap)
        return made

    def allocate():
        bootstrap = StoreBootstrap(store, rank(), 2, timeout=30)
        try:
            made[rank()] = multicast.allocate(bootstrap, 1024, torch.device("cpu"))
        except tdccl.InitError as error:
            said[rank()] = str(error)
        assert bootstrap.exchange("next") == ["next", "next"]

    monkeypatch.setattr(multicast, "multicast_forbidden_by", lambda: here(rank(), "permission"))
    monkeypatch.setattr(multicast, "rounds_store", carry)
    monkeypatch.setattr(torch_symmetric, "empty", empty)
    monkeypatch.setattr(torch_symmetric, "rendezvous", rendezvous)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    threads = [threading.Thread(target=allocate, name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return made, said


no_real_switch = pytest.mark.skipif(not environment.emulated(), reason="not where torch could make a multicast object")


@no_real_switch
@pytest.mark.parametrize("fails", ["memory", "round 0", "round 1", "handle"])
def test_memory_for_the_switch_that_a_rank_is_refused_no_other_waits_for(monkeypatch, fails):
    def here(rank, where):
        if (rank, where) == (0, fails):
            raise RuntimeError(f"no {where}")

    _, said = both_allocate(monkeypatch, here)
    assert f"no {fails}" in said[0] and "rank 0 could not take part" in said[1], said


@no_real_switch
def test_what_is_forbidden_to_one_rank_by_now_no_other_waits_for(monkeypatch):
    _, said = both_allocate(monkeypatch, lambda *at: {(0, "permission"): "NCCL_NVLS_ENABLE=0"}.get(at))
    assert said[0].startswith("NCCL_NVLS_ENABLE=0 forbids") and "rank 0 could not take part" in said[1], said


@no_real_switch
def test_a_multicast_address_that_one_rank_lacks_none_has(monkeypatch):
    made, _ = both_allocate(monkeypatch, lambda *at: {(1, "multicast"): "refused"}.get(at))
    assert [memory.multicast for memory in made] == [0, 0]


@no_real_switch
def test_after_a_failure_it_is_freed_when_the_peers_are_gone_and_the_gpu_works(monkeypatch):
    def synchronize(device):
        if not works:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    made, _ = both_allocate(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    gone, works, local = [], [], weakref.ref(made[0].local)
    made[0].release(None, lambda: bool(gone))
    for happens in (gone, works):
        free_kept()
        assert local() is not None
        happens.append(True)
    free_kept()
    assert local() is None


@contextlib.contextmanager
def reached_by(comm, kind):
    """multimem goes through the switch or by unicast. Real GPUs keep what they have."""
    before = comm.multicast
    if comm.device.type == "cpu":
        comm.multicast = Multicast(kind, "for a test")
        comm._context = comm._context._replace(multicast=comm.multicast)
    comm.use_table(comm.table)  # forgets what was planned
    try:
        yield comm.multicast.kind
    finally:
        comm.multicast = before
        comm._context = comm._context._replace(multicast=before)
        comm.use_table(comm.table)


FORMS = [
    (torch.float32, "sum"), (torch.bfloat16, "sum"), (torch.float16, "max"), (torch.float64, "sum"),
    (torch.int64, "min"), (torch.int32, "sum"), (torch.uint8, "xor"),
]  # fmt: skip
DTYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64,
    torch.int64: tl.int64, torch.int32: tl.int32, torch.uint8: tl.uint8,
}  # fmt: skip


def check_forms(comm, kind):
    """Loads are reduced, stores reach all, reductions count every quad once; what is masked stays as it was."""
    quads = 11
    with reached_by(comm, kind) as kind:
        for seed, (dtype, op) in enumerate(FORMS):
            per_quad = 16 // dtype.itemsize
            count, third = quads * per_quad, 64 * per_quad
            everyone = reference.inputs(seed, comm.size, 3 * third, dtype, comm.device)
            buffer = comm.empty(3 * third, dtype)
            buffer.copy_(everyone[comm.rank])
            result = torch.zeros(count, dtype=dtype, device=comm.device)
            source = (everyone[comm.rank] + 1)[:count].contiguous()
            settle_all(comm)
            comm.barrier()
            arguments = (comm.team, comm.symmetric(buffer), result, source, quads)
            multimem_kernels.every_form[(1,)](*arguments, DTYPE=DTYPES[dtype], OP=op, RED=True, MULTIMEM=kind)
            settle_all(comm)
            where = f"{kind} {dtype} {op}"
            expected = reference.ordered([values[:count] for values in everyone], op)
            assert alike(comm, result, expected), where
            assert alike(comm, buffer[third : third + count], expected), where
            for part in (buffer[count:third], buffer[third + count : 2 * third], buffer[2 * third + count :]):
                start = part.storage_offset() - buffer.storage_offset()
                assert reference.same_bits(part, everyone[comm.rank][start : start + len(part)]), where
            last = slice(2 * third, 2 * third + count)
            everything = [everyone[comm.rank][last], *((values + 1)[:count] for values in everyone)]
            if dtype.is_floating_point:  # in any order
                exact = reference.exact(everything, op)
                assert torch.allclose(buffer[last].double(), exact, rtol=4e-2, atol=0.2), where
            else:
                assert reference.same_bits(buffer[last], reference.ordered(everything, op)), where
            settle_all(comm)


def alike(comm, result, expected) -> bool:
    """Equal bits, but of what a real switch has added."""
    if comm.device.type == "cuda" and comm.multicast.kind == "switch" and expected.dtype.is_floating_point:
        tolerance = 4 * torch.finfo(expected.dtype).eps
        return torch.allclose(result.double(), expected.double(), rtol=tolerance, atol=tolerance * 8)
    return reference.same_bits(result, expected)


LONG_RUN = os.environ.get("TDCCL_LONG", "0") != "0"


def tried(world, kind) -> bool:
    """One rank has no multicast; the twins, which GPUs run, are tried in emulation on three ranks."""
    return world > 1 and (kind == "switch" or world == 3 or LONG_RUN)


both_ways = pytest.mark.parametrize("kind", ["switch", "unicast"])


@both_ways
def test_device_functions_reach_all_ranks(ranks, kind, world):
    if tried(world, kind):
        ranks.run(check_forms, world, kind=kind)


def nvls_of(collective):
    return [algorithm for algorithm in ALGORITHMS[collective] if algorithm.multimem is not None]


def counts_of(dtype, algorithm):
    """Elements a chunk: few, ragged, one tile and a bit; through scratch also more than it holds at once."""
    tile = cases.the_rules().small_tile // dtype.itemsize
    large = [] if algorithm.symmetric else [(cases.SCRATCH_MB << 20) // 2 // dtype.itemsize + 3]
    return [1, 1024 // dtype.itemsize + 9, tile + 24, *large]


REDUCED = [(torch.bfloat16, "sum"), (torch.float32, "avg"), (torch.float16, "sum"), (torch.float64, "sum"),
           (torch.int64, "max"), (torch.int32, "avg"), (torch.bool, "or"), (torch.int8, "xor")]  # fmt: skip


def check_algorithms(comm, kind):
    with reached_by(comm, kind):
        for collective in ("all_reduce", "reduce_scatter", "all_gather", "broadcast"):
            for algorithm in nvls_of(collective):
                buffers = Buffers(comm, bool(algorithm.symmetric))
                kinds = REDUCED if collective in cases.REDUCTIONS else [(torch.bfloat16, None), (torch.bool, None)]
                for seed, (dtype, op) in enumerate(kinds if comm.size < 4 else kinds[:3]):
                    counts = counts_of(dtype, algorithm)
                    for count in counts if seed == 0 else [counts[seed % 3]]:
                        if algorithm.symmetric and collective != "broadcast" and collective != "all_reduce":
                            count = -(-count // 16) * 16
                        check_once(comm, buffers, collective, algorithm, dtype, op, count, seed + count % 2)


def check_once(comm, buffers, collective, algorithm, dtype, op, count, seed):
    in_place, root = seed % 2 == 1 and algorithm.in_place, seed % comm.size
    pieces = comm.size if collective == "reduce_scatter" else 1
    everyone = reference.inputs(seed, comm.size, count * pieces, dtype, comm.device)
    mine = slice(comm.rank * count, (comm.rank + 1) * count)
    shift = 0 if algorithm.symmetric else (seed + comm.rank) % 2  # ranks need not agree on alignment
    recv = buffers.new("recv", count * (comm.size if collective == "all_gather" else 1), dtype, shift)
    send = recv if collective == "broadcast" else buffers.new("send", count * pieces, dtype, shift)
    if in_place and collective in ("all_gather", "all_reduce"):
        send = recv[mine] if collective == "all_gather" else recv
    if in_place and collective == "reduce_scatter":
        recv = send[mine]
    if collective != "broadcast" or comm.rank == root:
        send.copy_(everyone[comm.rank])
    settle_all(comm)
    with only(comm, collective, algorithm.name):
        if collective == "broadcast":
            comm.broadcast(recv, root)
        else:
            getattr(comm, collective)(send, recv, **({"op": op} if op else {}))
    settle_all(comm)
    if collective == "all_gather":
        expected = torch.cat(everyone)
    elif collective == "broadcast":
        expected = everyone[root]
    else:
        expected = summed([values[mine] if pieces > 1 else values for values in everyone], op)
    where = f"{collective} {algorithm.name} {op} {dtype} count {count} seed {seed} in_place {in_place} root {root}"
    assert alike(comm, recv, expected), f"{where}: {(recv != expected).sum().item()} wrong"
    settle_all(comm)


def summed(values, op):
    """In rank order; an average is that of the sum as the element type holds it."""
    if op != "avg":
        return reference.ordered(values, op)
    total = reference.ordered(values, "sum")
    divisor = torch.full_like(total, len(values))
    return total / divisor if total.dtype.is_floating_point else torch.div(total, divisor, rounding_mode="trunc")


@both_ways
def test_every_algorithm_gives_what_the_others_give(ranks, kind, world):
    if tried(world, kind):
        ranks.run(check_algorithms, world, kind=kind)


def preferring(symmetric: bool) -> tuning.Table:
    """A table that takes NVLS for all that it can do."""
    rows = {}
    for collective in ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier"):
        names = {bool(algorithm.symmetric): algorithm.name for algorithm in nvls_of(collective)}
        rows[collective] = {"plain": [tuning.Row(None, names[False], {})]}
        if symmetric and True in names:
            rows[collective]["symmetric"] = [tuning.Row(None, names[True], {})]
    return tuning.Table("the test", rows)


def check_storm(comm, seed):
    before = comm.table
    comm.use_table(preferring(symmetric=False))
    try:
        assert comm.explain("all_gather", torch.ones(9, device=comm.device)).algorithm == "nvls_staged"
        test_races.storm(comm, seed, lambda result, expected: alike(comm, result, expected))
    finally:
        comm.use_table(before)


def test_back_to_back_calls_with_delays(ranks, world):
    if world == 3 or (world > 1 and LONG_RUN):
        ranks.run(check_storm, world, seed=world)


def check_symmetric_storm(comm):
    """Calls on symmetric memory follow one another, each on what the last one left, with delays on some ranks."""
    buffers = [comm.empty(40_000, torch.int64) for _ in range(2)]
    before, totals = comm.table, [comm.rank + 1, 0]
    comm.use_table(preferring(symmetric=True))
    try:
        for step in range(12):
            x, y = buffers[step % 2], buffers[(step + 1) % 2]
            count = [40_000, 16, 10_002][step % 3] // comm.size // 2 * 2
            test_races.dawdle(comm, step)
            x.fill_(step + comm.rank)
            comm.all_reduce(x, y)
            comm.reduce_scatter(y[: count * comm.size], x[:count], op="max")
            comm.all_gather(x[:count], y[: count * comm.size])
            comm.broadcast(y, step % comm.size)
            comm.barrier()
            expected = sum(step + rank for rank in range(comm.size))
            assert comm.device.type == "cuda" or (y[: count * comm.size] == expected).all(), step
            totals = [totals[1], expected]
        settle_all(comm)
        assert (y[: count * comm.size] == expected).all()
    finally:
        comm.use_table(before)


def check_graphs(comm):
    before = comm.table
    comm.use_table(preferring(symmetric=False))
    try:
        test_races.graphs(comm)
    finally:
        comm.use_table(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_replay_with_new_inputs_mixed_with_eager_calls(ranks, world):
    if world > 1:
        ranks.run(check_graphs, world)


def test_symmetric_buffers_pass_from_call_to_call(ranks, world):
    if world > 2 or (world > 1 and LONG_RUN):
        ranks.run(check_symmetric_storm, world)


EVERYTHING = ",".join(
    f"{collective}:{nvls_of(collective)[-1].name}"
    for collective in ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier")
)


def bench(ranks, algorithms):
    options = ("--ranks", str(ranks), "-b", "96K", "-e", "96K", "-n", "1", "-w", "0")
    command = [sys.executable, "-m", "bench", "all", *options]
    if torch.cuda.is_available() and os.environ.get("TDCCL_EMULATE") != "1" and ranks > torch.cuda.device_count():
        pytest.skip(f"{torch.cuda.device_count()} GPUs")
    kept = {**os.environ, "TDCCL_ALGO": algorithms}
    kept.pop("TDCCL_SCRATCH_MB", None)
    done = subprocess.run(command, cwd=pool.ROOT, env=kept, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Out of bounds values : 0 OK" in done.stdout
    return done.stdout


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=LONG), pytest.param(8, marks=LONG)])
def test_through_the_bench(ranks):
    said = bench(ranks, EVERYTHING)
    assert "nvls_two_shot_staged" in said


def check_as_two(port, second):
    """The processes of two ranks that run the check; rank 1 runs Python with the words `second` instead, if there are
    some."""
    check = ["-m", "bench.nvls_check", "-b", "10", "-e", "10"]
    kept = {**os.environ, "TDCCL_INIT": f"tcp://127.0.0.1:{port}", "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *words], cwd=pool.ROOT, env={**kept, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, words in enumerate([check, second or check])
    ]  # fmt: skip


def test_the_check_of_a_host_with_multicast():
    started = check_as_two(29653, None)
    said, _ = started[0].communicate(timeout=200)
    assert [rank.wait(60) for rank in started] == [0, 0]
    assert "# wrong elements: 0" in said
    names = {f"{collective} {algorithm.name}" for collective in ALGORITHMS for algorithm in nvls_of(collective)}
    assert {" ".join(line.split()[:2]) for line in said.splitlines() if not line.startswith("#")} == names


LEAVES = """
import os, tdccl
from tdccl.transport.bootstrap import discover
comm, bootstrap = tdccl.init(), discover()
os._exit(3)
"""


def test_the_check_ends_where_a_rank_has_ended():
    started = check_as_two(29654, ["-c", LEAVES])
    _, said = started[0].communicate(timeout=60)
    assert [rank.wait(60) for rank in started] == [1, 3] and "rank 1" in said.splitlines()[-1], said


def test_the_check_has_every_root_and_ragged_messages_of_every_type():
    listed = [*nvls_check.tasks(types.SimpleNamespace(rank=0, size=8), [1 << power for power in range(14, 29, 2)])]
    assert {task.case.root for task in listed if task.case.collective.rooted} == {*range(8)}
    for collective in ("all_reduce", "broadcast"):
        for name in (algorithm.name for algorithm in nvls_of(collective)):
            mine = [
                task.case for task in listed if (task.case.collective.name, task.algorithm.name) == (collective, name)
            ]
            ragged = {case.dtype for case in mine if case.nbytes % 16}
            assert ragged == {case.dtype for case in mine} and max(case.nbytes for case in mine) == 1 << 28


def test_through_torch_distributed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(TORCH_PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = run(*launcher, str(program), path=(pool.ROOT,), TDCCL_ALGO=EVERYTHING)
    assert said.count(": ok") == 2


TORCH_PROGRAM = """
import os

import torch
import torch.distributed as dist

import tdccl.torch_entry

if not hasattr(dist.Backend, "TDCCL"):
    tdccl.torch_entry.register()
dist.init_process_group("tdccl")
rank, size = dist.get_rank(), dist.get_world_size()
gpus = torch.cuda.device_count()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus) if gpus else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
x = torch.full((5003,), rank + 1.0, device=device)
dist.all_reduce(x)
assert (x == size * (size + 1) / 2).all()
pieces = [torch.empty(77, device=device) for _ in range(size)]
dist.all_gather(pieces, torch.full((77,), float(rank), device=device))
assert [piece[-1].item() for piece in pieces] == list(range(size))
total = torch.empty(31, device=device)
dist.reduce_scatter(total, [torch.full((31,), float(rank + 1), device=device) for _ in range(size)])
assert (total == size * (size + 1) / 2).all()
y = torch.full((100_003,), float(rank), device=device)
dist.broadcast(y, 1)
dist.barrier()
assert (y == 1).all()
print(f"rank {rank}: ok")
dist.destroy_process_group()
"""


def check_late(comm):
    """The barrier through the switch counts, and still names who did not come."""
    group = comm.split(0, comm.rank)
    group._team = group._team._replace(timeout=int(1e9))
    group.timeout = 1
    with only(group, "barrier", "nvls_red"):
        for _ in range(3):
            group.barrier()
        settle_all(group)
        if comm.rank != comm.size - 1:
            with pytest.raises(tdccl.Timeout, match=rf"for rank {comm.size - 1}: block 0, barrier"):
                group.barrier()
                settle(group)
        else:
            group._abort_word.value = 1  # it waits for nobody when it leaves
    comm._bootstrap.barrier()
    group.destroy()


def test_a_rank_that_misses_a_barrier_is_named(ranks, world):
    if world > 1:
        ranks.run(check_late, world)


def check_many_barriers(comm):
    """A byte a rank counts, and bytes overflow."""
    with only(comm, "barrier", "nvls_red"):
        for _ in range(300 if comm.size == 2 else 20):
            comm.barrier()
    settle_all(comm)


def test_barriers_go_on_past_a_byte(ranks, world):
    if world > 1:
        ranks.run(check_many_barriers, world)


def check_explained(comm):
    x = torch.ones(1000, dtype=torch.bfloat16, device=comm.device)
    with only(comm, "all_reduce", "nvls_two_shot_staged"):
        said = str(comm.explain("all_reduce", x))
        assert "reduced in the switch" in said
        with pytest.raises(tdccl.ArgumentError, match="the switch does not reduce bf16 by prod"):
            comm.all_reduce(x, op="prod")
    assert "reduced in the switch" not in str(comm.explain("all_reduce", x))
    if comm.device.type == "cuda":
        return
    with reached_by(comm, None):
        said = str(comm.explain("all_reduce", x))
        assert "not nvls_two_shot_staged: no multicast: for a test" in said
    misaligned = comm.empty(1001, torch.bfloat16)[1:]
    assert "not nvls_two_shot: symmetric memory not aligned" in str(comm.explain("all_reduce", misaligned))


def test_it_is_explained(ranks, world):
    if world > 1:
        ranks.run(check_explained, world)


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
@pytest.mark.parametrize("size", [4, 8])
def test_tables_take_it_where_there_is_multicast_and_say_that_they_are_modelled(gpu, size):
    with_it, without = table_for(gpu, size, multicast=True), table_for(gpu, size)
    assert with_it.source == f"{without.source}; NVLS modelled, not measured"
    for placement, name in (("plain", "nvls_two_shot_staged"), ("symmetric", "nvls_two_shot")):
        if size == 8 or placement == "plain":  # at 4 ranks `two_shot_push` promises nearly as much
            assert with_it.row("all_reduce", placement, 1 << 28).algorithm == name
        assert with_it.row("all_reduce", placement, 1 << 10) == without.row("all_reduce", placement, 1 << 10)
    chosen = {row.algorithm for placements in without.rows.values() for rows in placements.values() for row in rows}
    assert not [name for name in chosen if name.startswith("nvls")]


def test_a_table_that_was_measured_with_multicast_is_for_hosts_that_have_it(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    rows = {"broadcast": {"plain": [{"upto": None, "algorithm": "nvls_staged"}]}}
    path.write_text(json.dumps({"gpu": "NVIDIA H200", "world": 4, "multicast": True, "rows": rows}))
    monkeypatch.setenv("TDCCL_TUNING", str(path))
    assert table_for("NVIDIA H200", 4, multicast=True).source == "measured on 4 x NVIDIA H200 (mine.json)"
    assert "NVIDIA-H200-4.json" in table_for("NVIDIA H200", 4).source
