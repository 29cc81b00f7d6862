"""Held-out loss per token and bits per byte."""

import functools
import math

import jax
import numpy as np
from tqdm import tqdm

from mixtral_jax.config import Config
from mixtral_jax.data import Batches, TokenFile, pack
from mixtral_jax.distributed import rows_here, speaks
from mixtral_jax.evals.work import Work
from mixtral_jax.losses import token_losses
from mixtral_jax.models import lora
from mixtral_jax.sharding import everywhere, place

NEIGHBOURS = 32  # that are summed in float32


# Of the module, so that models of one shape are compiled once, and evaluations of one run too.
@functools.partial(jax.jit, static_argnames=("adapted", "head_chunk"))
def _sums(params, frozen, batch: dict, adapted: bool, head_chunk: int):
    model = lora.attach(frozen, params) if adapted else params
    x_BTD, _ = model.hidden(batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"])
    nll_BT, _ = token_losses(x_BTD, model.head_DV[...], batch["targets_BT"], head_chunk)
    weights_BT = batch["loss_weights_BT"]
    return _partial_sums(nll_BT * weights_BT), _partial_sums(weights_BT)


class Perplexity:
    """Scores a split of documents with a model; called as often as wanted."""

    def __init__(self, config: Config, tokens: TokenFile):
        """Packs the split; rows and batch as in training, in the plan's own order."""
        train = config.train
        rows = train.batch_size // train.accumulation_steps
        plan = pack(tokens.lengths, train.seq_len, one_per_row=not config.data.packing)
        self._batches = Batches(tokens, plan, batch_size=rows, seq_len=train.seq_len, seed=0, shuffle=False)
        self._bytes = int(tokens.bytes_.sum())
        if tokens.weights is None:
            self._targets = float(tokens.lengths.sum() - len(tokens.lengths))
        else:
            self._targets = float(tokens.weights.sum() - tokens.weights[tokens.offsets[:-1]].sum())
        self._sums = functools.partial(_sums, adapted=config.lora.rank > 0, head_chunk=config.loss.head_chunk)

    def __call__(self, params, limit: int | None = None, frozen=None, work: Work | None = None) -> dict[str, float]:
        """Evaluates on the current mesh (`jax.set_mesh`).

        Every token of a document but its first (BOS) is predicted once; a document longer than seq_len is cut, and each
        piece starts without context. Of conversations the answers' tokens are scored, by their weights.

        Args:
            params: the parameters.
            limit: batches to read, spread evenly over the split; None reads every document.
            frozen: see step.make_train_step.
            work: keeps the sums of each batch; those that it has are not computed again.

        Returns:
            loss: nats per token; perplexity: exp(loss); bits_per_byte: over the UTF-8 bytes of the documents (with a
            limit, over bytes at the split's mean bytes per token); tokens: predicted tokens.
        """
        count = self._batches.n_eval_batches
        picked = range(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
        mesh = jax.sharding.get_mesh()
        work = Work(None, "", "") if work is None else work
        pending: tuple | None = None
        rows = self._batches.batch_size
        start, stop = rows_here(mesh, rows)
        for k in tqdm(picked, "held-out", leave=False, disable=None if speaks() else True, unit="batch"):
            if str(k) in work:
                continue
            batch = self._batches.eval_batch(int(k), start, stop)
            parts = self._sums(params, frozen, place(batch, mesh, start, rows))
            # Fetched one batch late, so that the device does not wait and batches do not pile up.
            _keep(work, pending)
            pending = (k, parts)
        _keep(work, pending)
        nll, weight = np.sum([work.get(str(k)) for k in picked], axis=0, dtype=np.float64)
        loss = nll / weight
        return {
            "loss": float(loss),
            "perplexity": float(np.exp(loss)),
            "bits_per_byte": float(loss / np.log(2) * self._targets / self._bytes),
            "tokens": int(weight),
        }


def _partial_sums(x_BT):
    """Sums of neighbours, on every device: the host adds them up in float64, where a batch's sum in float32 would lose a digit."""
    b, t = x_BT.shape
    return everywhere(x_BT.reshape(b, t // math.gcd(t, NEIGHBOURS), -1).sum(-1))


def _keep(work: Work, pending: tuple | None) -> None:
    if pending is not None:
        k, parts = pending
        work.put(str(k), [float(np.sum(part, dtype=np.float64)) for part in jax.device_get(parts)])
