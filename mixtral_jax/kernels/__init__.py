"""Grouped matmuls behind one signature.

    grouped_swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block) -> y_MD

Rows are sorted by expert; the first group_sizes_e[0] rows belong to expert 0, and so on; rows after the last group give
exact zeros. The three matmuls of an expert and its SwiGLU are one call, because the F-wide values between them should
exist for one block of rows at a time and never for all rows of a worst-case buffer.
"""

from mixtral_jax.kernels import blocks, dense, megablox, tokamax_gpu

BACKENDS = {
    "dense": dense.grouped_swiglu,
    "blocks": blocks.grouped_swiglu,
    "megablox": megablox.grouped_swiglu,
    "tokamax": tokamax_gpu.grouped_swiglu,
}
