"""Symmetric memory that torch allocates under `tdccl.symmetric()`."""

import contextlib

import pytest
import torch
import torch.distributed as dist

import tdccl
from tdccl import communicator
from tdccl.transport import Region, Regions

COUNT = 50_000  # floats: more than packets take, so that a call is zero-copy or staged


@contextlib.contextmanager
def group_of(comm):
    """A communicator of all ranks with symmetric memory of its own."""
    own = comm.split(0, comm.rank)
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
