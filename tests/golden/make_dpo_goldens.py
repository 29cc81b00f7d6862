"""Writes tests/golden/preference.npz: what trl computes for the preference losses.

python -m tests.golden.make_dpo_goldens       # needs requirements-parity.txt

Two parts. Keys LOSS.*: the loss and its gradient for given log-probabilities of every token, with trl's trainers around
a stand-in for the model. Keys model.*: loss, metrics and gradients of the small Mixtral on real pairs; of each gradient
its norm and its product with random numbers of `preference.directions`.
"""

import types
from pathlib import Path

import numpy as np
import torch
import transformers
import trl

from tests.golden import preference, trl_losses
from tests.golden.preference import CASES, METRICS, WITH_SFT
from tests.pairs import random_pairs


class StandIn(torch.nn.Module):
    """Gives trl's DPO trainer these log-probabilities, [2 n, T + 1], as its own fused head would."""

    def __init__(self, log_probs):
        super().__init__()
        self.log_probs = log_probs

    def forward(self, labels, **_):
        # What a target's label does not ask for is 0, and the first token is no target.
        mask = labels[:, 1:] != -100
        zeros = torch.zeros(mask.shape)
        return types.SimpleNamespace(
            log_probs=self.log_probs[:, 1:].masked_fill(~mask, 0), entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
        )


class StandInLogits(StandIn):
    """The same for CPOTrainer, which wants logits: of two words, token 0 having the given log-probability."""

    def forward(self, *_, **__):
        # The last position predicts nothing.
        of_0 = torch.cat([self.log_probs[:, 1:], self.log_probs[:, :1]], 1)
        return types.SimpleNamespace(logits=torch.stack([of_0, torch.log(-torch.expm1(of_0))], -1))


def dpo_inputs(mask) -> dict:
    """What the DPO trainer's collator gives for these masks, all tokens being 0."""
    whole = torch.tensor(mask).long()
    return {"input_ids": 0 * whole, "attention_mask": 0 * whole + 1, "completion_mask": whole}


def cpo_inputs(mask) -> dict:
    """What CPO's collator gives."""
    labels = torch.where(torch.tensor(mask) > 0, 0, -100)
    chosen, rejected = labels.chunk(2)
    return {
        f"{which}_{field}": value
        for which, some in (("chosen", chosen), ("rejected", rejected))
        for field, value in (("input_ids", 0 * some), ("attention_mask", 0 * some + 1), ("labels", some))
    }


def of_log_probs(case: dict, made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """loss of the batch, grad [2 n, T + 1] by the policy's log-probabilities, metrics [METRICS]."""
    pairs = len(made["mask"]) // 2
    trainer = trl_losses.trainer_of(case, trl_losses.rows_of(random_pairs(2)))
    leaf = torch.tensor(made["policy"], requires_grad=True)
    alone = getattr(trainer, "loss_types", None) == ["aot"]
    groups = [np.array([i, i + pairs]) for i in range(pairs)] if alone else [np.arange(2 * pairs)]
    loss = 0.0
    for rows in groups:
        if case["loss"] == "simpo":
            inputs, policy = cpo_inputs(made["mask"][rows]), StandInLogits(leaf[rows])
        else:
            inputs, policy = dpo_inputs(made["mask"][rows]), StandIn(leaf[rows])
            trainer.ref_model = StandIn(torch.tensor(made["reference"][rows]))
        loss = loss + trainer.compute_loss(policy, inputs) / len(groups)
    loss.backward()
    metrics = trl_losses.metrics_of(trainer)
    return {
        "loss": np.float32(loss.item()),
        "grad": leaf.grad.numpy(),
        "metrics": np.array([metrics[name] for name in METRICS], np.float32),
    }


def of_model(name: str) -> dict[str, np.ndarray]:
    """The same of a whole model and stored pairs; grad.NAME is [norm, product with preference.directions]."""
    file = random_pairs(6)
    found = trl_losses.pairs_loss(WITH_SFT[name], file)
    directions = preference.directions()
    return {
        "tokens": file.tokens,
        "offsets": file.offsets,
        "weights": file.weights,
        "loss": np.float32(found.loss),
        "metrics": np.array([found.metrics[metric] for metric in METRICS], np.float32),
    } | {f"grad.{leaf}": preference.summary(grad, directions[leaf]) for leaf, grad in found.grads.items()}


def main() -> None:
    """Writes the file."""
    path = Path(__file__).parent / "preference.npz"
    out = {f"log_probs.{key}": value for key, value in preference.log_probs().items()}
    for name, case in CASES.items():
        out |= {f"{name}.{key}": value for key, value in of_log_probs(case, preference.log_probs()).items()}
    out |= {f"model.{key}": value for key, value in of_model(preference.GOLDEN_MODEL).items()}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    np.savez_compressed(path, versions=versions, **out)
    print(f"{path.name}: {path.stat().st_size / 1e3:.1f} kB; {versions}")
    for name in CASES:
        print(f"{name:14s} loss {out[f'{name}.loss']:.6f}")
    print(f"{'model':14s} loss {out['model.loss']:.6f}")


if __name__ == "__main__":
    main()
