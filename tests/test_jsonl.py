"""metrics.jsonl: what is written is read back, whatever a crash leaves and wherever a run resumes."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax import jsonl
from mixtral_jax.config import RunError
from mixtral_jax.jsonl import JsonlWriter, first_start, read_jsonl


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    values = {
        "loss": jnp.float32(0.1),
        "learning_rate": 1 / 3,
        "tokens": np.int64(7),
        "halted": np.bool_(False),
        "bf16": jnp.bfloat16(1.5),
        "load_LE": jnp.array([[0.25, 0.75]]),
        "text": "a\u2028b\nc é",
        "mfu": None,
        "mixed": [1, 2.0, None],
    }
    with JsonlWriter(path) as writer:
        writer.write("train", 1, values)
        assert len(read_jsonl(path)) == 1  # flushed
        writer.write("sample", 2, {})
    line = read_jsonl(path)[0]
    assert line.pop("time") > 1.7e9
    assert line == values | {"kind": "train", "step": 1, "loss": 0.1, "learning_rate": 0.3333333, "tokens": 7} | {
        "halted": False,
        "bf16": 1.5,
        "load_LE": [[0.25, 0.75]],
    }
    with JsonlWriter(path) as writer, pytest.raises(ValueError, match="kind, step"):
        writer.write("train", 3, {"step": 3, "kind": 1})


def test_jsonl_nonfinite_is_null_and_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        writer.write("train", 1, {"loss": math.nan, "norm": np.float32(np.inf), "load_LE": [[0.5, math.nan]], "z": 1.0})
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["loss"], line["norm"], line["load_LE"], line["z"]) == (None, None, [[0.5, None]], 1.0)
    assert line["nonfinite"] == ["loss", "norm", "load_LE"]


def written(path, steps):
    with JsonlWriter(path) as writer:
        for step in steps:
            writer.write("train", step, {"loss": float(step)})
    return path


def test_jsonl_resume_never_counts_a_step_twice(tmp_path):
    path = written(tmp_path / "metrics.jsonl", range(1, 8))
    with JsonlWriter(path, resume_step=4) as writer:
        assert [line["step"] for line in read_jsonl(path)] == [1, 2, 3, 4]
        writer.write("train", 5, {"loss": 50.0})
    assert [line["loss"] for line in read_jsonl(path)] == [1, 2, 3, 4, 50]
    JsonlWriter(path).close()
    assert len(read_jsonl(path)) == 5
    JsonlWriter(path, resume_step=-1).close()
    assert read_jsonl(path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', b'{"text": "\xc3', b"12", b"{}"])
def test_jsonl_torn_last_line(tmp_path, torn):
    """A crash may leave half a line; it is cut off, and the next line does not stick to it."""
    path = written(tmp_path / "metrics.jsonl", [1, 2])
    with path.open("ab") as file:
        file.write(torn)
    whole = torn == b"{}"  # only its newline is missing
    assert len(read_jsonl(path)) == 2 + whole
    written(path, [3])
    assert [line.get("step") for line in read_jsonl(path)] == [1, 2, *([None] if whole else []), 3]


def test_jsonl_broken_in_the_middle_is_refused(tmp_path):
    path = written(tmp_path / "metrics.jsonl", [1, 2, 3])
    path.write_text(path.read_text().replace('"step": 2', '"step" 2'))
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a JSON object"):
        read_jsonl(path)
    with pytest.raises(ValueError, match="line 2"):
        JsonlWriter(path, resume_step=1)


def test_sessions_outlive_every_resume(tmp_path):
    """They are what goodput and the report's restarts are made from."""
    path = tmp_path / "metrics.jsonl"
    assert first_start(path) is None
    for resume in (-1, 6, 2, -1):
        with JsonlWriter(path, resume_step=resume) as writer:
            writer.write("session", max(resume, 0), {})
            writer.write("train", max(resume, 0) + 1, {"loss": 1.0})
    lines = read_jsonl(path)
    assert [line["step"] for line in lines if line["kind"] == "session"] == [0, 6, 2, 0]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1]
    assert first_start(path) == lines[0]["time"]


def test_a_full_disk_at_a_resume_leaves_the_old_file(tmp_path, monkeypatch):
    path = written(tmp_path / "metrics.jsonl", [1, 2, 3])
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jsonl.os, "fsync", full)
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: No space left"):
        JsonlWriter(path, resume_step=1)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
