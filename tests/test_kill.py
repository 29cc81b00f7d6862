"""40 steps straight are the same 40 steps with 25 kills between, bit for bit: parameters, optimizer state, logged losses."""

import random
import time

import pytest

from tests.processes import Process, assert_same, command, logged, run, steps_logged, stored, wait_for, write_corpus

STEPS, KILLS = 40, 25


def being_saved(workdir):
    return any((workdir / "checkpoints").glob("*tmp*"))


def kill_once(line, workdir, how: str, starts: list[float], rng: random.Random) -> bool:
    """Starts the run and kills it at a random moment of a kind; returns whether a checkpoint was being written then.

    `starts` are the seconds that starts have taken so far, and gets this one's.
    """
    sessions, before = len(logged(workdir, "session")), max(steps_logged(workdir), default=0)
    begin, process = time.monotonic(), Process(line)

    def running():
        # A session's line comes after what the last kill left half-written was removed: what is seen then is this run's.
        return len(logged(workdir, "session")) > sessions

    try:
        if how == "anywhere":
            time.sleep(rng.uniform(0.0, 1.2 * min(starts)))
        else:
            wait_for(running, process)
            starts.append(time.monotonic() - begin)
        if how == "step":
            new = rng.randint(0, 1)
            wait_for(lambda: max(steps_logged(workdir), default=0) > before + new, process)
            time.sleep(rng.uniform(0.0, 0.05))
        elif how == "save":
            wait_for(lambda: being_saved(workdir), process)
            time.sleep(rng.uniform(0.0, 0.02))
        saving = running() and being_saved(workdir)
        assert process.poll() is None, "the run ended before it was killed:\n" + process.output()
        return saving
    finally:
        process.stop()


@pytest.mark.slow
@pytest.mark.parametrize("data", ["embedded", "mixture", "stream"])
def test_twenty_five_kills_change_nothing(tmp_path, data):
    fox, cat = (write_corpus(tmp_path / word, 40, word) for word in ("fox", "cat"))
    changes = {
        "embedded": dict(data__source="stdlib"),
        "mixture": dict(
            data__source="stdlib",
            data__mixture=(
                dict(source="text", path=str(fox), weight=2.0),
                dict(source="text", path=str(cat), weight=1.0),
            ),
        ),
        "stream": dict(data__source="text", data__path=str(fox), data__streaming=True),
    }[data]
    changes |= dict(train__steps=STEPS, train__checkpoint_every=2, data__cache_dir=str(tmp_path / "cache"))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(command(straight, **changes))
    assert steps_logged(straight) == list(range(1, STEPS + 1))

    rng = random.Random(data)
    line = command(killed, **changes)
    hows = ["anywhere"] * 8 + ["step"] * 8 + ["save"] * 8
    rng.shuffle(hows)
    hows.insert(0, "step")  # it tells how long a start takes
    assert len(hows) == KILLS
    starts: list[float] = []
    during_saves = sum(kill_once(line, killed, how, starts, rng) for how in hows)
    assert during_saves >= 3, "some kills must hit a save"
    assert max(steps_logged(killed)) < STEPS, "the run should not have finished before its last kill"
    run(line)

    assert_same(stored(killed, STEPS, **changes), stored(straight, STEPS, **changes))
    assert logged(killed) == logged(straight)
    assert logged(killed, "final") == logged(straight, "final")
