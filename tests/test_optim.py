"""Schedules by hand; AdamW against optax and numpy; Muon and Adafactor against optax on each matrix alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mixtral_jax import optim as optim_lib
from mixtral_jax.config import MeshConfig, OptimConfig, UserError
from mixtral_jax.sharding import make_mesh, named_leaves, tree_shardings
from tests.helpers import tiny

L, V, D, N, G, H, F, E = 2, 10, 8, 4, 2, 3, 12, 3
SHAPES = {
    "attention_norm_D": (D,),
    "w_q_DNH": (D, N, H),
    "w_k_DGH": (D, G, H),
    "w_v_DGH": (D, G, H),
    "w_o_NHD": (N, H, D),
    "experts_norm_D": (D,),
    "w_router_DE": (D, E),
    "w_gate_EDF": (E, D, F),
    "w_up_EDF": (E, D, F),
    "w_down_EFD": (E, F, D),
    "router_bias_E": (E,),
}
# The 2-D matrices Muon must see, spelled out here: a layer's (or one expert's) array -> rows and columns.
MATRIX_SHAPES = {
    "w_q_DNH": (D, N * H),
    "w_k_DGH": (D, G * H),
    "w_v_DGH": (D, G * H),
    "w_o_NHD": (N * H, D),
    "w_gate_EDF": (D, F),
    "w_up_EDF": (D, F),
    "w_down_EFD": (F, D),
}
NOT_MUON = [
    "embedding_VD",
    "head_DV",
    "final_norm_D",
    "layers.attention_norm_D",
    "layers.experts_norm_D",
    "layers.w_router_DE",
]


def config(**changes) -> OptimConfig:
    values = {
        "name": "adamw", "learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0, "decay_steps": 0, "final_lr_ratio": 0.1,
        "weight_decay": 0.0, "decay_embeddings": False, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "clip_norm": 1.0, "moment_dtype": "float32",
            "freeze_router": False, "offload": False,
    }  # fmt: skip
    return OptimConfig(**values | changes)


class Layers(nnx.Module):
    def __init__(self, rng):
        for name, shape in SHAPES.items():
            setattr(self, name, nnx.Param(jnp.asarray(rng.normal(size=(L, *shape)), jnp.float32)))


class Model(nnx.Module):
    def __init__(self, rng):
        self.embedding_VD = nnx.Param(jnp.asarray(rng.normal(size=(V, D)), jnp.float32))
        self.head_DV = nnx.Param(jnp.asarray(rng.normal(size=(D, V)), jnp.float32))
        self.final_norm_D = nnx.Param(jnp.asarray(rng.normal(size=(D,)), jnp.float32))
        self.layers = Layers(rng)

    def __call__(self):
        """Models are callable, and optax takes callables for functions that return masks."""


def model(seed=0):
    return Model(np.random.default_rng(seed))


def trajectory(tx):
    """Ten jitted steps with donated state on random gradients: updates of each step by name, final params and state."""
    params = model()
    state = jax.jit(tx.init)(params)

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return updates, state, optax.apply_updates(params, updates)

    step = jax.jit(step, donate_argnums=(1, 2))
    history = []
    for i in range(10):
        updates, state, params = step(model(i + 1), state, params)
        history.append({name: np.asarray(leaf) for name, leaf in named_leaves(updates).items()})
    return history, params, state


@functools.cache
def run(c):
    return trajectory(optim_lib.make_optimizer(c, 10))


def matrices(name, array):
    """All 2-D matrices in a stacked array, in order."""
    return np.asarray(array).reshape(-1, *MATRIX_SHAPES[name])


# ---- schedules


def lr_values(steps, **changes):
    schedule = optim_lib.learning_rate_schedule(config(learning_rate=2.0, **changes), steps)
    return np.array([schedule(k) for k in range(steps + 2)])


def test_warmup_cosine_by_hand():
    lr = lr_values(12, schedule="warmup_cosine", warmup_steps=4, final_lr_ratio=0.1)
    np.testing.assert_allclose(lr[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(lr[7], 2.0 * 0.55, rtol=1e-6)  # half-way: p = (8 - 4) / 8
    np.testing.assert_allclose(lr[5], 2.0 * (0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2), rtol=1e-6)
    np.testing.assert_allclose(lr[11:], 0.2, rtol=1e-6)  # the last update, and whatever follows


def test_warmup_stable_decay_by_hand():
    lr = lr_values(10, schedule="warmup_stable_decay", warmup_steps=2, decay_steps=4, final_lr_ratio=0.0)
    np.testing.assert_allclose(lr, [1, 2, 2, 2, 2, 2, 1.5, 1, 0.5, 0, 0, 0], atol=1e-6)


def test_constant_and_edges_of_warmup():
    np.testing.assert_allclose(lr_values(4, warmup_steps=2), [1, 2, 2, 2, 2, 2])
    np.testing.assert_allclose(lr_values(2, warmup_steps=0), 2.0)
    np.testing.assert_allclose(lr_values(2, schedule="warmup_cosine", warmup_steps=2), [1, 2, 0.2, 0.2], rtol=1e-6)
    assert lr_values(3, schedule="warmup_cosine", warmup_steps=0)[2] == pytest.approx(0.2)


# ---- names


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_zero_gradient_decays_exactly_the_right_parameters(name, decay_embeddings):
    tx = optim_lib.make_optimizer(config(name=name, weight_decay=0.5, decay_embeddings=decay_embeddings), 10)
    params = model()
    spared = ["embedding_VD"] * (not decay_embeddings)
    spared += ["final_norm_D", "layers.attention_norm_D", "layers.experts_norm_D", "layers.router_bias_E"]
    updates = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0])(params)
    for key, update in named_leaves(updates).items():
        expected = 0.0 if key in spared else -0.01 * 0.5 * named_leaves(params)[key]
        np.testing.assert_allclose(update, expected * jnp.ones_like(update), rtol=1e-5, atol=1e-9, err_msg=key)


def test_unknown_names_and_ranks_are_refused():
    with pytest.raises(ValueError, match="scale_D"):
        optim_lib.decays("scale_D", config())
    for name in ("muon", "adafactor"):
        with pytest.raises(ValueError, match="MATRICES"):
            optim_lib.make_optimizer(config(name=name), 10).init({"w_new_DF": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="L in front"):
        optim_lib.make_optimizer(config(name="adafactor"), 10).init({"w_q_DNH": jnp.ones((2, 3))})


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_router_bias_is_outside_even_with_bad_gradients(name):
    tx = optim_lib.make_optimizer(config(name=name, weight_decay=0.5), 10)
    params = model()
    state = tx.init(params)
    assert not [key for key in named_leaves(state) if "router_bias" in key]
    grads = model(1)
    grads.layers.router_bias_E.set_value(jnp.full((L, E), jnp.nan))
    updates, _ = jax.jit(tx.update)(grads, state, params)
    for key, update in named_leaves(updates).items():
        assert np.all(np.isfinite(update))
        assert np.any(update != 0) == ("router_bias" not in key), key


# ---- AdamW


def test_adamw_is_optax_adamw_bit_for_bit():
    c = config(weight_decay=0.1, schedule="warmup_cosine", warmup_steps=3, decay_embeddings=True)
    ours, params, _ = run(c)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in str(path), model())
    oracle = optax.adamw(
        optim_lib.learning_rate_schedule(c, 10), c.b1, c.b2, c.eps, weight_decay=0.1, mask=lambda _: mask
    )
    theirs, their_params, _ = trajectory(oracle)
    for mine, their in zip(ours, theirs):
        for key in mine:
            if "router_bias" not in key:
                np.testing.assert_array_equal(mine[key], their[key], err_msg=key)
    np.testing.assert_array_equal(params.layers.w_gate_EDF[...], their_params.layers.w_gate_EDF[...])


def test_adamw_is_the_formula():
    c = config(weight_decay=0.1, b1=0.8, b2=0.9, eps=1e-3)
    history, _, _ = run(c)
    p = np.asarray(model().layers.w_o_NHD[...], np.float64)
    m = v = np.zeros_like(p)
    for t in range(1, 6):
        g = np.asarray(model(t).layers.w_o_NHD[...], np.float64)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        update = -0.01 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + 0.1 * p)
        np.testing.assert_allclose(history[t - 1]["layers.w_o_NHD"], update, rtol=2e-5, atol=1e-8)
        p = p + update


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bfloat16_moments_are_stored_so_and_stay_near_float32(name):
    exact, _, _ = run(config(name=name))
    rounded, params, state = run(config(name=name, moment_dtype="bfloat16"))
    moments = {key: leaf for key, leaf in named_leaves(state).items() if ".mu." in key or ".nu." in key}
    assert {leaf.dtype for leaf in moments.values()} == {jnp.dtype("bfloat16")}
    assert sum(".nu." in key for key in moments) == (13 if name == "adamw" else 6)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for key in exact[0]:
        # The first update knows no rounded moment and is computed in float32. Later, rounding is 2^-9 of each moment.
        for i, tolerance in ((0, 1e-5), (9, 0.01)):
            error = np.linalg.norm(rounded[i][key] - exact[i][key])
            assert error <= tolerance * np.linalg.norm(exact[i][key]), (key, i, error)


def test_bfloat16_moments_are_only_stored_and_arithmetic_is_float32():
    history, _, _ = run(config(name="adamw", moment_dtype="bfloat16"))
    g1, g2 = (np.asarray(model(i).layers.w_o_NHD[...]) for i in (1, 2))
    m, v = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (0.1 * g1, 0.05 * g1**2))
    m, v = 0.9 * m + 0.1 * g2, 0.95 * v + 0.05 * g2**2
    update = -0.01 * m / (1 - 0.9**2) / (np.sqrt(v / (1 - 0.95**2)) + 1e-8)
    np.testing.assert_allclose(history[1]["layers.w_o_NHD"], update, rtol=1e-4, atol=1e-7)


def test_moments_that_bfloat16_cannot_decay_are_refused():
    with pytest.raises(UserError, match=r"b2=0\.999"):
        tiny(optim__b2=0.999, optim__moment_dtype="bfloat16")
    with pytest.raises(UserError, match="adafactor"):
        tiny(optim__name="adafactor", optim__moment_dtype="bfloat16")
    # What the first refusal is about, and that 0.996 is on the right side.
    values = jnp.linspace(1, 2, 256, endpoint=False).astype(jnp.bfloat16)
    shrunk = {b2: (values.astype(jnp.float32) * b2).astype(jnp.bfloat16) < values for b2 in (0.996, 0.999)}
    assert shrunk[0.996].all()
    assert not shrunk[0.999].any()


# ---- Muon


def test_muon_is_optax_muon_on_every_matrix_alone():
    history, _, _ = run(config(name="muon"))
    alone = optax.contrib.muon(0.01, consistent_rms=0.2)
    for name in MATRIX_SHAPES:
        tree = {str(i): jnp.asarray(x) for i, x in enumerate(matrices(name, getattr(model().layers, name)[...]))}
        assert len(tree) == (L * E if "E" in name else L)
        state, update = alone.init(tree), jax.jit(alone.update)
        for i, ours in enumerate(history[:3]):
            g = {str(j): jnp.asarray(x) for j, x in enumerate(matrices(name, getattr(model(i + 1).layers, name)[...]))}
            updates, state = update(g, state, tree)
            for j, x in enumerate(matrices(name, ours["layers." + name])):
                np.testing.assert_allclose(x, updates[str(j)], rtol=1e-4, atol=1e-6, err_msg=f"{name} {j}, step {i}")


def test_muon_updates_are_orthogonal_with_rms_of_adamw():
    history, _, _ = run(config(name="muon"))
    for name, shape in MATRIX_SHAPES.items():
        for x in matrices(name, history[0]["layers." + name]) / 0.01:
            s = np.linalg.svd(x / (0.2 * np.sqrt(max(shape))), compute_uv=False)
            assert 0.6 < s.min() <= s.max() < 1.3, (name, s)
            assert 0.14 < np.sqrt(np.mean(x**2)) < 0.24
    assert np.linalg.svd(np.asarray(model(1).layers.w_o_NHD[0]).reshape(N * H, D), compute_uv=False).max() > 4


def test_muon_gives_adamw_to_what_is_no_matrix():
    for mine, theirs in zip(run(config(name="muon"))[0], run(config(name="adamw"))[0]):
        same = [key for key in mine if np.allclose(mine[key], theirs[key], rtol=1e-5) and "router_bias" not in key]
        assert sorted(same) == sorted(NOT_MUON)


def test_muon_on_a_mesh_is_the_same_and_never_gathers_experts():
    layers, experts, d, f = 5, 6, 16, 32
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=2))
    params = {"w_gate_EDF": jnp.asarray(np.random.default_rng(0).normal(size=(layers, experts, d, f)), jnp.float32)}
    tx = optim_lib.make_optimizer(config(name="muon"), 10)
    state = tx.init(params)
    expected, _ = jax.jit(tx.update)(params, state, params)
    p_shard, s_shard = tree_shardings(params, mesh, params), tree_shardings(state, mesh, params)
    step = jax.jit(tx.update, in_shardings=(p_shard, s_shard, p_shard), out_shardings=(p_shard, s_shard))
    placed = jax.device_put(params, p_shard), jax.device_put(state, s_shard), jax.device_put(params, p_shard)
    compiled = step.lower(*placed).compile()
    updates, new_state = compiled(*placed)
    np.testing.assert_allclose(updates["w_gate_EDF"], expected["w_gate_EDF"], rtol=1e-4, atol=1e-6)
    moments = [leaf for key, leaf in named_leaves(new_state).items() if key.endswith("mu.w_gate_EDF")]
    assert [leaf.sharding.spec for leaf in moments] == [PartitionSpec(None, "expert", "fsdp", "tensor")]
    # At most this shard's experts of one layer are gathered; optax.contrib.muon gathers all of every layer.
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", compiled.as_text())
    assert gathered
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in gathered) <= experts // 2 * d * f


# ---- Adafactor


def test_adafactor_is_optax_on_every_matrix_alone():
    history, _, _ = run(config(name="adafactor"))
    alone = optax.adafactor(0.01, min_dim_size_to_factor=1, multiply_by_parameter_scale=False)
    for name in MATRIX_SHAPES:
        tree = list(map(jnp.asarray, matrices(name, getattr(model().layers, name)[...])))
        state, update = alone.init(tree), jax.jit(alone.update)
        for i, ours in enumerate(history[:3]):
            g = list(map(jnp.asarray, matrices(name, getattr(model(i + 1).layers, name)[...])))
            updates, state = update(g, state, tree)
            for j, x in enumerate(matrices(name, ours["layers." + name])):
                np.testing.assert_allclose(x, updates[j], rtol=1e-5, atol=1e-8, err_msg=f"{name} {j}, step {i}")
    # A norm is not factored; its RMS is clipped per layer.
    g = np.asarray(model(1).layers.experts_norm_D[...])
    np.testing.assert_allclose(history[0]["layers.experts_norm_D"], -0.01 * np.sign(g), rtol=1e-5)


def test_adafactor_state_is_small_and_minimises():
    tx = optim_lib.make_optimizer(config(name="adafactor", learning_rate=0.05), 100)
    params = model()
    state = tx.init(params)
    shapes = {key: leaf.shape for key, leaf in named_leaves(state).items()}
    prefix = "0.inner_states.adafactor.inner_state."
    assert shapes[prefix + "v_row.layers.w_q_DNH"] == (L, D)
    assert shapes[prefix + "v_col.layers.w_q_DNH"] == (L, N, H)
    assert shapes[prefix + "v_row.layers.w_down_EFD"] == (L, E, F)
    assert shapes[prefix + "v_col.layers.w_down_EFD"] == (L, E, D)
    assert shapes[prefix + "v.layers.attention_norm_D"] == (L, D)
    assert prefix + "v.layers.w_q_DNH" not in shapes
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 0.4 * size

    def loss(p):
        return sum(jnp.mean(leaf**2) for key, leaf in named_leaves(p).items() if "router_bias" not in key)

    @jax.jit
    def step(p, s):
        value, g = jax.value_and_grad(loss)(p)
        u, s = tx.update(g, s, p)
        return optax.apply_updates(p, u), s, value

    losses = []
    for _ in range(100):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.05 * losses[0]


# ---- state, clipping


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_state_leaves_end_in_the_parameter_they_mirror(name):
    params = {key: leaf.shape for key, leaf in named_leaves(model()).items()}
    tx = optim_lib.make_optimizer(config(name=name), 10)
    state = jax.eval_shape(tx.init, model())
    mirrored = 0
    for key, leaf in named_leaves(state).items():
        field, _, parameter = key.partition("inner_state.")[2].partition(".")
        if field in ("mu", "nu", "v"):
            assert leaf.shape == params[parameter], key
            mirrored += 1
        elif field in ("v_row", "v_col"):
            assert len(leaf.shape) < len(params[parameter]), key
        else:
            assert key.endswith("count"), key
            assert leaf.shape == (), key
    assert mirrored == {"adamw": 26, "muon": 7 + 12, "adafactor": 4}[name]


def test_clip_by_norm():
    grads = {"a": jnp.array([3.0, 0.0], jnp.bfloat16), "b": jnp.array([[4.0]])}
    norm = optax.tree.norm(grads)
    assert float(norm) == 5.0
    clipped = optim_lib.clip_by_norm(grads, norm, 1.0)
    np.testing.assert_allclose(clipped["a"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [[0.8]], rtol=1e-6)
    assert clipped["a"].dtype == jnp.float32
    for max_norm in (0.0, 5.0, 6.0):
        np.testing.assert_array_equal(optim_lib.clip_by_norm(grads, norm, max_norm)["b"], grads["b"])
    zero = optim_lib.clip_by_norm({"a": jnp.zeros(2)}, jnp.zeros(()), 1.0)
    np.testing.assert_array_equal(zero["a"], 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adam_is_optaxs_and_a_step_that_is_not_ok_keeps_its_state(dtype):
    """Three steps, of which the second does not count; optax makes the other two. Stored moments are rounded to dtype."""
    rng = np.random.default_rng(0)
    grads = [{"w_a_DF": jnp.asarray(rng.standard_normal((5, 7)), jnp.float32)} for _ in range(3)]
    ours, theirs = optim_lib.scale_by_adam(0.9, 0.95, 1e-8, dtype), optax.scale_by_adam(0.9, 0.95, 1e-8)
    state, want_state = ours.init(grads[0]), theirs.init(grads[0])
    update = jax.jit(lambda g, s, ok: ours.update(g, s, ok=ok))
    for i, grad in enumerate(grads):
        before = state
        got, state = update(jax.tree.map(lambda g, i=i: jnp.where(i == 1, jnp.nan, g), grad), state, i != 1)
        if i == 1:
            jax.tree.map(np.testing.assert_array_equal, state, before)
            continue
        want, want_state = theirs.update(grad, want_state)
        np.testing.assert_allclose(got["w_a_DF"], want["w_a_DF"], rtol=1e-6 if dtype == "float32" else 2e-2)
    assert type(state) is type(want_state)
    assert state.count == 2
    assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype(dtype)}
