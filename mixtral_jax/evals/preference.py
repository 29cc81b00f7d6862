"""How a model ranks held-out pairs: by likelihood, and by reward against a reference."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mixtral_jax import frozen, lora_base
from mixtral_jax.config import Config, DpoConfig, UserError
from mixtral_jax.data import Batches, Corpus, TokenFile, pack_pairs
from mixtral_jax.distributed import rows_here, speaks
from mixtral_jax.evals.work import Work
from mixtral_jax.models import lora
from mixtral_jax.preference import Answers, answers, has_reference, pair_losses, pair_terms, stored_reference
from mixtral_jax.reference import add_to, open_split
from mixtral_jax.sharding import place

Z95 = 1.959963984540054  # of the normal distribution, for 95%


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% confidence interval of a share of n independent trials (Wilson, 1927)."""
    centre, spread = share + Z95**2 / (2 * n), Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    # At the ends exactly, and not what rounding leaves of them.
    low = (centre - spread) / scale if share > 0 else 0.0
    return low, (centre + spread) / scale if share < 1 else 1.0


def heldout_reference(config: Config, corpus: Corpus, meta: dict, mesh, note: Callable) -> np.ndarray | None:
    """The log-probabilities of a corpus's held-out pairs under the reference of a DPO run, from the cache or computed.

    Args:
        config: of the run, for the devices here; with the rows (train.seq_len, data.packing) of the corpus.
        corpus: of pairs, the run's own or others.
        meta: what the run's checkpoint notes of its reference, see load.stored_meta.
        mesh: the current mesh.
        note: shows a line to the user.

    Returns:
        float32 [n, 2], chosen and rejected; None where the run's loss has no reference.

    Raises:
        UserError: train.init_from cannot be read, or holds other weights than the run began with.
    """
    if not has_reference(config):
        return None
    noted, kept = meta.get("frozen"), []

    def weights():
        if not kept:
            try:
                kept.append(frozen.weights(config, mesh))
            except UserError as error:
                raise UserError(
                    f"the reference of a DPO run is what it started from, train.init_from: {error}"
                ) from error
            frozen.check(config, noted, lora_base.record(config, kept[0]))
        return kept[0]

    # What the checkpoint notes is enough to find the log-probabilities in the cache; the weights need not be there.
    fingerprints = (noted or lora_base.record(config, weights()))["fingerprints"]
    return open_split(config, corpus, "heldout", fingerprints, weights, mesh, note)


def share(name: str, hits: np.ndarray) -> dict[str, float]:
    """The share of trials that are hits, bool [n], under a name, and its 95% interval."""
    mean = float(hits.mean())
    low, high = wilson(mean, len(hits))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def margin_interval(mean: float, square: float, n: int) -> dict[str, float]:
    """The mean margin of n pairs and its 95% interval, by the normal approximation; of one pair it has no ends.

    Args:
        mean: of the margins.
        square: the mean of their squares.
        n: pairs.
    """
    spread = Z95 * math.sqrt(max(square - mean**2, 0.0) / (n - 1)) if n > 1 else math.inf
    return {"margin": mean, "margin_low": mean - spread, "margin_high": mean + spread}


def answer_tokens(pairs: TokenFile) -> np.ndarray:
    """The trained tokens of each answer, EOS included: int64 [n, 2], chosen and rejected."""
    trained = np.concatenate([[0], np.cumsum(np.asarray(pairs.weights) > 0)])
    return np.diff(trained[pairs.offsets]).reshape(-1, 2)


