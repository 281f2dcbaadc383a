"""How soon faults are seen: `python -m bench.faults -J FILE` tries each one of the table on ranks of its own."""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bench import fault_table, output
from bench.crew import ON_GPU, SETTLED, Crew
from tdccl import environment


def main() -> None:
    """Tries every fault, prints what was seen and how soon, and writes it as JSON; exits with 1 if any went wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    parser.add_argument("-n", "--ranks", type=int, help="default: one a GPU, 4 in emulation")
    parser.add_argument("-r", "--repeat", type=int, default=3, help="how often each is tried (default: 3)")
    parser.add_argument("-J", "--json", type=Path, help="write the times to this file")
    parser.add_argument("--vs", choices=["nccl", "gloo"], help="kill a rank of torch's own backend, too")
    parser.add_argument("--vs-timeout", type=float, default=30, help="its timeout, seconds (default: 30)")
    options = parser.parse_args()
    ranks = options.ranks or (torch.cuda.device_count() if ON_GPU else 4)
    crew = Crew(ranks)
    tried = [_try(fault, crew, options.repeat) for fault in fault_table.table()]
    rows = [row for row in tried if row is not None]
    crew.close()
    if options.vs:
        rows.append(_try_peer(options.vs, ranks, options.vs_timeout))
    if options.json:
        command = f"python -m bench.faults {shlex.join(sys.argv[1:])}"
        report = {**output.describe(ranks, torch.device("cuda", 0), command), "faults": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(None in tried)


def _try(fault, crew: Crew, times: int) -> dict | None:
    """One row of the report; seconds: until the last rank saw the fault, each time it was tried, in order of size."""
    try:
        outcomes = [crew.run(fault) for _ in range(times)]
    except (AssertionError, OSError) as error:  # OSError: a rank that ought to live was gone
        print(f"{fault.name:45} WRONG: {error}", flush=True)
        return None
    return _row(fault.name, fault.error, fault.waited, [outcome.seconds for outcome in outcomes if fault.timed])


def _row(name: str, error: str, waited: float, seconds: list[float]) -> dict:
    seconds = [float(f"{each:.3g}") for each in sorted(seconds)]
    span = f"{seconds[0]:8.3f} .. {seconds[-1]:.3f} s" if seconds else ""
    print(f"{name:45} {error:15} {span}", flush=True)
    return {"fault": name, "error": error, "waited_s": waited, "seconds": seconds}


def _try_peer(backend: str, ranks: int, timeout: float) -> dict:
    """The same row for torch's own backend: until the last survivor's call has raised, or its process has ended."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        arguments = (backend, rank, ranks, store.port, timeout, theirs)
        processes.append(context.Process(target=_serve_peer, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    time.sleep(SETTLED)
    processes[-1].kill()
    began, errors = time.monotonic(), set()
    for pipe in pipes[:-1]:
        try:
            errors.add(pipe.recv())
        except EOFError:
            errors.add("the process is ended")
    seconds = time.monotonic() - began
    for process in processes:
        process.kill()
        process.join()
    name = f"{backend}, timeout={timeout:g}: kill -9 while the others wait for it"
    return _row(name, ", ".join(sorted(errors)), 0, [seconds])


def _serve_peer(backend: str, rank: int, ranks: int, port: int, timeout: float, pipe) -> None:
    device = torch.device("cuda", rank) if ON_GPU else torch.device("cpu")
    if ON_GPU:
        torch.cuda.set_device(device)
    environment.forbid_multicast_to_others()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
    x = torch.ones(100_000, device=device)
    dist.all_reduce(x)
    pipe.send("here")
    if rank == ranks - 1:
        time.sleep(10 * timeout)
    try:
        dist.all_reduce(x)
        x.sum().item()
        pipe.send("nothing")
    except RuntimeError as error:
        pipe.send(type(error).__name__)
    os._exit(0)


if __name__ == "__main__":
    main()
