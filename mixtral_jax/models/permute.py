"""Rows in the order of their experts, and back: permute copies tokens' rows, unpermute combines the results with gates.

Both have hand-written backward passes, so that no direction scatters.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def permute(x_ND, row_token_M, token_rows_NK):
    """Copies each token's row to the K places its experts read: rows_MD = x[row_token].

    Args:
        x_ND: tokens.
        row_token_M: the token of each sorted row.
        token_rows_NK: the inverse, the K rows of each token. With it the backward pass is a gather too; autodiff would
            scatter-add, which is slow everywhere and not deterministic on a GPU.
    """
    del token_rows_NK
    return x_ND[row_token_M]


permute.defvjp(
    lambda x_ND, row_token_M, token_rows_NK: (x_ND[row_token_M], token_rows_NK),
    lambda token_rows_NK, d_MD: (d_MD[token_rows_NK].sum(1), None, None),
)


@jax.custom_vjp
def unpermute(rows_MD, gates_NK, row_token_M, token_rows_NK):
    """Combines the K results of each token: out = sum over k of gate * row, float32 sum, rows' dtype."""
    return _combine(rows_MD, gates_NK, token_rows_NK)


def _combine(rows_MD, gates_NK, token_rows_NK):
    gathered_NKD = rows_MD[token_rows_NK].astype(jnp.float32)
    return (gathered_NKD * gates_NK[..., None]).sum(1).astype(rows_MD.dtype)


def _unpermute_forward(rows_MD, gates_NK, row_token_M, token_rows_NK):
    return _combine(rows_MD, gates_NK, token_rows_NK), (rows_MD, gates_NK, row_token_M, token_rows_NK)


def _unpermute_backward(saved, d_ND):
    rows_MD, gates_NK, row_token_M, token_rows_NK = saved
    row_gate_M = jnp.zeros(rows_MD.shape[0], jnp.float32).at[token_rows_NK].set(gates_NK, unique_indices=True)
    d_rows_MD = (d_ND[row_token_M].astype(jnp.float32) * row_gate_M[:, None]).astype(rows_MD.dtype)
    d_gates_NK = jnp.einsum("NKD,ND->NK", rows_MD[token_rows_NK], d_ND, preferred_element_type=jnp.float32)
    return d_rows_MD, d_gates_NK, None, None


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def sort_by_expert(index_NK, e: int):
    """Sorts the N*K assignments by expert; assignments to no expert of this shard (index e) come last.

    Returns:
        row_token_M, token_rows_NK, group_sizes_e (int32).
    """
    n, k = index_NK.shape
    flat_M = index_NK.reshape(-1)
    order_M = jnp.argsort(flat_M, stable=True)
    rank_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(n * k, dtype=order_M.dtype), unique_indices=True)
    group_sizes_e = (flat_M[:, None] == jnp.arange(e)[None, :]).sum(0, dtype=jnp.int32)
    return order_M // k, rank_M.reshape(n, k), group_sizes_e
