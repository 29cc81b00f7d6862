"""Sampling filters against numpy, and the text layer: stop strings, EOS, characters and spaces across pieces."""

import itertools

import jax
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from mixtral_jax.generate import Sampling, engine, generate, stream
from mixtral_jax.generate.sampling import choose, filtered, largest, row_keys
from mixtral_jax.generate.text import TextStream
from tests.test_decode import byte_model

LOGITS = np.asarray([2.0, -1.0, 0.5, 2.0, 3.5, 0.0, -4.0, 1.0, 0.5, -0.5], np.float32)
FILTERS = {
    "temperature": dict(temperature=0.6),
    "top_k": dict(temperature=1.0, top_k=4),
    "top_k with a tie": dict(temperature=1.0, top_k=2),
    "top_k beyond V": dict(temperature=1.0, top_k=99),
    "top_p": dict(temperature=1.3, top_p=0.8),
    "top_p of one token": dict(temperature=1.0, top_p=0.01),
    "min_p": dict(temperature=1.0, min_p=0.1),
    "all": dict(temperature=0.9, top_k=6, top_p=0.9, min_p=0.2),
}


def test_the_largest_is_what_numpy_finds():
    """The first of equals, minus infinity alone, and a NaN before all."""
    rows = np.random.default_rng(0).integers(-5, 5, (64, 300)).astype(np.float32)
    rows[1], rows[2, 40:] = -np.inf, -np.inf
    rows[3, [70, 90]], rows[4, 299], rows[5, 0] = np.nan, np.nan, np.inf
    np.testing.assert_array_equal(largest(rows), rows.argmax(-1))


def reference(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """The distribution, written as the definitions read: one filter after another on renormalised probabilities."""

    def softmax(x):
        x = np.exp(x - x.max())
        return x / x.sum()

    p = softmax(logits.astype(np.float64) / s.temperature)
    if s.top_k:
        least = sorted(p, reverse=True)[min(s.top_k, len(p)) - 1]
        p = np.where(p >= least, p, 0)
        p /= p.sum()
    keep, total = np.zeros(len(p), bool), 0.0
    for token in sorted(range(len(p)), key=lambda t: (-p[t], t)):
        if total < s.top_p:
            keep[token] = True
        total += p[token]
    p = np.where(keep, p, 0)
    p /= p.sum()
    p = np.where(p >= s.min_p * p.max(), p, 0)
    return p / p.sum()


@pytest.mark.parametrize("settings", FILTERS.values(), ids=FILTERS.keys())
def test_filters_equal_their_definitions(settings):
    sampling = Sampling(**settings)
    want = reference(LOGITS, sampling)
    # A second, reversed row: each row is filtered for itself.
    got = np.asarray(jax.nn.softmax(filtered(np.stack([LOGITS, LOGITS[::-1]]), sampling), axis=-1))
    np.testing.assert_array_equal(got[0] > 0, want > 0)
    np.testing.assert_allclose(got[0], want, rtol=1e-5)
    np.testing.assert_allclose(np.sort(got[1]), np.sort(want), rtol=1e-5)
    assert settings.keys() == {"temperature"} or settings.get("top_k") == 99 or (want == 0).any()


def test_draws_have_the_filtered_distribution():
    sampling = Sampling(temperature=0.9, top_k=6, min_p=0.05)
    n = 20_000
    keys = jax.random.split(jax.random.key(0), n)
    tokens = np.asarray(choose(np.tile(LOGITS, (n, 1)), keys, np.int32(0), sampling, len(LOGITS)))
    share = np.bincount(tokens, minlength=len(LOGITS)) / n
    want = reference(LOGITS, sampling)
    assert set(np.flatnonzero(share)) == set(np.flatnonzero(want))
    np.testing.assert_allclose(share, want, atol=4 * np.sqrt(0.25 / n))  # four standard deviations at most


def test_temperature_0_is_greedy_and_ids_beyond_the_tokenizer_are_never_chosen():
    key = row_keys([[1]], 0)
    assert choose(LOGITS[None], key, np.int32(0), Sampling(), 10).tolist() == [4]
    assert choose(LOGITS[None], key, np.int32(0), Sampling(), 4).tolist() == [0]


@pytest.mark.parametrize(
    "settings", [dict(temperature=-1), dict(top_k=-1), dict(top_p=0), dict(top_p=1.5), dict(min_p=2)], ids=str
)
def test_impossible_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(UserError, match=name):
        Sampling(**settings)


@pytest.fixture(scope="module")
def sentencepiece():
    texts = [f"    def run(self, name{i}):\n        return 'café' + name{i}\n" for i in range(300)]
    return SentencePieceTokenizer(train_sentencepiece(texts, 330), "test")


TEXT = "    def run(self):\n        return 'naïve café 東京 🙂'  + x\n"


@pytest.mark.parametrize("cut", [0, 1, 4, 9, 30])
@pytest.mark.parametrize("which", ["bytes", "sentencepiece"])
def test_pieces_are_whole_characters_and_add_up(which, cut, sentencepiece):
    tokenizer = {"bytes": ByteTokenizer(), "sentencepiece": sentencepiece}[which]
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    context, new = ids[: cut + 1], ids[cut + 1 :]
    row = TextStream(tokenizer, context)
    pieces = [row.push(token) for token in new] + [row.finish()]
    assert "".join(pieces) == tokenizer.continuation(context, new) == TEXT[len(tokenizer.decode(context)) :]
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > len(new) / 2, "pieces must come as they are made"


def test_bytes_that_are_no_character_come_out_in_the_end():
    tokenizer = ByteTokenizer()
    new = [*b"a", 0xE2, 0x82, *b"b", 0xFF, 0xF0, 0x9F]
    row = TextStream(tokenizer, [256])
    pieces = [row.push(token) for token in new] + [row.finish()]
    assert "".join(pieces) == tokenizer.continuation([256], new)


def test_a_leading_space_is_kept(sentencepiece):
    for tokenizer in (ByteTokenizer(), sentencepiece):
        row = TextStream(tokenizer, [tokenizer.bos_id, *tokenizer.encode("return")])
        assert "".join([row.push(i) for i in tokenizer.encode("    x")] + [row.finish()]) == "    x"


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("one END two", ["END"], "one "),
        ("aab aaab", ["aaab"], "aab "),  # the beginning of a stop string that is none
        ("x\n\ny", ["\n\n"], "x"),
        ("abcdef", ["def", "cd"], "ab"),
        ("nothing EN", ["END"], "nothing EN"),
        ("no stop", [""], "no stop"),
    ],
)
def test_stop_strings_end_the_text_wherever_tokens_are_cut(text, stop, want):
    row = TextStream(ByteTokenizer(), [256], stop)
    pieces = []
    for token in text.encode():
        pieces.append(row.push(token))
        if row.stopped:
            break
    assert "".join(pieces) + row.finish() == want
    assert row.stopped == (text != want)


