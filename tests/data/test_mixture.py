"""Mixtures: the schedule keeps its counts in every prefix, and every source goes through whole epochs of its own."""

import collections
import itertools

import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data.cache import TokenFile
from mixtral_jax.data.loader import Batches
from mixtral_jax.data.mixture import PERIOD, Mixture, Schedule
from mixtral_jax.data.packing import pack
from tests.data.test_loader import FIELDS, assert_equal, expected_pairs, pairs

T, B = 16, 4
WEIGHTS = {
    "even": [1.0, 1.0],
    "three to one": [3.0, 1.0],
    "percents": [70.0, 20.0, 10.0],
    "odd": [0.61803, 0.2, 0.1, 0.05, 0.03],
    "one rare": [1.0, 0.001],
    "many": [1.0 / (i + 1) for i in range(12)],
    "one": [0.3],
}


def token_file(n_documents, first, name):
    """Documents of random lengths whose inner tokens occur nowhere else, from `first` on."""
    lengths = np.random.default_rng(first).integers(2, 60, n_documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(first, first + offsets[-1]).astype(np.int32)
    return TokenFile(tokens, offsets, lengths, [f"{name}{i}" for i in range(n_documents)])


FILES = [token_file(30, 0, "a"), token_file(17, 100_000, "b"), token_file(50, 200_000, "c")]


def make(weights=(5, 2, 3), files=FILES, batch_size=B, seed=0):
    parts = [
        Batches(file, pack(file.lengths, T), batch_size=batch_size, seq_len=T, seed=seed, source=s)
        for s, file in enumerate(files)
    ]
    return Mixture(parts, Schedule("abc"[: len(files)], weights), batch_size=batch_size)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_every_prefix_has_its_shares(weights):
    schedule = Schedule([str(s) for s in range(len(weights))], weights)
    shares = np.array(weights) / sum(weights)
    assert np.abs(schedule.counts / schedule.period - shares).max() <= 1 / PERIOD
    counts = np.zeros(len(weights), int)
    for i in range(2 * schedule.period + 10):
        source, n = schedule.place(i)
        assert n == counts[source]  # rank and count agree, also beyond the first period
        counts[source] += 1
        assert np.abs(counts - (i + 1) * schedule.counts / schedule.period).max() < 1
        if i % 97 == 0:
            assert schedule.rows(i + 1) == counts.tolist()


def test_the_schedule_is_frozen():
    # A run resumed by a later version must see the same rows.
    schedule = Schedule("abc", [5, 2, 3])
    assert "".join("abc"[schedule.place(i)[0]] for i in range(20)) == "acabacabcaacabacabca"
    assert Schedule("ab", [0.25, 0.75]).period == 4


def test_places_are_found_without_what_came_before():
    schedule = Schedule("ab", [0.3, 0.7])
    for i in range(10):
        source, n = schedule.place(i)
        assert schedule.place(10**15 + i) == (source, 10**14 * (3, 7)[source] + n)
    assert schedule.rows(10**15) == [3 * 10**14, 7 * 10**14]


def test_a_weight_too_small_to_keep():
    with pytest.raises(UserError, match=r"data\.mixture: b has the weight 1e-05 of 1.*raise it, or leave"):
        Schedule("ab", [1.0, 1e-5])


def test_one_source_gives_the_batches_of_one_source():
    alone = Batches(FILES[0], pack(FILES[0].lengths, T), batch_size=B, seq_len=T, seed=7)
    mixture = make([0.3], FILES[:1], seed=7)
    for k in range(3 * alone.n_rows // B):
        assert_equal(mixture.batch(k), alone.batch(k))


def source_of(row_documents):
    (source,) = {document[0] for document in row_documents}
    return source


def test_every_source_goes_through_whole_epochs_of_its_own():
    mixture = make(batch_size=1)
    sizes = {name: pack(file.lengths, T).n_rows for name, file in zip("abc", FILES)}
    assert mixture.n_rows == sum(sizes.values())
    rows = collections.defaultdict(list)
    for k in range(12 * max(sizes.values())):
        batch = mixture.batch(k)
        rows[source_of(batch["documents"][0])].append(batch)
    for name, file in zip("abc", FILES):
        n = sizes[name]
        epochs = [rows[name][e * n : (e + 1) * n] for e in range(len(rows[name]) // n)]
        assert len(epochs) >= 2
        for epoch in epochs:
            assert sorted(pair for batch in epoch for pair in pairs(batch)) == expected_pairs(file)
        first, second = ([batch["tokens_BT"].tolist() for batch in epoch] for epoch in epochs[:2])
        assert first != second


def test_sources_have_orders_of_their_own():
    same = [FILES[0], TokenFile(FILES[0].tokens, FILES[0].offsets, FILES[0].bytes_, [f"b{i}" for i in range(30)])]
    mixture, orders = make([1, 1], same, batch_size=1), {"a": [], "b": []}
    for k in range(40):
        (row,) = mixture.batch(k)["documents"]
        orders[source_of(row)].append([document[1:] for document in row])
    assert len(orders["a"]) == len(orders["b"]) == 20
    assert orders["a"] != orders["b"]


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_readers_together_read_the_batch(readers):
    share = B // readers
    for k in (0, 5, 1000):
        parts = [make().rows(k, r * share, (r + 1) * share) for r in range(readers)]
        joined = {field: np.concatenate([part[field] for part in parts]) for field in FIELDS}
        joined["documents"] = [ids for part in parts for ids in part["documents"]]
        assert_equal(joined, make().batch(k))


def test_rows_do_not_depend_on_the_batch_size():
    one, four = make(batch_size=1), make(batch_size=4)
    for k in range(20):
        singles = [one.batch(4 * k + j) for j in range(4)]
        for field in FIELDS:
            np.testing.assert_array_equal(four.batch(k)[field], np.concatenate([single[field] for single in singles]))


def test_usage_is_what_the_batches_hold():
    mixture = make()
    steps = 100
    rows, tokens = collections.Counter(), collections.Counter()
    for k, b in itertools.product(range(steps), range(B)):
        batch = mixture.rows(k, b, b + 1)
        source = source_of(batch["documents"][0])
        rows[source] += 1
        tokens[source] += int(batch["loss_weights_BT"].sum())
    for (name, n_rows, n_tokens, epochs), file in zip(mixture.usage(steps), FILES):
        plan = pack(file.lengths, T)
        assert n_rows == rows[name]
        assert epochs == n_rows / plan.n_rows
        assert n_tokens == pytest.approx(tokens[name], rel=0.03)  # the last epoch is not whole
    whole = make([1.0], FILES[:1], batch_size=1)
    assert whole.usage(2 * whole.n_rows)[0].tokens == 2 * len(expected_pairs(FILES[0]))
    assert whole.usage(2 * whole.n_rows)[0].epochs == 2


def test_wrong_rows():
    for arguments in ((-1, 0, 1), (0, -1, 1), (0, 0, B + 1), (0, 3, 2)):
        with pytest.raises(IndexError, match="of batches with 4 rows"):
            make().rows(*arguments)
