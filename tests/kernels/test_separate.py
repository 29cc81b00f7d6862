"""Experts as separate arrays: those that no row chose are not read, whatever is in them."""

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.kernels.separate import few, grouped_swiglu, swiglu
from tests.kernels.test_grouped import E, inputs


def experts(poisoned):
    """Each expert's weights; of those named, every number is NaN."""
    _, *stacked, _ = inputs()
    return [tuple(jnp.full_like(w[e], jnp.nan) if e in poisoned else w[e] for w in stacked) for e in range(E)]


def test_few_rows_read_their_own_experts_alone():
    x_MD = inputs()[0][:2]
    index_MK, gates_MK = jnp.array([[0, 2], [2, 0]]), jnp.array([[0.75, 0.25], [0.5, 0.5]], jnp.float32)
    whole = experts(())
    got = jax.jit(few)(x_MD, gates_MK, index_MK, experts((1, 3)))
    for m in range(2):
        want = sum(gates_MK[m, k] * swiglu(x_MD[m : m + 1], *whole[int(index_MK[m, k])])[0] for k in range(2))
        np.testing.assert_allclose(got[m], want, rtol=1e-5, atol=1e-5)


def test_grouped_rows_read_the_experts_that_have_rows():
    x_MD = inputs()[0][:10]
    sizes = jnp.array([4, 0, 6, 0], jnp.int32)
    got = jax.jit(grouped_swiglu, static_argnums=3)(x_MD, experts((1, 3)), sizes, 4)
    whole = experts(())
    np.testing.assert_allclose(got[:4], swiglu(x_MD[:4], *whole[0]), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got[4:], swiglu(x_MD[4:], *whole[2]), rtol=1e-5, atol=1e-4)
