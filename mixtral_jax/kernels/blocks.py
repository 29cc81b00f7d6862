"""Block-sparse experts in plain JAX: each expert runs over blocks of its own rows, as many as it has.

The loop count is dynamic, so an imbalanced router costs no more than a balanced one, and the F-wide values exist for one
block at a time. Blocks need no padding between groups: the last block of an expert may reach into the next expert's
rows, whose results are written later and win. The backward pass is written by hand: it recomputes gate and up rather
than storing them (2 extra matmuls of 6, and no M x F buffer).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def silu_and_slope(x):
    """silu(x) and its derivative."""
    sigmoid = jax.nn.sigmoid(x)
    silu = x * sigmoid
    return silu, sigmoid + silu * (1 - sigmoid)


def matmul(a, b, contract):
    """Contracts one axis of each with float32 accumulation; the caller casts down where a value is stored."""
    return lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())), preferred_element_type=jnp.float32)


def padded(x_MD, block: int):
    """Room for a last block that reaches over the end."""
    # dynamic_slice clamps at the end of the array, which would shift the last block: give it room instead.
    return jnp.pad(x_MD, ((0, block), (0, 0)))


def count_blocks(size, block):
    """Blocks that an expert of `size` rows needs."""
    return (size + block - 1) // block


def keep_grouped(y_MD, group_sizes_e):
    """Zeroes the rows after the last group."""
    rows_M = jnp.arange(y_MD.shape[0])
    return jnp.where(rows_M[:, None] < group_sizes_e.sum(), y_MD, 0)


def expert_blocks(y_MD, padded_MD, weights, start, size, block: int, once: bool = False):
    """Runs one expert over the blocks of its own rows, `size` rows from `start`, and writes the results into y_MD.

    `once` promises that `size` is at most `block`, and makes the loop a branch.
    """
    w_gate_DF, w_up_DF, w_down_FD = weights
    dtype = padded_MD.dtype

    def one_block(i, y_MD):
        at = start + i * block
        rows_bD = lax.dynamic_slice(padded_MD, (at, 0), (block, padded_MD.shape[1]))
        gate_bF = matmul(rows_bD, w_gate_DF, (1, 0))
        up_bF = matmul(rows_bD, w_up_DF, (1, 0))
        hidden_bF = (jax.nn.silu(gate_bF) * up_bF).astype(dtype)
        out_bD = matmul(hidden_bF, w_down_FD, (1, 0)).astype(dtype)
        return lax.dynamic_update_slice(y_MD, out_bD, (at, 0))

    if once:
        return lax.cond(size > 0, functools.partial(one_block, 0), lambda y_MD: y_MD, y_MD)
    return lax.fori_loop(0, count_blocks(size, block), one_block, y_MD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block: int):
    """SwiGLU experts over grouped rows; see mixtral_jax.kernels for the signature.

    Args:
        x_MD: rows sorted by expert, float.
        w_gate_eDF, w_up_eDF, w_down_eFD: expert weights, in x's dtype.
        group_sizes_e: rows of each expert, int32; the sum may be less than M.
        block: rows of one block. Work is wasted only in an expert's last block.

    Returns:
        y_MD in x's dtype, zero after the last group.
    """
    m = x_MD.shape[0]
    padded_MD = padded(x_MD, block)
    starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e

    def one_expert(y_MD, inputs):
        *weights, start, size = inputs
        return expert_blocks(y_MD, padded_MD, weights, start, size, block), None

    weights = (w_gate_eDF, w_up_eDF, w_down_eFD, starts_e, group_sizes_e)
    y_MD, _ = lax.scan(one_expert, jnp.zeros_like(padded_MD), weights)
    return keep_grouped(y_MD[:m], group_sizes_e)


def _forward(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block):
    y_MD = grouped_swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block)
    return y_MD, (x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e)


def _backward(block, saved, dy_MD):
    x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e = saved
    m, d = x_MD.shape
    dtype = x_MD.dtype
    padded_MD = padded(x_MD, block)
    padded_dy_MD = padded(dy_MD, block)
    starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e

    def one_expert(dx_MD, inputs):
        w_gate_DF, w_up_DF, w_down_FD, start, size = inputs

        def one_block(i, carry):
            dx_MD, d_gate_DF, d_up_DF, d_down_FD = carry
            at = start + i * block
            rows_bD = lax.dynamic_slice(padded_MD, (at, 0), (block, d))
            dy_bD = lax.dynamic_slice(padded_dy_MD, (at, 0), (block, d))
            # Rows past this expert's own belong to the next: their part of the weight gradients must vanish.
            mine_b = i * block + jnp.arange(block) < size
            dy_bD = jnp.where(mine_b[:, None], dy_bD, 0)
            gate_bF = matmul(rows_bD, w_gate_DF, (1, 0))
            up_bF = matmul(rows_bD, w_up_DF, (1, 0))
            silu_bF, slope_bF = silu_and_slope(gate_bF)
            dh_bF = matmul(dy_bD, w_down_FD, (1, 1))
            hidden_bF = (silu_bF * up_bF).astype(dtype)
            dg_bF = (dh_bF * up_bF * slope_bF).astype(dtype)
            du_bF = (dh_bF * silu_bF).astype(dtype)
            dx_bD = matmul(dg_bF, w_gate_DF, (1, 1)) + matmul(du_bF, w_up_DF, (1, 1))
            return (
                lax.dynamic_update_slice(dx_MD, dx_bD.astype(dtype), (at, 0)),
                d_gate_DF + matmul(rows_bD, dg_bF, (0, 0)),
                d_up_DF + matmul(rows_bD, du_bF, (0, 0)),
                d_down_FD + matmul(hidden_bF, dy_bD, (0, 0)),
            )

        zeros = [jnp.zeros(w.shape, jnp.float32) for w in (w_gate_DF, w_up_DF, w_down_FD)]
        dx_MD, *grads = lax.fori_loop(0, count_blocks(size, block), one_block, (dx_MD, *zeros))
        return dx_MD, [grad.astype(dtype) for grad in grads]

    weights = (w_gate_eDF, w_up_eDF, w_down_eFD, starts_e, group_sizes_e)
    dx_MD, grads = lax.scan(one_expert, jnp.zeros_like(padded_MD), weights)
    return (keep_grouped(dx_MD[:m], group_sizes_e), *grads, None)


grouped_swiglu.defvjp(_forward, _backward)
