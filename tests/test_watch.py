"""The verdict, with a dictionary for jax's coordination service and hands for the clock."""

import threading

import pytest

from mixtral_jax import watch


class Store:
    """As much of jax's client as the watch uses."""

    def __init__(self):
        self.held = {}

    def key_value_set(self, key, value, overwrite=False):
        if key in self.held and not overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.held[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.held.items() if key.startswith(prefix)]


@pytest.fixture
def four(monkeypatch):
    """Four watches without their threads, and a clock that is set by hand."""
    store, clock = Store(), [100.0]
    monkeypatch.setattr(watch.distributed, "client", lambda: store)
    monkeypatch.setattr(watch.distributed, "process_count", lambda: 4)
    monkeypatch.setattr(watch.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    found = []
    for i in range(4):
        monkeypatch.setattr(watch.distributed, "process_id", lambda i=i: i)
        found.append(watch.Watch())
    monkeypatch.undo()
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])

    def live(seconds, *who):
        for _ in range(seconds):
            clock[0] += 1
            for i in who:
                store.key_value_set(f"{watch.ALIVE}{i}", str(clock[0]), True)
            found[0]._judge()

    return found, live


def test_the_silent_one_is_named_and_not_who_complains(four):
    watches, live = four
    live(5, 0, 1, 2, 3)
    watches[1].suspect("connection closed by peer")
    live(7, 0, 1, 3)
    assert watches[3].verdict() is None, "not yet"
    live(4, 0, 1, 3)
    assert watches[3].verdict()["process"] == 2
    assert watches[3].verdict()["text"].startswith("process 2 died without a word (")
    assert watches[0].dead == 1
    watches[1].claim(1, "too late", 1)
    assert watches[3].verdict()["process"] == 2, "the first verdict stands"


def test_where_all_are_alive_the_first_to_complain_is_named(four):
    watches, live = four
    watches[3].suspect("reset by peer")
    live(watch.PUZZLED_SECONDS, 0, 1, 2, 3)
    assert watches[0].verdict() is None
    live(3, 0, 1, 2, 3)
    assert watches[0].verdict()["text"] == "process 3 lost its connection to the others: reset by peer"


def test_silence_without_a_complaint_is_told_once_by_all_and_ends_nothing(four, monkeypatch):
    watches, live = four
    said = []
    monkeypatch.setattr(watch, "say", said.append)
    live(3, 0, 1, 2, 3)
    live(watch.QUIET_SECONDS + 3, 0, 1, 2)
    for each in watches * 2:
        each._tell_silence()
    assert len(said) == 3
    assert all(text.startswith("process 3 has given no sign of life for 1") for text in said)
    assert watches[0].verdict() is None


def test_all_stop_after_the_step_behind_the_furthest(four, monkeypatch):
    watches, _ = four
    for each, step in zip(watches, (7, 8, 6, 7), strict=True):
        each.reached(step)
    watches[2].ask_to_stop(15)
    threads = [threading.Thread(target=watches[i]._agree_on_stop, daemon=True) for i in (2, 0, 1, 3)]
    for thread in threads:
        thread.start()
        thread.join(0.05)  # the first waits for the last
    for thread in threads:
        thread.join(10)
    assert [each._stop_at for each in watches] == [9] * 4
    assert [each.number for each in watches] == [15] * 4
    assert not watches[0].reached(8)
    assert watches[0].reached(9)
