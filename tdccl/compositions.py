"""Calls across nodes that have no kernel of their own, made of those that have.

They move more than they must: uneven pieces are padded to the largest, a root's part is given to all. An all_to_all of
uneven pieces has the ranks agree on the largest piece first, for which the host waits, so a CUDA graph cannot have it.
Tensors are flat or taken so; scratch comes from torch, on the stream of the call.
"""

import itertools

import torch

from tdccl.errors import ArgumentError


def run(comm, collective: str, source, target, op, root, splits, stream, timeout) -> None:
    """Makes a call of `Calls._run` that has no kernel across nodes; raises ArgumentError if it is none of these."""
    send, recv = source.view(-1), target.view(-1)

    def call(name, source, target, count, **arguments):
        comm._run(name, source, target, count, stream=stream, timeout=timeout, **arguments)

    with comm._on(stream):
        if collective == "reduce":
            _reduce(comm, call, send, recv, op, root)
        elif collective == "gather":
            _gather(comm, call, send, recv, root)
        elif collective == "scatter":
            _scatter(comm, call, send, recv, root)
        elif collective == "all_gather":
            _all_gather(call, send, recv, splits[1])
        elif collective == "all_to_all":
            _all_to_all(comm, call, send, recv, splits)
        else:
            raise ArgumentError(f"{collective}: not across nodes; use split() for the ranks of one")


def _reduce(comm, call, send, recv, op, root) -> None:
    call("all_reduce", send, recv if comm.rank == root else torch.empty_like(send), send.numel(), op=op)


def _gather(comm, call, send, recv, root) -> None:
    whole = recv if comm.rank == root else send.new_empty(comm.size * send.numel())
    call("all_gather", send, whole, send.numel())


def _scatter(comm, call, send, recv, root) -> None:
    count = recv.numel()
    whole = send if comm.rank == root else recv.new_empty(comm.size * count)
    call("broadcast", whole, whole, whole.numel(), root=root)
    recv.copy_(whole[comm.rank * count : (comm.rank + 1) * count])


def _all_gather(call, send, recv, counts) -> None:
    most = max(counts)
    if most == 0:
        return
    padded, whole = send.new_empty(most), send.new_empty(len(counts) * most)
    padded[: send.numel()].copy_(send)
    call("all_gather", padded, whole, most)
    _unpack(whole, recv, counts, most)


def _all_to_all(comm, call, send, recv, splits) -> None:
    largest = torch.tensor([max(itertools.chain(*splits))], device=send.device)
    call("all_reduce", largest, largest, 1, op="max")
    most = int(largest)
    comm.check()  # else a wait that failed would leave any number here
    if most == 0:
        return
    padded, whole = (send.new_empty(comm.size * most) for _ in range(2))
    offset = 0
    for rank, count in enumerate(splits[0]):
        padded[rank * most : rank * most + count].copy_(send[offset : offset + count])
        offset += count
    call("all_to_all", padded, whole, most)
    _unpack(whole, recv, splits[1], most)


def _unpack(whole, recv, counts, most: int) -> None:
    """Copies the first counts[i] elements of each piece of `most` elements to recv, one after another."""
    offset = 0
    for rank, count in enumerate(counts):
        recv[offset : offset + count].copy_(whole[rank * most : rank * most + count])
        offset += count
