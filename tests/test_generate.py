"""The sampler against a loop of whole forward passes, and where a continuation ends."""

import functools

import jax
import numpy as np
import pytest

from mixtral_jax.generate import sample
from mixtral_jax.models import mixtral
from mixtral_jax.sharding import named_leaves
from tests.helpers import on_mesh, shard, tiny

NEW = 12


class Letters:
    """ASCII codes as ids, so that a continuation shows its ids."""

    bos_id = 1
    vocab_size = 128

    def __init__(self, eos_id: int = -1):
        self.eos_id = eos_id

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def continuation(self, context, new):
        return "".join(map(chr, new))


@functools.cache
def model():
    """Weights large enough that what comes next depends on the context."""
    return mixtral.init(tiny(model__init_std=0.4, model__max_seq_len=128).model, jax.random.key(0))


def prompt(length: int) -> str:
    return "".join(chr(c) for c in np.random.default_rng(length).integers(32, 127, length))


def greedy(text: str, tokenizer=None, **changes) -> str:
    arguments = dict(max_tokens=NEW, temperature=0, seed=0) | changes
    return sample(model(), tokenizer or Letters(), [text], **arguments)[0]


@jax.jit
def next_token(model, tokens_BT, at):
    """The most likely token after position `at`; what is behind it is padding."""
    positions = np.arange(tokens_BT.shape[1])[None]
    logits_BTV, _ = model(tokens_BT, positions, (positions <= at).astype(np.int32))
    return logits_BTV[0, at].argmax()


def by_hand(context: list[int]) -> list[int]:
    made = []
    for _ in range(NEW):
        tokens = np.zeros((1, 128), np.int32)
        tokens[0, : len(context) + len(made)] = context + made
        made.append(int(next_token(model(), tokens, len(context) + len(made) - 1)))
    return made


@pytest.mark.parametrize("length", [0, 1, 20, 51, 52, 100])
def test_greedy_equals_the_argmax_of_a_whole_forward_pass_per_token(length):
    """With BOS and 12 new tokens, 51 letters just fill a width of 64 and 52 do not."""
    want = by_hand([Letters.bos_id, *Letters().encode(prompt(length))])
    assert len(set(want)) > 2, "the continuation should vary for the test to say anything"
    assert Letters().encode(greedy(prompt(length))) == want


def test_a_long_prompt_keeps_its_end():
    text = prompt(300)
    assert Letters().encode(greedy(text)) == by_hand(Letters().encode(text)[-(128 - NEW) :])


def test_a_continuation_ends_before_eos():
    whole = greedy(prompt(20))
    eos = ord(whole[5])
    assert greedy(prompt(20), Letters(eos)) == whole[: whole.index(whole[5])]
    # EOS in the prompt ends nothing.
    missing = next(c for c in range(128) if chr(c) not in whole and chr(c) in prompt(20))
    assert greedy(prompt(20), Letters(missing)) == whole


def test_temperature_zero_asks_no_seed_and_others_do():
    assert greedy(prompt(20), seed=7) == greedy(prompt(20), seed=8)
    drawn = [greedy(prompt(20), temperature=2.0, seed=seed) for seed in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_temperature_divides_the_logits():
    """A model that gives the same two logits after any text, 4 and 0: at temperature 4 they are drawn as e to 1."""
    like = model()
    leaves = {name: np.zeros(leaf.shape, np.float32) for name, leaf in named_leaves(like).items()}
    leaves["embedding_VD"][:] = leaves["final_norm_D"][:] = 1
    leaves["head_DV"][:] = -1e3
    leaves["head_DV"][:, [ord("a"), ord("b")]] = [4 / 32, 0]
    constant = jax.tree.unflatten(jax.tree.structure(like), list(leaves.values()))
    (drawn,) = sample(constant, Letters(), [""], max_tokens=120, temperature=4.0, seed=0)
    assert set(drawn) == {"a", "b"}
    assert drawn.count("a") / 120 == pytest.approx(np.e / (np.e + 1), abs=0.12)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_mesh_draws_the_same_text(temperature):
    _, mesh = on_mesh(tiny(), fsdp=2, expert=2, tensor=2)
    want = greedy(prompt(20), temperature=temperature, seed=3)
    with jax.set_mesh(mesh):
        (got,) = sample(shard(model(), mesh), Letters(), [prompt(20)], max_tokens=NEW, temperature=temperature, seed=3)
    assert got == want


def test_a_mesh_with_context_generates_the_same():
    """It is trained on such a mesh and sampled from in between; one token has no T to split."""
    _, mesh = on_mesh(tiny(model__init_std=0.4, model__max_seq_len=128), context=2, tensor=2, fsdp=2)
    with jax.set_mesh(mesh):
        (got,) = sample(shard(model(), mesh), Letters(), [prompt(9)], max_tokens=NEW, temperature=0, seed=0)
    assert got == greedy(prompt(9))
