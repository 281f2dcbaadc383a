"""A pass of torch's compiler: where a graph gathers rows and multiplies them, or multiplies and scatters the sum, it
puts the operator that does both at once.

    torch._inductor.config.post_grad_custom_pre_pass = FuseProducts()

These are the patterns of torch's own micro-pipelined tensor parallelism, for groups of the tdccl backend.
"""

import torch
import torch.distributed as dist
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils._python_dispatch import _disable_current_modes

from tdccl.communicator import Communicator
from tdccl.process_group import ProcessGroup

_functional, _aten = torch.ops._c10d_functional, torch.ops.aten
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}


class FuseProducts(CustomGraphPass):
    """Replaces all_gather -> mm by `all_gather_gemm` and mm -> reduce_scatter (a sum) by `gemm_reduce_scatter`.

    Along dimension 0, of bfloat16 or float16, through views that merge or split the leading dimensions, where nothing
    else in the graph uses what lies between. Everything else stays as it is. `fused` counts what it has replaced.
    """

    fused = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target is _aten.mm.default:
                self.fused += _gathered_product(graph, node) or 0
            elif node.target is _functional.wait_tensor.default:
                self.fused += _scattered_product(graph, node) or 0

    def uuid(self) -> None:
        """Keeps graphs out of Inductor's cache: they name communicators of this process."""


def _gathered_product(graph: torch.fx.Graph, product: torch.fx.Node) -> bool:
    """mm(view(wait(all_gather(shard))), b): one operator, where `product` is such a product."""
    whole = _only_used_here(_below_views(product.args[0]), _functional.wait_tensor.default)
    gather = whole and _only_used_here(whole.args[0], _functional.all_gather_into_tensor.default)
    if not gather or not _fits(product):
        return False
    shard, _, group = gather.args
    communicator, depth = _communicator(group, shard), _value(shard).shape[-1]
    if communicator is None or not isinstance(depth, int) or _value(product.args[0]).shape[-1] != depth:
        return False
    with graph.inserting_before(product):
        rows = graph.call_function(_aten.reshape.default, (shard, [-1, depth]))
        operator = torch.ops.tdccl.all_gather_gemm.default
        fused = graph.call_function(operator, (rows, product.args[1], communicator.name))
    fused.meta["val"] = _value(product)
    product.replace_all_uses_with(fused)
    _erase(graph, product, gather)
    return True


def _scattered_product(graph: torch.fx.Graph, done: torch.fx.Node) -> bool:
    """wait(reduce_scatter(view(mm(a, b)))): one operator, where `done` is such a wait."""
    scatter = _only_used_here(done.args[0], _functional.reduce_scatter_tensor.default)
    product = scatter and _only_used_here(_below_views(scatter.args[0]), _aten.mm.default)
    if not product or not _fits(product):
        return False
    _, operation, _, group = scatter.args
    communicator, shape = _communicator(group, product), [*_value(done).shape]
    if communicator is None or operation != "sum" or _value(product).shape[-1] != shape[-1]:
        return False
    if not all(isinstance(size, int) for size in shape):
        return False
    with graph.inserting_before(done):
        operator = torch.ops.tdccl.gemm_reduce_scatter.default
        rows = graph.call_function(operator, (*product.args, communicator.name))
        fused = graph.call_function(_aten.reshape.default, (rows, shape))
    fused.meta["val"] = _value(done)
    done.replace_all_uses_with(fused)
    _erase(graph, done, product)
    return True


def _erase(graph: torch.fx.Graph, last: torch.fx.Node, first: torch.fx.Node) -> None:
    """Erases a chain of nodes, each used by the next alone. To torch a wait has a side effect, so that it, and all
    before it, would pass for alive."""
    node = None
    while node is not first:
        node, last = last, last.args[0]
        graph.erase_node(node)


def _below_views(node: torch.fx.Node) -> torch.fx.Node:
    """What a chain of views, each used once, looks at; the node itself if something else uses the chain."""
    while isinstance(node, torch.fx.Node) and node.target in _VIEWS and len(node.users) == 1:
        node = node.args[0]
    return node


def _only_used_here(node, target) -> torch.fx.Node | None:
    """The node, if it calls `target` and one other node alone uses it."""
    called = isinstance(node, torch.fx.Node) and node.target is target and len(node.users) == 1
    return node if called else None


def _value(node: torch.fx.Node) -> torch.Tensor:
    return node.meta["val"]


def _fits(product: torch.fx.Node) -> bool:
    return _value(product).dtype in (torch.bfloat16, torch.float16)


def _communicator(group_name: str, node: torch.fx.Node) -> Communicator | None:
    """The communicator of a group of the tdccl backend, if all its ranks are on one node."""
    group = dist.distributed_c10d._resolve_process_group(group_name)
    if not isinstance(group, ProcessGroup):
        group = group._get_backend(_value(node).device)
    with _disable_current_modes():  # the compiler's fake tensors: it may have to be made
        communicator = getattr(group, "communicator", None)
    return communicator if communicator is not None and len(communicator.topology.nodes) == 1 else None
