"""Every rank's body of `test_training.py`: torch's ways to train in parallel, on "tdccl" and on torch's own backend.

torchrun --nproc-per-node 4 tests/torch_training.py [kinds or names of cases]

A case returns tensors. All cases run on "tdccl", then all again on Gloo (NCCL where there are GPUs), and give the same.
NCCL takes one rank a GPU: where ranks share one, what they did is compared with Gloo's on the CPU, in other processes.
"""

import contextlib
import faulthandler
import os
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as checkpoint
import torch.distributed.nn.functional as differentiable
from torch import nn
from torch.distributed import device_mesh
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

if not hasattr(dist.Backend, "TDCCL"):  # run from a checkout: no entry point is installed
    import tdccl.torch_entry

    tdccl.torch_entry.register()

GPU = torch.cuda.is_available() and os.environ.get("TDCCL_EMULATE", "0") == "0"
COMPILER = os.environ.get("COMPILER", "inductor" if GPU else "aot_eager")  # Inductor compiles C++ for CPUs: slowly
NCCL = False  # whether that is what the results are compared with
WIDTH = 12  # divides by 2, 3 and 4 ranks


class Net(nn.Module):
    def __init__(self, width: int = WIDTH, bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width, bias), nn.Linear(2 * width, width, bias)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


def net(layers: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(Net() for _ in range(layers))).to(DEVICE)


def batch(step: int, rank: int | None = None) -> torch.Tensor:
    torch.manual_seed(1000 * step + (RANK if rank is None else rank))
    return torch.randn(4, WIDTH).to(DEVICE)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def trained(model, optimizer=None, steps: int = 3, loss_of=lambda model, x: model(x).square().mean(), inputs=batch):
    """Losses and parameters of a few steps of training."""
    # Not foreach, which will not mix DTensors with the tensors of layers that are not parallel.
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, foreach=False)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, inputs(step))
        loss.backward()
        optimizer.step()
        losses.append(whole(loss))
    return [*losses, *map(whole, model.parameters())]


# ---- data parallel -----------------------------------------------------------------------------------


def ddp(model=None, **options) -> DistributedDataParallel:
    return DistributedDataParallel(model or net(), device_ids=[DEVICE.index] if GPU else None, **options)


def ddp_many_buckets():
    return trained(ddp(bucket_cap_mb=0.001))


def ddp_static_graph():
    return trained(ddp(static_graph=True))


def ddp_gradient_as_bucket_view():
    return trained(ddp(gradient_as_bucket_view=True))


class Skipping(nn.Sequential):
    """Rank 0 alone goes through all layers."""

    def forward(self, x):
        return super().forward(x) if RANK == 0 else self[0](x)


def ddp_unused_parameters():
    return trained(ddp(Skipping(*net()), find_unused_parameters=True))


