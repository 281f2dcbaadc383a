"""DeepEP's interface for one host: `import tdccl.compat.deep_ep as deep_ep`.

`Buffer` says what differs.
"""

import torch

from tdccl.compat.deep_ep.buffer import Buffer, Config
from tdccl.compat.deep_ep.utils import EventHandle, EventOverlap

topk_idx_t = torch.int64  # int32 is taken too

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]
