"""What calls multimem can do, and how they are laid out over a grid: in quads, 16 bytes each."""

from tdccl.runtime.algorithm import ITEMSIZE, Call, Context, Geometry, copying, tiles_in

_QUAD = 16
_MOST = 16 << 30  # bytes whose quads, and the steps over them, kernels count in 32 bits
_BITWISE = ("and", "or", "xor")
# No avg of fp16, whose sum may be out of range where the average is not; no min and max of floats, where the switch
# may lose a NaN.
_OPS = {
    "fp64": ("sum", "avg"),
    "fp32": ("sum", "avg"),
    "bf16": ("sum", "avg"),
    "fp16": ("sum",),
    "i64": ("sum", "avg", "min", "max", *_BITWISE),
    "i32": ("sum", "avg", "min", "max", *_BITWISE),
    "i8": _BITWISE,
    "u8": _BITWISE,
}


def any_call(call: Call) -> str | None:
    """Why kernels that only move data cannot take the call, None if they can."""
    return None if call.nbytes <= _MOST else f"more than {_MOST >> 30} GiB"


def reduction(call: Call) -> str | None:
    """Why the switch cannot reduce the call, None if it can."""
    if call.op not in _OPS.get(call.dtype, ()):
        return f"the switch does not reduce {call.dtype} by {call.op}"
    return any_call(call)


def whole_quads(call: Call) -> str | None:
    """Why a chunk cannot lie next to another in multicast memory, None if it can."""
    return any_call(call) if call.nbytes % _QUAD == 0 else "chunks are not multiples of 16 bytes"


def reduction_of_quads(call: Call) -> str | None:
    """`reduction` and `whole_quads`."""
    return reduction(call) or whole_quads(call)


def direct(call: Call, context: Context, parts: int = 1) -> Geometry:
    """Lays whole quads of a message out for a kernel without scratch: over all of it, or over one of `parts` parts."""
    quads = call.nbytes // _QUAD
    part = -(-quads // parts)
    geometry = copying(call, context, part_bytes=max(1, part) * _QUAD)
    return _in_quads(geometry, context).adding(scalars={"quads": quads, "part": part})


def staged(call: Call, context: Context, rings: int, depth: int, parts: int = 1) -> Geometry:
    """Lays a message, or one of `parts` parts of it, out in spans of quads that pass through rings in scratch."""
    part = -(-call.nbytes // (_QUAD * parts))
    geometry = tiles_in(call, context, rings, depth, part_bytes=part * _QUAD)
    return _in_quads(geometry, context).adding(scalars={"quads": part})


def _in_quads(geometry: Geometry, context: Context) -> Geometry:
    """The same with tiles in quads, WIDE for 16-byte accesses to users' memory, and how multimem is done."""
    tile = geometry.constants["TILE"] * ITEMSIZE[geometry.dtype] // _QUAD
    constants = {"TILE": tile, "WIDE": geometry.aligned, "MULTIMEM": context.multicast.kind}
    return geometry.adding(constants=constants)
