"""Every kernel compiles for every target without a GPU, and moves 16 bytes an access where it may."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import variants
from divergence import divergent_branches

from tdccl.collectives import ALGORITHMS
from tdccl.decisions import ACROSS_NODES
from tdccl.errors import InitError
from tdccl.transport import nvshmem

PROGRAM = Path(__file__).with_name("variants.py")


@functools.cache
def compiled(what, *target) -> list[dict]:
    run = subprocess.run([sys.executable, PROGRAM, what, *target], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line]


def names():
    return {f"{collective}.{algorithm.name}" for collective, table in ALGORITHMS.items() for algorithm in table}


cuda_targets = pytest.mark.parametrize("target", [("cuda", "90", "32"), ("cuda", "100", "32")], ids=["sm_90", "sm_100"])


@cuda_targets
def test_cuda_kernels_access_16_bytes(target):
    kernels = compiled("kernels", *target)
    assert {kernel["name"] for kernel in kernels} == names()
    for kernel in kernels:
        assert not kernel["narrow"] and not kernel["divergent"], kernel
        if not kernel["name"].startswith("barrier."):
            assert kernel["aligned"], kernel
            assert "128" in kernel["loads"] or kernel.get("reduced_loads"), kernel
            assert "128" in kernel["stores"], kernel


# What the kernels that go through the switch do there: load sums, store to all, reduce into all.
THROUGH_SWITCH = {
    "all_reduce.nvls_one_shot": {"ld_reduce"},
    "all_reduce.nvls_one_shot_staged": {"ld_reduce"},
    "all_reduce.nvls_two_shot": {"ld_reduce", "st"},
    "all_reduce.nvls_two_shot_staged": {"ld_reduce", "st"},
    "all_gather.nvls_push": {"st"},
    "all_gather.nvls_staged": {"st"},
    "reduce_scatter.nvls_reduce": {"ld_reduce"},
    "reduce_scatter.nvls_staged": {"ld_reduce"},
    "broadcast.nvls_push": {"st"},
    "broadcast.nvls_staged": {"st"},
    "barrier.nvls_red": {"red"},
}


@cuda_targets
def test_multimem_kernels_go_through_the_switch_guarded_and_16_bytes_wide(target):
    kernels = [kernel for kernel in compiled("kernels", *target) if kernel["multimem"] == "switch"]
    assert {kernel["name"] for kernel in kernels} == THROUGH_SWITCH.keys()
    for kernel in kernels:
        forms = {form.split(".")[1]: form for form in kernel["forms"]}
        assert forms.keys() == THROUGH_SWITCH[kernel["name"]], kernel
        assert not kernel["unguarded"] and not kernel["narrow"], kernel
        assert bool(kernel["reduced_loads"]) == ("ld_reduce" in forms), kernel
        assert bool(kernel["wide_stores"]) == ("st" in forms), kernel
        assert bool(kernel["reductions"]) == ("red" in forms), kernel
        if "ld_reduce" in forms and kernel["dtype"] in ("bf16", "fp16", "fp32"):
            exact = "" if kernel["dtype"] == "fp32" else "acc::f32."
            assert f".add.{exact}v4." in forms["ld_reduce"], kernel


@cuda_targets
def test_a_proxy_fence_stands_between_accesses_through_the_switch_and_others_of_one_call(target):
    """Those of the kernels that go through scratch, and the count of the barrier, before and after it. What the others
    reach through the switch is read and written otherwise in other kernels alone."""
    fences = {"all_reduce.nvls_two_shot_staged": 2, "broadcast.nvls_staged": 2, "barrier.nvls_red": 2}
    for kernel in compiled("kernels", *target):
        if kernel["multimem"] is not None:
            least = fences.get(kernel["name"], int(kernel["name"].endswith("_staged")))
            found = kernel["alias_fences"]
            assert found >= least > 0 if least and kernel["multimem"] == "switch" else found == 0, kernel


def test_their_unicast_twins_leave_the_switch_alone():
    twins = [kernel for kernel in compiled("kernels", "cuda", "90", "32") if kernel["multimem"] == "unicast"]
    assert {kernel["name"] for kernel in twins} == THROUGH_SWITCH.keys()
    for twin in twins:
        assert not twin["forms"] and not twin["reduced_loads"] and not twin["wide_stores"], twin


@cuda_targets
def test_every_form_of_multimem_is_guarded(target):
    kernels = compiled("forms", *target)
    fp8 = {kernel["dtype"] for kernel in kernels if kernel["dtype"].startswith("fp8")}
    assert fp8 == ({"fp8e4nv", "fp8e5"} if target[1] == "100" else set())
    for kernel in kernels:
        if kernel["multimem"] == "unicast":
            assert not kernel["forms"] and not kernel["reduced_loads"], kernel
            continue
        forms = {form.split(".")[1] for form in kernel["forms"]}
        assert forms == {"ld_reduce", "st"} | ({"red"} if kernel["dtype"] not in fp8 else set()), kernel
        assert not kernel["unguarded"], kernel
        assert kernel["reduced_loads"] and kernel["wide_stores"], kernel


UNGUARDED = """
--:-:-:-:1	LDC R1, c[0x0][0x28];
--:-:-:-:4	@!P0 STG.E.128.STRONG.SYS desc[UR4][R22.64], R24;
--:-:-:-:5	@P1 BRA LBB0;
01:-:-:-:1	REDG.E.ADD.64.STRONG.SYS desc[UR4][R2.64], R4;
--:-:-:-:1	REDG.E.ADD.64.STRONG.SYS desc[UR4][R2.64], R6;
--:-:-:-:5	@!P0 EXIT;
LBB1:
--:-:-:-:1	REDG.E.ADD.64.STRONG.SYS desc[UR4][R2.64], R8;
--:-:-:-:5	@!P0 BRA LBB1;
LBB0:
--:0:-:-:4	STG.E.128.STRONG.SYS desc[UR4][R2.64], R12;
--:-:-:-:5	EXIT;
"""


def test_an_instruction_that_lost_its_guard_is_found():
    (line,) = variants.unguarded(UNGUARDED.splitlines())
    assert "STG" in line and "R12" in line


# A wait in which each warp looks for itself: what it sees of 16 words reaches its own lanes alone.
APART = """
.reqntid 128
$L__BB0_1:
	@%p1 ld.volatile.global.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ];
	setp.eq.b64 	%p2, %rd2, %rd4;
	selp.b32 	%r1, 0, 1, %p2;
	shfl.sync.bfly.b32 	%r2, %r1, 8, 31, -1;
	bar.sync 	0;
	setp.ne.b32 	%p3, %r2, 0;
	@%p3 bra 	$L__BB0_1;
