"""Experts as separate arrays: those that no row chose are not read, whatever is in them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.separate import branches, few, grouped_swiglu, swiglu
from mixtral_jax.models import moe
from tests.helpers import tiny
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


@pytest.mark.parametrize("sizes", [(4, 0, 5, 0), (1, 2, 3, 4), (0, 0, 8, 1), (0, 0, 0, 0), (7, 0, 0, 2)])
def test_branches_take_the_place_of_the_loop_where_an_expert_has_one_block_at_most(sizes):
    """One branch for every size of block, and one for no rows; experts without rows are not read."""
    x_MD = inputs()[0][:10]  # some rows without an expert
    sizes_e = jnp.array(sizes, jnp.int32)
    whole = experts(())
    got = jax.jit(grouped_swiglu, static_argnums=(3, 4))(
        x_MD, experts([e for e in range(E) if sizes[e] == 0]), sizes_e, 8, (1, 2, 4, 8)
    )
    starts = np.cumsum(sizes) - sizes
    for e in range(E):
        mine = slice(starts[e], starts[e] + sizes[e])
        np.testing.assert_allclose(got[mine], swiglu(x_MD[mine], *whole[e]), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(got[sum(sizes) :], 0)
    jaxpr = str(jax.make_jaxpr(lambda x: grouped_swiglu(x, whole, sizes_e, 8, (1, 2, 4, 8)))(x_MD))
    assert (jaxpr.count("while["), jaxpr.count("cond[")) == (0, E)


def test_sizes_of_blocks_for_decoding(monkeypatch):
    assert [branches(rows) for rows in (3, 8, 20, 64, 65)] == [
        (1, 3),
        (1, 4, 8),
        (5, 10, 20),
        (16, 32, 64),
        (),
    ]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [branches(rows) for rows in (3, 65)] == [(3,), (65,)]


@pytest.mark.parametrize(("rows", "branched"), [(3, True), (8, True), (9, False)])
def test_decoding_has_no_loop_of_unknown_length(rows, branched):
    """Up to expert_block tokens (8 here)."""
    config = dataclasses.replace(tiny().model, expert_block=8)
    x = jnp.ones((rows, 1, 16))
    index, gates = jnp.zeros((rows, 1, 2), jnp.int32).at[..., 1].set(1), jnp.full((rows, 1, 2), 0.5)
    jaxpr = jax.make_jaxpr(lambda x: moe.local_separate_experts(x, gates, index, experts(()), config)[0])(x)
    assert ("while[" not in str(jaxpr)) == branched
