import os

import cases
import pool
import pytest
import torch

# A small scratch, so that a message larger than it stays cheap; must be set before any rank starts.
os.environ["TDCCL_SCRATCH_MB"] = str(cases.SCRATCH_MB)


@pytest.fixture(scope="session")
def ranks(request, tmp_path_factory):
    """The pool of ranks that all tests share."""
    launching = sum("test_collectives" in item.nodeid for item in request.session.items)
    if torch.cuda.is_available() and launching > 20:  # a few compile faster by themselves
        import precompile

        os.environ["TDCCL_AOT"] = str(tmp_path_factory.mktemp("pack") / "suite.zip")
        precompile.write_pack(os.environ["TDCCL_AOT"])
    shared = pool.RankPool(pool.LARGEST_WORLD)
    yield shared
    shared.close()


def pytest_generate_tests(metafunc):
    """`world` runs over every size of the pool."""
    if "world" in metafunc.fixturenames:
        metafunc.parametrize("world", range(1, pool.LARGEST_WORLD + 1), ids=lambda world: f"world{world}")
