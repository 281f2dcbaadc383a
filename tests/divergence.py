"""Finds in PTX what no emulation shows: warps of a block that may decide apart whether they come to its barriers.

What threads read for themselves while others change it, and their own numbers and clocks, may be different in every
warp. A branch on any of that which leads around a barrier, or back over one, is such a decision. What one thread has
read is the same for all once it has gone through shared memory: so Triton broadcasts a scalar atomic, and the result
of a reduction over the whole block.
"""

import re

_INSTRUCTION = re.compile(r"(?:@!?(%p\d+|\w+)\s+)?([a-z][\w.:]*)\s*([^;]*);")
_REGISTER = re.compile(r"%\w+(?:\.\w)?")
# Reads of words that others change, and what differs from thread to thread.
_OWN_VIEW = re.compile(r"ld\.volatile|ld\.\S*(?:relaxed|acquire)|atom\.|activemask|vote")
_CLOCKS = {"%globaltimer", "%clock64"}


def divergent_branches(ptx: str) -> list[str]:
    """The branches on what may be different in every warp that have a block barrier between them and their targets."""
    lines = [line.split("//")[0] for line in ptx.splitlines()]
    labels = {line.strip().rstrip(":"): number for number, line in enumerate(lines) if line.strip().endswith(":")}
    barriers = [number for number, line in enumerate(lines) if re.search(r"\bbar\.sync\b|\bbarrier\.sync\b", line)]
    instructions = [(number, *found.groups()) for number, line in enumerate(lines) for found in _instructions(line)]
    apart = _apart(instructions)
    return [
        lines[number].strip()
        for number, guard, name, operands in instructions
        if name.startswith("bra") and guard in apart
        for target in [labels.get(operands.strip(), number)]
        if any(min(number, target) < barrier < max(number, target) for barrier in barriers)
    ]


def _instructions(line: str):
    return _INSTRUCTION.finditer(line.replace("{", " ").replace("}", " "))


def _apart(instructions: list[tuple]) -> set[str]:
    """The registers that may hold different values in different warps."""
    flows, apart = [], set(_CLOCKS)
    for _, guard, name, operands in instructions:
        registers = _REGISTER.findall(operands)
        if not registers or re.match(r"st\.|bra|bar|red\.|ld\.shared|ret|fence", name):
            continue
        count = _results(name, operands)
        results, given = registers[:count], {*registers[count:], *([guard] if guard else [])}
        if _OWN_VIEW.match(name):
            apart.update(results)
        elif not re.match(r"ld\.(?:global|param)|ld\.const", name):
            flows.append((results, given))
    grown = True
    while grown:
        before = len(apart)
        for results, given in flows:
            if given & apart:
                apart.update(results)
        grown = len(apart) > before
    return apart


def _results(name: str, operands: str) -> int:
    """How many of an instruction's registers it writes: those before the address of a load, else one or two."""
    if re.match(r"ld\.|atom\.", name):
        return len(_REGISTER.findall(operands.split("[")[0]))
    return 2 if "|" in operands.split(",")[0] else 1