"""


def test_a_wait_in_which_warps_decide_apart_is_found():
    (line,) = divergent_branches(APART)
    assert line.startswith("@%p3 bra")
    together = "\tst.shared.b32 [ %r3 + 0 ], %r2;\n\tbar.sync 0;\n\tld.shared.b32 %r2, [%r4];\n"
    through_shared = APART.replace("\tbar.sync", together + "\tbar.sync").replace("bfly.b32 \t%r2", "bfly.b32 \t%r5")
    assert divergent_branches(through_shared) == []
    assert divergent_branches(APART.replace("128", "32")) == []  # one warp decides for itself


def bitcode(arch: int) -> str | None:
    try:
        return nvshmem.device_library(arch)
    except InitError:
        return None


@pytest.mark.skipif(bitcode(90) is None, reason="NVSHMEM is not installed")
def test_kernels_across_nodes_link_nvshmem_and_access_16_bytes():
    kernels = compiled("across", "cuda", "90", "32")
    listed = {f"{collective}.{algorithm.name}" for collective, table in ACROSS_NODES.items() for algorithm in table}
    assert {kernel["name"] for kernel in kernels} == listed
    for kernel in kernels:
        assert kernel["state"] and not kernel["narrow"], kernel
        assert {*kernel["missing"]} <= {"vprintf", "__assertfail"}, kernel  # which the driver has
        if not kernel["name"].startswith("barrier."):
            assert "128" in kernel["loads"] and "128" in kernel["stores"], kernel


def test_hip_kernels_compile():
    kernels = compiled("kernels", "hip", "gfx942", "64")
    assert {kernel["name"] for kernel in kernels} == names()
    assert all(kernel["code"] for kernel in kernels)
