"""What this process runs on, and every environment variable that tdccl reads, in one place."""

import functools
import os

from tdccl.errors import InitError


@functools.cache
def emulated() -> bool:
    """True when the kernels run in Triton's interpreter on CPU tensors.

    `TDCCL_EMULATE=1` asks for it, `TDCCL_EMULATE=0` forbids it (kernels can then be compiled without
    a GPU, but not run); otherwise it is so exactly when there is no GPU.
    """
    asked = os.environ.get("TDCCL_EMULATE")
    if asked:
        return asked != "0"
    import torch

    return not torch.cuda.is_available()


# Each forbids NVLink multicast by this value, and by any other that does not plainly permit it: libraries read 00, 0x0
# and off in ways of their own.
_FORBIDDING = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TDCCL_NVLS": "0",
}
_YES, _NO = ("1", "2", "unicast", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f")


def multicast_forbidden_by() -> str | None:
    """The variable, as NAME=value, by which NVLink multicast is forbidden here, or None: the one place that decides.

    Some hosts share their switch with others, whom a multicast object takes out of service: there is no override.
    """
    for name, forbidding in _FORBIDDING.items():
        given = os.environ.get(name)
        if given and given.strip().lower() not in (_YES if forbidding == "0" else _NO):
            return f"{name}={given}"
    return None


def forbid_multicast_to_others(for_a_peer: bool = False) -> None:
    """Where multicast is forbidden by any of the variables, here or for a peer with whom a library would make it, sets
    them all but ours, for libraries that know but one."""
    if for_a_peer or multicast_forbidden_by():
        os.environ.update({name: value for name, value in _FORBIDDING.items() if name != "TDCCL_NVLS"})


def multimem_by_unicast() -> bool:
    """`TDCCL_NVLS=unicast`: NVLS algorithms with loads from and stores to all ranks in place of multimem, to test them
    on GPUs without multicast. Raises InitError for a value that is none of 0, 1 and unicast."""
    given = os.environ.get("TDCCL_NVLS") or "1"
    if given not in ("0", "1", "unicast"):
        raise InitError(f"TDCCL_NVLS is {given!r}, expected 0 (no NVLink multicast), 1 (where there is), or unicast")
    return given == "unicast"


def scratch_bytes() -> int:
    """Scratch of one communicator: 64 MiB a GPU, 4 MiB a rank in emulation, or `TDCCL_SCRATCH_MB`."""
    given = os.environ.get("TDCCL_SCRATCH_MB", "4" if emulated() else "64")
    if not given.isdigit() or not 0 < int(given) <= 1 << 20:
        raise InitError(f"TDCCL_SCRATCH_MB is {given!r}, expected a whole number of MiB")
    return int(given) << 20


def subgroup_scratch_bytes() -> int:
    """Scratch of a process group that is not torch's default one: a quarter, for programs make them by the dozen."""
    return max(scratch_bytes() // 4, min(scratch_bytes(), 16 << 20))


def node_size() -> int | None:
    """`TDCCL_NODE_SIZE=k`: draws a node boundary after every k ranks, also inside a host, to try what goes across."""
    given = os.environ.get("TDCCL_NODE_SIZE")
    if given is None:
        return None
    if not given.isdigit() or int(given) < 1:
        raise InitError(f"TDCCL_NODE_SIZE is {given!r}, expected a whole number of ranks")
    return int(given)


def nvshmem_bytes() -> int:
    """What a process takes from NVSHMEM for all its communicators: 512 MiB, or `TDCCL_NVSHMEM_MB`."""
    given = os.environ.get("TDCCL_NVSHMEM_MB", "512")
    if not given.isdigit() or not 0 < int(given) <= 1 << 20:
        raise InitError(f"TDCCL_NVSHMEM_MB is {given!r}, expected a whole number of MiB")
    return int(given) << 20


def network_seed() -> int:
    """`TDCCL_NETWORK_SEED`: from which the emulated network draws what arrives late and in another order."""
    given = os.environ.get("TDCCL_NETWORK_SEED", "0")
    if not given.isdigit():
        raise InitError(f"TDCCL_NETWORK_SEED is {given!r}, expected a whole number")
    return int(given)


def rendezvous_address() -> str | None:
    """`TDCCL_INIT=tcp://host:port`: where the ranks meet, whatever launcher started them."""
    return os.environ.get("TDCCL_INIT")


def forced_algorithms() -> dict[str, str]:
    """`TDCCL_ALGO=all_reduce:two_shot_staged,broadcast:push_ll` as {collective: algorithm}."""
    forced = {}
    for pair in filter(None, os.environ.get("TDCCL_ALGO", "").split(",")):
        collective, _, name = pair.partition(":")
        forced[collective.strip()] = name.strip()
    return forced


def tuning_tables() -> list[str]:
    """`TDCCL_TUNING=path[:path]`: tuning tables that count before those of the package."""
    return list(filter(None, os.environ.get("TDCCL_TUNING", "").split(os.pathsep)))


def most_blocks() -> int | None:
    """`TDCCL_MAX_BLOCKS`: the largest grid of tdccl's kernels, for communicators that are given none."""
    given = os.environ.get("TDCCL_MAX_BLOCKS")
    if given is None:
        return None
    if not given.isdigit() or int(given) < 1:
        raise InitError(f"TDCCL_MAX_BLOCKS is {given!r}, expected a whole number of blocks")
    return int(given)


def debug() -> bool:
    """`TDCCL_DEBUG=1`, or torch's `TORCH_DISTRIBUTED_DEBUG=DETAIL`: ranks compare their calls before each launch."""
    asked = os.environ.get("TDCCL_DEBUG", "0") not in ("", "0")
    return asked or os.environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL"


def trace_folder() -> str | None:
    """`TDCCL_TRACE_DIR`: where a rank writes the last calls when a wait has failed."""
    return os.environ.get("TDCCL_TRACE_DIR")


def default_pack() -> str:
    """Where `python -m tdccl.aot build` writes its pack and every process looks for it: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "tdccl", "kernels.zip")


def packs() -> list[str]:
    """`TDCCL_AOT=path:path`: packs of kernels compiled ahead of time; empty for none. Otherwise the default one, if
    there is one."""
    given = os.environ.get("TDCCL_AOT")
    if given is not None:
        return [path for path in given.split(os.pathsep) if path]
    return [default_pack()] if os.path.exists(default_pack()) else []
