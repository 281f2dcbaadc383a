"""Finds in PTX what no emulation shows: warps of a block that may decide apart whether they come to its barriers.

What threads read for themselves while others change it, and what clocks tell them, may be different in every warp. A
branch on that which leads around a block barrier, or back over one, is such a decision. What has gone through shared
memory is the same for all: so Triton broadcasts a scalar atomic, and the result of a reduction over the whole block.
"""

import re

_INSTRUCTION = re.compile(r"(?:@!?(%p\d+)\s+)?([a-z][\w.:]*)\s*([^;]*);")
_REGISTER = re.compile(r"%[a-z]+\d*")
_OWN_LOOK = re.compile(r"ld\.volatile|ld\.\S*(?:relaxed|acquire)|atom\.")
_CLOCKS = {"%globaltimer", "%clock64"}


def divergent_branches(ptx: str) -> list[str]:
    """The branches on what may be different in every warp that have a block barrier between them and their targets."""
    if int(re.search(r"\.reqntid (\d+)", ptx)[1]) <= 32:
        return []
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    labels = {line.rstrip(":"): number for number, line in enumerate(lines) if line.endswith(":")}
    barriers = [number for number, line in enumerate(lines) if line.startswith("bar.sync")]
    instructions = [
        (number, *found.groups()) for number, line in enumerate(lines) for found in _INSTRUCTION.finditer(line)
    ]
    apart = _apart(instructions)
    branches = [
        (number, labels[target.strip()])
        for number, guard, name, target in instructions
        if name.startswith("bra") and guard in apart
    ]
    return [
        lines[here]
        for here, there in branches
        if any(min(here, there) < barrier < max(here, there) for barrier in barriers)
    ]


def _apart(instructions: list[tuple]) -> set[str]:
    """The registers that may hold different values in different warps."""
    flows, apart, known = [], set(_CLOCKS), 0
    for _, guard, name, operands in instructions:
        if re.match(r"bra|bar|st\.|red\.", name):
            continue
        results = _REGISTER.findall(re.match(r"{[^}]*|[^,]*", operands)[0])
        if _OWN_LOOK.match(name):
            apart.update(results)
        elif not name.startswith("ld."):
            flows.append((results, {guard, *_REGISTER.findall(operands)[len(results) :]}))
    while len(apart) > known:
        known = len(apart)
        for results, given in flows:
            if given & apart:
                apart.update(results)
    return apart
