"""What LoRA saves, from abstract shapes: against sums by hand and the arrays themselves."""

import dataclasses
import functools

import jax
import numpy as np

from configs import mixtral_8x7b
from mixtral_jax import memory, saving
from mixtral_jax.config import from_config_dict, resolve_mesh
from mixtral_jax.models import lora, mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import make_mesh, tree_shardings
from tests.helpers import on_mesh, tiny

LORA = dict(lora__rank=4, lora__targets=("attention", "experts", "router"), model__dtype="bfloat16")


def on_first_device(tree) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@functools.cache
def rows(axes=(), **changes):
    config, mesh = on_mesh(tiny(**LORA, **changes), **dict(axes))
    return config, mesh, saving.state_rows(config)


def test_the_rows_are_the_bytes_of_arrays_on_a_device():
    config, mesh, found = rows((("fsdp", 2), ("expert", 2), ("tensor", 2)))
    optimizer = make_optimizer(config.optim, 1)
    adapters = lora.abstract(config.model, config.lora)
    base = jax.eval_shape(lora.freeze, mixtral.abstract(config.model))
    state = jax.eval_shape(optimizer.init, adapters)
    adapters, base, state = (
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree) for tree in (adapters, base, state)
    )
    put = [
        on_first_device(jax.device_put(tree, tree_shardings(tree, mesh, params)))
        for tree, params in ((base, base), (adapters, adapters), (state, adapters))
    ]
    mine = [row[1] for row in found.values()]
    assert mine == [put[0], put[1], put[1], put[2]]
    full = [row[0] for row in found.values()]
    assert full[0] == 0
    total, _ = mixtral.parameter_counts(config.model)
    counters = put[2] - 2 * put[1]
    assert 4 * total / 8 <= full[1] < 4 * total, "all is split by something, little by everything"
    assert full[1:] == [full[1], full[1], 2 * full[1] + counters]


def test_accumulation_and_the_optimizer_count():
    _, _, plain = rows()
    _, _, summed = rows(train__accumulation_steps=2)
    _, _, small = rows(optim__moment_dtype="bfloat16")
    assert summed["gradients, float32"] == tuple(2 * size for size in plain["gradients, float32"])
    halved, whole = small["optimizer state, adamw"], plain["optimizer state, adamw"]
    np.testing.assert_allclose(halved, np.asarray(whole) / 2, rtol=1e-3)


def test_the_saving_of_the_published_model_is_told():
    """8x7B over 16 devices: 16 bytes for each parameter, against 2 and the adapters' 16."""
    c = mixtral_8x7b.get_config()
    c.train.accumulation_steps = 1
    c.lora.rank = 16
    c.mesh.update(fsdp=2, expert=8)
    config = resolve_mesh(from_config_dict(c), 16)
    found = saving.state_rows(config)
    full, mine = (sum(row[i] for row in found.values()) for i in (0, 1))
    trained, _ = lora.parameter_counts(config.model, config.lora)
    experts = 32 * 8 * 3 * 4096 * 14336  # over both axes; the rest over fsdp alone
    share = experts / 16 + (46_702_792_704 - experts) / 2
    np.testing.assert_allclose(full, 16 * share, rtol=1e-3)
    np.testing.assert_allclose(found["frozen base, bfloat16"][1], 2 * share, rtol=1e-2)
    # Of the adapters' factors some are not split over fsdp at all.
    assert 16 * trained / 16 < mine - found["frozen base, bfloat16"][1] < 16 * trained / 4
    text = saving.text(config)
    assert f"{trained:,} parameters are trained" in text
    assert memory.readable(full - mine) + " less on each device" in text
    assert len(text.splitlines()) == 8


def test_the_estimates_of_a_lora_run_count_the_base_without_gradients():
    """What a message about memory lists, and what it ranks changes by."""
    config, mesh, found = rows((("fsdp", 2),))
    adapters = lora.abstract(config.model, config.lora)
    state = memory.abstractly_sharded({"params": adapters}, adapters, config.mesh)
    frozen = found["frozen base, bfloat16"][1]
    error = RuntimeError("Out of memory while trying to allocate 10MiB")
    lines = memory.explain_oom(error, config=config, state_or_abstract=state).splitlines()
    assert any(line.startswith("  frozen base") and memory.readable(frozen) in line for line in lines)
    assert any("experts of a layer, gathered; without a gradient" in line for line in lines)
    plain = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=0))
    with_base, without = memory._total(config, state), memory._total(plain, state)
    experts = memory.activations(config)["experts of a layer, gathered; without a gradient"]
    assert with_base - without == frozen - experts
    assert memory.frozen_bytes(plain) == 0
    assert make_mesh(config.mesh, jax.devices()[:2]).shape == mesh.shape
