"""Every rank's body of `test_process_group.py`: the torch backend, as a user's program sees it.

torchrun --nproc-per-node 3 tests/torch_face.py
mpirun -n 3 python tests/torch_face.py
"""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as checkpoint

import tdccl

if not hasattr(dist.Backend, "TDCCL"):  # run from a checkout: no entry point is installed
    import tdccl.torch_entry

    tdccl.torch_entry.register()

GPU = torch.cuda.is_available() and os.environ.get("TDCCL_EMULATE", "0") == "0"
GLOO = not GPU and os.environ.get("TDCCL_EMULATE") == "0"  # as on a host with GPUs, whose CPU tensors are Gloo's
Op = dist.ReduceOp


def full(shape, value, dtype=torch.float32):
    return torch.full((shape,) if isinstance(shape, int) else shape, value, dtype=dtype, device=DEVICE)


def same(result, expected):
    expected = torch.as_tensor(expected, dtype=result.dtype, device=result.device)
    assert torch.equal(result, expected.expand_as(result)), (
        f"got {result.flatten()[:9]}, expected {expected.flatten()[:9]}"
    )


def refused(call, *words):
    try:
        call()
    except (RuntimeError, ValueError, AttributeError) as error:
        assert all(word in str(error) for word in words), f"expected {words} in: {error}"
    else:
        raise AssertionError(f"expected a refusal with {words}")


def all_reduce():
    total = SIZE * (SIZE + 1) // 2
    for dtype in (torch.float32, torch.float64, torch.int32, torch.int64):
        tensor = full(1000, RANK + 1, dtype)
        assert dist.all_reduce(tensor) is None
        same(tensor, total)
    everyone = torch.arange(1, SIZE + 1)
    for op, expected in ((Op.MIN, 1), (Op.MAX, SIZE), (Op.PRODUCT, everyone.prod().item())):
        tensor = full(77, RANK + 1)
        dist.all_reduce(tensor, op)
        same(tensor, expected)
    bits = [3 << rank for rank in range(SIZE)]
    anded, ored, xored = bits[0], 0, 0
    for value in bits:
        anded, ored, xored = anded & value, ored | value, xored ^ value
    for op, expected in ((Op.BAND, anded), (Op.BOR, ored), (Op.BXOR, xored)):
        tensor = full(13, bits[RANK], torch.int32)
        dist.all_reduce(tensor, op)
        same(tensor, expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = full(33, RANK + 1, dtype)
        dist.all_reduce(tensor, Op.AVG)
        same(tensor, (SIZE + 1) / 2)
    complexes = torch.complex(full(5, 1.0), full(5, RANK))
    dist.all_reduce(complexes)
    same(complexes.imag, SIZE * (SIZE - 1) / 2)


def complex_sums():
    """As of all_reduce, where it is torch that takes complex numbers for pairs of real ones."""
    pieces = [full(2 * (rank + 1), 1 + 2j * RANK, torch.complex64) for rank in range(SIZE)]
    expected = complex(SIZE, SIZE * (SIZE - 1))
    dist.reduce(pieces[0], SIZE - 1)
    same(pieces[0], expected if RANK == SIZE - 1 else 1 + 2j * RANK)
    pieces[0].fill_(1 + 2j * RANK)
    for piece in ([pieces[-1][:2].clone() for _ in range(SIZE)], pieces):
        mine = torch.zeros_like(piece[RANK])
        dist.reduce_scatter(mine, piece)
        same(mine, expected)
    shard = full(2, 0, torch.complex64)
    dist.reduce_scatter_tensor(shard, full(2 * SIZE, 1 + 2j * RANK, torch.complex64), Op.AVG)
    same(shard, expected / SIZE)
    refused(lambda: dist.reduce_scatter_tensor(shard, shard.repeat(SIZE), Op.PRODUCT), "complex64")


def channels_last():
    """Images and volumes whose channels lie together are taken as they lie in memory, on all ranks alike."""
    for shape, order in (((2, 3, 4, 5), torch.channels_last), ((2, 3, 2, 2, 2), torch.channels_last_3d)):
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device=DEVICE).view(shape)
        make = lambda: (numbers + RANK).contiguous(memory_format=order)  # noqa: E731, B023
        total = numbers * SIZE + SIZE * (SIZE - 1) // 2
        for call, expected in (
            (dist.all_reduce, total),
            (lambda x: dist.all_reduce(x, async_op=True).wait(), total),
            (lambda x: dist.all_reduce_coalesced([x]), total),
            (lambda x: dist.reduce(x, 0), total if RANK == 0 else make()),
            (lambda x: dist.broadcast(x, SIZE - 1), numbers + SIZE - 1),
        ):
            tensor = make()
            call(tensor)
            same(tensor, expected)
        if SIZE > 1 and RANK < 2:
            tensor = make()
            dist.send(tensor, 1) if RANK == 0 else dist.recv(tensor, 0)
            same(tensor, numbers)
    parameter = torch.nn.Parameter(make())
    dist.broadcast(parameter, 0)
    same(parameter.detach(), numbers)


