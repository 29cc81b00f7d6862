"""Token caches on an object store. A folder stands in for it (tests/bucket.py); other machines are other local folders."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtral_jax.config import RunError, UserError
from mixtral_jax.data import build, cache, remote_cache
from mixtral_jax.data.__main__ import main
from mixtral_jax.data.arguments import DEFAULTS
from mixtral_jax.data.cache import build_cache
from mixtral_jax.data.corpus import stream_corpus
from mixtral_jax.data.index import INDEX
from mixtral_jax.data.tokenizer import load_tokenizer
from tests.bucket import HANG, VARIABLE, Buckets, install

ROOT = Path(__file__).parents[2]
BYTES = load_tokenizer("bytes", "unused")
URL = "gs://bucket/cache"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder of gs://bucket/cache."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "stores"))
    monkeypatch.setattr(Buckets, "opened", [])
    install()
    return tmp_path / "stores" / "bucket" / "cache"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Returns a function that moves to another machine, with nothing on its disk or as it was left."""

    def go(name):
        monkeypatch.setattr(remote_cache, "ROOT", str(tmp_path / name))
        Buckets.opened.clear()
        return tmp_path / name

    go("first")
    return go


@pytest.fixture
def data(make_data, tmp_path, monkeypatch, bucket, machine):
    """A corpus of several shards, to be cached on the store."""
    monkeypatch.setattr(build, "SMALLEST_TASK", 2000)
    for i in range(4):
        lines = [json.dumps({"text": f"document {i} {j} " + "word " * (j % 60)}) for j in range(40)]
        (tmp_path / "corpus" / f"{i}.jsonl").write_text("\n".join(lines))
    return make_data(source="jsonl", cache_dir=URL)


def content(corpus):
    return [(list(split.ids), split.tokens[: len(split.tokens)].tolist()) for split in (corpus.train, corpus.heldout)]


def refuse(*args, **kwargs):
    raise AssertionError("what the store has is tokenised again")


