"""The exchange of rows between shards of `expert`, and the experts behind it, on fake CPU devices: what the ragged
all-to-all of an accelerator must be told, and what a bounded receive buffer drops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mixtral_jax.config import MeshConfig
from mixtral_jax.models import dispatch, moe
from mixtral_jax.sharding import make_mesh
from tests.helpers import tiny

SHARDS, LOCAL, ROWS, D = 4, 2, 10, 3
E = SHARDS * LOCAL


def mesh_of(**axes):
    config = MeshConfig(**(dict(data=1, fsdp=1, expert=1, context=1, tensor=1) | axes))
    count = int(np.prod([getattr(config, axis) for axis in ("data", "fsdp", "expert", "context", "tensor")]))
    return make_mesh(config, jax.devices()[:count])


def random_counts(seed):
    """Rows of each source for each expert: at most ROWS a source, some with none at all for most experts."""
    rng = np.random.default_rng(seed)
    chosen = [rng.integers(0, E + 1, ROWS) if s else np.full(ROWS, 5) for s in range(SHARDS)]
    return np.stack([np.bincount(c[c < E], minlength=E) for c in chosen]).astype(np.int32)


def kept_by_hand(counts, capacity):
    """One row after another, by source and then by expert, until the receiver is full."""
    kept, room = np.zeros_like(counts), [capacity] * SHARDS
    for source in range(SHARDS):
        for expert in range(E):
            for _ in range(counts[source, expert]):
                if room[expert // LOCAL]:
                    room[expert // LOCAL] -= 1
                    kept[source, expert] += 1
    return kept


def arrived_by_hand(rows, counts, kept, capacity):
    """What each receiver holds: by expert, then by source."""
    out = np.zeros((SHARDS, capacity, D), np.float32)
    for receiver in range(SHARDS):
        at = 0
        for expert in range(receiver * LOCAL, (receiver + 1) * LOCAL):
            for source in range(SHARDS):
                start, n = counts[source, :expert].sum(), kept[source, expert]
                out[receiver, at : at + n] = rows[source, start : start + n]
                at += n
    return out


@pytest.mark.parametrize("capacity", [0, 1, 7, 16, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_kept_rows_equal_a_loop(capacity, seed):
    counts = random_counts(seed)
    got = dispatch.kept_rows(jnp.asarray(counts), capacity, SHARDS)
    np.testing.assert_array_equal(got, kept_by_hand(counts, capacity))


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (dict(tokens=10, k=2, shards=4, e=2, factor=0.0, block=8), 80),  # all of every shard
        (dict(tokens=10, k=2, shards=4, e=1, factor=0.0, block=8), 40),  # a token never comes twice to one expert
        (dict(tokens=10, k=2, shards=4, e=2, factor=1.5, block=8), 32),  # 30, in whole blocks
        (dict(tokens=10, k=2, shards=4, e=2, factor=1.6, block=8), 32),
        (dict(tokens=5, k=2, shards=4, e=2, factor=1.1, block=11), 11),  # and not 22, whatever floats make of 1.1 * 10
        (dict(tokens=10, k=2, shards=4, e=2, factor=9.0, block=8), 80),  # never more than can come
        (dict(tokens=1, k=2, shards=2, e=4, factor=0.1, block=256), 4),
    ],
)
def test_rows_of_the_receive_buffer(arguments, rows):
    assert dispatch.buffer_rows(**arguments) == rows


def on_shards(function):
    """Runs `function(rows_MD, counts_E)` in shard_map over `expert`; arrays have a leading axis of shards."""
    mesh = mesh_of(expert=SHARDS)

    def shard(rows, counts):
        return jax.tree.map(lambda a: a[None], function(rows[0], counts[0]))

    return jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False))


@pytest.mark.parametrize("capacity", [7, 40])
def test_rows_arrive_by_expert_and_return_to_their_places(capacity):
    counts = random_counts(0)
    rows = np.random.default_rng(1).standard_normal((SHARDS, ROWS, D)).astype(np.float32)
    kept = kept_by_hand(counts, capacity)

    def there_and_back(rows_MD, counts_E):
        there, back, sizes = dispatch.plan(counts_E, capacity)
        arrived = dispatch.exchange(rows_MD, capacity, there, back)
        return arrived, sizes, dispatch.exchange(arrived, ROWS, back, there)

    arrived, sizes, returned = on_shards(there_and_back)(rows, counts)
    np.testing.assert_array_equal(sizes, kept.sum(0).reshape(SHARDS, LOCAL))
    np.testing.assert_array_equal(arrived, arrived_by_hand(rows, counts, kept, capacity))
    for source in range(SHARDS):
        want, at = np.zeros((ROWS, D), np.float32), 0
        for expert in range(E):
            n = kept[source, expert]
            want[at : at + n] = rows[source, at : at + n]
            at += counts[source, expert]
        np.testing.assert_array_equal(returned[source], want)


@pytest.mark.parametrize("capacity", [7, 40])
def test_the_gradient_of_an_exchange_is_the_exchange_backwards(capacity):
    """Against autodiff through the emulation, which scatters."""
    counts = random_counts(1)
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((SHARDS, ROWS, D)).astype(np.float32)
    weight = rng.standard_normal((capacity, D)).astype(np.float32)

    def gradient(move):
        def loss(rows_MD, counts_E):
            there, back, _ = dispatch.plan(counts_E, capacity)
            return (move(rows_MD, there, back) * weight).sum()

        return on_shards(jax.grad(loss))(rows, counts)

    got = gradient(lambda rows, there, back: dispatch.exchange(rows, capacity, there, back))
    zeros = np.zeros((capacity, D), np.float32)
    want = gradient(lambda rows, there, back: dispatch._emulated(rows, zeros, *there))
    np.testing.assert_array_equal(got, want)
    assert np.any(got), "nothing travelled"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("send_sizes", lambda a: a + 1),
        ("recv_sizes", lambda a: a + 1),
        ("output_offsets", lambda a: a * 0),  # one slice over another
        ("output_offsets", lambda a: a + 30),  # over the end
        ("input_offsets", lambda a: a + 8),
    ],
)
def test_slices_that_disagree_are_seen(field, change):
    """Undefined on an accelerator, NaN here: the tests above would not pass over a wrong plan."""

    def move(rows_MD, counts_E):
        there, back, _ = dispatch.plan(counts_E, 40)
        there = there._replace(**{field: change(getattr(there, field))})
        return dispatch.exchange(rows_MD, 40, there, back)

    assert np.isnan(on_shards(move)(np.ones((SHARDS, ROWS, D), np.float32), random_counts(0))).any()


# The layer: B rows over (data, fsdp, expert), T over context.
B, T, K, WIDTH, F = 8, 8, 2, 8, 16


def layer_config(**changes):
    changes = dict(num_experts=E, experts_per_token=K, expert_block=4, expert_backend="dense") | changes
    return dataclasses.replace(tiny().model, **changes)


@functools.cache
def layer_inputs(where):
    """Tokens, gates, indices (E is padding) and weights; `where` says which experts are chosen."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((B, T, WIDTH)).astype(np.float32)
    gates = rng.random((B, T, K)).astype(np.float32)
    index = np.argsort(rng.random((B, T, E)), axis=-1)[..., :K].astype(np.int32)
    if where == "two_experts":
        index = np.broadcast_to(np.array([4, 1], np.int32), index.shape).copy()
    if where == "one_shard":
        index = np.broadcast_to(np.array([2, 3], np.int32), index.shape).copy()
    index[1, 5:], gates[1, 5:] = E, 0
    index[6], gates[6] = E, 0  # a row of nothing but padding
    weights = [rng.standard_normal(s).astype(np.float32) for s in ((E, WIDTH, F), (E, WIDTH, F), (E, F, WIDTH))]
    return x, gates, index, weights


