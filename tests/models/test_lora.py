"""Adapters: nothing at the start, the merged weights' numbers later, on every mesh, and gradients of nothing else."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixtral_jax.config import LoraConfig
from mixtral_jax.losses import Totals, pretrain_loss
from mixtral_jax.models import decode, lora, mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import named_leaves, path_names, place
from tests.helpers import assert_trees_close, equations, on_mesh, random_batch, shard, tiny

ALL = ("attention", "experts", "router")


def lora_config(**overrides):
    return tiny(**dict(lora__rank=3, lora__alpha=6.0, lora__targets=ALL, model__router_bias=True) | overrides)


@functools.cache
def base_leaves():
    return jax.device_get(jax.tree.leaves(mixtral.init(lora_config().model, jax.random.key(1))))


def base_of(config):
    """The same weights under any configuration of how to compute."""
    return jax.tree.unflatten(jax.tree.structure(mixtral.abstract(config.model)), base_leaves())


def random_adapters(config, b_std=0.1):
    """Adapters whose B is not zero, each element from a stream of its parameter's own."""
    adapters = lora.init(config.model, config.lora, jax.random.key(2))

    def fill(path, leaf):
        name = path_names(path)[-1]
        if "_b_" not in name:
            return np.asarray(leaf)
        rng = np.random.default_rng(list(name.encode()))
        return (b_std * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, adapters)


@functools.cache
def batch():
    batch = random_batch(lora_config())
    for name in ("segment_ids_BT", "loss_weights_BT"):
        batch[name][3] = 0  # a row of nothing but padding
    return batch


def value_and_grad(config, mesh, base, adapters, loss_batch=None):
    """Loss, terms, RouterStats and the adapters' gradients on a mesh, on the host."""

    @jax.jit
    def program(adapters, base, batch):
        def loss_fn(adapters):
            return pretrain_loss(lora.attach(base, adapters), batch, Totals.of(batch), config.loss)

        return jax.value_and_grad(loss_fn, has_aux=True)(adapters)

    with jax.set_mesh(mesh):
        here = place(batch() if loss_batch is None else loss_batch, mesh)
        return jax.device_get(program(shard(adapters, mesh), shard(base, mesh), here))


def logits(model, b=2):
    fields = [batch()[name][:b] for name in ("tokens_BT", "positions_BT", "segment_ids_BT")]
    return jax.device_get(jax.jit(lambda model: model(*fields))(model))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_at_the_start_the_model_is_the_base_bit_by_bit(dtype):
    """The frozen base, held in the compute dtype, and the float32 weights that are cast to it anyway."""
    config = lora_config(model__dtype=dtype)
    base = lora.freeze(base_of(config))
    adapters = lora.init(config.model, config.lora, jax.random.key(2))
    for got, want in zip(logits(lora.attach(base, adapters)), logits(base_of(config)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    for name, leaf in named_leaves(adapters).items():
        if "_b_" in name:
            assert not leaf.any()
        else:  # std 1 / sqrt(fan in): x A is as large as x
            fan_in = {"DR": 32, "NHR": 32, "EDR": 32, "EFR": 48}[name.rpartition("_")[2]]
            assert float(leaf.std()) == pytest.approx(fan_in**-0.5, rel=0.2), name


@pytest.mark.parametrize("targets", [ALL, *(pytest.param((one,), marks=pytest.mark.slow) for one in ALL)], ids="+".join)
def test_merged_weights_equal_the_adapters_beside_the_base(targets):
    config = lora_config(lora__targets=targets)
    base, adapters = base_of(config), random_adapters(config)
    attached, merged = lora.attach(base, adapters), lora.merge(base, adapters)
    (want, want_stats), (got, stats), (plain, _) = logits(attached), logits(merged), logits(base)
    scale = np.abs(want).max()
    np.testing.assert_array_equal(stats.count_E, want_stats.count_E)
    np.testing.assert_allclose(got, want, atol=1e-5 * scale)
    assert np.abs(want - plain).max() > 1e-2 * scale, "the adapters should do something"
    # What is merged is what was named, every expert of it.
    changed = {n for n, w in named_leaves(merged).items() if (np.asarray(w) != named_leaves(base)[n]).any()}
    assert changed == {f"layers.{name}" for name in lora.factors(config.lora)}
    for name in changed & {"layers.w_gate_EDF", "layers.w_up_EDF", "layers.w_down_EFD"}:
        delta = np.asarray(named_leaves(merged)[name]) - named_leaves(base)[name]
        assert (np.abs(delta).max((-1, -2)) > 1e-3).all(), f"{name}: an expert of a layer has not changed"


@functools.cache
def reference():
    """One device: loss, terms and gradients of the adapters."""
    config, mesh = on_mesh(lora_config())
    return value_and_grad(config, mesh, base_of(config), random_adapters(config))


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_merged_weights():
    """Autodiff through W + scale A B of the plain model, whose gradients are tested against oracles of their own."""
    config, mesh = on_mesh(lora_config())

    def loss_fn(adapters, base, batch):
        return pretrain_loss(lora.merge(base, adapters), batch, Totals.of(batch), config.loss)

    with jax.set_mesh(mesh):
        arguments = shard(random_adapters(config), mesh), shard(base_of(config), mesh), place(batch(), mesh)
        (loss, (terms, _)), want = jax.device_get(jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(*arguments))
    (got, (got_terms, _)), grads = reference()
    assert float(got) == pytest.approx(float(loss), rel=1e-5)
    for name, value in terms.items():
        assert float(got_terms[name]) == pytest.approx(float(value), rel=1e-5), name
    assert_trees_close(grads, want, 1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in named_leaves(want).values())


# (dispatch, remat, mesh). Every axis alone and together with what it meets inside the experts.
QUICK = [
    ("ragged", "none", dict(expert=2, fsdp=2, tensor=2)),
    ("ring", "full", dict(expert=4, context=2)),
]
MESHES = [
    ("ring", "none", dict(expert=8)),
    ("ragged", "none", dict(expert=8)),
    ("ragged", "full", dict(expert=4, fsdp=2)),
    ("ring", "outputs", dict(expert=2, fsdp=2, tensor=2)),
    ("ring", "full", dict(expert=2, tensor=2, context=2)),
    ("ragged", "full", dict(expert=2, fsdp=2, context=2)),
    ("ring", "outputs", dict(fsdp=2, tensor=2, context=2)),
    ("ring", "none", dict(fsdp=8)),
    ("ragged", "none", dict(data=2, expert=4)),
]


@pytest.mark.parametrize(
    ("dispatch", "remat", "axes"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MESHES)], ids=str
)
def test_every_mesh_computes_the_same(dispatch, remat, axes):
    config, mesh = on_mesh(lora_config(model__dispatch=dispatch, model__remat=remat), **axes)
    (want, (want_terms, want_stats)), want_grads = reference()
    (got, (terms, stats)), grads = value_and_grad(config, mesh, base_of(config), random_adapters(config))
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    for name, value in want_terms.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=1e-5), name
    np.testing.assert_array_equal(stats.count_E, want_stats.count_E)
    assert not stats.dropped.any()
    assert_trees_close(grads, want_grads, 1e-5)


