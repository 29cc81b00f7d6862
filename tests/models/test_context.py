"""Context parallelism: T over devices computes what one device computes. float32, packed and padded rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import AXES, MeshConfig
from mixtral_jax.models import mixtral
from mixtral_jax.models.attention import chunked, self_attend
from mixtral_jax.models.attention.plain import Places
from mixtral_jax.sharding import act_spec, make_mesh, unzigzag, zigzag
from tests.helpers import assert_trees_close, gradients, on_mesh, random_batch, tiny, train

MESHES = {
    "context2": dict(context=2),
    "context4": dict(context=4),
    "context2_fsdp2_expert2": dict(context=2, fsdp=2, expert=2),
    "context2_tensor2_data2": dict(context=2, tensor=2, data=2),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "QUERIES", 4)
    monkeypatch.setattr(chunked, "KEYS", 8)


@functools.cache
def reference(window: int):
    config, mesh = on_mesh(tiny(model__attention="plain", model__sliding_window=window))
    params = mixtral.init(config.model, jax.random.key(1))
    batch = random_batch(config)
    return batch, gradients(config, mesh, params, batch)


@pytest.mark.parametrize(
    ("axes", "attention", "window"),
    [
        pytest.param(MESHES["context2"], "plain", 0, marks=pytest.mark.slow),
        (MESHES["context2"], "chunked", 7),
        (MESHES["context4"], "chunked", 0),
        (MESHES["context2_fsdp2_expert2"], "chunked", 0),
        pytest.param(MESHES["context4"], "plain", 7, marks=pytest.mark.slow),
        pytest.param(MESHES["context2_tensor2_data2"], "chunked", 7, marks=pytest.mark.slow),
        pytest.param(MESHES["context2_tensor2_data2"], "plain", 0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loss_and_gradients_agree(axes, attention, window):
    batch, ((want, (want_terms, want_stats)), want_grads) = reference(window)
    config, mesh = on_mesh(tiny(model__attention=attention, model__sliding_window=window), **axes)
    params = mixtral.init(config.model, jax.random.key(1))  # the same numbers under this configuration
    (got, (terms, stats)), grads = gradients(config, mesh, params, batch)
    assert got == pytest.approx(want, rel=1e-5)
    for name, value in want_terms.items():
        assert terms[name] == pytest.approx(value, rel=1e-5), name
    np.testing.assert_array_equal(stats.count_E, want_stats.count_E)
    assert not stats.dropped.any()
    assert_trees_close(grads, want_grads, 1e-5)


@pytest.mark.slow
def test_training_agrees():
    batches = [random_batch(tiny(), seed) for seed in range(4)]
    want_state, want = train(*on_mesh(tiny(train__accumulation_steps=2)), batches)
    state, got = train(*on_mesh(tiny(train__accumulation_steps=2), context=2, expert=2), batches)
    for a, b in zip(got, want, strict=True):
        for name in ("loss", "gradient_norm", "tokens", "trained_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    assert_trees_close(state.params, want_state.params, 1e-4)


def attention_on(context: int, attention: str, t: int, h: int):
    """self_attend and its gradients over `context`, back in row order on the host."""
    config, mesh = on_mesh(tiny(model__attention="plain"), context=context)
    model = config.model.__class__(**{**vars(config.model), "attention": attention, "head_dim": h})
    rng = np.random.default_rng(0)
    columns = zigzag(t, context)
    q, k, v, d_out = (rng.standard_normal((2, t, heads, h)).astype(np.float32) for heads in (4, 2, 2, 4))
    segments = np.repeat([[1, 2, 0], [3, 4, 5]], [t // 4, t - t // 4 - t // 8, t // 8], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (t // 4, t - t // 4 - t // 8, t // 8)]).astype(np.int32)
    d_out[segments == 0] = 0
    positions = np.where(segments > 0, positions[None], 0)

    def run(q, k, v, d_out, segments, positions):
        out, pull = jax.vjp(lambda q, k, v: self_attend(q, k, v, segments, positions, model), q, k, v)
        out = jnp.where(segments[..., None, None] > 0, out, 0)
        return (*(unzigzag(a, context) for a in (out, *pull(d_out))),)

    with jax.set_mesh(mesh):
        shardings = [act_spec("BTNH")] * 4 + [act_spec("BT")] * 2
        arguments = [
            jax.device_put(a[:, columns], jax.NamedSharding(mesh, spec))
            for a, spec in zip((q, k, v, d_out, segments, positions), shardings)
        ]
        compiled = jax.jit(run).lower(*arguments).compile()
        return jax.device_get(compiled(*arguments)), compiled.as_text()


def test_splash_over_context_equals_one_device():
    """Interpreted; pieces of one block, so that each device's part of the masks differs."""
    got, _ = attention_on(2, "splash", 512, 128)
    want, _ = attention_on(1, "plain", 512, 128)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=1e-5, err_msg=name)


def test_keys_are_gathered_and_their_gradients_scattered():
    _, text = attention_on(2, "chunked", 32, 8)
    assert "all-gather" in text
    assert "reduce-scatter" in text or "all-to-all" in text, "gradients of keys should be reduced where they belong"


def test_zigzag_and_back():
    assert zigzag(8, 1).tolist() == list(range(8))
    assert zigzag(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag(8, 4).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    for shards in (2, 4):
        rows = np.tile(zigzag(16, shards), (2, 1))
        np.testing.assert_array_equal(unzigzag(jnp.asarray(rows), shards), np.tile(np.arange(16), (2, 1)))
    with pytest.raises(ValueError, match=r"10 columns .* 2 \* 2"):
        zigzag(10, 2)


def test_zigzag_balances_the_chunks_that_are_computed(monkeypatch):
    """In one long document all shards compute the same chunks, of 4,096 over 4; cut in a straight line the last has most."""
    monkeypatch.setattr(chunked, "QUERIES", 128)
    monkeypatch.setattr(chunked, "KEYS", 256)
    t, shards = 4096, 4
    ones = jnp.ones((1, t), jnp.int32)
    keys = Places(ones, jnp.arange(t)[None], jnp.arange(t))

    def steps(index_T):
        first, last = chunked.bounds(Places(ones[:, : t // shards], None, jnp.asarray(index_T)), keys, 0)
        return int((last - first).sum())

    zigzagged = [steps(index_T) for index_T in zigzag(t, shards).reshape(shards, -1)]
    straight = [steps(index_T) for index_T in np.arange(t).reshape(shards, -1)]
    assert sum(zigzagged) == sum(straight) == 272
    assert max(zigzagged) == min(zigzagged) == 68
    assert straight == [20, 52, 84, 116]


def test_a_mesh_for_generation_has_the_same_devices():
    from mixtral_jax.sharding import moved, without_context
    from tests.helpers import shard

    config = tiny(model__num_layers=1)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=1, context=2, tensor=2))
    params = shard(mixtral.init(config.model, jax.random.key(0)), mesh)
    other = without_context(mesh)
    assert dict(other.shape) == dict(zip(AXES, (2, 2, 1, 1, 2)))
    again = moved(params, other)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
        buffers = {s.device: s.data.unsafe_buffer_pointer() for s in a.addressable_shards}
        assert buffers == {s.device: s.data.unsafe_buffer_pointer() for s in b.addressable_shards}
    with pytest.raises(ValueError, match="differently"):
        moved(params, make_mesh(MeshConfig(data=1, fsdp=8, expert=1, context=1, tensor=1)))
