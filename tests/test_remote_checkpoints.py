"""Checkpoints that are read from and imported to object stores.

Two things stand in for a store: a folder behind gs:// (tests/bucket.py) for whatever goes through epath, and a folder that
is taken for a store for Orbax's and tensorstore's arrays, whose own drivers for gs:// are not tested.
"""

import types

import jax
import numpy as np
import pytest

from mixtral_jax import mirror, remote
from mixtral_jax.config import UserError
from mixtral_jax.convert import ours
from mixtral_jax.convert.__main__ import main as convert
from mixtral_jax.convert.foreign import Foreign
from mixtral_jax.data import load_tokenizer
from mixtral_jax.load import load, stored_config, stored_tokenizer
from mixtral_jax.resolve import resolve_checkpoint
from mixtral_jax.resume import _same_tokenizer
from mixtral_jax.sharding import named_leaves
from tests.bucket import VARIABLE, Buckets, install
from tests.golden import reference
from tests.test_load import SHAPE, source, two_steps


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder of this machine for what is fetched."""
    monkeypatch.setattr(mirror, "READ_ROOT", str(tmp_path / "here"))
    return tmp_path / "here"


@pytest.fixture
def stores(tmp_path, monkeypatch, here):
    """The folder of gs://."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "stores"))
    install()
    (tmp_path / "stores" / "bucket").mkdir(parents=True)
    return tmp_path / "stores"


@pytest.fixture
def bucket(tmp_path, monkeypatch, here):
    """A folder that is taken for a store."""
    (tmp_path / "bucket").mkdir()
    monkeypatch.setattr(remote, "MARK", str(tmp_path / "bucket"))
    return tmp_path / "bucket"


def test_the_configuration_and_the_tokenizer_are_fetched(stores, here):
    workdir = two_steps(stores / "bucket" / "run")
    (workdir / "tokenizer").mkdir()
    (workdir / "tokenizer" / "tokenizer.json").write_text('{"type": "bytes"}')
    for spec, step in (("gs://bucket/run", 10), ("gs://bucket/run/", 10), ("gs://bucket/run/checkpoints/2", 2)):
        found = resolve_checkpoint(spec)
        assert str(found) == f"gs://bucket/run, step {step}"
        assert here in found.local.parents
        assert stored_config(found).model.d_ff == SHAPE["d_ff"]
        assert stored_tokenizer(found).vocab_size == 258
    assert resolve_checkpoint("gs://bucket/run", 2).step == 2
    assert sorted(path.name for path in found.local.iterdir()) == ["config.json", "tokenizer"]

    (workdir / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"gs://bucket/run, step 10 has no tokenizer/"):
        stored_tokenizer(resolve_checkpoint("gs://bucket/run"))
    (workdir / "checkpoints" / "10" / "commit_success.txt").unlink()
    assert resolve_checkpoint("gs://bucket/run").step == 2, "10 is not whole"


def test_what_cannot_be_read_there_is_named(stores, monkeypatch, tmp_path, capsys):
    (stores / "bucket" / "hf").mkdir()
    (stores / "bucket" / "hf" / "model.safetensors").touch()
    for spec, step, words in (
        ("gs://bucket/none", None, r"gs://bucket/none is no directory"),
        ("gs://bucket", None, r"gs://bucket has no checkpoint \(there: none\)"),
        ("hf:gs://bucket/hf", None, r"gs://bucket/hf: .* copy them to a folder of this machine first"),
        ("gs://bucket/hf", None, r"gs://bucket/hf: .*gcloud storage cp -r gs://bucket/hf ."),
        ("xy://bucket/run", None, r"xy://bucket/run is of an unknown kind of store"),
    ):
        with pytest.raises(UserError, match=words):
            resolve_checkpoint(spec, step)
    for line in (
        ["import", "--from=gs://bucket/hf", f"--to={tmp_path / 'new'}"],
        ["upcycle", "--from=gs://bucket/hf", f"--to={tmp_path / 'new'}"],
        ["export", "--from=gs://bucket/run", "--to=gs://bucket/new"],
        ["import", f"--from={tmp_path}", "--to=gs://bucket/hf"],
    ):
        assert convert(line) == 2
    told = capsys.readouterr().err.splitlines()
    assert "copy them to a folder" in told[0]
    assert "copy them to a folder" in told[1]
    assert "--to=gs://bucket/new: " in told[2]
    assert "gs://bucket/hf exists already" in told[3]
    monkeypatch.setattr(Buckets, "info", lambda *_: (_ for _ in ()).throw(PermissionError("no credentials")))
    monkeypatch.setattr(Buckets, "isdir", Buckets.info)
    with pytest.raises(UserError, match=r"gs://bucket/run cannot be read: no credentials"):
        resolve_checkpoint("gs://bucket/run")


