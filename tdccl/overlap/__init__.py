"""Communication fused with computation: products, norms and attention of what is spread over the ranks.

Their kernels fill the GPU, and some wait for others of the same call that are launched later. So on a GPU they run one
after another: not on two streams at once, be it by two communicators.
"""

from tdccl.overlap.all_gather_gemm import all_gather_gemm
from tdccl.overlap.all_gather_grouped_gemm import all_gather_grouped_gemm
from tdccl.overlap.all_reduce_rms_norm import all_reduce_rms_norm
from tdccl.overlap.all_to_all_gemm import all_to_all_gemm
from tdccl.overlap.flash_decode import flash_decode
from tdccl.overlap.gather_kv_attention import gather_kv_attention
from tdccl.overlap.gather_kv_attention_gradient import gather_kv_attention_gradient
from tdccl.overlap.gemm_all_reduce import gemm_all_reduce
from tdccl.overlap.gemm_all_to_all import gemm_all_to_all
from tdccl.overlap.gemm_reduce_scatter import gemm_reduce_scatter
from tdccl.overlap.grouped_gemm_reduce_scatter import grouped_gemm_reduce_scatter
from tdccl.overlap.moe import MoE
from tdccl.overlap.routing import Routing, route, route_experts
