import os

import cases
import pool
import pytest
import torch

from tdccl import environment
from tdccl.transport import multicast

# A small scratch, so that a message larger than it stays cheap; must be set before any rank starts.
os.environ["TDCCL_SCRATCH_MB"] = str(cases.SCRATCH_MB)
# GPUs without multicast run the NVLS algorithms' unicast twins.
if not environment.emulated():
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if environment.multicast_forbidden_by() or not all(map(multicast.supported, gpus)):
        environment.forbid_multicast_to_others()  # by what the next line may be overwriting
        os.environ["TDCCL_NVLS"] = "unicast"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """For `-n auto`: as many as there are cores, two at most, for each has a pool of ranks; on GPUs one at a time."""
    return min(2, len(os.sched_getaffinity(0))) if environment.emulated() else 0


@pytest.fixture(scope="session")
def ranks(request, tmp_path_factory):
    """The pool of ranks that all tests share."""
    launching = [item for item in request.session.items if "test_collectives" in item.nodeid]
    made = "TDCCL_AOT" in os.environ
    if torch.cuda.is_available() and len(launching) > 20 and not made:  # a few compile faster by themselves
        import precompile

        os.environ["TDCCL_AOT"] = str(tmp_path_factory.mktemp("pack") / "suite.zip")
        worlds = {item.callspec.params["world"] for item in launching}
        precompile.write_pack(os.environ["TDCCL_AOT"], worlds, torch.cuda.device_count())
    shared = pool.RankPool(pool.LARGEST_WORLD)
    yield shared
    shared.close()


@pytest.fixture
def installed(tmp_path):
    """A path on which tdccl is as if installed: torch finds entry points by this folder alone."""
    (tmp_path / "tdccl-0.dist-info").mkdir()
    (tmp_path / "tdccl-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tdccl\nVersion: 0\n")
    (tmp_path / "tdccl-0.dist-info" / "entry_points.txt").write_text(
        "[torch.backends]\ntdccl = tdccl.torch_entry:register\n"
    )
    return tmp_path


def pytest_collection_modifyitems(config, items):
    """What takes longest as a whole begins first, beside the rest. In emulation, unless TDCCL_LONG=1, three and four
    ranks share the dtypes that two have all gone through: addressing depends on their width."""
    items.sort(key=lambda item: item.path.name != "test_torch_suite.py")
    if not cases.FEW:
        return
    left_out = [item for item in items if _is_repeat(getattr(item, "callspec", None))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_repeat(spec) -> bool:
    dtype, world = (spec.params.get(name) for name in ("dtype", "world")) if spec else (None, None)
    if dtype is None or world not in (3, 4):
        return False
    return dtype not in cases.LARGE if world == 4 else dtype in cases.LARGE and dtype is not torch.bfloat16


def pytest_generate_tests(metafunc):
    """`world` runs over every size of the pool; in emulation, where they are slow, those of a module with WORLDS only
    over these, unless TDCCL_LONG=1."""
    if "world" in metafunc.fixturenames:
        worlds = range(1, pool.LARGEST_WORLD + 1)
        if cases.FEW:
            worlds = getattr(metafunc.module, "WORLDS", worlds)
        metafunc.parametrize("world", worlds, ids=lambda world: f"world{world}")
