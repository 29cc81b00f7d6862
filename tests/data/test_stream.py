"""Streams: every document once per epoch, the same rows for any readers, and a state that goes on bit for bit."""

import collections
import dataclasses
import itertools
import json
import threading

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from mixtral_jax.config import RunError, SourceConfig, UserError
from mixtral_jax.data import corpus as corpus_module
from mixtral_jax.data import stream, windows
from mixtral_jax.data.bad_rows import BadRows
from mixtral_jax.data.corpus import first_documents, open_batches, open_corpus, stream_corpus
from mixtral_jax.data.loader import Batches
from mixtral_jax.data.packing import pack
from mixtral_jax.data.prefetch import prefetch
from mixtral_jax.data.stream import read
from mixtral_jax.data.text import documents, is_heldout
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.data.windows import StreamedBatches
from tests.data.test_loader import FIELDS, assert_equal, pairs

BYTES = load_tokenizer("bytes", "unused")
T, B = 32, 4


def text(i):
    """A text of its own for every i, of 5 to 200 characters."""
    return f"{i:05d}" + "".join(chr(97 + (i * j) % 26) for j in range(i * 7919 % 195))


def write(folder, kind, count=60, first=0, rows_per_file=25):
    """Writes texts as files of a kind, and returns the path to give to data.path."""
    folder.mkdir(exist_ok=True)
    numbers = range(first, first + count)
    if kind == "text":
        for i in numbers:
            (folder / f"{i:05d}.txt").write_text(text(i))
        return str(folder)
    for f, start in enumerate(range(0, count, rows_per_file)):
        texts = [text(i) for i in numbers[start : start + rows_per_file]]
        path = folder / f"{f}.{'parquet' if kind == 'hub' else kind}"
        table = pyarrow.table({"n": list(range(len(texts))), "text": texts})
        if kind == "jsonl":
            # With a blank line here and there, and with and without a newline at the end.
            lines = "".join("\n" * (i % 5 == 0) + json.dumps({"text": one}) + "\n" for i, one in enumerate(texts))
            path.write_text(lines if f else lines.rstrip())
        elif kind == "arrow":
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
        else:
            pyarrow.parquet.write_table(table, path, row_group_size=7)
    return str(folder)


KINDS = ["text", "jsonl", "parquet", "arrow", "hub"]


@pytest.fixture
def small(monkeypatch):
    """Windows, parts and chunks so small that a corpus of some kilobytes has many."""
    monkeypatch.setattr(windows, "WINDOW_ROWS", 10)
    monkeypatch.setattr(windows, "CHUNK_CHARACTERS", 700)
    monkeypatch.setattr(stream, "PART_BYTES", 900)
    monkeypatch.setattr(stream, "STATE_ROWS", 7)


