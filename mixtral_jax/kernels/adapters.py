"""Experts with low-rank adapters (LoRA, arXiv 2106.09685) on frozen weights: the `blocks` kernel with y = x W + scale (x A) B.

The weights get no gradient, so the backward pass has five matmuls as wide as D x F where full fine-tuning has eight, and no
D x F accumulators. The adapters' own matmuls are R wide. The kernel is portable and hand-differentiated, block by block;
kernels/dense.py has its oracle.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels.blocks import cut, keep_grouped, matmul, over_blocks, padded, put, rungs, silu_and_slope


class ExpertAdapters(NamedTuple):
    """The two factors of each of an expert's three matrices, stacked over the experts here (or whole, over E)."""

    gate_a_eDR: jax.Array
    gate_b_eRF: jax.Array
    up_a_eDR: jax.Array
    up_b_eRF: jax.Array
    down_a_eFR: jax.Array
    down_b_eRD: jax.Array


def _low_rank(x_bI, a_IR, b_RO, scale: float):
    """scale (x A) B in float32, and x A in x's dtype, which is what the second product reads."""
    low_bR = matmul(x_bI, a_IR, (1, 0)).astype(x_bI.dtype)
    return scale * matmul(low_bR, b_RO, (1, 0)), low_bR


def _low_rank_backward(dy_bO, x_bI, low_bR, a_IR, b_RO, scale: float):
    """Gradients of `_low_rank` in x, A and B, all float32."""
    d_low_bR = (scale * matmul(dy_bO, b_RO, (1, 1))).astype(x_bI.dtype)
    return matmul(d_low_bR, a_IR, (1, 1)), matmul(x_bI, d_low_bR, (0, 0)), scale * matmul(low_bR, dy_bO, (0, 0))


def _gate_and_up(rows_bD, w_gate_DF, w_up_DF, factors: ExpertAdapters, scale: float):
    """The two F-wide products in float32, and the R-wide values of their adapters."""
    gate_bF, gate_low_bR = _low_rank(rows_bD, factors.gate_a_eDR, factors.gate_b_eRF, scale)
    up_bF, up_low_bR = _low_rank(rows_bD, factors.up_a_eDR, factors.up_b_eRF, scale)
    gate_bF += matmul(rows_bD, w_gate_DF, (1, 0))
    up_bF += matmul(rows_bD, w_up_DF, (1, 0))
    return gate_bF, up_bF, gate_low_bR, up_low_bR


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def grouped_swiglu_lora(x_MD, weights, adapters: ExpertAdapters, group_sizes_e, block: int, scale: float):
    """SwiGLU experts with adapters over grouped rows; rows and groups as in mixtral_jax.kernels.

    Products take their operands in x's dtype and are summed in float32.

    Args:
        x_MD: rows sorted by expert, float.
        weights: w_gate_eDF, w_up_eDF, w_down_eFD in x's dtype; frozen, their gradient is zero.
        adapters: of any float dtype. Their gradients are summed in float32 and have that dtype, so that float32 masters
            lose nothing to x's.
        group_sizes_e: rows of each expert, int32; the sum may be less than M.
        block: rows of the largest block.
        scale: alpha / rank.

    Returns:
        y_MD in x's dtype, zero after the last group.
    """
    m = x_MD.shape[0]
    padded_MD = padded(x_MD, block)
    starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e

    def one_expert(y_MD, inputs):
        (w_gate_DF, w_up_DF, w_down_FD), factors, start, size = inputs
        factors = jax.tree.map(lambda a: a.astype(x_MD.dtype), factors)

        def one_block(rows, first, y_MD):
            rows_bD = cut(padded_MD, start + first, rows)
            gate_bF, up_bF, _, _ = _gate_and_up(rows_bD, w_gate_DF, w_up_DF, factors, scale)
            hidden_bF = (jax.nn.silu(gate_bF) * up_bF).astype(x_MD.dtype)
            delta_bD, _ = _low_rank(hidden_bF, factors.down_a_eFR, factors.down_b_eRD, scale)
            return put(y_MD, matmul(hidden_bF, w_down_FD, (1, 0)) + delta_bD, start + first)

        return over_blocks(size, rungs(block), one_block, y_MD), None

    y_MD, _ = lax.scan(one_expert, jnp.zeros_like(padded_MD), (weights, adapters, starts_e, group_sizes_e))
    return keep_grouped(y_MD[:m], group_sizes_e)


