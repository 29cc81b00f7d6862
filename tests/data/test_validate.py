"""Validation: every bad row by name, counts that a loop over the documents agrees with, and nothing written."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configs import common
from mixtral_jax.config import SourceConfig, UserError, from_config_dict
from mixtral_jax.data import validate as validate_module
from mixtral_jax.data.corpus import open_batches, open_corpus
from mixtral_jax.data.text import documents, is_heldout
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.data.validate import validate
from mixtral_jax.data.validation_report import report_lines
from tests.data.conftest import write

BYTES = load_tokenizer("bytes", "unused")


@pytest.fixture
def config(make_data, tmp_path):
    """A mixture of two sources, both of which repeat texts; 10 steps of 4 rows of 32."""
    c = common.shrink(common.base())
    c.train.update(steps=10, batch_size=4, seq_len=32)
    paths = {kind: write(tmp_path / kind, kind, 40, first) for kind, first in (("jsonl", 0), ("text", 37))}
    mixture = tuple(SourceConfig(kind, path, "text", kind, 3.0 - i) for i, (kind, path) in enumerate(paths.items()))
    return dataclasses.replace(from_config_dict(c), data=make_data(path="", mixture=mixture))


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_counts_are_those_of_a_loop_over_the_documents(config, tmp_path):
    report = validate(config, BYTES)
    ids, texts, duplicates = collections.Counter(), set(), 0
    for source in config.data.sources:
        for heldout, side in ((False, "train"), (True, "heldout")):
            kept = [one.text for one in documents(source) if is_heldout(one.text, 0.3) == heldout]
            lengths = sorted(len(one.encode()) + 2 for one in kept)
            found = report["sources"][source.name][side]
            assert (found["documents"], found["bytes"]) == (len(kept), sum(lengths) - 2 * len(kept))
            assert found["tokens"] == sum(lengths)
            assert found["bytes_per_token"] == found["bytes"] / found["tokens"]
            assert found["document_tokens"]["max"] == lengths[-1]
            assert found["document_tokens"]["p1"] == lengths[0]
            assert found["document_tokens"]["p50"] == lengths[(len(lengths) - 1) // 2]
            for one in kept:
                ids.update(one.encode())
                duplicates += one in texts
                texts.add(one)
    assert report["duplicates"] == duplicates == 3
    assert report["vocabulary"] == {"size": 258, "used": len(ids), "fallback_share": 0.0}
    assert report["problems"] == []
    assert json.loads(json.dumps(report)) == report
    assert not (tmp_path / "cache").exists()


def test_unknown_tokens_and_single_bytes_are_counted(config, shared_cache_dir):
    tokenizer = load_tokenizer("mistral-v1", shared_cache_dir)
    found = [i for source in config.data.sources for one in documents(source) for i in tokenizer.encode(one.text)]
    assert validate(config, tokenizer)["vocabulary"]["fallback_share"] == 0  # plain letters
    (source,) = (source for source in config.data.sources if source.name == "text")
    with open(f"{source.path}/00040.txt", "a") as file:
        file.write("\x01\x02\U0001f98a" * 50)
    again = validate(config, tokenizer)["vocabulary"]
    assert again["size"] == 32000
    assert again["used"] >= len(set(found))
    assert 0.02 < again["fallback_share"] < 0.5


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_run_takes_is_what_its_batches_hold(config, streaming, monkeypatch):
    monkeypatch.setattr("mixtral_jax.data.windows.WINDOW_ROWS", 10)
    config = with_data(config, streaming=streaming)
    run = validate(config, BYTES)["run"]
    corpus = open_corpus(config.data, BYTES, False)
    batches = open_batches(config.data, corpus, BYTES, batch_size=4, seq_len=32, seed=0)
    made = (batch for batch, _ in batches.read()) if streaming else map(batches.batch, itertools.count())
    rows, tokens = collections.Counter(), 0
    for batch in itertools.islice(made, 10):
        rows.update("text" if ".txt" in row[0] else "jsonl" for row in batch["documents"])
        tokens += int(batch["loss_weights_BT"].sum())
    assert {name: used["rows"] for name, used in run["sources"].items()} == rows
    assert sum(used["tokens"] for used in run["sources"].values()) == pytest.approx(tokens, rel=0.05)
    assert run["positions"] == 10 * 4 * 32
    for name, used in run["sources"].items():
        assert used["epochs"] == rows[name] / used["rows_per_epoch"]
    if not streaming:
        assert [tuple(used.values())[:3] for used in run["sources"].values()] == [u[1:] for u in batches.usage(10)]


def spoil(config, tmp_path):
    """Breaks five rows of the one source and a file of the other; returns their names."""
    names = []
    for file, rows in (("0", (2, 3, 20)), ("1", (1, 15))):
        path = tmp_path / "jsonl" / f"{file}.jsonl"
        lines = path.read_text().split("\n")
        for row in rows:
            lines[row - 1] = "{not json"
            names.append(f"{path}:{row}")
        path.write_text("\n".join(lines))
    path = tmp_path / "text" / "00040.txt"
    path.write_bytes(b"abc\xff")
    return [*names, str(path)]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_bad_row_is_named(config, streaming, tmp_path):
    names = spoil(config, tmp_path)
    report = validate(with_data(config, streaming=streaming), BYTES)
    assert [where for where, _ in report["bad_rows"]["rows"]] == names
    assert (report["bad_rows"]["total"], report["bad_rows"]["allowed"]) == (6, 0)
    (problem,) = report["problems"]
    assert "6 rows cannot be read, and data.max_bad_rows=0" in problem
    lines = "\n".join(report_lines(timed(report)))
    assert all(f"{name}: " in lines for name in names)
    assert validate(with_data(config, max_bad_rows=5), BYTES)["problems"] != []
    assert validate(with_data(config, max_bad_rows=6), BYTES)["problems"] == []


def timed(report):
    report["run"] |= {"tokens_per_second": None, "speed_from": "unknown", "seconds": None}
    return report


def test_only_so_many_bad_rows_are_kept_and_printed(config, tmp_path, monkeypatch):
    spoil(config, tmp_path)
    monkeypatch.setattr(validate_module, "KEPT_BAD_ROWS", 4)
    monkeypatch.setattr("mixtral_jax.data.validation_report.PRINTED_BAD_ROWS", 2)
    report = validate(config, BYTES)
    assert (len(report["bad_rows"]["rows"]), report["bad_rows"]["total"]) == (4, 6)
    lines = list(report_lines(timed(report)))
    assert [line.startswith(str(tmp_path)) for line in lines[:4]] == [True, True, False, False]
    assert lines[2] == "... and 4 more"


def test_a_file_that_breaks_off_is_a_problem_and_the_rest_is_read(config, tmp_path):
    folder = tmp_path / "broken"
    write(folder, "parquet")
    path = folder / "0.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    broken = SourceConfig("parquet", str(folder), "text", "broken", 1.0)
    report = validate(with_data(config, mixture=(broken, *config.data.mixture)), BYTES)
    assert any("0.parquet: not readable as Parquet" in problem for problem in report["problems"])
    assert report["sources"]["text"]["train"]["documents"] > 10


@pytest.mark.parametrize("streaming", [False, True])
def test_files_after_a_broken_one_are_read_too(config, streaming, tmp_path):
    folder = tmp_path / "four"
    write(folder, "parquet", 100)
    for i in (1, 2):
        path = folder / f"{i}.parquet"
        path.write_bytes(path.read_bytes()[:-20])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["good", None]}), folder / "3.parquet")
    four = SourceConfig("parquet", str(folder), "text", "four", 1.0)
    report = validate(with_data(config, mixture=(four,), streaming=streaming), BYTES)
    assert [next((i for i in (1, 2) if f"{i}.parquet: " in one), None) for one in report["problems"]] == [1, 2, None]
    assert report["bad_rows"]["total"] == 1
    assert report["bad_rows"]["rows"][0][0] == f"{folder}/3.parquet:2"
    assert sum(split["documents"] for split in report["sources"]["four"].values()) == 26


def test_a_source_that_is_broken_has_no_other_problem(config, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no table")
    (tmp_path / "b.jsonl").write_text("\n")
    broken = SourceConfig("parquet", str(tmp_path / "a.parquet"), "text", "broken", 1.0)
    empty = SourceConfig("jsonl", str(tmp_path / "b.jsonl"), "text", "empty", 1.0)
    problems = validate(with_data(config, mixture=(broken, empty)), BYTES)["problems"]
    assert [any(words in one for words in ("not readable as", "no text in it")) for one in problems] == [True, True]


def test_missing_files_end_it_at_once(config):
    source = dataclasses.replace(config.data.mixture[0], path="/no/such/*.jsonl")
    with pytest.raises(UserError, match="matches no file"):
        validate(with_data(config, mixture=(source,)), BYTES)


def test_splits_without_documents_and_small_vocabularies(config):
    (problem,) = validate(with_data(config, heldout_fraction=1e-9), BYTES)["problems"]
    assert "no document is held out" in problem
    report = validate(with_data(config, heldout_fraction=1 - 1e-9), BYTES)
    assert [problem.partition(";")[0] for problem in report["problems"]] == [
        "jsonl has no training document",
        "text has no training document",
    ]
    assert report["run"] is None
    assert list(report_lines(report))
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=100))
    (problem,) = validate(small, BYTES)["problems"]
    assert "258 ids and model.vocab_size=100" in problem


def test_the_percentiles_of_one_document():
    split = validate_module._Split()
    assert split.report()["document_tokens"] == {"p1": 0, "p50": 0, "p99": 0, "max": 0}
    split._lengths.append(7)
    assert set(split.report()["document_tokens"].values()) == {7}
    split._lengths.extend(np.arange(100, 200).tolist())
    assert split.report()["document_tokens"] == {"p1": 100, "p50": 149, "p99": 198, "max": 199}
