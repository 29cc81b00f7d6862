"""A LoRA run's checkpoint read as plain weights: exported, merged, verified, loaded; and a base that is not the base."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mixtral_jax import lora_base
from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import from_config_dict
from mixtral_jax.convert import layout
from mixtral_jax.convert.__main__ import main
from mixtral_jax.convert.weights import open_weights
from mixtral_jax.models import lora, mixtral
from mixtral_jax.sharding import named_leaves, path_names
from mixtral_jax.workdir import load_run, store_run
from tests.convert import sources
from tests.golden import reference
from tests.helpers import tiny

SHAPE = reference.BASE | dict(num_heads=8, num_kv_heads=4)
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate.", "experts.")


def hf_base(folder: Path, dtype: str = "float32") -> Path:
    return sources.write(folder, sources.tensors(reference.weights(SHAPE)), sources.config_json(SHAPE), dtype=dtype)


def base_model(config, weights=None) -> mixtral.Mixtral:
    """reference.py's weights as a model, or others by name."""
    like = mixtral.abstract(config.model)
    weights = reference.weights(SHAPE) if weights is None else weights
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(weights[name]) for name in named_leaves(like)])


def lora_run(workdir: Path, init_from: str, base=None, seed: int = 0, step: int = 3, **overrides):
    """The workdir of a LoRA run with one checkpoint; returns the adapters. `base`: what it was trained beside, frozen."""
    changes = {f"model__{key}": value for key, value in SHAPE.items()}
    targets = ("attention", "experts", "router")
    changes |= dict(
        lora__rank=3, lora__alpha=6.0, lora__targets=targets, train__init_from=init_from, model__max_seq_len=128
    )
    config = tiny(**changes | overrides)

    def values(path, leaf):
        rng = np.random.default_rng([seed, *path_names(path)[-1].encode()])
        return jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32)

    adapters = jax.tree_util.tree_map_with_path(values, lora.abstract(config.model, config.lora))
    workdir.mkdir(exist_ok=True)
    store_run(workdir, config.to_dict())
    meta = {} if base is None else {"frozen": lora_base.record(config, lora.freeze(base))}
    checkpoints = Checkpoints(workdir, keep=3)
    checkpoints.save(step, adapters, {"count": jnp.zeros(())}, {"identity": {"corpus": "text"}} | meta)
    checkpoints.close()
    return config, adapters


def convert(command: str, source: Path, target: Path, *rest: str, status: int = 0) -> Path:
    assert main([command, f"--from={source}", f"--to={target}", *rest]) == status
    return target


def merged_tensors(config, adapters, base=None) -> dict[str, np.ndarray]:
    """The merged model in Hugging Face's names, by models/lora.py."""
    merged = lora.merge(base_model(config) if base is None else base, adapters)
    return sources.tensors({name: np.asarray(leaf) for name, leaf in named_leaves(merged).items()})


