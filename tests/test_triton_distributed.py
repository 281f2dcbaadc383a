"""Kernels written for Triton-distributed run on stock Triton."""

import pool
import ported_kernels
import pytest
import torch
import triton
import triton.language as tl

import tdccl
import tdccl.compat.triton_distributed as dl

WORLDS = (2, 3)


def check_product(comm, rows):
    depth, columns = 40, 72
    group = comm.split(0)
    dl.initialize(group, 1 << 20)
    gathered = dl.create_tensor((comm.size * rows, depth), torch.bfloat16)
    ready = dl.create_tensor((comm.size,), torch.int64)
    generator = torch.Generator().manual_seed(rows)
    shards = [torch.randn(rows, depth, generator=generator).bfloat16().to(comm.device) for _ in range(comm.size)]
    b = torch.randn(depth, columns, generator=generator).bfloat16().to(comm.device)
    c = torch.empty(comm.size * rows, columns, dtype=torch.bfloat16, device=comm.device)
    for _ in range(2):
        ported_kernels.push_rows[(comm.size,)](shards[comm.rank], gathered, ready, rows, depth, SIZE=1024)
        tiles = triton.cdiv(len(c), 32) * triton.cdiv(columns, 64)
        ported_kernels.multiply[(tiles,)](
            gathered, b, c, ready, *c.shape, depth, rows, BLOCK_M=32, BLOCK_N=64, BLOCK_K=32
        )
        wanted = torch.cat(shards).float() @ b.float()
        torch.testing.assert_close(c.float(), wanted, atol=0.15, rtol=0.02)
        group.barrier()
        ready.zero_()  # these kernels' signals do not count calls
        group.barrier()
        c.zero_()
    group.destroy()


@pytest.mark.parametrize("rows", [32, 37])
def test_a_ported_all_gather_and_product(ranks, world, rows):
    ranks.run(check_product, world, rows=rows)


@triton.jit
def meet(counter, flags, seen):
    """Every rank adds to all counters and sets its flag everywhere; then each waits for all."""
    for peer in range(dl.num_ranks()):
        dl.notify(counter, peer, 3, "add")
        dl.notify(flags + dl.rank(), peer, dl.rank() + 1, comm_scope="intra_node")
    token = dl.wait(counter, 1, "sys", "acquire", 3 * dl.num_ranks())
    for peer in range(dl.num_ranks()):
        token = dl.wait(flags + peer, 1, "sys", "acquire", peer + 1)
    tl.store(seen, tl.load(dl.consume_token(counter, token)))


def check_signals(comm, dtype):
    group = comm.split(0)
    dl.initialize(group, 4096)
    counter, flags = dl.create_tensor((1,), dtype), dl.create_tensor((8,), dtype)
    seen = torch.zeros(1, dtype=dtype, device=comm.device)
    meet[(1,)](counter, flags, seen)
    assert seen.item() == 3 * comm.size
    group.barrier()
    group.destroy()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_signals_are_set_and_added(ranks, world, dtype):
    ranks.run(check_signals, world, dtype=dtype)


@triton.jit
def wait_in_vain(signal):
    dl.wait(signal, 1, "sys", "acquire", 5)


def check_bounded(comm):
    group = tdccl.Communicator(comm._bootstrap.subgroup([*range(comm.size)], "vain"), comm.device, 1.0)
    dl.initialize(group, 4096)
    wait_in_vain[(1,)](dl.create_tensor((1,), torch.int64))
    if comm.device.type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(tdccl.Timeout):
        group.check()
    group.destroy()


def test_a_wait_for_nobody_ends(ranks):
    ranks.run(check_bounded, pool.LARGEST_WORLD)


def check_full(comm):
    group = comm.split(0)
    dl.initialize(group, 4096)
    with pytest.raises(tdccl.ArgumentError, match="are left"):
        dl.create_tensor((4097,), torch.uint8)
    group.destroy()


def test_a_full_heap_is_told(ranks):
    ranks.run(check_full, 1)
