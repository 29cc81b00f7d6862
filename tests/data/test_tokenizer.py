"""Tokenizers: lossless round trips, Mixtral's ids, continuations, saving, and errors that name the file."""

import subprocess
import sys

import pytest
import sentencepiece

from mixtral_jax.config import UserError
from mixtral_jax.data import tokenizer as tokenizer_module
from mixtral_jax.data.text import documents, is_heldout
from mixtral_jax.data.tokenizer import SentencePieceTokenizer, load_tokenizer, train_sentencepiece

TEXTS = {
    "code": "def f(x):\n\tif x:\n\t\treturn  {'a': 1}\n\n    # done\r\n",
    "prose": "The naïve café, “quoted” — and so on…",
    "cjk": "漢字かな交じり文。한국어도.",
    "emoji": "👩‍👩‍👧‍👦 🇫🇮 e\u0301 ﬁ",
    "whitespace": "  two  three   \n\n\n\t\t \u00a0\u3000\u2028 ",
    "one space": " ",
    "newline": "\n",
    "empty": "",
    "nul": "a\0b",
    "special names": "<s> </s> <unk> <0x0A> [INST]",
    "lower block": "a\u2581b \u2581\u2581",
}


@pytest.fixture(params=["bytes", "mistral-v1", "stdlib:4096"])
def tokenizer(request, shared_cache_dir):
    return load_tokenizer(request.param, shared_cache_dir)


@pytest.mark.parametrize("kind", TEXTS)
def test_round_trip_is_lossless(tokenizer, kind):
    text = TEXTS[kind]
    if kind == "lower block" and tokenizer.name == "mistral-v1":
        pytest.skip("Mixtral's model reads U+2581 as a space; its ids must stay Mistral's")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_encode_many_equals_encode(tokenizer):
    texts = [text for kind, text in TEXTS.items() if kind != "lower block"]
    assert tokenizer.encode_many(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_many(list(TEXTS.values())) == [tokenizer.encode(text) for text in TEXTS.values()]


def test_bos_and_eos_decode_to_nothing(tokenizer):
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id]) == "a b"


@pytest.mark.parametrize("context", ["def f():\n", "x", "", "if a:\n   "])
def test_continuation_keeps_leading_spaces(tokenizer, context):
    context_ids, new_ids = [tokenizer.bos_id, *tokenizer.encode(context)], tokenizer.encode("    return 1")
    continued = tokenizer.continuation(context_ids, new_ids)
    # With a dummy prefix, text encoded apart starts with one space more, except at the very start of a text.
    extra = " " if tokenizer.name == "mistral-v1" and context else ""
    assert continued == extra + "    return 1"
    for cut in range(len(new_ids)):
        before = tokenizer.continuation(context_ids, new_ids[:cut])
        assert before + tokenizer.continuation(context_ids + new_ids[:cut], new_ids[cut:]) == continued


def test_mistral_decoded_alone_loses_the_space_that_continuation_keeps(tmp_path):
    tokenizer = load_tokenizer("mistral-v1", str(tmp_path))
    ids = tokenizer.encode("a b")
    assert (tokenizer.decode(ids[1:]), tokenizer.continuation(ids[:1], ids[1:])) == ("b", " b")


def test_continuation_of_a_cut_character(tokenizer):
    ids = tokenizer.encode("a 𓀀 b")
    cut = next(i for i in range(len(ids)) if "\ufffd" in tokenizer.decode(ids[:i]))
    assert tokenizer.continuation(ids[:cut], ids[cut:]) == "𓀀 b"


def test_ids_outside_the_vocabulary_do_not_stop_decoding(tokenizer):
    # A model's vocabulary may be padded beyond its tokenizer's, and an untrained model samples from all of it.
    text = tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size + 5, -1])
    assert text.startswith("ab")
    assert len(text) > 2


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_bytes_replaces_invalid_utf8():
    tokenizer = load_tokenizer("bytes", "unused")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([97, 0xC3, 98]) == "a\ufffdb"


