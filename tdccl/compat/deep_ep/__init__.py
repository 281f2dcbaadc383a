"""DeepEP's interface for one host: `import tdccl.compat.deep_ep as deep_ep`.

`Buffer` says what differs.
"""

from tdccl.compat.deep_ep.buffer import Buffer, Config
from tdccl.compat.deep_ep.utils import EventHandle, EventOverlap

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap"]
