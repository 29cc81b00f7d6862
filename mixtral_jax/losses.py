"""The loss terms. Everything adds up: over micro-batches, devices and evaluation batches, sums are divided by one total.

Each term of a micro-batch is already divided by the totals of the whole step, so that the terms, like the gradients, are
simply added over micro-batches; nothing here is a mean of means.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.config import LossConfig
from mixtral_jax.models.mixtral import Mixtral
from mixtral_jax.models.moe import RouterStats
from mixtral_jax.sharding import act_spec, param_spec


class Totals(NamedTuple):
    """Counts of a whole optimizer step: all devices, all micro-batches. float32 scalars."""

    weight: jax.Array  # sum of loss weights
    tokens: jax.Array  # tokens that are not padding
    pairs: jax.Array | None = None  # of a batch of pairs: how many
    chosen_weight: jax.Array | None = None  # and the sum of the chosen answers' loss weights

    @classmethod
    def of(cls, batch: dict) -> "Totals":
        """Counts a batch; a step without a single trained token counts 1, which makes its loss 0 and not NaN."""

        def positive(count):
            return jnp.where(count > 0, count, 1.0)

        weights_BT, segment_ids_BT = batch["loss_weights_BT"].astype(jnp.float32), batch["segment_ids_BT"]
        tokens = (segment_ids_BT > 0).astype(jnp.float32).sum()
        counts = cls(positive(weights_BT.sum()), jnp.maximum(tokens, 1.0))
        if "pairs_BP" not in batch:
            return counts
        return counts._replace(
            pairs=positive((batch["pairs_BP"] > 0).astype(jnp.float32).sum()),
            chosen_weight=positive((weights_BT * (segment_ids_BT % 2 == 1)).sum()),
        )


def token_losses(x_BTD, head_DV, targets_BT, chunk: int):
    """Cross-entropy of every token, `chunk` positions at a time, so that the logits [B, T, V] never exist at once.

    The backward pass computes a chunk's logits again instead of keeping them. On a mesh each device has its tokens' logits
    for its part of V and only their maxima and sums travel over `tensor`; the head is gathered over `fsdp` once, and its
    gradient reduced once, not with every chunk.

    Args:
        x_BTD: hidden states after the final norm.
        head_DV: float32 head.
        targets_BT: int32.
        chunk: positions per chunk, on each device that has a part of T.

    Returns:
        nll_BT, log_z_BT: float32; the negative log-likelihood in nats and logsumexp(logits).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local_losses(x_BTD, head_DV.astype(x_BTD.dtype), targets_BT, chunk, over=None)

    def local(x_btD, head_dv, targets_bt):
        head_Dv = lax.all_gather(head_dv.astype(x_btD.dtype), "fsdp", axis=0, tiled=True)
        return _local_losses(x_btD, head_Dv, targets_bt, chunk, over="tensor")

    sharded = jax.shard_map(
        local,
        in_specs=(act_spec("BTD"), param_spec("head_DV", 2), act_spec("BT")),
        out_specs=(act_spec("BT"), act_spec("BT")),
        check_vma=False,  # the scan starts from plain zeros; gradients are tested against one device
    )
    return sharded(x_BTD, head_DV, targets_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def summed_losses(x_BTD, head_DV, targets_BT, weights_BT, z_weight: float, chunk: int):
    """The weighted sum of all tokens' losses, whose gradient is made with it: logits are computed once, not twice.

        objective = sum(weight * (nll + z_weight * log_z^2)),   of which d/dlogits = weight ((1 + 2 z_weight log_z) p - target)

    needs nothing from what comes after but a scalar, so the forward pass can multiply it into the gradients of x and of
    the head while a chunk's logits are there. For one device: the head's gradient, float32 [D, V], waits for the layers'
    backward pass, and it would be whole on every device of a mesh.

    Args:
        x_BTD, head_DV, targets_BT, chunk: see `token_losses`.
        weights_BT: float32, of each token; no gradient flows to them.
        z_weight: of the square of logsumexp(logits).

    Returns:
        objective; and without gradients the sums of weight * nll and of weight * log_z^2. float32 scalars.
    """
    nll_BT, log_z_BT = _local_losses(x_BTD, head_DV, targets_BT, chunk, over=None)
    token_sum, z_sum = (weights_BT * nll_BT).sum(), (weights_BT * jnp.square(log_z_BT)).sum()
    return token_sum + z_weight * z_sum, lax.stop_gradient((token_sum, z_sum))


def _summed_forward(x_BTD, head_DV, targets_BT, weights_BT, z_weight: float, chunk: int):
    dtype = x_BTD.dtype
    head = head_DV.astype(dtype)

    def one_chunk(d_head_DV, inputs):
        x_BCD, targets_BC, weights_BC = inputs
        logits_BCV = jnp.einsum("BCD,DV->BCV", x_BCD, head, preferred_element_type=jnp.float32)
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        nll_BC = log_z_BC - jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        factor_BC = weights_BC * (1 + 2 * z_weight * log_z_BC)
        hit_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])[None, None, :]
        d_logits_BCV = factor_BC[..., None] * jnp.exp(logits_BCV - log_z_BC[..., None])
        d_logits_BCV = (d_logits_BCV - jnp.where(hit_BCV, weights_BC[..., None], 0)).astype(dtype)
        dx_BCD = jnp.einsum("BCV,DV->BCD", d_logits_BCV, head, preferred_element_type=jnp.float32).astype(dtype)
        d_head_DV += jnp.einsum("BCD,BCV->DV", x_BCD, d_logits_BCV, preferred_element_type=jnp.float32)
        return d_head_DV, (dx_BCD, nll_BC, log_z_BC)

    inputs = tuple(_chunks(a, chunk) for a in (x_BTD, targets_BT, weights_BT))
    d_head_DV, outputs = lax.scan(one_chunk, jnp.zeros(head_DV.shape, jnp.float32), inputs)
    b, t, _ = x_BTD.shape
    dx_BTD, nll_BT, log_z_BT = (jnp.moveaxis(a, 0, 1).reshape(b, -1, *a.shape[3:])[:, :t] for a in outputs)
    token_sum, z_sum = (weights_BT * nll_BT).sum(), (weights_BT * jnp.square(log_z_BT)).sum()
    return (token_sum + z_weight * z_sum, (token_sum, z_sum)), (dx_BTD, d_head_DV.astype(head_DV.dtype))


