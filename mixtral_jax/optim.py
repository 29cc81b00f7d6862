"""Schedules, weight decay, clipping and the optimizers. A parameter's treatment is read off its name, never off its rank.

Stacked layers put L in front of an array but not in its name, so rank says nothing: a stacked norm has two dimensions and
a stack of expert matrices four. Every optimizer here treats each layer's, and each expert's, matrix on its own.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixtral_jax.config import OptimConfig
from mixtral_jax.sharding import path_names, suffix

# Parameters that are matrices: letters of the input, letters of the output. Letters in neither, and L, are a batch of them.
MATRICES = {
    "w_q_DNH": ("D", "NH"),
    "w_k_DGH": ("D", "GH"),
    "w_v_DGH": ("D", "GH"),
    "w_o_NHD": ("NH", "D"),
    "w_gate_EDF": ("D", "F"),
    "w_up_EDF": ("D", "F"),
    "w_down_EFD": ("F", "D"),
    "w_router_DE": None,  # only E wide: neither orthogonalised nor factored
    "lora_q_a_DR": ("D", "R"),
    "lora_q_b_RNH": ("R", "NH"),
    "lora_k_a_DR": ("D", "R"),
    "lora_k_b_RGH": ("R", "GH"),
    "lora_v_a_DR": ("D", "R"),
    "lora_v_b_RGH": ("R", "GH"),
    "lora_o_a_NHR": ("NH", "R"),
    "lora_o_b_RD": ("R", "D"),
    "lora_gate_a_EDR": ("D", "R"),
    "lora_gate_b_ERF": ("R", "F"),
    "lora_up_a_EDR": ("D", "R"),
    "lora_up_b_ERF": ("R", "F"),
    "lora_down_a_EFR": ("F", "R"),
    "lora_down_b_ERD": ("R", "D"),
    "lora_router_a_DR": None,  # as the router itself
    "lora_router_b_RE": None,
}
# Adafactor factors these too; Muon leaves them to AdamW, as its authors do.
FACTORED = MATRICES | {"embedding_VD": ("V", "D"), "head_DV": ("D", "V")}

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2
MUON_QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: steep at 0, five steps take singular values near 1
ADAFACTOR_DECAY = 0.8
ADAFACTOR_EPS = 1e-30


def learning_rate_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates already made, k = 0 ... steps - 1.

    With t = k + 1, W = warmup_steps, S = steps, C = decay_steps, r = final_lr_ratio:

        lr(k) = peak * min(1, t / W) * decay(t)
        warmup_cosine:        decay = r + (1 - r) (1 + cos(pi p)) / 2,  p = (t - W) / (S - W)
        warmup_stable_decay:  decay = 1 - (1 - r) p,                    p = (t - (S - C)) / C
        constant:             decay = 1

    p is clipped to [0, 1]. So the first update has peak / W, not zero, update W the peak, the last one and all later r * peak.
    """
    start = steps - optim.decay_steps if optim.schedule == "warmup_stable_decay" else optim.warmup_steps

    def schedule(count):
        t = jnp.asarray(count, jnp.float32) + 1.0
        p = jnp.clip((t - start) / max(steps - start, 1), 0.0, 1.0)
        cosine = 0.5 * (1.0 - jnp.cos(jnp.pi * p))
        down = {"warmup_cosine": cosine, "warmup_stable_decay": p, "constant": 0.0}[optim.schedule]
        up = jnp.minimum(1.0, t / max(optim.warmup_steps, 1))
        return optim.learning_rate * up * (1.0 - (1.0 - optim.final_lr_ratio) * down)

    return schedule


def decays(name: str, optim: OptimConfig) -> bool:
    """Says whether weight decay applies: to weights, adapters and head, to the embedding if configured, never to norms, router bias.

    Raises:
        ValueError: a name of no known kind; guessing would decay, or spare, a parameter silently.
    """
    if name.startswith(("w_", "lora_", "head_")):
        return True
    if name.startswith("embedding_"):
        return optim.decay_embeddings
    if "norm_" in name or name.startswith("router_bias_"):
        return False
    raise ValueError(
        f"parameter {name!r} is no w_*, lora_*, head_*, embedding_*, *norm_* or router_bias_*; see optim.decays"
    )


def is_router(name: str) -> bool:
    """Whether a parameter is the routers'."""
    return name in ("w_router_DE", "router_bias_E")


