"""all_reduce across nodes: every rank ends with the reduction of all ranks' messages, the same bits on all.

one_shot_rails   packets inside, every node's sum to all nodes                                small messages
two_shot_rails   reduce-scatter inside and across, all-gather across and inside, pipelined    bandwidth

The order of additions, the same in both: the ranks of a node in rank order, as on one node; each node's sum is rounded
to the type of the message (where avg could overflow it, kept as accumulated); then the nodes' sums in node order, and
that is rounded, or divided and rounded, once.
"""

import triton
import triton.language as tl

import tdccl.language as shmem
import tdccl.language.rails as rails
from tdccl.hierarchical import stages
from tdccl.hierarchical.layout import in_parts, part_of, wire_of
from tdccl.runtime.algorithm import ITEMSIZE, Algorithm, one_shot, packets_in


@triton.jit
def one_shot_rails(
    team, rail, send, recv, count, DTYPE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr
):
    """Block b reduces the b-th TILE words of all messages of its node, sends that to all nodes, and reduces theirs.

    Waits:    block b for block b of every peer inside, then of its like in every other node.
    Ordering: inside none is needed, the flag travels in the word; across as `stages.share_across`.
    Reuse:    packet slots alternate by the parity of the epoch; each rank hears from all inside in each call.
    """
    epoch = shmem.begin(team)
    LANES: tl.constexpr = 1 if DTYPE.primitive_bitwidth >= 32 else 32 // DTYPE.primitive_bitwidth
    PARTIAL: tl.constexpr = "sum" if OP == "avg" else OP
    place = tl.arange(0, TILE)
    index = tl.program_id(0).to(tl.int64) * TILE + place
    mask = index < shmem.words_in(count, DTYPE, WIDE)
    own = shmem.load_words(send, index, count, DTYPE, WIDE)
    for distance in tl.static_range(1, team.size):
        shmem.put_words(team, epoch, own, place, mask, (team.rank + distance) % team.size)
    words, epoch = shmem.get_words(team, epoch, own, place, mask)
    words = shmem.fold_words(words, PARTIAL, DTYPE)
    epoch, slot = stages.share_across(team, rail, epoch, words, words.dtype, TILE)
    epoch, total = stages.add_nodes(team, rail, epoch, rails.RESULTS, slot, DTYPE, DTYPE, OP, TILE * LANES)
    element = tl.program_id(0).to(tl.int64) * TILE * LANES + tl.arange(0, TILE * LANES)
    tl.store(recv + element, total, mask=element < count)
    shmem.end(team, epoch)


@triton.jit
def two_shot_rails(
    team, rail, send, recv, count, part,
    DTYPE: tl.constexpr, WIRE: tl.constexpr, OP: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Every rank reduces its part, and shares the result: all stages of `stages`, each behind the one before it.

    Waits, ordering, reuse: those of the stages.
    """
    epoch = shmem.begin(team)
    nodes: tl.constexpr = rail.nodes
    steps = shmem.steps_of(part, TILE)
    turns = steps * nodes
    mine = (rail.node * team.size + team.rank) * part
    for turn in range(turns + 3 * nodes + 1):
        if turn < turns:
            node = stages.others_first(rail, turn)
            stages.push_parts(team, epoch, turn, node, turn // nodes, send, part, count, DTYPE, TILE)
            shmem.signal_all(team, epoch, shmem.DATA, turn + 1)
        if (turn >= 1) & (turn <= turns):
            node, step = stages.others_first(rail, turn - 1), (turn - 1) // nodes
            epoch = stages.forward_sum(
                team, rail, epoch, turn - 1, node, step, send, part, count, DTYPE, WIRE, OP, TILE, ALIGN
            )
        step = turn // nodes - 2
        if (turn % nodes == 0) & (step >= 0) & (step < steps):
            own = rails.out_slot(rail, rails.INPUTS, rail.node, step, WIRE)
            epoch, total = stages.add_nodes(team, rail, epoch, rails.INPUTS, own, DTYPE, WIRE, OP, TILE)
            index, mask = stages.tile_of(team, rail.node, team.rank, step, part, count, TILE)
            tl.store(recv + index, total, mask=mask)
            epoch, _ = stages.share_across(team, rail, epoch, total, DTYPE, TILE)
        epoch = stages.share_and_collect(
            team, rail, epoch, turn - 3 * nodes, turns, recv + mine, recv, part, count, team.size - 1, DTYPE, TILE
        )
    shmem.end(team, epoch)


def _one_shot(call, context):
    return packets_in(call, context)


def _packets(call, context):
    """Words that it takes: as one_shot_ll, as far as they fit into slots; none whose sum travels in a wider type."""
    if wire_of(call) != call.dtype:
        return 0
    words = context.rail_slot // max(4, ITEMSIZE[call.dtype])
    tile = 1 << words.bit_length() - 1
    return min(one_shot(call, context), context.rules.blocks * tile) if tile >= context.rules.packet_tile else 0


def _two_shot(call, context):
    return in_parts(call, context, part_of(call, context), rings=2 * (context.size - 1), wire=wire_of(call))


ALGORITHMS = [
    Algorithm("one_shot_rails", one_shot_rails, _one_shot, sent=lambda n: n - 1, packets=_packets),
    Algorithm("two_shot_rails", two_shot_rails, _two_shot, sent=lambda n: 2 * (n - 1) / n),
]
