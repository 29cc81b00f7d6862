"""The loss terms. Everything adds up: over micro-batches, devices and evaluation batches, sums are divided by one total.

Each term of a micro-batch is already divided by the totals of the whole step, so that the terms, like the gradients, are
simply added over micro-batches; nothing here is a mean of means.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.config import LossConfig
from mixtral_jax.models.mixtral import Mixtral
from mixtral_jax.models.moe import RouterStats
from mixtral_jax.sharding import constrain


class Totals(NamedTuple):
    """Counts of a whole optimizer step: all devices, all micro-batches. float32 scalars."""

    weight: jax.Array  # sum of loss weights
    tokens: jax.Array  # tokens that are not padding

    @classmethod
    def of(cls, batch: dict) -> "Totals":
        """Counts a batch; a step without a single trained token counts 1, which makes its loss 0 and not NaN."""
        weight = batch["loss_weights_BT"].astype(jnp.float32).sum()
        tokens = (batch["segment_ids_BT"] > 0).astype(jnp.float32).sum()
        return cls(jnp.where(weight > 0, weight, 1.0), jnp.maximum(tokens, 1.0))


def token_losses(x_BTD, head_DV, targets_BT, chunk: int):
    """Cross-entropy of every token, `chunk` positions at a time, so that the logits [B, T, V] never exist at once.

    The backward pass computes a chunk's logits again instead of keeping them.

    Args:
        x_BTD: hidden states after the final norm.
        head_DV: float32 head.
        targets_BT: int32.
        chunk: positions per chunk, on each device that has a part of T.

    Returns:
        nll_BT, log_z_BT: float32; the negative log-likelihood in nats and logsumexp(logits).
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["context"]
    b, t = targets_BT.shape
    mine = t // shards
    chunk = min(chunk, mine)
    count = -(-mine // chunk)

    def cut(a_BT):
        """[B, T, ...] -> [count, B, C, ...]; each chunk has its part of every shard's columns, so that all have work."""
        rest = a_BT.shape[2:]
        a = a_BT.reshape(b, shards, mine, *rest)
        a = jnp.pad(a, [(0, 0), (0, 0), (0, count * chunk - mine)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(a.reshape(b, shards, count, chunk, *rest), 2, 0).reshape(count, b, shards * chunk, *rest)

    def join(a_nBC):
        """The inverse of `cut`."""
        a = jnp.moveaxis(a_nBC.reshape(count, b, shards, chunk), 0, 2).reshape(b, shards, count * chunk)
        return a[:, :, :mine].reshape(b, t)

    # Whole in D before the scan: gathered over fsdp once and not once per chunk.
    head_DV = constrain(head_DV.astype(x_BTD.dtype), "DV")

    @jax.checkpoint
    def one_chunk(_, inputs):
        x_BCD, targets_BC = constrain(inputs[0], "BCD"), constrain(inputs[1], "BC")
        logits_BCV = jnp.einsum("BCD,DV->BCV", x_BCD, head_DV, preferred_element_type=jnp.float32)
        logits_BCV = constrain(logits_BCV, "BCV")
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        # A masked sum works with V split over devices, where a gather would collect the logits.
        hit_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])[None, None, :]
        return None, (log_z_BC - jnp.where(hit_BCV, logits_BCV, 0).sum(-1), log_z_BC)

    _, outputs = lax.scan(one_chunk, None, (cut(x_BTD), cut(targets_BT)))
    return tuple(map(join, outputs))


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
    """Next-token loss of one micro-batch, as its part of the whole step's loss.

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
    nll_BT, log_z_BT = token_losses(x_BTD, model.head_DV[...], batch["targets_BT"], config.head_chunk)
    weights_BT = batch["loss_weights_BT"]
    terms = {
        "token_loss": (nll_BT * weights_BT).sum() / totals.weight,
        "z_loss": (jnp.square(log_z_BT) * weights_BT).sum() / totals.weight,
        **router_terms(stats_L, totals, model.config.experts_per_token, config),
    }
    loss = (
        terms["token_loss"]
        + config.z_weight * terms["z_loss"]
        + config.balance_weight * terms["balance_loss"]
        + config.router_z_weight * terms["router_z_loss"]
    )
    return loss, (terms, jax.tree.map(lax.stop_gradient, stats_L))