def ddp_buffers():
    """BatchNorm's buffers are rank 0's; with SyncBatchNorm, where NCCL has one, too, those of all."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).to(DEVICE)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if NCCL else model
    model = ddp(model)
    results = trained(model)
    model.eval()
    model(batch(9))
    return results + [buffer.clone() for buffer in model.buffers() if RANK == 0]


def ddp_no_sync():
    model = ddp()

    def loss_of(model, x):
        with model.no_sync():
            model(x).square().mean().backward()
        return model(2 * x).square().mean()

    return trained(model, loss_of=loss_of)


def ddp_step_in_a_graph():
    """A whole step, its all_reduces included, captured and replayed; the backend compared with runs it as usual."""
    with torch.cuda.stream(torch.cuda.Stream()) if GPU else contextlib.nullcontext():
        model, inputs = ddp(), batch(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)

        def step():
            optimizer.zero_grad(set_to_none=False)
            model(inputs).square().mean().backward()
            optimizer.step()

        for _ in range(11):  # DDP looks at its own timings in the first ten
            step()
    run = step
    if GPU:
        torch.cuda.synchronize()
    if GPU and dist.get_backend() == "tdccl":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    for number in range(5):
        inputs.copy_(batch(number))
        run()
    return [whole(parameter) for parameter in model.parameters()]


def ddp_uneven_inputs(model=None):
    model = model or ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.join():
        for step in range(1 + RANK):
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            optimizer.step()
    return list(map(whole, model.parameters()))


def ddp_uneven_inputs_and_unused_parameters():
    return ddp_uneven_inputs(ddp(Skipping(*net()), find_unused_parameters=True))


def ddp_bf16_hook():
    model = ddp()

    def hook(group, bucket):  # by another name: DDP takes torch's own on GPUs only
        return default_hooks.bf16_compress_hook(group, bucket)

    model.register_comm_hook(None, hook)
    return trained(model)


def ddp_fp16_hook():
    model = ddp()
    model.register_comm_hook(dist.group.WORLD, default_hooks.fp16_compress_hook)
    return trained(model)


def ddp_power_sgd_hook():
    model = ddp()
    state = powerSGD_hook.PowerSGDState(dist.group.WORLD, 2, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return trained(model)


def zero_redundancy_optimizer():
    model = ddp()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01, eps=1e-3)
    results = trained(model, optimizer)
    optimizer.consolidate_state_dict(to=0)
    if RANK == 0:
        state = optimizer.state_dict()["state"]
        results += [state[key]["exp_avg"].clone() for key in sorted(state)]
    return results


def zero_redundancy_with_ddp_uneven():
    model = ddp()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with Join([model, optimizer]):
        for step in range(1 + RANK):
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            optimizer.step()
    return list(map(whole, model.parameters()))


# ---- fully sharded -----------------------------------------------------------------------------------


def sharded(model, **options):
    for layer in model:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    results = []
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
        model = FullyShardedDataParallel(net(), device_id=DEVICE, sharding_strategy=strategy, use_orig_params=True)
        losses = trained(model)[:3]
        with FullyShardedDataParallel.summon_full_params(model):
            results += losses + [whole(parameter) for parameter in model.parameters()]
    return results


def fsdp1_hybrid():
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    mesh = init_device_mesh(DEVICE.type, (SIZE // 2, 2))
    options = {"device_mesh": mesh, "sharding_strategy": ShardingStrategy.HYBRID_SHARD, "use_orig_params": True}
    model = FullyShardedDataParallel(net(), device_id=DEVICE, **options)
    losses = trained(model)[:3]
    with FullyShardedDataParallel.summon_full_params(model):
        return losses + list(map(whole, model.parameters()))


def fsdp2():
    return trained(sharded(net()))


def fsdp2_mixed_precision():
    return trained(sharded(net(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)))


def fsdp2_kept_after_forward():
    return trained(sharded(net(), reshard_after_forward=False))


def fsdp2_gradient_divide_factor():
    """A factor that is not the number of ranks: a PREMUL_SUM, which Gloo has not."""
    model = sharded(net())
    for part in (*model, model):
        part.set_gradient_divide_factor(5.0)
        part.set_force_sum_reduction_for_comms(dist.get_backend() == "gloo")
    return trained(model)


def fsdp2_in_symmetric_memory():
    """FSDP2's buffers come from the backend, where it has any to offer: collectives on them copy nothing."""
    model = sharded(net())
    for part in (*model, model):
        part.set_allocate_memory_from_process_group_for_comm(True)
    results = trained(model, steps=5)
    if dist.get_backend() == "tdccl":
        for parameter in model.parameters():
            dist.group.WORLD.communicator.symmetric(parameter.grad.to_local())  # raises if it is not there
    return results


def fsdp2_cpu_offload():
    return trained(sharded(net(), offload_policy=CPUOffloadPolicy(pin_memory=GPU)))


