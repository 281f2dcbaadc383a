"""Merges what ranks have dumped: `python -m tdccl.trace FOLDER`.

A rank dumps its last calls when a wait has failed, if TDCCL_TRACE_DIR names a folder, or when `Communicator.dump` is
called. This says at which call each rank is and which of them lags, and writes a timeline for a trace viewer.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tdccl.runtime.recorder import MESSAGES, Entry, account


@dataclass
class Communicator:
    """What is known of one communicator, by rank: by the dump, its own or a peer's, that saw the rank go furthest."""

    name: str
    size: int
    pids: dict[int, int] = field(default_factory=dict)
    calls: dict[int, list[Entry]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


def load(folder: Path) -> list[Communicator]:
    """The communicators of which there are dumps in `folder`, the largest first."""
    found: dict[str, Communicator] = {}
    for dump in map(_read, sorted(folder.glob("*-rank*.json"))):
        of = found.setdefault(dump["communicator"], Communicator(dump["communicator"], dump["size"]))
        if dump["error"]:
            of.errors[dump["rank"]] = dump["error"]
        for rank, seen in ((int(rank), seen) for rank, seen in dump["ranks"].items()):
            calls = [Entry(**call) for call in seen["calls"]]
            if rank not in of.calls or _reached(calls) > _reached(of.calls[rank]):
                of.pids[rank], of.calls[rank] = seen["pid"], calls
    return sorted(found.values(), key=lambda each: -each.size)


def _read(path: Path) -> dict:
    try:
        dump = json.loads(path.read_text())
        if {"communicator", "size", "rank", "error", "ranks"} <= {*dump}:
            return dump
    except (OSError, ValueError, TypeError):
        pass
    sys.exit(f"{path}: not a dump of a communicator; move it out of the folder")


def _reached(calls: list[Entry]) -> tuple[int, int]:
    """How far a rank had come: its last call, and whether that had ended."""
    return (calls[-1].index, calls[-1].ended) if calls else (0, 0)


def summary(of: Communicator) -> Iterator[str]:
    """Lines that say at which call each rank is, what failed, and which rank lags."""
    yield f"communicator {of.name} of {of.size} ranks"
    for line in account(dict(sorted(of.calls.items()))):
        yield f"  {line}"
    for rank in sorted(set(range(of.size)) - of.calls.keys()):
        yield f"  rank {rank}: nobody saw its calls"
    for rank, error in sorted(of.errors.items()):
        yield f"  rank {rank} raised {error.splitlines()[0]}"
    if latest := _latest(of):
        yield f"  {latest}"


def _latest(of: Communicator) -> str | None:
    """The call to which the last rank came latest after the first, of those that all ranks made."""
    starts: dict[int, dict[int, Entry]] = defaultdict(dict)
    for rank, calls in of.calls.items():
        for call in calls:
            if call.collective not in MESSAGES:
                starts[call.number][rank] = call
    spreads = [
        (max(each.started for each in made.values()) - min(each.started for each in made.values()), number)
        for number, made in starts.items()
        if len(made) == of.size > 1
    ]
    if not spreads:
        return None
    spread, number = max(spreads)
    late = max(starts[number], key=lambda rank: starts[number][rank].started)
    call = starts[number][late]
    return f"of all calls, ranks came furthest apart to call {number}, {call}: rank {late} {spread / 1e6:.3f} ms late"


def timeline(communicators: list[Communicator]) -> dict:
    """All calls as Chrome's trace events, which Perfetto opens: a process for each process, a thread for each
    communicator in it. A call whose end is not known is an instant."""
    events = []
    roles: dict[int, list[str]] = defaultdict(list)
    begin = min((call.started for of in communicators for calls in of.calls.values() for call in calls), default=0)
    for thread, of in enumerate(communicators):
        for rank, calls in sorted(of.calls.items()):
            at = {"pid": of.pids[rank], "tid": thread}
            roles[of.pids[rank]].append(f"rank {rank} of {of.name}")
            events.append({"ph": "M", "name": "thread_name", **at, "args": {"name": f"communicator {of.name}"}})
            for call in calls:
                event = {"name": call.collective, "ts": (call.started - begin) / 1e3, **at, "args": call._asdict()}
                if call.ended:
                    event |= {"ph": "X", "dur": (call.ended - call.started) / 1e3}
                else:
                    event |= {"ph": "i", "s": "t"}
                events.append(event)
    for pid, names in roles.items():
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": ", ".join(names)}})
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tdccl.trace", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the ranks dumped to")
    parser.add_argument(
        "-o", "--output", type=Path, help="the timeline to write (default: timeline.json in the folder)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Prints the summary of each communicator and writes the timeline."""
    options = _parse(arguments)
    communicators = load(options.folder)
    if not communicators:
        sys.exit(f"{options.folder}: no dumps here; set TDCCL_TRACE_DIR, or call dump() of the communicator")
    for of in communicators:
        print(*summary(of), sep="\n")
    output = options.output or options.folder / "timeline.json"
    try:
        output.write_text(json.dumps(timeline(communicators)))
    except OSError as error:
        sys.exit(f"-o {output}: {error.strerror}; expected a file that can be written")
    print(f"wrote {output}; open it in ui.perfetto.dev or chrome://tracing")


if __name__ == "__main__":
    main(sys.argv[1:])