def run_layer(mesh, config, where):
    """Output, computed, and the gradients of a weighted sum by x, gates and weights, compiled once per mesh."""
    x, gates, index, weights = layer_inputs(where)
    return jax.device_get(layer_program(mesh, config)(x, gates, index, weights))


@functools.cache
def layer_program(mesh, config):
    out_weight = np.random.default_rng(4).standard_normal((B, T, WIDTH)).astype(np.float32)

    def loss(x, gates, weights, index):
        y, computed = moe.experts(x, gates, index, *weights, config)
        return (y * out_weight).sum(), (y, computed)

    def run(x, gates, index, weights):
        grads, (y, computed) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gates, weights, index)
        return y, computed, grads

    def with_mesh(*arguments):
        if mesh is None:
            return compiled(*arguments)
        with jax.set_mesh(mesh):
            return compiled(*arguments)

    compiled = jax.jit(run)
    return with_mesh


def assert_layers_agree(got, want):
    assert got[1] == want[1]
    for a, b in zip(jax.tree.leaves((got[0], got[2])), jax.tree.leaves((want[0], want[2])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()), rtol=0)


LAYER_MESHES = {
    "expert4_context2": dict(expert=4, context=2),
    "expert2_fsdp2_context2": dict(expert=2, fsdp=2, context=2),
    "expert2_context2_tensor2": dict(expert=2, context=2, tensor=2),
    "context2_tensor2": dict(context=2, tensor=2),
}