def hsdp():
    mesh = init_device_mesh(DEVICE.type, (SIZE // 2, 2), mesh_dim_names=("copies", "shards"))
    return trained(sharded(net(), mesh=mesh))


def hsdp_on_split_groups():
    """Where init_process_group was given a device, which it takes on GPUs only, a mesh splits the default group."""
    world = dist.group.WORLD
    if dist.get_backend() != "tdccl" or (torch.__version__ < (2, 13) and not GPU):  # older ones ask torch.cuda
        return hsdp()
    world.bound_device_id = torch.device(DEVICE.type, DEVICE.index or 0)
    accelerator = {"is_available": lambda: True, "current_accelerator": lambda: world.bound_device_id}
    try:
        with (
            mock.patch.multiple(torch.accelerator, **accelerator),
            mock.patch.object(device_mesh, "new_group", side_effect=AssertionError("not split")),
        ):
            mesh = init_device_mesh(DEVICE.type, (SIZE // 2, 2), mesh_dim_names=("copies", "shards"))
    finally:
        world.bound_device_id = None
    return trained(sharded(net(), mesh=mesh))


def fsdp2_state_dict_of_rank_0():
    """Rank 0's full state goes to all ranks' shards, and back."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    model = sharded(net())
    torch.manual_seed(5)
    full = {name: torch.randn(tensor.shape).to(DEVICE) for name, tensor in net().state_dict().items()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full if RANK == 0 else {}, options=options)
    back = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return list(map(whole, model.parameters())) + [back[name].clone() for name in sorted(back)]


def checkpoint_of_fsdp2():
    """What a sharded model saved, another loads; by all ranks, into one folder."""
    folder = [tempfile.mkdtemp() if RANK == 0 else None]
    dist.broadcast_object_list(folder, 0)
    model = sharded(net())
    trained(model)
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder[0])
    other = sharded(net())
    state = {"model": other.state_dict()}
    checkpoint.load(state, checkpoint_id=folder[0])
    other.load_state_dict(state["model"])
    results = list(map(whole, other.parameters()))
    for loaded, saved in zip(results, model.parameters()):
        assert torch.equal(loaded, whole(saved))
    return results


# ---- tensors spread over ranks -----------------------------------------------------------------------


def tensor_parallel():
    mesh = init_device_mesh(DEVICE.type, (SIZE,))
    model = net()
    for layer in model:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return trained(model, inputs=lambda step: batch(step, rank=0))


def sequence_parallel():
    mesh = init_device_mesh(DEVICE.type, (SIZE,))
    model = net()
    for layer in model:
        plan = {
            "up": ColwiseParallel(input_layouts=Replicate()),
            "down": RowwiseParallel(output_layouts=Shard(0)),
            "norm": SequenceParallel(sequence_dim=0),
        }
        parallelize_module(layer, mesh, plan)

    def forward(layer, x):
        summed = distribute_tensor(x, mesh, [Shard(0)]) if not isinstance(x, DTensor) else x
        y = layer.down(torch.relu(layer.up(summed.full_tensor())))
        return layer.norm(summed + DTensor.from_local(y, mesh, [Shard(0)]))

    def loss_of(model, x):
        for layer in model:
            x = forward(layer, x)
        return x.full_tensor().square().mean()

    torch.manual_seed(3)
    x = torch.randn(WIDTH, WIDTH).to(DEVICE)
    return trained(model, loss_of=loss_of, inputs=lambda step: x * (step + 1))


def parallel_cross_entropy():
    mesh = init_device_mesh(DEVICE.type, (SIZE,))
    torch.manual_seed(4)
    logits, targets = torch.randn(5, 2 * WIDTH).to(DEVICE), torch.randint(2 * WIDTH, (5,)).to(DEVICE)
    spread = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    with loss_parallel():
        loss = nn.functional.cross_entropy(spread, targets)
        loss.backward()
    return [whole(loss), whole(spread.grad)]


def tensor_parallel_inside_fsdp2():
    mesh = init_device_mesh(DEVICE.type, (SIZE // 2, 2), mesh_dim_names=("data", "tensor"))
    model = net()
    for layer in model:
        parallelize_module(layer, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return trained(sharded(model, mesh=mesh["data"]), inputs=lambda step: batch(step, rank=RANK // 2))


def pipeline():
    """Layers one after another on the ranks, which send each other activations and gradients."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

    results = []
    for schedule in (ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B):
        rounds = 2 if schedule is ScheduleInterleaved1F1B else 1  # layers a rank has
        numbers = range(RANK, rounds * SIZE, SIZE)
        layers = [net(rounds * SIZE)[number] for number in numbers]
        stages = [PipelineStage(layer, number, rounds * SIZE, DEVICE) for layer, number in zip(layers, numbers)]
        run = schedule(stages if rounds > 1 else stages[0], 4, loss_fn=lambda out, to: (out - to).square().mean())
        losses = []
        inputs = [batch(0, rank=0)] if RANK == 0 else []
        run.step(*inputs, **({"target": batch(1, rank=0), "losses": losses} if RANK == SIZE - 1 else {}))
        results += [parameter.grad.clone() for layer in layers for parameter in layer.parameters()]
        results += map(whole, losses)
    return results


def dtensor_placements():
    """From every placement to every other; 7 rows do not divide among the ranks."""
    mesh = init_device_mesh(DEVICE.type, (SIZE,))
    results = []
    for shape in ((WIDTH, 2 * WIDTH), (7, 5)):
        tensor = torch.arange(shape[0] * shape[1], dtype=torch.float32, device=DEVICE).view(shape)
        for source in (Shard(0), Shard(1), Replicate(), Partial(), Partial("max")):
            if isinstance(source, Partial):
                spread = DTensor.from_local(tensor * (RANK + 1), mesh, [source])
            else:
                spread = distribute_tensor(tensor, mesh, [source])
            for target in (Shard(0), Shard(1), Replicate()):
                moved = spread.redistribute(mesh, [target])
                results += [moved.to_local().clone(), moved.full_tensor()]
    return results


def dtensor_operators():
    mesh = init_device_mesh(DEVICE.type, (SIZE,))
    torch.manual_seed(6)
    a, b = torch.randn(WIDTH, WIDTH).to(DEVICE), torch.randn(WIDTH, WIDTH).to(DEVICE)
    rows, columns = distribute_tensor(a, mesh, [Shard(0)]), distribute_tensor(b, mesh, [Shard(1)])
    results = [rows @ columns, columns @ rows, rows.sum(), columns.mean(0), rows.softmax(0), columns.argmax(1)]
    return [whole(result) for result in results]


# ---- collectives that autograd and the compiler see --------------------------------------------------


def functional_round(x):
    """All the functional collectives, one after another."""
    world = dist.group.WORLD
    x = functional.all_reduce(x, "avg" if NCCL else "max", world)
    gathered = functional.all_gather_tensor(x + RANK, 0, world)
    summed = functional.reduce_scatter_tensor(gathered * 2, "sum", 0, world)
    exchanged = functional.all_to_all_single(summed, [len(summed) // SIZE] * SIZE, [len(summed) // SIZE] * SIZE, world)
    sums = functional.all_reduce_coalesced([exchanged, summed], "sum", world)
    gathers = functional.all_gather_into_tensor_coalesced(sums, world)
    scattered = functional.reduce_scatter_tensor_coalesced(gathers, "sum", [0, 0], world)
    return functional.broadcast(scattered[0] + scattered[1], SIZE - 1, world) + functional.all_reduce(x, "sum", world)


def functional_eager():
    return [functional_round(batch(0).repeat(3, 1))]


def functional_compiled():
    compiled = torch.compile(functional_round, backend=COMPILER, fullgraph=True)
    x = batch(0).repeat(3, 1)
    result = compiled(x)
    torch.testing.assert_close(result, functional_round(x))
    return [result]


def collectives_compiled():
    """dist's own calls, which the compiler turns into functional ones."""

    def body(x):
        x = x * 2
        dist.all_reduce(x)
        gathered = x.new_empty(SIZE * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x + RANK)
        scattered = torch.empty_like(x)
        dist.reduce_scatter_tensor(scattered, gathered)
        return scattered + 1

    return [torch.compile(body, backend=COMPILER, fullgraph=True)(batch(0))]


def ddp_compiled():
    model = torch.compile(ddp(), backend=COMPILER)
    return trained(model)


def fsdp2_compiled():
    return trained(torch.compile(sharded(net()), backend=COMPILER))


def tensor_parallel_compiled():
    mesh = init_device_mesh(DEVICE.type, (SIZE,))
    model = net()
    for layer in model:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    compiled = torch.compile(model, backend=COMPILER, fullgraph=True)
    return trained(compiled, inputs=lambda step: batch(step, rank=0))


def autograd_collectives():
    """Values and gradients of torch.distributed.nn.functional."""
    results = []

    def check(call, x):
        x = x.clone().requires_grad_()
        result = call(x)
        result = torch.cat([piece.flatten() for piece in result]) if isinstance(result, (tuple, list)) else result
        (result * torch.arange(result.numel(), device=DEVICE).view(result.shape)).sum().backward()
        results.extend([whole(result), x.grad])

    x = batch(0).flatten()
    check(differentiable.all_reduce, x)
    check(lambda x: differentiable.broadcast(x, SIZE - 1), x)
    check(differentiable.all_gather, x)
    check(lambda x: differentiable.all_to_all_single(torch.empty_like(x), x), x)
    check(lambda x: differentiable.reduce_scatter(x.new_empty(len(x) // SIZE), list(x.chunk(SIZE))), x)
    check(
        lambda x: differentiable.all_to_all([torch.empty_like(piece) for piece in x.chunk(SIZE)], list(x.chunk(SIZE))),
        x,
    )
    check(lambda x: differentiable.reduce(x, SIZE - 1) * (RANK == SIZE - 1), x)  # elsewhere it may be anything
    check(lambda x: differentiable.gather(x, SIZE - 1), x)
    check(lambda x: differentiable.scatter(list(x.chunk(SIZE)), SIZE - 1), x)
    check(lambda x: functional.all_gather_tensor_autograd(x, 0, dist.group.WORLD), x)
    check(lambda x: functional.reduce_scatter_tensor_autograd(x, "sum", 0, dist.group.WORLD), x)
    splits = [len(x) // SIZE] * SIZE
    check(lambda x: functional.all_to_all_single_autograd(x, splits, splits, dist.group.WORLD), x)
    return results


CASES = {
    "data_parallel": [
        ddp_many_buckets, ddp_static_graph, ddp_step_in_a_graph, ddp_gradient_as_bucket_view, ddp_unused_parameters,
        ddp_buffers, ddp_no_sync, ddp_uneven_inputs, ddp_uneven_inputs_and_unused_parameters,
        ddp_bf16_hook, ddp_fp16_hook, ddp_power_sgd_hook, zero_redundancy_optimizer, zero_redundancy_with_ddp_uneven,
    ],
    "sharded": [
        fsdp1, fsdp2, fsdp2_mixed_precision, fsdp2_kept_after_forward, fsdp2_gradient_divide_factor,
        fsdp2_in_symmetric_memory, fsdp2_cpu_offload, fsdp2_state_dict_of_rank_0, checkpoint_of_fsdp2,
    ],
    "spread": [tensor_parallel, sequence_parallel, parallel_cross_entropy, dtensor_placements, dtensor_operators],
    "pipelines": [pipeline],
    "collectives": [functional_eager, functional_compiled, collectives_compiled, autograd_collectives],
    "compiled": [ddp_compiled, fsdp2_compiled, tensor_parallel_compiled],
    # An even number of ranks, from 4 on.
    "two_dimensions": [fsdp1_hybrid, hsdp, hsdp_on_split_groups, tensor_parallel_inside_fsdp2],
}  # fmt: skip


def chosen(names: list[str]) -> list:
    return [
        case for kind, cases in CASES.items() for case in cases if not names or kind in names or case.__name__ in names
    ]


def results_on(backend: str, cases: list, **where) -> list:
    """where: as of init_process_group."""
    global RANK, SIZE
    dist.init_process_group(backend, timeout=timedelta(seconds=100), **where)
    RANK, SIZE = dist.get_rank(), dist.get_world_size()
    results = []
    _clear_sharding_prop_cache()  # what DTensor planned knows the groups of the backend before
    for case in cases:
        start = time.perf_counter()
        torch._dynamo.reset()  # what was compiled knows the groups of the backend before
        try:
            results.append(case())
        except Exception as error:  # the other cases can go on, as a case fails on all ranks
            traceback.print_exc()
            results.append(error)
        if RANK == 0:
            print(f"{backend} {case.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
    dist.barrier()
    if backend == "gloo":
        time.sleep(0.5)  # its threads may still hold tensors, and must not when the process ends
    dist.destroy_process_group()
    return results


def results_on_the_cpu(names: list[str]) -> list:
    """Those of Gloo, in a process that sees no GPU."""
    meeting = Path(tempfile.gettempdir(), f"training-{os.environ['MASTER_PORT']}")
    written = meeting.with_suffix(f".{RANK}")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, __file__, "--cpu", meeting, *names], env=environment, check=True)
    results = torch.load(written, weights_only=False)
    written.unlink()
    meeting.unlink(missing_ok=True)
    return results


def write_results(meeting: str, names: list[str]) -> None:
    """What `results_on_the_cpu` reads."""
    global DEVICE
    DEVICE = torch.device("cpu")
    ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    torch.save(results_on("gloo", chosen(names), init_method=f"file://{meeting}", **ranks), f"{meeting}.{RANK}")


def outcomes(names: list[str]) -> dict[str, Exception | None]:
    """By case: None where both backends gave the same, else what failed on either, or how they differ."""
    global DEVICE, NCCL
    local = int(os.environ["LOCAL_RANK"])
    DEVICE = torch.device("cuda", local % torch.cuda.device_count()) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(DEVICE)
    NCCL = GPU and int(os.environ["WORLD_SIZE"]) <= torch.cuda.device_count()
    cases = chosen(names)
    ours = results_on("tdccl", cases)
    if GPU and not NCCL:
        theirs = results_on_the_cpu(names)
    else:
        theirs = results_on("cpu:gloo,cuda:nccl" if GPU else "gloo", cases)
    found = {}
    for case, result, expected in zip(cases, ours, theirs):
        try:
            for outcome in (result, expected):
                if isinstance(outcome, Exception):
                    raise outcome
            # In bfloat16 a GPU's sums and a CPU's do not round alike.
            tolerance = 2e-2 if GPU and not NCCL and "mixed" in case.__name__ else 1e-4
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, check_device=False)
            found[case.__name__] = None
        except Exception as error:
            found[case.__name__] = error
    return found


def main():
    if sys.argv[1:2] == ["--cpu"]:
        write_results(sys.argv[2], sys.argv[3:])
        return
    found = outcomes(sys.argv[1:])
    for name, error in found.items():
        if error is None:
            sys.stdout.write(f"works: {name}\n")  # in one piece, because the ranks share it
            sys.stdout.flush()
        else:
            print(f"rank {RANK} of {SIZE}, {name}: {error}", flush=True)
    if failed := sum(error is not None for error in found.values()):
        raise SystemExit(f"rank {RANK} of {SIZE}: {failed} of {len(found)} failed")
    print(f"rank {RANK} of {SIZE}: {len(found)} ok", flush=True)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(int(os.environ.get("PATIENCE", 240)), exit=True)  # a hang says where
    main()
