"""The GPU's grouped matmul: tokamax's kernels (Mosaic on Hopper, else Triton). An optional dependency.

tokamax chooses its kernel by the devices of the running process, so unlike the other backends this one cannot be compiled
for another platform than the one it runs on. On a CPU it multiplies by jax.lax.ragged_dot, for tests.
"""

import functools

import jax
import jax.numpy as jnp
from absl import flags
from jax.lax import RaggedDotDimensionNumbers

from mixtral_jax.config import UserError
from mixtral_jax.kernels.chunks import Products, chunk_rows
from mixtral_jax.kernels.chunks import swiglu as swiglu_in_chunks
from mixtral_jax.kernels.whole import fits
from mixtral_jax.kernels.whole import swiglu as swiglu_whole

PLAIN = RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])  # MD,eDF->MF
TRANSPOSED = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])  # MF,eDF->MD
OUTER = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])  # MD,MF->eDF


# In the order of trial; one that does not know a product or a dtype hands on to the next. Never "xla" on a GPU: it can fall
# back to multiplying by every expert, without a word.
GPU = ("mosaic", "triton")


def _ragged_dot(a, b, group_sizes_e, numbers, dtype, implementation):
    try:
        import tokamax
    except ImportError:
        raise UserError(
            "model.expert_backend=tokamax needs the package tokamax; install it with "
            "`pip install -r requirements-gpu.txt`, or set model.expert_backend=blocks"
        ) from None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # it would read the command line of programs whose flags are not absl's
    if jax.default_backend() != "gpu":
        implementation = ("xla",)
    with jax.numpy_rank_promotion("allow"):  # what its kernels do is not ours to forbid
        return tokamax.ragged_dot_general(
            a, b, group_sizes_e, numbers, preferred_element_type=dtype, implementation=implementation
        )


@functools.cache
def products(implementation: tuple[str, ...] = GPU) -> Products:
    """tokamax's matmuls, by the first of these implementations that can."""
    multiply = functools.partial(_ragged_dot, implementation=implementation)

    def outer(x_MD, y_MF, group_sizes_e, dtype):
        # Triton's kernel (0.0.12) runs one iteration for an expert without rows, on the rows before its start: others'.
        product_eDF = multiply(x_MD, y_MF, group_sizes_e, OUTER, dtype)
        return jnp.where(group_sizes_e[:, None, None] > 0, product_eDF, 0)

    return Products(
        dot=lambda x_MD, w_eDF, sizes_e: multiply(x_MD, w_eDF, sizes_e, PLAIN, x_MD.dtype),
        dot_transposed=lambda y_MF, w_eDF, sizes_e: multiply(y_MF, w_eDF, sizes_e, TRANSPOSED, y_MF.dtype),
        add_outer=lambda total_eDF, x_MD, y_MF, sizes_e: total_eDF + outer(x_MD, y_MF, sizes_e, jnp.float32),
        outer=lambda x_MD, y_MF, sizes_e: outer(x_MD, y_MF, sizes_e, x_MD.dtype),
    )


def grouped_swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block: int, by: Products | None = None):
    """SwiGLU experts over grouped rows; see mixtral_jax.kernels for the signature.

    Few rows go through whole.py and more through chunks.py, in chunks of 16 blocks.

    Args and returns as `chunks.swiglu`; `by` are tokamax's products unless a benchmark compares others.

    Raises:
        UserError: tokamax is not installed.
    """
    by = by or products()
    m, (e, d, _) = x_MD.shape[0], w_gate_eDF.shape
    if fits(m, e, d):
        return swiglu_whole(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, by)
    return swiglu_in_chunks(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, chunk_rows(m, block), by)
