"""How torch finds tdccl: the entry point `torch.backends`, run inside `import torch`, so it imports nothing heavy."""

import os
import warnings


def register() -> None:
    """Makes `dist.init_process_group("tdccl")` work, under torchrun and under mpirun; never raises."""
    try:
        import torch.distributed as dist

        if dist.is_available() and not hasattr(dist.Backend, "TDCCL"):
            dist.Backend.register_backend("tdccl", _create, extended_api=True, devices=["cpu", "cuda"])
            _extend_rendezvous()
    except Exception as error:  # a broken plugin must not break `import torch` for everyone
        warnings.warn(f'tdccl: the torch backend "tdccl" is not available: {error!r}', stacklevel=2)


def _create(options, pg_options=None):
    from tdccl.process_group import ProcessGroup

    return ProcessGroup(options, pg_options)


def _extend_rendezvous() -> None:
    """Adds `init_method="mpi://"`, and lets torch's default, env://, take it where only mpirun started the ranks.

    Setting RANK and its kin here instead would change how other programs behave that merely import torch.
    """
    from torch.distributed.rendezvous import _rendezvous_handlers, register_rendezvous_handler

    register_rendezvous_handler("mpi", _mpi_rendezvous)
    by_environment = _rendezvous_handlers["env"]

    def by_environment_or_mpi(url, **options):
        given = "RANK" in os.environ or "rank=" in url
        under_mpirun = os.environ.keys() & {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE"}
        return (_mpi_rendezvous if under_mpirun and not given else by_environment)(url, **options)

    _rendezvous_handlers["env"] = by_environment_or_mpi


def _mpi_rendezvous(url, timeout=None, **_):
    """Rank 0 opens a store at a free port, and MPI tells the others where; yields (store, rank, size) as torch asks."""
    import socket

    import torch.distributed as dist
    from torch.distributed.constants import default_pg_timeout

    from tdccl.transport.bootstrap import discover

    timeout = timeout or default_pg_timeout
    mpi = discover(timeout=timeout.total_seconds())

    def open_store(host, port):
        return dist.TCPStore(host, port, is_master=mpi.rank == 0, timeout=timeout, wait_for_workers=False)

    store = open_store("localhost", 0) if mpi.rank == 0 else None
    calls = mpi.exchange((socket.gethostname(), store and store.port))
    host, port = calls[0]
    if store is None:
        store = open_store("localhost" if calls[mpi.rank][0] == host else host, port)
    mpi.barrier()  # rank 0 may end, and the store with it, only when all have found it
    yield store, mpi.rank, mpi.size
