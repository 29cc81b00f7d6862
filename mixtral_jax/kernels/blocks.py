"""Block-sparse experts in plain JAX: each expert runs over blocks of its own rows, as many as it has.

The loop counts are dynamic, so an imbalanced router costs no more than a balanced one. After the blocks of full size come
smaller ones, each at most once: less than SMALLEST rows of an expert are padding. (With blocks of 256 alone
and 512 rows an expert, a quarter of the work was padding; with blocks of 64 alone the matmuls are slower.) Blocks need no
padding between groups: the last block of an expert may reach into the next expert's rows, whose results are written later
and win.

The backward pass is written by hand. It finds gate and up stored (`keep`), or recomputes them: 2 extra matmuls of 9, and
the F-wide values exist for one block at a time and never for M rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

SMALLEST = 32  # rows of the smallest block: matmuls of fewer run at less than half the rate


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


def rungs(block: int) -> list[int]:
    """Sizes of blocks from the largest: block times 1, 3/4, 1/2, 3/8, 1/4 and so on, in whole multiples of SMALLEST.

    Any number of rows below `block` is covered by two of them or three: with halves alone it would be one more, and each
    block adds to an expert's weight gradients, which takes as long as multiplying 60 rows.
    """
    sizes, half = [block], block
    while half % (2 * SMALLEST) == 0:
        half //= 2
        sizes += [3 * half // 2] if 3 * half // 2 % SMALLEST == 0 else []
        sizes.append(half)
    return sizes


def over_blocks(size, block: int, one_block, carry):
    """Covers `size` rows, known at run time, with blocks: carry = one_block(rows, first, carry) for each.

    Args:
        size: int32 scalar.
        block: rows of the largest block.
        one_block: gets the block's static number of rows and the int32 place of its first one, of `size`. The last one
            may reach beyond `size`, by less than the smallest rung.
        carry: any pytree.
    """
    sizes = rungs(block)
    left = (size + sizes[-1] - 1) // sizes[-1] * sizes[-1]
    first = jnp.zeros_like(left)
    for rows in sizes:
        count = left // rows

        def step(i, carry, rows=rows, first=first):
            return one_block(rows, first + i * rows, carry)

        carry = lax.fori_loop(0, count, step, carry)
        first, left = first + count * rows, left - count * rows
    return carry


def keep_grouped(y_MD, group_sizes_e):
    """Zeroes the rows after the last group."""
    rows_M = jnp.arange(y_MD.shape[0])
    return jnp.where(rows_M[:, None] < group_sizes_e.sum(), y_MD, 0)


def cut(x_MD, at, rows: int):
    """`rows` rows from `at`."""
    return lax.dynamic_slice(x_MD, (at, 0), (rows, x_MD.shape[1]))


def put(x_MD, part_bD, at):
    """x with part's rows from `at`, in x's dtype."""
    return lax.dynamic_update_slice(x_MD, part_bD.astype(x_MD.dtype), (at, 0))


def expert_blocks(y_MD, padded_MD, weights, start, size, block: int, kept=()):
    """Runs one expert over the blocks of its own rows, `size` rows from `start`, and writes the results into y_MD.

    `kept` is empty, or two arrays [M, F] that gate and up are written into. Returns y_MD and kept.
    """
    w_gate_DF, w_up_DF, w_down_FD = weights
    dtype = padded_MD.dtype

    def one_block(rows, first, carry):
        y_MD, kept = carry
        at = start + first
        rows_bD = cut(padded_MD, at, rows)
        gate_bF = matmul(rows_bD, w_gate_DF, (1, 0))
        up_bF = matmul(rows_bD, w_up_DF, (1, 0))
        hidden_bF = (jax.nn.silu(gate_bF) * up_bF).astype(dtype)
        if kept:
            kept = [put(all_MF, part_bF, at) for all_MF, part_bF in zip(kept, (gate_bF, up_bF), strict=True)]
        return put(y_MD, matmul(hidden_bF, w_down_FD, (1, 0)), at), kept

    return over_blocks(size, block, one_block, (y_MD, list(kept)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def grouped_swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block: int, keep: bool = False):
    """SwiGLU experts over grouped rows; see mixtral_jax.kernels for the signature.

    Args:
        x_MD: rows sorted by expert, float.
        w_gate_eDF, w_up_eDF, w_down_eFD: expert weights, in x's dtype.
        group_sizes_e: rows of each expert, int32; the sum may be less than M.
        block: rows of the largest block. Work is wasted only in an expert's last block.
        keep: store gate and up, [M, F] each in x's dtype, for the backward pass.

    Returns:
        y_MD in x's dtype, zero after the last group.
    """
    return _run(x_MD, (w_gate_eDF, w_up_eDF, w_down_eFD), group_sizes_e, block, keep=False)[0]


def _run(x_MD, weights, group_sizes_e, block: int, keep: bool):
    """The output, and the two kept arrays or none."""
    padded_MD = padded(x_MD, block)
    starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e
    wide = (padded_MD.shape[0], weights[0].shape[-1])
    kept = [jnp.zeros(wide, x_MD.dtype) for _ in range(2)] if keep else []

    def one_expert(carry, inputs):
        *weights, start, size = inputs
        y_MD, kept = carry
        return expert_blocks(y_MD, padded_MD, weights, start, size, block, kept), None

    carry = (jnp.zeros_like(padded_MD), kept)
    (y_MD, kept), _ = lax.scan(one_expert, carry, (*weights, starts_e, group_sizes_e))
    return keep_grouped(y_MD[: x_MD.shape[0]], group_sizes_e), kept


def _forward(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block, keep):
    weights = (w_gate_eDF, w_up_eDF, w_down_eFD)
    y_MD, kept = _run(x_MD, weights, group_sizes_e, block, keep)
    return y_MD, (x_MD, weights, group_sizes_e, kept)


def _backward(block, keep, saved, dy_MD):
    x_MD, weights, group_sizes_e, kept = saved
    m, dtype = x_MD.shape[0], x_MD.dtype
    padded_MD, padded_dy_MD = padded(x_MD, block), padded(dy_MD, block)
    starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e

    def one_expert(carry, inputs):
        w_gate_DF, w_up_DF, w_down_FD, start, size, e = inputs

        def one_block(rows, first, carry):
            dx_MD, d_gate_eDF, d_up_eDF, d_down_eFD = carry
            at = start + first
            rows_bD = cut(padded_MD, at, rows)
            # Rows past this expert's own belong to the next: their part of the weight gradients must vanish.
            mine_b = first + jnp.arange(rows) < size
            dy_bD = jnp.where(mine_b[:, None], cut(padded_dy_MD, at, rows), 0)
            if keep:
                gate_bF, up_bF = (cut(all_MF, at, rows).astype(jnp.float32) for all_MF in kept)
            else:
                gate_bF, up_bF = (matmul(rows_bD, w_DF, (1, 0)) for w_DF in (w_gate_DF, w_up_DF))
            silu_bF, slope_bF = silu_and_slope(gate_bF)
            dh_bF = matmul(dy_bD, w_down_FD, (1, 1))
            hidden_bF = (silu_bF * up_bF).astype(dtype)
            dg_bF = (dh_bF * up_bF * slope_bF).astype(dtype)
            du_bF = (dh_bF * silu_bF).astype(dtype)
            dx_bD = matmul(dg_bF, w_gate_DF, (1, 1)) + matmul(du_bF, w_up_DF, (1, 1))
            return (
                put(dx_MD, dx_bD, at),
                d_gate_eDF.at[e].add(matmul(rows_bD, dg_bF, (0, 0))),
                d_up_eDF.at[e].add(matmul(rows_bD, du_bF, (0, 0))),
                d_down_eFD.at[e].add(matmul(hidden_bF, dy_bD, (0, 0))),
            )

        return over_blocks(size, block, one_block, carry), None

    # All experts' gradients in one carry: as outputs of the scan each would be filled with zeros and copied once more.
    zeros = [jnp.zeros(w.shape, jnp.float32) for w in weights]
    inputs = (*weights, starts_e, group_sizes_e, jnp.arange(len(starts_e)))
    (dx_MD, *grads), _ = lax.scan(one_expert, (jnp.zeros_like(padded_MD), *zeros), inputs)
    return (keep_grouped(dx_MD[:m], group_sizes_e), *(grad.astype(dtype) for grad in grads), None)


grouped_swiglu.defvjp(_forward, _backward)
