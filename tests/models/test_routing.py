"""The routers' choices, seen from outside: those of the blocks that run, in the order of the row, on every mesh."""

import jax
import numpy as np
import pytest

from mixtral_jax.models import mixtral
from mixtral_jax.models.routing import choices
from mixtral_jax.sharding import place, replicated
from tests.helpers import on_mesh, random_batch, shard, tiny

FIELDS = ("tokens_BT", "positions_BT", "segment_ids_BT")


def chosen(axes, **changes):
    """(config, model, batch, Choices on the host) of a model with a steep router: near-ties, which rounding decides, are rare."""
    config, mesh = on_mesh(tiny(**changes), **axes)
    model = mixtral.init(config.model, jax.random.key(0))
    model.layers.w_router_DE[...] = model.layers.w_router_DE[...] * 20
    if config.model.router_bias:
        model.layers.router_bias_E[...] = jax.random.normal(jax.random.key(1), model.layers.router_bias_E.shape) * 10
    batch = random_batch(config)
    fields = {name: batch[name] for name in FIELDS}
    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda model, batch: choices(model, *(batch[name] for name in FIELDS)), out_shardings=replicated(mesh)
        )
        found = jax.device_get(run(shard(model, mesh), place(fields, mesh)))
    return config, model, batch, found


def test_choices_are_those_that_the_model_ran_with():
    """Of layer 0 the logits by hand; of all layers the highest scores, their softmax, and the model's own statistics."""
    config, model, batch, found = chosen({}, model__router_bias=True)
    valid = batch["segment_ids_BT"] > 0
    _, stats_L = model.hidden(*(batch[name] for name in FIELDS))
    bias_LE = np.asarray(model.layers.router_bias_E[...])
    for layer in range(config.model.num_layers):
        index, gates, logits = (a[layer][valid] for a in found)
        order = np.argsort(-(logits + bias_LE[layer]), -1)[:, :2]
        np.testing.assert_array_equal(index, order)
        assert (order != np.argsort(-logits, -1)[:, :2]).any(), "the bias steers"
        picked = np.exp(np.take_along_axis(logits, order, -1))
        np.testing.assert_allclose(gates, picked / picked.sum(-1, keepdims=True), rtol=1e-5)
        np.testing.assert_array_equal(np.bincount(index.ravel(), minlength=8), stats_L.count_E[layer])
        assert (found.index_BTK[layer][~valid] == 8).all()
    # Without attention and experts what the router reads is the embedding.
    model.layers.w_o_NHD[...] *= 0
    model.layers.w_down_EFD[...] *= 0
    bare = choices(model, *(batch[name] for name in FIELDS))
    x = np.asarray(model.embedding_VD[...], np.float64)[batch["tokens_BT"]]
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + config.model.norm_eps)
    for layer in range(config.model.num_layers):
        want = x @ np.asarray(model.layers.w_router_DE[...])[layer]
        np.testing.assert_allclose(bare.logits_BTE[layer], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        (dict(context=2, tensor=2, expert=2), dict(model__dispatch="ring")),
        (dict(expert=4, data=2), dict(model__dispatch="ragged", model__scan_layers=False)),
    ],
    ids=["context, tensor, ring", "ragged, unrolled"],
)
def test_every_mesh_gives_the_same_choices_in_the_order_of_the_row(axes, changes):
    _, _, batch, want = chosen({})
    _, _, _, got = chosen(axes, **changes)
    np.testing.assert_array_equal(got.index_BTK, want.index_BTK)
    np.testing.assert_allclose(got.gates_BTK, want.gates_BTK, rtol=1e-4, atol=1e-5)
    valid = batch["segment_ids_BT"] > 0
    np.testing.assert_allclose(got.logits_BTE[:, valid], want.logits_BTE[:, valid], rtol=1e-4, atol=1e-3)
