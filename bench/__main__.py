"""The entry: `mpirun -n N python -m bench ...`, `torchrun ... -m bench ...`, or `python -m bench ...` alone."""

import sys

from bench import launch, options

if __name__ == "__main__":
    sys.exit(launch.main(options.parse(sys.argv[1:])))
