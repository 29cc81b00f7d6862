"""The checks of tests/gpu/checks.py at a small width on the CPU: their code runs in every suite, and here they can fail."""

import dataclasses
import functools
import importlib.util

import jax.numpy as jnp
import pytest

from benchmarks.grouped import GROUPED
from mixtral_jax import backends
from mixtral_jax.models.attention import chunked, plain
from tests.gpu import checks, demo_curve
from tests.helpers import tiny

SMALL = checks.Width(d=64, f=96, rows=256, block=16)
MODEL = dict(d_model=64, d_ff=96, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=128, num_experts=8)


@pytest.mark.parametrize("shares", checks.SPLITS.values(), ids=checks.SPLITS.keys())
@pytest.mark.parametrize("backend", ["blocks", "ragged_dot"])
def test_experts(backend, shares):
    checks.check_experts(GROUPED[backend], SMALL, shares)


@pytest.mark.parametrize("backend", ["tokamax", "tokamax_triton"])
def test_experts_by_tokamax(backend):
    pytest.importorskip("tokamax", reason="optional: pip install -r requirements-gpu.txt")
    checks.check_experts(GROUPED[backend], SMALL, checks.SPLITS["empty_experts"])


def test_more_rows_than_one_pass_takes():
    """600 rows of two experts and D 64 are chunks of 256."""
    width = checks.Width(d=64, f=96, rows=600, block=16, e=2)
    checks.check_experts(GROUPED["ragged_dot"], width, [0.3, 0.5])


def wrong(x_MD, *arguments, change):
    """An expert too few, or a result 3% too large."""
    *weights, sizes_e, block = arguments
    if change == "scale":
        return GROUPED["blocks"](x_MD, *weights, sizes_e, block) * 1.03
    return GROUPED["blocks"](x_MD, *weights, jnp.where(jnp.arange(8) == 3, 0, sizes_e), block)


@pytest.mark.parametrize("change", ["scale", "expert"])
def test_the_check_of_experts_fails_on_a_wrong_kernel(change):
    with pytest.raises(AssertionError, match=r"y is off by .* seed \d+"):
        checks.check_experts(functools.partial(wrong, change=change), SMALL, checks.SPLITS["balanced"])


def test_permutes():
    checks.check_permutes(tokens=128, d=32)


@pytest.mark.parametrize("backend", ["dense", "blocks"])
def test_layer(backend):
    checks.check_layer(SMALL, backend)


@pytest.mark.parametrize("window", [0, 20])
def test_attention(monkeypatch, window):
    monkeypatch.setattr(chunked, "QUERIES", 16)
    monkeypatch.setattr(chunked, "KEYS", 32)
    checks.check_attention(chunked.attend, 128, 4, 2, 16, window)


def test_the_check_of_attention_fails_without_documents():
    def blind(q, k, v, queries, keys, window):
        one = queries._replace(
            segment_ids_BT=jnp.ones_like(queries.segment_ids_BT),
            positions_BT=jnp.broadcast_to(queries.index_T[None], queries.positions_BT.shape),
        )
        return plain.attend(q, k, v, one, one, window)

    with pytest.raises(AssertionError, match="out is off by"):
        checks.check_attention(blind, 64, 4, 2, 16, 0)


@pytest.mark.parametrize(("form", "rows"), [("prepared", 1), ("picked", 2)])
def test_decode_equals_prefill(form, rows):
    checks.check_decode(form, rows, **MODEL)


@pytest.mark.slow
def test_train_step():
    checks.check_train_step(**MODEL, num_layers=1, max_seq_len=32)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("tokamax", [True, False])
def test_what_auto_chooses_on_a_gpu(monkeypatch, capability, tokamax):
    monkeypatch.setattr(backends.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backends, "_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: tokamax or None)
    model = dataclasses.replace(tiny().model, attention="auto", expert_backend="auto", dispatch="auto")
    half = backends.resolve(dataclasses.replace(model, dtype="bfloat16"))
    assert half.attention == ("cudnn" if capability >= (9, 0) else "chunked")
    assert half.expert_backend == ("tokamax" if tokamax else "blocks")
    assert backends.resolve(dataclasses.replace(model, dtype="float32")).attention == "chunked"


def test_the_demo_s_reference_is_of_a_run_that_learned():
    want = demo_curve.reference()
    assert want["steps"] == 300
    assert len(want["token_loss"]) == 300 // demo_curve.WINDOW
    demo_curve.assert_learns_alike(want, want, 0.0)


@pytest.mark.parametrize("change", [dict(bits_per_byte=2.4), dict(steps=299), dict(token_loss=[3.0] * 12)])
def test_a_curve_that_differs_is_refused(change):
    want = demo_curve.reference()
    with pytest.raises(AssertionError, match="reference"):
        demo_curve.assert_learns_alike(want | change, want, 0.05)
