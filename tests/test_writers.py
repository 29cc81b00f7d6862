"""Metrics reach metrics.jsonl, TensorBoard and Weights & Biases, each step once, whatever crashes in between."""

import dataclasses
import logging
import math
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixtral_jax import appending, events, writers
from mixtral_jax.config import RunError, UserError
from mixtral_jax.jsonl import read_jsonl
from mixtral_jax.writers import MetricsWriter, tags
from tests.helpers import tiny

CONFIG = tiny()
PROJECT = tiny(train__wandb="mixtral")
TRAIN = {
    "loss": 2.5,
    "tokens_per_second": 1e4,
    "mfu": None,
    "balance_loss": 1.125,
    "step_seconds": 0.5,
    "goodput": 0.75,
    "entropy_L": [1.0, 0.5],
    "load_LE": np.array([[0.25, 0.75], [0.5, 0.5]]),
}


def shown(folder):
    """What TensorBoard's own reader shows: {tag: [(step, value), ...]}, and its histograms and texts."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0}).Reload()
    kinds = found.Tags()
    scalars = {tag: [(x.step, x.value) for x in found.Scalars(tag)] for tag in kinds["scalars"]}
    texts = {
        tag: [(x.step, x.tensor_proto.string_val[0].decode()) for x in found.Tensors(tag)] for tag in kinds["tensors"]
    }
    bars = {tag: [(x.step, x.histogram_value) for x in found.Histograms(tag)] for tag in kinds["histograms"]}
    return scalars, texts, bars


def write_steps(writer, steps, scale=1.0):
    for step in steps:
        writer.write("train", step, TRAIN | {"loss": scale * step})


def test_every_place_gets_every_line(tmp_path):
    with MetricsWriter(tmp_path, CONFIG, None) as writer:
        writer.write("session", 0, {"devices": 8})
        writer.write("train", 1, TRAIN | {"z_loss": math.nan})
        writer.write("heldout", 2, {"loss": 3.0, "bits_per_byte": 1.5})
        writer.write("sample", 2, {"text": "# def f():\n\x1b[2J"})
    assert [line["kind"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [
        "session",
        "train",
        "heldout",
        "sample",
    ]
    scalars, texts, bars = shown(tmp_path / "tensorboard")
    assert scalars == {
        "train/loss": [(1, 2.5)],
        "train/tokens_per_second": [(1, 1e4)],
        "router/balance_loss": [(1, 1.125)],
        "time/step_seconds": [(1, 0.5)],
        "time/goodput": [(1, 0.75)],
        "router_entropy/layer_00": [(1, 1.0)],
        "router_entropy/layer_01": [(1, 0.5)],
        "heldout/loss": [(2, 3.0)],
        "heldout/bits_per_byte": [(2, 1.5)],
    }
    assert texts == {"sample/text": [(2, "    # def f():\n    \\x1b[2J")]}, "as it stands, and nothing a terminal obeys"
    assert bars.keys() == {"router_load/layer_00", "router_load/layer_01"}
    assert bars["router_load/layer_00"][0][1].bucket == [0.25, 0.75]


def test_lists_that_are_not_of_layers_keep_their_kind():
    line = {"kind": "data", "step": 1, "time": 0.0, "shares": [0.5, None, 1.0], "load_LE": [[1.0, None], [0.5, 0.5]]}
    assert tags(line) == {"data_shares/00": 0.5, "data_shares/02": 1.0, "router_load/layer_01": [0.5, 0.5]}


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_event_files_are_records_with_checksums(tmp_path):
    """Against the format's description: viewers drop what has a wrong checksum."""
    with MetricsWriter(tmp_path, CONFIG, None) as writer:
        write_steps(writer, [1, 2])
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, at, count = path.read_bytes(), 0, 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        assert struct.unpack_from("<I", data, at + 8)[0] == masked(data[at : at + 8])
        assert struct.unpack_from("<I", data, at + 12 + length)[0] == masked(data[at + 12 : at + 12 + length])
        at += 16 + length
        count += 1
    assert at == len(data)
    assert count == 4  # version, session, two steps
    assert [event.step for _, event in events.read_events(path)] == [0, 0, 1, 2]


