"""Preference losses for parity with trl: their settings, the models, the pairs, and how ours computes them.

Shared by the script that makes the goldens and by the tests. Nothing here imports torch or trl.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from mixtral_jax.config import Config, DpoConfig
from mixtral_jax.data import TokenFile
from mixtral_jax.losses import Totals
from mixtral_jax.models import mixtral
from mixtral_jax.preference import answers, dpo_loss
from mixtral_jax.sharding import named_leaves
from tests.golden import reference
from tests.pairs import batches, dpo

SHAPE = reference.BASE
POLICY, REFERENCE = 0, 1  # seeds of reference.weights
BETA, GAMMA, SMOOTHING, SFT = 0.3, 0.5, 0.2, 0.4
# What differs from the defaults, by the keys of our config.
CASES: dict[str, dict] = {
    "sigmoid": dict(loss="sigmoid"),
    "cdpo": dict(loss="sigmoid", label_smoothing=SMOOTHING),
    "robust": dict(loss="robust", label_smoothing=SMOOTHING),
    "ipo": dict(loss="ipo"),
    "hinge": dict(loss="hinge"),
    "sigmoid_norm": dict(loss="sigmoid_norm"),
    "simpo": dict(loss="simpo"),
    "apo_zero": dict(loss="apo_zero"),
}
# And with the NLL of the chosen answers; in trl DPO and simpo are two trainers, and each has its own.
WITH_SFT = {f"{name}_sft": CASES[name] | dict(sft_weight=SFT) for name in ("sigmoid", "simpo")}
METRICS = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")) + (
    "logps/chosen",
    "logps/rejected",
)


GOLDEN_MODEL = "sigmoid_sft"  # of WITH_SFT, the case whose whole model is stored


class Found(NamedTuple):
    """What one side computes for a batch of pairs."""

    loss: float
    metrics: dict[str, float]  # METRICS
    grads: dict[str, np.ndarray]  # by our names
    balance: float | None = None  # the balance loss, not weighted; trl has none where its coefficient is 0


def settings(case: dict) -> DpoConfig:
    """Our settings of a case."""
    values = dict(beta=BETA, label_smoothing=0.0, gamma=GAMMA, sft_weight=0.0, reference="precomputed")
    return DpoConfig(**values | case)


def config_of(case: dict, **loss) -> Config:
    """A run of these shapes in float32, without router terms unless `loss` has their weights."""
    changes = {f"model__{key}": value for key, value in SHAPE.items()}
    weights = dict(balance_mode="huggingface", balance_weight=0.0, router_z_weight=0.0, z_weight=0.0) | loss
    changes |= {f"loss__{key}": value for key, value in weights.items()}
    return dataclasses.replace(dpo(**changes), dpo=settings(case))


def model_of(config: Config, seed: int):
    """Our model with the weights of this seed."""
    like = mixtral.abstract(config.model)
    weights = reference.weights(SHAPE, seed)
    order = named_leaves(like)
    assert order.keys() == weights.keys()
    return jax.tree.unflatten(jax.tree.structure(like), [weights[leaf] for leaf in order])


def chosen_tokens(file: TokenFile) -> np.ndarray:
    """Trained tokens of each pair's chosen answer, [n]."""
    return np.add.reduceat(file.weights, file.offsets[:-1])[0::2]


def ours(case: dict, file: TokenFile, *, seeds: tuple[int, int] = (POLICY, REFERENCE), **loss) -> Found:
    """Loss and gradients of all pairs of a file, packed, as one micro-batch.

    Args:
        case: see CASES.
        file: the pairs.
        seeds: of the policy's and the reference's weights.
        loss: weights of the router terms.
    """
    config = config_of(case, **loss)
    policy, ref = (model_of(config, seed) for seed in seeds)
    batch = batches(config, file).eval_batch(0)
    batch = {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}
    assert (batch["pairs_BP"] > 0).sum(1).max() > 1, "no row holds two pairs, and packing is not tried"
    found = jax.jit(lambda m, b: answers(m, b, config.loss.head_chunk)[0])(ref, batch)
    batch |= {"reference_chosen_BP": found.chosen_BP, "reference_rejected_BP": found.rejected_BP}

    def value(policy):
        total, (terms, _) = dpo_loss(policy, batch, Totals.of(batch), config)
        return total, terms

    (total, terms), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(policy)
    metrics = {name: float(terms[name]) for name in METRICS}
    by_name = {name: np.asarray(grad) for name, grad in named_leaves(grads).items()}
    return Found(float(total), metrics, by_name, float(terms["balance_loss"]))


def log_probs() -> dict[str, np.ndarray]:
    """Log-probabilities of every token of 6 pairs: policy and reference float32 [12, 9], mask int32 [12, 9].

    Rows are the chosen answers, then the rejected ones; the first token is never a target. Pair 0 is a tie, policy equal
    to reference; pairs 1 and 2 are far apart, one each way; of pair 3 both answers are one token, and the losing answer
    of pair 4 is longer than the winning one.
    """
    rng = np.random.RandomState(2)
    lengths = np.array([5, 8, 6, 1, 2, 7, 4, 8, 6, 1, 8, 3])
    at = np.arange(9)[None, :]
    end = np.minimum(1 + lengths + rng.randint(0, 3, 12), 9)[:, None]
    mask = ((at >= end - lengths[:, None]) & (at < end)).astype(np.int32)
    reference_ = -rng.gamma(2.0, 1.5, mask.shape)
    shift = rng.normal(0, 0.7, mask.shape)
    shift[[0, 6]] = 0
    shift[[1, 8]], shift[[2, 7]] = 6.0, -6.0
    policy = np.minimum(reference_ + shift, -0.02 * rng.uniform(1, 2, mask.shape))
    policy[[0, 6]] = reference_[[0, 6]]
    return {"policy": policy.astype(np.float32), "reference": reference_.astype(np.float32), "mask": mask}


def directions() -> dict[str, np.ndarray]:
    """Fixed random numbers of each parameter's shape."""
    return reference.weights(SHAPE, 3)


def summary(grad: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The norm of a gradient and its product with `direction`, float64 [2]: the second sees what only moved."""
    grad, direction = np.asarray(grad, np.float64), np.asarray(direction, np.float64)
    return np.array([np.sqrt((grad**2).sum()), (grad * direction).sum()])
