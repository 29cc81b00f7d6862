"""Rows through the experts that they pick, interpreted: against one expert at a time, whatever is in the others."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import picked
from mixtral_jax.kernels.separate import swiglu

E, D, F = 4, 32, 96


def weights(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s) / 8, dtype) for s in ((E, D, F), (E, D, F), (E, F, D))]


def rows(m: int, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).standard_normal((m, D)), dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_rows_go_through_the_experts_they_pick(monkeypatch, dtype, tolerance):
    """Strips of 16, two parts of F; row 2 has one expert and row 3 none."""
    monkeypatch.setattr(picked, "STRIP", 16)
    monkeypatch.setattr(picked, "DEPTH", 8)
    monkeypatch.setattr(picked, "PART", 16)
    x, w = rows(4, dtype), weights(dtype)
    index = jnp.array([[1, 3], [3, 0], [0, E], [E, E]])
    gates = jnp.array([[0.75, 0.25], [0.5, 0.5], [1.0, 0.7], [0.2, 0.1]], jnp.float32)
    got = jax.jit(picked.swiglu)(x, gates, index, *w)
    assert got.dtype == dtype
    for m in range(4):
        want = sum(
            (
                gates[m, k] * swiglu(x[m : m + 1], *(a[index[m, k]] for a in w))[0].astype(jnp.float32)
                for k in (0, 1)
                if index[m, k] < E
            ),
            jnp.zeros(D),
        )
        np.testing.assert_allclose(got[m].astype(jnp.float32), want, atol=tolerance)


def test_other_experts_are_not_read():
    x, w = rows(2), weights()
    index, gates = jnp.array([[1, 2], [2, 1]]), jnp.full((2, 2), 0.5)
    poisoned = [a.at[jnp.array([0, 3])].set(jnp.nan) for a in w]
    np.testing.assert_array_equal(picked.swiglu(x, gates, index, *poisoned), picked.swiglu(x, gates, index, *w))


@pytest.mark.skipif(
    tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) >= (0, 11),
    reason="from 0.11 on jax lowers Triton kernels only where a GPU is known",
)
def test_it_lowers_for_gpus_at_real_width():
    """Both kernels are Triton programs; nothing of the weights is copied or sliced outside them."""
    d, f = 4096, 14336
    shapes = [(1, d), (8, d, f), (8, d, f), (8, f, d)]
    x, *w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
    gates, index = jax.ShapeDtypeStruct((1, 2), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    text = jax.jit(picked.swiglu).trace(x, gates, index, *w).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2
    copies = [
        line for line in text.splitlines() if f"x{f}xbf16" in line and "custom_call" not in line and "func" not in line
    ]
    assert not [line for line in copies if "dynamic_slice" in line or "gather" in line or "transpose" in line]