def _summed_backward(z_weight: float, chunk: int, saved, cotangents):
    dx_BTD, d_head_DV = saved
    scale = cotangents[0]
    return (dx_BTD * scale).astype(dx_BTD.dtype), (d_head_DV * scale).astype(d_head_DV.dtype), None, None


summed_losses.defvjp(_summed_forward, _summed_backward)


def _local_losses(x_BTD, head_DV, targets_BT, chunk: int, over: str | None):
    """`token_losses` of the tokens and the part of V that are here; the other parts are over this mesh axis."""
    b, t, _ = x_BTD.shape
    # float32 here and cast in the chunk, so that the gradients of all chunks are summed in float32.
    head_DV = head_DV.astype(jnp.float32)
    first = lax.axis_index(over) * head_DV.shape[1] if over else 0

    @jax.checkpoint
    def one_chunk(_, inputs):
        x_BCD, targets_BC = inputs
        logits_BCV = jnp.einsum("BCD,DV->BCV", x_BCD, head_DV.astype(x_BCD.dtype), preferred_element_type=jnp.float32)
        max_BC = lax.stop_gradient(logits_BCV.max(-1))
        max_BC = lax.pmax(max_BC, over) if over else max_BC
        # A masked sum works with V split over devices, where a gather would collect the logits.
        hit_BCV = (targets_BC - first)[..., None] == jnp.arange(logits_BCV.shape[-1])[None, None, :]
        sums = jnp.exp(logits_BCV - max_BC[..., None]).sum(-1), jnp.where(hit_BCV, logits_BCV, 0).sum(-1)
        sum_BC, target_BC = lax.psum(sums, over) if over else sums
        log_z_BC = max_BC + jnp.log(sum_BC)
        return None, (log_z_BC - target_BC, log_z_BC)

    _, outputs = lax.scan(one_chunk, None, (_chunks(x_BTD, chunk), _chunks(targets_BT, chunk)))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(b, -1)[:, :t] for a in outputs)


