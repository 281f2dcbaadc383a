"""Expert parallelism: dispatch and combine of tokens between the ranks of a mixture of experts."""

from tdccl.ep.batched import BatchedPlan, LowLatency
from tdccl.ep.expert_parallel import Dispatched, ExpertParallel, Plan

__all__ = ["BatchedPlan", "Dispatched", "ExpertParallel", "LowLatency", "Plan"]
