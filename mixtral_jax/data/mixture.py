"""Mixtures: which source gives which row of training, and batches of several indexed sources.

Global row i belongs to a source by a schedule that repeats; the n-th row of a source is row n % n_rows of its epoch
n // n_rows. So every source goes through whole epochs of its own, and any row is found without the rows before it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixtral_jax.config import UserError
from mixtral_jax.data.batch import Batch, Packed, fill, global_rows
from mixtral_jax.data.loader import Batches

# Rows after which the schedule repeats: weights are kept to a ten-thousandth of the whole, percents exactly.
PERIOD = 10_000


class Usage(NamedTuple):
    """What a run takes from one source."""

    name: str
    rows: int
    tokens: int  # trained tokens; of an epoch that is not finished, by the mean of its rows
    epochs: float


class Schedule:
    """Which source a global row belongs to. In the first n rows a source has its share of n, give or take less than 1."""

    def __init__(self, names: Sequence[str], weights: Sequence[float]):
        """Takes a name and a positive weight for each source.

        Raises:
            UserError: a weight is too small a part of the whole to be kept.
        """
        self.names = tuple(names)
        counts = _whole_shares(weights)
        for name, weight, count in zip(names, weights, counts):
            if not count:
                raise UserError(
                    f"data.mixture: {name} has the weight {weight:g} of {sum(weights):g} in all, less than one row in "
                    f"{2 * PERIOD:,}; raise it, or leave the source out"
                )
        self.counts = np.array(counts) // math.gcd(*counts)  # [n_sources] rows of a period
        self._sources = _even(self.counts.tolist())
        self._before = np.zeros((len(self._sources) + 1, len(counts)), np.int64)  # rows of each source before a slot
        np.cumsum(np.eye(len(counts), dtype=np.int64)[self._sources], axis=0, out=self._before[1:])

    @property
    def period(self) -> int:
        """Rows after which the schedule repeats."""
        return len(self._sources)

    def place(self, i: int) -> tuple[int, int]:
        """Returns (source, n): global row i is the n-th row of that source."""
        period, slot = divmod(i, self.period)
        source = self._sources[slot]
        return source, period * int(self.counts[source]) + int(self._before[slot, source])

    def rows(self, n: int) -> list[int]:
        """Returns how many of the first n global rows each source gives."""
        periods, slots = divmod(n, self.period)
        return (periods * self.counts + self._before[slots]).tolist()

    def usage(self, n: int, epochs: Sequence[tuple[int, int]]) -> list[Usage]:
        """Returns what the first n global rows take from each source, given (rows, tokens) of one epoch of each."""
        return [
            Usage(name, rows, round(rows * tokens / n_rows), rows / n_rows)
            for name, rows, (n_rows, tokens) in zip(self.names, self.rows(n), epochs)
        ]


class Mixture:
    """Random access to the batches of one or more sources. With one they are those of `Batches`."""

    def __init__(self, parts: Sequence[Batches], schedule: Schedule, *, batch_size: int):
        """Takes the sources in the schedule's order, each with its place as `source`."""
        self.batch_size, self.seq_len, self.schedule = batch_size, parts[0].seq_len, schedule
        self._parts = tuple(parts)

    @property
    def n_rows(self) -> int:
        """Rows in one epoch of every source."""
        return sum(part.n_rows for part in self._parts)

    def batch(self, k: int) -> Batch:
        """Returns global batch k, of batch_size rows."""
        return self.rows(k, 0, self.batch_size)

    def rows(self, k: int, start: int, stop: int | None = None) -> Batch:
        """Returns rows start to stop - 1 of global batch k: what one process needs of it (stop None: to the end)."""
        rows = [self._row(i) for i in global_rows(k, start, stop, self.batch_size)]
        return fill(rows, self.seq_len, self._parts[0].pairs)

    def _row(self, i: int) -> tuple[Packed, int]:
        source, n = self.schedule.place(i)
        return self._parts[source].row(n)

    def usage(self, steps: int) -> list[Usage]:
        """Returns what so many steps take from each source."""
        epochs = [(part.plan.n_rows, part.plan.n_tokens) for part in self._parts]
        return self.schedule.usage(steps * self.batch_size, epochs)


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """Divides PERIOD by weight into whole numbers, the largest remainders rounded up."""
    exact = [weight / math.fsum(weights) * PERIOD for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda s: counts[s] - exact[s])
    for s in by_remainder[: PERIOD - sum(counts)]:
        counts[s] += 1
    return counts


def _even(counts: list[int]) -> list[int]:
    """Spreads sources over sum(counts) slots so that in every prefix each has its share, give or take less than 1.

    This is Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980): of the sources that are
    behind by 1 / (2 n - 2) or more, the one goes first that would soonest be behind by 1 - 1 / (2 n - 2). All numbers
    are whole, multiplied by 2 n - 2 and by the number of slots.
    """
    slots, scale = sum(counts), 2 * len(counts) - 2
    if not scale:
        return [0] * slots
    behind = [0] * len(counts)
    order = []
    for _ in range(slots):
        for s, count in enumerate(counts):
            behind[s] += scale * count
        due = (s for s in range(len(counts)) if behind[s] >= slots)
        first = min(due, key=lambda s: ((scale - 1) * slots - behind[s]) / counts[s])
        behind[first] -= scale * slots
        order.append(first)
    return order
