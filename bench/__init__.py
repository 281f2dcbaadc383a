"""Times and checks tdccl's collectives: `mpirun -n 4 python -m bench all_reduce`, read like nccl-tests."""
