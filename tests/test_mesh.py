"""Every mesh computes the same: loss, gradients, norm; and 20 steps of training stay together. float32, 8 fake devices."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from mixtral_jax.losses import Totals
from mixtral_jax.models import mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import constrain_params, named_leaves, param_spec, path_names, place, replicated
from mixtral_jax.stages import STAGES
from mixtral_jax.step import init_state, make_train_step
from tests.helpers import assert_trees_close, gradients, on_mesh, random_batch, shard, tiny, train

MESHES = {
    "fsdp8": dict(fsdp=8),
    "expert8": dict(expert=8),
    "tensor2_fsdp4": dict(tensor=2, fsdp=4),
    "data2_expert4": dict(data=2, expert=4),
    "data2_fsdp2_expert2": dict(data=2, fsdp=2, expert=2),
    "fsdp2_expert2_tensor2": dict(fsdp=2, expert=2, tensor=2),
}
RAGGED = ("expert8", "data2_fsdp2_expert2", "fsdp2_expert2_tensor2")  # the others use the ring
QUICK = ("expert8", "fsdp2_expert2_tensor2")  # trained for 20 steps by default, the others are slow
STEPS = 20


def mesh_config(name):
    return on_mesh(tiny(train__steps=STEPS, model__dispatch="ragged" if name in RAGGED else "ring"), **MESHES[name])


@functools.cache
def reference():
    """One device: loss, gradients and a training run."""
    config, mesh = on_mesh(tiny(train__steps=STEPS))
    params = mixtral.init(config.model, jax.random.key(1))
    batches = [random_batch(config, seed) for seed in range(STEPS)]
    return batches, gradients(config, mesh, params, batches[0]), train(config, mesh, batches)


@pytest.mark.parametrize("name", [name for name in MESHES if "data" in name or "8" in name])
def test_loss_and_gradients_agree(name):
    batches, ((want, (want_terms, want_stats)), want_grads), _ = reference()
    config, mesh = mesh_config(name)
    params = mixtral.init(config.model, jax.random.key(1))
    (got, (terms, stats)), grads = gradients(config, mesh, params, batches[0])
    assert got == pytest.approx(want, rel=1e-5)
    for name, value in want_terms.items():
        assert terms[name] == pytest.approx(value, rel=1e-5), name
    np.testing.assert_array_equal(stats.count_E, want_stats.count_E)
    assert not stats.dropped.any()
    assert_trees_close(grads, want_grads, 1e-5)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MESHES],
)
def test_twenty_steps_agree(name):
    batches, _, (want_state, want_log) = reference()
    config, mesh = mesh_config(name)
    state, log = train(config, mesh, batches)
    for step, (got, want) in enumerate(zip(log, want_log, strict=True)):
        for name in ("loss", "token_loss", "balance_loss", "gradient_norm"):
            assert got[name] == pytest.approx(want[name], rel=1e-5), f"step {step}: {name}"
        np.testing.assert_array_equal(got["load_LE"], want["load_LE"])
    assert_trees_close(state.params, want_state.params, 1e-4)
    assert want_log[-1]["loss"] != pytest.approx(want_log[0]["loss"], rel=1e-3), "nothing was trained"


# Every combination of kernel, dispatch and mesh axes that fits 8 devices: (backend, dispatch, expert, fsdp, tensor, context).
GRID = [
    case
    for case in itertools.product(("blocks", "dense"), ("ragged", "ring"), (1, 2, 4, 8), (1, 2), (1, 2), (1, 2))
    if np.prod(case[2:]) <= 8
]


def covering(cases):
    """A few cases in which every pair of values of two positions occurs that occurs in any; greedily, the first best."""

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    chosen, missing = [], set().union(*map(pairs, cases))
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def grid_parameters():
    default = covering(GRID)
    for case in GRID:
        marks = [] if case in default else [pytest.mark.slow]
        yield pytest.param(*case, marks=marks, id="{}-{}-expert{}-fsdp{}-tensor{}-context{}".format(*case))


# A router bias makes tokens choose: as they like; one expert all of them, and a second; the same K experts all of them.
SCENARIOS = {"natural": [], "all_on_one": [5], "all_on_the_same": [2, 3]}


@functools.cache
def host_leaves():
    """The parameters with a router bias, made once; backend, dispatch and K do not change them."""
    return jax.device_get(jax.tree.leaves(mixtral.init(tiny(model__router_bias=True).model, jax.random.key(1))))


def biased(config, favourites):
    """Parameters whose router bias sends every token to these experts first."""
    bias_E = np.zeros(config.model.num_experts, np.float32)
    bias_E[favourites] = 1e3

    def fill(path, leaf):
        return leaf + bias_E[None, :] if path_names(path)[-1] == "router_bias_E" else leaf

    treedef = jax.tree.structure(mixtral.abstract(config.model))
    return jax.tree_util.tree_map_with_path(fill, jax.tree.unflatten(treedef, host_leaves()))


def grid_batch(config):
    """Packed documents, padding at the end of rows, and one row (a device's only one, on 8) of nothing but padding."""
    batch = random_batch(config)
    for name in ("segment_ids_BT", "loss_weights_BT"):
        batch[name][3] = 0
    return batch


def scenarios(config, mesh):
    """For each scenario loss, terms, RouterStats, gradients and their norm, all by one compiled program."""
    batch = grid_batch(config)

    @jax.jit
    def program(params, batch):
        def loss_fn(params):
            return STAGES["pretrain"].loss(params, batch, Totals.of(batch), config)

        (loss, (terms, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        grads = constrain_params(grads)
        return dict(terms, loss=loss, norm=optax.tree.norm(grads)), stats, grads

    with jax.set_mesh(mesh):
        on_device = place(batch, mesh)
        return {
            name: jax.device_get(program(shard(biased(config, favourites), mesh), on_device))
            for name, favourites in SCENARIOS.items()
        }


@functools.cache
def oracle():
    config, mesh = on_mesh(tiny(model__router_bias=True, model__expert_backend="dense"))
    return scenarios(config, mesh)


@pytest.mark.parametrize(("backend", "dispatch", "expert", "fsdp", "tensor", "context"), list(grid_parameters()))
def test_every_combination_equals_the_dense_oracle(backend, dispatch, expert, fsdp, tensor, context):
    config, mesh = on_mesh(
        tiny(model__router_bias=True, model__expert_backend=backend, model__dispatch=dispatch),
        expert=expert,
        fsdp=fsdp,
        tensor=tensor,
        context=context,
    )
    got = scenarios(config, mesh)
    for name, (want_terms, want_stats, want_grads) in oracle().items():
        terms, stats, grads = got[name]
        for term, value in want_terms.items():
            assert terms[term] == pytest.approx(value, rel=1e-5), f"{name}: {term}"
        np.testing.assert_array_equal(stats.count_E, want_stats.count_E, err_msg=name)
        assert not stats.dropped.any(), name
        for field in ("prob_E", "z", "entropy", "tokens"):
            np.testing.assert_allclose(
                getattr(stats, field), getattr(want_stats, field), rtol=1e-5, err_msg=f"{name}: {field}"
            )
        assert_trees_close(grads, want_grads, 1e-5)


def test_the_scenarios_are_what_they_are_called():
    """Zero-token experts, one expert with every token, and padding that no expert sees."""
    tokens = grid_batch(tiny())["segment_ids_BT"].astype(bool).sum()
    counts = {name: stats.count_E for name, (_, stats, _) in oracle().items()}
    assert all((count.sum(-1) == 2 * tokens).all() for count in counts.values())
    assert (counts["all_on_one"][:, 5] == tokens).all()
    assert ((counts["all_on_the_same"] > 0).sum(-1) == 2).all()
    assert (counts["natural"] > 0).all()


def test_all_tokens_on_one_expert_and_nowhere_else():
    """K = 1: one device does all the work, by either dispatch."""
    batch = grid_batch(tiny())
    results = []
    for axes, backend, dispatch in (({}, "dense", "ring"), (dict(expert=4), "blocks", "ragged")):
        changes = dict(model__experts_per_token=1, model__router_bias=True)
        config, mesh = on_mesh(tiny(**changes, model__expert_backend=backend, model__dispatch=dispatch), **axes)
        results.append(gradients(config, mesh, biased(config, [6]), batch))
    ((want, (_, want_stats)), want_grads), ((got, (_, stats)), grads) = results
    assert (want_stats.count_E > 0).sum() == 2, "two layers with one expert each should do all the work"
    np.testing.assert_array_equal(stats.count_E, want_stats.count_E)
    assert not stats.dropped.any()
    assert got == pytest.approx(want, rel=1e-5)
    assert_trees_close(grads, want_grads, 1e-5)


def test_a_train_step_counts_what_its_buffers_drop():
    """Half the even share, in blocks of 8 rows: what is reported is what did not fit, whole assignments, every layer."""
    config, mesh = on_mesh(tiny(model__dispatch="ragged", model__buffer_factor=0.5), expert=4)
    _, log = train(config, mesh, [random_batch(config)])
    assert np.isfinite(log[0]["loss"])
    assert np.isfinite(log[0]["gradient_norm"])
    assignments = log[0]["tokens"] * config.model.experts_per_token
    dropped_L = log[0]["dropped_L"] * assignments
    np.testing.assert_allclose(dropped_L, np.round(dropped_L), atol=1e-3)
    even = config.train.batch_size * config.train.seq_len * config.model.experts_per_token // 4
    room = 4 * even // 2
    assert (dropped_L >= assignments - room - 0.5).all()
    assert (dropped_L < assignments).all()
    _, log = train(
        *on_mesh(dataclasses.replace(config, model=dataclasses.replace(config.model, buffer_factor=4.0)), expert=4),
        [random_batch(config)],
    )
    assert not log[0]["dropped_L"].any()


@pytest.mark.parametrize("dispatch", ["ragged", pytest.param("ring", marks=pytest.mark.slow)])
def test_bfloat16_trains_like_float32_to_its_own_accuracy(dispatch):
    """bf16 keeps 8 bits, so losses agree to a fraction of a percent; the mesh's collectives run in bf16 too."""
    batches = [random_batch(tiny(), seed) for seed in range(3)]
    _, want = train(*on_mesh(tiny(train__steps=STEPS)), batches)
    config, mesh = on_mesh(
        tiny(model__dtype="bfloat16", model__remat="full", model__dispatch=dispatch, train__steps=STEPS),
        fsdp=2,
        expert=2,
        tensor=2,
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