def files(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def test_one_machine_builds_and_the_others_fetch(data, bucket, machine, monkeypatch, tmp_path):
    built = build_cache(data, BYTES)
    want = content(build_cache(data.__class__(**vars(data) | {"cache_dir": str(tmp_path / "local")}), BYTES))
    assert content(built) == want
    (there,) = (bucket / "corpora").iterdir()
    index = json.loads((there / INDEX).read_bytes())["record"]
    assert len(index["shards"]) > 4
    assert set(files(there)) == {INDEX, *index["files"]}, "no locks, no partial files, nothing of the machine's own"
    written = [Path(path).name for mode, path in Buckets.opened if mode == "wb"]
    assert written.count(INDEX) == 1
    assert written[-1] == INDEX, "the index last"

    machine("second")
    monkeypatch.setattr(cache, "build_shards", refuse)
    found = build_cache(data, BYTES)
    bucket.rename(bucket.with_name("away"))
    assert content(found) == want, "mapped from the disk"
    bucket.with_name("away").rename(bucket)
    assert found.key == built.key
    assert not [path for mode, path in Buckets.opened if mode == "wb"]

    Buckets.opened.clear()
    build_cache(data, BYTES)
    assert [Path(path).name for _, path in Buckets.opened] == [INDEX], "a start asks only whether the store is whole"


def begin(tmp_path, hang):
    """A build that stops for ever in the middle of a transfer, and is killed there."""
    flags = [f"--{key}={value}" for key, value in dict(source="jsonl", path=tmp_path / "corpus").items()]
    flags += ["--tokenizer=bytes", f"--cache_dir={URL}", "--heldout_fraction=0.3", "--seq_len=64"]
    script = (
        "from tests import bucket; from mixtral_jax.data import build, remote_cache; from mixtral_jax.data.__main__ import main\n"
        f"bucket.install(); build.SMALLEST_TASK = 2000; remote_cache.ROOT = {remote_cache.ROOT!r}; remote_cache.THREADS = 1\n"
        f"main(['build', *{flags!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, HANG: hang})
    mark, end = tmp_path / "stores" / "hangs", time.monotonic() + 60
    while not mark.exists():
        assert process.poll() is None, "it ended before the transfer"
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    mark.unlink()


def test_a_killed_upload_goes_on(data, bucket, machine, monkeypatch, tmp_path):
    begin(tmp_path, "wb:8")
    (there,) = (bucket / "corpora").iterdir()
    before = {name: path.stat().st_mtime_ns for name, path in files(there).items()}
    assert before
    assert INDEX not in before
    monkeypatch.setattr(cache, "build_shards", refuse)
    want = content(build_cache(data, BYTES))
    after = {name: path.stat().st_mtime_ns for name, path in files(there).items()}
    assert INDEX in after
    kept = [name for name in before if not name.endswith(".json")]
    assert kept
    assert [after[name] for name in kept] == [before[name] for name in kept], "what is there is not sent again"
    machine("second")
    assert content(build_cache(data, BYTES)) == want


def test_a_half_upload_is_not_taken_for_a_whole_one(data, bucket, machine, tmp_path):
    begin(tmp_path, "wb:8")
    machine("second")
    build_cache(data, BYTES)
    assert [path for mode, path in Buckets.opened if mode == "wb"], "it was built there, too, and made whole"


def test_a_killed_download_goes_on(data, bucket, machine, monkeypatch, tmp_path):
    want = content(build_cache(data, BYTES))
    disk = machine("second")
    begin(tmp_path, "rb:9")
    before = {name: path.stat().st_mtime_ns for name, path in files(disk).items() if "corpora" in name}
    assert not [name for name in before if name.endswith(INDEX)]
    monkeypatch.setattr(cache, "build_shards", refuse)
    assert content(build_cache(data, BYTES)) == want
    after = {name: path.stat().st_mtime_ns for name, path in files(disk).items()}
    kept = [name for name in before if not name.endswith((".partial", ".lock"))]
    assert len(kept) >= 3
    assert [after[name] for name in kept] == [before[name] for name in kept]
    assert not [name for name in after if "partial" in name]


def test_what_is_damaged_on_the_store_is_made_again(data, bucket, machine, caplog):
    want = content(build_cache(data, BYTES))
    tokens = sorted((bucket / "corpora").rglob("train.tokens"))[1]
    raw = tokens.read_bytes()
    tokens.write_bytes(bytes(len(raw)))
    machine("second")
    assert content(build_cache(data, BYTES)) == want
    assert "shards/000001/train.tokens is not what cache.json says" in caplog.text
    assert tokens.read_bytes() == raw

    index = next((bucket / "corpora").rglob(INDEX))
    index.write_bytes(index.read_bytes().replace(b'"bytes": ', b'"bytes": 1', 1))
    machine("third")
    assert content(build_cache(data, BYTES)) == want
    assert f"{INDEX} is damaged" in caplog.text
    caplog.clear()
    machine("fourth")
    assert content(build_cache(data, BYTES)) == want
    assert not caplog.records or "damaged" not in caplog.text


def test_damage_on_the_disk_is_fetched_alone(data, bucket, machine, monkeypatch):
    want = content(build_cache(data, BYTES))
    monkeypatch.setattr(cache, "build_shards", refuse)
    next(Path(remote_cache.ROOT).rglob("heldout.tokens")).unlink()
    Buckets.opened.clear()
    assert content(build_cache(data, BYTES)) == want
    assert [Path(path).name for mode, path in Buckets.opened if Path(path).name != INDEX] == ["heldout.tokens"]


def test_a_store_that_cannot_be_reached_is_named(data, bucket, machine, monkeypatch, make_data):
    disk = machine("second")
    monkeypatch.setattr(Buckets, "error", PermissionError("no such credentials"))
    with pytest.raises(
        UserError, match=rf"{URL}/corpora/\w+ cannot be read: no such credentials; what is here is in {disk}"
    ):
        build_cache(data, BYTES)
    monkeypatch.setattr(Buckets, "error", None)
    open_ = Buckets._open

    def read_only(self, path, mode="rb", *rest, **options):
        if mode == "wb":
            raise PermissionError("read only")
        return open_(self, path, mode, *rest, **options)

    monkeypatch.setattr(Buckets, "_open", read_only)
    with pytest.raises(RunError, match=rf"{URL}/corpora/\w+ cannot be written: read only; all of it is in {disk}"):
        build_cache(data, BYTES)
    with pytest.raises(UserError, match=r"xy://bucket/cache/corpora/\w+ .*unknown kind of store; known are gs://"):
        build_cache(make_data(source="jsonl", path=data.path, cache_dir="xy://bucket/cache"), BYTES)


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(data, bucket, machine, monkeypatch):
    build_cache(data, BYTES)
    disk = machine("second")
    usage = shutil.disk_usage(disk.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        UserError, match=rf"no room in {disk}.* for {URL}/corpora.*to be fetched and 0 MB are left.*a link"
    ):
        build_cache(data, BYTES)
    assert {Path(path).name for _, path in Buckets.opened} == {INDEX}


def test_heldout_documents_of_streams_and_tokenizers_are_there_too(data, bucket, machine, monkeypatch):
    streamed = data.__class__(**vars(data) | {"streaming": True})
    want = stream_corpus(streamed, BYTES)
    built = remote_cache.place(URL, "tokenizers", "one")

    def read(folder):
        return (folder / "model").read_text()

    assert remote_cache.build_once(built, read, lambda folder: (folder / "model").write_text("a model")) == "a model"
    machine("second")
    monkeypatch.setattr("mixtral_jax.data.corpus._heldout", refuse)
    found = stream_corpus(streamed, BYTES)
    assert found.heldout.tokens[:].tolist() == want.heldout.tokens[:].tolist()
    assert remote_cache.build_once(remote_cache.place(URL, "tokenizers", "one"), read, refuse) == "a model"


def test_the_build_command_sends(data, bucket, machine, capsys, monkeypatch):
    given = {key: getattr(data, key) for key in DEFAULTS}
    assert main(["build", *(f"--{key}={value}" for key, value in given.items())]) == 0
    assert len(list(bucket.rglob(INDEX))) == 1
    monkeypatch.setattr(Buckets, "error", ConnectionError("the network is down"))
    machine("second")
    assert main(["build", *(f"--{key}={value}" for key, value in given.items())]) == 2
    err = capsys.readouterr().err
    assert "error: data.cache_dir: gs://bucket/cache/" in err
    assert "the network is down" in err
