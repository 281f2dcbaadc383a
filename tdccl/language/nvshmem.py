"""NVSHMEM's device calls for stock Triton: how a kernel reaches the ranks of other nodes.

    import tdccl.language.nvshmem as nvshmem

On a GPU each is a call into NVSHMEM's bitcode, which is linked to kernels that have a `Rail`; in emulation into
`tdccl.transport.network`. Addresses are this rank's own: destinations and signals lie in memory that NVSHMEM allocated,
at the same place on every PE, and so do sources that a network card is to read. PEs are NVSHMEM's numbers for processes
(`Rail.pes`).

What moves data is called by the whole block, once: a Triton program cannot call for one of its warps or threads alone.
So a signal without data is a `put_signal_nbi` of 8 bytes, which one thread signals; `signal_op`, which therefore cannot
add, `fence` and `quiet` are calls of every thread, as are `my_pe` and `n_pes`.

There is no call here that waits for other PEs: NVSHMEM's have no end, and its barriers ask for a cooperative launch.
`tdccl.language.signal_wait` on this rank's own signal sees what came before it just as well, and
`tdccl.language.rails.barrier` has a deadline.
"""

import triton.language as tl

from tdccl.language.signals import fence as block_fence
from tdccl.language.target import device
from tdccl.transport import network

# What a put does to the signal: makes it the value, or adds the value to it.
SET, ADD = tl.constexpr(network.SET), tl.constexpr(network.ADD)


def _emulated(call):
    """The Python function that takes the place of a device function: `call` with plain integers."""

    def number(value):
        return int(value.handle.data.reshape(-1)[0] if hasattr(value, "handle") else getattr(value, "value", value))

    return lambda *values: call(*map(number, values))


@tl.core.extern
def _call(name, *arguments, _semantic=None):
    """Calls `name` of the bitcode with integers, for an int32: what is made of nothing where it returns nothing."""
    name = getattr(name, "value", name)
    types = tuple(argument.dtype for argument in arguments)
    signatures = {types: (name, tl.core.int32)}
    return tl.core.extern_elementwise("", "", list(arguments), signatures, is_pure=False, _semantic=_semantic)


@device(_emulated(network.put))
def put(destination, source, nbytes, pe):
    """Writes `nbytes` (int64) bytes from `source` to `destination` of a PE; the source may be changed at once.

    Ordering: none; `fence`, or `quiet`, before a signal that tells of it. Block barriers before and after.
    """
    _call("nvshmemx_putmem_block", destination.to(tl.int64), source.to(tl.int64), nbytes, pe)


@device(_emulated(network.put_nbi))
def put_nbi(destination, source, nbytes, pe):
    """`put`, but the source must stay as it is until `quiet`, or until the PE tells that it has come.

    Ordering: as `put`.
    """
    _call("nvshmemx_putmem_nbi_block", destination.to(tl.int64), source.to(tl.int64), nbytes, pe)


@device(_emulated(network.get))
def get(destination, source, nbytes, pe):
    """Reads `nbytes` (int64) bytes from `source` of a PE; they are there when it returns. Ordering: block barriers."""
    _call("nvshmemx_getmem_block", destination.to(tl.int64), source.to(tl.int64), nbytes, pe)


@device(_emulated(network.put_signal))
def put_signal(destination, source, nbytes, signal, value, pe, OP: tl.constexpr = SET):
    """`put`, and then `value` (int64) becomes the PE's signal, or is added to it (OP=ADD).

    Ordering: as `put_signal_nbi`. Block barriers before and after.
    """
    address, data, word = destination.to(tl.int64), source.to(tl.int64), signal.to(tl.int64)
    _call("nvshmemx_putmem_signal_block", address, data, nbytes, word, value, tl.full([], OP, tl.int32), pe)


@device(_emulated(lambda *numbers: network.put_signal_nbi(*numbers)))
def put_signal_nbi(destination, source, nbytes, signal, value, pe, OP: tl.constexpr = SET):
    """`put_nbi`, and then `value` (int64) becomes the PE's signal, or is added to it (OP=ADD).

    Ordering: who sees the signal sees these bytes; nothing else, not even what was put before.
    """
    address, data, word = destination.to(tl.int64), source.to(tl.int64), signal.to(tl.int64)
    _call("nvshmemx_putmem_signal_nbi_block", address, data, nbytes, word, value, tl.full([], OP, tl.int32), pe)


@device(_emulated(network.signal_op))
def signal_op(signal, value, pe):
    """The PE's signal becomes `value` (int64). Ordering: none; `fence` before it covers what was put."""
    _call("nvshmemx_signal_op", signal.to(tl.int64), value, tl.full([], SET, tl.int32), pe)


@device(_emulated(network.fence))
def fence():
    """What the block puts and signals to a PE from now on arrives after what it put and signalled there before.

    Ordering: a block barrier, then that.
    """
    block_fence()
    _call("nvshmem_fence")


@device(_emulated(network.quiet))
def quiet():
    """Returns when all that the block put has arrived. Ordering: a block barrier before and after."""
    block_fence()
    _call("nvshmem_quiet")
    block_fence()


@device(_emulated(network.my_pe))
def my_pe():
    """This process's PE. Ordering: none."""
    return _call("nvshmem_my_pe")


@device(_emulated(network.n_pes))
def n_pes():
    """How many PEs there are. Ordering: none."""
    return _call("nvshmem_n_pes")
