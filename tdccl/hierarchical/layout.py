"""How calls across nodes are laid out over a grid, and in which type a node's sum travels."""

from tdccl.hierarchical import stages
from tdccl.runtime.algorithm import ITEMSIZE, Call, Context, Geometry, copying

# Where the sum of a node may be out of the type's range, though the average of all is not.
_WIDER = {("avg", "fp16"): "fp32", ("avg", "i8"): "i32", ("avg", "u8"): "i32"}


def wire_of(call: Call) -> str:
    """The type in which a node's sum goes to another."""
    return _WIDER.get((call.op, call.dtype), call.dtype)


def part_of(call: Call, context: Context) -> int:
    """Bytes of each rank's part of a message, a multiple of 16; the last may be shorter, or empty."""
    return -(-call.nbytes // (16 * context.nodes * context.size)) * 16


def in_parts(call: Call, context: Context, part: int, rings: int, wire: str | None = None, tiles: int = 1) -> Geometry:
    """Lays one part of `part` bytes for each rank out in tiles that pass through `rings` rings inside, and across in
    slots that hold `tiles` of them in the type `wire`."""
    inside = context.ring_bytes // (max(1, rings) * stages.DEPTH.value)
    across = context.rail_slot // tiles
    if wire is not None:
        across = across * call.itemsize // ITEMSIZE[wire]
    geometry = copying(call, context, part_bytes=part, room=min(context.rules.tile, inside, across))
    return geometry.adding(constants={"WIRE": wire})


def in_chunks(call: Call, context: Context, rings: int, wire: str | None = None, tiles: int = 1) -> Geometry:
    """`in_parts` for a chunk for each rank: the part is the chunk, and the message all of them."""
    geometry = in_parts(call, context, call.nbytes, rings, wire, tiles)
    return geometry.adding(counts={"count": geometry.counts["part"] * context.nodes * context.size})
