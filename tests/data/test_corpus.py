"""The corpus: held-out documents of streams, keys, and batches of what was opened."""

import itertools

import pytest

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data import corpus as corpus_module
from mixtral_jax.data.corpus import first_documents, open_batches, open_corpus, stream_corpus
from mixtral_jax.data.loader import Batches
from mixtral_jax.data.packing import pack
from mixtral_jax.data.text import documents, is_heldout
from mixtral_jax.data.tokenizer import load_tokenizer
from tests.data.conftest import ROW, write
from tests.data.test_loader import assert_equal

BYTES = load_tokenizer("bytes", "unused")
T, B = ROW, 4


def stream_data(make_data, tmp_path, **changes):
    source = SourceConfig("jsonl", write(tmp_path / "a", "jsonl", 200), "text", "a", 3.0)
    other = SourceConfig("text", write(tmp_path / "b", "text", 50, 5000), "text", "b", 1.0)
    return make_data(path="", mixture=(source, other), streaming=True, **changes)


def test_the_heldout_split_of_streams(make_data, tmp_path):
    data = stream_data(make_data, tmp_path)
    corpus = open_corpus(data, BYTES)
    assert [(source.name, source.weight, source.train) for source in corpus.sources] == [
        ("a", 3.0, None),
        ("b", 1.0, None),
    ]
    for source, of in zip(corpus.sources, data.sources):
        expected = [document for document in documents(of) if is_heldout(document.text, 0.3)]
        file = source.heldout
        assert list(file.ids) == [document.id for document in expected]
        texts = [file.tokens[a:b].tolist() for a, b in itertools.pairwise(file.offsets)]
        assert texts == [[BYTES.bos_id, *BYTES.encode(document.text), BYTES.eos_id] for document in expected]
        assert file.bytes_.tolist() == [len(document.text) for document in expected]
    assert len(corpus.heldout.ids) == sum(len(source.heldout.ids) for source in corpus.sources)
    batch = next(open_batches(data, corpus, BYTES, batch_size=B, seq_len=T, seed=0).read())[0]
    assert not set(corpus.heldout.ids) & {document for row in batch["documents"] for document in row}


def test_the_heldout_split_is_bounded_and_read_once(make_data, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "HELDOUT_DOCUMENTS", 5)
    data = stream_data(make_data, tmp_path)
    corpus = stream_corpus(data, BYTES)
    assert [len(source.heldout.ids) for source in corpus.sources] == [5, 5]
    monkeypatch.setattr(corpus_module, "read", None)  # it is kept
    again = stream_corpus(data, BYTES)
    assert again.heldout.tokens.tolist() == corpus.heldout.tokens.tolist()
    monkeypatch.undo()
    monkeypatch.setattr(corpus_module, "HELDOUT_BYTES", 300)
    sizes = [int(source.heldout.bytes_.sum()) for source in stream_corpus(data, BYTES).sources]
    assert all(300 <= size < 300 + 200 for size in sizes)
    monkeypatch.setattr(corpus_module, "SCANNED_DOCUMENTS", 1)
    with pytest.raises(UserError, match=r"holds out none of the first 1 documents of a stream; raise it"):
        stream_corpus(make_data(**vars(data) | {"heldout_fraction": 0.0001}), BYTES)


def test_the_key_is_that_of_the_streams(make_data, tmp_path):
    data = stream_data(make_data, tmp_path)
    keys = [stream_corpus(data, BYTES).key]
    assert stream_corpus(data, BYTES).key == keys[0]
    keys.append(stream_corpus(stream_data(make_data, tmp_path, heldout_fraction=0.4), BYTES).key)
    keys.append(stream_corpus(data, load_tokenizer("mistral-v1", "unused")).key)
    (tmp_path / "b" / "05000.txt").write_text("longer" * 100)
    keys.append(stream_corpus(data, BYTES).key)
    assert len(set(keys)) == 4


def test_a_changed_file_is_not_served_from_the_kept_split(make_data, tmp_path):
    data = stream_data(make_data, tmp_path, heldout_fraction=0.99)
    before = stream_corpus(data, BYTES).sources[1].heldout
    path = tmp_path / "b" / "05001.txt"
    path.write_text("Z" * len(path.read_text()))
    after = stream_corpus(data, BYTES).sources[1].heldout
    assert before.ids == after.ids
    assert before.tokens.tolist() != after.tokens.tolist()


def test_first_documents_are_training_documents_by_weight(make_data, tmp_path):
    data = stream_data(make_data, tmp_path)
    file = first_documents(data, BYTES, 4000)
    sizes = {name: sum(n for id, n in zip(file.ids, file.lengths) if f"/{name}/" in id) for name in "ab"}
    assert 3000 <= sizes["a"] < 3200
    assert 1000 <= sizes["b"] < 1200
    assert not set(stream_corpus(data, BYTES).heldout.ids) & set(file.ids)


def test_indexed_batches_of_a_corpus(make_data, tmp_path):
    paths = [write(tmp_path / name, "jsonl") for name in "ab"]  # the same texts
    for file in (tmp_path / "b").iterdir():
        file.rename(file.with_stem(f"{file.stem}b"))  # under the same names they would share a cache, and its ids
    mixture = tuple(SourceConfig("jsonl", path, "text", name, 1.0) for path, name in zip(paths, "ab"))
    orders = {}
    for data in (make_data(path="", mixture=mixture), make_data(source="jsonl", path=paths[0])):
        corpus = open_corpus(data, BYTES, False)
        batches = open_batches(data, corpus, BYTES, batch_size=1, seq_len=T, seed=3)
        rows = [batches.batch(k) for k in range(100)]
        orders[len(data.sources)] = {
            name: [row for row in rows if f"/{name}/" in row["documents"][0][0]] for name in "ab"
        }
    assert orders[2]["a"][0]["tokens_BT"].tolist() == orders[1]["a"][0]["tokens_BT"].tolist()
    tokens = {name: [row["tokens_BT"].tolist() for row in orders[2][name]] for name in "ab"}
    assert len(tokens["a"]) == len(tokens["b"]) == 50
    assert tokens["a"] != tokens["b"]
    train = corpus.sources[0].train
    alone = Batches(train, pack(train.lengths, T), batch_size=1, seq_len=T, seed=3)
    for k, batch in enumerate(rows):
        assert_equal(batch, alone.batch(k))
