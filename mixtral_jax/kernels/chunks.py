"""SwiGLU experts made of grouped matmuls that others wrote, over chunks of rows with a dynamic count.

A grouped matmul over all rows would keep gate, up and hidden [M, F] of a receive buffer that is sized for the worst
case. Here they exist for one chunk at a time, and chunks without rows are not run, so that imbalance costs the time of
the rows that there are and no memory. The backward pass is written by hand and recomputes gate and up.

What is materialised: three arrays [chunk, F] forward, six backward; and backward the gradients of this shard's expert
weights in float32, three times [e, D, F], which collect the chunks' parts. whole.py is for rows so few that this is more
than their own F-wide values.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels.blocks import silu_and_slope


class Products(NamedTuple):
    """A grouped matmul and its two transposes, float32 inside. Rows after the last group may come out as anything.

    dot: (x_MD, w_eDF, group_sizes_e) -> x w of each row's own expert, [M, F] in x's dtype.
    dot_transposed: (y_MF, w_eDF, group_sizes_e) -> y w^T, [M, D] in y's dtype.
    add_outer: (total_eDF, x_MD, y_MF, group_sizes_e) -> total plus x^T y of each expert's rows, float32.
    outer: (x_MD, y_MF, group_sizes_e) -> x^T y of each expert's rows in x's dtype, zero without rows; whole.py needs it.
    """

    dot: Callable
    dot_transposed: Callable
    add_outer: Callable
    outer: Callable | None = None


def chunk_rows(m: int, block: int) -> int:
    """Rows of a chunk: 16 blocks, in whole tiles of 128, and no more than there are.

    With the default block of 256, 4,096 rows: enough that reading an expert's weights again for every chunk costs a few
    percent of the multiplication on a TPU or a GPU, and [chunk, F] of 8x7B is 112 MiB in bfloat16.
    """
    return min(-(-16 * block // 128), -(-m // 128)) * 128


def _sizes_inside(group_sizes_e, start, chunk: int):
    """Rows of each group that lie in the chunk of sorted rows from `start`."""
    ends_e = jnp.clip(jnp.cumsum(group_sizes_e) - start, 0, chunk)
    return jnp.diff(ends_e, prepend=0).astype(jnp.int32)


def _chunks(group_sizes_e, chunk: int):
    return (group_sizes_e.sum() + chunk - 1) // chunk


def _whole_chunks(x_MD, chunk: int):
    return jnp.pad(x_MD, ((0, -x_MD.shape[0] % chunk), (0, 0)))


def gate_and_up(rows_CD, w_gate_eDF, w_up_eDF, sizes_e, products: Products):
    """The two F-wide products of rows in their dtype, zero without an expert, and which rows have one [C, 1]."""
    # The kernels leave rows without an expert as they find them, and NaN there would spread through sums over rows.
    here_C1 = jnp.arange(rows_CD.shape[0])[:, None] < sizes_e.sum()
    gate_CF = jnp.where(here_C1, products.dot(rows_CD, w_gate_eDF, sizes_e), 0)
    return gate_CF, jnp.where(here_C1, products.dot(rows_CD, w_up_eDF, sizes_e), 0), here_C1


def down(gate_CF, up_CF, w_down_eFD, sizes_e, here_C1, products: Products):
    """silu(gate) * up through the last product; SwiGLU in float32, the result in gate's dtype."""
    gate32_CF, up32_CF = gate_CF.astype(jnp.float32), up_CF.astype(jnp.float32)
    hidden_CF = (jax.nn.silu(gate32_CF) * up32_CF).astype(gate_CF.dtype)
    return jnp.where(here_C1, products.dot(hidden_CF, w_down_eFD, sizes_e), 0)


