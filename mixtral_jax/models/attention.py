"""Grouped-query attention (arXiv 2305.13245) with a causal, document and optional sliding-window mask."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row with no visible key (padding) gives a uniform softmax and not NaN.
MASKED = -1e30


def visible(segment_ids_BT, positions_BT, window: int):
    """Which keys a query sees: bool [B, T, S].

    Same document, not in the future, at most `window` tokens back (the query included) when window > 0. Inside a
    document row order and position order agree, so positions serve for both tests.
    """
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    distance_BTS = positions_BT[:, :, None] - positions_BT[:, None, :]
    near_BTS = distance_BTS >= 0
    if window:
        near_BTS &= distance_BTS < window
    return same_BTS & near_BTS


class Slots(NamedTuple):
    """One layer's keys and values of earlier tokens, and where the next token of each row goes."""

    k_BSGH: jax.Array  # in the compute dtype, rotated
    v_BSGH: jax.Array
    at_B: jax.Array  # int32, the position of each row's next token


def append(slots: Slots, k_BTGH, v_BTGH) -> tuple[jax.Array, jax.Array]:
    """Writes one token's key and value (T is 1) at each row's own place; returns k_BSGH, v_BSGH."""

    def write(row_SGH, new_TGH, at):
        return jax.lax.dynamic_update_slice(row_SGH, new_TGH, (at, 0, 0))

    # vmap makes it a scatter with B as a batch dimension, which stays where B is; .at[rows, at] would gather it.
    return tuple(jax.vmap(write)(old, new, slots.at_B) for old, new in ((slots.k_BSGH, k_BTGH), (slots.v_BSGH, v_BTGH)))


def attend(q_BTNH, k_BSGH, v_BSGH, visible_BTS):
    """Softmax attention; query head n reads key/value head n // (N / G). Scores and softmax in float32.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    b, t, n, h = q_BTNH.shape
    g = k_BSGH.shape[2]
    q_BTGRH = q_BTNH.reshape(b, t, g, n // g, h)
    scores_BGRTS = jnp.einsum("BTGRH,BSGH->BGRTS", q_BTGRH, k_BSGH, preferred_element_type=jnp.float32) * h**-0.5
    scores_BGRTS = jnp.where(visible_BTS[:, None, None], scores_BGRTS, MASKED)
    weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGH.dtype)
    return jnp.einsum("BGRTS,BSGH->BTGRH", weights_BGRTS, v_BSGH).reshape(b, t, n, h)
