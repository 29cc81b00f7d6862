"""Attention and its parts against loops over queries, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.models.attention import Places
from mixtral_jax.models.attention.plain import attend
from mixtral_jax.models.layers import apply_rope, rms_norm, rope_table

B, T, N, G, H = 2, 11, 6, 2, 4


def rows():
    """Two documents and padding in row 0, one document in row 1."""
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0], list(range(11))])
    return Places(jnp.asarray(segments), jnp.asarray(positions), jnp.arange(T))


@pytest.mark.parametrize("window", [0, 1, 3])
def test_attend_equals_a_loop_over_queries(window):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, T, heads, H)) for heads in (N, G, G))
    segments, positions = (np.asarray(a) for a in rows()[:2])
    got = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), rows(), rows(), window)
    for b in range(B):
        for t in range(T):
            if segments[b, t] == 0:
                continue
            keys = [
                s
                for s in range(t + 1)
                if segments[b, s] == segments[b, t] and (not window or positions[b, t] - positions[b, s] < window)
            ]
            for n in range(N):
                g = n // (N // G)
                score = np.array([q[b, t, n] @ k[b, s, g] for s in keys]) / np.sqrt(H)
                weight = np.exp(score - score.max())
                want = (weight / weight.sum()) @ np.array([v[b, s, g] for s in keys])
                np.testing.assert_allclose(got[b, t, n], want, atol=1e-5)


def test_padding_queries_are_finite():
    zeros = jnp.zeros((1, 4), jnp.int32)
    places = Places(jnp.arange(4)[None] % 2, zeros, jnp.arange(4))
    q = jnp.ones((1, 4, 2, 4))
    out = attend(q, q, q, places, places, 0)
    assert np.isfinite(out).all()


def test_rope_turns_pairs_of_halves_by_position_times_frequency():
    theta, h = 100.0, 6
    positions = jnp.asarray([[0, 3]])
    x = np.random.default_rng(0).standard_normal((1, 2, 1, h))
    got = apply_rope(jnp.asarray(x, jnp.float32), *rope_table(positions, h, theta))
    np.testing.assert_allclose(got[0, 0], x[0, 0], atol=1e-6)  # position 0 turns nothing
    for i in range(h // 2):
        angle = 3 * theta ** (-2 * i / h)
        pair = complex(x[0, 1, 0, i], x[0, 1, 0, i + h // 2]) * np.exp(1j * angle)
        np.testing.assert_allclose([got[0, 1, 0, i], got[0, 1, 0, i + h // 2]], [pair.real, pair.imag], atol=1e-5)


def test_rope_scores_depend_on_distance_alone():
    q, k = (jnp.asarray(np.random.default_rng(s).standard_normal((1, 1, 1, 8)), jnp.float32) for s in (0, 1))

    def score(i, j):
        turned = [apply_rope(x, *rope_table(jnp.asarray([[p]]), 8, 1e4)) for x, p in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(3, 7), rel=1e-2)


def test_rms_norm_statistics_are_float32_in_bfloat16():
    x = np.random.default_rng(0).standard_normal((1, 3, 512)) * 30
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        got = rms_norm(jnp.asarray(x, dtype), jnp.ones(512), 1e-5)
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance, rtol=tolerance)
    assert jax.jit(rms_norm, static_argnums=2)(jnp.zeros((1, 1, 4)), jnp.ones(4), 1e-5).sum() == 0
