"""A plan: one call's algorithm, chosen once, with its kernel compiled and its arguments bound."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tdccl.errors import ArgumentError
from tdccl.runtime.algorithm import Algorithm, Call, Context, Geometry
from tdccl.runtime.launch import Arguments, Rail, Team, bind
from tdccl.tuning import Row, Table


@dataclass(frozen=True)
class Choice:
    """The algorithm that a call takes, its layout, who says so, and why the others were passed over."""

    algorithm: Algorithm
    geometry: Geometry
    source: str
    passed_over: dict[str, str]


def choose(
    algorithms: list[Algorithm], call: Call, context: Context, table: Table, forced: str | None = None
) -> Choice:
    """The forced algorithm, or the one that the tuning table names, or else the last that fits.

    Raises ArgumentError if the forced one does not exist or cannot take the call.
    """
    if forced is not None and forced not in {algorithm.name for algorithm in algorithms}:
        names = ", ".join(algorithm.name for algorithm in algorithms)
        raise ArgumentError(f"{call.collective}: there is no algorithm {forced!r}, expected one of {names}")
    rows = _rows(algorithms, call, context, table)
    contexts = {algorithm.name: _shaped(algorithm, context, rows) for algorithm in algorithms}
    unfit = {a.name: reason for a in algorithms if (reason := a.unfit(call, contexts[a.name]))}
    if forced in unfit:
        raise ArgumentError(f"{call.collective}: {forced} cannot take this call: {unfit[forced]}")
    fit = {algorithm.name: algorithm for algorithm in algorithms if algorithm.name not in unfit}
    named = [row.algorithm for row in rows if row.algorithm in fit]
    if forced:
        chosen, source = fit[forced], "asked for"
    elif named:
        chosen, source = fit[named[0]], table.source
    else:
        chosen, source = [*fit.values()][-1], "not in the tuning table"
    passed_over = {a.name: unfit.get(a.name, source) for a in algorithms if a is not chosen}
    return Choice(chosen, chosen.geometry(call, contexts[chosen.name]), source, passed_over)


def _rows(algorithms: Sequence[Algorithm], call: Call, context: Context, table: Table) -> list[Row]:
    """What the table says of the call, the best first: of symmetric memory only if there are algorithms for where the
    call has it. Else ranks need not have it alike: `recv` of a reduce, or of uneven pieces."""
    zero_copy = call.splits is None and any(a.symmetric and call.symmetric.issuperset(a.symmetric) for a in algorithms)
    placements = ("symmetric", "plain") if zero_copy else ("plain",)
    blocks = context.rules.blocks
    rows = (table.row(call.collective, placement, call.nbytes, blocks) for placement in placements)
    return [row for row in rows if row is not None]


def _shaped(algorithm: Algorithm, context: Context, rows: list[Row]) -> Context:
    """The context with what the first row for the algorithm changes of the rules."""
    changes = next((row.changes for row in rows if row.algorithm == algorithm.name), None)
    if not changes:
        return context
    given, rules = context.rules, replace(context.rules, **changes)
    if rules.blocks > given.blocks:  # under a cap, a block needs more bytes under way than the row gives it
        rules = replace(
            rules, blocks=given.blocks, tile=max(rules.tile, given.tile), warps=max(rules.warps, given.warps)
        )
    return context._replace(rules=rules)


class Plan:
    """Launches one kind of call: `launch(*at(send, recv), stream)` with addresses and a raw stream handle."""

    def __init__(
        self, choice: Choice, call: Call, team: Team, everywhere: Sequence, rails: dict[bool, Rail] | None = None
    ):
        """everywhere: the communicator's symmetric memory, in the order in which all ranks made it. rails: across
        nodes, by whether every rank is a node to it."""
        self.choice = choice
        segments = dict(zip(("send", "recv"), call.segments))
        symmetric = choice.algorithm.symmetric
        tables = {name: segments[name].peers.data_ptr() for name in symmetric}
        self._send_origin = segments["send"].address if "send" in symmetric else 0
        self._recv_origin = segments["recv"].address if "recv" in symmetric else 0
        kernel = choice.algorithm.kernel
        places = [everywhere.index(segments[name]) for name in symmetric]
        signature = _signature(choice.algorithm, call, places)
        arguments = Arguments(
            kernel, choice.geometry, symmetric, call.op, signature, rails and rails[choice.algorithm.pairs]
        )
        self.launch = bind(kernel, arguments, team, choice.geometry, tables)

    def at(self, send: int, recv: int) -> tuple[int, int]:
        """What `launch` takes for buffers at these addresses: the addresses, or offsets in symmetric memory."""
        return send - self._send_origin, recv - self._recv_origin


def _signature(algorithm: Algorithm, call: Call, places: list[int]) -> int:
    """30 bits that are equal on all ranks which make the same call by one algorithm in the same symmetric memory."""
    called = (call.collective, algorithm.name, call.count, call.dtype, call.op, call.root, places)
    return zlib.crc32(repr(called).encode()) >> 2
