"""The range of --profile is explained, and a real trace of just these steps is written."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.profile import Profiler, parse_profile


def test_the_range_of_steps():
    assert parse_profile("10:15") == (10, 15)
    assert parse_profile("1:2") == (1, 2)
    assert parse_profile("") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10", "FIRST:STOP"),
        ("a:b", "FIRST:STOP"),
        ("3:", "FIRST:STOP"),
        ("-1:4", "FIRST:STOP"),
        ("1:2:3", "FIRST:STOP"),
        ("²:3", "FIRST:STOP"),
        ("0:4", "steps count from 1"),
        ("7:7", "has no steps: .* write 7:8"),
        ("9:4", "ends before step 4 and starts at 9"),
    ],
)
def test_nonsense_is_explained(text, words):
    with pytest.raises(UserError, match=rf"--profile={text}.*{words}"):
        parse_profile(text)


def recorded(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("steps", "traced"),
    [
        (range(1, 9), [3, 4]),
        (range(4, 9), [4]),  # resumed inside the range
        (range(5, 9), []),  # resumed after it
        (range(1, 4), [3]),  # the run is shorter: close() ends it
    ],
)
def test_just_these_steps_are_traced_and_once(tmp_path, monkeypatch, steps, traced):
    calls, running, said = recorded(monkeypatch), [], []
    profiler = Profiler(tmp_path, 3, 5)
    for k in steps:
        said.append(profiler.step(k))
        if calls and calls[-1] == "start":
            running.append(k)
    said += [profiler.close(), profiler.close()]
    if traced:
        said.append(profiler.step(3))  # never again
    assert running == traced
    assert calls == (["start", "stop"] if traced else [])
    assert len([text for text in said if text]) == bool(traced)
    assert (tmp_path / "profile").exists() == bool(traced)


@pytest.mark.parametrize("what", ["start_trace", "stop_trace"])
def test_a_profile_that_fails_is_said_and_the_run_goes_on(tmp_path, monkeypatch, what):
    recorded(monkeypatch)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax.profiler, what, fail)
    profiler = Profiler(tmp_path, 1, 2)
    said = [profiler.step(1), profiler.step(2), profiler.step(3), profiler.close()]
    assert [text for text in said if text] == ["no profile: [Errno 28] No space left on device"]


def test_a_real_trace(tmp_path):
    profiler = Profiler(tmp_path, 2, 3)
    traced_step = jax.jit(lambda x: jnp.sin(x @ x))
    other_step = jax.jit(lambda x: jnp.cos(x @ x))
    x = jnp.ones((64, 64))
    for k in (1, 2, 3):
        text = profiler.step(k, x)
        with jax.profiler.StepTraceAnnotation("train", step_num=k):
            x = (traced_step if k == 2 else other_step)(x)
    (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    assert str(trace) in text
    assert "ui.perfetto.dev" in text
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("args", {}).get("step_num")}
    assert steps == {"2"}
