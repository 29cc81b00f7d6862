"""Others read our exports like the original: transformers' model and tokenizer, live; SentencePiece's ids."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from mixtral_jax.convert import tokenizer_json
from mixtral_jax.convert.__main__ import main
from mixtral_jax.data.tokenizer import train_sentencepiece
from tests.convert import sources
from tests.convert.test_round_trip import GOLDEN
from tests.golden import reference

TEXTS = [
    "",
    " ",
    "     ",
    "a",
    "Hello  world",
    " leading and trailing ",
    "def f(x):\n    if x:\n\t\treturn x  # tab\r\n",
    "日本語のテキスト、中文和한국어",
    "😀 👍🏽 👩‍👩‍👧 🏳️‍🌈",
    "é ñ ﬁ ① Å \u200b \ufeff \u00a0",
    "▁x▁ y",
    "0123456789 3.14159 1e-5",
    "aaaaaaaaaaaaaaaaaaaaaa",
    "======-----//////",
    "<s> is text </",
    "\x00\x01\x7f",
]


def texts() -> list[str]:
    rng = random.Random(0)
    letters = " aeioutrsn=-._/\\*0x\n\t#é日"
    mixed = ("".join(rng.choices(rng.sample(letters, 3), k=rng.randint(1, 24))) for _ in range(2000))
    return [text for text in TEXTS if "<s>" not in text] + list(mixed)


def export(tmp_path, model: bytes, vocab: int):
    """Imports and exports a small model with this tokenizer; returns the export."""
    shape = reference.BASE | dict(vocab_size=vocab)
    source = sources.write(tmp_path / "hf", sources.tensors(reference.weights(shape)), sources.config_json(shape))
    (source / "tokenizer.model").write_bytes(model)
    assert main(["import", f"--from={source}", f"--to={tmp_path / 'run'}"]) == 0
    assert main(["export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'back'}"]) == 0
    return tmp_path / "back"


def test_the_tokenizer_comes_along(tmp_path):
    model = sources.tokenizer_bytes(tmp_path / "v1")
    back = export(tmp_path, model, 32000)
    assert (back / "tokenizer.model").read_bytes() == model
    run = json.loads((tmp_path / "run" / "config.json").read_text())
    assert run["data"]["tokenizer"] == "mistral-v1"
    content = json.loads((back / "tokenizer.json").read_text())
    assert len(content["model"]["vocab"]) == 32000
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    made = [left + right for left, right in content["model"]["merges"]]
    # Each piece of two letters or more is put together by some merge, the better piece before the worse.
    assert set(made) == {piece for piece in map(processor.IdToPiece, range(259, 32000)) if len(piece) > 1}
    scores = [processor.GetScore(processor.PieceToId(piece)) for piece in made]
    assert scores == sorted(scores, reverse=True)


def test_what_cannot_be_said_exactly_is_left_out(tmp_path, capsys):
    model = unigram()
    back = export(tmp_path, model, 300)
    assert (back / "tokenizer.model").read_bytes() == model
    assert not (back / "tokenizer.json").exists()
    assert "no tokenizer.json was written" in capsys.readouterr().err


def unigram() -> bytes:
    out = io.BytesIO()
    words = [" ".join(random.Random(k).choices(["the", "cat", "sat", "on", "mats", "today"], k=8)) for k in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=out,
        vocab_size=300,
        model_type="unigram",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, capsys):
    source = sources.mixtral(tmp_path / "hf")
    (source / "tokenizer.model").write_bytes(sources.tokenizer_bytes(tmp_path / "v1"))
    assert main(["import", f"--from={source}", f"--to={tmp_path / 'run'}"]) == 2
    assert "32000 ids and the model 64" in capsys.readouterr().err


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["mistral-v1", "trained"])
def test_auto_tokenizer_has_sentencepieces_ids(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    if kind == "trained":
        model = train_sentencepiece([Path(tokenizer_json.__file__).read_text()] * 3, 400)
    else:
        model = sources.tokenizer_bytes(tmp_path / "v1")
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    theirs = transformers.AutoTokenizer.from_pretrained(export(tmp_path, model, processor.GetPieceSize()))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (processor.bos_id(), processor.eos_id())
    for text in texts():
        ids = processor.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, repr(text)
        assert theirs(text).input_ids == [processor.bos_id(), *ids]
        assert theirs.decode(ids) == processor.decode(ids), repr(text)


@pytest.mark.parity
@pytest.mark.parametrize("name", reference.SHAPES)
def test_transformers_loads_the_export(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = sources.mixtral(tmp_path / "hf", name)
    assert main(["import", f"--from={source}", f"--to={tmp_path / 'run'}"]) == 0
    assert main(["export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'back'}", "--max_shard_size=40KB"]) == 0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    made = reference.batch(reference.SHAPES[name])
    with torch.no_grad():
        got = model(input_ids=torch.tensor(made["tokens"]).long(), attention_mask=torch.tensor(made["mask"])).logits
    with np.load(GOLDEN / f"{name}.npz") as golden:
        want = golden["logits"]
    valid = made["mask"] > 0
    np.testing.assert_allclose(got.numpy()[valid], want[valid], rtol=0, atol=1e-6 * np.abs(want).max())
