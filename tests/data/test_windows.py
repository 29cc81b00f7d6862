"""Streamed batches: every target once per epoch, the same for any readers, and a state that goes on bit for bit."""

import collections
import itertools
import json

import numpy as np
import pytest

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data import windows
from mixtral_jax.data.text import documents, is_heldout
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.data.windows import StreamedBatches
from tests.data.conftest import KINDS, ROW
from tests.data.test_loader import FIELDS, assert_equal, pairs

BYTES = load_tokenizer("bytes", "unused")
T, B = ROW, 4


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
    for k in range(0, len(whole) - 3, len(kinds)):
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
