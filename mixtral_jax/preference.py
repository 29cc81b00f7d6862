"""Direct preference optimization (Rafailov et al., arXiv 2305.18290) and its relatives, on pairs packed into rows.

Segments 2 p + 1 and 2 p + 2 of a row are the chosen and the rejected answer of its p-th pair, so that both go through the
model in one forward pass, and a pair's log-probabilities are sums within one row: nothing travels between devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.config import Config, DpoConfig
from mixtral_jax.losses import Totals, add_up, router_terms, token_losses

# Losses that are the same for every reference, because they have none.
REFERENCE_FREE = ("simpo",)
ROUNDINGS = 4  # of a sum of log-probabilities, in its last bit, that are no difference


def has_reference(config: Config) -> bool:
    """Whether the stage compares with a reference."""
    return config.train.stage == "dpo" and config.dpo.loss not in REFERENCE_FREE


def runs_reference(config: Config) -> bool:
    """Whether every step runs the reference; else its log-probabilities come with the batches, or there is none."""
    return has_reference(config) and config.dpo.reference == "on_the_fly"


class Answers(NamedTuple):
    """Sums over the answers of each pair, float32 [B, P]; 0 where there is no pair."""

    chosen_BP: jax.Array  # log-probability of the chosen answer, nats
    rejected_BP: jax.Array
    chosen_tokens_BP: jax.Array  # its tokens
    rejected_tokens_BP: jax.Array


def sum_answers(log_probs_BT, loss_weights_BT, segment_ids_BT, pairs: int) -> Answers:
    """Adds up the log-probabilities of each answer's tokens.

    Args:
        log_probs_BT: float32, of each target.
        loss_weights_BT: 1 where the target belongs to an answer, else 0.
        segment_ids_BT: see batch.fill.
        pairs: P, the most pairs of a row.
    """

    def sums(values_BT):
        # A masked sum over T: T may be split over `context`, where a scatter would collect the row.
        mine_BTQ = segment_ids_BT[..., None] == jnp.arange(1, 2 * pairs + 1)[None, None, :]
        return jnp.where(mine_BTQ, (values_BT * loss_weights_BT)[..., None], 0).sum(1)

    log_probs_BQ, tokens_BQ = sums(log_probs_BT), sums(jnp.ones_like(log_probs_BT))
    return Answers(log_probs_BQ[:, 0::2], log_probs_BQ[:, 1::2], tokens_BQ[:, 0::2], tokens_BQ[:, 1::2])


def answers(model, batch: dict, head_chunk: int):
    """Runs the model on a batch of pairs.

    Returns:
        Answers, and what the loss may need besides: nll_BT, log_z_BT (see token_losses), RouterStats with a leading L.
    """
    x_BTD, stats_L = model.hidden(batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"])
    nll_BT, log_z_BT = token_losses(x_BTD, model.head_DV[...], batch["targets_BT"], head_chunk)
    found = sum_answers(-nll_BT, batch["loss_weights_BT"], batch["segment_ids_BT"], batch["pairs_BP"].shape[1])
    return found, nll_BT, log_z_BT, stats_L


def log_ratio(policy_BP, reference_BP):
    """log policy - log reference of answers, exactly 0 where float32 cannot tell the two apart; the gradient is the difference's.

    Training and the reference are different programs, and a compiler may round the last bit differently in each. Without
    this a policy that is its reference would win some ties by noise.
    """
    difference_BP = policy_BP - reference_BP
    noise_BP = ROUNDINGS * jnp.finfo(jnp.float32).eps * (jnp.abs(policy_BP) + jnp.abs(reference_BP))
    is_noise_BP = lax.stop_gradient(jnp.abs(difference_BP) <= noise_BP)
    return difference_BP - lax.stop_gradient(jnp.where(is_noise_BP, difference_BP, 0))


def pair_losses(policy: Answers, reference: Answers | None, config: DpoConfig):
    """The preference loss of every pair.

    With c and r the log-ratios of policy to reference of the chosen and the rejected answer, d = c - r, b = beta, e =
    label_smoothing, |y| an answer's tokens:

        sigmoid       -(1 - e) log sig(b d) - e log sig(-b d)       arXiv 2305.18290, eq. 7; with e: cDPO
        robust        [-(1 - e) log sig(b d) + e log sig(-b d)] / (1 - 2 e)                 arXiv 2403.00409
        ipo           (c / |y_c| - r / |y_r| - 1 / (2 b))^2         arXiv 2310.12036, eq. 17; averaged over tokens
        hinge         max(0, 1 - b d)                                                       arXiv 2305.10425
        sigmoid_norm  -log sig(b (c / |y_c| - r / |y_r|))           arXiv 2411.15124, eq. 6
        simpo         -log sig(b (mean log p_c - mean log p_r) - gamma), without a reference    arXiv 2405.14734
        apo_zero      1 - sig(b c) + sig(b r)                                               arXiv 2408.06266

    Args:
        policy: sums of the model that is trained.
        reference: of the reference; not read by simpo.
        config: loss, beta, label_smoothing, gamma.

    Returns:
        loss_BP; chosen_rewards_BP and rejected_rewards_BP, b times the log-ratios (simpo: times the mean log-probs).
        Where there is no pair they mean nothing.
    """
    b, e = config.beta, config.label_smoothing
    chosen_tokens_BP, rejected_tokens_BP = (
        jnp.maximum(n_BP, 1.0) for n_BP in (policy.chosen_tokens_BP, policy.rejected_tokens_BP)
    )
    log_sigmoid = jax.nn.log_sigmoid
    if config.loss == "simpo":
        c_BP, r_BP = policy.chosen_BP / chosen_tokens_BP, policy.rejected_BP / rejected_tokens_BP
        return -log_sigmoid(b * (c_BP - r_BP) - config.gamma), b * c_BP, b * r_BP
    c_BP = log_ratio(policy.chosen_BP, reference.chosen_BP)
    r_BP = log_ratio(policy.rejected_BP, reference.rejected_BP)
    d_BP = c_BP - r_BP
    mean_d_BP = c_BP / chosen_tokens_BP - r_BP / rejected_tokens_BP
    if config.loss == "sigmoid":
        loss_BP = -(1 - e) * log_sigmoid(b * d_BP) - e * log_sigmoid(-b * d_BP)
    elif config.loss == "robust":
        loss_BP = (-(1 - e) * log_sigmoid(b * d_BP) + e * log_sigmoid(-b * d_BP)) / (1 - 2 * e)
    elif config.loss == "ipo":
        loss_BP = jnp.square(mean_d_BP - 1 / (2 * b))
    elif config.loss == "hinge":
        loss_BP = jax.nn.relu(1 - b * d_BP)
    elif config.loss == "sigmoid_norm":
        loss_BP = -log_sigmoid(b * mean_d_BP)
    else:
        assert config.loss == "apo_zero", config.loss
        loss_BP = 1 - jax.nn.sigmoid(b * c_BP) + jax.nn.sigmoid(b * r_BP)
    return loss_BP, b * c_BP, b * r_BP


def stored_reference(batch: dict, policy: Answers) -> Answers:
    """The reference's sums that came with a batch; its answers have as many tokens."""
    return policy._replace(chosen_BP=batch["reference_chosen_BP"], rejected_BP=batch["reference_rejected_BP"])


