"""Whose answers a key names: those of the same weights, shape and tokenizer, on whatever mesh."""

import dataclasses

import jax
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data.tokenizer import ByteTokenizer
from mixtral_jax.evals.settings import Settings, read_settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.models import mixtral
from tests.helpers import on_mesh, shard, tiny


def subject(seed=0, folder=None, axes=None, change=None, **keys) -> Subject:
    config, mesh = on_mesh(tiny(**keys), **axes or {})
    model = mixtral.init(config.model, jax.random.key(seed))
    if change:
        change(model)
    return Subject("x", config, shard(model, mesh), mesh, ByteTokenizer(), Settings(), None, print, folder=folder)


def nudge(model) -> None:
    """The smallest change of one weight."""
    model.head_DV[...] = model.head_DV[...].at[3, 5].multiply(1 + 2**-22)


def test_the_same_weights_have_the_same_key_on_any_mesh():
    want = subject().key
    assert subject(axes=dict(expert=4, tensor=2)).key == want
    assert subject(model__attention="plain").key == want, "how it is computed is not who it is"


def test_one_weight_or_setting_that_differs_makes_another_key():
    keys = [subject().key, subject(seed=1).key, subject(change=nudge).key, subject(model__rope_theta=1e4).key]
    other = dataclasses.replace(subject(), tokenizer=type("Other", (ByteTokenizer,), {"fingerprint": "other"})())
    assert len({*keys, other.key}) == 5


def test_finished_pieces_are_found_by_their_own_model_alone(tmp_path):
    mine, other = subject(folder=tmp_path), subject(folder=tmp_path, change=nudge)
    with mine.work("x", rows=1) as work:
        work.put("a", 1)
    for who, rows, there in ((mine, 1, True), (mine, 2, False), (other, 1, False)):
        with who.work("x", rows=rows) as work:
            assert ("a" in work) == there
    reseeded = dataclasses.replace(mine, settings=Settings(seed=1))
    with reseeded.work("x", rows=1) as work:
        assert "a" not in work


def test_settings_are_read_from_flags():
    found = read_settings(
        {"passkey_lengths": ["64", "128"], "passkey_depths": ["0", "0.5"], "limit": 3, "text": ["a=text:b"]}
    )
    assert found.passkey_lengths == (64, 128)
    assert found.passkey_depths == (0.0, 0.5)
    assert found.limit == 3
    assert found.text == ("a=text:b",)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"passkey_lengths": ["64", "many"]}, "--passkey_lengths=64,many: .*'many'; write whole numbers with commas"),
        ({"limit": -2}, "--limit=-2; it must be at least 0"),
        ({"num_fewshot": -2}, "--num_fewshot=-2; it must be at least -1"),
        ({"context_lengths": ["8", "-8"]}, "--context_lengths=-8; it must be at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        read_settings(given)
