"""What a GPU must compute, as functions of a width: at Mixtral's on a GPU (test_real_width.py), and small on a CPU (test_small.py).

Inputs are fresh at every run; the seed is in every message, and GPU_TEST_SEED sets it.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.kernels import dense
from mixtral_jax.models import mixtral, moe
from mixtral_jax.models.attention import plain
from mixtral_jax.models.attention.plain import Places
from mixtral_jax.models.decode import decode, prefill, prepare
from mixtral_jax.models.layers import FLOAT32, embed, rope_table
from mixtral_jax.models.permute import permute, sort_by_expert, unpermute
from tests.helpers import on_mesh, random_batch, tiny, train

SEED = int(os.environ.get("GPU_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
# bfloat16 has 8 bits, steps of 2^-8: results that were rounded a few times on the way are off by this part of their norm.
BF16 = 0.012
# Shares of the rows of 8 experts; what is missing to 1 has no expert.
SPLITS = {
    "balanced": [1 / 8] * 8,
    "imbalanced": [0.4, 0.02, 0.2, 0.01, 0.13, 0.14, 0.03, 0.07],
    "empty_experts": [0, 0.5, 0, 0, 0.3, 0.2, 0, 0],
    "one_expert": [0, 0, 1, 0, 0, 0, 0, 0],
    "rows_left_over": [0.1, 0, 0.3, 0.05, 0.05, 0, 0.2, 0],
}


@dataclasses.dataclass(frozen=True)
class Width:
    """Sizes of a check."""

    d: int
    f: int
    rows: int
    block: int
    e: int = 8


def normal(count: int, *shape: int, dtype=jnp.bfloat16, scale: float = 1.0):
    """Normal numbers, made on the device; `count` tells the arrays of a check apart."""
    return (scale * jax.random.normal(jax.random.fold_in(jax.random.key(SEED), count), shape)).astype(dtype)


def off_by(got, want, axes=None):
    """The norm of the difference over that of `want`, a matrix each or over all; 0 where both are exactly zero."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    error, norm = (jnp.sqrt(jnp.square(a).sum(axes)) for a in (got - want, want))
    return jnp.where(error == 0, 0.0, error / norm)


def with_gradients(function: Callable, arguments, d_out):
    """A function's output and its gradients for a given cotangent."""
    out, pull = jax.vjp(function, *arguments)
    return out, *pull(d_out.astype(out.dtype))


@functools.cache
def _programs(grouped_swiglu: Callable, block: int):
    """A kernel and the oracle in float32, both with gradients; compiled once for all groups."""

    def ours(arguments, d_out, sizes_e):
        return with_gradients(lambda *a: grouped_swiglu(*a, sizes_e, block), arguments, d_out)

    def exact(arguments, d_out, sizes_e):
        with jax.default_matmul_precision("highest"):
            arguments, d_out = jax.tree.map(lambda a: a.astype(jnp.float32), (arguments, d_out))
            return with_gradients(lambda *a: dense.grouped_swiglu(*a, sizes_e), arguments, d_out)

    return jax.jit(ours), jax.jit(exact)


_off_by = jax.jit(lambda a, b: off_by(a, b, (1, 2) if a.ndim == 3 else None))


def check_experts(grouped_swiglu: Callable, width: Width, shares: list[float], dtype=jnp.bfloat16, tolerance=BF16):
    """Output and all four gradients against the dense oracle in float32, each expert's weights by themselves."""
    d, f, e, rows = width.d, width.f, width.e, width.rows
    sizes_e = jnp.asarray([int(share * rows) for share in shares], jnp.int32)
    x, d_out = normal(0, rows, d, dtype=dtype), normal(1, rows, d, dtype=dtype)
    weights = [
        normal(2 + i, e, *shape, dtype=dtype, scale=shape[0] ** -0.5)
        for i, shape in enumerate(((d, f), (d, f), (f, d)))
    ]

    (ours, exact), arguments = _programs(grouped_swiglu, width.block), (x, *weights)
    got, want = ours(arguments, d_out, sizes_e), exact(arguments, d_out, sizes_e)
    for name, a, b in zip(("y", "dx", "d_gate", "d_up", "d_down"), got, want, strict=True):
        assert a.dtype == dtype, name
        errors = jax.device_get(_off_by(a, b))
        assert (errors <= tolerance).all(), f"{name} is off by {errors} of {sizes_e.tolist()} rows, seed {SEED}"
    left = int(sizes_e.sum())
    assert not bool(got[0][left:].any() | got[1][left:].any()), "rows without an expert are exactly zero"


