"""Attention in memory linear in T, in plain JAX: an online softmax over chunks of keys for each chunk of queries.

FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2). The backward pass is written by hand: autodiff would keep the
scores of all chunks. It keeps the output and the logsumexp of each query, and computes the scores of a chunk again.

Which chunks of keys a chunk of queries needs is data: from the first key of its earliest document (or of its window) to
its last query. The loop's bounds are computed, so that the future and other documents cost nothing. M is the rows of one
matmul: the queries of a chunk times the query heads of one key/value head.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.models.attention.plain import MASKED, Places, visible
from mixtral_jax.models.attention.plain import attend as attend_plain

QUERIES = 128
KEYS = 256


def attend(q_BTNH, k_BSGH, v_BSGH, queries: Places, keys: Places, window: int):
    """See mixtral_jax.models.attention for the signature. Keys must be in row order, and documents contiguous.

    Where all keys are one chunk this is `plain`: nothing would be saved.
    """
    t, s = q_BTNH.shape[1], k_BSGH.shape[1]
    if s <= KEYS:
        return attend_plain(q_BTNH, k_BSGH, v_BSGH, queries, keys, window)
    q_BTNH, queries = _padded(q_BTNH, queries, QUERIES)
    k_BSGH, _ = _padded(k_BSGH, keys, KEYS)
    v_BSGH, keys = _padded(v_BSGH, keys, KEYS)
    return _attend(q_BTNH, k_BSGH, v_BSGH, queries, keys, window)[:, :t]


def _padded(x_BTNH, places: Places, chunk: int):
    """Fills T up to a multiple of the chunk; what is added belongs to no document, not even to the padding."""
    extra = -x_BTNH.shape[1] % chunk
    segment_ids_BT = jnp.pad(places.segment_ids_BT, ((0, 0), (0, extra)), constant_values=-1)
    positions_BT = jnp.pad(places.positions_BT, ((0, 0), (0, extra)))
    index_T = jnp.pad(places.index_T, (0, extra), mode="edge")
    return jnp.pad(x_BTNH, ((0, 0), (0, extra), (0, 0), (0, 0))), Places(segment_ids_BT, positions_BT, index_T)


def bounds(queries: Places, keys: Places, window: int):
    """The chunks of keys that each chunk of queries needs: int32 first_n and last_n (exclusive).

    T and S are multiples of QUERIES and KEYS.
    """
    s = keys.index_T.shape[0]
    ids_BS = keys.segment_ids_BT
    begins_BS = jnp.concatenate([jnp.ones_like(ids_BS[:, :1], bool), ids_BS[:, 1:] != ids_BS[:, :-1]], axis=1)
    begin_BS = lax.cummax(jnp.where(begins_BS, jnp.arange(s)[None, :], 0), axis=1)
    first_BT = begin_BS[:, queries.index_T]
    if window:
        first_BT = jnp.maximum(first_BT, queries.index_T[None, :] - window + 1)
    first_n = first_BT.min(0).reshape(-1, QUERIES).min(1) // KEYS
    last_n = queries.index_T.reshape(-1, QUERIES).max(1) // KEYS + 1
    return first_n, last_n


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BTNH, k_BSGH, v_BSGH, queries, keys, window):
    return _forward(q_BTNH, k_BSGH, v_BSGH, queries, keys, window)[0]


def _matmul(equation: str, a, b):
    """Contracts with float32 accumulation; the caller casts down where a value is stored."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _cut(x_BTNH, groups: int, chunk: int):
    """[B, T, N, H] -> [n, B, G, M, H]: chunks in front, all rows of a matmul together."""
    b, t, n, h = x_BTNH.shape
    x = x_BTNH.reshape(b, t // chunk, chunk, groups, n // groups, h)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(t // chunk, b, groups, (n // groups) * chunk, h)


def _join(x_nBGMH, chunk: int):
    """The inverse of `_cut`."""
    count, b, groups, m, h = x_nBGMH.shape
    x = x_nBGMH.reshape(count, b, groups, m // chunk, chunk, h)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(b, count * chunk, groups * (m // chunk), h)


def _cut_places(places: Places, chunk: int) -> Places:
    ids_nBC, positions_nBC = (a.reshape(a.shape[0], -1, chunk).swapaxes(0, 1) for a in places[:2])
    return Places(ids_nBC, positions_nBC, places.index_T.reshape(-1, chunk))


def _scores(q_BGMH, k_BGSH, queries: Places, keys: Places, window: int):
    """Masked scores of a chunk of queries and one of keys, float32 [B, G, M, S], and which of them are visible."""
    scores_BGMS = _matmul("BGMH,BGSH->BGMS", q_BGMH, k_BGSH) * q_BGMH.shape[-1] ** -0.5
    seen_BTS = visible(queries, keys, window)
    seen_BGMS = jnp.tile(seen_BTS[:, None], (1, 1, q_BGMH.shape[2] // seen_BTS.shape[1], 1))
    return jnp.where(seen_BGMS, scores_BGMS, MASKED), seen_BGMS


def _pick(tree, i):
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def _forward(q_BTNH, k_BSGH, v_BSGH, queries, keys, window):
    g = k_BSGH.shape[2]
    q_nBGMH = _cut(q_BTNH, g, QUERIES)
    keys_values = (_cut(k_BSGH, g, KEYS), _cut(v_BSGH, g, KEYS), _cut_places(keys, KEYS))

    def one_chunk(_, inputs):
        q_BGMH, places, first, last = inputs

        def one_step(j, carry):
            out_BGMH, max_BGM, sum_BGM = carry
            k_BGSH, v_BGSH, key_places = _pick(keys_values, j)
            scores_BGMS, _ = _scores(q_BGMH, k_BGSH, places, key_places, window)
            new_BGM = jnp.maximum(max_BGM, scores_BGMS.max(-1))
            weights_BGMS = jnp.exp(scores_BGMS - new_BGM[..., None])
            shrink_BGM = jnp.exp(max_BGM - new_BGM)
            part_BGMH = _matmul("BGMS,BGSH->BGMH", weights_BGMS.astype(v_BGSH.dtype), v_BGSH)
            sum_BGM = sum_BGM * shrink_BGM + weights_BGMS.sum(-1)
            return out_BGMH * shrink_BGM[..., None] + part_BGMH, new_BGM, sum_BGM

        rows = q_BGMH.shape[:-1]
        start = (jnp.zeros(q_BGMH.shape, jnp.float32), jnp.full(rows, MASKED), jnp.zeros(rows))
        out_BGMH, max_BGM, sum_BGM = lax.fori_loop(first, last, one_step, start)
        return None, ((out_BGMH / sum_BGM[..., None]).astype(q_BTNH.dtype), max_BGM + jnp.log(sum_BGM))

    inputs = (q_nBGMH, _cut_places(queries, QUERIES), *bounds(queries, keys, window))
    _, (out_nBGMH, log_z_nBGM) = lax.scan(one_chunk, None, inputs)
    out_BTNH = _join(out_nBGMH, QUERIES)
    return out_BTNH, (q_BTNH, k_BSGH, v_BSGH, queries, keys, out_BTNH, log_z_nBGM)


def _backward(window, saved, d_out_BTNH):
    q_BTNH, k_BSGH, v_BSGH, queries, keys, out_BTNH, log_z_nBGM = saved
    g, scale, dtype = k_BSGH.shape[2], q_BTNH.shape[-1] ** -0.5, q_BTNH.dtype
    keys_values = (_cut(k_BSGH, g, KEYS), _cut(v_BSGH, g, KEYS), _cut_places(keys, KEYS))
    # Each query's sum of weight times its gradient is the same for all keys: out . d_out (section 3.1).
    dot_BTN = (out_BTNH.astype(jnp.float32) * d_out_BTNH.astype(jnp.float32)).sum(-1, keepdims=True)

    def one_chunk(d_keys_values, inputs):
        q_BGMH, d_out_BGMH, dot_BGM1, log_z_BGM, places, first, last = inputs

        def one_step(j, carry):
            dq_BGMH, dk_nBGSH, dv_nBGSH = carry
            k_BGSH, v_BGSH, key_places = _pick(keys_values, j)
            scores_BGMS, seen_BGMS = _scores(q_BGMH, k_BGSH, places, key_places, window)
            # The mask again: a query that sees nothing has a logsumexp as low as its scores.
            weights_BGMS = jnp.where(seen_BGMS, jnp.exp(scores_BGMS - log_z_BGM[..., None]), 0)
            d_weights_BGMS = _matmul("BGMH,BGSH->BGMS", d_out_BGMH, v_BGSH)
            d_scores_BGMS = (weights_BGMS * (d_weights_BGMS - dot_BGM1) * scale).astype(dtype)
            dq_BGMH += _matmul("BGMS,BGSH->BGMH", d_scores_BGMS, k_BGSH)
            dk_BGSH = _matmul("BGMS,BGMH->BGSH", d_scores_BGMS, q_BGMH)
            dv_BGSH = _matmul("BGMS,BGMH->BGSH", weights_BGMS.astype(dtype), d_out_BGMH)
            return dq_BGMH, dk_nBGSH.at[j].add(dk_BGSH), dv_nBGSH.at[j].add(dv_BGSH)

        zero_BGMH = jnp.zeros(q_BGMH.shape, jnp.float32)
        dq_BGMH, *d_keys_values = lax.fori_loop(first, last, one_step, (zero_BGMH, *d_keys_values))
        return tuple(d_keys_values), dq_BGMH.astype(dtype)

    inputs = (
        *(_cut(a, g, QUERIES) for a in (q_BTNH, d_out_BTNH, dot_BTN)),
        log_z_nBGM,
        _cut_places(queries, QUERIES),
        *bounds(queries, keys, window),
    )
    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in keys_values[:2])
    d_keys_values, dq_nBGMH = lax.scan(one_chunk, zeros, inputs)
    dk_BSGH, dv_BSGH = (_join(a, KEYS).astype(dtype) for a in d_keys_values)
    return _join(dq_nBGMH, QUERIES), dk_BSGH, dv_BSGH, None, None


_attend.defvjp(_forward, _backward)
