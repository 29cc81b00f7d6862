"""The memory of conversion and of loading does not grow with the model: 1.5 GB of weights, each in a process of its own."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.conversion_memory import CONVERT, LOAD, synthetic, watched
from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import LoraConfig, from_config_dict
from mixtral_jax.convert import layout
from mixtral_jax.convert.weights import all_blocks, open_weights
from mixtral_jax.fingerprint import Partial
from mixtral_jax.models import lora
from mixtral_jax.models.layers import FLOAT32
from mixtral_jax.workdir import load_run, store_run

LIMIT = 700_000_000  # bytes of anonymous memory; the interpreter with its libraries takes 100 MB of them


@pytest.mark.slow
def test_memory_stays_below_a_share_of_the_model(tmp_path):
    total = synthetic(tmp_path / "hf", 1.6, "bfloat16")
    assert total > 1_500_000_000
    for command, source, target in (("import", "hf", "run"), ("export", "run", "back"), ("verify", "hf", "back")):
        peak, _, _ = watched(CONVERT, command, f"--from={tmp_path / source}", f"--to={tmp_path / target}")
        print(f"{command}: {total / 1e9:.2f} GB, peak {peak / 1e6:.0f} MB")
        assert peak < LIMIT, f"{command} took {peak / 1e6:.0f} MB"
    for spec in (f"hf:{tmp_path / 'hf'}", tmp_path / "run"):
        peak, held, _ = watched(LOAD, spec, devices=4)
        print(f"loading {spec}: {(peak - held) / 1e6:.0f} MB beside {held / 1e9:.2f} GB of arrays")
        assert held == 2 * total
        assert peak - held < LIMIT


def lora_run(workdir: Path, base: Path) -> None:
    """Adapters on a checkpoint of ours, with the fingerprints of its weights as training would have frozen them."""
    config = from_config_dict(load_run(base))
    train = dataclasses.replace(config.train, init_from=str(base))
    config = dataclasses.replace(config, lora=LoraConfig(16, 16.0, ("attention", "experts")), train=train)
    workdir.mkdir()
    store_run(workdir, config.to_dict())
    weights = open_weights(base)
    seen = {name: Partial(layout.parameter_shape(name, weights.size)) for name in weights.dtypes}
    for name, block in all_blocks(weights):
        index = layout.block_index(name, weights.letters[name], block)
        start = tuple(one if isinstance(one, int) else one.start or 0 for one in index)
        held = weights.block(name, block).astype(
            "float32" if name.rpartition(".")[2] in FLOAT32 else config.model.dtype
        )
        seen[name].add(held.reshape((1,) * (len(start) - held.ndim) + held.shape), start)
    weights.close()
    rng = np.random.default_rng(0)
    shapes = lora.abstract(config.model, config.lora)
    adapters = jax.tree.map(lambda x: jnp.asarray(0.01 * rng.standard_normal(x.shape, np.float32)), shapes)
    said = {"source": str(base), "fingerprints": {name: one.text() for name, one in seen.items()}}
    checkpoints = Checkpoints(workdir)
    checkpoints.save(1, adapters, {"count": jnp.zeros(())}, {"frozen": said})
    checkpoints.close()


@pytest.mark.slow
def test_memory_stays_bounded_where_adapters_are_merged(tmp_path):
    total = synthetic(tmp_path / "hf", 1.6, "bfloat16")
    watched(CONVERT, "import", f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'base'}")
    lora_run(tmp_path / "run", tmp_path / "base")
    # What merge writes is float32, so that its blocks and what compresses them are twice as large as bfloat16's.
    for command, target, limit in (("export", "out", LIMIT), ("merge", "merged", 1_000_000_000)):
        peak, _, _ = watched(CONVERT, command, f"--from={tmp_path / 'run'}", f"--to={tmp_path / target}")
        print(f"{command}: {total / 1e9:.2f} GB, peak {peak / 1e6:.0f} MB")
        assert peak < limit, f"{command} took {peak / 1e6:.0f} MB"