def token_scores(x_BTD, head_DV, targets_BT, chunk: int):
    """Log-probability of every target and whether it is the likeliest token; for evaluation, without a backward pass.

    Args:
        x_BTD, head_DV, targets_BT, chunk: see `token_losses`.

    Returns:
        log_prob_BT: float32, nats; greedy_BT: bool, of equally likely tokens the one of the lowest id counts as the likeliest.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local_scores(x_BTD, head_DV.astype(x_BTD.dtype), targets_BT, chunk, over=None)

    def local(x_btD, head_dv, targets_bt):
        head_Dv = lax.all_gather(head_dv.astype(x_btD.dtype), "fsdp", axis=0, tiled=True)
        return _local_scores(x_btD, head_Dv, targets_bt, chunk, over="tensor")

    sharded = jax.shard_map(
        local,
        in_specs=(act_spec("BTD"), param_spec("head_DV", 2), act_spec("BT")),
        out_specs=(act_spec("BT"), act_spec("BT")),
        check_vma=False,  # as in token_losses
    )
    return sharded(x_BTD, head_DV, targets_BT)


def _local_scores(x_BTD, head_DV, targets_BT, chunk: int, over: str | None):
    """`token_scores` of the tokens and the part of V that are here; the other parts are over this mesh axis."""
    first = lax.axis_index(over) * head_DV.shape[1] if over else 0

    def one_chunk(inputs):
        x_BCD, targets_BC = inputs
        logits_BCV = jnp.einsum("BCD,DV->BCV", x_BCD, head_DV, preferred_element_type=jnp.float32)
        max_BC, best_BC = logits_BCV.max(-1), logits_BCV.argmax(-1).astype(jnp.int32) + first
        if over:
            top_BC = lax.pmax(max_BC, over)
            best_BC = lax.pmin(jnp.where(max_BC == top_BC, best_BC, jnp.iinfo(jnp.int32).max), over)
            max_BC = top_BC
        hit_BCV = (targets_BC - first)[..., None] == jnp.arange(logits_BCV.shape[-1])[None, None, :]
        sums = jnp.exp(logits_BCV - max_BC[..., None]).sum(-1), jnp.where(hit_BCV, logits_BCV, 0).sum(-1)
        sum_BC, target_BC = lax.psum(sums, over) if over else sums
        return target_BC - max_BC - jnp.log(sum_BC), best_BC == targets_BC

    b, t, _ = x_BTD.shape
    outputs = lax.map(one_chunk, (_chunks(x_BTD, chunk), _chunks(targets_BT, chunk)))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(b, -1)[:, :t] for a in outputs)


def _chunks(array, chunk: int):
    """Cuts axis 1, padded, into pieces of `chunk`, which become the first axis."""
    chunk = min(chunk, array.shape[1])
    count = -(-array.shape[1] // chunk)
    pad = [(0, 0), (0, count * chunk - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return jnp.moveaxis(jnp.pad(array, pad).reshape(array.shape[0], count, chunk, *array.shape[2:]), 1, 0)


def load_balance(stats_L: RouterStats, k: int, mode: str):
    """Load-balancing loss of a micro-batch.

    per_layer: mean over layers of E * sum_e f_e P_e (Switch, arXiv 2101.03961, eq. 4-6, with top-K counts), f_e the
    share of assignments and P_e the mean router probability: 1.0 when either is uniform, E / K at full collapse.
    huggingface: transformers' formula, for parity: counts and probabilities are pooled over the layers first, and f sums
    to K. Its value is K when uniform; it cannot see layers that collapse onto different experts.

    Args:
        stats_L: RouterStats with a leading L.
        k: experts per token.
        mode: "per_layer" or "huggingface".
    """
    e = stats_L.count_E.shape[-1]
    tokens_L = jnp.maximum(stats_L.tokens, 1.0)[:, None]
    load_LE = stats_L.count_E / (k * tokens_L)
    prob_LE = stats_L.prob_E / tokens_L
    if mode == "huggingface":
        return e * k * (load_LE.mean(0) * prob_LE.mean(0)).sum()
    return e * (load_LE * prob_LE).sum(-1).mean()


def router_terms(stats_L: RouterStats, totals: Totals, k: int, config: LossConfig) -> dict[str, jax.Array]:
    """Balance and router z-loss, shared by all stages; each is this micro-batch's part of the step's value.

    The balance loss is nonlinear in the batch: over accumulation steps it is the token-weighted mean of the
    micro-batches' values. The router z-loss (ST-MoE, arXiv 2202.08906, eq. 5) is a plain mean over tokens and layers.
    """
    layers = stats_L.tokens.shape[0]
    share = stats_L.tokens[0] / totals.tokens
    return {
        "balance_loss": load_balance(stats_L, k, config.balance_mode) * share,
        "router_z_loss": stats_L.z.sum() / (layers * totals.tokens),
    }


def pretrain_loss(model: Mixtral, batch: dict, totals: Totals, config: LossConfig):
    """Next-token loss of one micro-batch, as its part of the whole step's loss; that of SFT too, whose weights choose answers.

    token_loss = sum(weight * nll) / total weight, in nats; z_loss the same for logsumexp^2 (PaLM, arXiv 2204.02311).

    Args:
        model: the model.
        batch: tokens_BT, targets_BT, loss_weights_BT, positions_BT, segment_ids_BT.
        totals: counts of the whole step.
        config: weights of the terms.

    Returns:
        loss, (terms, stats_L): terms are unweighted values by name; all of them add up over micro-batches.
    """
    x_BTD, stats_L = model.hidden(batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"])
    head_DV, targets_BT = model.head_DV[...], batch["targets_BT"]
    weights_BT = batch["loss_weights_BT"] / totals.weight
    mesh = jax.sharding.get_abstract_mesh()
    if (mesh.empty or mesh.size == 1) and not frozen_head(model):
        found = summed_losses(x_BTD, head_DV, targets_BT, weights_BT, config.z_weight, config.head_chunk)
        loss, (token_loss, z_loss) = found
    else:
        nll_BT, log_z_BT = token_losses(x_BTD, head_DV, targets_BT, config.head_chunk)
        token_loss, z_loss = (nll_BT * weights_BT).sum(), (jnp.square(log_z_BT) * weights_BT).sum()
        loss = token_loss + config.z_weight * z_loss
    terms = {
        "token_loss": token_loss,
        "z_loss": z_loss,
        **router_terms(stats_L, totals, model.config.experts_per_token, config),
    }
    return add_router(loss, terms, config), (terms, jax.tree.map(lax.stop_gradient, stats_L))


def frozen_head(model: Mixtral) -> bool:
    """Whether the head gets no gradient, because adapters learn in its place."""
    return model.layers.lora is not None


def add_up(loss, terms: dict, config: LossConfig):
    """Adds the weighted z-loss and router terms, the same in all stages, to a stage's own loss."""
    return add_router(loss + config.z_weight * terms["z_loss"], terms, config)


def add_router(loss, terms: dict, config: LossConfig):
    """Adds the weighted router terms to a loss."""
    return loss + config.balance_weight * terms["balance_loss"] + config.router_z_weight * terms["router_z_loss"]
