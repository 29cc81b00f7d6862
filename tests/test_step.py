"""One step with a loss of known value and gradient: the clip, the guard and the metrics by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixtral_jax.models import mixtral
from mixtral_jax.models.moe import RouterStats
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import named_leaves
from mixtral_jax.step import TrainState, make_train_step
from tests.helpers import random_batch, tiny

L, E, K, TOKENS = 2, 8, 2, 50.0


@jax.custom_vjp
def with_slope(value, params, slope):
    """Returns value; its derivative with respect to every number in params is slope."""
    return value


with_slope.defvjp(
    lambda value, params, slope: (value, (params, slope)),
    lambda saved, g: (g, jax.tree.map(lambda leaf: g * saved[1] * jnp.ones_like(leaf), saved[0]), None),
)


def known_loss(params, batch, totals, config, frozen):
    """The batch says value and slope; 50 tokens are routed in a skewed way, and some are dropped."""
    count_LE = jnp.tile(jnp.arange(E) * (TOKENS * K / 28), (L, 1))
    ones_L = jnp.ones(L)
    stats_L = RouterStats(count_LE, count_LE / K, ones_L, 1.5 * TOKENS * ones_L, 25.0 * ones_L, TOKENS * ones_L)
    return with_slope(batch["value"], params, batch["slope"]), ({"a_term": 7 * totals.tokens}, stats_L)


def one_step(value=3.0, slope=0.5, step=0, skipped=0, optimizer=None, **overrides):
    """Returns the new state and the metrics of a step from zeros, and the number of parameters.

    The optimizer is plain gradient descent, or the trainer's of this name.
    """
    config = tiny(train__steps=20, **overrides)
    like = mixtral.abstract(config.model)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)
    if optimizer is None:
        optimizer = optax.sgd(1.0)
    else:
        optimizer = make_optimizer(dataclasses.replace(config.optim, name=optimizer), 20)
    state = TrainState(np.int32(step), params, optimizer.init(params), np.int32(skipped))
    batch = random_batch(config) | {"value": np.float32(value), "slope": np.float32(slope)}
    new, metrics = jax.device_get(jax.jit(make_train_step(config, optimizer, known_loss))(state, batch))
    return new, metrics, sum(leaf.size for leaf in jax.tree.leaves(like))


@pytest.mark.parametrize(("slope", "clip"), [(0.5, 1.0), (0.5, 0.0), (1e-4, 1.0)], ids=["clips", "off", "below"])
def test_the_gradient_is_clipped_and_its_norm_is_the_unclipped_one(slope, clip):
    state, metrics, count = one_step(slope=slope, optim__clip_norm=clip)
    norm = slope * np.sqrt(count)
    assert (norm > clip) == (slope == 0.5), "one case on each side"
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    want = -slope / norm if 0 < clip < norm else -slope
    for name, leaf in named_leaves(state.params).items():
        np.testing.assert_allclose(leaf, want, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("value", "slope", "optimizer"),
    [
        (np.nan, 0.5, "adamw"),
        (np.inf, 0.5, "adamw"),
        (3.0, np.nan, "adamw"),
        (3.0, np.inf, "adamw"),
        (3.0, 1e30, "adamw"),
        (3.0, np.nan, "muon"),
        (3.0, np.nan, "adafactor"),
    ],
)
def test_a_loss_or_a_gradient_that_is_not_finite_changes_nothing(value, slope, optimizer):
    """Each alone is enough; gradients of 1e30 are finite themselves and their norm is not."""
    state, metrics, _ = one_step(value, slope, optimizer=optimizer)
    assert metrics["halted"]
    assert state.skipped == 1
    assert state.step == 0
    for tree in (state.params, state.opt_state):
        for name, leaf in named_leaves(tree).items():
            np.testing.assert_array_equal(leaf, np.zeros_like(leaf), err_msg=name)


def test_as_many_non_finite_steps_as_allowed_are_skipped():
    """A skipped step takes its batch and changes nothing else; the one too many, and all after it, take not even that."""
    for skipped, value, limit, halted, step in (
        (0, np.nan, 2, False, 6),
        (1, np.nan, 2, False, 6),
        (2, np.nan, 2, True, 5),
        (3, 3.0, 2, True, 5),
        (2, 3.0, 2, False, 6),
    ):
        state, metrics, _ = one_step(value, step=5, skipped=skipped, train__skip_nonfinite=limit)
        assert bool(metrics["halted"]) is halted, (skipped, value)
        assert state.step == step
        assert state.skipped == skipped + np.isnan(value)
        moved = any(leaf.any() for leaf in jax.tree.leaves(state.params))
        assert moved is bool(np.isfinite(value) and not halted)


def test_the_learning_rate_counts_updates_and_not_skipped_steps():
    rate = dict(optim__warmup_steps=10, optim__learning_rate=0.1, train__skip_nonfinite=9)
    _, metrics, _ = one_step(step=6, skipped=2, **rate)
    assert metrics["learning_rate"] == pytest.approx(0.05)


def test_the_metrics_say_what_the_step_did():
    state, metrics, _ = one_step(step=4, optim__warmup_steps=10, optim__learning_rate=0.1)
    batch = random_batch(tiny())
    tokens = (batch["segment_ids_BT"] > 0).sum()
    assert state.step == 5
    assert not metrics["halted"]
    assert metrics["loss"] == 3.0
    assert metrics["a_term"] == 7 * tokens
    assert metrics["tokens"] == tokens
    assert metrics["trained_tokens"] == batch["loss_weights_BT"].sum() < tokens
    # The rate that this update was made with: 5 tenths of the way up.
    assert metrics["learning_rate"] == pytest.approx(0.05)
    np.testing.assert_allclose(metrics["load_LE"], np.tile(np.arange(E) / 28, (L, 1)), rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy_L"], 1.5, rtol=1e-5)
    np.testing.assert_allclose(metrics["dropped_L"], 25 / (TOKENS * K), rtol=1e-5)
