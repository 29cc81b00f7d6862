"""The progress bar, its plain lines, and throughput."""

import contextlib
import fcntl
import io
import math
import os
import struct
import termios

import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.progress import Progress, Throughput, duration, status


def test_durations():
    assert [duration(x) for x in (0, 83, 3723.4, math.inf)] == ["0:00", "1:23", "1:02:03", "?"]


class Clock:
    """A clock that only moves when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


SCALARS = {"loss": 3.2104, "tokens_per_second": 41234.0, "mfu": 0.523, "balance_loss": 1.034, "learning_rate": 3e-4}


def test_plain_lines_off_a_terminal():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(600, 100, stream, log_every=10, clock=clock)
    for step in range(101, 121):
        clock.now += 60.0 if step == 101 else 0.5  # the first step compiles
        progress.update(step, SCALARS | {"mfu": np.float32(0.523)})
    progress.note("held-out 3.1")
    progress.update(600, SCALARS | {"loss": None, "token_loss": math.nan, "mfu": 0.0123})
    progress.close()
    progress.close()
    lines = stream.getvalue().split("\n")
    assert lines[1] == "step 120/600 | loss 3.210 | 41.2k tok/s | MFU 52% | balance 1.03 | lr 3e-4 | ETA 4:00"
    assert [line.split("/")[0] for line in lines] == ["step 110", "step 120", "held-out 3.1", "step 600", ""]
    assert "MFU 1.23%" in lines[3]
    assert "\r" not in stream.getvalue()


def test_status_leaves_out_what_is_not_known():
    assert status({}) == ""
    assert status({"token_loss": jnp.float32(2.0), "tokens_per_second": None, "load_LE": [[1]]}) == "loss 2.000"
    assert status({"loss": math.nan}) == "loss nan"


def test_status_speaks_of_data_only_when_it_costs():
    assert status({"loss": 1.0, "data_wait_seconds": 0.05, "step_seconds": 0.95}) == "loss 1.000"
    assert status({"loss": 1.0, "data_wait_seconds": 0.06, "step_seconds": 0.94}) == "loss 1.000 | data wait 6%"


@contextlib.contextmanager
def terminal(columns):
    """A pseudo terminal: yields its stream, and a list that holds all that was written once the block is left."""
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = []
    with os.fdopen(follower, "w") as stream:
        yield stream, written
    chunks = []
    with contextlib.suppress(OSError):  # Linux ends a pseudo terminal's output with an error
        while chunk := os.read(leader, 1 << 16):
            chunks.append(chunk)
    os.close(leader)
    written.append(b"".join(chunks).decode())


def test_bar_on_a_terminal():
    with terminal(130) as (stream, written):
        progress = Progress(20, 10, stream)
        progress.update(11, SCALARS)
        progress.note("held-out 3.1")
        progress.update(20, SCALARS)
        progress.close()
    states = written[0].split("\r")
    assert any("step 10/20 | compiling" in state for state in states)
    assert "held-out 3.1" in states  # alone in its line: the bar was cleared first
    last = next(state for state in reversed(states) if state.strip())
    assert last.startswith("100%")
    assert "step 20/20 | loss 3.210 | 41.2k tok/s" in last


def test_terminal_without_a_width_gets_lines():
    with terminal(0) as (stream, written):
        Progress(20, 0, stream).update(1, SCALARS)
    assert written[0].startswith("step 1/20 | loss 3.210")


def test_throughput_leaves_out_compilation_and_pauses():
    clock = Clock()
    throughput = Throughput(tokens_per_step=100, window=3, clock=clock)
    clock.now += 60  # compilation
    assert throughput.tick() is None
    clock.now += 2
    assert throughput.tick() == 50
    with throughput.pause():
        clock.now += 30
    clock.now += 0.1  # the step went on during the evaluation: this interval says nothing
    assert throughput.tick() == 50
    clock.now += 10
    assert throughput.tick(steps=5) == pytest.approx(600 / 12)
    for _ in range(3):
        clock.now += 1
        throughput.tick()
    assert throughput.tokens_per_second == 100  # the window has forgotten the slow steps


def test_throughput_with_a_pause_in_every_interval():
    clock = Clock()
    throughput = Throughput(tokens_per_step=100, clock=clock)
    throughput.tick()
    for _ in range(2):
        clock.now += 4
        with throughput.pause():
            clock.now += 30
        throughput.tick()
    assert throughput.tokens_per_second == 25


def test_dropped_assignments_are_never_silent():
    assert "DROPPED 12%" in status({"loss": 1.0, "dropped_L": np.array([0.2, 0.04])})
    assert "DROPPED" not in status({"loss": 1.0, "dropped_L": np.zeros(2)})
