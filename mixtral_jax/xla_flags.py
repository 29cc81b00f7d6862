"""XLA's flags for GPUs: sets that benchmarks compare, and the one that training and the other commands use.

A set becomes the chosen one when `python -m benchmarks.gpu --flags=...` has shown it faster (docs/gpu.md); none has been yet.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL"
GPU_SETS = {
    "none": (),
    # CUDA graphs hold conditionals by default and loops not: each turn of a loop of unknown length then waits for the host.
    "loops_in_graphs": (f"--xla_gpu_enable_command_buffer={_GRAPHS},WHILE",),
    "no_graphs": ("--xla_gpu_enable_command_buffer=",),
    "latency_hiding": ("--xla_gpu_enable_latency_hiding_scheduler=true",),
    "cublas_only": ("--xla_gpu_enable_triton_gemm=false",),
    "exhaustive_tiling": ("--xla_gpu_exhaustive_tiling_search=true",),
    # Slices of stacked weights as operands of a matmul, without a copy.
    "slice_fusion": ("--xla_gpu_enable_dynamic_slice_fusion=true",),
    # Of jax.lax.ragged_dot, which XLA may otherwise compute by every expert.
    "ragged_dot_fusion": ("--xla_gpu_experimental_use_ragged_dot_fusion=true",),
    "ragged_dot_grouped_gemm": ("--xla_gpu_experimental_use_ragged_dot_grouped_gemm=true",),
}
GPU_CHOSEN = "none"


def added(flags: str, chosen: tuple[str, ...]) -> str:
    """XLA_FLAGS with a set's flags in front, less those that are named there already: the user's word counts."""
    named = {flag.partition("=")[0] for flag in flags.split()}
    return " ".join([flag for flag in chosen if flag.partition("=")[0] not in named] + flags.split())


def gpu_here() -> bool:
    """Whether jax may find an NVIDIA GPU; asks no driver, because the flags must be set before jax starts."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return Path("/dev/nvidiactl").exists() and (not platforms or "cuda" in platforms or "gpu" in platforms)


def apply(environment: MutableMapping[str, str] = os.environ) -> None:
    """Puts the chosen set into XLA_FLAGS where there is a GPU; before jax makes its client."""
    if GPU_SETS[GPU_CHOSEN] and gpu_here():
        environment["XLA_FLAGS"] = added(environment.get("XLA_FLAGS", ""), GPU_SETS[GPU_CHOSEN])
