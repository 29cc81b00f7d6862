"""Broken sources: an error that names what is wrong, exit status 2, and nothing left behind."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixtral_jax.config import UserError
from mixtral_jax.convert.__main__ import main
from mixtral_jax.convert.architecture import read_mistral
from mixtral_jax.convert.store import new_directory
from tests.convert import sources
from tests.golden import reference

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
SHARD = "model-00002-of-00003.safetensors"


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, change) -> None:
    """Changes the tensors of the shard that holds EXPERT, and keeps the index true."""
    index = json.loads((folder / INDEX).read_text())
    path = folder / index["weight_map"][EXPERT]
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)
    kept = {name: file for name, file in index["weight_map"].items() if file != path.name}
    index["weight_map"] = kept | dict.fromkeys(arrays, path.name)
    del index["metadata"]
    (folder / INDEX).write_text(json.dumps(index))


def missing_shard(folder):
    (folder / SHARD).unlink()


def missing_shard_without_index(folder):
    (folder / SHARD).unlink()
    (folder / INDEX).unlink()


def truncated_shard(folder):
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-100])


def empty_shard(folder):
    (folder / SHARD).write_bytes(b"")


def extra_tensor(folder):
    edit_tensors(folder, lambda arrays: arrays.update({"model.layers.7.mystery.weight": np.zeros(3, np.float32)}))


def missing_tensor(folder):
    edit_tensors(folder, lambda arrays: arrays.pop(EXPERT))


def fused_experts(folder):
    edit_tensors(folder, lambda arrays: arrays.update({"model.layers.0.mlp.experts.down_proj": arrays.pop(EXPERT)}))


def wrong_shape(folder):
    edit_tensors(folder, lambda arrays: arrays.update({EXPERT: np.ascontiguousarray(arrays[EXPERT].T)}))


def wrong_dtype(folder):
    edit_tensors(folder, lambda arrays: arrays.update({EXPERT: arrays[EXPERT].astype(np.int8)}))


def lying_index(folder):
    def swap(index):
        place = index["weight_map"]
        other = next(name for name, file in place.items() if file != place[EXPERT])
        place[EXPERT], place[other] = place[other], place[EXPERT]

    edit_json(folder / INDEX, swap)


def index_with_a_ghost(folder):
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.ghost.weight": SHARD}))


def lying_total(folder):
    edit_json(folder / INDEX, lambda index: index["metadata"].update(total_size=1234))


def index_metadata(value):
    return lambda folder: edit_json(folder / INDEX, lambda index: index.update(metadata=value))


def doubled_tensor(folder):
    other = {EXPERT: np.zeros((48, 32), np.float32)}
    for k in (1, 2, 3):
        path = folder / f"model-0000{k}-of-00003.safetensors"
        arrays = load_file(path)
        if EXPERT not in arrays:
            save_file(arrays | other, path)
            return


def index_is_no_json(folder):
    (folder / INDEX).write_text("{")


def no_config(folder):
    (folder / "config.json").unlink()


def config_change(**changes):
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(changes))


def without_theta(folder):
    edit_json(folder / "config.json", lambda config: config.pop("rope_theta"))


CASES = {
    "missing shard": (missing_shard, ["missing", SHARD]),
    "missing shard, no index": (missing_shard_without_index, ["missing", SHARD]),
    "truncated shard": (truncated_shard, [SHARD, "damaged or cut short"]),
    "empty shard": (empty_shard, [SHARD, "damaged or cut short"]),
    "extra tensor": (extra_tensor, ["unknown model.layers.7.mystery.weight"]),
    "missing tensor": (missing_tensor, [f"missing {EXPERT} [48, 32]"]),
    "fused experts": (fused_experts, ["unknown model.layers.0.mlp.experts.down_proj", f"missing {EXPERT}"]),
    "wrong shape": (wrong_shape, [EXPERT, "[32, 48]", "[48, 32]"]),
    "wrong dtype": (wrong_dtype, [EXPERT, "I8"]),
    "lying index": (lying_index, [EXPERT, "the index says model-0"]),
    "ghost in the index": (index_with_a_ghost, ["model.ghost.weight", "no file"]),
    "lying total": (lying_total, ["total_size is 1234"]),
    "index metadata null": (index_metadata(None), [INDEX, "metadata=None"]),
    "index metadata a list": (index_metadata([1]), [INDEX, "metadata=[1]"]),
    "doubled tensor": (doubled_tensor, [EXPERT, "both"]),
    "index is no JSON": (index_is_no_json, [INDEX, "JSON"]),
    "no config": (no_config, ["config.json"]),
    "another architecture": (config_change(model_type="llama"), ["llama", "import reads mixtral"]),
    "another depth": (config_change(num_hidden_layers=3), ["missing model.layers.2."]),
    "more experts": (config_change(num_local_experts=5), ["experts.4.w1.weight"]),
    "tied head": (config_change(tie_word_embeddings=True), ["tie_word_embeddings"]),
    "two thetas": (config_change(rope_parameters={"rope_theta": 1e4}), ["10000.0", "1000000.0"]),
    "no theta": (without_theta, ["no rope_theta"]),
    "scaled RoPE": (config_change(rope_scaling={"type": "linear", "factor": 2.0}), ["linear"]),
    "another activation": (config_change(hidden_act="gelu"), ["hidden_act='gelu'"]),
    "quantised": (config_change(quantization_config={"bits": 4}), ["quantization_config"]),
    "theta as text": (config_change(rope_theta="1e6"), ["config.json", "rope_theta='1e6'"]),
    "theta a list": (config_change(rope_theta=[1e6]), ["rope_theta=[1000000.0]"]),
    "theta true": (config_change(rope_theta=True), ["rope_theta=True"]),
    "inner theta as text": (config_change(rope_parameters={"rope_theta": "x"}), ["rope_parameters.rope_theta='x'"]),
    "RoPE as text": (config_change(rope_parameters="default"), ["config.json", "rope_parameters='default'"]),
    "no heads": (config_change(num_attention_heads=0), ["config.json", "num_attention_heads=0"]),
    "NaN for a size": (config_change(hidden_size=float("nan")), ["config.json", "hidden_size=nan"]),
    "infinite size": (config_change(vocab_size=float("inf")), ["vocab_size=inf"]),
    "text for a number": (config_change(hidden_size="32"), ["hidden_size='32'"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_source_is_explained_and_leaves_nothing(tmp_path, capsys, case):
    damage, expected = CASES[case]
    source = sources.mixtral(tmp_path / "in" / "hf")
    damage(source)
    target = tmp_path / "out" / "run"
    assert main(["import", f"--from={source}", f"--to={target}"]) == 2
    message = capsys.readouterr().err
    for text in expected:
        assert text in message
    assert "Traceback" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_rope_theta_may_stand_in_rope_parameters_alone(tmp_path):
    source = sources.mixtral(tmp_path / "hf", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    without_theta(source)
    assert main(["import", f"--from={source}", f"--to={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["rope_theta"] == 5e5


def test_a_target_that_exists_is_not_touched(tmp_path, capsys):
    source = sources.mixtral(tmp_path / "hf")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    assert main(["import", f"--from={source}", f"--to={tmp_path / 'run'}"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_target_may_stand_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with new_directory(Path("~/run")) as folder:
        (folder / "x").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / "run" / "x").is_file()


@pytest.mark.parametrize(
    ("target", "words"), [(".", "is the current directory"), ("~no_such_user/run", "~no_such_user")]
)
def test_a_target_that_cannot_be_made_is_explained(tmp_path, monkeypatch, target, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words), new_directory(Path(target)):
        pass
    assert not list(tmp_path.iterdir())


def test_a_damaged_description_of_our_arrays_is_explained(tmp_path, capsys):
    source = sources.mixtral(tmp_path / "hf")
    assert main(["import", f"--from={source}", f"--to={tmp_path / 'run'}"]) == 0
    (path,) = (tmp_path / "run").glob("checkpoints/0/params/_METADATA")
    for text in ("[]", "null", "{", '{"tree_metadata": []}', '{"tree_metadata": {"x": null}}'):
        path.write_text(text)
        assert main(["export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'back'}"]) == 2
        message = capsys.readouterr().err
        assert "params is damaged or incomplete" in message, text
        assert not (tmp_path / "back").exists()


def test_an_error_in_the_middle_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "a" / "b") as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_failing_disk_in_the_middle_of_an_import_leaves_nothing(tmp_path, monkeypatch):
    source = sources.mixtral(tmp_path / "in" / "hf")
    calls = []

    def read(self, name, index):
        calls.append(name)
        if len(calls) == 5:
            raise OSError("Input/output error")
        return original(self, name, index)

    from mixtral_jax.convert.shards import Shards

    original = Shards.read
    monkeypatch.setattr(Shards, "read", read)
    assert main(["import", f"--from={source}", f"--to={tmp_path / 'run'}"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_pickled_weights_are_not_read(tmp_path, capsys):
    shape = reference.BASE
    sources.mixtral(tmp_path / "hf")
    params = dict(dim=32, n_layers=2, head_dim=8, hidden_dim=48, n_heads=4, n_kv_heads=2, norm_eps=1e-5)
    folder = tmp_path / "mistral"
    folder.mkdir()
    moe = {"num_experts": shape["num_experts"], "num_experts_per_tok": 2}
    (folder / "params.json").write_text(json.dumps(params | {"vocab_size": 64, "moe": moe}))
    (folder / "consolidated.00.pt").write_bytes(b"x")
    assert main(["import", f"--from={folder}", f"--to={tmp_path / 'run'}"]) == 2
    assert "only torch can read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok"])
@pytest.mark.parametrize("value", [None, "8", 4.7, [8]])
def test_experts_of_mistral_are_whole_numbers(tmp_path, key, value):
    params = dict(dim=32, n_layers=2, head_dim=8, hidden_dim=48, n_heads=4, n_kv_heads=2, norm_eps=1e-5, vocab_size=64)
    moe = {"num_experts": 4, "num_experts_per_tok": 2} | {key: value}
    (tmp_path / "params.json").write_text(json.dumps(params | {"moe": moe}))
    words = f"params.json has no moe.{key};" if value is None else f"params.json: moe.{key}={value!r};"
    with pytest.raises(UserError, match=re.escape(words)):
        read_mistral(tmp_path)


@pytest.mark.parametrize(
    "flag",
    [
        "--seed=-1",
        f"--seed={2**32}",
        "--noise=nan",
        "--noise=inf",
        "--noise=1e+300",
        "--router_std=inf",
        "--router_std=nan",
    ],
)
def test_impossible_numbers_of_an_upcycle_are_refused(tmp_path, capsys, flag):
    assert main(["upcycle", f"--from={tmp_path / 'in'}", f"--to={tmp_path / 'run'}", flag]) == 2
    assert flag in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_router_bias_cannot_be_exported(tmp_path, capsys, monkeypatch):
    from mixtral_jax.convert import weights

    source = sources.mixtral(tmp_path / "hf")
    opened = weights.open_weights(source)
    opened.dtypes[weights.BIAS], opened.letters[weights.BIAS] = np.dtype(np.float32), "E"
    original = opened.block
    opened.block = lambda name, block: np.ones(4) if name == weights.BIAS else original(name, block)
    monkeypatch.setattr("mixtral_jax.convert.exporter.open_weights", lambda _: opened)
    assert main(["export", f"--from={source}", f"--to={tmp_path / 'back'}"]) == 2
    assert "router bias" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
