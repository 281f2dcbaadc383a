"""The entry: `mpirun -n N python -m bench ...`, `torchrun ... -m bench ...`, or `python -m bench ...` alone."""

import sys

from bench import ep, launch, options

if __name__ == "__main__":
    if sys.argv[1:2] == ["ep"]:
        sys.exit(ep.main(sys.argv[2:]))
    sys.exit(launch.main(options.parse(sys.argv[1:])))
