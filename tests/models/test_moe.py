"""Routing, permuting and combining, against loops over tokens; expert parallelism is in tests/test_mesh.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.models import mixtral, moe
from tests.helpers import on_mesh, random_batch, tiny, train

B, T, D, F, E, K = 2, 9, 8, 12, 5, 2


def logits():
    return np.random.default_rng(0).standard_normal((B, T, E)).astype(np.float32)


def valid():
    mask = np.ones((B, T), bool)
    mask[1, 6:] = False
    return mask


def config(**changes):
    return dataclasses.replace(tiny().model, num_experts=E, experts_per_token=K, **changes)


def weights():
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape).astype(np.float32) for shape in ((E, D, F), (E, D, F), (E, F, D))]


def test_gates_are_the_softmax_over_the_chosen_logits():
    gates, index, stats = moe.route(logits(), None, valid(), K)
    for b, t in np.ndindex(B, T):
        if not valid()[b, t]:
            assert (index[b, t] == E).all(), "padding goes to no expert"
            assert (gates[b, t] == 0).all()
            continue
        order = np.argsort(-logits()[b, t])[:K]
        np.testing.assert_array_equal(index[b, t], order)
        chosen = np.exp(logits()[b, t, order])
        np.testing.assert_allclose(gates[b, t], chosen / chosen.sum(), rtol=1e-5)
        # The same as a softmax over all experts, renormalised over the chosen ones.
        everything = np.exp(logits()[b, t]) / np.exp(logits()[b, t]).sum()
        np.testing.assert_allclose(gates[b, t], everything[order] / everything[order].sum(), rtol=1e-5)
    assert stats.tokens == valid().sum()


def test_router_statistics_equal_a_recount():
    _, index, stats = moe.route(logits(), None, valid(), K)
    mine = logits()[valid()].astype(np.float64)
    prob = np.exp(mine) / np.exp(mine).sum(-1, keepdims=True)
    np.testing.assert_array_equal(stats.count_E, np.bincount(np.asarray(index)[valid()].ravel(), minlength=E))
    np.testing.assert_allclose(stats.prob_E, prob.sum(0), rtol=1e-5)
    np.testing.assert_allclose(stats.z, (np.log(np.exp(mine).sum(-1)) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(stats.entropy, -(prob * np.log(prob)).sum(), rtol=1e-5)


def test_the_router_bias_steers_the_choice_and_never_the_gate():
    bias = np.zeros(E, np.float32)
    bias[3] = 100.0
    gates, index, _ = moe.route(logits(), bias, valid(), K)
    chosen = np.asarray(index)[valid()]
    assert (chosen[:, 0] == 3).all()
    picked = np.take_along_axis(logits()[valid()], chosen, axis=-1)
    np.testing.assert_allclose(np.asarray(gates)[valid()], jax.nn.softmax(picked), rtol=1e-5)


@pytest.mark.parametrize("backend", ["dense", "blocks"])
def test_experts_equal_a_loop_over_tokens(backend):
    x = np.random.default_rng(2).standard_normal((B, T, D)).astype(np.float32)
    w_gate, w_up, w_down = weights()
    gates, index, _ = moe.route(logits(), None, valid(), K)
    got, computed = moe.experts(x, gates, index, w_gate, w_up, w_down, config(expert_backend=backend, expert_block=4))
    assert computed == valid().sum() * K
    assert computed.dtype == jnp.int32, "float32 counts to 2^24, and a pod's batch has more assignments"
    for b, t in np.ndindex(B, T):
        want = np.zeros(D)
        for gate, e in zip(np.asarray(gates[b, t]), np.asarray(index[b, t]), strict=True):
            if e < E:
                hidden = x[b, t].astype(np.float64) @ w_gate[e]
                want += gate * ((hidden / (1 + np.exp(-hidden)) * (x[b, t] @ w_up[e])) @ w_down[e])
        np.testing.assert_allclose(got[b, t], want, atol=1e-4)


@pytest.mark.parametrize("where", ["random", "one_expert", "two_experts"])
def test_gradients_through_permute_and_unpermute_equal_plain_autodiff(where):
    """The hand-written gathers against gates and one-hot matrices that autodiff handles by itself."""
    index = {
        "random": np.asarray(moe.route(logits(), None, valid(), K)[1]),
        "one_expert": np.full((B, T, K), [2, E]),
        "two_experts": np.full((B, T, K), [0, 4]),
    }[where]
    rng = np.random.default_rng(3)
    x, out = (rng.standard_normal((B, T, D)).astype(np.float32) for _ in range(2))
    gates = rng.random((B, T, K)).astype(np.float32)

    def sparse(x, gates, *w):
        y, _ = moe.local_experts(x, gates, jnp.asarray(index), *w, config(expert_block=4))
        return (y * out).sum()

    def plain(x, gates, *w):
        combine = (gates[..., None] * (index[..., None] == np.arange(E))).sum(2)
        hidden = jax.nn.silu(jnp.einsum("BTD,EDF->BTEF", x, w[0])) * jnp.einsum("BTD,EDF->BTEF", x, w[1])
        return (jnp.einsum("BTEF,EFD,BTE->BTD", hidden, w[2], combine) * out).sum()

    arguments = (x, gates, *weights())
    got = jax.jit(jax.grad(sparse, argnums=range(5)))(*arguments)
    want = jax.jit(jax.grad(plain, argnums=range(5)))(*arguments)
    used = index < E  # the gate of an assignment to no expert has no gradient in either
    for name, a, b in zip(("x", "gates", "w_gate", "w_up", "w_down"), got, want, strict=True):
        a, b = (np.where(used, g, 0) for g in (a, b)) if name == "gates" else (a, b)
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (3, 1), (6, 6), (16, 4)])
def test_any_number_of_experts_trains(experts, k):
    """E and K at their extremes: loss and gradients are finite, and the shares of a layer add up."""
    config, mesh = on_mesh(tiny(model__num_experts=experts, model__experts_per_token=k))
    _, log = train(config, mesh, [random_batch(config)])
    assert np.isfinite(log[0]["loss"])
    assert np.isfinite(log[0]["gradient_norm"])
    assert log[0]["load_LE"].sum(-1) == pytest.approx(1.0)
    if k == experts:
        assert log[0]["balance_loss"] == pytest.approx(1.0, abs=1e-6)


def test_parameter_counts_of_the_published_models():
    from configs import mixtral_8x7b, mixtral_8x22b
    from mixtral_jax.config import from_config_dict

    small, large = (from_config_dict(c.get_config()).model for c in (mixtral_8x7b, mixtral_8x22b))
    assert mixtral.parameter_counts(small) == (46_702_792_704, 12_879_925_248)
    assert mixtral.parameter_counts(large) == (140_630_071_296, 39_161_468_928)


def test_tokens_do_not_see_the_future_or_other_documents():
    """Changing a token moves no logit before it, and none of another document."""
    model = mixtral.init(tiny().model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 128, (1, 12))
    segments = np.array([[1] * 5 + [2] * 7])
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    run = jax.jit(lambda tokens: model(tokens, positions, segments)[0])
    before = np.asarray(run(tokens))
    changed = tokens.copy()
    changed[0, 8] = (changed[0, 8] + 1) % 128
    moved = np.abs(np.asarray(run(changed)) - before).max(-1)[0] > 1e-6
    assert not moved[:8].any()
    assert moved[8:].all()
    changed = tokens.copy()
    changed[0, 1] = (changed[0, 1] + 1) % 128
    moved = np.abs(np.asarray(run(changed)) - before).max(-1)[0] > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(moved), [1, 2, 3, 4])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_router_logits_are_float32_at_full_precision(dtype):
    """Accelerators round float32 operands by default (tf32, bf16 passes): the lowered matmul must ask for HIGHEST."""
    c = tiny(model__dtype=dtype).model
    x = jax.ShapeDtypeStruct((2, 4, c.d_model), dtype)
    block = jax.eval_shape(lambda key: mixtral.Block(c, nnx.Rngs(params=key)), jax.random.key(0))
    text = jax.jit(lambda block, x: block.experts(x, jnp.ones((2, 4), bool))).lower(block, x).as_text()
    router = [
        line for line in text.splitlines() if "dot_general" in line and f"tensor<2x4x{c.num_experts}xf32>" in line
    ]
    assert len(router) == 1, "one matmul gives [B, T, E]"
    assert "precision = [HIGHEST, HIGHEST]" in router[0]
    assert f"(tensor<2x4x{c.d_model}xf32>, tensor<{c.d_model}x{c.num_experts}xf32>)" in router[0]
