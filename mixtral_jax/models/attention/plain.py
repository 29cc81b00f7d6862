"""The oracle: all scores of a row at once. Memory grows with T times S."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row with no visible key (padding) gives a uniform softmax and not NaN.
MASKED = -1e30


class Places(NamedTuple):
    """Where tokens stand; it decides which query sees which key."""

    segment_ids_BT: jax.Array  # int32, document of each token in its row; 0 is padding
    positions_BT: jax.Array  # int32, position of each token in its document
    index_T: jax.Array  # int32, place of each column in the row as it was packed; see sharding.zigzag


def visible(queries: Places, keys: Places, window: int):
    """Which keys a query sees: bool [B, T, S].

    Same document, not in the future, at most `window` tokens back (the query included) when window > 0. Inside a
    document row order and position order agree, so positions serve for both tests, however the columns are ordered.
    """
    same_BTS = queries.segment_ids_BT[:, :, None] == keys.segment_ids_BT[:, None, :]
    distance_BTS = queries.positions_BT[:, :, None] - keys.positions_BT[:, None, :]
    near_BTS = distance_BTS >= 0
    if window:
        near_BTS &= distance_BTS < window
    return same_BTS & near_BTS


def attend(q_BTNH, k_BSGH, v_BSGH, queries: Places, keys: Places, window: int):
    """Softmax attention; see mixtral_jax.models.attention for the signature. Scores and softmax in float32."""
    b, t, n, h = q_BTNH.shape
    g = k_BSGH.shape[2]
    q_BTGRH = q_BTNH.reshape(b, t, g, n // g, h)
    scores_BGRTS = jnp.einsum("BTGRH,BSGH->BGRTS", q_BTGRH, k_BSGH, preferred_element_type=jnp.float32) * h**-0.5
    scores_BGRTS = jnp.where(visible(queries, keys, window)[:, None, None], scores_BGRTS, MASKED)
    weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGH.dtype)
    return jnp.einsum("BGRTS,BSGH->BTGRH", weights_BGRTS, v_BSGH).reshape(b, t, n, h)