@pytest.mark.slow
def test_unrolled_layers_and_a_frozen_bfloat16_base_agree():
    """The base held in bfloat16 is what bfloat16 computes with anyway: the same bits."""
    config, mesh = on_mesh(lora_config(model__dtype="bfloat16", model__scan_layers=False))
    base, adapters = base_of(config), random_adapters(config)
    frozen = lora.freeze(base)
    for name, leaf in named_leaves(frozen).items():
        is32 = "norm" in name or "router" in name
        assert leaf.dtype == (jnp.float32 if is32 else jnp.bfloat16), name
    (want, _), want_grads = value_and_grad(config, mesh, base, adapters)
    (got, _), grads = value_and_grad(config, mesh, frozen, adapters)
    assert got == want
    jax.tree.map(np.testing.assert_array_equal, grads, want_grads)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype(np.float32)}
    exact, _ = reference()
    assert float(got) == pytest.approx(float(exact[0]), rel=2e-2)


# Sizes that occur nowhere but in the weights.
SIZES = dict(d_model=44, num_heads=4, num_kv_heads=2, head_dim=22, d_ff=52, num_experts=6, vocab_size=118)


def test_the_base_gets_no_gradient_product():
    """No matmul makes an array of a weight's shape, where the gradient in all weights has one for each."""
    changes = {f"model__{key}": value for key, value in SIZES.items()}
    config = lora_config(model__remat="full", model__expert_block=7, **changes)
    c, batch = config.model, random_batch(config)
    base, adapters = mixtral.abstract(c), lora.abstract(c, config.lora)

    def products(params, model):
        def loss_fn(params, base):
            return pretrain_loss(model(params, base), batch, Totals.of(batch), config.loss)[0]

        jaxpr = jax.make_jaxpr(jax.grad(loss_fn))(params, base)
        return {
            tuple(sorted(e.outvars[0].aval.shape)) for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"
        }

    shapes = {(44, 52), (44, 4, 22), (44, 2, 22), (44, 6), (44, 118)}
    weights = {tuple(sorted(shape)) for shape in shapes}
    assert weights <= products(base, lambda params, _: params), "the test must see them where they are"
    assert not weights & products(adapters, lambda params, base: lora.attach(base, params))


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["adapters", "all_weights"])
def test_without_expert_adapters_the_experts_gradients_are_dropped(full):
    """The experts' own kernel would make them; nobody reads them, and the compiled program has no product of D x F."""
    changes = {f"model__{key}": value for key, value in SIZES.items()}
    config = lora_config(model__remat="full", model__expert_block=7, lora__targets=("attention",), **changes)
    base, adapters = mixtral.abstract(config.model), lora.abstract(config.model, config.lora)

    def loss_fn(params, base, batch):
        model = params if full else lora.attach(base, params)
        return pretrain_loss(model, batch, Totals.of(batch), config.loss)[0]

    lowered = jax.jit(jax.grad(loss_fn)).lower(base if full else adapters, base, random_batch(config))
    products = re.findall(r"= f32\[(?:44,52|52,44)\]\S* dot\(", lowered.compile().as_text())
    assert len(products) == (3 if full else 0), "gate, up and down"


