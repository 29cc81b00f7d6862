"""The packing plan: every position once, nothing across documents, little padding, and fast."""

import time

import numpy as np
import pytest

from mixtral_jax.data.cache import build_cache
from mixtral_jax.data.packing import pack
from mixtral_jax.data.windows import WINDOW_ROWS, epoch_size

LENGTHS = {
    "mixed": np.random.default_rng(0).integers(0, 400, 300),
    "short": np.random.default_rng(1).integers(2, 10, 500),
    "long": np.array([5000, 64, 65, 66, 2]),
    "edges": np.array([0, 1, 2, 64, 65, 66, 129, 130]),
    "equal": np.full(77, 33),
    "one": np.array([2]),
    "nothing": np.array([1, 0, 1]),
    "no documents": np.array([], np.int64),
}


@pytest.mark.parametrize("one_per_row", [False, True])
@pytest.mark.parametrize("kind", LENGTHS)
def test_every_position_of_every_document_exactly_once(kind, one_per_row):
    lengths = LENGTHS[kind]
    plan = pack(lengths, 64, one_per_row=one_per_row)
    counts = [np.zeros(max(n - 1, 0), np.int64) for n in lengths]
    for document, start, length in zip(plan.span_document, plan.span_start, plan.span_length):
        assert length >= 1
        assert start + length <= len(counts[document])
        counts[document][start : start + length] += 1
    assert all((count == 1).all() for count in counts)


@pytest.mark.parametrize("one_per_row", [False, True])
@pytest.mark.parametrize("kind", LENGTHS)
def test_rows_partition_the_spans_and_fit(kind, one_per_row):
    plan = pack(LENGTHS[kind], 64, one_per_row=one_per_row)
    assert plan.row_offsets[0] == 0
    assert plan.row_offsets[-1] == len(plan.span_length)
    assert (np.diff(plan.row_offsets) > 0).all()
    used = [plan.span_length[a:b].sum() for a, b in zip(plan.row_offsets, plan.row_offsets[1:])]
    assert all(0 < n <= 64 for n in used)
    assert plan.waste == pytest.approx(1 - sum(used) / max(1, 64 * plan.n_rows))
    if one_per_row:
        assert (np.diff(plan.row_offsets) == 1).all()


def test_rows_come_in_the_order_of_their_first_documents():
    plan = pack(LENGTHS["mixed"], 64)
    firsts = plan.span_document[plan.row_offsets[:-1]]
    assert (np.diff(firsts) >= 0).all()
    for a, b in zip(plan.row_offsets, plan.row_offsets[1:]):
        assert (np.diff(plan.span_document[a:b]) > 0).all()


def test_best_fit_decreasing_by_hand():
    # In rows of 10: the 4 fills up a 6, the 3 joins the other 6 (space 4, the 5 leaves 5), the 2 the 5.
    plan = pack(np.array([6, 6, 5, 4, 3, 2]) + 1, 10)
    rows = [plan.span_document[a:b].tolist() for a, b in zip(plan.row_offsets, plan.row_offsets[1:])]
    assert rows == [[0, 4], [1, 3], [2, 5]]


def naive_best_fit_rows(lengths, seq_len):
    space = []
    for length in sorted(lengths, reverse=True):
        fits = [free for free in space if free >= length]
        if fits:
            space.remove(min(fits))
            space.append(min(fits) - length)
        else:
            space.append(seq_len - length)
    return sorted(space)


@pytest.mark.parametrize("seed", range(20))
def test_equals_one_at_a_time_best_fit(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, rng.integers(3, 100), 300)
    plan = pack(lengths + 1, 100)
    used = np.add.reduceat(plan.span_length, plan.row_offsets[:-1])
    assert sorted((100 - used).tolist()) == naive_best_fit_rows(lengths.tolist(), 100)


def test_waste_on_the_embedded_corpus(make_data, stdlib_tokenizer, shared_cache_dir):
    corpus = build_cache(
        make_data(source="stdlib", cache_dir=shared_cache_dir, heldout_fraction=0.02), stdlib_tokenizer
    )
    assert pack(corpus.train.lengths, 2048).waste < 0.02
    assert pack(corpus.train.lengths, 2048, one_per_row=True).waste > 0.1
    rows, tokens = epoch_size(corpus.train.lengths, 2048)
    assert rows > 2 * WINDOW_ROWS
    assert 1 - tokens / (rows * 2048) < 0.01  # of a stream


def test_a_million_documents_take_seconds():
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 1_000_000).astype(np.int64) + 2
    start = time.perf_counter()
    plan = pack(lengths, 4096)
    assert time.perf_counter() - start < 20  # measured: about 1 s on one core, so a quadratic plan fails
    assert plan.waste < 0.001


def test_seq_len_must_be_positive():
    with pytest.raises(ValueError, match="seq_len=0"):
        pack(np.array([5]), 0)