def sparse():
    """Rank r has r + 1 rows; rows at the same place add up."""
    for async_op in (False, True):
        places = torch.arange(RANK + 1, device=DEVICE).view(1, -1)
        tensor = torch.sparse_coo_tensor(places, full((RANK + 1, 3), RANK + 1.0), (SIZE + 2, 3))
        work = dist.all_reduce(tensor, async_op=async_op)
        if async_op:
            work.wait()
        expected = torch.zeros(SIZE + 2, 3)
        for rank in range(SIZE):
            expected[: rank + 1] += rank + 1
        same(tensor.to_dense(), expected.to(DEVICE))
    nobody = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0), (4,)).to(DEVICE)
    dist.all_reduce(nobody)
    same(nobody.to_dense(), 0)
    refused(lambda: dist.all_reduce(nobody, dist.ReduceOp.MAX), "sparse", "SUM")


def bools_are_truth_values():
    alone, odd = SIZE == 1, SIZE % 2 == 1
    table = {Op.SUM: (True, True), Op.MAX: (True, True), Op.MIN: (alone, True), Op.PRODUCT: (alone, True),
             Op.BAND: (alone, True), Op.BOR: (True, True), Op.BXOR: (True, odd)}  # fmt: skip
    for op, expected in table.items():
        tensor = torch.tensor([RANK == 0, True, False], device=DEVICE)
        dist.all_reduce(tensor, op)
        same(tensor, [*expected, False])


def all_gather():
    expected = torch.arange(SIZE).repeat_interleave(6)
    shard = full((3, 2), RANK)
    for shape in ((3 * SIZE, 2), (SIZE, 3, 2)):
        gathered = full(shape, -1)
        dist.all_gather_into_tensor(gathered, shard)
        same(gathered.flatten(), expected)
    pieces = [full((3, 2), -1) for _ in range(SIZE)]
    dist.all_gather(pieces, shard)
    for rank, piece in enumerate(pieces):
        same(piece, rank)
    columns = full((2, SIZE), -1)  # views that torch's own callers hand in: strided, and unlike the input in shape
    dist.all_gather([columns[:, rank] for rank in range(SIZE)], full((4, 2), RANK)[:2, 0])
    same(columns, torch.arange(SIZE))
    coalesced = [[full(2, -1), full((3, 2), -1)] for _ in range(SIZE)]
    dist.all_gather_coalesced(coalesced, [full(2, RANK), full((3, 2), RANK + 10)])
    for rank, (first, second) in enumerate(coalesced):
        same(first, rank)
        same(second, rank + 10)
    parameters = [torch.nn.Parameter(full(3, -1)) for _ in range(SIZE)]
    dist.all_gather(parameters, torch.nn.Parameter(full(3, RANK)))
    same(torch.stack(parameters).detach()[:, 0], torch.arange(SIZE))


def reduce_scatter():
    total = SIZE * (SIZE - 1) // 2
    source = torch.arange(4 * SIZE, dtype=torch.float32, device=DEVICE) + RANK
    mine = torch.arange(4 * RANK, 4 * RANK + 4) * SIZE + total
    result = full(4, -1)
    dist.reduce_scatter_tensor(result, source)
    same(result, mine)
    dist.reduce_scatter(result, [piece.clone() for piece in source.chunk(SIZE)], Op.MAX)
    same(result, torch.arange(4 * RANK, 4 * RANK + 4) + SIZE - 1)
    result = full((4, 2), -1)[:, 0]
    dist.reduce_scatter(result, list(source.chunk(SIZE)))
    same(result, mine)


