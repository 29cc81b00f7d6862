"""Scores of continuations: against whole logits, and the same on every mesh and in every batch."""

import jax
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.evals.scorer import Request, Scorer, total
from mixtral_jax.models import mixtral
from tests.helpers import on_mesh, shard, tiny

V = 96


def requests(lengths=((1, 1), (3, 2), (70, 9), (20, 30), (5, 1), (64, 1))) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(rng.integers(0, V, a).tolist(), rng.integers(0, V, b).tolist()) for a, b in lengths]


def score(asked, batch_tokens=256, **mesh):
    config, devices = on_mesh(tiny(model__vocab_size=V, model__max_seq_len=128, loss__head_chunk=16), **mesh)
    model = mixtral.init(config.model, jax.random.key(0))
    # A steeper head: near-ties, which rounding decides, are rare.
    model.head_DV[...] = model.head_DV[...] * 5
    with jax.set_mesh(devices):
        found = dict(Scorer(config, batch_tokens)(shard(model, devices), asked))
    return config, model, [found[i] for i in range(len(asked))]


def by_hand(model, request: Request):
    """Log-softmax of the whole logits of the one row."""
    whole = np.asarray([[*request.context, *request.continuation]], np.int32)[:, :-1]
    logits_BTV, _ = model(whole, np.arange(whole.shape[1])[None], np.ones_like(whole))
    log_probs = np.asarray(jax.nn.log_softmax(logits_BTV[0]))[len(request.context) - 1 :]
    picked = np.arange(len(request.continuation)), np.asarray(request.continuation)
    return log_probs[picked], log_probs.argmax(-1) == picked[1]


def test_scores_are_those_of_whole_logits():
    asked = requests()
    _, model, found = score(asked)
    asked += [Request(asked[3].context, asked[3].continuation)]
    for request, scored in zip(asked, found):
        log_probs, greedy = by_hand(model, request)
        np.testing.assert_allclose(scored.log_probs, log_probs, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(scored.greedy, greedy)


def test_what_greedy_decoding_writes_is_greedy():
    asked = requests(((4, 1), (4, 1)))
    _, model, _ = score(asked)
    best = []
    for _ in range(3):
        whole = np.asarray([[*asked[0].context, *best]], np.int32)
        logits_BTV, _ = model(whole, np.arange(whole.shape[1])[None], np.ones_like(whole))
        best.append(int(logits_BTV[0, -1].argmax()))
    wrong = [best[0], (best[1] + 1) % V, best[2]]
    _, _, (right, other) = score([Request(asked[0].context, best), Request(asked[0].context, wrong)])
    assert right.greedy.all()
    assert total(right)[1]
    assert list(other.greedy[:2]) == [True, False]
    assert not total(other)[1]
    assert total(right)[0] == pytest.approx(float(right.log_probs.astype(float).sum()))


@pytest.mark.parametrize(
    "mesh",
    [dict(tensor=2, fsdp=4), dict(context=2, data=4), dict(expert=4, tensor=2)],
    ids=["tensor", "context", "expert"],
)
def test_meshes_and_batches_change_nothing(mesh):
    asked = requests()
    _, _, want = score(asked)
    _, _, got = score(asked, batch_tokens=64, **mesh)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(a.greedy, b.greedy)


def test_of_equals_the_lowest_id_is_greedy():
    """On one device, and with the vocabulary split."""
    for mesh in ({}, dict(tensor=2, fsdp=4)):
        config, devices = on_mesh(tiny(model__vocab_size=V), **mesh)
        model = mixtral.init(config.model, jax.random.key(0))
        model.head_DV[...] = model.head_DV[...] * 0
        with jax.set_mesh(devices):
            found = dict(Scorer(config)(shard(model, devices), [Request([1], [0]), Request([1], [V - 1])]))
        assert [bool(found[i].greedy[0]) for i in (0, 1)] == [True, False]
        np.testing.assert_allclose(found[0].log_probs, -np.log(V), rtol=1e-6)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([], [1]), "context of 0"),
        (Request([1], []), "continuation of 0"),
        (Request([1] * 100, [1] * 30), "129 tokens to read and the model's max_seq_len is 128"),
    ],
)
def test_what_cannot_be_scored_is_refused(request_, words):
    config = tiny(model__max_seq_len=128)
    with pytest.raises(UserError, match=words):
        next(iter(Scorer(config)(None, [Request([1], [2]), request_])))
