"""Communication fused with computation: products of matrices whose rows are sharded over the ranks."""

from tdccl.overlap.all_gather_gemm import all_gather_gemm
from tdccl.overlap.all_gather_grouped_gemm import all_gather_grouped_gemm
from tdccl.overlap.gemm_reduce_scatter import gemm_reduce_scatter
from tdccl.overlap.grouped_gemm_reduce_scatter import grouped_gemm_reduce_scatter
from tdccl.overlap.moe import MoE
from tdccl.overlap.routing import Routing, route, route_experts
