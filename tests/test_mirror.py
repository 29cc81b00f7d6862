"""Workdirs on object stores. There is none here: a folder stands in for the bucket, and a file system in memory for its paths.

What Orbax and tensorstore do on gs:// is not tested.
"""

import os
from pathlib import Path

import pytest

from mixtral_jax import mirror, remote
from mixtral_jax.checkpoint import steps_in
from mixtral_jax.config import RunError, UserError
from mixtral_jax.data import remote_cache
from tests.bucket import VARIABLE, install
from tests.processes import logged


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that is taken for an object store: nothing in it is locked, appended to or renamed by us."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    monkeypatch.setattr(remote, "MARK", str(folder))
    monkeypatch.setattr(mirror, "ROOT", str(tmp_path / "local"))
    return folder


def test_paths_of_object_stores_are_told_from_folders():
    assert mirror.is_remote("gs://bucket/run")
    assert mirror.is_remote("s3://bucket/run")
    assert not mirror.is_remote("runs/tiny")
    assert not mirror.is_remote(Path("/nfs/runs/tiny"))
    assert mirror.local_side("runs/tiny") == Path("runs/tiny")
    here, there = mirror.local_side("gs://one/run"), mirror.local_side("gs://two/run/")
    assert here != there
    assert here == mirror.local_side("gs://one/run/")


def test_what_changed_is_copied_up_and_comes_back(tmp_path):
    local, remote, copied = tmp_path / "local", tmp_path / "remote", {}
    for name in ("metrics.jsonl", "tokenizer/tokenizer.json", "tensorboard/events.1", "lock", "other/thing"):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_text(name)
    mirror.push(local, remote, copied)
    assert sorted(copied) == ["metrics.jsonl", "tensorboard/events.1", "tokenizer/tokenizer.json"]
    before = os.stat(remote / "tokenizer/tokenizer.json").st_mtime_ns
    with open(local / "metrics.jsonl", "a") as file:
        file.write(" and more")
    mirror.push(local, remote, copied)
    assert (remote / "metrics.jsonl").read_text() == "metrics.jsonl and more"
    assert os.stat(remote / "tokenizer/tokenizer.json").st_mtime_ns == before, "what is unchanged is not copied"

    (local / "report.png").write_text("of a run that was never copied up")
    mirror.pull(remote, local)
    assert not (local / "report.png").exists()
    assert (local / "metrics.jsonl").read_text() == "metrics.jsonl and more"


def test_a_store_that_does_not_answer_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run/metrics\.jsonl cannot be written"):
        mirror.push(tmp_path, tmp_path / "file" / "run", {})
    with pytest.raises(UserError, match=r"--workdir=gs://none/run cannot be read"):
        mirror.pull("gs://none/run", tmp_path / "local")  # no library for it is installed here


def test_a_run_in_a_bucket_goes_on_from_it_on_another_host(fit, bucket, tmp_path):
    """The local side is lost in between. Nothing but whole files and checkpoints is in the bucket."""
    name = bucket / "run"
    fit(name, train__checkpoints_to_keep=1)
    there = {path.name for path in name.iterdir()}
    assert there == {"checkpoints", "config.json", "metrics.jsonl", "report.png", "tensorboard", "tokenizer"}
    assert steps_in(name / "checkpoints") == [4]
    assert [line["step"] for line in logged(name)] == [1, 2, 3, 4]
    before = logged(name)
    (tmp_path / "local").rename(tmp_path / "lost")
    fit(name, train__steps=5)
    assert logged(name)[:4] == before
    assert [line["step"] for line in logged(name)] == [1, 2, 3, 4, 5]
    assert len(logged(name, "session")) == 2


@pytest.mark.slow
def test_a_checkpoint_without_its_mark_is_none(fit, bucket):
    name = bucket / "run"
    fit(name, train__checkpoints_to_keep=2)
    (name / "checkpoints" / "4" / "commit_success.txt").unlink()
    assert steps_in(name / "checkpoints") == [2]
    fit(name)
    assert steps_in(name / "checkpoints") == [2, 4], "made again, after what was left of it was cleared away"


@pytest.mark.slow
def test_a_run_keeps_its_token_cache_in_a_bucket(fit, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "stores"))
    install()
    monkeypatch.setattr(remote_cache, "ROOT", str(tmp_path / "disk"))
    fit("run", data__cache_dir="gs://bucket/cache", train__steps=1, train__checkpoint_every=1)
    for folder in (tmp_path / "stores" / "bucket" / "cache", *(tmp_path / "disk").iterdir()):
        assert len(list(folder.glob("corpora/*/cache.json"))) == 1
