"""Streams: the documents of the indexed reader from any place, and bad rows that count once."""

import dataclasses
import itertools
import json

import pytest

from mixtral_jax.config import RunError, SourceConfig, UserError
from mixtral_jax.data import stream
from mixtral_jax.data.bad_rows import BadRows
from mixtral_jax.data.stream import read
from mixtral_jax.data.text import documents
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.data.windows import StreamedBatches
from tests.data.conftest import KINDS, ROW, write, write_bad

BYTES = load_tokenizer("bytes", "unused")
T, B = ROW, 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_has_the_documents_of_the_indexed_reader_from_any_place(kind, tmp_path, small):
    source = SourceConfig(kind, write(tmp_path / "data", kind), "text", kind, 1.0)
    whole = list(read(source, None, BadRows()))
    assert [document for document, _ in whole] == list(documents(source))
    for i, (_, place) in enumerate(whole):
        rest = list(itertools.islice(read(source, json.loads(json.dumps(place)), BadRows()), 9))
        assert [document for document, _ in rest] == [document for document, _ in whole[i + 1 : i + 10]]


def test_the_standard_library_is_streamed(small):
    source = SourceConfig("stdlib", "", "text", "stdlib", 1.0)
    first = list(itertools.islice(read(source, None, BadRows()), 50))
    assert [document for document, _ in first] == list(itertools.islice(documents(source), 50))
    assert next(read(source, first[20][1], BadRows())) == first[21]


def test_bad_rows_name_file_and_line(tmp_path, small):
    source = write_bad(tmp_path / "data")
    with pytest.raises(UserError, match=r"a\.jsonl:17: not JSON .*; 1 bad rows were skipped before it"):
        list(read(source, None, BadRows(1)))
    counter = BadRows(3)
    found = [document.id.rpartition(":")[2] for document, _ in read(source, None, counter)]
    assert found == [str(i) for i in range(1, 41) if i not in (3, 17, 18)]
    assert counter.count == 3


@pytest.mark.parametrize("limit", [2, 3])
def test_bad_rows_count_once_over_the_run_and_over_resumes(make_data, tmp_path, small, limit):
    sources = (write_bad(tmp_path / "one"), SourceConfig("text", write(tmp_path / "two", "text"), "text", "two", 0.5))
    data = make_data(path="", mixture=sources, streaming=True, max_bad_rows=limit)
    batches = StreamedBatches(data, BYTES, batch_size=B, seq_len=T, seed=0)

    def go_on(resume):
        state = None
        stored = batches.read()
        while state is None or state["sources"]["bad"]["epoch"] < 4:
            _, state = next(stored)
            if resume:
                stored = batches.read(json.loads(json.dumps(state)))
        return state

    for resume in (False, True):
        if limit == 2:
            with pytest.raises(UserError, match=r"a\.jsonl:18: not JSON .*; 2 bad rows were skipped before it"):
                go_on(resume)
        else:
            assert go_on(resume)["sources"]["bad"]["bad_before"] == 3


def test_bad_rows_of_all_sources_count_together(make_data, tmp_path, small):
    sources = tuple(dataclasses.replace(write_bad(tmp_path / name), name=name) for name in "xy")
    data = make_data(path="", mixture=sources, streaming=True, max_bad_rows=5)
    with pytest.raises(UserError, match=r":18: not JSON .*; 5 bad rows were skipped before it"):
        list(itertools.islice(StreamedBatches(data, BYTES, batch_size=B, seq_len=T, seed=0).read(), 100))


def test_a_data_set_that_breaks_off_is_a_fault_of_the_run(tmp_path, monkeypatch, small):
    class Broken:
        column_names = None

        def __iter__(self):
            yield {"text": "a"}
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(stream, "load_hub", lambda path, streaming: Broken())
    with pytest.raises(RunError, match=r"name: reading on failed after row 1 \(reset by peer\); resume"):
        list(read(SourceConfig("hub", "name", "text", "name", 1.0), None, BadRows()))
