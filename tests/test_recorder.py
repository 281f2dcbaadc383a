"""The flight recorder: what it keeps, who can read it, what a dump and the trace tool tell, what a profiler shows."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pool
import pytest
import torch

import tdccl
from bench import launch
from tdccl import trace
from tdccl.runtime import recorder
from tdccl.runtime.recorder import CALLS, PLAIN, Recorder, described
from tdccl.transport import host
from tdccl.transport.bootstrap import StoreBootstrap


def alone():
    return Recorder(StoreBootstrap(torch.distributed.HashStore(), 0, 1, 10))


def a_call(count, collective="all_reduce"):
    return described(collective, "one_shot_ll", torch.float32, "sum", None, PLAIN, PLAIN, False, count, 4 * count)


def test_the_last_calls_are_kept():
    recorder = alone()
    assert recorder.histories() == {0: []}
    for count in range(3 * CALLS):
        index = recorder.note(a_call(count), stream=7)
    recorder.end(index)
    recorder.end(index - CALLS)  # long overwritten
    (entries,) = recorder.histories().values()
    assert [entry.count for entry in entries] == [*range(2 * CALLS, 3 * CALLS)]
    assert [entry.index for entry in entries] == [*range(2 * CALLS + 1, 3 * CALLS + 1)]
    assert all(entry.number == entry.index for entry in entries)
    assert str(entries[-1]) == f"all_reduce of {3 * CALLS - 1} float32, sum" and entries[-1].stream == 7
    assert entries[-1].ended >= entries[-1].started > 0 and entries[-2].ended == 0


def test_a_dump_while_another_thread_destroys_is_whole(tmp_path, monkeypatch):
    """The error that is dumped for would be lost with it."""
    own, read = alone(), recorder._entries
    own.note(a_call(7), stream=0)
    monkeypatch.setattr(recorder, "_entries", lambda memory: (own.close(), read(memory))[1])
    (seen,) = json.loads(own.dump(tmp_path, None).read_text())["ranks"].values()
    assert seen["pid"] == os.getpid() and [call["count"] for call in seen["calls"]] == [7]


def check_entries(comm):
    before = comm._recorder.collectives
    x = comm.empty(12 * comm.size, torch.bfloat16)
    y = torch.empty(12 * comm.size, dtype=torch.bfloat16, device=comm.device)
    comm.all_reduce(x, y, op="max")
    comm.broadcast(x, comm.size - 1)
    comm.broadcast(x, comm.size - 1)  # by the short way
    comm.gather(y[:5], root=0)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.size > 1:
        comm.send_recv([(y, right)], [(x, left)])
    comm.barrier()
    if comm.device.type == "cuda":
        torch.cuda.synchronize()
    comm._bootstrap.barrier()
    everyone = comm._recorder.histories()
    comm._bootstrap.barrier()
    return before, everyone


def test_every_rank_sees_what_all_have_called(ranks, world):
    answers = ranks.run(check_entries, world)
    count = 12 * world
    expected = [f"all_reduce of {count} bfloat16, max", "gather of 5 bfloat16, root 0", "barrier"]
    if world > 1:
        expected[1:1] = [f"broadcast of {count} bfloat16, root {world - 1}"] * 2
        expected[-1:-1] = [f"send_recv of {4 * count} uint8"]
    for before, histories in answers:
        assert histories == answers[0][1] and list(histories) == list(range(world))
        for entries in histories.values():
            last = entries[-len(expected) :]
            assert [str(entry) for entry in last] == expected
            assert last[0].number == before + 1 and last[-1].number == before + len(expected) - (world > 1)
            assert last[0].send.startswith("symmetric memory ") and last[0].recv == "plain memory"
            assert all(entry.ended for entry in last) == (not torch.cuda.is_available())


def check_unseen(comm):
    """The last rank has no shared memory to show."""
    comm._splits += 1
    bootstrap = comm._bootstrap.subgroup(list(range(comm.size)), f"unseen{comm._splits}")
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == comm.size - 1:
            patch.setattr(host, "_FOLDER", "/nowhere")
        recorder = Recorder(bootstrap)
    recorder.note(a_call(comm.rank), stream=0)
    comm._bootstrap.barrier()
    seen = {rank: [entry.count for entry in entries] for rank, entries in recorder.histories().items()}
    comm._bootstrap.barrier()
    return recorder.name, seen


def test_a_rank_without_shared_memory_is_not_seen(ranks, world):
    answers = ranks.run(check_unseen, world)
    assert len({name for name, _ in answers}) == 1
    for rank, (_, seen) in enumerate(answers):
        assert seen == {each: [each] for each in range(world) if each < world - 1 or each == rank}


def leave(rank, folder, queue):
    """Three collectives; the last rank makes but the first two, and dies."""
    os.environ["TDCCL_TRACE_DIR"] = f"{folder}/traces"
    comm = tdccl.init(store=torch.distributed.FileStore(f"{folder}/store", 3), rank=rank, size=3, timeout=5)
    x = torch.ones(1000, device=comm.device)
    with comm.split(rank % 2) as part:
        part.barrier()
        part.dump(f"{folder}/traces")
    comm.all_reduce(x, x)
    comm.broadcast(x, 1)
    if comm.device.type == "cuda":
        torch.cuda.synchronize()
    if rank < 2:
        try:
            comm.all_gather(x)
            time.sleep(4)
            comm.check()
        except tdccl.PeerFailure as error:
            queue.put(str(error))
    queue.close()
    queue.join_thread()
    os._exit(0)


@pytest.mark.skipif(pool.LARGEST_WORLD < 3, reason="needs three ranks")
def test_a_dead_rank_is_named_by_its_last_call_and_by_the_trace(tmp_path):
    context = launch.processes()
    queue = context.Queue()
    processes = [context.Process(target=leave, args=(rank, str(tmp_path), queue)) for rank in range(3)]
    for process in processes:
        process.start()
    messages = [queue.get(timeout=100) for _ in range(2)]
    for process in processes:
        process.join(60)
    for message in messages:
        assert "rank 2 (pid" in message and "rank 2 is at call 2: broadcast of 1000 float32, root 1" in message, message
        assert "is at call 3: all_gather of 1000 float32" in message, message
    folder = tmp_path / "traces"
    command = [sys.executable, "-m", "tdccl.trace", folder, "-o", tmp_path / "timeline.json"]
    told = subprocess.run(command, cwd=pool.ROOT, check=True, capture_output=True, text=True, timeout=60).stdout
    assert "communicator" in told.splitlines()[0] and "of 3 ranks" in told.splitlines()[0]
    assert "rank 2 has not come to call 3, to which others have" in told
    assert "rank 0 raised PeerFailure: rank 2 (pid" in told and "rank 1 raised PeerFailure" in told
    assert "ranks came furthest apart to call" in told and "of 2 ranks" in told

    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    calls = [event for event in events if event["ph"] in "Xi"]
    assert len({event["pid"] for event in calls}) == 3 and len({event["tid"] for event in calls}) == 3
    assert [event["name"] for event in calls].count("broadcast") == 3
    assert all(event["ts"] >= 0 and (event["ph"] == "i" or event["dur"] > 0) for event in calls)
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(names) == 3 and all("rank" in name for name in names)
    assert [each.size for each in trace.load(folder)] == [3, 2, 1]


def test_what_is_dumped_last_of_a_rank_counts(tmp_path):
    """A rank that had dumped on request, and is killed later, has come to where its peers saw it."""
    recorder = alone()
    index = recorder.note(a_call(1), stream=0)
    recorder.dump(tmp_path, None)
    recorder.note(a_call(2), stream=0)
    recorder.end(index)
    recorder.rank = 1
    recorder.dump(tmp_path, "a peer's")
    (found,) = trace.load(tmp_path)
    assert [call.count for call in found.calls[0]] == [1, 2] and found.calls[0][0].ended


def check_dumps(comm, folder):
    """A mismatch, after which the ranks go on, and a fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TDCCL_TRACE_DIR", folder)
        patch.setenv("TDCCL_DEBUG", "1")
        part = comm.split(0)
        with pytest.raises(tdccl.Mismatch):
            part.broadcast(torch.ones(3, device=comm.device), root=comm.rank)
        comm._bootstrap.barrier()  # all have dumped
        assert all("Mismatch" in error for each in trace.load(Path(folder)) for error in each.errors.values())
        part.barrier()
        comm._bootstrap.barrier()  # no kernel of theirs runs any more
        part.abort()
        with pytest.raises(tdccl.Aborted):
            part.barrier()
        part.destroy()


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs two ranks")
def test_a_fault_after_a_mismatch_is_dumped(ranks, tmp_path):
    ranks.run(check_dumps, 2, folder=str(tmp_path))
    (found,) = trace.load(tmp_path)
    assert [*found.errors] == [0, 1] and all(error.startswith("Aborted") for error in found.errors.values())
    assert all(len(calls) == 1 for calls in found.calls.values())


