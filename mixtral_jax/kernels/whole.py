"""SwiGLU experts made of grouped matmuls that others wrote, over all rows at once; chunks.py is for more rows.

Nothing is recomputed and no gradient is summed over chunks: nine grouped matmuls forward and backward where chunks.py has
eleven, and the gradients of the weights are written once, in the weights' dtype. What is materialised are F-wide values
of all rows, of which gate and up wait for the backward pass.
"""

import functools

import jax
import jax.numpy as jnp

from mixtral_jax.kernels.chunks import Products, cotangents, down, gate_and_up


def fits(m: int, e: int, d: int) -> bool:
    """Whether M rows take less memory here than in chunks.

    Six values [M, F] of two bytes are alive in the backward pass; chunks keep three float32 gradients [e, D, F] and one
    product that is added to them, so that M <= 4/3 e D is no more; the rest is margin. 8x7B on one GPU: 32,768 rows.
    """
    return m <= e * d


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, products: Products):
    """SwiGLU experts over grouped rows; see mixtral_jax.kernels for the signature.

    Args:
        x_MD: rows sorted by expert, float.
        w_gate_eDF, w_up_eDF, w_down_eFD: expert weights, in x's dtype.
        group_sizes_e: rows of each expert, int32; the sum may be less than M.
        products: the grouped matmuls, `outer` among them.

    Returns:
        y_MD in x's dtype, zero after the last group.
    """
    return _forward(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, products)[0]


def _forward(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, products):
    gate_MF, up_MF, here_M1 = gate_and_up(x_MD, w_gate_eDF, w_up_eDF, group_sizes_e, products)
    y_MD = down(gate_MF, up_MF, w_down_eFD, group_sizes_e, here_M1, products)
    return y_MD, (x_MD, gate_MF, up_MF, (w_gate_eDF, w_up_eDF, w_down_eFD), group_sizes_e)


def _backward(products, saved, dy_MD):
    x_MD, gate_MF, up_MF, weights, group_sizes_e = saved
    here_M1 = jnp.arange(x_MD.shape[0])[:, None] < group_sizes_e.sum()
    dy_MD = jnp.where(here_M1, dy_MD, 0)
    hidden_MF, dg_MF, du_MF, dx_MD = cotangents(dy_MD, gate_MF, up_MF, weights, group_sizes_e, here_M1, products)
    d_gate_eDF, d_up_eDF = (products.outer(x_MD, d_MF, group_sizes_e) for d_MF in (dg_MF, du_MF))
    return dx_MD, d_gate_eDF, d_up_eDF, products.outer(hidden_MF, dy_MD, group_sizes_e), None


swiglu.defvjp(_forward, _backward)