def test_the_plain_model_is_not_touched():
    config = lora_config()
    base = base_of(config)
    before = jax.tree.structure(base)
    attached = lora.attach(base, random_adapters(config))
    assert base.layers.lora is None
    assert jax.tree.structure(base) == before
    assert len(jax.tree.leaves(attached)) > len(jax.tree.leaves(base))


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_every_optimizer_knows_the_adapters(name):
    """Its state holds what mirrors adapters, and counters; every factor of a layer or an expert is a matrix of its own."""
    config = lora_config(optim__name=name)
    adapters = random_adapters(config)
    optimizer = make_optimizer(config.optim, 10)
    state = optimizer.init(adapters)
    assert all("lora_" in name or not leaf.ndim for name, leaf in named_leaves(state).items())
    factored = [n for n in named_leaves(state) if "v_row" in n] if name == "adafactor" else ["mu"]
    updates, _ = jax.jit(optimizer.update)(adapters, state, adapters)
    for leaf_name, update in named_leaves(updates).items():
        assert np.isfinite(update).all()
        assert np.asarray(update).any(), leaf_name
    assert len(factored) == (14 if name == "adafactor" else 1), "all but the router's are factored"


def test_only_the_adapters_are_trained():
    """Ten updates lower the loss, and every factor moves."""
    config = lora_config(optim__learning_rate=1e-2, optim__warmup_steps=1, train__steps=10)
    base, adapters = base_of(config), lora.init(config.model, config.lora, jax.random.key(2))
    base = jax.tree.map(jnp.asarray, base)
    optimizer = make_optimizer(config.optim, config.train.steps)
    totals = Totals.of(batch())

    def loss_fn(adapters):
        return pretrain_loss(lora.attach(base, adapters), batch(), totals, config.loss)[0]

    def step(carry, _):
        adapters, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(adapters)
        updates, state = optimizer.update(grads, state, adapters)
        return (optax.apply_updates(adapters, updates), state), loss

    carry = (adapters, optimizer.init(adapters))
    (trained, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 10))(carry)
    assert losses[-1] < 0.95 * losses[0]
    for (name, new), old in zip(named_leaves(trained).items(), jax.tree.leaves(adapters), strict=True):
        assert (np.asarray(new) != np.asarray(old)).any(), name


@pytest.mark.slow
def test_decoding_takes_attached_weights_and_prepare_merges_them():
    config = lora_config()
    base, adapters = base_of(config), random_adapters(config)
    attached, merged = lora.attach(base, adapters), lora.merge(base, adapters)
    tokens, length, token = batch()["tokens_BT"][:2, :6], np.full(2, 6, np.int32), np.asarray([5, 7], np.int32)
    results = []
    for weights in (merged, attached, decode.prepare(attached)):
        first, cache = decode.prefill(weights, tokens, length, 8)
        second, _ = decode.decode(weights, cache, token, np.ones(2, bool))
        results.append((np.asarray(first), np.asarray(second)))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert attached.layers.lora is not None, "prepare must not take the model apart"


def test_counts_of_the_published_model():
    from configs import mixtral_8x7b
    from mixtral_jax.config import from_config_dict

    model = from_config_dict(mixtral_8x7b.get_config()).model
    # By hand, R = 16. Attention a layer: q 16 (4096 + 4096), k and v 16 (4096 + 1024), o as q. Expert: 3 x 16 (4096 + 14336).
    attention, expert, router = 16 * (2 * 8192 + 2 * 5120), 3 * 16 * 18432, 16 * (4096 + 8)
    both = LoraConfig(16, 16.0, ("attention", "experts"))
    assert lora.parameter_counts(model, both) == (
        32 * (attention + 8 * expert),
        32 * (attention + 2 * expert),
    )
    only = dataclasses.replace(both, targets=("router",))
    assert lora.parameter_counts(model, only) == (32 * router, 32 * router)