def test_the_trace_tool_says_what_to_do_where_there_is_nothing(tmp_path):
    with pytest.raises(SystemExit, match="no dumps here; set TDCCL_TRACE_DIR"):
        trace.main([str(tmp_path)])
    for text in ("no JSON", "[]", '{"communicator": 1}'):
        (tmp_path / "foreign-rank0.json").write_text(text)
        with pytest.raises(SystemExit, match=r"foreign-rank0.json: not a dump"):
            trace.main([str(tmp_path)])


def check_destroyed(comm, folder):
    part = comm.split(0)
    part.destroy()
    with pytest.raises(tdccl.DestroyedError):
        part.dump(folder)


def test_a_destroyed_communicator_has_nothing_to_dump(ranks, tmp_path):
    ranks.run(check_destroyed, 1, folder=str(tmp_path))


def check_profile(comm):
    x = torch.ones(100 * comm.size, device=comm.device)
    comm.all_reduce(x, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        comm.all_reduce(x, x)
        comm.all_reduce(x, x)
        comm.scatter(x, x[:100].clone(), root=0)
        comm.send(x, 1) if comm.rank == 0 else comm.recv(x, 0)
    comm.all_reduce(x, x)
    return {event.key: event.count for event in profile.key_averages() if event.key.startswith("tdccl:")}


@pytest.mark.skipif(pool.LARGEST_WORLD < 2, reason="needs two ranks")
def test_a_profiler_shows_each_call_by_name(ranks):
    for rank, shown in enumerate(ranks.run(check_profile, 2)):
        assert shown == {"tdccl:all_reduce": 2, "tdccl:scatter": 1, ("tdccl:send", "tdccl:recv")[rank]: 1}
