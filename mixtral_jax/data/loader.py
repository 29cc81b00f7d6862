"""Batches: global batch k is a pure function of (data, seed, k), on any number of processes.

Global row i = k * batch_size + j lies in epoch i // n_rows, and each epoch visits the plan's rows in an order of its own.
So nothing is replayed on resume, and process p of n reads just its rows of batch k.
"""

import functools
from collections.abc import Iterator

import numpy as np

from mixtral_jax.config import UserError
from mixtral_jax.data.cache import TokenFile
from mixtral_jax.data.packing import Plan

# A batch: five arrays of the same shape [rows, seq_len], and under "documents" a list of lists of document ids.
Batch = dict[str, np.ndarray | list[list[str]]]


class Batches:
    """Random access to the batches of one split.

    Fields of a batch: tokens_BT, targets_BT, positions_BT, segment_ids_BT (int32) and loss_weights_BT (float32).
    Segments are numbered from 1 within a row, and positions restart at 0 in each; padding is 0 in all five. `documents`
    holds the ids of each row's documents, in the order of the segments; it stays on the host.
    """

    def __init__(
        self, tokens: TokenFile, plan: Plan, *, batch_size: int, seq_len: int, seed: int, shuffle: bool = True
    ):
        """Checks the arguments against each other.

        Raises:
            UserError: the plan has no rows.
            ValueError: the plan is for another seq_len, or batch_size is not positive.
        """
        if plan.seq_len != seq_len or batch_size < 1:
            raise ValueError(f"seq_len={seq_len}, batch_size={batch_size}; the plan is for seq_len={plan.seq_len}")
        if not plan.n_rows:
            raise UserError("no document has a token to predict; add text to data.path")
        self.plan, self.batch_size, self.seq_len = plan, batch_size, seq_len
        self._file, self._seed, self._shuffle = tokens, seed, shuffle
        self._tokens = np.asarray(tokens.tokens)  # no copy; slices of a plain array are cheaper than of a memmap

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
        rows = []
        for i in self._indices(k, start, stop):
            epoch, place = divmod(i, self.n_rows)
            rows.append(int(_permutation(self._seed, epoch, self.n_rows)[place]) if self._shuffle else place)
        return self._fill(rows)

    def eval_batch(self, k: int, start: int = 0, stop: int | None = None) -> Batch:
        """Returns rows of batch k of one pass in the plan's order; rows beyond the last are empty."""
        return self._fill([i if i < self.n_rows else None for i in self._indices(k, start, stop)])

    def eval_batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yields every row of the split exactly once, or a process's share of each batch; never shuffled."""
        for k in range(self.n_eval_batches):
            yield self.eval_batch(k, start, stop)

    def _indices(self, k: int, start: int, stop: int | None) -> range:
        stop = self.batch_size if stop is None else stop
        if k < 0 or not 0 <= start <= stop <= self.batch_size:
            raise IndexError(f"batch {k}, rows {start} to {stop}, of batches with {self.batch_size} rows")
        return range(k * self.batch_size + start, k * self.batch_size + stop)

    def _fill(self, rows: list[int | None]) -> Batch:
        shape = (len(rows), self.seq_len)
        tokens_BT, targets_BT, positions_BT, segment_ids_BT = (np.zeros(shape, np.int32) for _ in range(4))
        documents: list[list[str]] = [[] for _ in rows]
        plan, offsets = self.plan, self._file.offsets
        for b, row in enumerate(rows):
            if row is None:
                continue
            at = 0
            for segment, span in enumerate(range(plan.row_offsets[row], plan.row_offsets[row + 1]), 1):
                document, length = plan.span_document[span], plan.span_length[span]
                first = offsets[document] + plan.span_start[span]
                here = slice(at, at + length)
                tokens_BT[b, here] = self._tokens[first : first + length]
                targets_BT[b, here] = self._tokens[first + 1 : first + length + 1]
                positions_BT[b, here] = np.arange(length)
                segment_ids_BT[b, here] = segment
                documents[b].append(self._file.ids[document])
                at += length
        return {
            "tokens_BT": tokens_BT,
            "targets_BT": targets_BT,
            "loss_weights_BT": (segment_ids_BT > 0).astype(np.float32),
            "positions_BT": positions_BT,
            "segment_ids_BT": segment_ids_BT,
            "documents": documents,
        }


def prefetch(
    batches: Batches,
    first: int,
    last: int,
    workers: int,
    start: int = 0,
    stop: int | None = None,
    state: dict | None = None,
) -> Iterator[tuple[int, Batch, dict]]:
    """Yields (k, rows start to stop - 1 of batch k, {}) for k from first to last - 1, in order, read ahead by threads.

    An exception in a thread is raised here, when its batch is due.
    """
    import grain  # here, because it takes a second that the command line and the tests need not spend

    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    steps = grain.MapDataset.range(first, last)
    iterator = iter(steps.map(lambda k: (int(k), batches.rows(int(k), start, stop), {})).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    # NumPy promises the same bits for a bit generator in every release, but not for Generator.permutation: sort the bits.
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n_rows)
    return np.argsort(bits, kind="stable")
