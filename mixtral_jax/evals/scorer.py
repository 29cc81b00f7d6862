"""Log-probabilities of given continuations, in batches of like lengths, on any mesh."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mixtral_jax.config import Config, UserError
from mixtral_jax.distributed import rows_here
from mixtral_jax.generate.engine import round_up
from mixtral_jax.losses import token_scores
from mixtral_jax.models.mixtral import Mixtral
from mixtral_jax.sharding import BATCH, everywhere, place, unzigzag


class Request(NamedTuple):
    """What is read, and what is scored after it; at least one token each."""

    context: Sequence[int]
    continuation: Sequence[int]


class Scored(NamedTuple):
    """Of the tokens of a continuation, each after the true ones before it."""

    log_probs: np.ndarray  # float32 [n], nats
    greedy: np.ndarray  # bool [n]: it is the likeliest token (of equals that of the lowest id)


# Of the module, so that models of one shape are compiled once.
@functools.partial(jax.jit, static_argnames=("context", "head_chunk"))
def _scores(model, batch: dict, context: int, head_chunk: int):
    x_BTD, _ = model.hidden(batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"])
    log_prob_BT, greedy_BT = token_scores(x_BTD, model.head_DV[...], batch["targets_BT"], head_chunk)
    if context > 1:
        log_prob_BT, greedy_BT = unzigzag(log_prob_BT, context), unzigzag(greedy_BT, context)
    return everywhere((log_prob_BT, greedy_BT))


class Scorer:
    """Scores continuations; a row holds one request, so that what shares its batch changes nothing."""

    def __init__(self, config: Config, batch_tokens: int = 0):
        """Args: config: for the devices here; batch_tokens: of a batch over all devices, 0 for a training batch's."""
        self._model, self._batch_tokens = config.model, batch_tokens or config.train.batch_size * config.train.seq_len
        self._chunk = config.loss.head_chunk

    def __call__(self, model: Mixtral, requests: Sequence[Request]) -> Iterator[tuple[int, Scored]]:
        """Scores all requests on the current mesh (`jax.set_mesh`).

        Yields:
            (number of the request, Scored), longest first, each once; on all processes the same. Whoever stops early
            has what was yielded.

        Raises:
            UserError: a request without tokens, or longer than the model's max_seq_len (the last token is not read).
        """
        lengths = [self._checked(i, request) for i, request in enumerate(requests)]
        order = sorted(range(len(requests)), key=lambda i: (-lengths[i], i))
        mesh = jax.sharding.get_mesh()
        while order:
            width = round_up(lengths[order[0]])
            rows = self.rows(mesh, width)
            picked, order = order[:rows], order[rows:]
            start, stop = rows_here(mesh, rows)
            batch = _batch([requests[i] for i in picked], rows, width)
            here = {name: value[start:stop] for name, value in batch.items()}
            found = _scores(model, place(here, mesh, start, rows), mesh.shape["context"], self._chunk)
            log_prob_BT, greedy_BT = jax.device_get(found)
            for row, i in enumerate(picked):
                first, count = len(requests[i].context) - 1, len(requests[i].continuation)
                yield i, Scored(log_prob_BT[row, first : first + count], greedy_BT[row, first : first + count])

    def rows(self, mesh, width: int) -> int:
        """Rows of a batch of this width: as many as have batch_tokens, a multiple of the shards, one each at least."""
        shards = int(np.prod([mesh.shape[axis] for axis in BATCH]))
        return max(self._batch_tokens // width // shards, 1) * shards

    def _checked(self, number: int, request: Request) -> int:
        if not len(request.context) or not len(request.continuation):
            raise UserError(
                f"request {number} has a context of {len(request.context)} and a continuation of {len(request.continuation)} "
                "tokens; both need at least one"
            )
        length = len(request.context) + len(request.continuation) - 1
        if length > self._model.max_seq_len:
            raise UserError(
                f"request {number} has {length} tokens to read and the model's max_seq_len is {self._model.max_seq_len}; cut its "
                "context"
            )
        return length


def _batch(requests: Sequence[Request], rows: int, width: int) -> dict[str, np.ndarray]:
    """One request a row; rows that are left are empty and reach no expert."""
    tokens_BT, targets_BT = np.zeros((2, rows, width), np.int32)
    segment_ids_BT = np.zeros((rows, width), np.int32)
    for row, request in enumerate(requests):
        whole = [*request.context, *request.continuation]
        tokens_BT[row, : len(whole) - 1], targets_BT[row, : len(whole) - 1] = whole[:-1], whole[1:]
        segment_ids_BT[row, : len(whole) - 1] = 1
    positions_BT = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
    return {
        "tokens_BT": tokens_BT,
        "targets_BT": targets_BT,
        "positions_BT": np.where(segment_ids_BT > 0, positions_BT, 0).astype(np.int32),
        "segment_ids_BT": segment_ids_BT,
    }


def total(scored: Scored) -> tuple[float, bool]:
    """Log-likelihood of a continuation, summed in float64, and whether greedy decoding would write it."""
    return float(np.sum(scored.log_probs, dtype=np.float64)), bool(scored.greedy.all())
