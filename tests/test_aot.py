"""Packs of kernels compiled ahead of time: they hold what the runtime asks for, and a bad one does no harm."""

import concurrent.futures
import itertools
import os
import subprocess
import sys
import threading
import types
import warnings

import pool
import pytest
import torch
import triton
from variants import context_of, team_of

from tdccl import aot, decisions, environment
from tdccl.collectives import ALGORITHMS
from tdccl.errors import InitError
from tdccl.runtime import bare, launch, pack
from tdccl.runtime.algorithm import Call
from tdccl.runtime.plan import Plan, choose
from tdccl.transport import nvshmem
from tdccl.tuning import BESIDE_COMPUTATION, GPU

RANKS = 4


def try_aot(*words, **variables) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TDCCL_SCRATCH_MB"}
    command = [sys.executable, "-m", "tdccl.aot", *map(str, words)]
    return subprocess.run(command, cwd=pool.ROOT, env=kept | variables, capture_output=True, text=True, timeout=280)


def run_aot(*words) -> str:
    run = try_aot(*words)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A pack with all that 4 ranks need to reduce_scatter bf16 by sum, on sm_90."""
    path = tmp_path_factory.mktemp("packs") / "small.zip"
    options = ("--arch", "sm_90", "--world", RANKS, "--collective", "reduce_scatter", "--dtype", "bf16", "--op", "sum")
    run_aot("build", *options, "--out", path)
    return path


class Driver:
    """Stands for cuda.bindings' driver and runtime: remembers what is loaded and launched, in threads that have a
    context alone."""

    def __init__(self):
        self.modules, self.launches, self._entered = [], [], threading.local()

    def cudaSetDevice(self, device):
        self._entered.device = device

    def cuModuleLoadData(self, image):
        assert image.startswith(b"\x7fELF")
        if not hasattr(self._entered, "device"):
            return 201, None
        self.modules.append(image)
        return 0, image

    def cuModuleGetFunction(self, module, name):
        return (0, self.modules.index(module)) if name in module else (500, None)

    def CUfunction(self, handle):
        return handle

    def cuLaunchKernel(self, function, *arguments):
        if not hasattr(self._entered, "device"):
            return (201,)
        self.launches.append((self.modules[function], *arguments))
        return (0,)


@pytest.fixture
def driver(monkeypatch):
    """A process on an H100 that may not compile, as far as the runtime can tell."""

    def refuse(kernel, *_):
        raise AssertionError(f"{kernel.fn.__name__} was to be compiled")

    stub = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.SimpleNamespace(driver=stub, runtime=stub))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(launch, "emulated", lambda: False)
    monkeypatch.setattr(launch, "_target", lambda: None)
    monkeypatch.setattr(launch, "compile_kernel", refuse)
    monkeypatch.setattr(launch, "_loaded", {})
    yield stub
    pack._found.cache_clear()


def use(monkeypatch, *paths):
    monkeypatch.setenv("TDCCL_AOT", os.pathsep.join(map(str, paths)))
    pack._found.cache_clear()


SEGMENT = types.SimpleNamespace(address=1 << 32, peers=types.SimpleNamespace(data_ptr=lambda: 1 << 33))


def call_of(count, dtype="bf16", op="sum", alignment=16, segments=(None, None)):
    return Call("reduce_scatter", count, dtype, op, 0, alignment, None, segments, False)


def launch_call(call, table=None, blocks=GPU.blocks):
    """Plans and launches a call as a communicator does; returns its choice."""
    context, table = context_of(RANKS, blocks=blocks), table or aot.table_for("another GPU", RANKS)
    choice = choose(ALGORITHMS[call.collective], call, context, table)
    plan = Plan(choice, call, team_of(context, "cuda"), call.segments)
    plan.launch(*plan.at(1 << 34, 1 << 35), 0)
    return choice


def every_call():
    """Sizes from 1 KiB to 1 GiB that no list of powers of two foresees, aligned and not, plain and symmetric."""
    for exponent in range(10, 31):
        for nbytes in (1 << exponent, (1 << exponent) + 2, (1 << exponent) * 7 // 5 // 16 * 16, (1 << exponent) - 6):
            for alignment in (16, 4, 2):
                for segments in ((None, None), (SEGMENT, SEGMENT)):
                    yield call_of(nbytes // 2, alignment=alignment, segments=segments)


def test_every_size_is_launched_from_the_pack(built, driver, monkeypatch):
    use(monkeypatch, built)
    largest = (GPU.blocks, BESIDE_COMPUTATION)  # of a communicator's grids, and of those of torch's groups
    for blocks, table, call in itertools.product(largest, aot._tables(RANKS), every_call()):
        geometry = launch_call(call, table, blocks).geometry
        cubin, grid, _, _, threads, *_ = driver.launches[-1]
        assert (grid, threads) == (geometry.grid, geometry.warps * 32)
        assert cubin in driver.modules
    opened = pack.Pack(built)
    assert len(driver.modules) == len(set(driver.modules)) == len(opened.keys("sm_90")), "a kernel is never needed"


def test_threads_need_no_context(built, driver, monkeypatch):
    """One of their own, which the driver wants: neither for the first launch nor for one that was bound before."""
    use(monkeypatch, built)
    call, context = call_of(1000), context_of(RANKS)
    table = aot.table_for("another GPU", RANKS)
    with concurrent.futures.ThreadPoolExecutor(1) as first, concurrent.futures.ThreadPoolExecutor(1) as second:
        choice = choose(ALGORITHMS[call.collective], call, context, table)
        plan = first.submit(Plan, choice, call, team_of(context, "cuda"), call.segments).result()
        for thread in (first, second, second):
            thread.submit(plan.launch, *plan.at(1 << 34, 1 << 35), 0).result()
    assert len(driver.launches) == 3


def test_a_pack_says_of_each_kernel_what_a_launch_needs(built):
    opened = pack.Pack(built)
    for key in opened.keys("sm_90"):
        kernel, cubin = opened.kernel("sm_90", key), opened.cubin("sm_90", key)
        assert cubin.startswith(b"\x7fELF") and kernel.name.encode() in cubin
        assert str(pool.ROOT).encode() not in cubin
        assert kernel.threads % 32 == 0 and kernel.shared >= 0
        assert (kernel.ranks, kernel.dtype, kernel.op) == (RANKS, "bf16", "sum")
    assert f"sm_90, {RANKS} ranks  reduce_scatter.staged" in run_aot("list", built)


@pytest.mark.parametrize(
    "call", [call_of(1000, dtype="fp32"), call_of(1000, op="max")], ids=lambda call: f"{call.dtype}-{call.op}"
)
def test_what_a_pack_lacks_is_compiled(built, driver, monkeypatch, call):
    use(monkeypatch, built)
    with pytest.raises(AssertionError, match="was to be compiled"):
        launch_call(call)


def test_another_architecture_is_compiled_for(built, driver, monkeypatch):
    use(monkeypatch, built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    with pytest.raises(AssertionError, match="was to be compiled"):
        launch_call(call_of(1000))


def test_a_pack_of_other_sources_is_refused_with_one_warning(built, driver, monkeypatch):
    use(monkeypatch, built)
    monkeypatch.setattr(pack, "source_digest", lambda: "another")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count in (100, 1 << 20):
            with pytest.raises(AssertionError, match="was to be compiled"):
                launch_call(call_of(count))
    (warning,) = caught
    assert "other kernel sources" in str(warning.message) and "tdccl.aot build" in str(warning.message)


def test_the_digest_knows_every_kernel_source(monkeypatch, tmp_path):
    package = tmp_path / "tdccl"
    for file in ("runtime/pack.py", "runtime/launch.py", "language/reduce.py", "collectives/exchange.py"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("1")
    monkeypatch.setattr(pack, "__file__", str(package / "runtime" / "pack.py"))
    digests = [pack.source_digest()]
    for file in ("runtime/launch.py", "language/reduce.py", "collectives/exchange.py"):
        (package / file).write_text("2")
        digests.append(pack.source_digest())
    assert len(set(digests)) == 4


def test_bad_files_are_passed_over(built, driver, monkeypatch, tmp_path):
    (tmp_path / "cut.zip").write_bytes(built.read_bytes()[:5000])
    (tmp_path / "other.zip").write_text("no pack")
    use(monkeypatch, tmp_path / "cut.zip", tmp_path / "other.zip", tmp_path / "missing.zip", built)
    with pytest.warns(UserWarning, match="is ignored") as caught:
        launch_call(call_of(1000))
    assert len(caught) == 3 and driver.launches


def test_a_cubin_that_does_not_load_is_compiled(built, driver, monkeypatch):
    use(monkeypatch, built)
    driver.cuModuleLoadData = lambda image: (209, None)
    with pytest.warns(UserWarning, match=r"reduce_scatter\.push_ll: 209"), pytest.raises(AssertionError):
        launch_call(call_of(1000))


def test_no_pack_is_read_where_none_is_wanted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TDCCL_AOT", "")
    assert aot.environment.packs() == []
    monkeypatch.delenv("TDCCL_AOT")
    assert aot.environment.packs() == []
    (tmp_path / "tdccl").mkdir()
    (tmp_path / "tdccl" / "kernels.zip").touch()
    assert aot.environment.packs() == [aot.environment.default_pack()] == [str(tmp_path / "tdccl" / "kernels.zip")]


class Fatal:
    """A job that ends the process that is to compile it, as LLVM does for an architecture that it does not know."""

    arch = "sm_1"

    @property
    def nodes(self):
        os._exit(1)


def test_a_compiler_that_ends_its_process_ends_the_build(tmp_path):
    with pytest.raises(SystemExit, match=r"does Triton .* know sm_1"):
        aot.write_pack(str(tmp_path / "none.zip"), [("key", Fatal())])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "words, said",
    [
        ("build --out {0}", "--out is {0}: a folder"),
        ("build --out {0}/file/pack.zip", "--out is {0}/file/pack.zip: "),
        ("list {0}/file", "{0}/file is no pack: "),
        ("list {0}/missing.zip", "{0}/missing.zip is no pack: "),
    ],
)
def test_a_path_that_cannot_be_is_refused_at_once(words, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no pack")
    monkeypatch.setattr(aot, "build", lambda options: pytest.fail("compiles"))
    with pytest.raises(SystemExit) as refused:
        aot.main(words.format(tmp_path).split())
    assert said.format(tmp_path) in f"{refused.value} {capsys.readouterr().err}"


def test_building_twice_gives_the_same_bytes(tmp_path):
    for name in ("one.zip", "two.zip"):
        run_aot(
            "build", "--arch", "sm_90,sm_100", "--world", "2,3", "--collective", "barrier", "--out", tmp_path / name
        )
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.zip", "two.zip"]
    opened = pack.Pack(tmp_path / "two.zip")
    assert [len(opened.keys(arch)) for arch in ("sm_90", "sm_100")] == [2, 2]


def test_a_pack_is_read_without_triton(built):
    program = f"""
