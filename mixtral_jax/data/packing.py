"""The packing plan: which spans of which documents make up each row. Computed once; rows are then random-access.

A document of n tokens holds n - 1 positions, each a pair of an input and the token after it. They are cut into spans of
at most seq_len positions; rows are filled with whole spans, so every target is predicted exactly once per epoch.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Rows of spans. Row r holds the spans row_offsets[r] to row_offsets[r + 1] - 1, at most seq_len positions in all."""

    seq_len: int
    row_offsets: np.ndarray  # [n_rows + 1] int64
    span_document: np.ndarray  # [n_spans] int64, index of the document
    span_start: np.ndarray  # [n_spans] int64, its first position within the document
    span_length: np.ndarray  # [n_spans] int64, positions, at least 1

    @property
    def n_rows(self) -> int:
        """Rows in one epoch."""
        return len(self.row_offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Trained tokens in one epoch: the positions that are not padding."""
        return int(self.span_length.sum())

    @property
    def most_pairs(self) -> int:
        """Of a plan of pairs: the most that a row holds."""
        return int(np.diff(self.row_offsets).max(initial=0)) // 2

    @property
    def waste(self) -> float:
        """The share of positions that is padding."""
        return 1 - self.n_tokens / max(1, self.n_rows * self.seq_len)


def pack(lengths: np.ndarray, seq_len: int, *, one_per_row: bool = False) -> Plan:
    """Plans the rows of an epoch.

    Spans of seq_len positions get a row each; the remainders are packed best fit, longest first. Rows come in the order
    of their first documents.

    Args:
        lengths: [n_documents] tokens in each document, BOS and EOS included; one with fewer than 2 has no targets.
        seq_len: positions in a row.
        one_per_row: give every span its own row: the unpacked twin that tests compare with.

    Raises:
        ValueError: seq_len is not positive.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len}; it must be at least 1")
    positions = np.maximum(np.asarray(lengths, np.int64) - 1, 0)
    spans_of = -(-positions // seq_len)  # [n_documents], rounded up
    span_document = np.repeat(np.arange(len(positions)), spans_of)
    first_span = np.cumsum(spans_of) - spans_of
    span_start = (np.arange(len(span_document)) - first_span[span_document]) * seq_len
    span_length = np.minimum(positions[span_document] - span_start, seq_len)
    row_of = np.arange(len(span_document)) if one_per_row else _best_fit(span_length, seq_len)
    # A row's place is that of its earliest span, so that rows in order are documents in order, long and short mixed.
    earliest = np.full(len(span_document), len(span_document))
    np.minimum.at(earliest, row_of, np.arange(len(span_document)))
    order = np.argsort(earliest[row_of], kind="stable")
    row_offsets = np.flatnonzero(np.diff(earliest[row_of][order], prepend=-1, append=len(span_document)))
    return Plan(seq_len, row_offsets, span_document[order], span_start[order], span_length[order])


def pack_pairs(lengths: np.ndarray, seq_len: int, *, one_per_row: bool = False) -> Plan:
    """Plans the rows of pairs: documents 2 i and 2 i + 1 stand side by side in one row, as neighbouring spans.

    Args:
        lengths, seq_len: see `pack`.
        one_per_row: give every pair its own row.

    Raises:
        ValueError: the number of documents is odd, or a pair is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) % 2:
        raise ValueError(f"{len(lengths)} documents are no pairs")
    positions = lengths - 1
    together = positions[0::2] + positions[1::2]
    if len(together) and together.max() > seq_len:
        raise ValueError(f"a pair has {together.max()} positions and a row {seq_len}")
    plan = pack(together + 1, seq_len, one_per_row=one_per_row)
    documents = (2 * plan.span_document[:, None] + np.arange(2)).reshape(-1)
    return Plan(seq_len, 2 * plan.row_offsets, documents, np.zeros_like(documents), positions[documents])


def _best_fit(span_length: np.ndarray, seq_len: int) -> np.ndarray:
    """Assigns spans to rows, longest first, each to the row with the least space that takes it: [n_spans] int64.

    Spans of equal length and rows of equal space are interchangeable, so they are handled in groups: a row of space s
    takes s // length of them before the next row becomes the better fit.
    """
    row_of = np.empty(len(span_length), np.int64)
    by_length = np.argsort(-span_length, kind="stable")
    lengths, starts = np.unique(-span_length[by_length], return_index=True)
    n_rows = 0
    rows_with: dict[int, list[int]] = {}  # free space -> rows
    spaces: list[int] = []  # its keys, sorted

    def put(space: int, rows: list[int]) -> None:
        if space and rows:
            if space not in rows_with:
                insort(spaces, space)
            rows_with.setdefault(space, []).extend(rows)

    for negative, group in zip(lengths.tolist(), np.split(by_length, starts[1:])):
        length, placed = -negative, 0
        while placed < len(group):
            at = bisect_left(spaces, length)
            space = spaces[at] if at < len(spaces) else seq_len
            per_row = space // length
            wanted = -(-(len(group) - placed) // per_row)
            if at < len(spaces):
                available = rows_with[space]
                rows = available[-wanted:]
                del available[-wanted:]
                if not available:
                    del rows_with[space], spaces[at]
            else:
                rows = list(range(n_rows, n_rows + wanted))
                n_rows += wanted
            now = group[placed : placed + len(rows) * per_row]
            row_of[now] = np.repeat(rows, per_row)[: len(now)]
            placed += len(now)
            in_last = len(now) - (len(rows) - 1) * per_row
            put(space - per_row * length, rows[:-1])
            put(space - in_last * length, rows[-1:])
    return row_of