def test_mistral_v1_ids(tmp_path):
    tokenizer = load_tokenizer("mistral-v1", str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.encode("[INST] Hello [/INST]") == [733, 16289, 28793, 22557, 733, 28748, 16289, 28793]
    assert tokenizer.encode("Hi there") == [15359, 736]
    assert tokenizer.encode("[INST] How? [/INST]") == [733, 16289, 28793, 1602, 28804, 733, 28748, 16289, 28793]


def test_mistral_v1_ids_are_those_of_sentencepiece_itself(tmp_path):
    tokenizer = load_tokenizer("mistral-v1", str(tmp_path))
    tokenizer.save(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in TEXTS.values():
        assert tokenizer.encode(text) == processor.encode(text)


def test_mistral_v1_is_found_without_importing_mistral_common():
    code = (
        "import sys; from mixtral_jax.data.tokenizer import load_tokenizer; load_tokenizer('mistral-v1', '/nowhere');"
        "assert not {'mistral_common', 'jax', 'grain', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_save_and_load_keep_the_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run" / "tokenizer")
    files = list((tmp_path / "run" / "tokenizer").iterdir())
    assert [file.name for file in files] == ["tokenizer.json" if tokenizer.name == "bytes" else "tokenizer.model"]
    for path in (tmp_path / "run" / "tokenizer", files[0]):
        loaded = load_tokenizer(str(path), "unused")
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.vocab_size == tokenizer.vocab_size
        assert [loaded.encode(text) for text in TEXTS.values()] == [tokenizer.encode(text) for text in TEXTS.values()]


def test_fingerprints_differ(shared_cache_dir):
    specs = ("bytes", "mistral-v1", "stdlib:4096")
    assert len({load_tokenizer(spec, shared_cache_dir).fingerprint for spec in specs}) == 3


def test_stdlib_tokenizer(stdlib_tokenizer, shared_cache_dir, make_data, monkeypatch):
    assert (stdlib_tokenizer.vocab_size, stdlib_tokenizer.bos_id, stdlib_tokenizer.eos_id) == (4096, 1, 2)
    monkeypatch.setattr(tokenizer_module, "train_sentencepiece", lambda *_: pytest.fail("it was trained twice"))
    assert load_tokenizer("stdlib:4096", shared_cache_dir).fingerprint == stdlib_tokenizer.fingerprint
    texts = [document.text for document in documents(make_data(source="stdlib"))]
    assert all(stdlib_tokenizer.decode(ids) == text for ids, text in zip(stdlib_tokenizer.encode_many(texts), texts))
    indent = stdlib_tokenizer.encode("        x")
    assert len(indent) == 2  # indentation is one piece


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.2])
def test_stdlib_tokenizer_sees_training_documents_only(fraction, tmp_path, monkeypatch):
    seen = []

    def fake(texts, size):
        seen.extend(texts)
        return train_sentencepiece(["some text, any text"], size)

    monkeypatch.setattr(tokenizer_module, "train_sentencepiece", fake)
    load_tokenizer("stdlib:275", str(tmp_path), fraction)
    assert len(seen) > 500
    assert not any(is_heldout(text, fraction) for text in seen)


def test_training_is_deterministic_and_lossless_on_hard_texts():
    texts = [*TEXTS.values(), "x" * 10_000, "a\tb\n" * 2000] * 2
    model = train_sentencepiece(texts, 400)
    assert model == train_sentencepiece(texts, 400)
    trained = SentencePieceTokenizer(model, "test")
    assert trained.vocab_size == 400
    assert [trained.decode(trained.encode(text)) for text in texts] == texts


@pytest.mark.parametrize("odd", ["\t", "\0"])
def test_text_with_tabs_or_nul_in_every_line_is_trained_on(odd):
    text = f"{odd}int counter = 1;\n" * 100
    assert train_sentencepiece([text], 280) == train_sentencepiece([text.replace(odd, "\n")], 280)


def test_the_sample_of_a_large_corpus_is_bounded_and_independent_of_order(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "SAMPLE_CHARACTERS", 5000)
    texts = [f"{i:04d}" * 50 for i in range(500)]
    sample = tokenizer_module._sample(texts)
    assert 1000 < sum(map(len, sample)) <= 5000
    assert sorted(tokenizer_module._sample(texts[::-1])) == sorted(sample)


def test_a_damaged_cached_tokenizer_is_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(
        tokenizer_module, "train_sentencepiece", lambda texts, size: train_sentencepiece(["some text"], size)
    )
    first = load_tokenizer("stdlib:268", str(tmp_path))
    (path,) = (tmp_path / "tokenizers").glob("*/tokenizer.model")
    path.write_bytes(path.read_bytes()[:1000])
    assert load_tokenizer("stdlib:268", str(tmp_path)).fingerprint == first.fingerprint


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 8])
def test_corrupt_model(tmp_path, content):
    path = tmp_path / "my.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"my\.model.*damaged"):
        load_tokenizer(str(path), str(tmp_path))


def test_a_model_without_bos_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text"]),
        model_prefix=str(tmp_path / "bare"),
        vocab_size=270,
        byte_fallback=True,
        model_type="bpe",
        bos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"bare\.model.*no BOS"):
        load_tokenizer(str(tmp_path / "bare.model"), "unused")


@pytest.mark.parametrize("spec", ["stdlib:many", "stdlib:", "stdlib:10", "mistral", "/no/such.model"])
def test_bad_specs(spec, tmp_path):
    with pytest.raises(UserError, match=r"choose|use|write"):
        load_tokenizer(spec, str(tmp_path))


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(str(tmp_path), "unused")
    (tmp_path / "tokenizer.json").write_text('{"type": "BPE"}')
    with pytest.raises(UserError, match=r"tokenizer\.json is not .*bytes"):
        load_tokenizer(str(tmp_path), "unused")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not JSON"):
        load_tokenizer(str(tmp_path), "unused")