def assert_reference(model, factor=1):
    for name, want in reference.weights(SHAPE).items():
        np.testing.assert_array_equal(named_leaves(model)[name], factor * want, err_msg=name)


def test_weights_are_loaded_exported_and_imported(bucket, tmp_path, monkeypatch):
    """Loaded by eval.py, generate and train.init_from; imported back into the bucket; nothing is written beside them."""
    workdir = two_steps(bucket / "run")
    before = sorted(str(path) for path in workdir.rglob("*"))
    config, model, _ = load(str(workdir), {"fsdp": 2, "data": -1})
    assert config.mesh.fsdp == 2
    assert_reference(model, 2)
    assert_reference(load(str(workdir / "checkpoints" / "2"))[1])
    assert convert(["export", f"--from={workdir / 'checkpoints' / '2'}", f"--to={tmp_path / 'hf'}"]) == 0
    assert sorted(str(path) for path in workdir.rglob("*")) == before

    given = source(tmp_path / "theirs", "huggingface")
    with monkeypatch.context() as patch:
        patch.setattr(Foreign, "block", lambda *_: (_ for _ in ()).throw(UserError("half of it")))
        assert convert(["import", f"--from={given}", f"--to={bucket / 'new'}"]) == 2
    assert not (bucket / "new").exists()
    assert convert(["import", f"--from={given}", f"--to={bucket / 'new'}"]) == 0
    assert sorted(path.name for path in (bucket / "new").iterdir()) == ["checkpoints", "config.json"]
    assert_reference(load(str(bucket / "new"))[1])
    assert convert(["verify", f"--from={bucket / 'new'}", f"--to={given}"]) == 0


def test_arrays_are_asked_of_the_store_itself(stores, monkeypatch):
    """What tensorstore is told; it is not run against a store."""
    two_steps(stores / "bucket" / "run")
    asked = []
    monkeypatch.setattr(
        ours.ts, "open", lambda spec, **_: asked.append(spec) or types.SimpleNamespace(result=lambda: None)
    )
    ours.open_arrays(remote.folder("gs://bucket/run/checkpoints/2/params"), 0)
    assert len(asked) == 13
    for spec in asked:
        base = ours.ts.Spec(spec).to_json()["kvstore"]["base"]
        assert base == {"driver": "gcs", "bucket": "bucket", "path": "run/checkpoints/2/params/"}


def test_a_run_that_starts_from_them_compares_tokenizers(stores):
    workdir = two_steps(stores / "bucket" / "run")
    load_tokenizer("bytes", "").save(workdir / "tokenizer")
    notes = []
    _same_tokenizer("gs://bucket/run", load_tokenizer("bytes", ""), notes.append)
    assert not notes
    with pytest.raises(UserError, match=r"init_from=gs://bucket/run was trained with another tokenizer"):
        _same_tokenizer("gs://bucket/run", load_tokenizer("mistral-v1", ""), notes.append)


@pytest.mark.slow
def test_a_run_starts_from_weights_in_a_bucket(fit, bucket):
    fit("first", train__steps=1, train__checkpoint_every=1)
    (bucket.parent / "first").rename(bucket / "first")
    fit("second", train__steps=1, train__checkpoint_every=1, train__init_from=str(bucket / "first"))
    _, first, _ = load(str(bucket / "first"))
    _, second, _ = load(str(bucket.parent / "second"))
    gap = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, map(jax.device_get, (first, second)))))
    assert 0 < gap < 0.05, "one step away"