def pair_terms(policy: Answers, reference: Answers | None, valid_BP, pairs, config: DpoConfig) -> dict[str, jax.Array]:
    """The preference loss and the metrics of DPO, each as the sum over these pairs divided by `pairs`.

    Args:
        policy, reference: see `pair_losses`.
        valid_BP: bool, where there is a pair.
        pairs: float32, by what to divide: the pairs of the whole step.

    Returns:
        preference_loss; rewards/chosen, rewards/rejected, rewards/margins; rewards/accuracies, the share of pairs whose
        chosen answer has the higher reward, a tie counting as none; logps/chosen and logps/rejected, nats an answer.
    """
    loss_BP, chosen_BP, rejected_BP = pair_losses(policy, reference, config)
    chosen_BP, rejected_BP = lax.stop_gradient((chosen_BP, rejected_BP))
    values = {
        "preference_loss": loss_BP,
        "rewards/chosen": chosen_BP,
        "rewards/rejected": rejected_BP,
        "rewards/accuracies": (chosen_BP > rejected_BP).astype(jnp.float32),
        "rewards/margins": chosen_BP - rejected_BP,
        "logps/chosen": lax.stop_gradient(policy.chosen_BP),
        "logps/rejected": lax.stop_gradient(policy.rejected_BP),
    }
    return {name: jnp.where(valid_BP, value_BP, 0).sum() / pairs for name, value_BP in values.items()}


def dpo_loss(model, batch: dict, totals: Totals, config: Config, reference=None):
    """The loss of a micro-batch of pairs, as its part of the whole step's loss.

    loss = mean preference loss + dpo.sft_weight * mean NLL of the chosen answers' tokens + z-loss and router terms, the
    same as in pretraining; these two over both answers.

    Args:
        model: the policy.
        batch: the fields of pretraining (loss_weights_BT 1 on answers), pairs_BP; reference_chosen_BP and
            reference_rejected_BP unless `reference` is given or the loss has none.
        totals: counts of the whole step.
        config: dpo and loss are read.
        reference: the reference model; no gradient goes through it.

    Returns:
        loss, (terms, stats_L): see pretrain_loss.
    """
    policy, nll_BT, log_z_BT, stats_L = answers(model, batch, config.loss.head_chunk)
    if config.dpo.loss in REFERENCE_FREE:
        found = None
    elif reference is None:
        found = stored_reference(batch, policy)
    else:
        found = lax.stop_gradient(answers(lax.stop_gradient(reference), batch, config.loss.head_chunk)[0])
    weights_BT = batch["loss_weights_BT"]
    chosen_BT = weights_BT * (batch["segment_ids_BT"] % 2 == 1)
    terms = {
        **pair_terms(policy, found, batch["pairs_BP"] > 0, totals.pairs, config.dpo),
        "token_loss": (nll_BT * chosen_BT).sum() / totals.chosen_weight,
        "z_loss": (jnp.square(log_z_BT) * weights_BT).sum() / totals.weight,
        **router_terms(stats_L, totals, model.config.experts_per_token, config.loss),
    }
    loss = terms["preference_loss"] + config.dpo.sft_weight * terms["token_loss"]
    return add_up(loss, terms, config.loss), (terms, lax.stop_gradient(stats_L))