@pytest.mark.parametrize("dispatch_by", ["ragged", "ring"])
@pytest.mark.parametrize("axes", LAYER_MESHES.values(), ids=LAYER_MESHES.keys())
def test_the_layer_with_positions_over_context_equals_one_device(axes, dispatch_by):
    for where in ("random", "two_experts", "one_shard"):
        want = run_layer(None, layer_config(), where)
        got = run_layer(mesh_of(**axes), layer_config(dispatch=dispatch_by, expert_backend="blocks"), where)
        assert_layers_agree(got, want)


def dropped_by_hand(index, shards, capacity):
    """Which choices [B, T, K] fit: the rows of a source in order of expert, token and choice, one source after another."""
    source_of = np.repeat(np.arange(shards), B // shards)
    keep, room = np.zeros(index.shape, bool), [capacity] * shards
    for source in range(shards):
        mine = [c for c in np.ndindex(index.shape) if source_of[c[0]] == source and index[c] < E]
        for choice in sorted(mine, key=lambda c: (index[c], c)):
            receiver = index[choice] // (E // shards)
            keep[choice] = room[receiver] > 0
            room[receiver] -= keep[choice]
    return keep


@pytest.mark.parametrize("where", ["random", "two_experts", "one_shard"])
@pytest.mark.parametrize("factor", [0.5, 0.75])
def test_an_overflow_drops_exactly_what_it_reports(factor, where):
    """Against the dense oracle to which the dropped choices are padding: output, count and every gradient."""
    shards = 4
    x, gates, index, weights = layer_inputs(where)
    capacity = dispatch.buffer_rows(B // shards * T, K, shards, E // shards, factor, 4)
    keep = dropped_by_hand(index, shards, capacity)
    assert 0 < keep.sum() < (index < E).sum(), "something should be dropped, and not all"

    config = layer_config(dispatch="ragged", expert_backend="blocks", buffer_factor=factor)
    y, computed, grads = run_layer(mesh_of(expert=shards), config, where)
    assert computed == keep.sum()
    only_kept = np.where(keep, index, E)
    want = jax.device_get(layer_program(None, layer_config())(x, np.where(keep, gates, 0), only_kept, weights))
    assert_layers_agree((y, computed, grads), want)
    d_gates = grads[1]
    assert not d_gates[~keep].any(), "the gate of a dropped choice has no gradient"
    assert d_gates[keep].all()


def test_a_buffer_with_room_drops_nothing():
    want = run_layer(mesh_of(expert=4), layer_config(dispatch="ragged"), "random")
    got = run_layer(mesh_of(expert=4), layer_config(dispatch="ragged", buffer_factor=3.0), "random")
    assert_layers_agree(got, want)