def test_tensorboard_shows_each_step_once_after_crashes_and_resumes(tmp_path):
    write_steps(MetricsWriter(tmp_path, CONFIG, None), range(1, 8))  # killed: nothing is closed
    write_steps(MetricsWriter(tmp_path, CONFIG, 4), range(5, 12), scale=10)
    write_steps(MetricsWriter(tmp_path, CONFIG, 10), range(11, 14), scale=100)
    want = [(k, k * (1.0 if k <= 4 else 10.0 if k <= 10 else 100.0)) for k in range(1, 14)]
    assert shown(tmp_path / "tensorboard")[0]["train/loss"] == want
    assert [(line["step"], line["loss"]) for line in read_jsonl(tmp_path / "metrics.jsonl")] == want
    # The files hold each step once too, so that no viewer has to know the rule of restarts.
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 3
    steps = [[event.step for _, event in events.read_events(path) if event.HasField("summary")] for path in files]
    assert steps == [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10], [11, 12, 13]]
    write_steps(MetricsWriter(tmp_path, CONFIG, 2), [3])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "files that are left empty go"
    MetricsWriter(tmp_path, CONFIG, None).close()
    assert shown(tmp_path / "tensorboard")[0] == {}


def test_an_open_viewer_forgets_the_steps_of_a_crash(tmp_path):
    """It has read the old file before the resume cut it off, and reads on in the new one."""
    write_steps(MetricsWriter(tmp_path, CONFIG, None), range(1, 8))
    viewer = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [x.step for x in viewer.Scalars("train/loss")] == list(range(1, 8))
    write_steps(MetricsWriter(tmp_path, CONFIG, 4), [5, 6], scale=10)
    viewer.Reload()
    assert [x.value for x in viewer.Scalars("train/loss")] == [1, 2, 3, 4, 50, 60]


def test_half_an_event_is_cut_off_and_other_files_are_left_alone(tmp_path):
    write_steps(MetricsWriter(tmp_path, CONFIG, None), [1, 2, 3])
    (path,) = (tmp_path / "tensorboard").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    (tmp_path / "tensorboard" / "notes.txt").write_text("mine")
    write_steps(MetricsWriter(tmp_path, CONFIG, 3), [4])
    assert [x for x, _ in shown(tmp_path / "tensorboard")[0]["train/loss"]] == [1, 2, 4]
    assert [event.step for _, event in events.read_events(path)] == [0, 0, 1, 2]
    assert path.stat().st_size < len(whole) - 5
    assert (tmp_path / "tensorboard" / "notes.txt").read_text() == "mine"


