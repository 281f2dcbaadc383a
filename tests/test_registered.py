"""Symmetric memory that torch allocates: `tdccl.symmetric()` everywhere, `Communicator.register` on GPUs."""

import contextlib

import pytest
import torch
import torch.distributed as dist

import tdccl
from tdccl import communicator, tuning
from tdccl.transport import Region, Regions, pools

COUNT = 50_000  # floats
# Whatever is fastest here: zero-copy exactly where the memory allows it.
BY_PLACEMENT = tuning.Table(
    "the test",
    {
        "all_reduce": {
            "plain": [tuning.Row(None, "two_shot_staged", {})],
            "symmetric": [tuning.Row(None, "two_shot_pull", {})],
        }
    },
)


@contextlib.contextmanager
def group_of(comm):
    """A communicator of all ranks with symmetric memory of its own."""
    own = comm.split(0, comm.rank)
    own.use_table(BY_PLACEMENT)
    yield own
    own.destroy()


def is_symmetric(comm, tensor) -> bool:
    try:
        comm.symmetric(tensor)
    except tdccl.ArgumentError:
        return False
    return True


def path(comm, tensor) -> str:
    return comm.explain("all_reduce", tensor, tensor).path


def check_sum(comm, tensor):
    """all_reduce in place gives the right sum."""
    tensor.fill_(comm.rank + 1)
    comm.all_reduce(tensor, tensor)
    assert (tensor == comm.size * (comm.size + 1) / 2).all()


def check_model(comm):
    with torch.device(comm.device), group_of(comm) as own:
        with tdccl.symmetric(own):
            model = torch.nn.Sequential(torch.nn.Linear(250, 250), torch.nn.BatchNorm1d(250))
            half = torch.nn.Linear(4, 4, device="cpu").to(comm.device, torch.float16)
        plain = torch.empty(COUNT)
        tensors = [*model.parameters(), *model.buffers(), *half.parameters()]
        assert all(is_symmetric(own, tensor) for tensor in tensors)
        weight = model[0].weight.data
        assert (path(own, weight), path(own, plain)) == ("symmetric", "staged")
        result = model(torch.ones(3, 250)).sum()
        result.backward()
        assert torch.isfinite(model[0].weight.grad).all() and not is_symmetric(own, model[0].weight.grad)
        for tensor in (weight, weight[10:], weight.view(-1)[3:], model[1].running_var):
            check_sum(own, tensor)
    assert weight[9, 0].item() == comm.size * (comm.size + 1) / 2, "tensors outlive their communicator"


def test_a_model_made_under_symmetric_takes_the_zero_copy_path(ranks, world):
    ranks.run(check_model, world)


def makers(device):
    source = torch.arange(12.0, device=device).view(3, 4)
    return [
        lambda: torch.zeros(5, 3, device=device),
        lambda: torch.ones(7, dtype=torch.bool, device=device),
        lambda: torch.full((3,), 2.5, dtype=torch.bfloat16, device=device),
        lambda: torch.arange(100, device=device),
        lambda: torch.tensor([1.0, 2.0], device=device),
        lambda: torch.linspace(0, 1, 11, device=device)[3:],
        lambda: torch.ones_like(source.t()),
        lambda: source.t().contiguous(),
        lambda: source.to(torch.complex64),
        lambda: source.cpu().to(device, copy=True),
        lambda: source @ source.t() + 1,
        lambda: torch.cat([source, source]),
        lambda: source.max(0).indices,
        lambda: torch.nn.Parameter(source.clone()),
    ]


class SpecialParameter(torch.nn.Parameter):
    """A subclass, of which torch's operators hand out plain views."""


def check_operators(comm):
    source = torch.ones(4, device=comm.device)
    parameter = SpecialParameter(source)
    with group_of(comm) as own:
        for number, make in enumerate(makers(comm.device)):
            with tdccl.symmetric(own):
                tensor = make()
            expected = make()
            assert is_symmetric(own, tensor), number
            assert tensor.dtype == expected.dtype and tensor.stride() == expected.stride(), number
            assert torch.equal(tensor, expected), number
            assert tensor.untyped_storage().data_ptr() % 512 == 0, number
        with tdccl.symmetric(own):
            views = [
                source[1:],
                source.view(2, 2),
                source.add_(0),
                torch.add(source, 0, out=source),
                parameter.detach(),
            ]
        assert not any(is_symmetric(own, view) for view in views), "an operator on old memory leaves it where it is"


def test_what_operators_allocate_is_symmetric_and_right(ranks, world):
    ranks.run(check_operators, world)