def _forward(x_MD, weights, adapters, group_sizes_e, block, scale):
    y_MD = grouped_swiglu_lora(x_MD, weights, adapters, group_sizes_e, block, scale)
    return y_MD, (x_MD, weights, adapters, group_sizes_e)


def _block_backward(rows_bD, dy_bD, w_gate_DF, w_up_DF, w_down_FD, factors: ExpertAdapters, scale: float):
    """Gradients of one block of one expert's rows: dx_bD, and the six factors', all float32."""
    dtype = rows_bD.dtype
    gate_bF, up_bF, gate_low_bR, up_low_bR = _gate_and_up(rows_bD, w_gate_DF, w_up_DF, factors, scale)
    silu_bF, slope_bF = silu_and_slope(gate_bF)
    hidden_bF = (silu_bF * up_bF).astype(dtype)
    down_low_bR = matmul(hidden_bF, factors.down_a_eFR, (1, 0)).astype(dtype)
    down = _low_rank_backward(dy_bD, hidden_bF, down_low_bR, factors.down_a_eFR, factors.down_b_eRD, scale)
    dh_bF = matmul(dy_bD, w_down_FD, (1, 1)) + down[0]
    dg_bF = (dh_bF * up_bF * slope_bF).astype(dtype)
    du_bF = (dh_bF * silu_bF).astype(dtype)
    gate = _low_rank_backward(dg_bF, rows_bD, gate_low_bR, factors.gate_a_eDR, factors.gate_b_eRF, scale)
    up = _low_rank_backward(du_bF, rows_bD, up_low_bR, factors.up_a_eDR, factors.up_b_eRF, scale)
    dx_bD = matmul(dg_bF, w_gate_DF, (1, 1)) + matmul(du_bF, w_up_DF, (1, 1)) + gate[0] + up[0]
    return dx_bD, ExpertAdapters(*gate[1:], *up[1:], *down[1:])


def _backward(block, scale, saved, dy_MD):
    x_MD, weights, adapters, group_sizes_e = saved
    m = x_MD.shape[0]
    padded_MD, padded_dy_MD = padded(x_MD, block), padded(dy_MD, block)
    starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e

    def one_expert(dx_MD, inputs):
        weights, masters, start, size = inputs
        factors = jax.tree.map(lambda a: a.astype(x_MD.dtype), masters)

        def one_block(rows, first, carry):
            dx_MD, grads = carry
            at = start + first
            # Rows past this expert's own belong to the next: their part of the factors' gradients must vanish.
            mine_b = first + jnp.arange(rows) < size
            dy_bD = jnp.where(mine_b[:, None], cut(padded_dy_MD, at, rows), 0)
            dx_bD, more = _block_backward(cut(padded_MD, at, rows), dy_bD, *weights, factors, scale)
            return put(dx_MD, dx_bD, at), jax.tree.map(jnp.add, grads, more)

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), masters)
        dx_MD, grads = over_blocks(size, rungs(block), one_block, (dx_MD, zeros))
        return dx_MD, jax.tree.map(lambda grad, a: grad.astype(a.dtype), grads, masters)

    dx_MD, grads = lax.scan(one_expert, jnp.zeros_like(padded_MD), (weights, adapters, starts_e, group_sizes_e))
    return keep_grouped(dx_MD[:m], group_sizes_e), None, grads, None


grouped_swiglu_lora.defvjp(_forward, _backward)
