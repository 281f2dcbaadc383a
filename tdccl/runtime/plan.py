"""A plan: one call's algorithm, chosen once, with its kernel compiled and its arguments bound."""

from dataclasses import dataclass

from tdccl.errors import ArgumentError
from tdccl.runtime.algorithm import Algorithm, Call, Context, Geometry
from tdccl.runtime.launch import Arguments, Team, bind


@dataclass(frozen=True)
class Choice:
    """The algorithm that a call takes, its layout, and why the others were passed over."""

    algorithm: Algorithm
    geometry: Geometry
    passed_over: dict[str, str]


def choose(algorithms: list[Algorithm], call: Call, context: Context, forced: str | None = None) -> Choice:
    """The first algorithm of the table that fits and is worthwhile, or the forced one.

    Raises ArgumentError if the forced one does not exist or cannot take the call.
    """
    passed_over = {}
    if forced is not None and forced not in {algorithm.name for algorithm in algorithms}:
        names = ", ".join(algorithm.name for algorithm in algorithms)
        raise ArgumentError(f"{call.collective}: there is no algorithm {forced!r}, expected one of {names}")
    for algorithm in algorithms:
        if forced is not None and algorithm.name != forced:
            passed_over[algorithm.name] = f"{forced} was asked for"
            continue
        why_not = algorithm.unfit(call, context)
        if why_not is None and forced is None:
            why_not = algorithm.worthwhile(call, context)
        if why_not is None:
            return Choice(algorithm, algorithm.geometry(call, context), passed_over)
        passed_over[algorithm.name] = why_not
    raise ArgumentError(f"{call.collective}: {forced} cannot take this call: {passed_over[forced]}")


class Plan:
    """Launches one kind of call; `send` and `recv` are addresses, `stream` a raw handle."""

    def __init__(self, choice: Choice, call: Call, team: Team):
        self.choice = choice
        segments = dict(zip(("send", "recv"), call.segments))
        symmetric = choice.algorithm.symmetric
        tables = {name: segments[name].peers.data_ptr() for name in symmetric}
        self._send_origin = segments["send"].address if "send" in symmetric else 0
        self._recv_origin = segments["recv"].address if "recv" in symmetric else 0
        kernel = choice.algorithm.kernel
        arguments = Arguments(kernel, choice.geometry, symmetric, call.op)
        self._launch = bind(kernel, arguments, team, choice.geometry, tables)

    def __call__(self, send: int, recv: int, stream: int) -> None:
        self._launch(send - self._send_origin, recv - self._recv_origin, stream)
