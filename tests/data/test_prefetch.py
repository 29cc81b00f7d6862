"""Reading streams ahead: the state after every batch, errors at their place, and threads that stop."""

import itertools
import json
import threading

import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data.prefetch import prefetch
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.data.windows import StreamedBatches
from tests.data.conftest import ROW, write_bad
from tests.data.test_loader import assert_equal

BYTES = load_tokenizer("bytes", "unused")
T, B = ROW, 4


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
