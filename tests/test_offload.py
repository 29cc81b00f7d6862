"""Activations and moments in host memory: the same numbers, and they are where they should be. CPUs have that kind too."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import UserError
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import named_leaves, place, replicated
from mixtral_jax.stages import STAGES
from mixtral_jax.step import HOST, _require_host_memory, abstract_state, init_state, make_train_step
from tests.helpers import assert_trees_close, on_mesh, random_batch, tiny, train


@functools.cache
def trained(**changes):
    batches = [random_batch(tiny(), seed) for seed in range(2)]
    return train(*on_mesh(tiny(**changes), fsdp=2), batches)


@pytest.mark.parametrize(
    "changes",
    [
        dict(model__remat="offload"),
        pytest.param(dict(optim__offload=True), marks=pytest.mark.slow),
        pytest.param(
            dict(model__remat="offload", optim__offload=True, optim__name="muon", train__accumulation_steps=2),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_training_is_the_same(changes):
    rest = {name: value for name, value in changes.items() if "offload" not in (name[-7:], value)}
    want_state, want = trained(**rest)
    state, got = trained(**changes)
    for a, b in zip(got, want, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-5)
    assert_trees_close(state.params, want_state.params, 1e-5)


def test_the_moments_stay_on_the_host(tmp_path):
    """After the start, after a step, and after a checkpoint is restored."""
    config, mesh = on_mesh(tiny(optim__offload=True, model__num_layers=1), fsdp=2)
    optimizer = make_optimizer(config.optim, config.train.steps)
    state, shardings = init_state(config, optimizer, mesh)
    step = jax.jit(
        make_train_step(config, optimizer, STAGES["pretrain"].loss),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    assert_on_host(state)
    with jax.set_mesh(mesh):
        state, _ = step(state, place(random_batch(config), mesh))
        assert_on_host(state)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, state.params, state.opt_state, {}, {})
        checkpoints.finish()
        like, _ = abstract_state(config, optimizer, mesh)
        params, opt_state = checkpoints.restore(1, like.params, like.opt_state)
        checkpoints.close()
    assert_on_host(dataclasses.replace(state, params=params, opt_state=opt_state))
    for name, leaf in named_leaves(state.opt_state).items():
        np.testing.assert_array_equal(leaf, named_leaves(opt_state)[name], err_msg=name)


def assert_on_host(state):
    kinds = {name: leaf.sharding.memory_kind for name, leaf in named_leaves(state).items() if leaf.ndim}
    assert {kind for name, kind in kinds.items() if name.startswith("opt_state")} == {HOST}
    assert {kind for name, kind in kinds.items() if name.startswith("params")} == {"device"}


def test_nothing_of_a_layer_stays_on_the_device():
    """The saved arrays of all layers, with L in front: the scan's own input among them."""
    config, mesh = on_mesh(tiny(model__remat="offload"))

    def saved(remat):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        optimizer = make_optimizer(changed.optim, changed.train.steps)
        state, _ = abstract_state(changed, optimizer, mesh)
        with jax.set_mesh(mesh):
            traced = jax.jit(make_train_step(changed, optimizer, STAGES["pretrain"].loss)).trace(
                state, place(random_batch(changed), mesh)
            )
        stacked = f"f32[{config.model.num_layers},8,32,32]"
        return [part for part in str(traced.jaxpr).replace("\n", " ").split() if stacked in part.replace("<host>", "")]

    assert {("<host>" in part) for part in saved("outputs")} == {False}
    assert {("<host>" in part) for part in saved("offload")} == {True}


def test_devices_without_host_memory_are_refused(monkeypatch):
    config, mesh = on_mesh(tiny(optim__offload=True))

    class Bare:
        device_kind = "a chip"

        def addressable_memories(self):
            return []

    fake = type("Mesh", (), {"devices": np.array([Bare()], object)})()
    _require_host_memory(config, mesh)
    with pytest.raises(UserError, match=r"a chip has 0.*optim\.offload=False"):
        _require_host_memory(config, fake)
