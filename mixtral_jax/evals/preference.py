"""How a policy ranks held-out pairs: reward accuracy and margins against the reference."""

import math

import jax
import numpy as np
from tqdm import tqdm

from mixtral_jax.config import Config
from mixtral_jax.data import Batches, TokenFile, pack_pairs
from mixtral_jax.distributed import rows_here, speaks
from mixtral_jax.frozen import has_reference
from mixtral_jax.preference import answers, pair_terms, stored_reference
from mixtral_jax.reference import add_to
from mixtral_jax.sharding import place
from mixtral_jax.step import model_of

Z95 = 1.959963984540054  # of the normal distribution, for 95%


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% confidence interval of a share of n independent trials (Wilson, 1927)."""
    centre, spread = share + Z95**2 / (2 * n), Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


class Preference:
    """Scores a split of pairs with a policy; compiled once, called as often as wanted."""

    def __init__(self, config: Config, pairs: TokenFile, reference: np.ndarray | None = None):
        """Packs the split.

        Args:
            config: of the run.
            pairs: documents in twos, see pack_pairs.
            reference: the reference's log-probabilities, float32 [n, 2]; None where it is computed on the fly, or there is none.
        """
        train = config.train
        rows = train.batch_size // train.accumulation_steps
        plan = pack_pairs(pairs.lengths, train.seq_len, one_per_row=not config.data.packing)
        sizes = {"batch_size": rows, "seq_len": train.seq_len, "seed": 0, "shuffle": False}
        self._batches = Batches(pairs, plan, **sizes, pairs=plan.most_pairs)
        self._reference = reference
        compares = has_reference(config)

        def sums(params, frozen, batch):
            policy = answers(model_of(config, params, frozen), batch, config.loss.head_chunk)[0]
            if not compares:
                found = None
            elif "reference_chosen_BP" in batch:
                found = stored_reference(batch, policy)
            else:
                found = answers(frozen, batch, config.loss.head_chunk)[0]
            valid_BP = batch["pairs_BP"] > 0
            return pair_terms(policy, found, valid_BP, 1.0, config.dpo) | {"pairs": valid_BP.sum()}

        self._sums = jax.jit(sums)

    def __call__(self, params, limit: int | None = None, frozen=None) -> dict[str, float]:
        """Evaluates on the current mesh (`jax.set_mesh`).

        Args:
            params: of the policy.
            limit: batches to read, spread evenly over the split; None reads every pair.
            frozen: see step.make_train_step.

        Returns:
            loss (the preference loss), accuracy with its 95% interval accuracy_low to accuracy_high, margin,
            chosen_reward, rejected_reward: means over pairs; chosen_logp and rejected_logp: nats an answer; pairs.
        """
        count = self._batches.n_eval_batches
        picked = range(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
        mesh = jax.sharding.get_mesh()
        rows = self._batches.batch_size
        start, stop = rows_here(mesh, rows)
        total: dict[str, float] = {}
        for k in tqdm(picked, "held-out pairs", leave=False, disable=None if speaks() else True, unit="batch"):
            batch = self._batches.eval_batch(int(k), start, stop)
            batch = batch if self._reference is None else add_to(batch, self._reference)
            parts = jax.device_get(self._sums(params, frozen, place(batch, mesh, start, rows)))
            total = {name: total.get(name, 0.0) + float(value) for name, value in parts.items()}
        n = int(total.pop("pairs"))
        mean = {name: value / n for name, value in total.items()}
        low, high = wilson(mean["rewards/accuracies"], n)
        return {
            "loss": mean["preference_loss"],
            "accuracy": mean["rewards/accuracies"],
            "accuracy_low": low,
            "accuracy_high": high,
            "margin": mean["rewards/margins"],
            "chosen_reward": mean["rewards/chosen"],
            "rejected_reward": mean["rewards/rejected"],
            "chosen_logp": mean["logps/chosen"],
            "rejected_logp": mean["logps/rejected"],
            "pairs": n,
        }
