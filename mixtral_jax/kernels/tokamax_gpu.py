"""The GPU's grouped matmul: tokamax's kernels (Mosaic on Hopper, else Triton), in chunks. An optional dependency.

tokamax chooses its kernel by the devices of the running process, so unlike the other backends this one cannot be compiled
for another platform than the one it runs on. On a CPU it multiplies by jax.lax.ragged_dot, for tests.
"""

import jax
import jax.numpy as jnp
from absl import flags
from jax.lax import RaggedDotDimensionNumbers

from mixtral_jax.config import UserError
from mixtral_jax.kernels.chunks import Products, chunk_rows, swiglu

_PLAIN = RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])  # MD,eDF->MF
_TRANSPOSED = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])  # MF,eDF->MD
_OUTER = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])  # MD,MF->eDF


def _ragged_dot(a, b, group_sizes_e, numbers, dtype):
    try:
        import tokamax
    except ImportError:
        raise UserError(
            "model.expert_backend=tokamax needs the package tokamax; install it with "
            "`pip install -r requirements-gpu.txt`, or set model.expert_backend=blocks"
        ) from None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # it would read the command line of programs whose flags are not absl's
    # Never "xla" on a GPU: it can fall back to multiplying by every expert, without a word.
    implementation = ("mosaic", "triton") if jax.default_backend() == "gpu" else ("xla",)
    return tokamax.ragged_dot_general(
        a, b, group_sizes_e, numbers, preferred_element_type=dtype, implementation=implementation
    )


def _dot(x_MD, w_eDF, group_sizes_e):
    return _ragged_dot(x_MD, w_eDF, group_sizes_e, _PLAIN, x_MD.dtype)


def _dot_transposed(y_MF, w_eDF, group_sizes_e):
    return _ragged_dot(y_MF, w_eDF, group_sizes_e, _TRANSPOSED, y_MF.dtype)


def _add_outer(total_eDF, x_MD, y_MF, group_sizes_e):
    return total_eDF + _ragged_dot(x_MD, y_MF, group_sizes_e, _OUTER, jnp.float32)


PRODUCTS = Products(_dot, _dot_transposed, _add_outer)


def grouped_swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block: int):
    """SwiGLU experts over grouped rows; see mixtral_jax.kernels for the signature and chunks.py for what is kept.

    Args and returns as `chunks.swiglu`; a chunk has 16 blocks.

    Raises:
        UserError: tokamax is not installed.
    """
    chunk = chunk_rows(x_MD.shape[0], block)
    return swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, chunk, PRODUCTS)
