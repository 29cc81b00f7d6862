"""Experts whose weights are separate arrays, so that only the experts that were chosen are read. For generation only.

In one stacked array [E, D, F] an expert is a slice, and a slice picked at run time is copied before it is multiplied (on
a CPU by one thread). A separate array is passed by reference: the branch that is not taken reads nothing of it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels.blocks import expert_blocks, keep_grouped, padded, quarters

# Up to this many rows each goes through its experts alone, as matrix times vector, in a branch of its own: at batch 1 the
# products of a layer then overlap. With 8 rows it is no faster than the grouped way, and a step compiles five times as
# long (44 s against 8 s for 8 layers on two CPU cores).
FEW_ROWS = 2
LOOP_ROWS = 64  # more than these of a step go through loops over blocks, whose sizes fit too


def swiglu(x_MD, w_gate_DF, w_up_DF, w_down_FD):
    """One expert on all rows, in x's dtype with float32 sums; the reference for both ways below."""
    gate_MF = jnp.dot(x_MD, w_gate_DF, preferred_element_type=jnp.float32)
    up_MF = jnp.dot(x_MD, w_up_DF, preferred_element_type=jnp.float32)
    hidden_MF = (jax.nn.silu(gate_MF) * up_MF).astype(x_MD.dtype)
    return jnp.dot(hidden_MF, w_down_FD, preferred_element_type=jnp.float32).astype(x_MD.dtype)


def few(x_MD, gates_MK, index_MK, weights_e):
    """Sums gate * expert(row) over each row's experts, for few rows.

    Args:
        x_MD: one row for each token.
        gates_MK: float32.
        index_MK: expert 0..e-1 of each choice; e means none of these.
        weights_e: for each expert w_gate_DF, w_up_DF, w_down_FD in x's dtype.

    Returns:
        out_MD in x's dtype; zero where no expert was chosen.
    """
    out_MD = jnp.zeros(x_MD.shape, jnp.float32)
    for e, weights in enumerate(weights_e):
        chose_MK = index_MK == e
        gate_M = jnp.where(chose_MK, gates_MK, 0).sum(-1)
        chose_M = chose_MK.any(-1)

        def rows(x_MD, weights=weights, chose_M=chose_M):
            one = [x_MD[i : i + 1] for i in range(x_MD.shape[0])]
            return jnp.concatenate(
                [lax.cond(chose_M[i], lambda x: swiglu(x, *weights), jnp.zeros_like, x) for i, x in enumerate(one)]
            )

        y_MD = lax.cond(chose_M.any(), rows, jnp.zeros_like, x_MD)
        out_MD += y_MD.astype(jnp.float32) * gate_M[:, None]
    return out_MD.astype(x_MD.dtype)


def branches(rows: int) -> tuple[int, ...]:
    """The sizes of blocks for an expert that has at most so many rows, when decoding; none means loops.

    Of Mixtral's 2 choices of 8 an expert has a quarter of the rows on average. A CPU reads the weights faster for one row
    (27 to 45 GB/s) than for 2 to 8 (17 to 30, all alike), and more slowly for more.
    """
    if jax.default_backend() == "gpu":
        return (rows,)
    if rows > LOOP_ROWS:
        return ()
    return tuple(sorted({rows // 4 if rows >= 16 else 1, max(rows // 2, 1), rows}))


def grouped_swiglu(x_MD, weights_e, group_sizes_e, block: int, branches: tuple[int, ...] = ()):
    """The `blocks` kernel (forward only) over separate arrays: an expert without rows is not read.

    Args:
        x_MD: rows sorted by expert.
        weights_e: for each expert w_gate_DF, w_up_DF, w_down_FD in x's dtype.
        group_sizes_e: int32; the sum may be less than M.
        block: rows of one block.
        branches: sizes of blocks, ascending, the last no smaller than any expert's rows: one of them takes the place of a
            loop. XLA puts branches into a CUDA graph, and leaves out loops of unknown length, each turn of which waits for
            the host; and on a CPU one row streams the weights faster than eight.

    Returns:
        y_MD in x's dtype, zero after the last group.
    """
    rows_MD = padded(x_MD, block)
    starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e
    y_MD = jnp.zeros_like(rows_MD)
    for e, weights in enumerate(weights_e):
        y_MD, _ = expert_blocks(
            y_MD, rows_MD, weights, starts_e[e], group_sizes_e[e], quarters(block), branches=branches
        )
    return keep_grouped(y_MD[: x_MD.shape[0]], group_sizes_e)
