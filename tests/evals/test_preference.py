"""Held-out pairs as an evaluation: what is finished is not computed again."""

import jax
import numpy as np

from mixtral_jax.evals.preference import Preference
from mixtral_jax.evals.work import Work
from mixtral_jax.models import mixtral
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
