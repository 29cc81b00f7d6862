"""Batches of one source: global batch k is a pure function of (data, seed, k), on any number of processes.

Global row i = k * batch_size + j lies in epoch i // n_rows, and each epoch visits the plan's rows in an order of its own.
So nothing is replayed on resume, and process p of n reads just its rows of batch k.
"""

import functools
from collections.abc import Iterator

from mixtral_jax.config import UserError
from mixtral_jax.data.batch import Batch, Packed, fill, global_rows, shuffled
from mixtral_jax.data.cache import TokenFile
from mixtral_jax.data.packing import Plan


class Batches:
    """Random access to the batches of one split of one source; the fields of a batch are described in batch.fill."""

    def __init__(
        self,
        tokens: TokenFile,
        plan: Plan,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        shuffle: bool = True,
        source: int = 0,
        pairs: int = 0,
        first_pair: int = 0,
    ):
        """Checks the arguments against each other.

        Args:
            tokens: the documents.
            plan: their rows, from `pack`.
            batch_size: rows of a batch, over all processes.
            seq_len: positions of a row.
            seed: decides the order of the rows, below 2**32.
            shuffle: False visits the rows in the plan's order.
            source: the place of the source in a mixture; each has an order of its own.
            pairs: of a plan of pairs, the most that any row of a batch holds; first_pair: the number of the first one.

        Raises:
            UserError: the plan has no rows.
            ValueError: the plan is for another seq_len, or batch_size is not positive.
        """
        if plan.seq_len != seq_len or batch_size < 1:
            raise ValueError(f"seq_len={seq_len}, batch_size={batch_size}; the plan is for seq_len={plan.seq_len}")
        if not plan.n_rows:
            raise UserError("no document has a token to predict; add text to data.path")
        self.plan, self.batch_size, self.seq_len = plan, batch_size, seq_len
        self.pairs = pairs
        self._packed, self._shuffle = Packed(tokens, plan, first_pair), shuffle
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: shuffled(plan.n_rows, seed, source, epoch))

    @property
    def n_rows(self) -> int:
        """Rows in one epoch."""
        return self.plan.n_rows

    @property
    def n_eval_batches(self) -> int:
        """Batches in one pass over the split, the last one perhaps part empty."""
        return -(-self.n_rows // self.batch_size)

    def batch(self, k: int) -> Batch:
        """Returns global batch k, of batch_size rows."""
        return self.rows(k, 0, self.batch_size)

    def rows(self, k: int, start: int, stop: int | None = None) -> Batch:
        """Returns rows start to stop - 1 of global batch k: what one process needs of it (stop None: to the end)."""
        return fill([self.row(i) for i in global_rows(k, start, stop, self.batch_size)], self.seq_len, self.pairs)

    def row(self, i: int) -> tuple[Packed, int]:
        """Returns where the i-th row of training stands: row i % n_rows of epoch i // n_rows."""
        epoch, place = divmod(i, self.n_rows)
        return self._packed, int(self._order(epoch)[place]) if self._shuffle else place

    def eval_batch(self, k: int, start: int = 0, stop: int | None = None) -> Batch:
        """Returns rows of batch k of one pass in the plan's order; rows beyond the last are empty."""
        rows = global_rows(k, start, stop, self.batch_size)
        return fill([(self._packed, i) if i < self.n_rows else None for i in rows], self.seq_len, self.pairs)

    def eval_batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yields every row of the split exactly once, or a process's share of each batch; never shuffled."""
        for k in range(self.n_eval_batches):
            yield self.eval_batch(k, start, stop)