def check_blocks(comm):
    """Blocks one after another and in one another, tensors small and large, over several arenas."""
    arena = comm._arenas._arena_bytes
    with torch.device(comm.device), group_of(comm) as own, group_of(comm) as other:
        tensors = []
        for count in (3, 1000, arena // 10, 2 * arena, 1, arena // 10):
            with tdccl.symmetric(own):
                tensors += [torch.full((count,), len(tensors) + i, dtype=torch.uint8) for i in range(4)]
        with tdccl.symmetric(own):
            with tdccl.symmetric(own):
                inner = torch.full((9,), 1)
            with tdccl.symmetric(other):
                innermost = torch.full((9,), 2)
            assert is_symmetric(own, inner) and is_symmetric(other, innermost)
            outer = torch.full((9,), 3)
        assert is_symmetric(own, outer) and not is_symmetric(own, innermost)
        for value, tensor in enumerate(tensors):
            assert is_symmetric(own, tensor) and (tensor == value).all()
        for tensor in (inner, outer):
            own.broadcast(tensor, own.size - 1)
        assert inner.tolist() == [1] * 9 and outer.tolist() == [3] * 9


def test_blocks_after_and_within_another(ranks, world):
    ranks.run(check_blocks, world)


def check_exceptions(comm):
    with torch.device(comm.device), group_of(comm) as own:
        with pytest.raises(ZeroDivisionError), tdccl.symmetric(own), tdccl.symmetric(own):
            everywhere = torch.zeros(COUNT)
            _ = 1 // 0
        assert path(own, everywhere) == "staged"
        expected = ZeroDivisionError if comm.rank == own.size - 1 else tdccl.ArgumentError
        with pytest.raises(expected) as raised, tdccl.symmetric(own), tdccl.symmetric(own):
            somewhere = torch.zeros(COUNT)
            _ = 1 // (own.size - 1 - comm.rank)
            torch.zeros(77)
        if expected is tdccl.ArgumentError:
            assert f"rank {own.size - 1} came to an exception: ZeroDivisionError" in str(raised.value)
        assert path(own, somewhere) == "staged"
        with tdccl.symmetric(own):
            after = torch.zeros(COUNT)
        assert path(own, after) == "symmetric"
        for tensor in (everywhere, somewhere, after):
            check_sum(own, tensor)


def test_an_exception_inside_registers_nothing(ranks, world):
    ranks.run(check_exceptions, world)


def check_differing(comm):
    arena = comm._arenas._arena_bytes
    mine = comm.rank == comm.size - 1
    with torch.device(comm.device), group_of(comm) as own:
        for counts, words in (
            ([5, 6 + mine, 7], ["rank 0 came to 6 bytes (aten.", f"rank {own.size - 1} came to 7 bytes (aten."]),
            ([5, 6] + [7] * mine, ["rank 0 came to the end of the block", "came to 7 bytes"]),
            ([5] + [arena] * mine + [6], ["rank 0 came to 6 bytes", f"came to {arena} bytes"]),
            ([arena // 4] * (3 + 4 * mine), ["rank 0 came to the end of the block", f"came to {arena // 4} bytes"]),
        ):
            tensors = []
            with pytest.raises(tdccl.ArgumentError) as raised, tdccl.symmetric(own):
                for count in counts:
                    tensors.append(torch.zeros(count, dtype=torch.uint8))
            assert all(word in str(raised.value) for word in words), raised.value
            assert not any(is_symmetric(own, tensor) for tensor in tensors)
        with tdccl.symmetric(own):
            after = torch.zeros(COUNT)
        check_sum(own, after)
        assert path(own, after) == "symmetric"


def test_ranks_that_make_different_tensors_are_told(ranks, world):
    if world > 1:
        ranks.run(check_differing, world)


def check_latest(comm):
    """Without an argument it is the communicator that init made last, of those alive, and not a part of one."""
    store = dist.PrefixStore("latest", comm._bootstrap._store)

    def made_on():
        with tdccl.symmetric():
            return torch.zeros(3, device=comm.device)

    with tdccl.init(store=store, rank=comm.rank, size=comm.size, device=comm.device, timeout=30) as first:
        with tdccl.init(store=store, rank=comm.rank, size=comm.size, device=comm.device, timeout=30) as second:
            with group_of(second) as part:
                assert is_symmetric(second, made_on())
            assert part._destroyed
        assert is_symmetric(first, made_on())


def test_without_argument_it_takes_the_latest_communicator(ranks, world):
    ranks.run(check_latest, world)


def test_without_a_communicator_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(communicator, "_made", [])
    with pytest.raises(tdccl.ArgumentError, match=r"tdccl\.init"), tdccl.symmetric():
        pass
    with pytest.raises(tdccl.ArgumentError, match="expected a Communicator"), tdccl.symmetric(7):
        pass


def check_destroyed(comm):
    with group_of(comm) as own:
        pass
    with pytest.raises(tdccl.DestroyedError), tdccl.symmetric(own):
        pass


def test_a_destroyed_communicator_is_refused(ranks, world):
    ranks.run(check_destroyed, world)


def test_regions_are_found_by_address():
    memory, other = object(), object()
    regions = Regions()
    assert regions.find(100, 1) is None
    for start, end, owner in ((100, 200, memory), (400, 500, memory), (200, 300, memory), (300, 400, other)):
        regions.add(Region(start, end, owner))
    for address, nbytes, expected in (
        (99, 1, None), (100, 0, memory), (100, 200, memory), (150, 100, memory), (150, 151, None),
        (300, 100, other), (400, 100, memory), (499, 2, None), (600, 0, None),
    ):  # fmt: skip
        assert regions.find(address, nbytes) is expected, (address, nbytes)


# ---- torch's memory pools, which only GPUs have --------------------------------------------------------


class Pool:
    """What torch tells of a pool with segments at these addresses, in the order of their allocation."""

    def __init__(self, *addresses, kinds=("large", "small", "large"), requested=700):
        block = {"size": 1024, "requested_size": requested, "state": "active_allocated"}
        self.segments = [
            {"device": 0, "address": address, "segment_type": kind, "total_size": 1 << 21,
             "blocks": [{**block, "address": address}, {**block, "address": address + 1024, "state": "inactive"}]}
            for address, kind in zip(addresses, kinds)
        ]  # fmt: skip

    def snapshot(self):
        return sorted(self.segments, key=lambda segment: segment["address"])


def layouts_of(monkeypatch, pool, exportable=True):
    allocated = {segment["address"]: number for number, segment in enumerate(pool.segments)}
    known = {"BUFFER_ID": allocated.get, "IS_LEGACY_CUDA_IPC_CAPABLE": lambda address: exportable}
    monkeypatch.setattr(pools, "_attribute", lambda name, address: known[name](address))
    return [segment.layout for segment in pools.segments_of(pool, torch.device("cuda", 0))]


def test_pools_are_compared_in_the_order_of_their_allocation(monkeypatch):
    mine = layouts_of(monkeypatch, Pool(1 << 30, 2 << 30, 3 << 30))
    pools.check_alike([mine, layouts_of(monkeypatch, Pool(8 << 30, 2 << 30, 9 << 30)), mine])
    for other, words in (
        (Pool(1 << 30, 2 << 30), "2 (rank 0 has 2097152 bytes, large, 1 below it, tensors 700 at 0; rank 1 has none"),
        (Pool(1 << 30, 2 << 30, 3 << 30, requested=701), "segment 0 (rank 0 has"),
        (Pool(1 << 30, 2 << 30, 3 << 30, kinds=["large"] * 3), "segment 1 (rank 0 has"),
        (Pool(3 << 30, 2 << 30, 1 << 30), "in another order"),
    ):
        with pytest.raises(tdccl.ArgumentError) as raised:
            pools.check_alike([mine, layouts_of(monkeypatch, other)])
        assert words in str(raised.value), raised.value
    with pytest.raises(tdccl.ArgumentError, match="expandable_segments"):
        pools.check_alike([mine, layouts_of(monkeypatch, Pool(1 << 30), exportable=False)])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="memory pools are torch.cuda's")


def check_refused(comm):
    with pytest.raises(tdccl.ArgumentError, match=r"tdccl\.symmetric\(\)" if comm.device.type == "cpu" else "MemPool"):
        comm.register(None)


def test_what_is_no_pool_is_refused(ranks, world):
    ranks.run(check_refused, world)


def in_pool(pool, *counts):
    """Float tensors made in a pool. One of a MiB or less goes to a small segment, a larger one to a large one."""
    with torch.cuda.use_mem_pool(pool):
        return [torch.zeros(count, device="cuda") for count in counts]


def check_pool(comm):
    with torch.cuda.device(comm.device), group_of(comm) as own:
        pool = torch.cuda.MemPool()
        x, y = in_pool(pool, COUNT, 1000)
        assert path(own, x) == "staged"
        own.register(pool)
        assert path(own, x) == "symmetric" and is_symmetric(own, y)
        for tensor in (x, y, x[7:]):
            check_sum(own, tensor)

        (large,) = in_pool(pool, 20 * COUNT)  # in a segment that is not registered yet
        assert path(own, large) == "staged"
        own.register(pool)
        own.register(pool)
        assert path(own, large) == "symmetric" and len(own._segments) == 2
        for tensor in (large, x):
            check_sum(own, tensor)

        with group_of(comm) as other:
            other.register(pool)
            check_sum(other, large)
        check_sum(own, x)
    assert x[0].item() == comm.size * (comm.size + 1) / 2, "tensors outlive their communicator"


@needs_gpu
def test_a_registered_pool_takes_the_zero_copy_path(ranks, world):
    ranks.run(check_pool, world)


def check_differing_pools(comm):
    last = comm.rank == comm.size - 1
    with torch.cuda.device(comm.device), group_of(comm) as own:
        for counts in ((COUNT, 1000 + last), (COUNT,) + (20 * COUNT,) * last):
            pool = torch.cuda.MemPool()
            tensors = in_pool(pool, *counts)
            with pytest.raises(tdccl.ArgumentError, match=f"rank {own.size - 1} has"):
                own.register(pool)
            assert not any(is_symmetric(own, tensor) for tensor in tensors)
        pool = torch.cuda.MemPool()
        (x,) = in_pool(pool, COUNT)
        own.register(pool)
        check_sum(own, x)


@needs_gpu
def test_ranks_with_different_pools_are_told(ranks, world):
    if world > 1:
        ranks.run(check_differing_pools, world)


def check_expandable(comm):
    """What CUDA IPC cannot share is refused in words."""
    with torch.cuda.device(comm.device), group_of(comm) as own:
        pool = torch.cuda.MemPool()
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        try:
            in_pool(pool, COUNT)
        finally:
            torch.cuda.memory._set_allocator_settings("expandable_segments:False")
        if any(segment["is_expandable"] for segment in pool.snapshot()):
            with pytest.raises(tdccl.ArgumentError, match="expandable_segments"):
                own.register(pool)


@needs_gpu
def test_expandable_segments_are_refused(ranks, world):
    ranks.run(check_expandable, world)


def check_graph(comm):
    """A captured all_reduce of registered memory replays with what is there then."""
    with torch.cuda.device(comm.device), group_of(comm) as own:
        pool = torch.cuda.MemPool()
        (x,) = in_pool(pool, COUNT)
        own.register(pool)
        with tdccl.symmetric(own):
            y = torch.zeros(COUNT, device=comm.device)
        own.all_reduce(x, y)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            own.all_reduce(x, y)
        for step in range(5):
            x.fill_(comm.rank + step)
            own.barrier()  # nobody reads this rank's x before
            graph.replay()
            assert (y == comm.size * step + sum(range(comm.size))).all(), step
            own.barrier()
        assert path(own, x) == "symmetric"


@needs_gpu
def test_a_graph_over_registered_memory(ranks, world):
    ranks.run(check_graph, world)


def check_loans(comm):
    with group_of(comm) as own:
        first, second = own.lend(COUNT), own.lend(COUNT)
        assert is_symmetric(own, first) and is_symmetric(own, second)
        check_sum(own, first)
        home, view = first.data_ptr(), first[5:]
        del first
        assert own.lend(COUNT).data_ptr() not in (home, second.data_ptr()), "a view is left on the first"
        storage = view.untyped_storage()
        del view
        assert own.lend(COUNT).data_ptr() not in (home, second.data_ptr()), "its storage is left on the first"
        del storage
        assert own.lend(2 * COUNT, torch.bfloat16).data_ptr() == home, "only the size in bytes counts"
    assert (second.fill_(3) == 3).all(), "loans outlive their communicator"


def test_lent_memory_is_lent_again_when_it_is_free(ranks, world):
    ranks.run(check_loans, world)


def check_loans_that_differ(comm):
    with group_of(comm) as own:
        kept = [own.lend(10), own.lend(10)]
        kept.pop(comm.rank % 2)  # another on every other rank
        with pytest.raises(tdccl.ArgumentError, match="different places"):
            for _ in range(600):
                own.lend(10)


def test_ranks_that_free_differently_are_found_out(ranks):
    ranks.run(check_loans_that_differ, 2)


def check_a_loan_that_one_rank_holds(comm):
    bootstrap = comm._bootstrap.subgroup([*range(comm.size)], "held")
    own = tdccl.Communicator(bootstrap, comm.device, 10.0)
    bootstrap._timeout = 1.0
    kept = own.lend(10)
    if comm.rank == 0:
        del kept
    else:
        with pytest.raises(tdccl.InitError, match=r"rank 0 did not make new memory of 40.*gc\.collect") as raised:
            own.lend(10)
        assert raised.value.absent == (0,)
    comm._bootstrap.barrier()
    own.destroy()


def test_who_holds_what_others_have_freed_is_told_so(ranks):
    ranks.run(check_a_loan_that_one_rank_holds, 2)
