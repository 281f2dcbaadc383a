"""What this host offers, and which algorithm each collective would take: `python -m tdccl.info`. Needs no GPU.

Started by torchrun or mpirun, it also tells on which nodes the ranks are, which have other versions installed, and what
they take across nodes.
"""

import argparse
import importlib.metadata
import os
import platform
import sys

if __name__ == "__main__" and any(word.startswith("--gpu") for word in sys.argv):
    os.environ["TDCCL_EMULATE"] = "0"  # what GPUs take is asked for

import torch

import tdccl
from tdccl import environment, transport, tuning
from tdccl.decisions import ACROSS_NODES, ALGORITHMS, context_for, table_across, table_for
from tdccl.errors import InitError
from tdccl.runtime.algorithm import Call, Context
from tdccl.runtime.plan import choose
from tdccl.transport import nvshmem
from tdccl.transport.bootstrap import discover, launched

_SHOWN = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "reduce")
_SHOWN_ACROSS = _SHOWN[:-1]
_SIZES = [1 << power for power in range(10, 31, 2)]


def versions() -> dict[str, str]:
    """What is installed, by name; "-" for what is not."""
    found = {"tdccl": tdccl.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found["CUDA of torch"] = torch.version.cuda or "-"
    for package in (
        "triton",
        "cuda-bindings",
        "mpi4py",
        "nvshmem4py-cu13",
        "nvidia-nvshmem-cu13",
        "nvshmem4py-cu12",
        "nvidia-nvshmem-cu12",
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "-"
    return found


def gpus() -> list[str]:
    """A line a GPU."""
    if not torch.cuda.is_available():
        return []
    listed = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
        f"{gpu.total_memory / 2**30:.0f} GiB"
        for gpu in listed
    ]


def links() -> list[str]:
    """For each GPU its active NVLinks, as the driver's library tells; a reason where it does not."""
    try:
        return [f"{len(speeds)} NVLinks" + (f" of generation {max(speeds)}" if speeds else "") for speeds in _nvlinks()]
    except (ImportError, RuntimeError, OSError) as error:
        return [f"unknown ({error})"] * torch.cuda.device_count()


def _nvlinks() -> list[list[int]]:
    """The generations of each GPU's active NVLinks."""
    import pynvml

    try:
        pynvml.nvmlInit()
        found = []
        for index in range(torch.cuda.device_count()):
            uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            found.append([])
            for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
                try:
                    if pynvml.nvmlDeviceGetNvLinkState(handle, link):
                        found[-1].append(pynvml.nvmlDeviceGetNvLinkVersion(handle, link))
                except pynvml.NVMLError:
                    break  # this GPU has no more
        return found
    except pynvml.NVMLError as error:
        raise RuntimeError(str(error)) from error


def reach() -> list[list[bool]]:
    """Whether GPU row can address the memory of GPU column."""
    indices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [[row == column or torch.cuda.can_device_access_peer(row, column) for column in indices] for row in indices]


def multicast() -> str:
    """Available, forbidden by which variable, emulated, or not supported. Makes no multicast object."""
    if environment.emulated():
        return "emulated"
    if variable := environment.multicast_forbidden_by():
        return f"forbidden by {variable}"
    if environment.multimem_by_unicast():
        return "not used, by TDCCL_NVLS=unicast"
    if not torch.cuda.is_available():
        return "not supported: no GPU"
    missing = [index for index in range(torch.cuda.device_count()) if not _supported(index)]
    return f"not supported by GPUs {', '.join(map(str, missing))}" if missing else "available"


def network() -> str:
    """Whether kernels could go to other nodes: NVSHMEM's bitcode, its emulation, or what is missing."""
    if environment.emulated():
        return "emulated"
    try:
        arch = "{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "90"
        return f"bitcode for sm_{arch}: {nvshmem.device_library(int(arch))}"
    except InitError as error:
        return str(error)


def everyone() -> tuple[transport.Topology | None, list[dict[str, str]]]:
    """(on which nodes the ranks of the launcher are, None without one; what each has installed). Collective."""
    installed = versions() | {"NVSHMEM": network()}
    if not launched():
        return None, [installed]
    bootstrap = discover(timeout=60)
    places, installed = zip(*bootstrap.exchange((transport.place_of(bootstrap), installed)))
    return transport.topology_of(bootstrap.rank, [*places]), [*installed]


def others(installed: list[dict[str, str]]) -> list[str]:
    """A line for what some ranks have installed that rank 0 has not."""
    ranks: dict[str, list[int]] = {}
    for rank, theirs in enumerate(installed):
        if different := [f"{name} {said}" for name, said in theirs.items() if said != installed[0][name]]:
            ranks.setdefault("  ".join(different), []).append(rank)
    return [f"otherwise on ranks {', '.join(map(str, members))}: {said}" for said, members in ranks.items()]


def _supported(index: int) -> bool:
    return transport.multicast.supported(torch.device("cuda", index))


def choices(gpu: str, ranks: int, kind: str | None) -> tuple[str, list[list[str]]]:
    """(what the tuning table says of itself, for each size a row of algorithms): bf16 sums, aligned.

    A cell is one algorithm, or two where symmetric memory takes another than plain.
    """
    table = table_for(gpu, ranks, kind == "switch")
    context = context_for(ranks)._replace(multicast=transport.Multicast(kind, ""))
    return table.source, [
        [_size(nbytes), *(_choice(ALGORITHMS, collective, nbytes, context, table) for collective in _SHOWN)]
        for nbytes in _SIZES
    ]


def choices_across(nodes: int, width: int) -> list[list[str]]:
    """The same for ranks on several nodes, so many on each."""
    context, table = context_for(width, nodes=nodes), table_across()
    return [
        [_size(nbytes), *(_choice(ACROSS_NODES, name, nbytes, context, table) for name in _SHOWN_ACROSS)]
        for nbytes in _SIZES
    ]


def _choice(algorithms: dict, collective: str, nbytes: int, context: Context, table: tuning.Table) -> str:
    dtype, itemsize, op = ("bf16", 2, "sum") if "reduce" in collective else ("u8", 1, None)
    found = []
    for segment in (None, "symmetric"):
        call = Call(collective, nbytes // itemsize, dtype, op, 0, 16, None, (segment, segment), False)
        found.append(choose(algorithms[collective], call, context, table).algorithm.name)
    return " / ".join(dict.fromkeys(found))


def _size(nbytes: int) -> str:
    unit = max(power for power in (10, 20, 30) if nbytes >= 1 << power)
    return f"{nbytes >> unit} {({10: 'KiB', 20: 'MiB', 30: 'GiB'})[unit]}"


def _table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Prints columns as wide as what is in them."""
    columns = [max(map(len, column)) for column in zip(header, *rows)]
    print(f"\n{title}")
    for row in (header, *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, columns)).rstrip())


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tdccl.info", description=__doc__.partition(":")[0])
    parser.add_argument("--ranks", type=int, choices=range(2, 9), metavar="N", help="default: the GPUs, or 4")
    parser.add_argument("--gpu", help="show what this kind of GPU would take, as 'NVIDIA H200'")
    parser.add_argument("--multicast", action="store_true", help="show what it would take with NVLink multicast")
    options = parser.parse_args(words)
    lying, installed = everyone()
    if lying is not None and lying.rank != 0:
        return
    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    found = gpus()
    for index, (gpu, nvlinks) in enumerate(zip(found, links())):
        print(f"GPU {index}: {gpu}, {nvlinks}")
    if not found:
        print("no GPU: kernels run in Triton's interpreter")
    if len(found) > 1:
        marks = [[str(row), *("yes" if cell else "no" for cell in cells)] for row, cells in enumerate(reach())]
        _table("Which GPU (row) reaches the memory of which", ["", *map(str, range(len(found)))], marks)
    print(f"NVLink multicast: {multicast()}")
    print(f"NVSHMEM: {network()}", *others(installed), sep="\n")
    for place, members in zip(lying.hosts, lying.nodes) if lying is not None else ():
        print(f"node {place}: ranks {members[0]} to {members[-1]}")
    if lying is not None and len(lying.nodes) > 1:
        title = f"{len(lying.nodes)} nodes of {lying.width} ranks, bf16: not measured"
        _table(title, ["bytes a chunk", *_SHOWN_ACROSS], choices_across(len(lying.nodes), lying.width))
        return
    ranks = options.ranks or (max(2, len(found)) if found else 4)
    gpu = options.gpu or (torch.cuda.get_device_name(0) if found and not environment.emulated() else tuning.EMULATED)
    kind = "switch" if options.multicast or (options.gpu is None and multicast() in ("available", "emulated")) else None
    source, rows = choices(gpu, ranks, kind)
    _table(f"{ranks} ranks, bf16 (plain / symmetric memory): {source}", ["bytes a chunk", *_SHOWN], rows)
    print(f"\ntiles of products: {tuning.products_for(gpu).source}")


if __name__ == "__main__":
    main(sys.argv[1:])
