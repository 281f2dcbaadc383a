"""Which size takes which shape: the numbers behind the choice of algorithm, grid and tile."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """One target's numbers. Sizes are in bytes, of one rank's chunk where a collective has chunks.

    packet_limit   largest chunk of each collective that goes as LL packets
    packet_tile    32-bit words of a chunk that one block of an LL kernel handles, while blocks last
    packet_warps   warps of such a block
    blocks         largest grid of tdccl's own kernels
    heap_blocks    largest grid of any kernel, users' too
    warps          warps of a block of the other kernels
    tile           largest and smallest tile, in bytes: small messages take smaller tiles on more blocks
    whole_from     chunk (or part) from which staged algorithms take the ring of both parities, between barriers
    steps          how many steps a block should have, at least, before its spans grow longer than a tile
    """

    packet_limit: dict[str, int]
    packet_tile: int
    packet_warps: int
    blocks: int
    heap_blocks: int
    warps: int
    tile: tuple[int, int]
    whole_from: int
    steps: int


GPU = Tuning(
    packet_limit={
        "all_reduce": 128 << 10,
        "all_gather": 32 << 10,
        "reduce_scatter": 32 << 10,
        "broadcast": 64 << 10,
        "all_to_all": 32 << 10,
    },
    packet_tile=256,
    packet_warps=4,
    blocks=128,
    heap_blocks=128,
    warps=16,
    tile=(32 << 10, 2 << 10),
    whole_from=4 << 20,
    steps=6,
)

# The interpreter pays by the block, not by the byte: few blocks, large tiles.
EMULATION = Tuning(
    packet_limit=dict.fromkeys(GPU.packet_limit, 8 << 10),
    packet_tile=512,
    packet_warps=1,
    blocks=2,
    heap_blocks=32,
    warps=1,
    tile=(32 << 10, 32 << 10),
    whole_from=256 << 10,
    steps=2,
)
