"""A call across nodes that has no kernel of its own, made of one that has."""

import torch


def reduce(comm, source, target, op, root, stream, timeout) -> None:
    """A reduce of `Calls._run` by an all_reduce: every rank gets what only the root keeps."""
    with comm._on(stream):
        recv = target if comm.rank == root else torch.empty_like(source)
        comm._run("all_reduce", source, recv, source.numel(), op=op, stream=stream, timeout=timeout)