def broadcast():
    for root in range(SIZE):
        for dtype in (torch.float32, torch.uint8, torch.bool, torch.complex64, torch.int16):
            tensor = full((5, 3), int(root == RANK), dtype)
            dist.broadcast(tensor, root)
            same(tensor, 1)
    parameter = torch.nn.Parameter(full(9, RANK))
    dist.broadcast(parameter, SIZE - 1)
    same(parameter.detach(), SIZE - 1)


def all_to_all():
    source = torch.arange(2 * SIZE, device=DEVICE) + 100 * RANK
    result = torch.empty_like(source)
    dist.all_to_all_single(result, source)
    same(result, torch.cat([torch.arange(2 * RANK, 2 * RANK + 2) + 100 * rank for rank in range(SIZE)]))

    rows = [[(i + 2 * j) % 4 for j in range(SIZE)] for i in range(SIZE)]  # rank i sends rank j so many rows
    sends, receives = rows[RANK], [rows[i][RANK] for i in range(SIZE)]
    source = full((sum(sends), 3), RANK)
    result = full((sum(receives), 3), -1)
    dist.all_to_all_single(result, source, receives, sends)
    same(result[:, 0], torch.arange(SIZE).repeat_interleave(torch.tensor(receives)))

    for uneven in (False, True):
        counts = (lambda i, j: 2 + (i + j) % 3) if uneven else (lambda i, j: 2)
        inputs = [full((counts(RANK, j), 2), 10 * RANK + j) for j in range(SIZE)]
        outputs = [full((counts(i, RANK), 2), -1) for i in range(SIZE)]
        dist.all_to_all(outputs, inputs)
        for rank, output in enumerate(outputs):
            same(output, 10 * rank + RANK)


def asynchronous():
    tensors = [full(50_000, i + RANK) for i in range(3)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for i, (work, tensor) in enumerate(zip(works, tensors)):
        assert work.wait()
        same(tensor, SIZE * i + SIZE * (SIZE - 1) / 2)
    work = dist.all_reduce(full(10, 1), async_op=True)
    doubled = work.get_future().then(lambda future: future.value()[0] * 2)
    same(doubled.wait(), 2 * SIZE)
    gathered = full(2 * SIZE, -1)
    dist.all_gather_into_tensor(gathered, full(2, RANK), async_op=True).wait()
    same(gathered, torch.arange(SIZE).repeat_interleave(2))
    pieces = [full(2, -1) for _ in range(SIZE)]
    dist.all_gather(pieces, full(2, RANK), async_op=True).wait()
    same(torch.stack(pieces)[:, 0], torch.arange(SIZE))
    dist.barrier(async_op=True).wait()
    if GPU:
        torch.cuda.synchronize()
    assert work.is_completed()


def streams():
    """A call is ordered after the work that its stream has yet to do, and inputs may be dropped at once."""
    for asynchronous in (False, True):
        for count in (1000, 1 << 20):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000 * (RANK + 1))
                tensor = full(count, RANK + 1)
                result = full(count * SIZE, -1)
                work = dist.all_gather_into_tensor(result, tensor, async_op=asynchronous)
                del tensor
                garbage = full(count, 99)
                if work:
                    work.wait()
                same(result.view(SIZE, count)[:, -1], torch.arange(1, SIZE + 1))
                del garbage


def ends():
    """The end of an asynchronous call is where it was, whatever the group is given after it."""
    side = torch.cuda.Stream()
    first = dist.all_reduce(full(1000, 1), async_op=True)
    torch.cuda._sleep(1_000_000_000)
    second = dist.all_reduce(full(1000, 1), async_op=True)
    with torch.cuda.stream(side):
        first.wait()
    side.synchronize()
    assert first.is_completed() and not second.is_completed()
    second.wait()


