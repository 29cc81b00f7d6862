"""The token cache: what it holds, when it is rebuilt, and a split that never leaks."""

import dataclasses
import json
import logging
import mmap
import multiprocessing
import os
import re
import time

import numpy as np
import pytest

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data import build as build_module
from mixtral_jax.data import shards as shards_module
from mixtral_jax.data.cache import build_cache, build_once
from mixtral_jax.data.corpus import open_corpus
from mixtral_jax.data.text import documents, is_heldout
from mixtral_jax.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes", "unused")


@pytest.fixture
def corpus_data(make_data, tmp_path):
    """60 documents, of which 20 occur twice."""
    for i in range(60):
        (tmp_path / "corpus" / f"{i:02d}.txt").write_text(f"text {i % 40} é " * (i % 40 + 1))
    return make_data()


def document_texts(split):
    return [BYTES.decode(split.tokens[a:b]) for a, b in zip(split.offsets, split.offsets[1:])]


def is_mapped(array):
    """Whether an array's memory is a file's."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    return array is not None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corpus_that_moved_is_the_same(make_data, tmp_path, monkeypatch, streaming):
    monkeypatch.chdir(tmp_path)
    keys = []
    for folder, path in (
        ("one", "one"),
        ("far/two", f"{tmp_path}/far/two/b,far/two/a.jsonl"),
        ("far/two", "far/./two"),
    ):
        (tmp_path / folder / "b").mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(("a.jsonl", "b/a.jsonl")):
            lines = [json.dumps({"text": f"{name} {i} {row}"}) + "\n" for row in range(20)]
            (tmp_path / folder / name).write_text("".join(lines))
            os.utime(tmp_path / folder / name, (1e9, 1e9))
        mixture = (SourceConfig("jsonl", path, "text", path, 1.0),)
        keys.append(open_corpus(make_data(path="", mixture=mixture, streaming=streaming), BYTES, False).key)
    assert len(set(keys)) == 1
    assert len(list((tmp_path / "cache" / ("streams" if streaming else "corpora")).glob("*/"))) == 1
    (tmp_path / "one" / "a.jsonl").rename(tmp_path / "one" / "c.jsonl")  # now behind the other
    again = (SourceConfig("jsonl", "one", "text", "one", 1.0),)
    assert open_corpus(make_data(path="", mixture=again, streaming=streaming), BYTES, False).key not in keys


def test_content(corpus_data):
    corpus = build_cache(corpus_data, BYTES)
    by_id = {document.id: document.text for document in documents(corpus_data)}
    assert sorted([*corpus.train.ids, *corpus.heldout.ids]) == sorted(by_id)
    for split in (corpus.train, corpus.heldout):
        assert all(map(is_mapped, (split.tokens[:], split.offsets, split.bytes_)))
        assert (split.tokens.dtype, split.offsets.dtype, split.bytes_.dtype) == (np.uint16, np.int64, np.int64)
        tokens = np.asarray(split.tokens)
        assert (tokens[split.offsets[:-1]] == BYTES.bos_id).all()
        assert (tokens[split.offsets[1:] - 1] == BYTES.eos_id).all()
        assert document_texts(split) == [by_id[id] for id in split.ids]
        assert split.bytes_.tolist() == [len(by_id[id].encode()) for id in split.ids]
        assert split.lengths.tolist() == (split.bytes_ + 2).tolist()


def test_heldout_never_leaks(corpus_data):
    corpus = build_cache(corpus_data, BYTES)
    train, heldout = set(document_texts(corpus.train)), set(document_texts(corpus.heldout))
    assert train
    assert heldout
    assert not train & heldout
    assert len(corpus.train.ids) > len(train)  # there were duplicates to part
    assert len(train) + len(heldout) == 40
    assert all(is_heldout(text, 0.3) for text in heldout)


def test_large_vocabularies_take_int32(corpus_data):
    class Wide(type(BYTES)):
        vocab_size, fingerprint = 2**16 + 1, "wide"

    corpus = build_cache(corpus_data, Wide())
    assert corpus.train.tokens.dtype == np.int32
    assert corpus.train.tokens.tolist() == build_cache(corpus_data, BYTES).train.tokens.tolist()


def test_batches_of_documents_do_not_matter(corpus_data, monkeypatch):
    whole = build_cache(corpus_data, BYTES)
    monkeypatch.setattr(shards_module, "BATCH_CHARACTERS", 50)
    again = build_cache(dataclasses.replace(corpus_data, cache_dir=corpus_data.cache_dir + "2"), BYTES)
    assert again.train.tokens.tolist() == whole.train.tokens.tolist()
    assert again.key == whole.key


@pytest.fixture
def builds(monkeypatch):
    """Counts how often a shard is tokenised; this corpus is one."""
    calls, write = [], build_module.write_shard
    monkeypatch.setattr(build_module, "write_shard", lambda *args: calls.append(1) or write(*args))
    return calls


def test_built_once_per_content_tokenizer_and_fraction(corpus_data, builds, tmp_path, shared_cache_dir):
    keys = {build_cache(corpus_data, BYTES).key for _ in range(2)}
    assert len(builds) == 1
    keys.add(build_cache(dataclasses.replace(corpus_data, heldout_fraction=0.4), BYTES).key)
    keys.add(build_cache(corpus_data, load_tokenizer("mistral-v1", shared_cache_dir)).key)
    (tmp_path / "corpus" / "00.txt").write_text("changed")
    keys.add(build_cache(corpus_data, BYTES).key)
    assert len(builds) == len(keys) == 4


SHARD_FILES = ["train.tokens", "train.documents", "heldout.tokens", "entry.json"]
JOINED_FILES = ["train.offsets", "train.bytes", "heldout.rows", "cache.json"]


@pytest.mark.parametrize("name", SHARD_FILES + JOINED_FILES)
@pytest.mark.parametrize("damage", ["short", "empty", "missing", "flipped"])
def test_a_damaged_cache_is_repaired_with_a_message(corpus_data, builds, tmp_path, caplog, name, damage):
    before = build_cache(corpus_data, BYTES)
    expected = (before.train.tokens.tolist(), before.train.offsets.tolist(), list(before.train.ids))
    (path,) = (tmp_path / "cache").rglob(name)
    content = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage != "missing":
        path.write_bytes(content[: len(content) - 8] if damage == "short" else b"")
    with caplog.at_level(logging.WARNING):
        after = build_cache(corpus_data, BYTES, verify=damage == "flipped")
    assert path.read_bytes() == content
    assert "damaged" in caplog.text or (name, damage) in {("cache.json", "missing")}
    if name in SHARD_FILES or name in caplog.text:
        assert str(path) in caplog.text
    assert (after.train.tokens.tolist(), after.train.offsets.tolist(), list(after.train.ids)) == expected
    assert len(builds) == (2 if name in SHARD_FILES else 1)


def test_a_flipped_byte_is_seen_on_verify_only_and_a_whole_cache_stays(corpus_data, builds, tmp_path, caplog):
    build_cache(corpus_data, BYTES)
    (path,) = (tmp_path / "cache").rglob("train.tokens")
    content = path.read_bytes()
    build_cache(corpus_data, BYTES, verify=True)
    assert len(builds) == 1
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    build_cache(corpus_data, BYTES)  # fast: sizes only
    assert (len(builds), caplog.text) == (1, "")
    build_cache(corpus_data, BYTES, verify=True)
    assert (len(builds), path.read_bytes()) == (2, content)
    assert "train.tokens has the SHA-256" in caplog.text


def test_an_interrupted_build_leaves_no_half_shard(corpus_data, tmp_path):
    class Failing(type(BYTES)):
        def encode_many(self, texts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(corpus_data, Failing())
    assert [path.name for path in (tmp_path / "cache" / "corpora").glob("*/*")] == ["shards"]
    assert list((tmp_path / "cache" / "corpora").glob("*/shards/*")) == []
    build_cache(corpus_data, BYTES)


def test_files_that_change_while_they_are_read_are_an_error(corpus_data, tmp_path):
    class Slow(type(BYTES)):
        def encode_many(self, texts):
            (tmp_path / "corpus" / "00.txt").write_text("changed")
            return super().encode_many(texts)

    with pytest.raises(UserError, match="files changed while they were tokenised"):
        build_cache(corpus_data, Slow())
    corpus = build_cache(corpus_data, BYTES)
    assert "changed" in document_texts(corpus.train) + document_texts(corpus.heldout)


def test_a_stream_has_no_cache(corpus_data):
    with pytest.raises(ValueError, match="streamed"):
        build_cache(dataclasses.replace(corpus_data, streaming=True), BYTES)


def _count_build(path, counter, barrier):
    def build(folder):
        with counter.get_lock():
            counter.value += 1
        time.sleep(0.3)  # long enough for the others to come along
        (folder / "done").write_text("whole")

    barrier.wait(timeout=60)
    assert build_once(path, lambda folder: (folder / "done").read_text(), build) == "whole"


def test_of_many_processes_one_builds(tmp_path):
    context = multiprocessing.get_context("spawn")
    shared = (tmp_path / "thing", context.Value("i", 0), context.Barrier(3))
    processes = [context.Process(target=_count_build, args=shared) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert shared[1].value == 1


def test_losing_a_race_without_locks_is_no_error(tmp_path):
    def build(folder):
        (folder / "done").write_text("second")
        (tmp_path / "thing").mkdir()
        (tmp_path / "thing" / "done").write_text("first")

    assert build_once(tmp_path / "thing", lambda folder: (folder / "done").read_text(), build) == "first"


def test_an_empty_split_is_explained_with_a_fraction_that_works(make_data, tmp_path):
    for text in "abc":
        (tmp_path / "corpus" / f"{text}.txt").write_text(text)
    for fraction, side in ((0.001, "held-out"), (0.999, "training")):
        with pytest.raises(UserError, match=f"{side} split empty: there are 3 documents") as caught:
            build_cache(make_data(heldout_fraction=fraction), BYTES)
        fix = float(re.search(r"set data\.heldout_fraction=([\d.]+)", str(caught.value)).group(1))
        corpus = build_cache(make_data(heldout_fraction=fix), BYTES)
        assert len(corpus.train.ids) * len(corpus.heldout.ids) == 2


def test_one_document_cannot_be_split(make_data, tmp_path):
    (tmp_path / "corpus" / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"there are 1 documents; add different documents"):
        build_cache(make_data(), BYTES)


@pytest.mark.usefixtures("corpus_data")
def test_an_unwritable_cache_dir(make_data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write"):
        build_cache(make_data(cache_dir=str(tmp_path / "file")), BYTES)


def test_one_progress_bar_on_a_terminal_and_lines_elsewhere(corpus_data, monkeypatch, capsys, caplog):
    with caplog.at_level(logging.INFO):
        build_cache(corpus_data, BYTES)
    assert "(once)" in caplog.text
    assert "documents" in caplog.text
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    build_cache(dataclasses.replace(corpus_data, heldout_fraction=0.31), BYTES)
    assert "tokenising" in capsys.readouterr().err
    caplog.clear()
    build_cache(dataclasses.replace(corpus_data, heldout_fraction=0.32), BYTES, progress=False)
    assert (caplog.text, capsys.readouterr().err) == ("", "")
