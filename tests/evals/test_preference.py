"""Held-out pairs as an evaluation: what is finished is not computed again."""

import math

import jax
import numpy as np
import pytest

from mixtral_jax.evals.preference import Preference, answer_tokens, margin_interval, reward_ranking, wilson
from mixtral_jax.evals.work import Work
from mixtral_jax.models import mixtral
from mixtral_jax.reference import score_pairs
from tests.helpers import on_mesh, shard
from tests.pairs import dpo, random_pairs


def test_batches_of_pairs_that_are_finished_are_not_scored_again(tmp_path):
    config, mesh = on_mesh(dpo(train__batch_size=2))
    pairs = random_pairs(20)
    reference = np.random.default_rng(0).normal(-20, 1, (20, 2)).astype(np.float32)
    model = shard(mixtral.init(config.model, jax.random.key(0)), mesh)
    scorer = Preference(config, pairs, reference)
    with jax.set_mesh(mesh):
        want = scorer(model)
        with Work(tmp_path, "x", "key") as work:
            assert scorer(model, work=work) == want
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines()
    assert len(lines) > 3
    path.write_text("".join(f"{line}\n" for line in lines[:3]))
    computed, sums = [], scorer._sums
    scorer._sums = lambda *arguments: computed.append(1) or sums(*arguments)
    with jax.set_mesh(mesh), Work(tmp_path, "x", "key") as work:
        assert scorer(model, work=work) == want
    assert len(computed) == len(lines) - 3
    assert want["pairs"] == 20


def test_margins_and_their_interval_are_those_of_the_pairs_one_by_one():
    """Batches give sums; the interval is that of every pair's margin by itself."""
    config, mesh = on_mesh(dpo(train__batch_size=2, dpo__beta=0.3))
    pairs = random_pairs(20)
    stored = np.random.default_rng(0).normal(-20, 5, (20, 2)).astype(np.float32)
    model = shard(mixtral.init(config.model, jax.random.key(0)), mesh)
    with jax.set_mesh(mesh):
        found = Preference(config, pairs, stored)(model)
        log_probs = score_pairs(config, pairs, model, mesh, "pairs")
    ratios = log_probs.astype(np.float64) - stored
    margins = 0.3 * (ratios[:, 0] - ratios[:, 1])
    spread = 1.96 * margins.std(ddof=1) / np.sqrt(20)
    assert found["margin"] == pytest.approx(margins.mean(), rel=1e-4)
    assert found["margin_high"] - found["margin"] == pytest.approx(spread, rel=1e-3)
    assert found["margin"] - found["margin_low"] == pytest.approx(spread, rel=1e-3)
    ranked = reward_ranking(config.dpo, log_probs, answer_tokens(pairs), stored)
    assert {name: ranked[name] for name in ranked} == pytest.approx({name: found[name] for name in ranked}, rel=1e-4)


def test_one_pair_has_a_margin_without_an_interval():
    assert margin_interval(0.5, 0.25, 1) == {"margin": 0.5, "margin_low": -math.inf, "margin_high": math.inf}
    assert margin_interval(0.5, 0.25, 2)["margin_low"] == 0.5, "two pairs that agree"


@pytest.mark.parametrize("n", [1, 12, 1000])
def test_an_interval_of_a_share_ends_where_shares_end(n):
    assert wilson(0.0, n)[0] == 0
    assert wilson(1.0, n)[1] == 1
    low, high = wilson(0.5, n)
    assert 0 < low < 0.5 < high < 1
