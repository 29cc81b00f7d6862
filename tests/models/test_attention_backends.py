"""Every backend of attention against the oracle: outputs and all gradients, packed, padded and windowed. float32."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.models.attention import chunked, cudnn, plain, self_attend, splash
from mixtral_jax.models.attention.plain import Places
from tests.helpers import tiny

B, N, G = 2, 4, 2


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "QUERIES", 8)
    monkeypatch.setattr(chunked, "KEYS", 16)


def packed(t: int, seed: int = 0) -> Places:
    """Row 0: documents and padding at the end; row 1: one document; index says that columns are in row order."""
    rng = np.random.default_rng(seed)
    segments, positions = np.ones((B, t), np.int32), np.tile(np.arange(t, dtype=np.int32), (B, 1))
    cuts = [0, *sorted(rng.choice(np.arange(1, t - 3), 4, replace=False)), t - 3]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        segments[0, start:stop], positions[0, start:stop] = number + 1, np.arange(stop - start)
    segments[0, t - 3 :] = positions[0, t - 3 :] = 0
    return Places(jnp.asarray(segments), jnp.asarray(positions), jnp.arange(t, dtype=jnp.int32))


def inputs(t: int, h: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((B, t, heads, h)), jnp.float32) for heads in (N, G, G, N)]


def with_gradients(attend, t: int, h: int, places: Places):
    """The output, zero at padding, and the gradients of q, k and v for a random cotangent that is zero at padding."""
    *qkv, d_out = inputs(t, h)
    valid = (places.segment_ids_BT > 0)[..., None, None]

    def run(q, k, v):
        out, pull = jax.vjp(attend, q, k, v)
        return jnp.where(valid, out, 0), *pull(jnp.where(valid, d_out, 0))

    return jax.device_get(jax.jit(run)(*qkv))


def assert_close(got, want):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(("t", "window"), [(64, 0), (61, 0), (64, 5), (40, 17)])
def test_chunked_equals_plain(small_chunks, t, window):
    places = packed(t)
    got, want = (
        with_gradients(lambda q, k, v, f=f: f(q, k, v, places, places, window), t, 8, places)
        for f in (chunked.attend, plain.attend)
    )
    assert_close(got, want)


def test_chunked_is_plain_where_the_keys_are_one_chunk():
    places = packed(32)
    jaxpr = str(jax.make_jaxpr(lambda q, k, v: chunked.attend(q, k, v, places, places, 0))(*inputs(32, 8)[:3]))
    assert "while" not in jaxpr
    assert "scan" not in jaxpr


def test_chunked_visits_no_chunk_that_is_hidden(small_chunks):
    """One document: 8 chunks of 8 queries, 4 of 16 keys. Two documents of half a row: the second starts at its own."""
    one = packed(64)._replace(segment_ids_BT=jnp.ones((B, 64), jnp.int32))
    first, last = jax.device_get(chunked.bounds(one, one, 0))
    assert first.tolist() == [0] * 8
    assert last.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    first, _ = jax.device_get(chunked.bounds(one, one, 9))
    assert first.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]  # (8 i - 8) // 16
    two = one._replace(segment_ids_BT=jnp.tile(jnp.repeat(jnp.asarray([1, 2]), 32), (B, 1)))
    first, _ = jax.device_get(chunked.bounds(two, two, 0))
    assert first.tolist() == [0] * 4 + [2] * 4


def test_chunked_computes_only_between_its_bounds(small_chunks, monkeypatch):
    """With bounds that leave out the first keys the result changes, in all outputs: the loops do stop there."""
    places = packed(64)

    def run():
        return with_gradients(lambda q, k, v: chunked.attend(q, k, v, places, places, 0), 64, 8, places)

    want, real = run(), chunked.bounds
    monkeypatch.setattr(chunked, "bounds", lambda *a: (real(*a)[0].at[-1].set(3), real(*a)[1]))
    got = run()
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(got, want))


def test_chunked_in_bfloat16_is_as_near_as_plain_in_bfloat16(small_chunks):
    places = packed(64)
    exact = with_gradients(lambda q, k, v: plain.attend(q, k, v, places, places, 0), 64, 8, places)

    def in_bf16(attend):
        half = lambda *qkv: attend(*(a.astype(jnp.bfloat16) for a in qkv), places, places, 0).astype(jnp.float32)  # noqa: E731
        return with_gradients(half, 64, 8, places)

    for name, a, b, c in zip(("out", "dq", "dk", "dv"), in_bf16(chunked.attend), in_bf16(plain.attend), exact):
        assert np.abs(a - c).max() < 2 * np.abs(b - c).max() + 1e-3, name


@pytest.mark.parametrize("window", [0, 70])
def test_splash_equals_plain(window):
    """Interpreted: T of two blocks, heads in groups."""
    t, h = 256, 128
    places = packed(t)
    got = with_gradients(
        lambda q, k, v: splash.attend(q, k, v, places, places, splash.masks(t, 1, window)), t, h, places
    )
    assert_close(got, with_gradients(lambda q, k, v: plain.attend(q, k, v, places, places, window), t, h, places))


def test_splash_is_a_kernel_for_tpus_and_interpreted_on_cpus():
    places = packed(256)
    run = jax.jit(lambda q, k, v: splash.attend(q, k, v, places, places, splash.masks(256, 1, 0)))
    traced = run.trace(*inputs(256, 128)[:3])
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_spans_of_documents():
    ids = jnp.asarray([[1, 1, 2, 3, 3, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4], [0] * 8])
    begin, length, count = jax.device_get(cudnn.spans(ids, 3))
    assert begin.tolist() == [[0, 2, 3], [0, -1, -1], [-1, -1, -1]]
    assert length.tolist() == [[2, 1, 3], [8, -1, -1], [-1, -1, -1]]
    assert count.tolist() == [3, 1, 0]
    begin, length, count = jax.device_get(cudnn.spans(ids, 2))
    assert (begin[0].tolist(), length[0].tolist(), count[0]) == ([0, 2], [2, 1], 3)
    assert jax.device_get(cudnn.spans(ids, 20))[0].shape == (3, 20)


def as_cudnn_does(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, sliding_window_length, **_):
    """What cuDNN computes from offsets and lengths, by loops; NaN where it writes nothing."""
    q, k, v, q_seqlen, kv_seqlen, q_offsets, kv_offsets = map(
        np.asarray, (q, k, v, q_seqlen, kv_seqlen, q_offsets, kv_offsets)
    )
    out = np.full(q.shape, np.nan, q.dtype)
    for b in range(q.shape[0]):
        for m in range(q_seqlen.shape[1]):
            start, length = int(q_offsets[b, m]), int(q_seqlen[b, m])
            assert (start, length) == (int(kv_offsets[b, m]), int(kv_seqlen[b, m]))
            if length < 0:
                continue
            rows = slice(start, start + length)
            scores = np.einsum("tnh,snh->nts", q[b, rows], k[b, rows]) * scale
            distance = np.arange(length)[:, None] - np.arange(length)[None, :]
            seen = (distance >= 0) & (distance < (sliding_window_length or length))
            weights = np.where(seen[None], np.exp(scores), 0)
            out[b, rows] = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v[b, rows])
    return jnp.asarray(out)


@pytest.mark.parametrize("window", [0, 5])
def test_cudnn_is_given_the_documents(monkeypatch, window):
    """The arguments mean the same attention as the oracle's, and what cuDNN leaves unwritten is zero."""
    monkeypatch.setattr(cudnn.fused, "dot_product_attention", as_cudnn_does)
    places = packed(32)
    valid = places.segment_ids_BT > 0
    begin, length, _ = cudnn.spans(places.segment_ids_BT, 8)
    q, k, v, _ = inputs(32, 8)
    got = cudnn._packed(q, k, v, valid, begin, length, window)
    want = jnp.where(valid[..., None, None], plain.attend(q, k, v, places, places, window), 0)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_cudnn_lowers_for_gpus(monkeypatch):
    """Forward and backward on a machine without one; its branch for too many documents is there too."""
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda capability: True)
    places = packed(512)
    half = [a.astype(jnp.bfloat16) for a in inputs(512, 64)[:3]]
    loss = lambda q, k, v: cudnn.attend(q, k, v, places, places, 0).astype(jnp.float32).sum()  # noqa: E731
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*half).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "stablehlo.while" in text


def test_what_does_not_run_here_says_what_to_set():
    config = dataclasses.replace(tiny().model, attention="cudnn", dtype="bfloat16")
    q, k, v, _ = (a.astype(jnp.bfloat16) for a in inputs(32, 8))
    places = packed(32)
    with pytest.raises(UserError, match=r"model\.attention=chunked"):
        self_attend(q, k, v, places.segment_ids_BT, places.positions_BT, config)