def clip_by_norm(grads, norm: jax.Array, max_norm: float):
    """Scales gradients by min(1, max_norm / norm), in float32; max_norm 0 leaves them alone.

    The norm is an argument because the trainer reports it anyway: it is computed once, over all parameters.
    """
    if max_norm == 0:
        return grads
    # The same as min(1, max_norm / norm), without dividing by a norm of zero.
    scale = max_norm / jnp.maximum(jnp.asarray(norm, jnp.float32), max_norm)
    return jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)


def make_optimizer(optim: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns  update = -lr * (direction(gradient) + weight_decay * parameter)  for every parameter; clipping is outside.

    The direction is chosen by name. Decay is decoupled (AdamW, arXiv 1711.05101; times lr, as in optax and PyTorch) for all
    optimizers. `router_bias_E` is balanced by counts, not gradients: its update is zero and no state is kept for it.

    Its `update` takes a keyword `ok`, a bool scalar: where that is False the state stays as it was, and the updates mean
    nothing. The moments are held back inside the optimizer's own passes over them, because a choice between old and new
    afterwards needs both at once, a copy of all of them.

    Args:
        optim: name "adamw"; "muon", with AdamW for what is not a matrix; or "adafactor". With freeze_router the routers
            get no update, no decay and no state.
        steps: updates in the whole run, for the schedule.
    """
    adamw = scale_by_adam(optim.b1, optim.b2, optim.eps, optim.moment_dtype)
    directions = {
        "adamw": {"adamw": adamw},
        "muon": {"adamw": adamw, "muon": _store_moments(scale_by_muon(), optim.moment_dtype)},
        "adafactor": {"adafactor": _store_moments(scale_by_adafactor(), "float32")},
    }[optim.name] | {"frozen": optax.set_to_zero()}

    def label(name: str) -> str:
        decays(name, optim)  # refuses unknown names
        if name.startswith("router_bias_") or (optim.freeze_router and is_router(name)):
            return "frozen"
        return "adamw" if optim.name == "muon" and _letters(name, MATRICES) is None else optim.name

    def decayed(name: str) -> bool:
        return decays(name, optim) and label(name) != "frozen"

    chain = optax.chain(
        optax.partition(directions, lambda params: _map_names(label, params)),
        optax.add_decayed_weights(optim.weight_decay, lambda params: _map_names(decayed, params)),
        optax.scale_by_learning_rate(learning_rate_schedule(optim, steps)),
    )

    def update(grads, state, params=None, *, ok=True):
        updates, new = chain.update(grads, state, params, ok=ok)
        # The counts; what has dimensions was held back where it was made.
        return updates, jax.tree.map(lambda new, old: new if new.ndim else jnp.where(ok, new, old), new, state)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def scale_by_adam(b1: float, b2: float, eps: float, dtype: str) -> optax.GradientTransformationExtraArgs:
    """Adam's direction (arXiv 1412.6980, Algorithm 1), in the order of passes that takes no copies.

        mu = b1 mu + (1 - b1) g,   nu = b2 nu + (1 - b2) g^2
        update = mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps)

    Numbers and structure of the state are those of optax.scale_by_adam. XLA:CPU would compute the
    direction from the old moments again, which must then be copied before the new ones take their place: a barrier makes
    it read the new ones, 10 passes over the state's arrays and no copies, where it was 16 and 8 bytes for each parameter.

    Args:
        b1, b2, eps: of Adam.
        dtype: the moments are stored in it; they are computed in float32 (optax's mu_dtype leaves nu alone and multiplies
            mu in bfloat16).
    """

    def update(grads, state, params=None, *, ok=True, **_):
        del params
        grads = optax.tree.cast(grads, jnp.float32)
        old = [optax.tree.cast(tree, jnp.float32) for tree in (state.mu, state.nu)]
        mu = jax.tree.map(lambda g, m: jnp.where(ok, (1 - b1) * g + b1 * m, m), grads, old[0])
        nu = jax.tree.map(lambda g, n: jnp.where(ok, (1 - b2) * g**2 + b2 * n, n), grads, old[1])
        if jax.default_backend() == "cpu":  # GPUs and TPUs write several results in one pass
            mu, nu = jax.lax.optimization_barrier((mu, nu))
        count = optax.safe_increment(state.count)
        mu_bias, nu_bias = (1 - jnp.asarray(b, jnp.float32) ** count for b in (b1, b2))
        updates = jax.tree.map(lambda m, n: m / mu_bias / (jnp.sqrt(n / nu_bias) + eps), mu, nu)
        mu, nu = (optax.tree.cast(tree, jnp.dtype(dtype)) for tree in (mu, nu))
        return updates, optax.ScaleByAdamState(jnp.where(ok, count, state.count), mu, nu)

    def init(params):
        mu, nu = (optax.tree.zeros_like(params, dtype=jnp.dtype(dtype)) for _ in range(2))  # donated, so two arrays
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


class MuonState(NamedTuple):
    """State of scale_by_muon."""

    count: jax.Array  # updates made
    mu: optax.Updates  # momentum, shaped like the parameters


def scale_by_muon() -> optax.GradientTransformation:
    """Muon: Nesterov momentum, orthogonalised matrix by matrix, scaled to the size of an AdamW update.

        m = b m + (1 - b) g,   h = b m / (1 - b^(t+1)) + (1 - b) g / (1 - b^t)
        update = 0.2 sqrt(max(in, out)) U V^T,  where  h = U S V^T

    An orthogonal in x out matrix has RMS 1 / sqrt(max(in, out)); the factor makes it 0.2, which AdamW's updates have in
    practice, so that one learning rate and decay serve both (Moonlight, arXiv 2502.16982, section 2.2).

    The numbers are those of optax.contrib.muon with consistent_rms=0.2; the tests hold it to them. The code is not: optax
    merges L and E into one batch axis, which has no sharding, so XLA gathers every expert onto every device. Here E stays
    an axis, and layers go one at a time, so that the temporaries are one layer's.
    """

    def init(params):
        return MuonState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update(grads, state, params=None):
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: MUON_MOMENTUM * m + (1 - MUON_MOMENTUM) * g, state.mu, grads)
        ahead = MUON_MOMENTUM / (1 - MUON_MOMENTUM ** (count + 1.0))
        now = (1 - MUON_MOMENTUM) / (1 - jnp.float32(MUON_MOMENTUM) ** count)

        h = jax.tree.map(lambda m, g: ahead * m + now * g, mu, grads)
        return jax.tree.map(_orthogonal_update, h, _map_names(str, h)), MuonState(count, mu)

    return optax.GradientTransformation(init, update)


def _orthogonal_update(x: jax.Array, name: str) -> jax.Array:
    """Replaces the matrices in a parameter by scaled orthogonal ones, each on its own."""
    if _is_stacked(name, x):
        return jax.lax.map(partial(_orthogonal_update, name=name), x)
    rows, cols = (_axes(name, x, letters) for letters in MATRICES[name])
    order = tuple(axis for axis in range(x.ndim) if axis not in rows + cols) + rows + cols
    fan_in, fan_out = (math.prod(x.shape[axis] for axis in axes) for axes in (rows, cols))
    sorted_x = x.transpose(order)
    flat = orthogonalize(sorted_x.reshape(*sorted_x.shape[: -len(rows + cols)], fan_in, fan_out))
    flat *= MUON_RMS * math.sqrt(max(fan_in, fan_out))
    return flat.reshape(sorted_x.shape).transpose([order.index(axis) for axis in range(x.ndim)])


def orthogonalize(x: jax.Array) -> jax.Array:
    """Takes the last two axes' singular values to about 1: Newton-Schulz,  x <- a x + b (x x^T) x + c (x x^T)^2 x."""
    a, b, c = MUON_QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller Gram matrix
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)  # singular values into [0, 1]
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class AdafactorState(NamedTuple):
    """State of scale_by_adafactor."""

    count: jax.Array  # updates made
    v_row: optax.Updates  # mean squares of factored parameters' rows: their shape without the output axes
    v_col: optax.Updates  # and of their columns: their shape without the input axes
    v: optax.Updates  # squares of the other parameters' elements: their shape


def scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235, Algorithm 4): the gradient over the root of its mean square, the latter factored.

        beta = 1 - t^-0.8,   row = beta row + (1 - beta) mean_out(g^2),   col likewise with mean_in
        u = g / sqrt(row col / mean(row)),   update = u / max(1, RMS(u))

    The learning rate is absolute, as AdamW's: not times the parameter's RMS, which is optax.adafactor's default. There is
    no momentum: b1, b2 and eps are not used. Rows, columns and the RMS are those of each (layer, expert) matrix, by name;
    optax takes the two largest axes, whatever they mean, and one RMS for the whole stack.
    """

    def init(params):
        moments = _map_leaves(_adafactor_init, params, _map_names(str, params))
        return AdafactorState(jnp.zeros([], jnp.int32), *moments)

    def update(grads, state, params=None):
        count = state.count + 1
        beta = 1.0 - count.astype(jnp.float32) ** -ADAFACTOR_DECAY
        updates, *moments = _map_leaves(partial(_adafactor_update, beta), grads, _map_names(str, grads), *state[1:])
        return updates, AdafactorState(count, *moments)

    return optax.GradientTransformation(init, update)


def _adafactor_init(p: jax.Array, name: str):
    """Returns one parameter's v_row, v_col and v; those it does not have are leafless nodes."""
    letters = _letters(name, FACTORED)
    if letters is None:
        return optax.MaskedNode(), optax.MaskedNode(), jnp.zeros(p.shape, jnp.float32)
    rows, cols = (np.delete(p.shape, _axes(name, p, gone)) for gone in reversed(letters))
    return jnp.zeros(rows, jnp.float32), jnp.zeros(cols, jnp.float32), optax.MaskedNode()