def scripted(monkeypatch, texts: list[list[int]]):
    """Replaces the model: every row says its tokens, then a filler."""

    def steps(weights, contexts, active, *, max_tokens, **_):
        assert len(contexts) == len(texts)
        for token in itertools.islice(itertools.zip_longest(*texts, fillvalue=ord(".")), max_tokens):
            yield np.asarray(token)

    monkeypatch.setattr(engine, "steps", steps)


def test_rows_end_at_eos_at_a_stop_string_or_at_the_length(monkeypatch):
    _, model = byte_model()
    tokenizer = ByteTokenizer()
    said = ["ab", "one, two; three", "x" * 12]
    scripted(monkeypatch, [[*said[0].encode(), tokenizer.eos_id], *[list(s.encode()) for s in said[1:]]])
    done = generate(model, tokenizer, ["p"] * 3, max_tokens=12, stop=[", t", "zzz"])
    assert [(row.text, row.reason) for row in done] == [("ab", "eos"), ("one", "stop"), ("x" * 12, "length")]
    assert [len(row.tokens) for row in done] == [3, 6, 12]


def test_streamed_pieces_add_up_to_the_text():
    _, model = byte_model()
    pieces = stream(model, ByteTokenizer(), ["a", "bc"], max_tokens=16, sampling=Sampling(1.0), seed=1, stop=["\n"])
    texts = ["", ""]
    while True:
        try:
            row, piece = next(pieces)
        except StopIteration as end:
            done = end.value
            break
        texts[row] += piece
    assert texts == [row.text for row in done]
    assert any(texts)


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "words"),
    [(["x" * 120], 20, "max_seq_len=128"), ([], 4, "no prompt"), (["a"], 0, "at least 1")],
)
def test_requests_that_cannot_be_met_are_refused(prompts, max_tokens, words):
    with pytest.raises(UserError, match=words):
        generate(byte_model()[1], ByteTokenizer(), prompts, max_tokens=max_tokens)