def test_an_export_has_the_merged_weights_of_every_expert(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK_BYTES", 1000)  # several blocks of each tensor
    source = hf_base(tmp_path / "hf")
    config, adapters = lora_run(tmp_path / "run", f"hf:{source}", base_model(tiny(**shape_keys())))
    want, before = merged_tensors(config, adapters), sources.read(source)
    after = sources.read(convert("export", tmp_path / "run", tmp_path / "out"))
    assert after.keys() == want.keys()
    for name, array in want.items():
        assert after[name].dtype == np.float32
        np.testing.assert_allclose(after[name], array, atol=2e-6 * np.abs(array).max(), err_msg=name)
        changed = np.abs(after[name] - before[name]).max() > 1e-3
        assert changed == any(part in name for part in ADAPTED), name
    experts = [name for name in after if "experts." in name]
    assert len(experts) == 2 * 4 * 3, "three matrices of each expert of each layer"


def shape_keys() -> dict:
    return {f"model__{key}": value for key, value in SHAPE.items()}


def test_an_export_keeps_the_dtype_of_the_base_and_rounds_once(tmp_path):
    source = hf_base(tmp_path / "hf", "bfloat16")
    config, adapters = lora_run(tmp_path / "run", f"hf:{source}")
    rounded = {n: a.astype(ml_dtypes.bfloat16).astype(np.float32) for n, a in reference.weights(SHAPE).items()}
    want = merged_tensors(config, adapters, base_model(config, rounded))
    after = sources.read(convert("export", tmp_path / "run", tmp_path / "out"))
    for name, array in want.items():
        assert after[name].dtype == ml_dtypes.bfloat16
        # Half a step of bfloat16, and what two float32 sums may differ by.
        np.testing.assert_allclose(after[name].astype(np.float32), array, rtol=2**-8 + 1e-5, atol=1e-7, err_msg=name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    after = sources.read(convert("export", tmp_path / "run", tmp_path / "wide", "--dtype=float32"))
    for name, array in want.items():
        np.testing.assert_allclose(after[name], array, atol=2e-6 * np.abs(array).max(), err_msg=name)


def test_merge_writes_a_checkpoint_that_needs_no_base(tmp_path, capsys):
    source = hf_base(tmp_path / "hf")
    lora_run(tmp_path / "run", f"hf:{source}", base_model(tiny(**shape_keys())))
    merged = convert("merge", tmp_path / "run", tmp_path / "merged")
    convert("verify", tmp_path / "run", merged)
    exported = convert("export", tmp_path / "run", tmp_path / "out")
    shutil.rmtree(source)
    convert("verify", merged, exported)
    config = from_config_dict(load_run(merged))
    assert (config.lora.rank, config.train.init_from) == (0, "")
    capsys.readouterr()
    convert("merge", merged, tmp_path / "again", status=2)
    assert "has no adapters to merge" in capsys.readouterr().err
    convert("export", tmp_path / "run", tmp_path / "no_base", status=2)
    err = capsys.readouterr().err
    assert f"train.init_from=hf:{source} cannot be read" in err
    assert "set train.init_from in" in err
    assert not (tmp_path / "no_base").exists()


def test_a_lora_run_on_a_lora_run_is_merged_twice(tmp_path):
    source = hf_base(tmp_path / "hf")
    config, first = lora_run(tmp_path / "first", f"hf:{source}", base_model(tiny(**shape_keys())))
    once = lora.merge(base_model(config), first)
    _, second = lora_run(tmp_path / "second", str(tmp_path / "first"), once, seed=1, lora__targets=("experts",))
    want = merged_tensors(config, second, once)
    after = sources.read(convert("export", tmp_path / "second", tmp_path / "out"))
    for name, array in want.items():
        np.testing.assert_allclose(after[name], array, atol=2e-6 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_has_changed_is_refused_by_name(tmp_path, capsys, dtype):
    """The fingerprints are of the base in the compute dtype; what export reads is compared block by block."""
    weights = reference.weights(SHAPE)
    source = hf_base(tmp_path / "hf")
    base = base_model(tiny(**shape_keys(), model__dtype=dtype))
    lora_run(tmp_path / "run", f"hf:{source}", base, model__dtype=dtype)
    convert("export", tmp_path / "run", tmp_path / "out")
    shutil.rmtree(source)
    weights = weights | {"head_DV": weights["head_DV"] * 1.01}
    sources.write(source, sources.tensors(weights), sources.config_json(SHAPE))
    capsys.readouterr()
    for command in ("export", "merge"):
        convert(command, tmp_path / "run", tmp_path / "again", status=2)
        err = capsys.readouterr().err
        assert f"trained beside hf:{source}" in err
        assert "other weights now: head_DV." in err
        assert not (tmp_path / "again").exists()


def test_a_base_of_adapters_that_were_trained_on_is_refused(tmp_path, capsys):
    source = hf_base(tmp_path / "hf")
    config, first = lora_run(tmp_path / "first", f"hf:{source}")
    once = lora.merge(base_model(config), first)
    lora_run(tmp_path / "second", str(tmp_path / "first"), once, seed=1)
    convert("export", tmp_path / "second", tmp_path / "out")
    lora_run(tmp_path / "first", f"hf:{source}", seed=2, step=5)
    capsys.readouterr()
    convert("export", tmp_path / "second", tmp_path / "again", status=2)
    assert "first, step 5 has other weights now: layers.lora_" in capsys.readouterr().err


def test_a_random_base_is_made_again_from_the_seed(tmp_path):
    base = mixtral.init(tiny(**shape_keys(), model__max_seq_len=128).model, jax.random.key(7))
    config, adapters = lora_run(tmp_path / "run", "", base, train__seed=7)
    after = sources.read(convert("export", tmp_path / "run", tmp_path / "out"))
    for name, array in merged_tensors(config, adapters, base).items():
        np.testing.assert_allclose(after[name], array, atol=2e-6 * np.abs(array).max(), err_msg=name)


def test_adapters_of_another_shape_are_refused(tmp_path, capsys):
    source = hf_base(tmp_path / "hf")
    config, _ = lora_run(tmp_path / "run", f"hf:{source}")
    plain = config.to_dict()
    plain["lora"]["rank"] = 4
    store_run(tmp_path / "run", plain)
    convert("export", tmp_path / "run", tmp_path / "out", status=2)
    assert "layers.lora_q_a_DR: stored (2, 32, 3), config (2, 32, 4)" in capsys.readouterr().err


def test_reading_a_block_reads_no_more_of_the_factors(tmp_path, monkeypatch):
    """Memory stays bounded: of an expert's block the factors of that layer and expert are read, cut where the block is."""
    monkeypatch.setattr(layout, "BLOCK_BYTES", 1000)
    lora_run(tmp_path / "run", f"hf:{hf_base(tmp_path / 'hf')}")
    weights = open_weights(tmp_path / "run")
    shapes = []
    original = type(weights)._factor

    def factor(self, name, parameter, block):
        found = original(self, name, parameter, block)
        shapes.append(found.shape)
        return found

    monkeypatch.setattr(type(weights), "_factor", factor)
    for name, letters in (("layers.w_gate_EDF", "F D"), ("layers.w_q_DNH", "NH D")):
        block = next(iter(layout.blocks(name, letters, weights.size)))
        width = block.stop - block.start
        assert weights.block(name, block).shape == ((32, width) if "EDF" in name else (32, width, 8))
        assert shapes == [(32, 3), (3, width)] if "EDF" in name else [(32, 3), (3, width, 8)]
        shapes.clear()
    weights.close()
