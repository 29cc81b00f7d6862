"""The loss terms against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.losses import Totals, load_balance, pretrain_loss, summed_losses, token_losses
from mixtral_jax.models import mixtral, moe
from mixtral_jax.models.moe import RouterStats
from tests.helpers import random_batch, tiny

B, T, D, V = 2, 10, 6, 17


def stats_of(count_LE, prob_LE, tokens):
    """RouterStats of layers whose counts and probability sums are given."""
    count_LE, prob_LE = jnp.asarray(count_LE, jnp.float32), jnp.asarray(prob_LE, jnp.float32)
    zero_L = jnp.zeros(len(count_LE))
    return RouterStats(count_LE, prob_LE, zero_L, zero_L, zero_L, jnp.full(len(count_LE), float(tokens)))


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 512])
def test_chunked_token_losses_equal_the_full_softmax(chunk):
    rng = np.random.default_rng(0)
    x, head = rng.standard_normal((B, T, D)), rng.standard_normal((D, V))
    targets = rng.integers(0, V, (B, T))
    logits = x @ head
    log_z = np.log(np.exp(logits).sum(-1))
    want = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]

    def total(x, head):
        nll, log_z = token_losses(x, head, jnp.asarray(targets), chunk)
        return nll.sum() + (log_z**2).sum(), (nll, log_z)

    def plain(x, head):
        logits = x @ head
        log_z = jax.nn.logsumexp(logits, -1)
        return (log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]).sum() + (log_z**2).sum()

    arguments = jnp.asarray(x, jnp.float32), jnp.asarray(head, jnp.float32)
    grads, (nll, got_z) = jax.grad(total, argnums=(0, 1), has_aux=True)(*arguments)
    np.testing.assert_allclose(nll, want, atol=1e-5)
    np.testing.assert_allclose(got_z, log_z, atol=1e-5)
    for got, expected in zip(grads, jax.grad(plain, argnums=(0, 1))(*arguments), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("chunk", "z_weight"), [(3, 0.0), (5, 0.1), (512, 0.1)])
def test_the_summed_loss_and_its_ready_gradient_equal_the_tokens(chunk, z_weight, dtype):
    """Whatever comes after scales it: here a factor of 3. Some tokens weigh nothing."""
    rng = np.random.default_rng(0)
    x, head = jnp.asarray(rng.standard_normal((B, T, D)), dtype), jnp.asarray(rng.standard_normal((D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)))
    weights = jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) > 0.3), jnp.float32)

    def by_token(x, head):
        nll, log_z = token_losses(x, head, targets, chunk)
        sums = (weights * nll).sum(), (weights * log_z**2).sum()
        return 3 * (sums[0] + z_weight * sums[1]), sums

    def summed(x, head):
        objective, sums = summed_losses(x, head, targets, weights, z_weight, chunk)
        return 3 * objective, sums

    want = jax.value_and_grad(by_token, argnums=(0, 1), has_aux=True)(x, head)
    got = jax.value_and_grad(summed, argnums=(0, 1), has_aux=True)(x, head)
    assert got[1][0].dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip(jax.tree.leaves((got, summed(x, head))), jax.tree.leaves((want, want[0])), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("summed", [False, True])
def test_the_full_logits_are_never_held(summed):
    """No array of the compiled forward and backward has B * T * V elements."""
    b, t, d, v, chunk = 2, 64, 8, 1000, 16
    x, head, targets = jnp.zeros((b, t, d)), jnp.zeros((d, v)), jnp.zeros((b, t), jnp.int32)

    def loss(x, head):
        if summed:
            return summed_losses(x, head, targets, jnp.ones((b, t)), 0.1, chunk)[0]
        return token_losses(x, head, targets, chunk)[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, head).compile()
    full, part = b * t * v * 4, b * chunk * v * 4
    peak = compiled.memory_analysis().temp_size_in_bytes
    assert part <= peak < full, f"temporaries take {peak} bytes; a chunk's logits {part}, all logits {full}"


def test_uniform_routing_gives_balance_exactly_one():
    model = mixtral.init(tiny().model, jax.random.key(0))
    e, k = model.config.num_experts, model.config.experts_per_token
    tokens = 64
    # Either side uniform is enough: counts with skewed probabilities, probabilities with skewed counts, or both.
    even_count, even_prob = np.full((2, e), tokens * k / e), np.full((2, e), tokens / e)
    skew = np.zeros((2, e))
    skew[:, 0] = 1
    for count, prob in ((even_count, even_prob), (even_count, skew * tokens), (skew * tokens * k, even_prob)):
        assert load_balance(stats_of(count, prob, tokens), k, "per_layer") == 1.0
        assert load_balance(stats_of(count, prob, tokens), k, "huggingface") == k


def test_uniform_router_in_the_model_gives_balance_exactly_one():
    """Through route(): zero router weights give every expert the same probability."""
    _, _, stats = moe.route(np.zeros((2, 8, 8), np.float32), None, np.ones((2, 8), bool), 2)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), stats)
    assert load_balance(stacked, 2, "per_layer") == 1.0


def test_layers_collapsed_on_different_experts_are_seen_per_layer_only():
    """Four layers, each on another pair of 8 experts: the worst value per layer, and a perfect one when pooled."""
    tokens, k, e = 100, 2, 8
    count, prob = np.zeros((4, e)), np.zeros((4, e))
    for layer in range(4):
        count[layer, 2 * layer : 2 * layer + 2] = tokens
        prob[layer, 2 * layer : 2 * layer + 2] = tokens / 2
    assert load_balance(stats_of(count, prob, tokens), k, "per_layer") == pytest.approx(e / k)
    assert load_balance(stats_of(count, prob, tokens), k, "huggingface") == pytest.approx(k)


def test_token_loss_is_the_masked_sum_over_the_masked_count():
    config = tiny()
    batch = random_batch(config)
    model = mixtral.init(config.model, jax.random.key(0))
    loss, (terms, _) = jax.device_get(jax.jit(lambda m: pretrain_loss(m, batch, Totals.of(batch), config.loss))(model))
    logits, stats = jax.jit(lambda m: m(batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"]))(model)
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, batch["targets_BT"][..., None], -1)[..., 0]
    weight = batch["loss_weights_BT"]
    assert 0 < weight.sum() < (batch["segment_ids_BT"] > 0).sum(), (
        "some tokens are context only, or the test says little"
    )
    assert terms["token_loss"] == pytest.approx((nll * weight).sum() / weight.sum(), rel=1e-5)
    assert terms["z_loss"] == pytest.approx((log_z**2 * weight).sum() / weight.sum(), rel=1e-5)
    assert terms["router_z_loss"] == pytest.approx(float(stats.z.sum() / stats.tokens.sum()), rel=1e-5)
    c = config.loss
    parts = terms["token_loss"] + c.z_weight * terms["z_loss"] + c.balance_weight * terms["balance_loss"]
    assert loss == pytest.approx(parts + c.router_z_weight * terms["router_z_loss"], rel=1e-6)


def test_the_balance_gradient_moves_the_router_towards_balance():
    """A step down the balance loss lowers it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 16, 8)).astype(np.float32)
    w = (rng.standard_normal((8, 4)) + np.array([2.0, 0, 0, 0])).astype(np.float32)
    x[..., 0] = 1.0

    def balance(w):
        _, _, stats = moe.route(jnp.einsum("BTD,DE->BTE", x, w), None, jnp.ones((4, 16), bool), 2)
        return load_balance(jax.tree.map(lambda a: a[None], stats), 2, "per_layer")

    value, grad = jax.value_and_grad(balance)(jnp.asarray(w))
    assert balance(w - 0.1 * grad) < value


def test_totals_keep_fractional_weights():
    batch = {"loss_weights_BT": np.array([[0.25, 0.0]]), "segment_ids_BT": np.array([[1, 0]])}
    assert Totals.of(batch)[:2] == (0.25, 1.0)
    batch["loss_weights_BT"][:] = 0
    assert Totals.of(batch).weight == 1.0
