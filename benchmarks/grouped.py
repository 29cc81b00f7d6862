"""Grouped matmuls that are compared with each other: those of the package, and others in the package's own two wrappers.

A name is what a candidate of benchmarks/gpu.py or a test in tests/gpu/ asks for; what is no backend of the package cannot be
chosen for training.
"""

import functools

from jax import lax

from mixtral_jax.kernels import BACKENDS, tokamax_gpu
from mixtral_jax.kernels.chunks import Products
from mixtral_jax.kernels.tokamax_gpu import OUTER, TRANSPOSED


def _ragged(a, b, group_sizes_e, numbers, dtype):
    return lax.ragged_dot_general(a, b, group_sizes_e, numbers, preferred_element_type="float32").astype(dtype)


RAGGED_DOT = Products(
    dot=lambda x_MD, w_eDF, sizes_e: lax.ragged_dot(x_MD, w_eDF, sizes_e, preferred_element_type=x_MD.dtype),
    dot_transposed=lambda y_MF, w_eDF, sizes_e: _ragged(y_MF, w_eDF, sizes_e, TRANSPOSED, y_MF.dtype),
    add_outer=lambda total_eDF, x_MD, y_MF, sizes_e: total_eDF + _ragged(x_MD, y_MF, sizes_e, OUTER, "float32"),
    outer=lambda x_MD, y_MF, sizes_e: _ragged(x_MD, y_MF, sizes_e, OUTER, x_MD.dtype),
)

GROUPED = {
    "blocks": BACKENDS["blocks"],
    "tokamax": BACKENDS["tokamax"],
    "tokamax_mosaic": functools.partial(tokamax_gpu.grouped_swiglu, by=tokamax_gpu.products(("mosaic",))),
    "tokamax_triton": functools.partial(tokamax_gpu.grouped_swiglu, by=tokamax_gpu.products(("triton",))),
    "ragged_dot": functools.partial(tokamax_gpu.grouped_swiglu, by=RAGGED_DOT),
}
