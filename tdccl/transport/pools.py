"""What torch's memory pools (`torch.cuda.MemPool`) hold, in an order that all ranks share."""

import itertools
from typing import NamedTuple

import torch

from tdccl.errors import ArgumentError, TdcclError


class Segment(NamedTuple):
    """One cudaMalloc of a pool."""

    address: int
    layout: "Layout"


class Layout(NamedTuple):
    """What must be the same on all ranks about a segment.

    nbytes      its size
    kind        small or large: blocks of one kind compete for a tensor
    place       how many segments of its kind lie at lower addresses
    tensors     (offset, bytes) of each live tensor
    exportable  whether CUDA IPC can share it
    """

    nbytes: int
    kind: str
    place: int
    tensors: tuple[tuple[int, int], ...]
    exportable: bool


def segments_of(pool: torch.cuda.MemPool, device: torch.device) -> list[Segment]:
    """The pool's segments on `device`, in the order in which they were allocated."""
    found = [segment for segment in pool.snapshot() if segment["device"] == device.index]
    found.sort(key=lambda segment: _attribute("BUFFER_ID", segment["address"]))  # counts allocations of this process
    return [Segment(segment["address"], _layout(segment, found)) for segment in found]


def _layout(segment: dict, everyone: list[dict]) -> Layout:
    address, kind = segment["address"], segment["segment_type"]
    return Layout(
        nbytes=segment["total_size"],
        kind=kind,
        place=sum(other["address"] < address for other in everyone if other["segment_type"] == kind),
        tensors=tuple(
            (block["address"] - address, block["requested_size"])
            for block in segment["blocks"]
            if block["state"] == "active_allocated"
        ),
        exportable=bool(_attribute("IS_LEGACY_CUDA_IPC_CAPABLE", address)),
    )


def _attribute(name: str, address: int) -> int:
    """What the driver knows of the allocation at an address."""
    from cuda.bindings import driver

    attribute = getattr(driver.CUpointer_attribute, f"CU_POINTER_ATTRIBUTE_{name}")
    status, value = driver.cuPointerGetAttribute(attribute, address)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise TdcclError(f"cuPointerGetAttribute({name}) of {address:#x}: {status.name}")
    return value


def check_alike(everyone: list[list[Layout]]) -> None:
    """Raises ArgumentError, on all ranks alike, unless a tensor of the pool lies at the same place on every rank.

    everyone: each rank's layouts. Their places matter because torch, among free blocks of one size, may take that of
    the lowest address: only where the segments' addresses are ordered alike does the next tensor go to the same one.
    """
    if not all(layout.exportable for layouts in everyone for layout in layouts):
        raise ArgumentError(
            "register: CUDA IPC cannot share this pool's memory: expandable segments "
            "(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True), or an allocator other than cudaMalloc. Switch that "
            "off for the pool, or make the tensors under tdccl.symmetric()"
        )
    columns = list(itertools.zip_longest(*everyone))
    for number, column in enumerate(columns):
        if len({layout and layout._replace(place=0) for layout in column}) > 1:
            raise ArgumentError(
                f"register: the pool differs between ranks, first in segment {number} ({_words(column)}); nothing is "
                "registered. All ranks must make and free tensors of the same sizes in it, in the same order"
            )
    for number, column in enumerate(columns):
        if len(set(column)) > 1:
            raise ArgumentError(
                f"register: the pool's segments lie in another order on other ranks ({_words(column)}, for segment "
                f"{number}); nothing is registered, because torch would put tensors in different ones. Make them under "
                "tdccl.symmetric(), which puts tensors at the same place on every rank"
            )


def _words(column: tuple[Layout | None, ...]) -> str:
    return "; ".join(f"rank {rank} has {_describe(layout)}" for rank, layout in enumerate(column))


def _describe(layout: Layout | None) -> str:
    if layout is None:
        return "none"
    tensors = [f"{nbytes} at {offset}" for offset, nbytes in layout.tensors]
    if len(tensors) > 8:
        tensors[8:] = [f"and {len(tensors) - 8} more"]
    return f"{layout.nbytes} bytes, {layout.kind}, {layout.place} below it, tensors {', '.join(tensors) or 'none'}"
