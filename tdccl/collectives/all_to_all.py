"""all_to_all: rank i's j-th chunk ends as rank j's i-th. The kernels are in `exchange`."""

from tdccl.collectives import exchange
from tdccl.runtime.algorithm import ITEMSIZE, Algorithm, copying, one_shot, packets_in, tiles_in


def _push_ll(call, context):
    geometry = packets_in(call, context)
    return geometry.adding(counts={"send_stride": geometry.counts["count"]})


def _push(call, context):
    geometry = copying(call, context)
    return geometry.adding(counts={"send_stride": geometry.counts["count"]}, constants={"SAME": False})


def _staged(call, context):
    geometry = tiles_in(call, context, rings=context.size - 1, depth=exchange.DEPTH.value)
    splits = call.splits or ((call.count,) * context.size,) * 2
    unit = ITEMSIZE[geometry.dtype]
    send, recv = (tuple(count * call.itemsize // unit for count in counts) for counts in splits)
    return geometry.splitting(send, recv).adding(constants={"SAME": False})


ALGORITHMS = [
    Algorithm("push_ll", exchange.push_ll, _push_ll, sent=lambda n: 2 * (n - 1), packets=one_shot),
    Algorithm("push", exchange.push, _push, sent=lambda n: n - 1, symmetric=("recv",), in_place=False),
    Algorithm("staged", exchange.staged, _staged, sent=lambda n: n - 1, splits=True),
]
