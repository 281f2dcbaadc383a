"""How soon faults are seen: `python -m bench.faults -J FILE` tries each one of the table on ranks of its own."""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from bench import fault_table, output
from bench.crew import ON_GPU, Crew


def main() -> None:
    """Tries every fault, prints what was seen and how soon, and writes it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    parser.add_argument("-n", "--ranks", type=int, help="default: one a GPU, 4 in emulation")
    parser.add_argument("-r", "--repeat", type=int, default=3, help="how often each is tried (default: 3)")
    parser.add_argument("-J", "--json", type=Path, help="write the times to this file")
    options = parser.parse_args()
    crew = Crew(options.ranks or (torch.cuda.device_count() if ON_GPU else 4))
    rows = []
    for fault in fault_table.table():
        outcomes = [crew.run(fault) for _ in range(options.repeat)]
        seconds = sorted(outcome.seconds for outcome in outcomes)
        rows.append({"fault": fault.name, "error": fault.error, "waited_s": fault.waited, "seconds": seconds})
        print(f"{fault.name:45} {fault.error:15} {seconds[0]:8.3f} .. {seconds[-1]:.3f} s", flush=True)
    crew.close()
    if options.json:
        command = f"python -m bench.faults {shlex.join(sys.argv[1:])}"
        report = {**output.describe(crew.size, torch.device("cuda", 0), command), "faults": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