def test_a_full_disk_stops_or_waits(tmp_path, monkeypatch, caplog):
    """Without keep_going write raises; with it both files catch up when there is room again."""
    write, full = appending.os.write, [False]

    def limited(fd, data):
        if full[0]:
            raise OSError(28, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(appending.os, "write", limited)
    writer = MetricsWriter(tmp_path / "stop", CONFIG, None)
    going = MetricsWriter(tmp_path / "go", CONFIG, None, keep_going=True)
    full[0] = True
    with pytest.raises(RunError, match=r"stop/metrics\.jsonl cannot be written: No space left"):
        writer.write("train", 1, TRAIN)
    with pytest.raises(RunError, match="No space left"):
        writer.close()
    write_steps(going, range(1, 5))
    assert len(caplog.records) == 2, "once for each file"
    assert read_jsonl(tmp_path / "go" / "metrics.jsonl") == []
    full[0] = False
    write_steps(going, [5])
    going.close()
    assert [line["step"] for line in read_jsonl(tmp_path / "go" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    times = [line["time"] for line in read_jsonl(tmp_path / "go" / "metrics.jsonl")]
    assert times == sorted(times)
    assert [step for step, _ in shown(tmp_path / "go" / "tensorboard")[0]["train/loss"]] == [1, 2, 3, 4, 5]


def test_events_are_read_up_to_the_first_that_is_not_whole(tmp_path):
    """Wherever a crash cuts the last one."""
    write_steps(MetricsWriter(tmp_path, CONFIG, None), [1, 2])
    (path,) = (tmp_path / "tensorboard").iterdir()
    whole = path.read_bytes()
    *_, (before, _), (end, _) = events.read_events(path)
    assert end == len(whole)
    for cut in range(before, end):
        path.write_bytes(whole[:cut])
        assert [event.step for _, event in events.read_events(path)] == [0, 0, 1], cut


class FakeWandb(SimpleNamespace):
    """Records what is called; its history only grows, as that of the real one."""

    def __init__(self):
        super().__init__(inits=[], history=[], finished=0, broken=False, down=False)

    def init(self, **options):
        if self.down:
            raise ConnectionError("no network")
        self.inits.append(options)
        return self

    def log(self, values, step):
        if self.broken:
            raise ConnectionError("gone")
        assert not self.history or step >= self.history[-1][0], "Weights & Biases drops earlier steps with a warning"
        self.history.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    fake.__spec__ = SimpleNamespace(name="wandb")  # find_spec asks a loaded module for it
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_resumes_its_run_and_counts_no_step_twice(tmp_path, wandb):
    write_steps(MetricsWriter(tmp_path, PROJECT, None), range(1, 8))
    write_steps(MetricsWriter(tmp_path, PROJECT, 4), [5, 6])  # steps 5 to 7 are there already
    with MetricsWriter(tmp_path, PROJECT, 4) as writer:
        write_steps(writer, range(5, 11))
        writer.write("heldout", 10, {"loss": 3.0})
        writer.write("sample", 10, {"text": "hello"})
    assert [step for step, _ in wandb.history] == [*range(1, 11), 10, 10]
    first = wandb.inits[0]
    assert (first["project"], first["resume"], first["name"]) == ("mixtral", "allow", tmp_path.name)
    assert first["config"]["train"]["wandb"] == "mixtral"
    assert len({init["id"] for init in wandb.inits}) == 1
    assert "mode" not in first, "WANDB_MODE decides"
    assert wandb.history[0][1]["train/loss"] == 1.0
    assert not any(isinstance(value, list) for _, values in wandb.history for value in values.values())
    assert wandb.history[-1][1] == {"sample/text": "hello"}
    assert wandb.finished == 1


def test_wandb_that_fails_is_said_once_and_kills_nothing(tmp_path, wandb, caplog):
    caplog.set_level(logging.WARNING)
    with MetricsWriter(tmp_path, PROJECT, None) as writer:
        write_steps(writer, [1])
        wandb.broken = True
        write_steps(writer, [2, 3])
    assert ["gone" in record.getMessage() for record in caplog.records] == [True]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3
    wandb.down = True
    with MetricsWriter(tmp_path, PROJECT, 3) as writer:
        write_steps(writer, [4])
    assert "no network; training goes on" in caplog.records[-1].getMessage()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 4


def test_wandb_that_is_missing_or_cannot_start_is_the_users_to_know(tmp_path, wandb, monkeypatch):
    wandb.down = True
    with pytest.raises(UserError, match="no network; run `wandb login`, or set WANDB_MODE=offline"):
        MetricsWriter(tmp_path / "new", PROJECT, None)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.wandb='mixtral' needs the wandb package: pip install wandb"):
        MetricsWriter(tmp_path / "none", PROJECT, None)
    assert not (tmp_path / "none").exists(), "nothing is made before"
    writers.require_wandb(dataclasses.replace(PROJECT, train=CONFIG.train))
