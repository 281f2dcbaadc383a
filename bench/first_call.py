"""How long the first call of a process takes, with kernels from a pack and without one.

`python -m bench.first_call --pack PACK` starts fresh processes, one a GPU, three times: with the pack, without one and
with Triton's cache empty, and without one but with the cache that the last processes filled. It prints, of the slowest
rank, the time of the first all_reduce until its result is there, of the second, and from the start of the process.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time

_COLUMNS = ("first call, ms", "second call, ms", "process, s")


def measure(nbytes: int) -> list[float]:
    """One rank's numbers, as in _COLUMNS."""
    import torch

    import tdccl

    with tdccl.init() as comm:
        x = torch.ones(nbytes // 2, dtype=torch.bfloat16, device=comm.device)
        torch.cuda.synchronize()
        calls = []
        for _ in range(2):
            comm._bootstrap.barrier()  # a barrier on the device would be the first call
            started = time.perf_counter()
            comm.all_reduce(x, x)
            torch.cuda.synchronize()
            calls.append(1e3 * (time.perf_counter() - started))
        seconds = time.time() - float(os.environ["STARTED"])
        assert (x == comm.size**2).all()
    return [*calls, seconds]


def run(ranks: int, nbytes: int, settings: dict[str, str]) -> list[float]:
    """The slowest rank's numbers, from fresh processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    shared = {**os.environ, **settings, "TDCCL_INIT": address, "WORLD_SIZE": str(ranks), "STARTED": str(time.time())}
    command = [sys.executable, "-m", "bench.first_call", "--measure", str(nbytes)]
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    answers = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed, see above")
    return [max(column) for column in zip(*(json.loads(answer.splitlines()[-1]) for answer in answers))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.first_call", description=__doc__)
    parser.add_argument("--pack", help="as `python -m tdccl.aot build` wrote it, for this GPU and so many ranks")
    parser.add_argument("--ranks", type=int, help="default: one a GPU")
    parser.add_argument("--bytes", type=int, default=1 << 20, help="of the message (default: %(default)s)")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    import torch

    ranks = options.ranks or torch.cuda.device_count()
    if not ranks:
        parser.error("there is no GPU here")
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as other:
        rows = {}
        if options.pack:
            rows["pack"] = {"TDCCL_AOT": os.path.abspath(options.pack), "TRITON_CACHE_DIR": other}
        rows["no pack, empty cache"] = {"TDCCL_AOT": "", "TRITON_CACHE_DIR": cache}
        rows["no pack, full cache"] = rows["no pack, empty cache"]
        print(f"all_reduce of {options.bytes} bytes of bfloat16 on {ranks} x {torch.cuda.get_device_name()}")
        print(f"{'':22}" + "".join(f"{column:>20}" for column in _COLUMNS))
        for name, settings in rows.items():
            print(f"{name:22}" + "".join(f"{number:20.2f}" for number in run(ranks, options.bytes, settings)))


if __name__ == "__main__":
    main()