def check_permutes(tokens: int, d: int, k: int = 2, e: int = 8):
    """permute and unpermute in bfloat16 with padding and an expert without rows, against loops over tokens in float64."""
    rng = np.random.default_rng(SEED)
    index_NK = np.stack([rng.permutation(e - 1)[:k] for _ in range(tokens)]).astype(np.int32)  # none goes to the last
    index_NK[rng.random(tokens) < 0.1] = e
    gates_NK = rng.random((tokens, k)).astype(np.float32) * (index_NK < e)
    x_ND, d_ND = normal(0, tokens, d), normal(1, tokens, d)
    rows_MD, d_MD = normal(2, tokens * k, d), normal(3, tokens * k, d)

    @jax.jit
    def run(index_NK, gates_NK):
        row_token_M, token_rows_NK, sizes_e = sort_by_expert(index_NK, e)
        there = with_gradients(lambda x: permute(x, row_token_M, token_rows_NK), (x_ND,), d_MD)
        back = with_gradients(lambda r, g: unpermute(r, g, row_token_M, token_rows_NK), (rows_MD, gates_NK), d_ND)
        return there, back, row_token_M, token_rows_NK, sizes_e

    (copied, dx), (out, d_rows, d_gates), row_token_M, token_rows_NK, sizes_e = jax.device_get(run(index_NK, gates_NK))
    expert_M = index_NK.reshape(-1)[np.argsort(index_NK.reshape(-1), kind="stable")]
    np.testing.assert_array_equal(sizes_e, np.bincount(index_NK.reshape(-1), minlength=e + 1)[:e])
    np.testing.assert_array_equal(copied, np.asarray(x_ND)[row_token_M])
    np.testing.assert_array_equal(expert_M[token_rows_NK], index_NK)
    rows64, d64, up64 = (np.asarray(a, np.float64) for a in (rows_MD, d_MD, d_ND))
    gate_M = np.zeros(tokens * k)
    gate_M[token_rows_NK] = gates_NK
    wanted = {
        "dx": (dx, d64[token_rows_NK].sum(1)),
        "out": (out, (rows64[token_rows_NK] * gates_NK[..., None]).sum(1)),
        "d_rows": (d_rows, up64[row_token_M] * gate_M[:, None]),
        "d_gates": (d_gates, np.einsum("NKD,ND->NK", rows64[token_rows_NK], up64)),
    }
    for name, (got, want) in wanted.items():
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert error <= BF16, f"{name} is off by {error}, seed {SEED}"