def futures_without_results():
    """Who waits for the future of a barrier, or of a block of calls, waits for their end."""
    side, ended = torch.cuda.Stream(), torch.cuda.Event()
    for begin in (barrier_begun, block_begun):
        torch.cuda._sleep(1_000_000_000)
        future = begin().get_future()
        with torch.cuda.stream(side):
            future.wait()
            ended.record()
        assert not ended.query()
        side.synchronize()


def barrier_begun():
    return dist.barrier(async_op=True)


def block_begun():
    with dist._coalescing_manager(device=DEVICE, async_ops=True) as manager:
        dist.all_reduce(full(1000, 1))
    (work,) = manager.works
    return work


def one_after_another():
    """Calls on two streams share scratch, so that the second waits for the first, on the default stream, too."""
    side, first = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)
    dist.all_reduce(full(1000, 1))
    first.record()
    with torch.cuda.stream(side):
        dist.all_reduce(full(1000, 1))
    side.synchronize()
    assert first.query()


def first_in_a_thread():
    """A thread need not have used the GPU before its first call, be it one that was made before or not."""
    failures = []

    def body(tensor):
        try:
            dist.all_reduce(tensor)
        except Exception as error:
            failures.append(error)

    for count, made_before in ((1000, True), (77, False)):
        tensor = full(count, 1)
        if made_before:
            dist.all_reduce(tensor)
        thread = threading.Thread(target=body, args=(tensor,))
        thread.start()
        thread.join()
        assert not failures, failures
        same(tensor, SIZE ** (1 + made_before))


def streams_of_torch():
    """What waits for a message holds up none of the streams that torch deals out, nor who makes memory or looks for
    messages beside it."""
    if SIZE == 1:
        return
    awaited, told, value = full(3, -1), full(3, -1), full(1, 1)
    torch.cuda.synchronize()  # not once something waits
    work = dist.irecv(awaited, 1) if RANK == 0 else None
    for _ in range(40):
        with torch.cuda.stream(torch.cuda.Stream()):
            assert (value + 1).item() == 2
    dist.group.WORLD.communicator.empty(16)
    if RANK == 0:
        dist.send(told, 1)
        work.wait()
        same(awaited, 7)
    elif RANK == 1:
        dist.recv(told, 0)
        dist.send(full(3, 7), 0)


