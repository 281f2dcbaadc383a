"""Ranks: those of mpirun or torchrun, or spawned here."""

import argparse

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import tdccl
from bench.sweep import run
from tdccl import environment
from tdccl.transport.bootstrap import StoreBootstrap, discover, launched

_HOST = "127.0.0.1"


def main(options: argparse.Namespace) -> int:
    """Runs the bench on the ranks of the launcher, or on ranks of its own; returns the exit status."""
    if not launched():
        return _spawn(options)
    if options.ranks is not None:
        raise SystemExit(f"--ranks {options.ranks} is for a run without a launcher; this one gives the ranks itself")
    comm = tdccl.init()
    bootstrap = discover(timeout=comm.timeout)
    bootstrap.interrupt = comm.raise_fault  # nobody waits for a rank that has ended
    return run(options, comm, bootstrap)


def processes():
    """multiprocessing's context for ranks. In emulation a server that has imported everything starts one in no time; a
    GPU cannot be used in a forked process."""
    if not environment.emulated():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tdccl.collectives", "tdccl.runtime.emulation"])
    return context


def _spawn(options: argparse.Namespace) -> int:
    ranks = options.ranks or (4 if environment.emulated() else torch.cuda.device_count())
    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    try:
        multiprocessing.start_processes(
            _spawned, (ranks, store.port, options), nprocs=ranks, start_method=processes().get_start_method()
        )
    except multiprocessing.ProcessExitedException as error:
        return error.exit_code
    return 0


def _spawned(rank: int, ranks: int, port: int, options: argparse.Namespace) -> None:
    store = dist.TCPStore(_HOST, port, is_master=False)
    comm = tdccl.init(store=dist.PrefixStore("comm", store), rank=rank, size=ranks)
    bootstrap = StoreBootstrap(dist.PrefixStore("bench", store), rank, ranks, comm.timeout)
    if status := run(options, comm, bootstrap):
        raise SystemExit(status)
