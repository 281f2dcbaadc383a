"""Which ranks share a node, that is a host, or a part of one where a boundary is drawn inside it."""

import itertools
import os
import socket
from typing import NamedTuple

from tdccl import environment
from tdccl.transport.bootstrap import Bootstrap

_PART = "/part "


class Topology(NamedTuple):
    """How the ranks of a group lie on nodes, as one of them sees it.

    nodes  the ranks of each node: equally many, one after another in rank order
    rank   this rank
    hosts  by node, where it is

    Where ranks do not lie like that, each counts as a node of its own.
    """

    nodes: tuple[tuple[int, ...], ...]
    rank: int
    hosts: tuple[str, ...]

    @property
    def width(self) -> int:
        """Ranks of a node."""
        return len(self.nodes[0])

    @property
    def node(self) -> int:
        """The number of this rank's node."""
        return self.rank // self.width

    @property
    def local(self) -> list[int]:
        """The ranks of this node."""
        return list(self.nodes[self.node])

    @property
    def rail(self) -> list[int]:
        """The ranks with the same place in their nodes as this one, one a node."""
        return [ranks[self.rank % self.width] for ranks in self.nodes]

    @property
    def number_on_host(self) -> int:
        """How many ranks before this one are on its host, in its node or not."""
        here = _host_of(self.hosts[self.node])
        places = [place for place, ranks in zip(self.hosts, self.nodes) for _ in ranks]
        return [_host_of(place) for place in places[: self.rank]].count(here)


def topology_of(rank: int, places: list[str | None]) -> Topology:
    """The topology of ranks that are at these places, one a rank."""
    found: dict[str, list[int]] = {}
    for other, place in enumerate(places):
        found.setdefault(place, []).append(other)
    nodes = list(found.values())
    in_order = [*itertools.chain(*nodes)] == [*range(len(places))] and len({*map(len, nodes)}) == 1
    if not in_order:
        nodes = [[other] for other in range(len(places))]
    return Topology(tuple(map(tuple, nodes)), rank, tuple(places[ranks[0]] for ranks in nodes))


def place_of(bootstrap: Bootstrap) -> str:
    """Where this rank is, equal for ranks of one node alone. Raises InitError for a bad TDCCL_NODE_SIZE."""
    size = environment.node_size()
    drawn = "" if size is None else f"{_PART}{bootstrap.world_rank // size}"
    return f"{socket.gethostname()}/{boot_id()}{drawn}"


def _host_of(place: str | None) -> str:
    """A place without the boundaries that are drawn inside a host."""
    return str(place).partition(_PART)[0]


def boot_id() -> str:
    """Tells hosts apart, also of the same name; containers on one kernel share it, and share memory too."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return str(os.getuid())