def packed(b: int, t: int, documents: int) -> Places:
    """Rows of documents of random lengths with padding at their ends."""
    rng = np.random.default_rng(SEED)
    segments, positions = np.zeros((b, t), np.int32), np.zeros((b, t), np.int32)
    for row in range(b):
        cuts = np.sort(rng.choice(np.arange(1, t - t // 16), documents, replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts)):
            segments[row, start:stop], positions[row, start:stop] = number + 1, np.arange(stop - start)
    return Places(jnp.asarray(segments), jnp.asarray(positions), jnp.arange(t, dtype=jnp.int32))


def check_attention(attend: Callable, t: int, n: int, g: int, h: int, window: int, documents: int = 5, tolerance=BF16):
    """bfloat16 packed rows, output and gradients against `plain` in float32 on the same numbers."""
    b = 2
    places = packed(b, t, documents)
    valid = (places.segment_ids_BT > 0)[..., None, None]
    qkv = [normal(i, b, t, heads, h) for i, heads in enumerate((n, g, g))]
    d_out = jnp.where(valid, normal(3, b, t, n, h), 0)

    def run(attend, dtype):
        def masked(q, k, v):
            return jnp.where(valid, attend(q, k, v, places, places, window), 0)

        with jax.default_matmul_precision("highest"):
            return jax.jit(lambda *a: with_gradients(masked, a, d_out))(*(a.astype(dtype) for a in qkv))

    for name, a, b in zip(("out", "dq", "dk", "dv"), run(attend, jnp.bfloat16), run(plain.attend, jnp.float32)):
        error = float(off_by(a, b))
        assert error <= tolerance, f"{name} is off by {error}, seed {SEED}"


def model_of(**changes):
    """A model of random weights; its matrices are in the compute dtype, as decoding and the benchmarks use them."""
    config = tiny(**{f"model__{name}": value for name, value in changes.items()}).model

    def build(key):
        model = mixtral.init(config, key)
        return jax.tree_util.tree_map_with_path(
            lambda path, w: (
                w if any(name in jax.tree_util.keystr(path) for name in FLOAT32) else w.astype(config.dtype)
            ),
            model,
        )

    return config, jax.jit(build)(jax.random.fold_in(jax.random.key(SEED), 9))


def margins(config, model, tokens_BT):
    """How far each token's K-th logit of the router is above the next, over the logits' deviation; one layer, [B, T]."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    rope = rope_table(positions_BT, config.head_dim, config.rope_theta)
    block = jax.tree.map(lambda a: a[0], model.layers)
    x_BTD = embed(model.embedding_VD[...], tokens_BT, config.dtype)
    logits_BTE = block.observed(x_BTD, rope, jnp.ones_like(tokens_BT), positions_BT)[3].logits_BTE
    sorted_BTE, k = jnp.sort(logits_BTE, -1, descending=True), config.experts_per_token
    return (sorted_BTE[..., k - 1] - sorted_BTE[..., k]) / logits_BTE.std()


def check_decode(form: str, rows: int, tolerance=0.03, **changes):
    """One layer, a token at a time through the cache, against prefill of each prefix: the same logits to bfloat16's accuracy.

    Where two experts are nearly as likely, another order of sums may choose the other: such tokens are not compared, and
    at most half may be such.
    """
    config, model = model_of(num_layers=1, dtype="bfloat16", expert_backend="auto", attention="auto", **changes)
    weights = {"stacked": lambda m: m, "prepared": prepare, "picked": lambda m: prepare(m, stacked=True)}[form](model)
    width, start = 24, 8
    tokens = np.random.default_rng(SEED).integers(0, config.vocab_size, (rows, width)).astype(np.int32)
    clear_BT = np.asarray(jax.jit(margins, static_argnums=0)(config, model, jnp.asarray(tokens))) > 0.05
    _, cache = prefill(weights, tokens, np.full(rows, start, np.int32), width)
    compared = 0
    for at in range(start, width):
        logits, cache = decode(weights, cache, tokens[:, at], np.ones(rows, bool))
        want, _ = prefill(weights, tokens, np.full(rows, at + 1, np.int32), width)
        for row in np.flatnonzero(clear_BT[:, at]):
            error = float(off_by(logits[row], want[row]))
            assert error <= tolerance, f"row {row}, token {at}: off by {error}, seed {SEED}"
            compared += 1
    assert compared >= rows * (width - start) // 2, f"{compared} tokens were clear, seed {SEED}"


def check_train_step(tolerance=0.02, **changes):
    """Three steps in bfloat16 with the platform's kernels beside float32 and `dense`: losses and the first gradient's norm."""
    logs = []
    for dtype, backend, attention in (("bfloat16", "auto", "auto"), ("float32", "dense", "plain")):
        config = tiny(
            **{f"model__{name}": value for name, value in changes.items()},
            model__dtype=dtype,
            model__expert_backend=backend,
            model__attention=attention,
            **dict(train__batch_size=2, train__seq_len=changes["max_seq_len"], optim__warmup_steps=2),
        )
        config, mesh = on_mesh(config)
        with jax.default_matmul_precision("highest"):
            logs.append(train(config, mesh, [random_batch(config, seed) for seed in range(3)])[1])
    for step, (half, exact) in enumerate(zip(*logs, strict=True)):
        for name in ("loss", "gradient_norm") if step == 0 else ("loss",):
            a, b = float(half[name]), float(exact[name])
            assert abs(a - b) <= tolerance * abs(b), f"step {step}: {name} {a} in bfloat16 and {b} in float32"
    assert float(logs[0][-1]["loss"]) != float(logs[0][0]["loss"])


def check_layer(width: Width, backend: str):
    """The layer's own path: route, permute, experts, unpermute in bfloat16 against one einsum over all experts in float32."""
    config = dataclasses.replace(
        tiny().model, num_experts=width.e, experts_per_token=2, expert_backend=backend, expert_block=width.block
    )
    x_BTD = normal(0, 1, width.rows // 2, width.d)
    logits_BTE = normal(1, 1, width.rows // 2, width.e, dtype=jnp.float32)
    weights = [
        normal(2 + i, width.e, *shape, scale=shape[0] ** -0.5)
        for i, shape in enumerate(((width.d, width.f), (width.d, width.f), (width.f, width.d)))
    ]

    @jax.jit
    def both(x_BTD, logits_BTE, weights):
        gates, index, _ = moe.route(logits_BTE, None, jnp.ones(x_BTD.shape[:2], bool), 2)
        out, _ = moe.experts(x_BTD, gates, index, *weights, config)
        combine_BTE = (gates[..., None] * (index[..., None] == jnp.arange(width.e)[None, None, None])).sum(2)
        x32, (gate, up, down) = x_BTD.astype(jnp.float32), (w.astype(jnp.float32) for w in weights)
        with jax.default_matmul_precision("highest"):
            hidden = jax.nn.silu(jnp.einsum("BTD,EDF->BTEF", x32, gate)) * jnp.einsum("BTD,EDF->BTEF", x32, up)
            return out, jnp.einsum("BTEF,EFD,BTE->BTD", hidden, down, combine_BTE)

    error = float(off_by(*both(x_BTD, logits_BTE, weights)))
    assert error <= BF16, f"the layer is off by {error}, seed {SEED}"