import sys
from tdccl.runtime import pack
opened = pack.Pack({str(built)!r})
assert all(opened.cubin("sm_90", key) for key in opened.keys("sm_90"))
assert not sys.modules.keys() & {{"torch", "triton"}}
"""
    subprocess.run([sys.executable, "-c", program], cwd=pool.ROOT, check=True, timeout=60)


WITHOUT_TRITON = """
import sys
from types import SimpleNamespace

import torch

launches = []
sys.modules["cuda.bindings"] = SimpleNamespace(
    driver=SimpleNamespace(
        cuModuleLoadData=lambda image: (0, 1),
        cuModuleGetFunction=lambda module, name: (0, 2),
        CUfunction=int,
        cuLaunchKernel=lambda *arguments: launches.append(arguments) or (0,),
    ),
    runtime=SimpleNamespace(cudaSetDevice=lambda device: None),
)
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (9, 0)

from tdccl import decisions
from tdccl.runtime.algorithm import Call, team_of
from tdccl.runtime.plan import Plan, choose
from tdccl.tuning import BESIDE_COMPUTATION, GPU
from tdccl.tuning import BESIDE_COMPUTATION, GPU

context = decisions.context_for(4)
table, team = decisions.table_for("another GPU", 4), team_of(context, "cuda")
for count in (100, 1 << 20):
    call = Call("reduce_scatter", count, "bf16", "sum", 0, 16, None, (None, None), False)
    Plan(choose(decisions.ALGORITHMS["reduce_scatter"], call, context, table), call, team, []).launch(0, 0, 0)