def _adafactor_update(beta: jax.Array, g: jax.Array, name: str, v_row, v_col, v):
    """Returns one parameter's update and its new v_row, v_col and v."""
    g = g.astype(jnp.float32)
    squared = jnp.square(g) + ADAFACTOR_EPS
    letters = _letters(name, FACTORED)
    if letters is None:
        block = _axes(name, g, suffix(name))
        v = beta * v + (1.0 - beta) * squared
        u = g * jax.lax.rsqrt(v)
    else:
        rows, cols = (_axes(name, g, side) for side in letters)
        block = rows + cols
        v_row = beta * v_row + (1.0 - beta) * jnp.mean(squared, cols)
        v_col = beta * v_col + (1.0 - beta) * jnp.mean(squared, rows)
        row, col = jnp.expand_dims(v_row, cols), jnp.expand_dims(v_col, rows)
        # Two roots, not one of the product: squares of small gradients would underflow.
        u = g * jax.lax.rsqrt(row / jnp.mean(row, rows, keepdims=True)) * jax.lax.rsqrt(col)
    u = u / jnp.maximum(1.0, jnp.sqrt(jnp.mean(jnp.square(u), block, keepdims=True)))
    return u, v_row, v_col, v


def _store_moments(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformationExtraArgs:
    """Computes in float32, stores `mu` in dtype, and keeps the old state where `ok` is False."""

    def cast(state, to):
        return state._replace(mu=optax.tree.cast(state.mu, to)) if hasattr(state, "mu") else state

    def init(params):
        return cast(inner.init(params), jnp.dtype(dtype))

    def update(grads, state, params=None, *, ok=True, **_):
        updates, new = inner.update(optax.tree.cast(grads, jnp.float32), cast(state, jnp.float32), params)
        new = cast(new, jnp.dtype(dtype))
        return updates, jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _map_names(fn, tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: fn(path_names(path)[-1]), tree)


def _map_leaves(fn, tree, *rest):
    """jax.tree.map of a function that returns a tuple: a tuple of trees."""
    leaves, treedef = jax.tree.flatten(tree)
    return tuple(map(treedef.unflatten, zip(*map(fn, leaves, *map(treedef.flatten_up_to, rest)))))


def _letters(name: str, table: dict) -> tuple[str, str] | None:
    if name.startswith(("w_", "lora_")) and name not in table:
        raise ValueError(f"parameter {name!r}: list it in optim.MATRICES with its letters in and out, or None")
    return table.get(name)


def _is_stacked(name: str, x: jax.Array) -> bool:
    extra = x.ndim - len(suffix(name))
    if extra not in (0, 1):
        raise ValueError(f"parameter {name!r} has shape {x.shape}; it may have only L in front of its letters")
    return extra == 1


def _axes(name: str, x: jax.Array, letters: str) -> tuple[int, ...]:
    return tuple(_is_stacked(name, x) + suffix(name).index(letter) for letter in letters)
