"""NVLink multicast: whether these ranks have it, and symmetric memory on GPUs that has a multicast address.

The memory is torch's symmetric memory. Nothing of it is imported, and no multicast object made, unless
`environment.multicast_forbidden_by` finds nothing that forbids it.
"""

import contextlib
import itertools
from typing import NamedTuple

import torch

from tdccl.environment import emulated, multicast_forbidden_by, multimem_by_unicast
from tdccl.errors import InitError, TdcclError
from tdccl.runtime.streams import aside
from tdccl.transport.bootstrap import Bootstrap
from tdccl.transport.symmetric_memory import SymmetricMemory, free_kept, keep, together

_BY_UNICAST = "TDCCL_NVLS=unicast"
_carriers = itertools.count(1)


class Multicast(NamedTuple):
    """How multimem reaches all ranks: "switch", "unicast" (see `tdccl.language.multimem`) or None, and why."""

    kind: str | None
    reason: str


def multicast_between(bootstrap: Bootstrap, device: torch.device, ranks_of_a_gpu: int) -> Multicast:
    """What all these ranks, so many on one GPU, have in common; collective. It looks, and makes no multicast object.

    Raises InitError, on all ranks, where TDCCL_NVLS is none of its values on one.
    """
    reasons = together(bootstrap, lambda: _missing(bootstrap, device))
    reason = next(filter(None, reasons), None)
    if reason == _BY_UNICAST and len({*reasons}) == 1:
        return Multicast("unicast", reason)
    if reason is None and ranks_of_a_gpu > 1:
        reason = "two ranks share a GPU"
    if reason is not None:
        return Multicast(None, reason)
    return Multicast("switch", "emulated" if emulated() else "the GPUs and their switch have it")


def _missing(bootstrap: Bootstrap, device: torch.device) -> str | None:
    """Why this rank cannot take part in multicast, or None."""
    if multimem_by_unicast():
        return _BY_UNICAST
    if emulated():
        return None
    if bootstrap.size == 1:
        return "there is one rank only"
    if variable := multicast_forbidden_by():
        return f"{variable} forbids it"
    return None if supported(device) else f"{torch.cuda.get_device_name(device)} has none here"


def supported(device: torch.device) -> bool:
    """Whether the driver says that this GPU can take part in multicast."""
    from cuda.bindings import driver

    driver.cuInit(0)
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED
    status, value = driver.cuDeviceGetAttribute(attribute, device.index)
    return status == driver.CUresult.CUDA_SUCCESS and bool(value)


def allocate(bootstrap: Bootstrap, nbytes: int, device: torch.device) -> SymmetricMemory:
    """Allocates `nbytes` zeroed bytes on every rank's GPU; collective over the bootstrap's ranks.

    Its `multicast` is 0, on all ranks alike, where the driver refuses one of them a multicast object. Raises InitError,
    on all ranks, where multicast is forbidden to one by now, memory is short, or a peer's cannot be reached.
    """
    free_kept()
    local: torch.Tensor | None = None
    shared: SymmetricMemory | None = None
    held = []  # torch's handle

    def obtain() -> None:
        nonlocal local
        if variable := multicast_forbidden_by():
            raise InitError(f"{variable} forbids NVLink multicast, and memory with a multicast address was asked for")
        from torch.distributed import _symmetric_memory as torch_symmetric

        with torch.cuda.device(device), _explained(nbytes):
            local = torch_symmetric.empty(nbytes, dtype=torch.uint8, device=device)
            with aside(device):
                local.zero_()

    def meet() -> bool:
        """Whether this rank has a multicast address. Wherever this fails, the other ranks are next in an exchange of
        `together`."""
        nonlocal shared
        with torch.cuda.device(device), _explained(nbytes):
            handle = _rendezvous(bootstrap, local)
            held.append(handle)
            addresses = [address + handle.offset for address in handle.buffer_ptrs]
            shared = SymmetricMemory(local, addresses, release, handle.multicast_ptr)
            return shared.multicast != 0

    def release(bootstrap, peers_gone):
        try:
            if bootstrap is not None:
                bootstrap.barrier()  # no peer may be using it any more
                held.clear()
                return
        except TdcclError:
            pass
        keep((local, *held), lambda: peers_gone() and _works(device))
        held.clear()

    together(bootstrap, obtain)
    try:
        if not all(together(bootstrap, meet)):
            shared.multicast = 0  # nobody looks for it in the table then
    except _Told as told:
        raise told.__cause__ from None
    return shared


def _works(device: torch.device) -> bool:
    """Whether the GPU still does what it is told. Where it does not, torch ends a process that frees such memory."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


class _Told(TdcclError):
    """Its cause ended an exchange of torch's rendezvous, so that all ranks know of it."""


@contextlib.contextmanager
def _explained(nbytes: int):
    """Raises InitError for what torch or the driver refuses."""
    try:
        yield
    except TdcclError:  # a peer has died, say
        raise
    except RuntimeError as error:
        raise InitError(f"no symmetric memory of {nbytes} bytes a rank with a multicast address: {error}") from error


def _rendezvous(bootstrap: Bootstrap, local: torch.Tensor):
    """torch's handle on all ranks' memory. It wants a group of torch's by name: one that can do nothing else."""
    import torch.distributed as dist
    from torch._C import _distributed_c10d as c10d
    from torch.distributed import _symmetric_memory as torch_symmetric

    name = f"tdccl-multicast-{next(_carriers)}"
    store = rounds_store(bootstrap)  # named, because C++ does not keep what is Python's of it
    carrier = dist.ProcessGroup(store, bootstrap.rank, bootstrap.size)
    nothing = c10d.FakeProcessGroup._create_internal(bootstrap.rank, bootstrap.size)
    carrier._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, nothing)
    carrier._set_group_name(name)
    c10d._register_process_group(name, carrier)
    try:
        return torch_symmetric.rendezvous(local, name)
    except RuntimeError:
        if store.ended is not None:  # C++ may have worded it anew
            raise _Told from store.ended
        raise
    finally:
        c10d._unregister_process_group(name)


def rounds_store(bootstrap: Bootstrap):
    """A Store for torch's rendezvous, which goes round after round: each rank sets its value, then gets the others'.

    torch numbers the rounds by all that the process has seen, in any group, and waits for ever where the ranks' numbers
    differ. Here a round is one exchange of the bootstrap, whatever its number: of `together`, whose error is `ended`.
    """
    import torch.distributed as dist

    class Rounds(dist.Store):
        ended: TdcclError | None = None

        def set(self, key, value):
            try:
                self._values = together(bootstrap, lambda: bytes(value))
            except TdcclError as error:
                self.ended = error
                raise

        def get(self, key):
            return self._values[int(key.rpartition("/")[2])]

        def wait(self, keys, timeout=None):
            """The exchange has waited."""

    return Rounds()