def coalesced():
    tensors = [full(10 + i, RANK) for i in range(3)]
    with dist._coalescing_manager(device=DEVICE, async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor)
    manager.wait()
    with dist._coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor)
    for tensor in tensors:
        same(tensor, SIZE * SIZE * (SIZE - 1) // 2)
    gathered, scattered = [full(4 * SIZE, -1) for _ in range(2)], [full(4, -1) for _ in range(2)]
    with dist._coalescing_manager():
        for output in gathered:
            dist.all_gather_into_tensor(output, full(4, RANK))
    with dist._coalescing_manager():
        for output, source in zip(scattered, gathered):
            dist.reduce_scatter_tensor(output, source)
    for output in scattered:
        same(output, SIZE * RANK)


def coalesced_messages():
    """The one Work of a block has waited for its messages, though they do not go where its collectives go."""
    if SIZE == 1:
        return
    for ask in (lambda work: work.wait(), lambda work: work.get_future().wait()):
        into, total = full(5, -1), full(3, 1)
        with dist._coalescing_manager(device=DEVICE, async_ops=True) as manager:
            dist.irecv(into, (RANK - 1) % SIZE)
            time.sleep(0.3 * (RANK == 0))
            dist.isend(full(5, RANK), (RANK + 1) % SIZE)
            dist.broadcast(total, 0, async_op=True)
        (work,) = manager.works
        ask(work)
        same(into, (RANK - 1) % SIZE)
        assert GPU or work.is_success()


def functionals():
    world = dist.group.WORLD
    same(functional.all_reduce(full(8, RANK + 1), "sum", world), SIZE * (SIZE + 1) / 2)
    same(functional.all_gather_tensor(full(2, RANK), 0, world), torch.arange(SIZE).repeat_interleave(2))
    same(functional.reduce_scatter_tensor(full(2 * SIZE, 1), "sum", 0, world), SIZE)
    same(functional.broadcast(full(4, RANK), SIZE - 1, world), SIZE - 1)
    exchanged = functional.all_to_all_single(full(SIZE, RANK), [1] * SIZE, [1] * SIZE, world)
    same(exchanged, torch.arange(SIZE))


def objects():
    everyone = [None] * SIZE
    dist.all_gather_object(everyone, {"rank": RANK, "text": "x" * RANK})
    assert [thing["rank"] for thing in everyone] == list(range(SIZE)), everyone
    things = [("from", SIZE - 1), 7] if RANK == SIZE - 1 else [None, None]
    dist.broadcast_object_list(things, SIZE - 1)
    assert things == [("from", SIZE - 1), 7], things


def groups():
    for members in ([0], list(range(1, SIZE)), list(range(SIZE))[::-1], [0, SIZE - 1]):
        members = sorted(set(members)) or [0]
        group = dist.new_group(members)
        if RANK in members:
            tensor = full(20, RANK + 1)
            dist.all_reduce(tensor, group=group)
            same(tensor, sum(members) + len(members))
            dist.broadcast(tensor, members[-1], group=group)
            dist.barrier(group=group)
            dist.destroy_process_group(group)
    group = dist.new_group(list(range(SIZE)), timeout=timedelta(seconds=77))  # left for the end to destroy
    dist.barrier(group=group)


def symmetric_memory():
    """Tensors made in a group's symmetric memory, the default group's where none is given, are not copied."""
    group = dist.new_group(list(range(SIZE)))
    for given, communicator in ((None, dist.group.WORLD.communicator), (group, group.communicator)):
        pieces = [full(4, -1) for _ in range(SIZE)] if RANK == 0 else None
        with tdccl.symmetric(given):
            tensor = full(50_000, RANK)
            dist.gather(tensor[:4], pieces, 0)  # for which the root alone needs a buffer
            dist.scatter(tensor[:4], pieces, 0)
        assert communicator.explain("all_reduce", tensor, tensor).call.symmetric == {"send", "recv"}
        dist.all_reduce(tensor, group=given)
        same(tensor, SIZE * (SIZE - 1) // 2)
    dist.destroy_process_group(group)
    same(tensor, SIZE * (SIZE - 1) // 2)


def threads():
    """DDP calls from autograd's threads: one group and stream for each of two threads, at the same time."""
    failures = []

    def body(group, value):
        try:
            with torch.cuda.stream(torch.cuda.Stream(DEVICE)) if GPU else contextlib.nullcontext():
                for _ in range(3):
                    tensor = full(100, value)
                    dist.all_reduce(tensor, group=group)
                    same(tensor, SIZE * value)
        except Exception as error:
            failures.append(error)

    groups = [dist.new_group(list(range(SIZE))) for _ in range(2)]
    for group in groups:
        dist.barrier(group=group)  # connects it: threads may come in another order on another rank
    workers = [threading.Thread(target=body, args=(group, i + 1)) for i, group in enumerate(groups)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures


def data_parallel():
    torch.manual_seed(RANK)
    model = torch.nn.Linear(4, 3).to(DEVICE)
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[DEVICE.index] if GPU else None)
    torch.manual_seed(7)
    inputs = torch.randn(SIZE, 5, 4).to(DEVICE)
    model(inputs[RANK]).square().mean().backward()
    alone = torch.nn.Linear(4, 3).to(DEVICE)
    alone.load_state_dict(model.module.state_dict())
    alone(inputs).square().mean().backward()
    torch.testing.assert_close(model.module.weight.grad, alone.weight.grad)


def rooted():
    """reduce, gather and scatter, with every rank as the root."""
    for root in range(SIZE):
        tensor = full(1000, RANK + 1)
        dist.reduce(tensor, root, Op.SUM)
        same(tensor, SIZE * (SIZE + 1) // 2 if root == RANK else RANK + 1)
        work = dist.reduce(tensor.fill_(RANK), root, Op.MAX, async_op=True)
        work.wait()
        same(tensor, SIZE - 1 if root == RANK else RANK)
        pieces = [full((3, 5), -1) for _ in range(SIZE)] if root == RANK else None
        dist.gather(full((3, 5), RANK), pieces, root)
        for rank, piece in enumerate(pieces or []):
            same(piece, rank)
        shares = [full((4, 2), 10 * root + rank) for rank in range(SIZE)] if root == RANK else None
        share = full((4, 2), -1)
        dist.scatter(share, shares, root)
        same(share, 10 * root + RANK)


def called_directly():
    """A group's own methods take bare tensors, an op, a root and a timeout in the place of lists and options."""
    group, total, last = dist.group.WORLD, SIZE * (SIZE + 1) // 2, SIZE - 1
    second, everyone = timedelta(seconds=50), torch.arange(1, SIZE + 1)

    def result(call, value=RANK + 1):
        tensor = full(3, value)
        call(tensor).wait()
        return tensor

    same(result(group.allreduce), total)
    same(result(lambda x: group.allreduce([x], Op.MAX)), SIZE)
    same(result(lambda x: group.allreduce(x, Op.MIN, second)), 1)
    same(result(lambda x: group.allreduce(x, op=Op.MAX, timeout=second)), SIZE)
    same(result(lambda x: group.broadcast(x, last)), SIZE)
    same(result(lambda x: group.reduce(x, last, Op.SUM)), total if last == RANK else RANK + 1)
    gathered = [full(3, -1) for _ in range(SIZE)]
    result(lambda x: group.allgather(gathered, x))
    same(torch.stack(gathered)[:, 0], everyone)
    same(result(lambda x: group.reduce_scatter(x, [full(3, rank + 1) for rank in range(SIZE)])), SIZE * (RANK + 1))
    same(result(lambda x: group.scatter(x, [piece + 1 for piece in gathered] if RANK == 0 else [], 0)), RANK + 2)
    result(lambda x: group.gather(gathered if last == RANK else [], x, root=last), value=RANK - 1)
    same(torch.stack(gathered)[:, 0], everyone - 2 if last == RANK else everyone)
    group.barrier(timeout=second).wait()
    refused(lambda: group.allreduce(full(3, 1), operation=Op.MAX), "operation")


def timeout_set_later():
    """It holds for a group's calls from then on."""
    group = dist.new_group(list(range(SIZE)))
    dist.barrier(group=group)
    group.set_timeout(timedelta(seconds=0.3))
    if SIZE > 1 and RANK == 0:
        refused(lambda: dist.barrier(group=group), "0.3 s")
    dist.barrier()
    dist.destroy_process_group(group)


def uneven_lists():
    """all_gather and reduce_scatter of pieces of different sizes, one of them empty."""
    gathered = [full((rank, 3), -1) for rank in range(SIZE)]
    dist.all_gather(gathered, full((RANK, 3), RANK))
    for rank, piece in enumerate(gathered):
        same(piece, rank)
    reduced = full(2 * RANK, -1)
    dist.reduce_scatter(reduced, [full(2 * rank, RANK + rank) for rank in range(SIZE)])
    same(reduced, SIZE * (SIZE - 1) // 2 + SIZE * RANK)


def scaled_sums():
    """PREMUL_SUM: the sum of the inputs times a factor, as FSDP divides gradients."""
    tensor = full(100, RANK + 1.0)
    dist.all_reduce(tensor, dist._make_nccl_premul_sum(0.5))
    same(tensor, SIZE * (SIZE + 1) / 4)
    shard = full(10, 0.0)
    dist.reduce_scatter_tensor(shard, full(10 * SIZE, RANK + 1.0), dist._make_nccl_premul_sum(0.25))
    same(shard, SIZE * (SIZE + 1) / 8)
    large = full(1 << 20, RANK + 1.0)
    work = dist.all_reduce(large, dist._make_nccl_premul_sum(0.5), async_op=True)
    full(1 << 20, -1)  # would take the memory of the product, if that were free already
    work.wait()
    same(large, SIZE * (SIZE + 1) / 4)


def messages():
    """send and recv: in order, both ways at once, in batches, from whoever comes first, more than the channel holds."""
    if SIZE == 1:
        return
    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    for count in (1, 1000, 300_000 if GPU else 20_000):
        into = full(count, -1)
        if RANK == 0:
            dist.send(full(count, RANK), right)
            dist.recv(into, left)
        else:
            dist.recv(into, left)
            dist.send(full(count, RANK), right)
        same(into, left)
        works = [dist.isend(full(count, RANK + 7), right), dist.irecv(into, left)]
        same(works[1].get_future().then(lambda future: future.value()[0]).wait(), left + 7)
        works[0].wait()
        same(into, left + 7)
    others = [rank for rank in range(SIZE) if rank != RANK]
    got = {rank: [full(50, -1), full(9, -1)] for rank in others}
    batch = []
    for rank in others:
        batch += [dist.P2POp(dist.isend, full(50, 10 * RANK + rank), rank)]
        batch += [dist.P2POp(dist.irecv, tensor, rank) for tensor in got[rank]]
        batch += [dist.P2POp(dist.isend, full(9, RANK), rank)]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    for rank, (large, small) in got.items():
        same(large, 10 * rank + RANK)
        same(small, rank)
    if RANK == 0:
        sources = set()
        for _ in others:
            tensor = full(20, -1)
            source = dist.recv(tensor)
            same(tensor, source)
            sources.add(source)
        assert sources == {*others}
    else:
        dist.send(full(20, RANK), 0)
    dist.barrier()


def messages_before_any_collective():
    """A group that was made for a device, as init_process_group and new_group do on GPUs, lets two ranks begin."""
    group = dist.new_group(list(range(SIZE)))
    group._get_backend(DEVICE).eager_connect_single_device(DEVICE)
    into = full(3, -1)
    if SIZE > 1 and RANK < 2:
        dist.send(full(3, 4), 1, group=group) if RANK == 0 else dist.recv(into, 0, group=group)
        same(into, 4 * RANK if RANK else -1)
    dist.barrier()
    dist.destroy_process_group(group)


def messages_of_anyone():
    """A receive from anyone does not wait in the call, and takes its message before receives that come after it."""
    if SIZE == 1:
        return
    if RANK == 0:
        first, second, third = (full(30_000, -1) for _ in range(3))
        works = [dist.irecv(first), dist.irecv(second, 1), dist.irecv(third)]
        assert not works[0].is_completed()
        dist.send(full(1, 5), 1)
        dist.barrier()  # which rank 1 comes to when its messages, more than the channel holds, have been taken
        for work, tensor, value in zip(works, (first, second, third), (6, 7, 8)):
            work.wait()
            same(tensor, value)
            assert work.is_completed() and work.is_success()
        assert works[0]._source_rank() == works[2]._source_rank() == 1
    else:
        if RANK == 1:
            told = full(1, -1)
            dist.recv(told, 0)
            for more in (1, 2, 3):
                dist.send(full(30_000, told.item() + more), 0)
        dist.barrier()
    group = dist.new_group(list(range(SIZE)))
    dist.barrier(group=group)
    work = dist.irecv(full(3, -1), group=group) if RANK == 0 else None
    dist.destroy_process_group(group)
    if work:
        refused(work.wait, "destroyed")


def monitored():
    """A barrier of our own that names who is missing."""
    group = dist.group.WORLD
    group.monitored_barrier(timedelta(seconds=30))
    if SIZE > 1:
        if RANK == 0:
            refused(lambda: group.monitored_barrier(timedelta(seconds=1)), f"Rank {SIZE - 1} failed")
        elif RANK < SIZE - 1:
            refused(lambda: group.monitored_barrier(timedelta(seconds=1)), "successfully reached")
        else:
            group._barriers += 1  # it never came
    dist.barrier()


def refusals():
    """What is not offered, or does not fit, is refused in words on every rank, and the group goes on."""
    tensor = full(12, 1)
    refused(lambda: dist.all_reduce(full((4, 4), 1).t()[1:]), "contiguous")
    refused(lambda: dist.all_reduce(full(4, 1.0), Op.BAND), "and", "float32")
    refused(lambda: dist.all_gather([full(2, 1)] * (SIZE + 1), full(2, 1)), str(SIZE))
    refused(lambda: dist.all_gather([full(3, 1)] * SIZE, full(2, 1)), "3", "2")
    refused(lambda: dist.all_to_all_single(full(SIZE, 1), full(SIZE, 1), [1] * (SIZE + 1), [1] * SIZE), "splits")
    dist.all_reduce(tensor)
    same(tensor, SIZE)


def groups_made_again():
    """A group of the same ranks starts afresh, though the store has seen them before."""
    for value in (3, 4):
        group = dist.new_group(list(range(SIZE)))
        tensor = full(8, value)
        dist.all_reduce(tensor, group=group)
        same(tensor, value * SIZE)
        dist.destroy_process_group(group)


def cpu_tensors():
    """On a host with GPUs they are Gloo's, next to our own; in emulation this is one more round."""
    everyone = torch.arange(SIZE).float()
    tensor = torch.full((4,), float(RANK))
    dist.all_reduce(tensor, Op.MAX)
    assert tensor.tolist() == [SIZE - 1] * 4
    dist.broadcast(tensor.fill_(RANK), SIZE - 1)
    assert tensor.tolist() == [SIZE - 1] * 4
    gathered = torch.empty(SIZE)
    dist.all_gather_into_tensor(gathered, torch.tensor([float(RANK)]), async_op=True).wait()
    assert torch.equal(gathered, everyone)
    pieces = [torch.empty(1) for _ in range(SIZE)]
    dist.all_gather(pieces, torch.tensor([float(RANK)]))
    assert torch.equal(torch.cat(pieces), everyone)
    mine = torch.empty(1)
    dist.reduce_scatter_tensor(mine, everyone + RANK)
    assert mine.item() == SIZE * RANK + SIZE * (SIZE - 1) / 2
    for splits in (None, [1] * SIZE):
        dist.all_to_all_single(gathered, everyone + 10 * RANK, splits, splits)
        assert torch.equal(gathered, 10 * everyone + RANK)


def saved_beside():
    """A checkpoint that is written while the program goes on; torch wants a backend for the CPU by name."""
    folder = [tempfile.mkdtemp() if RANK == 0 else None]
    dist.broadcast_object_list(folder, 0)
    saved, loaded = {"x": torch.arange(5)}, {"x": torch.zeros(5, dtype=torch.int64)}
    checkpoint.async_save(saved, checkpoint_id=folder[0]).result()
    checkpoint.load(loaded, checkpoint_id=folder[0])
    assert torch.equal(loaded["x"], saved["x"])


EVERYWHERE = [
    all_reduce, complex_sums, channels_last, sparse, bools_are_truth_values, all_gather, reduce_scatter, broadcast,
    all_to_all, asynchronous,
    coalesced, coalesced_messages, functionals, objects, groups, symmetric_memory, threads, data_parallel, rooted,
    called_directly, timeout_set_later, uneven_lists, scaled_sums, messages, messages_before_any_collective,
    messages_of_anyone, monitored, refusals, groups_made_again,
    cpu_tensors,
]  # fmt: skip
ON_GPUS = (
    [streams, ends, futures_without_results, one_after_another, first_in_a_thread, streams_of_torch] if GPU else []
)
AT_FIRST = [cpu_tensors] if GLOO else [*EVERYWHERE, *ON_GPUS]
# In a default group made anew.
AGAIN = [cpu_tensors, objects, saved_beside] if GLOO else [all_reduce, groups, messages, monitored]


def main():
    global RANK, SIZE, DEVICE
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)))
    DEVICE = torch.device("cuda", local % torch.cuda.device_count()) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(DEVICE)
    for again in (False, True):  # on the store of the first time, under torchrun
        backend = "cpu:gloo,cuda:tdccl" if GLOO and again else "tdccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=100))
        RANK, SIZE = dist.get_rank(), dist.get_world_size()
        assert dist.get_backend() == "tdccl" or backend != "tdccl"
        for check in AGAIN if again else AT_FIRST:
            try:
                check()
            except Exception as error:
                raise AssertionError(f"rank {RANK} of {SIZE}, {check.__name__}: {error}") from error
            if not again:
                sys.stdout.write(f"works: {check.__name__}\n")  # in one piece, because the ranks share it
                sys.stdout.flush()
        if not GLOO:
            dist.barrier()
        dist.destroy_process_group()
    print(f"rank {RANK} of {SIZE}: ok", flush=True)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(int(os.environ.get("PATIENCE", 240)), exit=True)  # a hang says where
    main()
