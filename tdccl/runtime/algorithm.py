"""What an algorithm is: a kernel, when it may run, and how a call is laid out over its grid."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tdccl.errors import ArgumentError
from tdccl.runtime import bare
from tdccl.transport import Multicast
from tdccl.tuning import Rules

_layout = bare.read("tdccl.language.team")


class Call(NamedTuple):
    """Everything a plan depends on; all ranks agree on it but for `alignment`, `splits` and `timeout`.

    count      elements: of the whole message for all_reduce and broadcast, else of one rank's chunk
    dtype      Triton's name of the element type; pure data movement counts bytes, as "u8"
    alignment  the largest power of two, at most 16, that divides every address of the call
    splits     all_to_all only: (send counts, recv counts) of all ranks, or None for equal chunks
    segments   {"send": segment or None, "recv": ...} as a pair: where symmetric memory is involved
    in_place   send and recv overlap
    on_device  all_to_all_vdev only: addresses of the split lists, bytes of a row, of send and of recv
    timeout    seconds that each wait of it may last; None: as long as the communicator's
    multicast_alignment  the largest power of two, at most 16, that divides every symmetric address of the call; 0 where
                         one lies in memory that multimem does not reach
    """

    collective: str
    count: int
    dtype: str
    op: str | None
    root: int
    alignment: int
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None
    segments: tuple[Any, Any]
    in_place: bool
    on_device: tuple[int, int, int, int, int] | None = None
    timeout: float | None = None
    multicast_alignment: int = 16

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.count * self.itemsize

    @property
    def symmetric(self) -> set[str]:
        return {name for name, segment in zip(("send", "recv"), self.segments) if segment is not None}


ITEMSIZE = {
    "fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1,
}  # fmt: skip
_UNITS = {16: "i64", 8: "i64", 4: "i32", 2: "i16", 1: "i8"}
# The most ranks of which four lists of 8 bytes a rank fit into a kernel's parameters, 32764 bytes in CUDA.
_MOST_LISTED = 1000


class Context(NamedTuple):
    """What an algorithm knows of the communicator: of this rank's node, and of how many others there are.

    size          ranks of the node
    ring_bytes    what a block that has rings has of them, for each parity
    nodes         number of nodes
    rail_slot     bytes of a slot in a lane to another node
    pair_slot     bytes of a slot in a lane to another rank, where there are several nodes; a power of two
    """

    size: int
    ring_bytes: int
    rules: Rules
    multicast: Multicast = Multicast(None, "nobody asked for it")
    nodes: int = 1
    rail_slot: int = 0
    pair_slot: int = 0


def context_of(size: int, scratch: int, rules: Rules) -> Context:
    """The context of a communicator of `size` ranks with so many bytes of scratch; ring_bytes says how much is left."""
    ring_bytes = _layout.ring_bytes_within(scratch, team_of(Context(size, 0, rules), ""))
    return Context(size, ring_bytes, rules)


def team_of(context: Context, backend: str):
    """A team with the constants that go into kernels, and no addresses yet."""
    rules, size = context.rules, context.size
    return _layout.Team(
        heap=0, local=0, rank=0, control=0, timeout=0,
        size=size,
        blocks=rules.heap_blocks,
        packets=_layout.packets_a_rank(rules.packets, size),
        rings=rules.rings,
        ring_bytes=context.ring_bytes,
        channels=rules.channels,
        slot_bytes=rules.slot_bytes,
        backend=backend,
    )  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """A call laid out over a grid.

    dtype      element type of the pointers; counts are in such elements
    aligned    addresses are multiples of 16 bytes and so are all `counts`: 16-byte accesses are safe
    counts     int64 arguments (or tuples of them) by name
    scalars    further integer arguments, of which nothing is promised
    constants  constexpr arguments by name
    """

    dtype: str
    grid: int
    warps: int
    aligned: bool
    counts: dict[str, int | tuple[int, ...]]
    constants: dict[str, Any]
    scalars: dict[str, int] = field(default_factory=dict)

    def adding(self, counts=(), scalars=(), constants=()) -> "Geometry":
        """The same with further arguments."""
        return replace(
            self,
            counts={**self.counts, **dict(counts)},
            scalars={**self.scalars, **dict(scalars)},
            constants={**self.constants, **dict(constants)},
        )

    def splitting(self, send: tuple[int, ...], recv: tuple[int, ...], same: bool = False) -> "Geometry":
        """The same with counts and offsets for each rank (in elements of dtype) in place of one count.

        same: all ranks get the same chunk, so all send offsets are 0.
        """

        def offsets(counts):
            return tuple(sum(counts[:rank]) for rank in range(len(counts)))

        counts = {
            "send_counts": send,
            "send_offsets": (0,) * len(send) if same else offsets(send),
            "recv_counts": recv,
            "recv_offsets": offsets(recv),
        }
        return replace(self, counts=counts)


@dataclass(frozen=True)
class Algorithm:
    """A row in the table of a collective.

    name       what `explain` and the bench print and TDCCL_ALGO takes
    kernel     its arguments are filled by name: team, send, recv, then what the geometry gives
    geometry   (call, context) -> Geometry
    sent       number of ranks -> bytes that the busiest rank sends, for each byte of a chunk (or message)
    packets    (call, context) -> the most words of a chunk that it takes, if it goes by LL packets
    symmetric  which of send and recv must be symmetric memory; they reach the kernel as `Symmetric`
    splits     takes split lists: False, True, or "only" these
    pairs      across nodes: to its lanes every rank is a node
    in_place   send and recv may overlap
    multimem   None, or (call) -> why multimem cannot do the call, None if it can
    """

    name: str
    kernel: Any
    geometry: Callable[[Call, Context], Geometry]
    sent: Callable[[int], float]
    packets: Callable[[Call, Context], int] | None = None
    symmetric: tuple[str, ...] = ()
    splits: bool | str = False
    pairs: bool = False
    in_place: bool = True
    multimem: Callable[[Call], str | None] | None = None

    @property
    def path(self) -> str:
        """How it moves data: packets (LL), symmetric (zero-copy) or staged (through scratch)."""
        if self.packets is not None:
            return "packets"
        return "symmetric" if self.symmetric else "staged"

    def unfit(self, call: Call, context: Context) -> str | None:
        """Why this algorithm cannot take the call, or None if it can."""
        if call.splits is not None and not self.splits:
            return "takes equal splits only"
        if call.splits is None and self.splits == "only":
            return "takes split lists only"
        if missing := set(self.symmetric) - call.symmetric:
            return f"{' and '.join(sorted(missing))} not in symmetric memory"
        if call.in_place and not self.in_place:
            return "not in place"
        if self.multimem is not None and (reason := self._beyond_multimem(call, context)):
            return reason
        if self.packets is not None and words_of(call) > self.packets(call, context):
            return f"more than {self.packets(call, context)} words"
        return None

    def _beyond_multimem(self, call: Call, context: Context) -> str | None:
        if context.multicast.kind is None:
            return f"no multicast: {context.multicast.reason}"
        if self.symmetric and not call.multicast_alignment:
            return "symmetric memory without a multicast address"
        if self.symmetric and call.multicast_alignment < 16:
            return "symmetric memory not aligned to 16 bytes"
        return self.multimem(call)


def words_of(call: Call) -> int:
    """LL words of one chunk: 32 bits each, or one an element for 8-byte types in reductions."""
    if call.itemsize == 8:
        return call.count
    return -(-call.nbytes // 4)


def _planes(call: Call) -> int:
    """Packets that a word takes."""
    return 2 if call.itemsize == 8 else 1


def one_shot(call: Call, context: Context) -> int:
    """Words of a chunk that LL kernels take which send the whole chunk at once."""
    return context.rules.blocks * _largest_packet_tile(call, context, 1)


def two_shot(call: Call, context: Context) -> int:
    """Words of a message that LL kernels take which send a part to each rank, and then its result to all."""
    return context.rules.blocks * _largest_packet_tile(call, context, 2) * context.size


def _largest_packet_tile(call: Call, context: Context, shots: int) -> int:
    """Words that a block can send in each of its shots."""
    return _layout.packets_a_rank(context.rules.packets, context.size) // (shots * _planes(call))


def _power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(0, value - 1).bit_length()


def _unit(call: Call, widest: int = 16) -> tuple[str, int, bool]:
    """(element type, its bytes, whether 16-byte accesses are safe) in which the call is moved.

    Reductions keep their type; pure movement takes the widest unit that divides addresses and sizes.
    """
    counts = (call.count,) if call.splits is None else sum(call.splits, ())
    alignment = min(call.alignment, *(_lowest_bit(count * call.itemsize) for count in counts))
    if call.op is not None:
        return call.dtype, call.itemsize, alignment == 16
    dtype = _UNITS[min(alignment, widest)]
    return dtype, ITEMSIZE[dtype], alignment == 16


def _lowest_bit(value: int) -> int:
    """The largest power of two, at most 16, that divides `value`."""
    return 16 if value == 0 else min(16, value & -value)


def packets_in(call: Call, context: Context, shots: int = 1) -> Geometry:
    """Lays a chunk out for an LL kernel: TILE words of it a block, or of each rank's part of it if there are two shots.

    Few words go on many blocks.
    """
    rules = context.rules
    dtype, itemsize, aligned = _unit(call, widest=4)
    words = -(-words_of(call) // (1 if shots == 1 else context.size))
    tile = min(rules.packet_tile, _largest_packet_tile(call, context, shots))
    while -(-words // tile) > rules.blocks:
        tile *= 2
    return Geometry(
        dtype=dtype,
        grid=-(-words // tile),
        warps=max(1, min(16, rules.packet_warps * tile // rules.packet_tile)),
        aligned=aligned,
        counts={"count": call.nbytes // itemsize},
        constants={"TILE": tile, "WIDE": aligned},
    )


def tiles_in(
    call: Call, context: Context, rings: int, depth: int, part_bytes: int | None = None, always_whole: bool = False
) -> Geometry:
    """Lays chunks, or parts of `part_bytes` bytes, out in spans that pass through `rings` rings of `depth` slots.

    Large ones (always_whole: all) take the ring WHOLE, at the price of two barriers, in spans of several tiles: the
    longer a span, the less its signals cost, but the longer the pipeline takes to fill.
    """
    rules, slots = context.rules, max(1, rings) * depth
    walked = call.nbytes if part_bytes is None else part_bytes
    whole = always_whole or (call.splits is None and walked >= rules.whole_from)
    ring_bytes = context.ring_bytes
    if whole:
        ring_bytes = _layout.whole_ring_bytes(ring_bytes, rules.rings, rules.blocks)
    room = ring_bytes // slots
    geometry = _tiled(call, context, room, part_bytes)
    tiles = 1
    if whole:
        tile_bytes = geometry.constants["TILE"] * ITEMSIZE[geometry.dtype]
        steps = walked // (geometry.grid * tile_bytes)
        tiles = max(1, min(room // tile_bytes, steps // rules.steps))
    return geometry.adding(constants={"TILES": tiles, "WHOLE": whole})


def split_on_device(call: Call, context: Context, rings: int, depth: int) -> Geometry:
    """Lays chunks out whose sizes only the device knows: in tiles that pass through `rings` rings, on all blocks."""
    dtype, alignment, counts = _counts_on_device(call)
    largest = min(context.rules.tile, context.ring_bytes // (max(1, rings) * depth))
    tile_bytes = 1 << (largest.bit_length() - 1)
    return Geometry(
        dtype=dtype,
        grid=context.rules.blocks,
        warps=max(1, min(context.rules.warps, tile_bytes // 512)),
        aligned=alignment == 16,
        counts=counts,
        constants={"TILE": tile_bytes // ITEMSIZE[dtype], "TILES": 1, "WHOLE": False},
    )


def _counts_on_device(call: Call) -> tuple[str, int, dict[str, int]]:
    """(element type, the largest power of two that divides all addresses and sizes, the counts) of all_to_all_vdev."""
    splits, received, *sizes = call.on_device
    alignment = min(call.alignment, *map(_lowest_bit, sizes))
    dtype = _UNITS[alignment]
    row, send, recv = (nbytes // ITEMSIZE[dtype] for nbytes in sizes)
    counts = {"splits": splits, "received": received, "row": row, "send_count": send, "recv_count": recv}
    return dtype, alignment, counts


def between_pairs(call: Call, context: Context) -> Geometry:
    """Lays messages between pairs out, in tiles of a channel's slot, across nodes of a lane's; addresses and counts
    come with each call."""
    _check_listed(call, context)
    dtype = _UNITS[call.alignment]
    nobody, slot = (0,) * context.size, context.rules.slot_bytes
    if context.nodes > 1:
        nobody, slot = nobody * context.nodes, context.pair_slot
    return Geometry(
        dtype=dtype,
        grid=context.rules.channels,
        warps=context.rules.warps,
        aligned=call.alignment == 16,
        counts={"sends": nobody, "recvs": nobody, "send_counts": nobody, "recv_counts": nobody},
        constants={"TILE": slot // ITEMSIZE[dtype], "ALIGN": call.alignment, "RANKS": _power_of_two(len(nobody))},
    )


def _check_listed(call: Call, context: Context) -> None:
    """Raises ArgumentError where the call has lists of more ranks than a kernel takes."""
    if (ranks := context.size * context.nodes) > _MOST_LISTED:
        raise ArgumentError(
            f"{call.collective}: {ranks} ranks, but messages and split lists go into the parameters of a kernel, which "
            f"hold those of {_MOST_LISTED} at most; all_to_all_vdev has its lists on the device"
        )


def in_pieces(call: Call, context: Context, same: bool = False) -> Geometry:
    """Lays pieces by split lists, across nodes, out in tiles of a slot of the lanes between pairs; same as in
    `splitting`."""
    _check_listed(call, context)
    dtype, itemsize, aligned = _unit(call)
    geometry = _between_all(context, dtype, 16 if aligned else itemsize)
    send, recv = (tuple(count * call.itemsize // itemsize for count in counts) for counts in call.splits)
    return geometry.splitting(send, recv, same)


def pieces_on_device(call: Call, context: Context) -> Geometry:
    """The same by split lists on the device."""
    dtype, alignment, counts = _counts_on_device(call)
    return _between_all(context, dtype, 16 if alignment == 16 else ITEMSIZE[dtype]).adding(counts=counts)


def _between_all(context: Context, dtype: str, align: int) -> Geometry:
    constants = {
        "TILE": context.pair_slot // ITEMSIZE[dtype], "ALIGN": align,
        "RANKS": _power_of_two(context.size * context.nodes),
    }  # fmt: skip
    rules = context.rules
    return Geometry(dtype, rules.channels, rules.warps, align == 16, {}, constants)


def copying(call: Call, context: Context, part_bytes: int | None = None, room: int | None = None) -> Geometry:
    """Lays chunks, or parts of `part_bytes` bytes, out in tiles for a kernel that needs no scratch, or has `room` bytes
    of it for a tile."""
    return _tiled(call, context, context.rules.tile if room is None else room, part_bytes)


def _tiled(call: Call, context: Context, room: int, part_bytes: int | None) -> Geometry:
    rules = context.rules
    dtype, itemsize, aligned = _unit(call)
    tile_bytes = 1 << (min(rules.tile, room).bit_length() - 1)
    grid = rules.blocks
    if call.splits is None:  # else the grid must not depend on sizes that other ranks do not know
        walked = call.nbytes if part_bytes is None else part_bytes
        tile_bytes = min(tile_bytes, max(rules.small_tile, _power_of_two(-(-walked // rules.blocks))))
        grid = max(1, min(rules.blocks, -(-walked // tile_bytes)))
    counts = {"count": call.nbytes // itemsize}
    if part_bytes is not None:
        counts["part"] = part_bytes // itemsize
    constants = {"TILE": tile_bytes // itemsize, "ALIGN": 16 if aligned else itemsize}
    warps = max(1, min(rules.warps, tile_bytes // 512))  # at least 16 bytes a thread
    return Geometry(dtype, grid, warps, aligned, counts, constants)
