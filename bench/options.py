"""The command line: nccl-tests' options where it has them."""

import argparse
import re
from pathlib import Path

from bench.collectives import COLLECTIVES, DTYPES, OPS
from tdccl import environment

PLACEMENTS = ("plain", "symmetric")
PEERS = ("nccl", "symm", "gloo")

# The interpreter takes milliseconds a call: in emulation the defaults cover little, and quickly.
_GPU = {"maxbytes": "1G", "stepfactor": 2, "iters": 20, "warmup_iters": 5}
_EMULATION = {"maxbytes": "64K", "stepfactor": 4, "iters": 2, "warmup_iters": 1}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; exits with a message if they are wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.collectives = list(COLLECTIVES) if options.collective == "all" else [options.collective]
    options.ops = list(OPS) if options.op == "all" else [options.op]
    options.dtypes = list(DTYPES) if options.datatype == "all" else [options.datatype]
    options.command = " ".join(["python -m bench", *_without_paths(arguments)])
    if not options.placement:
        parser.error(f"--placement names none, expected some of {','.join(PLACEMENTS)}")
    if options.minbytes > options.maxbytes:
        parser.error(f"-b is {options.minbytes} bytes, -e is {options.maxbytes}: expected -b <= -e")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"-J is {options.json}: there is no folder {options.json.parent}, make it first")
    if options.json and options.json.is_dir():
        parser.error(f"-J is {options.json}, a folder; expected a file in it")
    if options.graph and environment.emulated():
        parser.error("-G captures CUDA graphs, which need a GPU: leave it out in emulation")
    return options


def sizes(options: argparse.Namespace) -> list[int]:
    """The message sizes in bytes, from the smallest to the largest."""
    size, found = options.minbytes, []
    while size <= options.maxbytes:
        found.append(size)
        size = size + options.stepbytes if options.stepbytes else size * options.stepfactor
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times and checks tdccl's collectives. Started by mpirun or torchrun it takes their ranks; "
        "started alone it spawns its own.",
    )
    defaults = _EMULATION if environment.emulated() else _GPU
    add = parser.add_argument
    add("collective", choices=[*COLLECTIVES, "all"], metavar="COLLECTIVE", help=f"{', '.join(COLLECTIVES)}, or all")
    add("-b", "--minbytes", type=_bytes, default="1K", help="smallest size, as 1K, 64M, 1G (default 1K)")
    add("-e", "--maxbytes", type=_bytes, help="largest size (default 1G; in emulation 64K)")
    add("-f", "--stepfactor", type=_at_least(2), help="from one size to the next (default 2; in emulation 4)")
    add("-i", "--stepbytes", type=_bytes, help="added from one size to the next, in place of -f")
    add("-n", "--iters", type=_at_least(1), help="calls timed together (default 20; in emulation 2)")
    add("-w", "--warmup_iters", type=_at_least(0), help="calls before that, not timed (default 5; in emulation 1)")
    add("-c", "--check", type=_at_least(0), default=1, help="calls whose every element is checked (default 1)")
    add("-o", "--op", choices=[*OPS, "all"], default="sum", help="of reductions (default sum)")
    add("-d", "--datatype", choices=[*DTYPES, "all"], default="bfloat16", help="element type (default bfloat16)")
    add("-r", "--root", type=_at_least(0), default=0, help="root of broadcast (default 0)")
    add("-G", "--graph", action="store_true", help="time replays of a CUDA graph that holds the timed calls")
    add("-J", "--json", metavar="FILE", type=Path, help="also write the results to FILE")
    add("--placement", type=_list_of(PLACEMENTS), default="plain", help="where buffers lie: plain,symmetric")
    add("--vs", type=_list_of(PEERS), default="", help="time these beside tdccl: nccl,symm,gloo")
    add("--max-blocks", type=_caps, metavar="N,N", help="time all once for each cap on a grid; peers only beside none")
    add("--ranks", type=_at_least(1), help="ranks to spawn without a launcher (default: the GPUs; in emulation 4)")
    parser.set_defaults(**defaults)
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, expected bytes as 512, 1K, 64M or 1G")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def _at_least(least: int):
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number >= {least}")
        return int(text)

    return number


def _caps(text: str) -> list[int | None]:
    number = _at_least(1)
    return list(dict.fromkeys(None if cap == "none" else number(cap) for cap in text.split(",")))


def _list_of(known: tuple[str, ...]):
    def names(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}, expected some of {','.join(known)}")
        return list(dict.fromkeys(chosen))

    return names


def _without_paths(arguments: list[str]) -> list[str]:
    """The arguments less -J FILE: where results were written is nobody's business who reads them."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("-J", "--json"):
            skip = True
        elif not argument.startswith(("-J", "--json=")):
            kept.append(argument)
    return kept
