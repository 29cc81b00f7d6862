"""Batches: right targets, pure in k, the same for any number of processes, every row once per epoch."""

import threading

import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data.cache import TokenFile
from mixtral_jax.data.loader import Batches
from mixtral_jax.data.packing import pack
from mixtral_jax.data.prefetch import prefetch
from mixtral_jax.data.tokens import ShardedTokens

BOS, EOS, T, B = 1, 2, 16, 4
FIELDS = ("tokens_BT", "targets_BT", "loss_weights_BT", "positions_BT", "segment_ids_BT")


def token_file(lengths):
    """Documents whose inner tokens are all different, so that a token tells where it comes from."""
    lengths = np.array(lengths, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(10, 10 + offsets[-1]).astype(np.uint16)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = BOS, EOS
    return TokenFile(tokens, offsets, lengths, [f"doc{i}" for i in range(len(lengths))])


def make(file=None, *, seed=0, shuffle=True, batch_size=B, one_per_row=False):
    file = file or token_file(np.random.default_rng(0).integers(2, 60, 40))
    plan = pack(file.lengths, T, one_per_row=one_per_row)
    return Batches(file, plan, batch_size=batch_size, seq_len=T, seed=seed, shuffle=shuffle)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert one["documents"] == other["documents"]
    for field in FIELDS:
        np.testing.assert_array_equal(one[field], other[field])


def pairs(batch):
    """(input, target) of every trained position, sorted."""
    trained = batch["loss_weights_BT"] > 0
    return sorted(zip(batch["tokens_BT"][trained].tolist(), batch["targets_BT"][trained].tolist()))


def expected_pairs(file):
    inside = (slice(a, b) for a, b in zip(file.offsets, file.offsets[1:]))
    return sorted(pair for s in inside for pair in zip(file.tokens[s][:-1].tolist(), file.tokens[s][1:].tolist()))


def test_by_hand():
    file = token_file([4, 3])
    batch = make(file, batch_size=1, shuffle=False).batch(0)
    zeros = [0] * (T - 5)
    assert batch["tokens_BT"].tolist() == [[BOS, 11, 12, BOS, 15, *zeros]]
    assert batch["targets_BT"].tolist() == [[11, 12, EOS, 15, EOS, *zeros]]
    assert batch["positions_BT"].tolist() == [[0, 1, 2, 0, 1, *zeros]]
    assert batch["segment_ids_BT"].tolist() == [[1, 1, 1, 2, 2, *zeros]]
    assert batch["loss_weights_BT"].tolist() == [[1.0] * 5 + zeros]
    assert batch["documents"] == [["doc0", "doc1"]]
    assert [batch[field].dtype for field in FIELDS] == [np.int32, np.int32, np.float32, np.int32, np.int32]


@pytest.mark.parametrize("one_per_row", [False, True])
def test_every_target_exactly_once_per_epoch(one_per_row):
    file = token_file(np.random.default_rng(0).integers(2, 60, 40))
    batches = make(file, batch_size=1, one_per_row=one_per_row)
    for epoch in range(2):
        found = [pair for k in range(batches.n_rows) for pair in pairs(batches.batch(epoch * batches.n_rows + k))]
        assert sorted(found) == expected_pairs(file)


def test_segments_are_runs_of_one_document():
    file = token_file(np.random.default_rng(0).integers(2, 60, 40))
    batches = make(file, batch_size=1)
    for k in range(batches.n_rows):
        batch = {field: batches.batch(k)[field][0] for field in FIELDS}
        for segment, document in enumerate(batches.batch(k)["documents"][0], 1):
            inside = batch["segment_ids_BT"] == segment
            index = int(document.removeprefix("doc"))
            whole = file.tokens[file.offsets[index] : file.offsets[index + 1]].tolist()
            inputs, targets = batch["tokens_BT"][inside].tolist(), batch["targets_BT"][inside].tolist()
            start = whole.index(inputs[0])
            assert inputs == whole[start : start + len(inputs)]
            assert targets == whole[start + 1 : start + 1 + len(inputs)]
            assert batch["positions_BT"][inside].tolist() == list(range(len(inputs)))


def test_padding_is_zero_in_every_field():
    batch = make(token_file([4, 12, 14]), batch_size=2, shuffle=False).eval_batch(0)
    padding = batch["segment_ids_BT"] == 0
    assert padding.any()
    for field in FIELDS:
        assert not batch[field][padding].any()
    assert (batch["loss_weights_BT"][~padding] == 1).all()


def test_batch_k_is_pure():
    batches = make()
    ks = [0, 1, 7, 50, 1000]
    first = {k: batches.batch(k) for k in ks}
    for k in reversed(ks):
        assert_equal(make().batch(k), first[k])
        assert_equal(batches.batch(k), first[k])


def test_batches_own_their_arrays():
    batches = make()
    changed = batches.batch(3)
    changed["tokens_BT"][:] = -1
    assert (batches.batch(3)["tokens_BT"] >= 0).all()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_of_all_processes_are_the_batch(processes):
    batches, share = make(), B // processes
    for k in (0, 3, 30):
        parts = [make().rows(k, p * share, (p + 1) * share) for p in range(processes)]
        joined = {field: np.concatenate([part[field] for part in parts]) for field in FIELDS}
        joined["documents"] = [ids for part in parts for ids in part["documents"]]
        assert_equal(joined, batches.batch(k))


def rows_in_order(batches, epoch):
    n = batches.n_rows
    return [tuple(batches.batch(i)["tokens_BT"][0].tolist()) for i in range(epoch * n, (epoch + 1) * n)]


def test_shuffle_differs_per_epoch_and_seed_and_covers_all_rows():
    batches = make(batch_size=1)
    plain, first, second = (
        rows_in_order(make(batch_size=1, shuffle=False), 0),
        *(rows_in_order(batches, e) for e in (0, 1)),
    )
    other = rows_in_order(make(batch_size=1, seed=1), 0)
    assert len({tuple(order) for order in (plain, first, second, other)}) == 4
    assert sorted(plain) == sorted(first) == sorted(second) == sorted(other)


def test_batches_run_across_the_end_of_an_epoch():
    one, four = make(batch_size=1), make(batch_size=4)
    assert one.n_rows % 4
    for k in range(one.n_rows):
        singles = np.concatenate([one.batch(4 * k + j)["tokens_BT"] for j in range(4)])
        np.testing.assert_array_equal(four.batch(k)["tokens_BT"], singles)


def test_the_order_is_frozen():
    # A run resumed by a later version must see the same rows: change this only together with the cache's FORMAT.
    batches = make(token_file([T + 1] * 8), batch_size=8)
    orders = [[int(ids[0].removeprefix("doc")) for ids in batches.batch(k)["documents"]] for k in (0, 1)]
    assert orders == [[0, 2, 1, 5, 4, 3, 6, 7], [5, 3, 7, 2, 4, 1, 0, 6]]


def test_the_tokens_may_lie_in_many_pieces():
    file = token_file(np.random.default_rng(0).integers(2, 60, 40))
    pieces = [(file.tokens[a:b], b - a) for a, b in zip([0, 100, 333], [100, 333, len(file.tokens)])]
    sharded = TokenFile(ShardedTokens(pieces, file.tokens.dtype), file.offsets, file.bytes_, file.ids)
    for k in range(5):
        assert_equal(make(sharded).batch(k), make(file).batch(k))


def test_evaluation_yields_every_row_once_and_pads_the_last_batch():
    file = token_file(np.random.default_rng(0).integers(2, 60, 40))
    for shuffle in (True, False):
        batches = make(file, shuffle=shuffle)
        found = list(batches.eval_batches())
        assert len(found) == batches.n_eval_batches == -(-batches.n_rows // B)
        assert batches.n_rows % B  # so the last batch is part empty
        assert all(batch["tokens_BT"].shape == (B, T) for batch in found)
        assert sorted(pair for batch in found for pair in pairs(batch)) == expected_pairs(file)
        empty = B * len(found) - batches.n_rows
        assert not any(found[-1][field][-empty:].any() for field in FIELDS)
        assert found[-1]["documents"][-empty:] == [[]] * empty
    halves = list(zip(batches.eval_batches(0, B // 2), batches.eval_batches(B // 2)))
    for whole, parts in zip(found, halves):
        np.testing.assert_array_equal(whole["targets_BT"], np.concatenate([part["targets_BT"] for part in parts]))


def test_prefetch_yields_the_batches_in_order():
    batches = make()
    found = list(prefetch(batches, 5, 25, 3))
    assert [k for k, _, _ in found] == list(range(5, 25))
    for k, batch, state in found:
        assert_equal(batch, batches.batch(k))
        assert state == {}
    for k, batch, _ in prefetch(batches, 2, 4, 1, 1, 3):
        assert_equal(batch, batches.rows(k, 1, 3))
    assert list(prefetch(batches, 7, 7, 2)) == []


def test_prefetch_raises_what_a_worker_raises_when_it_is_due():
    batches = make()
    rows = batches.rows

    def failing(k, *args):
        if k == 6:
            raise RuntimeError("disk on fire")
        return rows(k, *args)

    batches.rows = failing
    iterator = prefetch(batches, 0, 20, 2)
    assert [next(iterator)[0] for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(iterator)


def test_prefetch_stops_its_threads_when_closed():
    before = threading.active_count()
    iterator = prefetch(make(), 0, 10_000, 2)
    next(iterator)
    iterator.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain"):
            thread.join(timeout=5)
    assert threading.active_count() <= before


def test_wrong_arguments():
    file = token_file([4, 3])
    with pytest.raises(ValueError, match="the plan is for seq_len=16"):
        Batches(file, pack(file.lengths, 16), batch_size=1, seq_len=8, seed=0)
    with pytest.raises(UserError, match="no document has a token to predict"):
        Batches(file, pack(np.array([1, 1]), T), batch_size=1, seq_len=T, seed=0)
    for arguments in ((-1, 0, 1), (0, -1, 1), (0, 0, B + 1), (0, 3, 2)):
        with pytest.raises(IndexError, match="of batches with 4 rows"):
            make().rows(*arguments)
