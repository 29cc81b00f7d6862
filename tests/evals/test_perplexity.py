"""Held-out loss against a count by hand."""

import jax
import numpy as np
import pytest

from mixtral_jax.data import TokenFile, pack
from mixtral_jax.evals.perplexity import Perplexity
from mixtral_jax.evals.work import Work
from mixtral_jax.models import mixtral
from mixtral_jax.sharding import named_leaves
from tests.helpers import on_mesh, shard, tiny

V, T, BYTES_PER_TOKEN = 128, 32, 3


def heldout() -> TokenFile:
    """40 documents of skewed tokens, two of them longer than a row."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(2, 30, 38), [75, T + 1]])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = (V * rng.random(offsets[-1]) ** 3).astype(np.int32)
    return TokenFile(tokens, offsets, lengths * BYTES_PER_TOKEN, [f"doc{i}" for i in range(len(lengths))])


def unigram(config) -> tuple[mixtral.Mixtral, np.ndarray]:
    """A model that gives every position the same logits; returns it and its loss for each target."""
    like = mixtral.abstract(config.model)
    leaves = {name: np.zeros(leaf.shape, np.float32) for name, leaf in named_leaves(like).items()}
    leaves["embedding_VD"][:] = leaves["final_norm_D"][:] = 1
    logits_V = np.round(np.linspace(2, -2, config.model.vocab_size) * 64) / 64  # exact in float32, as are their parts
    leaves["head_DV"][:] = logits_V / config.model.d_model
    logits_V = logits_V / np.sqrt(1 + config.model.norm_eps)  # the norm of ones
    loss_V = np.log(np.exp(logits_V).sum()) - logits_V
    return jax.tree.unflatten(jax.tree.structure(like), list(leaves.values())), loss_V


def score(config, mesh, model, limit=None):
    with jax.set_mesh(mesh):
        return Perplexity(config, heldout())(shard(model, mesh), limit)


def test_every_token_but_the_first_of_a_document_counts_once():
    config, mesh = on_mesh(tiny(model__norm_eps=0.0))
    file = heldout()
    assert pack(file.lengths, T).n_rows % config.train.batch_size, "the last batch should be part empty"
    model, loss_V = unigram(config)
    targets = np.delete(file.tokens, file.offsets[:-1])
    got = score(config, mesh, model)
    want = loss_V[targets].mean()
    assert want != pytest.approx(np.log(V), rel=0.05)
    assert want != pytest.approx(loss_V[file.tokens].mean(), rel=1e-4)
    assert got["tokens"] == len(targets)
    assert got["loss"] == pytest.approx(want, rel=1e-6)
    assert got["perplexity"] == pytest.approx(np.exp(want), rel=1e-6)
    assert got["bits_per_byte"] == pytest.approx(loss_V[targets].sum() / np.log(2) / file.bytes_.sum(), rel=1e-6)


def test_a_mesh_with_context_scores_the_same():
    model = mixtral.init(tiny(model__init_std=0.4).model, jax.random.key(0))
    want = score(*on_mesh(tiny()), model)
    got = score(*on_mesh(tiny(), context=2, fsdp=2), model)
    assert got["tokens"] == want["tokens"]
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert got["loss"] != pytest.approx(np.log(V), rel=0.01)


@pytest.mark.slow
def test_a_limit_reads_batches_spread_over_the_split():
    """Two of the batches are the first and the last one, the last with fewer tokens and no less weight for each."""
    config, mesh = on_mesh(tiny(train__batch_size=4))
    file, plan = heldout(), pack(heldout().lengths, T)
    model, loss_V = unigram(config)
    count = -(-plan.n_rows // 4)
    assert count > 3
    losses = []
    for row in [*range(4), *range((count - 1) * 4, plan.n_rows)]:
        for span in range(plan.row_offsets[row], plan.row_offsets[row + 1]):
            first = file.offsets[plan.span_document[span]] + plan.span_start[span] + 1
            losses += loss_V[file.tokens[first : first + plan.span_length[span]]].tolist()
    got = score(config, mesh, model, limit=2)
    assert got["tokens"] == len(losses)
    assert got["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    targets = file.lengths.sum() - len(file.lengths)
    assert got["bits_per_byte"] == pytest.approx(np.mean(losses) / np.log(2) * targets / file.bytes_.sum(), rel=1e-6)
    whole = score(config, mesh, model)
    assert whole["tokens"] == targets
    assert score(config, mesh, model, limit=count) == whole
    assert score(config, mesh, model, limit=1000) == whole


def test_the_mesh_and_the_batch_change_nothing():
    config, mesh = on_mesh(tiny())
    model = mixtral.init(config.model, jax.random.key(0))
    want = score(config, mesh, model)
    half = dict(train__batch_size=16, train__accumulation_steps=4)
    for changes, axes in (({}, dict(fsdp=8)), (half, dict(tensor=2))):
        got = score(*on_mesh(tiny(**changes), **axes), model)
        assert got == {name: pytest.approx(value, rel=1e-5) for name, value in want.items()}


def test_batches_that_are_finished_are_not_scored_again(tmp_path):
    """A run that was stopped after two batches goes on with the third, and gives the same to the last digit."""
    config, mesh = on_mesh(tiny())
    model = shard(mixtral.init(config.model, jax.random.key(0)), mesh)
    scorer = Perplexity(config, heldout())
    with jax.set_mesh(mesh):
        want = scorer(model)
        with Work(tmp_path, "x", "key") as work:
            scorer(model, work=work)
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines()
    assert len(lines) > 3
    path.write_text("".join(f"{line}\n" for line in lines[:3]))
    computed, sums = [], scorer._sums
    scorer._sums = lambda *arguments: computed.append(1) or sums(*arguments)
    with jax.set_mesh(mesh), Work(tmp_path, "x", "key") as work:
        assert scorer(model, work=work) == want
    assert len(computed) == len(lines) - 3


def test_packing_changes_nothing():
    """One document a row, or as many as there is room for."""
    model = mixtral.init(tiny(model__init_std=0.4).model, jax.random.key(0))
    want = score(*on_mesh(tiny()), model)
    got = score(*on_mesh(tiny(data__packing=False)), model)
    assert got == pytest.approx(want, rel=1e-5)
