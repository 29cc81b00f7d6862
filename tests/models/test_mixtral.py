"""What the parity goldens cannot see: the final norm's eps, the router's precision, and the count of dropped assignments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.models import mixtral, moe
from mixtral_jax.sharding import named_leaves
from tests.helpers import tiny

B, T = 2, 8


def block(**overrides):
    config = tiny(**overrides).model
    x = np.random.default_rng(0).standard_normal((B, T, config.d_model))
    return (
        mixtral.Block(config, nnx.Rngs(params=jax.random.key(0))),
        jnp.asarray(x, config.dtype),
        np.ones((B, T), bool),
    )


def test_the_final_norm_uses_the_eps_of_the_configuration():
    """With weights of zero the embedding alone reaches the final norm; here eps outweighs its square."""
    config = tiny(model__norm_eps=0.03).model
    like = mixtral.abstract(config)
    leaves = {name: np.zeros(leaf.shape, np.float32) for name, leaf in named_leaves(like).items()}
    leaves["embedding_VD"][:], leaves["final_norm_D"][:] = 0.1, 2.0
    model = jax.tree.unflatten(jax.tree.structure(like), list(leaves.values()))
    tokens = np.zeros((1, T), np.int32)
    x, _ = jax.jit(lambda model: model.hidden(tokens, tokens, tokens + 1))(model)
    np.testing.assert_allclose(x, 2.0 * 0.1 / np.sqrt(0.01 + 0.03), rtol=1e-5)


def test_the_router_is_float32_in_a_bfloat16_model(monkeypatch):
    layer, x, valid = block(model__dtype="bfloat16")
    seen = []

    class Enough(Exception):
        pass

    def route(logits, *rest):
        seen.append(logits)
        raise Enough

    monkeypatch.setattr(moe, "route", route)
    with pytest.raises(Enough):
        layer.experts(x, valid)
    want = np.asarray(x, np.float64) @ np.asarray(layer.w_router_DE[...], np.float64)
    assert seen[0].dtype == jnp.float32
    np.testing.assert_allclose(seen[0], want, atol=1e-5)


@pytest.mark.parametrize("lost", [0, 5])
def test_assignments_that_no_expert_computed_are_counted_as_dropped(monkeypatch, lost):
    layer, x, valid = block()
    valid[1, 3:] = False
    experts = moe.experts

    def lossy(*arguments):
        out, computed = experts(*arguments)
        return out, computed - lost

    monkeypatch.setattr(moe, "experts", lossy)
    _, stats, _ = layer.experts(x, valid)
    assert stats.dropped == lost
    assert stats.count_E.sum() == valid.sum() * layer.config.experts_per_token
