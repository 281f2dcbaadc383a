"""What calls depend on and all ranks must have alike: algorithms, scratch, rules, the tuning table."""

from dataclasses import replace

import torch

from tdccl import environment, tuning
from tdccl.errors import InitError
from tdccl.runtime import bare
from tdccl.runtime.algorithm import Context, context_of

layout = bare.read("tdccl.language.team")
rails = bare.read("tdccl.language.rails")
ALGORITHMS = bare.read("tdccl.collectives").ALGORITHMS
ACROSS_NODES = bare.read("tdccl.hierarchical").ALGORITHMS
# Across nodes a message up to so many bytes takes the path with the fewest messages on the way.
_ONE_SHOT = 64 << 10
# The most blocks of a kernel that goes across nodes, for a few nodes and for many: with more, slots would be small.
_BLOCKS_ACROSS = (32, 8)


def context_for(
    size: int,
    max_blocks: int | None = None,
    scratch: int | None = None,
    nodes: int = 1,
    rules: tuning.Rules | None = None,
) -> Context:
    """What algorithms know of a communicator of `size` ranks on each of `nodes` nodes, with so many bytes of scratch
    (None: as the environment says) inside, and across as many in slots along rails and up to half as many between
    pairs, under these rules (None: as kernels run here). Raises InitError if it is too small for them."""
    rules = rules or (tuning.EMULATION if environment.emulated() else tuning.GPU)
    scratch = scratch or environment.scratch_bytes()
    plenty = scratch >= tuning.LITTLE_SCRATCH or rules is tuning.EMULATION
    rules = _capped(rules, max_blocks)
    if not plenty:
        rules = replace(rules, packets=rules.packets // 4, channels=rules.channels // 4)  # leave some to the rings
    if nodes > 1:
        most, least = _BLOCKS_ACROSS
        across = max(least, min(most, 8 * most // nodes))
        channels = max(1, min(rules.channels, 128 // (nodes * size)))
        rules = replace(rules, rings=min(rules.rings, across), blocks=min(rules.blocks, across), channels=channels)
    context = context_of(size, scratch, rules)
    if nodes > 1:
        slot = min(rules.tile * size, rails.slot_bytes_within(scratch, rules.rings, nodes))
        if slot < 128 * size:
            raise InitError(f"TDCCL_SCRATCH_MB={scratch >> 20} is too little for {nodes} nodes of {size} ranks")
        room = rails.slot_bytes_within(scratch // 2, rules.channels, nodes * size)
        pair_slot = min(rules.slot_bytes, 1 << max(7, room.bit_length() - 1))
        context = context._replace(nodes=nodes, rail_slot=slot, pair_slot=pair_slot)
    if context.ring_bytes < 16 << 10:
        raise InitError(f"TDCCL_SCRATCH_MB={scratch >> 20} is too little for {size} ranks")
    return context


def table_for(gpu: str, size: int, multicast: bool = False) -> tuning.Table:
    """The tuning table for this GPU and number of ranks, with multicast between them or without. Raises InitError if it
    names what there is not."""

    def sent(collective: str, name: str, nbytes: int, ranks: int) -> float:
        return next(a for a in ALGORITHMS[collective] if a.name == name).sent(ranks) * nbytes

    table = tuning.table_for(gpu, size, multicast, sent)
    for collective in table.rows:
        known = [algorithm.name for algorithm in ALGORITHMS.get(collective, ())]
        if unknown := table.algorithms(collective) - {*known}:
            raise InitError(f"{table.source}: {collective} by {', '.join(unknown)}: expected {', '.join(known)}")
    return table


def rail_for(context: Context, pairs: bool = False):
    """The rail of a communicator across nodes, or that to which every rank is a node, with the constants that go into
    kernels and no addresses yet; None for one node."""
    if context.nodes == 1:
        return None
    if pairs:
        return rails.Rail(0, 0, 0, context.nodes * context.size, context.pair_slot, 1)
    return rails.Rail(0, 0, 0, context.nodes, context.rail_slot, context.size)


def table_across() -> tuning.Table:
    """The tuning table of a communicator across nodes: nothing is measured."""
    rows = [tuning.Row(_ONE_SHOT, "one_shot_rails", {}), tuning.Row(None, "two_shot_rails", {})]
    return tuning.Table("across nodes: not measured", {"all_reduce": {"plain": rows}})


def forced_algorithms() -> dict[str, str]:
    """The algorithms that TDCCL_ALGO asks for, by collective. Raises InitError for unknown names."""
    forced = environment.forced_algorithms()
    for collective, name in forced.items():
        known = [a.name for table in (ALGORITHMS, ACROSS_NODES) for a in table.get(collective, ())]
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else f"a collective of {', '.join(ALGORITHMS)}"
            raise InitError(f"TDCCL_ALGO={collective}:{name}: expected {expected}")
    return forced


def device_of(device, number: int) -> torch.device:
    """This rank's device, made the current one; by default that of its number among the ranks of its host. Raises
    InitError if it is none that kernels run on."""
    if environment.emulated():
        return torch.device("cpu")
    if device is None:
        if not torch.cuda.device_count():
            raise InitError("there is no GPU (TDCCL_EMULATE=1 runs on CPU tensors)")
        device = number % torch.cuda.device_count()
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        raise InitError(f"device is {device}, expected a GPU (TDCCL_EMULATE=1 runs on CPU tensors)")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device


def _capped(rules: tuning.Rules, max_blocks: int | None) -> tuning.Rules:
    if max_blocks is None:
        return rules
    if not hasattr(max_blocks, "__index__") or max_blocks < 1:
        raise InitError(f"max_blocks is {max_blocks!r}, expected a number of blocks from 1 to {rules.rings}")
    return replace(rules, blocks=min(rules.blocks, max_blocks))
