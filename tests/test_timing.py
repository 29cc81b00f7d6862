"""The breakdown adds up to the wall time, and goodput counts only what was trained and stayed."""

import contextlib

import pytest

from mixtral_jax.jsonl import JsonlWriter, first_start
from mixtral_jax.timing import CATEGORIES, Breakdown, Goodput, data_wait_share, per_step


class Clock:
    """A clock that only moves when told to."""

    def __init__(self, now: float = 100.0):
        self.now = now

    def __call__(self):
        return self.now


def test_seconds_by_category_and_other_sum_to_the_wall_time():
    clock = Clock()
    breakdown = Breakdown(clock)
    clock.now += 1
    for _ in range(3):
        with breakdown.measure("data_wait"):
            clock.now += 2
        with breakdown.measure("step"):
            clock.now += 10
    with breakdown.measure("checkpoint"):
        clock.now += 4
    clock.now += 0.5
    taken = breakdown.take()
    assert taken == dict.fromkeys(CATEGORIES, 0) | {"data_wait": 6, "step": 30, "checkpoint": 4, "other": 1.5}
    assert sum(taken.values()) == clock.now - 100
    clock.now += 7
    assert breakdown.take() == dict.fromkeys(CATEGORIES, 0) | {"other": 7}, "it starts from zero"


def test_nested_and_open_measurements_count_every_moment_once():
    clock = Clock()
    breakdown = Breakdown(clock)
    with breakdown.measure("eval"):
        clock.now += 1
        with breakdown.measure("compile"):
            clock.now += 20
        clock.now += 2
        taken = breakdown.take()
        assert (taken["eval"], taken["compile"], sum(taken.values())) == (3, 20, 23)
        clock.now += 4
    clock.now += 8
    taken = breakdown.take()
    assert (taken["eval"], taken["other"], sum(taken.values())) == (4, 8, 12)


def test_a_failure_inside_is_counted_and_a_wrong_name_is_refused():
    clock = Clock()
    breakdown = Breakdown(clock)
    with contextlib.suppress(KeyError), breakdown.measure("step"):
        clock.now += 3
        raise KeyError
    clock.now += 1
    taken = breakdown.take()
    assert (taken["step"], taken["other"]) == (3, 1)
    with pytest.raises(ValueError, match="no category 'datawait'; there are data_wait"), breakdown.measure("datawait"):
        pass


def test_train_lines_hold_averages_per_step():
    line = per_step({"data_wait": 6.0, "step": 30.0, "other": 1.5}, steps=3)
    assert line == {"data_wait_seconds": 2, "step_seconds": 10, "other_seconds": 0.5}
    assert data_wait_share(line) == pytest.approx(2 / 12)
    assert data_wait_share({}) is None
    assert data_wait_share({"data_wait_seconds": 0.0, "step_seconds": 0.0}) is None


def test_goodput_over_a_crash_by_hand(tmp_path):
    """100 s of start-up, 300 s of steps of which 100 are saved, a crash, 500 s of downtime, and the rest again."""
    path = tmp_path / "metrics.jsonl"
    assert first_start(path) is None
    with JsonlWriter(path, resume_step=-1) as writer:
        writer.write("session", 0, {})
    begin = first_start(path)
    goodput = Goodput(begin)
    assert goodput.value(begin) == 0
    goodput.add(100)
    saved = goodput.productive_seconds
    goodput.add(200)
    assert goodput.value(begin + 400) == pytest.approx(300 / 400)
    # The new process knows the checkpoint and the first session line only.
    with JsonlWriter(path, resume_step=10) as writer:
        writer.write("session", 10, {})
    again = Goodput(first_start(path), saved)
    again.add(200)
    assert again.value(begin + 400 + 500 + 200) == pytest.approx(300 / 1100)


def test_goodput_never_leaves_its_range():
    goodput = Goodput(1000.0)
    assert goodput.value(900.0) == 0
    goodput.add(50)
    assert goodput.value(1010.0) == 1, "the clock was set back"