assert len(launches) == 2
assert "triton" not in sys.modules
"""


def test_a_call_whose_kernel_is_in_a_pack_does_not_import_triton(built):
    kept = {name: value for name, value in os.environ.items() if name != "TDCCL_SCRATCH_MB"}
    kept |= {"TDCCL_EMULATE": "0", "TDCCL_AOT": str(built)}
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=pool.ROOT, env=kept, check=True, timeout=60)


def test_tables_are_the_same_without_triton(monkeypatch):
    monkeypatch.setattr(bare, "emulated", lambda: False)
    monkeypatch.setattr(bare, "_modules", {})
    tables, context = bare.read("tdccl.collectives").ALGORITHMS, context_of(RANKS)
    assert tables.keys() == ALGORITHMS.keys()
    for collective, table in tables.items():
        op = "sum" if "reduce" in collective else None
        on_device = (0, 0, 16, 64, 64) if collective == "all_to_all_vdev" else None
        call = Call(collective, 1 << 20, "fp32", op, 0, 16, None, (SEGMENT, SEGMENT), False, on_device)
        for without, with_triton in zip(table, ALGORITHMS[collective]):
            assert isinstance(without.kernel, bare.BareKernel)
            assert bare.kernel_of(without.kernel) is with_triton.kernel
            assert without.kernel.arg_names == with_triton.kernel.arg_names
            assert without.geometry(call, context) == with_triton.geometry(call, context)
            kept = [(a.name, a.path, a.sent(4), a.symmetric, a.splits, a.in_place) for a in (without, with_triton)]
            assert kept[0] == kept[1]


def test_a_pack_for_hosts_with_multicast_holds_what_goes_through_the_switch():
    wanted = "sm_90", RANKS, ["all_reduce"], ["bf16"], ["sum"]
    with_it, without = aot.jobs(*wanted, multicast=True), aot.jobs(*wanted, multicast=False)
    through = {job.algorithm for job in with_it.values() if job.geometry.constants.get("MULTIMEM") == "switch"}
    assert through == {"nvls_two_shot", "nvls_two_shot_staged"}
    assert not [job for job in without.values() if "MULTIMEM" in job.geometry.constants]


def check_team(comm):
    constants = comm._team[5:]
    assert aot.team_of(comm._context, "cuda")[5:-1] == constants[:-1]
    assert aot.context_for(comm.size) == comm._context._replace(multicast=aot.context_for(comm.size).multicast)
    assert constants[-1] == ("cuda" if comm.device.type == "cuda" else "emulation")


def test_a_pack_is_built_for_the_team_that_a_communicator_has(ranks, world):
    ranks.run(check_team, world)


FIRST_CALL = """
import sys
import torch
import tdccl

