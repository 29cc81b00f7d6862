"""Rows of a packing plan, written into the arrays of a batch."""

from collections.abc import Sequence

import numpy as np

from mixtral_jax.data.cache import TokenFile
from mixtral_jax.data.packing import Plan

# A batch: five arrays of the same shape [rows, seq_len], of pairs a sixth, and under "documents" lists of document ids.
Batch = dict[str, np.ndarray | list[list[str]]]


class Packed:
    """Documents and the plan of their rows."""

    def __init__(self, file: TokenFile, plan: Plan, first_pair: int = 0):
        """Takes the plan that was made of file.lengths, and the number of the file's first pair where it holds pairs."""
        self.file, self.plan, self._first_pair = file, plan, first_pair
        # The same memory: slices of a plain array are cheaper than those of a memmap.
        self._tokens = file.tokens.view(np.ndarray) if isinstance(file.tokens, np.memmap) else file.tokens
        self._count = np.arange(plan.seq_len, dtype=np.int32)

    def write(self, row: int, batch: Batch, b: int) -> None:
        """Writes row `row` of the plan to row b of a batch that is zero there."""
        plan, offsets = self.plan, self.file.offsets
        spans = slice(plan.row_offsets[row], plan.row_offsets[row + 1])
        documents, lengths = plan.span_document[spans], plan.span_length[spans]
        firsts = offsets[documents] + plan.span_start[spans]
        tokens_T, targets_T, positions_T, segment_ids_T = (
            batch[name][b] for name in ("tokens_BT", "targets_BT", "positions_BT", "segment_ids_BT")
        )
        at = 0
        for segment, (first, length) in enumerate(zip(firsts.tolist(), lengths.tolist()), 1):
            end = at + length
            span = self._tokens[first : first + length + 1]
            tokens_T[at:end], targets_T[at:end] = span[:-1], span[1:]
            positions_T[at:end] = self._count[:length]
            segment_ids_T[at:end] = segment
            if self.file.weights is not None:
                batch["loss_weights_BT"][b, at:end] = self.file.weights[first + 1 : first + length + 1]
            at = end
        if self.file.weights is None:
            batch["loss_weights_BT"][b, :at] = 1
        if "pairs_BP" in batch:
            pairs = documents[0::2] // 2
            batch["pairs_BP"][b, : len(pairs)] = self._first_pair + pairs + 1
        batch["documents"][b] = [self.file.ids[document] for document in documents.tolist()]


def fill(rows: Sequence[tuple[Packed, int] | None], seq_len: int, pairs: int = 0) -> Batch:
    """Returns a batch of the given rows, each a plan's row or None, an empty one.

    Fields: tokens_BT, targets_BT, positions_BT, segment_ids_BT (int32) and loss_weights_BT (float32). Segments are
    numbered from 1 within a row, and positions restart at 0 in each; padding is 0 in all five. `documents` holds the ids
    of each row's documents, in the order of the segments; it stays on the host.

    With `pairs`, the most that a row holds, there is pairs_BP too (int32): segments 2 p + 1 and 2 p + 2 of a row are the
    chosen and the rejected answer of pair number pairs_BP - 1; 0 is no pair.
    """
    shape = (len(rows), seq_len)
    batch: Batch = {
        "tokens_BT": np.zeros(shape, np.int32),
        "targets_BT": np.zeros(shape, np.int32),
        "loss_weights_BT": np.zeros(shape, np.float32),
        "positions_BT": np.zeros(shape, np.int32),
        "segment_ids_BT": np.zeros(shape, np.int32),
        "documents": [[] for _ in rows],
    }
    if pairs:
        batch["pairs_BP"] = np.zeros((len(rows), pairs), np.int32)
    for b, place in enumerate(rows):
        if place is not None:
            packed, row = place
            packed.write(row, batch, b)
    return batch


def global_rows(k: int, start: int, stop: int | None, batch_size: int) -> range:
    """Returns the numbers of rows start to stop - 1 of global batch k (stop None: to its end).

    Raises:
        IndexError: there are no such rows.
    """
    stop = batch_size if stop is None else stop
    if k < 0 or not 0 <= start <= stop <= batch_size:
        raise IndexError(f"batch {k}, rows {start} to {stop}, of batches with {batch_size} rows")
    return range(k * batch_size + start, k * batch_size + stop)


def shuffled(n: int, seed: int, source: int, epoch: int, window: int = 0) -> np.ndarray:
    """Returns an order of n things, [n] int64, that depends on the other numbers alone; seed is below 2**32."""
    # NumPy promises the same bits for a bit generator in every release, but not for Generator.permutation: sort the bits.
    key = np.array([seed + (source << 32), epoch], np.uint64)
    bits = np.random.Philox(key=key, counter=np.array([0, 0, 0, window], np.uint64)).random_raw(n)
    return np.argsort(bits, kind="stable")
