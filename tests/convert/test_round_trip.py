"""Files -> checkpoint -> files, bit by bit; and an imported checkpoint's logits are transformers' golden ones."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from configs.common import base
from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import UserError, from_config_dict
from mixtral_jax.convert import architecture
from mixtral_jax.convert.__main__ import main
from mixtral_jax.models import mixtral
from mixtral_jax.sharding import named_leaves, tree_shardings
from mixtral_jax.workdir import load_run, store_run
from tests.convert import sources
from tests.golden import reference
from tests.helpers import on_mesh, tiny

GOLDEN = Path(__file__).parent.parent / "golden"


def run(*arguments, status: int = 0) -> None:
    assert main([str(a) for a in arguments]) == status


def convert(command: str, source: Path, target: Path, *rest, status: int = 0) -> Path:
    run(command, f"--from={source}", f"--to={target}", *rest, status=status)
    return target


def restore(workdir: Path, **axes):
    """The model of a workdir's step 0, restored onto a mesh as training would."""
    stored = from_config_dict(load_run(workdir))
    config, mesh = on_mesh(dataclasses.replace(tiny(), model=stored.model), **axes)
    shapes = mixtral.abstract(config.model)
    shardings = tree_shardings(shapes, mesh, shapes)
    like = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)
    checkpoints = Checkpoints(workdir)
    model = checkpoints.restore_params(0, like)
    checkpoints.close()
    return config, model


def logits(workdir: Path, name: str) -> np.ndarray:
    """The float32 logits of a checkpoint on reference.py's batch."""
    _, model = restore(workdir)
    made = reference.batch(reference.SHAPES[name])
    positions = np.broadcast_to(np.arange(made["tokens"].shape[1], dtype=np.int32), made["tokens"].shape)
    return np.asarray(jax.jit(lambda m: m(made["tokens"], positions, made["mask"])[0])(model))


@pytest.mark.parametrize("name", reference.SHAPES)
@pytest.mark.parametrize("kind", ["huggingface", "mistral"])
def test_an_imported_checkpoint_has_the_golden_logits(tmp_path, name, kind):
    shape = reference.SHAPES[name]
    source = sources.mixtral(tmp_path / "hf", name, shards=2)
    if kind == "mistral":
        arrays = sources.mistral_tensors(reference.weights(shape), shape)
        source = mistral_directory(tmp_path / "mistral", arrays, shape)
    workdir = convert("import", source, tmp_path / "run")
    with np.load(GOLDEN / f"{name}.npz") as golden:
        want = golden["logits"]
    valid = reference.batch(shape)["mask"] > 0
    error = np.abs(logits(workdir, name) - want)[valid].max()
    assert error <= 1e-5 * np.abs(want).max()


