"""Every mesh computes the same: loss, gradients, norm; and 20 steps of training stay together. float32, 8 fake devices."""

import functools

import jax
import numpy as np
import pytest

from mixtral_jax.models import mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import named_leaves, param_spec, path_names, place, replicated
from mixtral_jax.stages import STAGES
from mixtral_jax.step import init_state, make_train_step
from tests.helpers import assert_trees_close, gradients, on_mesh, random_batch, tiny, train

MESHES = {
    "fsdp8": dict(fsdp=8),
    "expert8": dict(expert=8),
    "tensor2_fsdp4": dict(tensor=2, fsdp=4),
    "data2_expert4": dict(data=2, expert=4),
    "data2_fsdp2_expert2": dict(data=2, fsdp=2, expert=2),
    "fsdp2_expert2_tensor2": dict(fsdp=2, expert=2, tensor=2),
}
STEPS = 20


@functools.cache
def reference():
    """One device: loss, gradients and a training run."""
    config, mesh = on_mesh(tiny(train__steps=STEPS))
    params = mixtral.init(config.model, jax.random.key(1))
    batches = [random_batch(config, seed) for seed in range(STEPS)]
    return params, batches, gradients(config, mesh, params, batches[0]), train(config, mesh, batches)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES.keys())
def test_loss_and_gradients_agree(axes):
    params, batches, ((want, (want_terms, want_stats)), want_grads), _ = reference()
    config, mesh = on_mesh(tiny(train__steps=STEPS), **axes)
    (got, (terms, stats)), grads = gradients(config, mesh, params, batches[0])
    assert got == pytest.approx(want, rel=1e-5)
    for name, value in want_terms.items():
        assert terms[name] == pytest.approx(value, rel=1e-5), name
    np.testing.assert_array_equal(stats.count_E, want_stats.count_E)
    assert not stats.dropped.any()
    assert_trees_close(grads, want_grads, 1e-5)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES.keys())
def test_twenty_steps_agree(axes):
    _, batches, _, (want_state, want_log) = reference()
    config, mesh = on_mesh(tiny(train__steps=STEPS), **axes)
    state, log = train(config, mesh, batches)
    for step, (got, want) in enumerate(zip(log, want_log, strict=True)):
        for name in ("loss", "token_loss", "balance_loss", "gradient_norm"):
            assert got[name] == pytest.approx(want[name], rel=1e-5), f"step {step}: {name}"
        np.testing.assert_array_equal(got["load_LE"], want["load_LE"])
    assert_trees_close(state.params, want_state.params, 1e-4)
    assert want_log[-1]["loss"] != pytest.approx(want_log[0]["loss"], rel=1e-3), "nothing was trained"


def collapsed(config):
    """Parameters whose router bias sends every token to the same K experts, so that most experts get none."""
    params = mixtral.init(config.model, jax.random.key(1))
    bias_E = np.zeros(config.model.num_experts, np.float32)
    bias_E[: config.model.experts_per_token] = 1e3

    def fill(path, leaf):
        return leaf + bias_E[None, :] if path_names(path)[-1] == "router_bias_E" else leaf

    return jax.tree_util.tree_map_with_path(fill, params)


@pytest.mark.parametrize("backend", ["blocks", "dense"])
@pytest.mark.parametrize("axes", [dict(expert=8), dict(data=2, expert=2, tensor=2)], ids=str)
def test_all_tokens_on_the_same_experts_agree(axes, backend):
    """All work lands on one device of the expert axis: nothing is dropped, and the numbers are the oracle's."""
    batch = random_batch(tiny())
    results = []
    for mesh_axes, which in (({}, "dense"), (axes, backend)):
        config, mesh = on_mesh(tiny(model__router_bias=True, model__expert_backend=which), **mesh_axes)
        results.append(gradients(config, mesh, collapsed(config), batch))
    ((want, (_, want_stats)), want_grads), ((got, (_, stats)), grads) = results
    assert (want_stats.count_E > 0).sum() == 2 * 2, "two layers with two experts each should do all the work"
    np.testing.assert_array_equal(stats.count_E, want_stats.count_E)
    assert not stats.dropped.any()
    assert got == pytest.approx(want, rel=1e-5)
    assert_trees_close(grads, want_grads, 1e-5)


def test_bfloat16_trains_like_float32_to_its_own_accuracy():
    """bf16 keeps 8 bits, so losses agree to a fraction of a percent; the mesh's collectives run in bf16 too."""
    batches = [random_batch(tiny(), seed) for seed in range(3)]
    _, want = train(*on_mesh(tiny(train__steps=STEPS)), batches)
    config, mesh = on_mesh(
        tiny(model__dtype="bfloat16", model__remat="full", train__steps=STEPS), fsdp=2, expert=2, tensor=2
    )
    state, got = train(config, mesh, batches)
    for a, b in zip(got, want, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=3e-2)
    assert {leaf.dtype for leaf in named_leaves(state.params).values()} == {np.dtype(np.float32)}


def test_adam_moments_are_sharded_as_their_parameters():
    config, mesh = on_mesh(tiny(), fsdp=2, expert=2, tensor=2)
    optimizer = make_optimizer(config.optim, config.train.steps)
    state, shardings = init_state(config, optimizer, mesh)
    step = jax.jit(
        make_train_step(config, optimizer, STAGES["pretrain"].loss), out_shardings=(shardings, replicated(mesh))
    )
    with jax.set_mesh(mesh):
        state, _ = step(state, place(random_batch(config), mesh))
    moments = named_leaves(state.opt_state)
    for name, param in named_leaves(state.params).items():
        spec = param_spec(name.rpartition(".")[2], param.ndim)
        mirrors = [m for path, m in moments.items() if path.endswith("." + name) and m.shape == param.shape]
        assert len(mirrors) == 2, f"{name}: expected two moments, found {len(mirrors)}"
        for leaf in (param, *mirrors):
            assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), leaf.ndim), name
    split = [n for n, p in named_leaves(state.params).items() if not p.sharding.is_fully_replicated]
    assert len(split) == len(named_leaves(state.params)), "every parameter should be split on this mesh"
