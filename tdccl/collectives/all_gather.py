"""all_gather: every rank ends with the chunks of all ranks, in rank order. The kernels are in `exchange`."""

from tdccl.collectives import exchange
from tdccl.runtime.algorithm import ITEMSIZE, Algorithm, copying, one_shot, packets_in, tiles_in


def _push_ll(call, context):
    return packets_in(call, context).adding(counts={"send_stride": 0})


def _push(call, context):
    return copying(call, context).adding(counts={"send_stride": 0}, constants={"SAME": True})


def _staged(call, context):
    geometry = tiles_in(call, context, rings=context.size - 1, depth=exchange.DEPTH.value)
    if call.splits is None:
        send = recv = (geometry.counts["count"],) * context.size
    else:
        unit = ITEMSIZE[geometry.dtype]
        send, recv = (tuple(count * call.itemsize // unit for count in counts) for counts in call.splits)
    return geometry.splitting(send, recv, same=True).adding(constants={"SAME": True})


ALGORITHMS = [
    Algorithm("push_ll", exchange.push_ll, _push_ll, sent=lambda n: 2 * (n - 1), packets=one_shot),
    Algorithm("push", exchange.push, _push, sent=lambda n: n - 1, symmetric=("recv",)),
    Algorithm("staged", exchange.staged, _staged, sent=lambda n: n - 1, splits=True),
]
