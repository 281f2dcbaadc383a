"""The numbers from which a call's grid and tiles follow; a row of a table may replace some of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """One target's numbers. Sizes are in bytes, of one rank's chunk where a collective has chunks.

    heap_blocks    largest grid of any kernel, users' too
    packets        32-bit words in the LL slots of a block, those of all ranks together
    rings          how many blocks have scratch of their own; the largest grid of tdccl's own kernels
    channels       how many blocks send and receive between two ranks
    slot_bytes     bytes of a tile there
    blocks         largest grid, at most `rings`
    packet_tile    32-bit words of a chunk that one block of an LL kernel handles, while blocks last
    packet_warps   warps of such a block
    warps          warps of a block of the other kernels
    tile           largest tile
    small_tile     smallest tile: small messages take smaller tiles on more blocks
    whole_from     chunk (or part) from which staged algorithms take all scratch, between barriers
    steps          how many steps a block should have, at least, before its spans grow longer than a tile
    """

    heap_blocks: int
    packets: int
    rings: int
    channels: int
    slot_bytes: int
    blocks: int
    packet_tile: int
    packet_warps: int
    warps: int
    tile: int
    small_tile: int
    whole_from: int
    steps: int


GPU = Rules(
    heap_blocks=128,
    packets=4096,
    rings=128,
    channels=16,
    slot_bytes=16 << 10,
    blocks=128,
    packet_tile=256,
    packet_warps=4,
    warps=16,
    tile=32 << 10,
    small_tile=2 << 10,
    whole_from=4 << 20,
    steps=6,
)

# The largest grid of torch's groups, whose calls mostly run beside computation: what NCCL takes of a GPU, too.
BESIDE_COMPUTATION = 32

# With less scratch than this a communicator has smaller packet slots and fewer channels.
LITTLE_SCRATCH = 32 << 20

# The interpreter pays by the block, not by the byte: few blocks, large tiles.
EMULATION = Rules(
    heap_blocks=32,
    packets=2048,
    rings=2,
    channels=2,
    slot_bytes=8 << 10,
    blocks=2,
    packet_tile=512,
    packet_warps=1,
    warps=1,
    tile=32 << 10,
    small_tile=32 << 10,
    whole_from=256 << 10,
    steps=2,
)