def likelihood_ranking(log_probs: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """How often a model finds the chosen answer likelier than the rejected one; a tie counts as not.

    Args:
        log_probs: float32 [n, 2], chosen and rejected, summed over an answer's tokens.
        tokens: int [n, 2], their numbers.

    Returns:
        summed and mean: the shares of pairs by summed and by mean log-probability, each with its 95% interval _low to
        _high; chosen_logp and rejected_logp: nats an answer; pairs.
    """
    mean = log_probs / np.maximum(tokens, 1)
    return {
        **share("summed", log_probs[:, 0] > log_probs[:, 1]),
        **share("mean", mean[:, 0] > mean[:, 1]),
        "chosen_logp": float(log_probs[:, 0].mean()),
        "rejected_logp": float(log_probs[:, 1].mean()),
        "pairs": len(log_probs),
    }


def reward_ranking(
    config: DpoConfig, log_probs: np.ndarray, tokens: np.ndarray, reference: np.ndarray | None
) -> dict[str, float]:
    """How a policy's rewards rank the pairs, as `Preference` has them, with intervals of both.

    Args:
        config: of the run: its loss and beta decide what a reward is.
        log_probs, tokens: see `likelihood_ranking`.
        reference: the reference's log-probabilities, float32 [n, 2]; None for a loss without one.

    Returns:
        loss (the preference loss); accuracy and margin, each with its 95% interval _low to _high; chosen_reward and
        rejected_reward: means over pairs.
    """

    def packed(log_probs: np.ndarray) -> Answers:
        columns = (*log_probs.T, *tokens.T.astype(np.float32))
        return Answers(*(jnp.asarray(column)[None] for column in columns))

    found = pair_losses(packed(log_probs), None if reference is None else packed(reference), config)
    loss, chosen, rejected = (np.asarray(part[0], np.float64) for part in found)
    margin = chosen - rejected
    return {
        "loss": float(loss.mean()),
        **share("accuracy", chosen > rejected),
        **margin_interval(float(margin.mean()), float(np.square(margin).mean()), len(margin)),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
    }


# Of the module, so that models of one shape are compiled once, and evaluations of one run too.
@functools.partial(jax.jit, static_argnames=("compares", "adapted", "head_chunk", "dpo"))
def _sums(params, frozen, batch: dict, compares: bool, adapted: bool, head_chunk: int, dpo: DpoConfig):
    policy = answers(lora.attach(frozen, params) if adapted else params, batch, head_chunk)[0]
    if not compares:
        found = None
    elif "reference_chosen_BP" in batch:
        found = stored_reference(batch, policy)
    else:
        found = answers(frozen, batch, head_chunk)[0]
    valid_BP = batch["pairs_BP"] > 0
    _, chosen_BP, rejected_BP = pair_losses(policy, found, dpo)
    squares = jnp.where(valid_BP, jnp.square(chosen_BP - rejected_BP), 0).sum()
    return pair_terms(policy, found, valid_BP, 1.0, dpo) | {"squared_margins": squares, "pairs": valid_BP.sum()}


class Preference:
    """Scores a split of pairs with a policy; called as often as wanted."""

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
        given = dict(compares=has_reference(config), adapted=config.lora.rank > 0, head_chunk=config.loss.head_chunk)
        self._sums = functools.partial(_sums, **given, dpo=config.dpo)

    def __call__(self, params, limit: int | None = None, frozen=None, work: Work | None = None) -> dict[str, float]:
        """Evaluates on the current mesh (`jax.set_mesh`).

        Args:
            params: of the policy.
            limit: batches to read, spread evenly over the split; None reads every pair.
            frozen: see step.make_train_step.
            work: keeps the sums of each batch; those that it has are not computed again.

        Returns:
            loss (the preference loss), accuracy and margin, each with its 95% interval _low to _high, chosen_reward,
            rejected_reward: means over pairs; chosen_logp and rejected_logp: nats an answer; pairs.
        """
        count = self._batches.n_eval_batches
        picked = range(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
        mesh = jax.sharding.get_mesh()
        rows = self._batches.batch_size
        start, stop = rows_here(mesh, rows)
        total: dict[str, float] = {}
        work = Work(None, "", "") if work is None else work
        for k in tqdm(picked, "held-out pairs", leave=False, disable=None if speaks() else True, unit="batch"):
            if str(k) in work:
                continue
            batch = self._batches.eval_batch(int(k), start, stop)
            batch = batch if self._reference is None else add_to(batch, self._reference)
            parts = jax.device_get(self._sums(params, frozen, place(batch, mesh, start, rows)))
            work.put(str(k), {name: float(value) for name, value in parts.items()})
        for k in picked:
            total = {name: total.get(name, 0.0) + value for name, value in work.get(str(k)).items()}
        n = int(total.pop("pairs"))
        mean = {name: value / n for name, value in total.items()}
        low, high = wilson(mean["rewards/accuracies"], n)
        return {
            "loss": mean["preference_loss"],
            "accuracy": mean["rewards/accuracies"],
            "accuracy_low": low,
            "accuracy_high": high,
            **margin_interval(mean["rewards/margins"], mean["squared_margins"], n),
            "chosen_reward": mean["rewards/chosen"],
            "rejected_reward": mean["rewards/rejected"],
            "chosen_logp": mean["logps/chosen"],
            "rejected_logp": mean["logps/rejected"],
            "pairs": n,
        }