with tdccl.init() as comm:
    for count in (100, 1_000_003):
        x = torch.full((count,), comm.rank + 1.0, device=comm.device)
        assert (comm.all_reduce(x) == comm.size * (comm.size + 1) / 2).all()
    assert "triton" not in sys.modules
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_first_call_of_a_process_does_not_even_import_the_compiler(tmp_path):
    world = pool.LARGEST_WORLD
    path = tmp_path / "own.zip"
    run_aot("build", "--world", world, "--collective", "all_reduce", "--dtype", "fp32", "--op", "sum", "--out", path)
    settings = {"TDCCL_AOT": path, "TDCCL_INIT": "tcp://127.0.0.1:29643", "WORLD_SIZE": world}
    settings["TRITON_CACHE_DIR"] = tmp_path / "cache"
    kept = {name: value for name, value in os.environ.items() if name != "TDCCL_SCRATCH_MB"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_CALL],
            cwd=pool.ROOT,
            env={**kept, **{name: str(value) for name, value in settings.items()}, "RANK": str(rank)},
        )
        for rank in range(world)
    ]
    assert [process.wait(100) for process in processes] == [0] * world
    assert not (tmp_path / "cache").exists()


def bitcode():
    try:
        return nvshmem.device_library(90)
    except InitError:
        return None


def test_bitcode_that_triton_cannot_read_is_named(tmp_path):
    folder, pack_file = tmp_path / "lib", tmp_path / "across.zip"
    folder.mkdir()
    (folder / "libnvshmem_device.bc").write_text("of an LLVM to come")
    options = ("--arch", "sm_90", "--world", 2, "--nodes", 2, "--collective", "barrier", "--out", pack_file)
    done = try_aot("build", *options, NVSHMEM_HOME=str(tmp_path))
    assert done.returncode == 1 and not pack_file.exists()
    assert f"Triton {triton.__version__} cannot link {folder}" in done.stderr
    assert "a newer Triton or an older NVSHMEM" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(bitcode() is None, reason="NVSHMEM is not installed")
def test_kernels_across_nodes_are_launched_from_a_pack_and_their_modules_initialised(driver, monkeypatch, tmp_path):
    path, initialised = tmp_path / "across.zip", []
    options = ("--arch", "sm_90", "--world", 2, "--nodes", 3, "--collective", "barrier")
    run_aot("build", *options, "--out", path)
    use(monkeypatch, path)
    monkeypatch.setattr(nvshmem, "initialize_module", initialised.append)
    monkeypatch.setattr(environment, "emulated", lambda: False)
    context = decisions.context_for(2, scratch=64 << 20, nodes=3)
    call = Call("barrier", 0, "u8", None, 0, 16, None, (None, None), False)
    choice = choose(decisions.ACROSS_NODES["barrier"], call, context, decisions.table_across())
    rails = {pairs: decisions.rail_for(context, pairs) for pairs in (False, True)}
    for _ in range(2):
        Plan(choice, call, team_of(context, "cuda"), [], rails).launch(0, 0, 0)
    assert len(driver.launches) == 2 and initialised == driver.modules and len(initialised) == 1