@pytest.fixture
def make_stream(make_data, tmp_path, small):
    """Returns a function that writes a corpus of one kind, or a mixture of several, and opens it as streamed batches."""

    def make(*kinds, batch_size=B, seed=0, **changes):
        sources = [
            SourceConfig(kind, write(tmp_path / kind, kind, 60 // len(kinds) + s, 1000 * s), "text", kind, 1.0 + s)
            for s, kind in enumerate(kinds)
        ]
        data = make_data(path="", mixture=tuple(sources), streaming=True, **changes)
        return StreamedBatches(data, BYTES, batch_size=batch_size, seq_len=T, seed=seed)

    return make


def training_ids(batches, name):
    """The tokens of every training document of a source, by way of the indexed reader."""
    (source,) = (source for source in batches._data.sources if source.name == name)
    texts = [document.text for document in documents(source)]
    kept = [one for one in texts if not is_heldout(one, batches._data.heldout_fraction)]
    assert len(kept) < len(texts)
    return [[BYTES.bos_id, *BYTES.encode(one), BYTES.eos_id] for one in kept]


def training_pairs(batches, name):
    """(input, target) of every training document of a source, sorted."""
    return sorted(pair for ids in training_ids(batches, name) for pair in itertools.pairwise(ids))


def epochs_of(batches, wanted):
    """Reads batches of one row to the end of so many epochs of every source: name -> epoch -> batches."""
    found = {name: collections.defaultdict(list) for name in batches.schedule.names}
    before = dict.fromkeys(batches.schedule.names, windows.BEGINNING)
    for batch, state in itertools.islice(batches.read(), 3000):
        (name,) = (name for name in before if state["sources"][name] != before[name])
        before = state["sources"]
        # A state after the last row of an epoch still names it.
        found[name][before[name]["epoch"]].append(batch)
        if all(source["epoch"] >= wanted for source in before.values()):
            return found
    pytest.fail(f"3,000 rows were not {wanted} epochs of every source")


@pytest.mark.parametrize("kinds", [*zip(KINDS), ("jsonl", "text"), ("parquet", "jsonl", "arrow")], ids="+".join)
def test_every_target_exactly_once_per_epoch(make_stream, kinds):
    batches = make_stream(*kinds, batch_size=1)
    for name, epochs in epochs_of(batches, 2).items():
        expected = training_pairs(batches, name)
        assert len(expected) > 500
        assert len(epochs[0]) > 2 * windows.WINDOW_ROWS
        lengths = [len(ids) for ids in training_ids(batches, name)]
        assert windows.epoch_size(np.array(lengths), T) == (len(epochs[0]), len(expected))
        for epoch in (0, 1):
            assert sorted(pair for batch in epochs[epoch] for pair in pairs(batch)) == expected
        first, second = ([batch["tokens_BT"].tolist() for batch in epochs[epoch]] for epoch in (0, 1))
        assert first != second
        assert sorted(first) == sorted(second)


def test_rows_are_shuffled_within_windows_by_the_seed(make_stream):
    def order(seed):
        return [
            tuple(batch["documents"][0])
            for batch in epochs_of(make_stream("jsonl", batch_size=1, seed=seed), 1)["jsonl"][0]
        ]

    one, other = order(0), order(1)
    assert one != other
    assert sorted(one) == sorted(other)
    assert one != sorted(one)


def test_the_schedule_decides_the_sources(make_stream):
    batches = make_stream("jsonl", "text")
    counts = collections.Counter()
    for batch, state in itertools.islice(batches.read(), 60):
        for row in batch["documents"]:
            counts["text" if ".txt" in row[0] else "jsonl"] += 1
        assert [counts["jsonl"], counts["text"]] == batches.schedule.rows(state["row"])


@pytest.mark.parametrize("kinds", [("jsonl",), ("jsonl", "parquet")], ids="+".join)
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_readers_together_read_the_batch(make_stream, kinds, readers):
    share, batches = B // readers, make_stream(*kinds)
    streams = [batches.read(None, r * share, (r + 1) * share) for r in range(readers)]
    for batch, state in itertools.islice(batches.read(), 40):
        parts = [next(one) for one in streams]
        joined = {field: np.concatenate([part[field] for part, _ in parts]) for field in FIELDS}
        joined["documents"] = [ids for part, _ in parts for ids in part["documents"]]
        assert_equal(joined, batch)
        assert all(other == state for _, other in parts)


def test_rows_do_not_depend_on_the_batch_size(make_stream):
    ones, fours = (make_stream("jsonl", "text", batch_size=size).read() for size in (1, 4))
    for batch, state in itertools.islice(fours, 30):
        for b in range(4):
            single, after = next(ones)
            for field in FIELDS:
                np.testing.assert_array_equal(batch[field][b], single[field][0])
        assert after == state


@pytest.mark.parametrize("kinds", [*zip(KINDS), ("jsonl", "hub", "text")], ids="+".join)
def test_a_state_goes_on_bit_for_bit_from_every_batch(make_stream, kinds):
    batches = make_stream(*kinds)
    whole = list(itertools.islice(batches.read(), 90 if len(kinds) > 1 else 45))
    assert all(source["epoch"] >= 1 for source in whole[-1][1]["sources"].values())
    for k in range(len(whole) - 3):
        state = json.loads(json.dumps(whole[k][1], sort_keys=True))
        for (batch, after), (want, want_after) in zip(batches.read(state), whole[k + 1 : k + 4]):
            assert_equal(batch, want)
            if "hub" not in kinds:  # an IterableDataset has more than one state for the same place
                assert after == want_after
    state = None
    for want, _ in whole:  # stopped and resumed after every batch
        batch, state = next(batches.read(json.loads(json.dumps(state))))
        assert_equal(batch, want)


def test_a_resume_reads_no_more_than_the_windows_it_is_in(make_stream, monkeypatch):
    batches = make_stream("jsonl")
    states = [state for _, state in itertools.islice(batches.read(), 20)]
    read_again = []

    class Counting(type(BYTES)):
        def encode_many(self, texts):
            read_again.extend(texts)
            return super().encode_many(texts)

    batches._tokenizer = Counting()
    total = len(training_pairs(batches, "jsonl"))
    next(batches.read(states[-1]))
    limit = (windows.WINDOW_ROWS + B) * T + 2 * (windows.CHUNK_CHARACTERS + 200)
    assert 0 < sum(map(len, read_again)) <= limit < total


def test_a_state_is_refused_by_other_sources(make_stream):
    _, state = next(make_stream("jsonl").read())
    with pytest.raises(UserError, match=r"of the sources jsonl; the configuration has text: restore data\.mixture"):
        next(make_stream("text").read(state))


def test_no_training_documents(make_data, tmp_path):
    (tmp_path / "corpus" / "a.txt").write_text("")
    batches = StreamedBatches(make_data(streaming=True), BYTES, batch_size=1, seq_len=T, seed=0)
    with pytest.raises(UserError, match=r"there is no training document; set data\.path"):
        next(batches.read())


# Reading documents


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


def write_bad(folder, bad=(3, 17, 18)):
    """A file of JSON lines of which some, counted from 1, are not JSON."""
    folder.mkdir(exist_ok=True)
    lines = ["{bad" if i in bad else json.dumps({"text": text(i)}) for i in range(1, 41)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return SourceConfig("jsonl", str(folder), "text", "bad", 1.0)


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


# Reading ahead


def test_prefetch_yields_batches_with_the_state_after_each(make_stream):
    batches = make_stream("jsonl", "text")
    whole = list(itertools.islice(batches.read(), 30))
    start = None
    for first, last in ((0, 7), (7, 8), (8, 30)):
        for k, batch, state in prefetch(batches, first, last, 2, state=start):
            assert_equal(batch, whole[k][0])
            assert state == whole[k][1]
        start = json.loads(json.dumps(state))
    (found,) = prefetch(batches, 4, 5, 2, start=1, stop=3, state=whole[3][1])
    np.testing.assert_array_equal(found[1]["tokens_BT"], whole[4][0]["tokens_BT"][1:3])
    assert list(prefetch(batches, 0, 0, 2)) == []


def test_prefetch_wants_the_state_of_its_batch(make_stream):
    batches = make_stream("jsonl")
    with pytest.raises(ValueError, match="batch 3, row 12; no state was given"):
        prefetch(batches, 3, 4, 2)
    _, state = next(batches.read())
    with pytest.raises(ValueError, match="batch 3, row 12; the state given is that of row 4"):
        prefetch(batches, 3, 4, 2, state=state)


def stream_threads():
    return [thread for thread in threading.enumerate() if thread.name == "stream"]


@pytest.mark.parametrize("taken", [0, 1, 20])
def test_closing_stops_the_thread(make_stream, taken):
    iterator = prefetch(make_stream("jsonl"), 0, 10**9, 2)
    for _ in range(taken):
        next(iterator)
    assert len(stream_threads()) == (taken > 0)
    iterator.close()
    assert not stream_threads()


def test_what_goes_wrong_is_raised_at_its_batch(make_data, tmp_path, small):
    data = make_data(path=write_bad(tmp_path / "data", bad=(30,)).path, source="jsonl", streaming=True)
    batches = StreamedBatches(data, BYTES, batch_size=1, seq_len=T, seed=0)
    whole = []
    with pytest.raises(UserError, match=r"a\.jsonl:30"):
        whole.extend(batch for batch, _ in batches.read())
    assert whole
    iterator = prefetch(batches, 0, 10**6, 2)
    for batch in whole:
        assert_equal(next(iterator)[1], batch)
    with pytest.raises(UserError, match=r"a\.jsonl:30"):
        next(iterator)
    assert not stream_threads()


# The corpus


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


def test_the_order_is_frozen_and_differs_by_window_epoch_and_source(make_data, tmp_path, small):
    # A run resumed by a later version must see the same rows. Here every document is a row of its own.
    sources = []
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i:02d}.txt").write_text(f"{name}{i:02d}".ljust(T - 1, "."))
        sources.append(SourceConfig("text", str(tmp_path / name), "text", name, 1.0))
    data = make_data(path="", mixture=tuple(sources), streaming=True, heldout_fraction=1e-9)
    orders = {"a": [], "b": []}
    for batch, _ in itertools.islice(StreamedBatches(data, BYTES, batch_size=1, seq_len=T, seed=0).read(), 160):
        ((document,),) = batch["documents"]
        path = document.removesuffix(".txt").split("/")
        orders[path[-2]].append(int(path[-1]))
    found = [tuple(n - at % 40 for n in order[at : at + 10]) for order in orders.values() for at in range(0, 80, 10)]
    assert all(sorted(order) == list(range(10)) for order in found)
    assert len(set(found)) == len(found)
    assert found[0] == (0, 2, 9, 1, 8, 5, 4, 3, 6, 7)
    assert found[-1] == (3, 1, 4, 8, 6, 7, 9, 5, 2, 0)


def test_indexed_batches_of_a_corpus(make_data, tmp_path):
    paths = [write(tmp_path / name, "jsonl") for name in "ab"]  # the same texts
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
