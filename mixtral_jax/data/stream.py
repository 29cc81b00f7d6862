"""Streams: the documents of a source, one after another, from any place in it.

A place is a small dict that goes through JSON unchanged: for files the number of the file, of the part of it and of the
row in the part; for a data set of the hub the state of its IterableDataset. None is the beginning.
"""

import contextlib
from collections.abc import Iterator

from mixtral_jax.config import RunError, SourceConfig
from mixtral_jax.data.bad_rows import BadRows, Unreadable, check_text, no_key
from mixtral_jax.data.rows import parts
from mixtral_jax.data.rows import read as read_part
from mixtral_jax.data.sources import load_hub, source_files
from mixtral_jax.data.text import Document

# A file is read in parts, because a place in it is found again by reading its part from the start.
PART_BYTES = 16 * 2**20
# Asking a data set for its state costs as much as reading some rows, so a place is a state and the rows read since.
STATE_ROWS = 1000


def read(source: SourceConfig, place: dict | None, bad_rows: BadRows) -> Iterator[tuple[Document, dict]]:
    """Yields (document, place after it) to the end of the source, in its fixed order; empty texts are left out.

    Args:
        source: of any kind.
        place: where to go on: what came with a document of the same source, perhaps by way of JSON; None: the beginning.
        bad_rows: told of the rows that cannot be read; what it does not raise is skipped.

    Raises:
        UserError: a file is missing or unreadable as its format, or a data set of the hub cannot be had.
        RunError: a data set of the hub was there and cannot be read on.
    """
    rows = _hub_rows(source, place) if source.source == "hub" else _file_rows(source, place)
    with contextlib.closing(rows):
        for name, number, text, after in rows:
            if isinstance(text, Unreadable):
                bad_rows.add(name, number, text.reason)
            elif text:
                yield Document(f"{name}:{number}" if number else name, text), after


class StreamBadRows:
    """The bad rows of a run's streams, which count once: the same rows are bad again in the next epoch."""

    def __init__(self, limit: int, sources: int):
        self._limit, self._of = limit, [SourceBadRows(self) for _ in range(sources)]

    def of_source(self, s: int) -> "SourceBadRows":
        """What the reader of source s reports to."""
        return self._of[s]

    def counter(self) -> BadRows:
        """Returns a counter of the rows of all sources."""
        return BadRows(self._limit, sum(max(source.now, source.before) for source in self._of))


class SourceBadRows:
    """The bad rows of one source: those of this epoch up to now, and the most that an epoch before it had."""

    def __init__(self, run: StreamBadRows):
        self._run, self.now, self.before = run, 0, 0

    def add(self, name: str, number: int, reason: str) -> None:
        """Notes a bad row; see BadRows.add."""
        if self.now >= self.before:
            self._run.counter().add(name, number, reason)
        self.now += 1


def _file_rows(source: SourceConfig, place: dict | None) -> Iterator:
    """Yields (file's name, row's number in the file, text, place after it)."""
    first = place or {"file": 0, "part": 0, "before": 0, "row": 0}
    for i, file in enumerate(source_files(source)):
        if i < first["file"]:
            continue
        now = first if i == first["file"] else {"file": i, "part": 0, "before": 0, "row": 0}
        skip, before = now["row"], now["before"]  # rows of the part, and rows of the file before the part
        for j, part in enumerate(parts(source, [file], PART_BYTES)):
            if j < now["part"]:
                continue
            number = 0
            for number, text in read_part(part, source.text_key):
                # The one row of a whole file has the number 0, and is the first row to skip.
                if (number or 1) > skip:
                    after = {"file": i, "part": j, "before": before, "row": number or 1}
                    yield file[0], number and before + number, text, after
            skip, before = 0, before + number


def _hub_rows(source: SourceConfig, place: dict | None) -> Iterator:
    """As _file_rows, for a data set of the hub: nothing of it is kept on this machine."""
    now = place or {"row": 0, "state_row": 0, "state": None}
    dataset = load_hub(source.path, streaming=True)
    if source.text_key in (dataset.column_names or ()):
        dataset = dataset.select_columns([source.text_key])  # the others need not even be decoded
    if now["state"] is not None:
        dataset.load_state_dict(now["state"])
    for row, record in _records(source.path, dataset, now["state_row"]):
        if row <= now["row"]:
            continue
        now = now | {"row": row}
        if row % STATE_ROWS == 0:
            now |= {"state_row": row, "state": dataset.state_dict()}
        key = source.text_key
        yield source.path, row, check_text(record[key], key) if key in record else no_key(record, key), now


def _records(name: str, dataset, row: int) -> Iterator[tuple[int, dict]]:
    try:
        for record in dataset:
            row += 1
            yield row, record
    except Exception as error:  # many libraries deep: whatever it is, the stream has broken off
        raise RunError(
            f"{name}: reading on failed after row {row} ({error}); resume the run when the data set can be reached"
        ) from error