def mistral_directory(folder: Path, arrays: dict, shape: dict) -> Path:
    sources.write(folder, arrays, {}, shards=1)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    (folder / "config.json").unlink()
    params = {
        "dim": shape["d_model"],
        "n_layers": shape["num_layers"],
        "head_dim": shape["head_dim"],
        "hidden_dim": shape["d_ff"],
        "n_heads": shape["num_heads"],
        "n_kv_heads": shape["num_kv_heads"],
        "norm_eps": 1e-5,
        "vocab_size": shape["vocab_size"],
        "rope_theta": shape["rope_theta"],
        "sliding_window": shape["sliding_window"] or None,
        "moe": {"num_experts": shape["num_experts"], "num_experts_per_tok": shape["experts_per_token"]},
    }
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize(("dtype", "shards"), [("float32", 3), ("bfloat16", 1), ("float16", 2)])
def test_round_trip_is_bit_exact(tmp_path, dtype, shards):
    source = sources.mixtral(tmp_path / "hf", "wide_heads", shards, dtype)
    before = sources.read(source)
    workdir = convert("import", source, tmp_path / "run")
    back = convert("export", workdir, tmp_path / "back", "--max_shard_size=30KB")
    after = sources.read(back)
    assert after.keys() == before.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        assert after[name].tobytes() == array.tobytes(), name
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in before.values())
    assert index["weight_map"].keys() == before.keys()
    assert all((back / file).stat().st_size < 40_000 for file in index["weight_map"].values())
    config = json.loads((back / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e4
    assert config["router_aux_loss_coef"] == 0.02
    for key, value in sources.config_json(reference.SHAPES["wide_heads"]).items():
        assert config[key] == value, key
    for first, second in ((source, workdir), (workdir, back), (back, source)):
        convert("verify", first, second)


def test_tensors_are_cut_into_blocks_and_put_together_again(tmp_path, monkeypatch):
    # The models of the other tests are smaller than one block.
    monkeypatch.setattr("mixtral_jax.convert.layout.BLOCK_BYTES", 1000)
    source = sources.mixtral(tmp_path / "hf", "wide_heads")
    workdir = convert("import", source, tmp_path / "run")
    _, model = restore(workdir, fsdp=2)
    for name, want in reference.weights(reference.SHAPES["wide_heads"]).items():
        np.testing.assert_array_equal(named_leaves(model)[name], want, err_msg=name)
    after = sources.read(convert("export", workdir, tmp_path / "back"))
    for name, array in sources.read(source).items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)


def test_a_checkpoint_restores_onto_a_mesh_as_float32(tmp_path):
    workdir = convert("import", sources.mixtral(tmp_path / "hf", dtype="bfloat16"), tmp_path / "run")
    config, model = restore(workdir, expert=4, tensor=2)
    assert config.model.dtype == "bfloat16"
    leaves = named_leaves(model)
    assert len(leaves["layers.w_gate_EDF"].sharding.device_set) == 8
    for name, want in reference.weights(reference.BASE).items():
        assert leaves[name].dtype == np.float32
        np.testing.assert_array_equal(leaves[name], want.astype(ml_dtypes.bfloat16).astype(np.float32), err_msg=name)


def test_export_casts_and_a_trained_checkpoint_exports(tmp_path):
    source = sources.mixtral(tmp_path / "hf")
    workdir = convert("import", source, tmp_path / "run")
    back = convert("export", workdir, tmp_path / "back", "--dtype=bfloat16")
    after = sources.read(back)
    for name, array in sources.read(source).items():
        assert after[name].dtype == ml_dtypes.bfloat16
        assert after[name].tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    convert("verify", source, back, status=1)  # rounding is a difference

    config, model = restore(workdir, fsdp=2)
    trained = tmp_path / "trained"
    checkpoints = Checkpoints(trained)
    checkpoints.save(7, model, {"moment": np.zeros(3)}, {})
    checkpoints.close()
    store_run(trained, config.to_dict())
    convert("verify", source, trained)
    convert("verify", source, trained / "checkpoints" / "7")
    # A model of bytes: the export says their BOS and EOS.
    config = json.loads((convert("export", trained, tmp_path / "bytes") / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)


def test_defaults_are_those_of_the_base_config():
    model = architecture.ModelConfig(**base().model.to_dict())
    ours = architecture.run_config(model, base().loss.balance_weight, base().data.tokenizer)
    assert ours == from_config_dict(base())
    assert architecture.COMPUTE.items() <= base().model.to_dict().items()


def test_an_imported_checkpoint_is_not_resumed(tmp_path):
    workdir = convert("import", sources.mixtral(tmp_path / "hf"), tmp_path / "run")
    checkpoints = Checkpoints(workdir)
    with pytest.raises(UserError, match="no optimizer state"):
        checkpoints.restore(0, {}, {})
    checkpoints.close()


def test_help_and_wrong_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "import --from=" in capsys.readouterr().out
    for arguments in (["export", "--from=a", "--to=b", "--max_shard_size=5XB"], ["import", "--from=a"], ["unknown"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert main(["verify", "--from=/nowhere", "--to=/nowhere"]) == 2
    assert "/nowhere is no directory" in capsys.readouterr().err
