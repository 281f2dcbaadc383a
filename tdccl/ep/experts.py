"""What both ways of expert parallelism have in common: sizes, checks, and what the device complains of."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from tdccl.communicator import Communicator
from tdccl.ep import routing
from tdccl.ep.workspace import Workspace
from tdccl.errors import ArgumentError
from tdccl.runtime import arrays

QUANTS = (None, "fp8_128", "fp8_128_ue8m0")
_KINDS = (routing.OUT_OF_RANGE, routing.TWICE, routing.NO_ROOM)
_COMPLAINTS = (
    "an expert is neither -1 nor in 0 .. {experts}; it was left out",
    "an expert is there twice; the second was left out",
)


class Experts:
    """Experts, spread evenly over the ranks of a communicator: expert e is on rank e // local_experts."""

    def __init__(
        self, comm: Communicator, max_tokens: int, hidden: int, num_experts: int, top_k: int, dtype: torch.dtype,
        max_blocks: int,
    ):  # fmt: skip
        """Collective. Raises ArgumentError, on all ranks, unless they have given the same possible sizes."""
        comm.check()
        _check_sizes(comm, max_tokens, hidden, num_experts, top_k, dtype, max_blocks)
        self.nodes, self._node = len(comm.topology.nodes), comm.topology.node
        self.comm, self.max_tokens, self.hidden, self.top_k, self.dtype = comm, max_tokens, hidden, top_k, dtype
        self.num_experts, self.local_experts = num_experts, num_experts // comm.size
        self.max_rows = comm.size * max_tokens
        self.made_for = (  # what the arrays of a plan are cut by
            f"ranks {comm.size}, nodes {self.nodes}, max_tokens {max_tokens}, num_experts {num_experts}, top_k {top_k}"
        )
        self.groups = -(-hidden // 128)
        self._dtype_name = arrays.TRITON_NAMES[dtype]
        self._complaints = torch.zeros(4, dtype=torch.int64, pin_memory=comm.device.type == "cuda")
        self._complaint = (ctypes.c_int64 * 4).from_address(self._complaints.data_ptr())
        self._half_done = ""

    def check(self) -> None:
        """Raises what is wrong with the communicator, or was with the routing of calls whose kernels have ended."""
        self.comm.check()
        if any(self._complaint):
            token, twice, rows = (self._complaint[kind.value] for kind in _KINDS)
            self._complaints.zero_()
            if rows:
                raise ArgumentError(f"dispatch: {rows} rows came, out had not room for all; the others were left out")
            what = _COMPLAINTS[0 if token else 1].format(experts=self.num_experts - 1)
            raise ArgumentError(f"in row {(token or twice) - 1} of topk_idx {what}")

    def check_plan(self, plan: Any, kind: type) -> None:
        """Raises ArgumentError unless the plan is of this kind, and of an object of the same sizes: kernels write to
        the places that it says, wherever the memory there ends."""
        if not isinstance(plan, kind):
            raise ArgumentError(f"plan is {type(plan).__name__}, expected what this kind of object's plan() returned")
        if plan.made_for != self.made_for:
            raise ArgumentError(f"the plan is for {plan.made_for}; expected one for {self.made_for}")

    def _check(self, tensor, name: str, shape: tuple, dtypes: tuple) -> torch.Tensor:
        fits = isinstance(tensor, torch.Tensor) and tensor.dim() == len(shape) and tensor.dtype in dtypes
        if not fits or any(wanted not in (None, found) for wanted, found in zip(shape, tensor.shape)):
            given = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor)
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ArgumentError(f"{name} is {given}, expected {wanted} [{sizes}]")
        if tensor.device != self.comm.device:
            raise ArgumentError(f"{name} is on {tensor.device}, expected {self.comm.device}")
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ArgumentError(f"{name} is not contiguous, or not aligned to 16 bytes; pass a copy of it")
        return tensor

    def _check_optional(self, tensor, name: str, shape: tuple, dtype: torch.dtype) -> None:
        if tensor is not None:
            self._check(tensor, name, shape, (dtype,))

    def _check_routing(self, topk_idx: torch.Tensor) -> int:
        """How many tokens it is for."""
        self._check(topk_idx, "topk_idx", (None, self.top_k), (torch.int64, torch.int32))
        tokens = topk_idx.shape[0]
        if tokens > self.max_tokens:
            raise ArgumentError(f"plan: topk_idx has {tokens} tokens, expected at most max_tokens = {self.max_tokens}")
        return tokens

    def _check_quant(self, quant: str | None) -> None:
        if quant not in QUANTS:
            raise ArgumentError(f"dispatch: quant is {quant!r}, expected one of {', '.join(map(str, QUANTS))}")

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, stream: Any = None) -> torch.Tensor:
        """Memory of the `stream` that writes it: what was there before may still be read on the current one."""
        with self.comm._on(stream):
            return torch.empty(shape, dtype=dtype, device=self.comm.device)

    def _scale_words(self, quant: str | None) -> int:
        """Words of 4 bytes in which a quantised row's scales lie."""
        return {None: 0, "fp8_128": self.groups, "fp8_128_ue8m0": -(-self.groups // 4)}[quant]

    def _run(
        self, workspace: Workspace, called: str, kernel, dtype: str, warps: int, constants: dict[str, Any], tensors,
        sizes, elements: int, hook: bool, stream, plan,
    ) -> Callable[[], None]:  # fmt: skip
        """Launches both halves of a kernel at once, or if `hook` the first; returns what launches the second then, and
        keeps the tensors and the plan till then."""

        def half(send: bool, recv: bool, _keep=plan) -> None:
            given = {**constants, "SEND": send, "RECV": recv}
            workspace.launch(called, kernel, dtype, warps, given, tensors, sizes, elements, stream)

        if self._half_done:
            raise ArgumentError(f"{called}: call the hook of the last {self._half_done} first")
        half(True, not hook)
        if not hook:
            return lambda: None
        self._half_done = called

        def finish() -> None:
            self._half_done = ""
            half(False, True)

        return once(finish)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or if it is a view that kernels do not take, a copy."""
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 else tensor.contiguous().clone()


def once(call: Callable[[], None]) -> Callable[[], None]:
    """What makes the call the first time only: a hook that is called again must not receive what came after."""
    left = [call]

    def first() -> None:
        if left:
            left.pop()()

    return first


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(0, value - 1).bit_length()


def _check_sizes(comm, max_tokens, hidden, num_experts, top_k, dtype, blocks) -> None:
    sizes = {
        "max_tokens": max_tokens, "hidden": hidden, "num_experts": num_experts, "top_k": top_k, "max_blocks": blocks,
    }  # fmt: skip
    everyone = comm._bootstrap.exchange((sizes, str(dtype)))
    for name, value in sizes.items():
        if not hasattr(value, "__index__") or value < 1:
            raise ArgumentError(f"{name} is {value!r}, expected a whole number >= 1")
    if num_experts % comm.size:
        raise ArgumentError(f"num_experts is {num_experts}, expected a multiple of {comm.size} ranks")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ArgumentError(f"dtype is {dtype}, expected bfloat16, float16 or float32")
    if any(other != everyone[0] for other in everyone):
        raise ArgumentError(f"the ranks have given different sizes: {everyone}")