def cotangents(dy_CD, gate_CF, up_CF, weights, sizes_e, here_C1, products: Products):
    """What rows pass back: hidden, dg, du [C, F] and dx [C, D], in the rows' dtype. dy is zero where no expert is."""
    w_gate_eDF, w_up_eDF, w_down_eFD = weights
    dtype = gate_CF.dtype
    gate_CF, up_CF = gate_CF.astype(jnp.float32), up_CF.astype(jnp.float32)
    dh_CF = jnp.where(here_C1, products.dot_transposed(dy_CD, w_down_eFD, sizes_e), 0).astype(jnp.float32)
    silu_CF, slope_CF = silu_and_slope(gate_CF)
    hidden_CF = (silu_CF * up_CF).astype(dtype)
    dg_CF = (dh_CF * up_CF * slope_CF).astype(dtype)
    du_CF = (dh_CF * silu_CF).astype(dtype)
    dx_CD = products.dot_transposed(dg_CF, w_gate_eDF, sizes_e).astype(jnp.float32)
    dx_CD += products.dot_transposed(du_CF, w_up_eDF, sizes_e)
    return hidden_CF, dg_CF, du_CF, jnp.where(here_C1, dx_CD, 0).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, chunk: int, products: Products):
    """SwiGLU experts over grouped rows; see mixtral_jax.kernels for the signature.

    Args:
        x_MD: rows sorted by expert, float.
        w_gate_eDF, w_up_eDF, w_down_eFD: expert weights, in x's dtype.
        group_sizes_e: rows of each expert, int32; the sum may be less than M.
        chunk: rows of one chunk, C.
        products: the grouped matmuls.

    Returns:
        y_MD in x's dtype, zero after the last group.
    """
    padded_MD = _whole_chunks(x_MD, chunk)

    def one_chunk(i, y_MD):
        at, d = i * chunk, padded_MD.shape[1]
        rows_CD = lax.dynamic_slice(padded_MD, (at, 0), (chunk, d))
        sizes_e = _sizes_inside(group_sizes_e, at, chunk)
        gate_CF, up_CF, here_C1 = gate_and_up(rows_CD, w_gate_eDF, w_up_eDF, sizes_e, products)
        out_CD = down(gate_CF, up_CF, w_down_eFD, sizes_e, here_C1, products)
        return lax.dynamic_update_slice(y_MD, out_CD, (at, 0))

    y_MD = lax.fori_loop(0, _chunks(group_sizes_e, chunk), one_chunk, jnp.zeros_like(padded_MD))
    return y_MD[: x_MD.shape[0]]


def _forward(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, chunk, products):
    y_MD = swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, chunk, products)
    return y_MD, (x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e)


def _backward(chunk, products, saved, dy_MD):
    x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e = saved
    m, d = x_MD.shape
    dtype = x_MD.dtype
    padded_MD, padded_dy_MD = _whole_chunks(x_MD, chunk), _whole_chunks(dy_MD, chunk)

    def one_chunk(i, carry):
        dx_MD, d_gate_eDF, d_up_eDF, d_down_eFD = carry
        at = i * chunk
        rows_CD = lax.dynamic_slice(padded_MD, (at, 0), (chunk, d))
        sizes_e = _sizes_inside(group_sizes_e, at, chunk)
        gate_CF, up_CF, here_C1 = gate_and_up(rows_CD, w_gate_eDF, w_up_eDF, sizes_e, products)
        dy_CD = jnp.where(here_C1, lax.dynamic_slice(padded_dy_MD, (at, 0), (chunk, d)), 0)
        weights = (w_gate_eDF, w_up_eDF, w_down_eFD)
        hidden_CF, dg_CF, du_CF, dx_CD = cotangents(dy_CD, gate_CF, up_CF, weights, sizes_e, here_C1, products)
        return (
            lax.dynamic_update_slice(dx_MD, dx_CD, (at, 0)),
            products.add_outer(d_gate_eDF, rows_CD, dg_CF, sizes_e),
            products.add_outer(d_up_eDF, rows_CD, du_CF, sizes_e),
            products.add_outer(d_down_eFD, hidden_CF, dy_CD, sizes_e),
        )

    zeros = [jnp.zeros(w.shape, jnp.float32) for w in (w_gate_eDF, w_up_eDF, w_down_eFD)]
    carry = (jnp.zeros_like(padded_MD), *zeros)
    dx_MD, *grads = lax.fori_loop(0, _chunks(group_sizes_e, chunk), one_chunk, carry)
    return (dx_MD[:m], *(grad.astype(dtype) for grad in grads), None)


swiglu.defvjp(_forward, _backward)
