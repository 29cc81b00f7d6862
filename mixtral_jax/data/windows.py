"""Batches of streamed sources: what is read is packed and shuffled window by window.

A window is a run of consecutive training documents with at least WINDOW_ROWS rows of positions. Its rows depend on the
data and the seed alone. So the state of a run is small: the place in each stream where its window begins, and how many of
the window's rows were taken. A resume reads these windows once more and nothing before them.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mixtral_jax.config import DataConfig, SourceConfig, UserError
from mixtral_jax.data.batch import Batch, Packed, fill, global_rows, shuffled
from mixtral_jax.data.cache import TokenFile
from mixtral_jax.data.mixture import Schedule
from mixtral_jax.data.packing import pack
from mixtral_jax.data.stream import SourceBadRows, StreamBadRows, read
from mixtral_jax.data.text import Document, is_heldout

# More rows pack tighter, shuffle better, and take longer to read again at a resume: 2 million tokens at 4,096.
WINDOW_ROWS = 512
CHUNK_CHARACTERS = 2_000_000  # text tokenised at a time
BEGINNING = {"epoch": 0, "window": 0, "taken": 0, "place": None, "bad": 0, "bad_before": 0}


class Closed(Exception):
    """Whoever wanted the batches wants no more of them."""


class Tokens(NamedTuple):
    """A document's tokens, and where its stream stands after it."""

    id: str
    ids: np.ndarray  # [n] int32, BOS first and EOS last
    size: int  # bytes of the text
    place: dict
    bad: int  # rows of this epoch, up to here, that could not be read


class Window(NamedTuple):
    """Packed documents, the order of their rows, and the state of the source before and after all of them."""

    packed: Packed
    order: list[int]
    before: dict
    after: dict


class StreamedBatches:
    """Batches of one or more streams, in the order of a schedule; the fields of a batch are described in batch.fill."""

    def __init__(self, data: DataConfig, tokenizer, *, batch_size: int, seq_len: int, seed: int):
        """Opens nothing yet.

        Args:
            data: its sources, heldout_fraction and max_bad_rows are read.
            tokenizer: see tokenizer.py.
            batch_size: rows of a batch, over all processes.
            seq_len: positions of a row.
            seed: decides the order of the rows in their windows, below 2**32.

        Raises:
            UserError: the weight of a source is too small.
        """
        self.batch_size, self.seq_len = batch_size, seq_len
        self.schedule = Schedule([source.name for source in data.sources], [source.weight for source in data.sources])
        self._data, self._tokenizer, self._seed = data, tokenizer, seed

    def read(
        self,
        state: dict | None = None,
        start: int = 0,
        stop: int | None = None,
        closed: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[Batch, dict]]:
        """Yields (rows start to stop - 1 of a batch, state after the batch) for ever.

        Args:
            state: where to go on; None is the beginning. A state is a dict that JSON keeps, the same on all processes:
                {"row": global rows taken, "sources": {name: {"epoch", "window", "taken", "place", "bad", "bad_before"}}}.
            start, stop: the rows that this process needs (stop None: to the batch's end). Every process reads all text.
            closed: asked now and then while a window is read.

        Raises:
            UserError: the state is of other sources, or a source cannot be read or has no training documents.
            RunError: a data set of the hub was there and cannot be read on.
            Closed: closed() said so.
        """
        wanted, names = global_rows(0, start, stop, self.batch_size), self.schedule.names
        state = state or {"row": 0, "sources": dict.fromkeys(names, BEGINNING)}
        if set(state["sources"]) != set(names):
            raise UserError(
                f"the stored state is of the sources {', '.join(sorted(state['sources']))}; the configuration has "
                f"{', '.join(sorted(names))}: restore data.mixture"
            )
        streams, bad_rows = [], StreamBadRows(self._data.max_bad_rows, len(names))
        for s, source in enumerate(self._data.sources):
            fraction = self._data.heldout_fraction
            documents = TrainingDocuments(source, self._tokenizer, fraction, bad_rows.of_source(s), closed)
            streams.append(_Rows(documents, self.seq_len, self._seed, s, state["sources"][source.name]))
        row = state["row"]
        while True:
            places = [streams[self.schedule.place(row + j)[0]].take() for j in range(self.batch_size)]
            row += self.batch_size
            after = {name: stream.state for name, stream in zip(names, streams)}
            yield fill([places[j] for j in wanted], self.seq_len), {"row": row, "sources": after}


class _Rows:
    """The rows of one source, one after another, for ever."""

    def __init__(self, documents: "TrainingDocuments", seq_len: int, seed: int, source: int, state: dict):
        self.state = state  # after the last row taken
        self._documents, self._seq_len, self._seed, self._source = documents, seq_len, seed, source
        self._taken = state["taken"]
        self._windows = self._read_windows(state | {"taken": 0})
        self._window: Window | None = None

    def take(self) -> tuple[Packed, int]:
        """Returns the next row."""
        if self._window is None:
            self._window = next(self._windows)
        packed, order, before, after = self._window
        row = order[self._taken]
        self._taken += 1
        self.state = before | {"taken": self._taken}
        if self._taken == len(order):
            self.state, self._window, self._taken = after, None, 0
        return packed, row

    def _read_windows(self, now: dict) -> Iterator[Window]:
        while True:
            empty = now["place"] is None
            for documents in cut(self._documents.read(now), WINDOW_ROWS * self._seq_len):
                empty = False
                packed = _pack(documents, self._seq_len)
                order = shuffled(packed.plan.n_rows, self._seed, self._source, now["epoch"], now["window"]).tolist()
                last = documents[-1]
                after = now | {"window": now["window"] + 1, "place": last.place, "bad": last.bad}
                yield Window(packed, order, now, after)
                now = after
            if empty:
                raise self._documents.nothing()
            most = max(now["bad_before"], self._documents.bad)
            now = BEGINNING | {"epoch": now["epoch"] + 1, "bad_before": most}


class TrainingDocuments:
    """The training documents of one source, tokenised; those held out are passed over."""

    def __init__(
        self, source: SourceConfig, tokenizer, heldout_fraction: float, bad_rows: SourceBadRows, closed=lambda: False
    ):
        self._source, self._tokenizer, self._fraction = source, tokenizer, heldout_fraction
        self._bad_rows, self._closed = bad_rows, closed

    @property
    def bad(self) -> int:
        """Rows of this epoch that could not be read so far."""
        return self._bad_rows.now

    def read(self, state: dict = BEGINNING) -> Iterator[Tokens]:
        """Yields the documents from the state's place to the end of the epoch; see StreamedBatches.read."""
        self._bad_rows.now, self._bad_rows.before = state["bad"], state["bad_before"]
        chunk, size = [], 0
        with contextlib.closing(read(self._source, state["place"], self._bad_rows)) as documents:
            for document, place in documents:
                if self._closed():
                    raise Closed
                if is_heldout(document.text, self._fraction):
                    continue
                chunk.append((document, place, self._bad_rows.now))
                size += len(document.text)
                if size >= CHUNK_CHARACTERS:
                    yield from self._tokenise(chunk)
                    chunk, size = [], 0
        yield from self._tokenise(chunk)

    def _tokenise(self, chunk: list[tuple[Document, dict, int]]) -> Iterator[Tokens]:
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        found = self._tokenizer.encode_many([document.text for document, _, _ in chunk])
        for (document, place, bad), ids in zip(chunk, found):
            yield Tokens(document.id, np.array([bos, *ids, eos], np.int32), len(document.text.encode()), place, bad)

    def nothing(self) -> UserError:
        """The error of a source that has nothing to train on."""
        source = self._source
        return UserError(
            f"data.source={source.source}, data.path={source.path!r}: from its beginning to its end there is no training "
            f"document; set data.path to files that have text, or lower data.heldout_fraction={self._fraction}"
        )


def cut(documents: Iterable[Tokens], positions: int) -> Iterator[list[Tokens]]:
    """Cuts documents into windows, as short as they can be with so many positions; the last may have fewer."""
    window, size = [], 0
    for document in documents:
        window.append(document)
        size += len(document.ids) - 1
        if size >= positions:
            yield window
            window, size = [], 0
    if window:
        yield window


def epoch_size(lengths: np.ndarray, seq_len: int) -> tuple[int, int]:
    """Returns (rows, tokens) of one epoch of a stream whose training documents have these lengths."""
    ends, first, rows = np.cumsum(lengths - 1), 0, 0
    while first < len(lengths):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + WINDOW_ROWS * seq_len)) + 1
        rows += pack(lengths[first:last], seq_len).n_rows
        first = last
    return rows, int(ends[-1]) if len(ends) else 0


def token_file(documents: list[Tokens]) -> TokenFile:
    """Returns the documents as a split in memory."""
    offsets = np.cumsum([0, *(len(document.ids) for document in documents)], dtype=np.int64)
    tokens = np.concatenate([document.ids for document in documents])
    sizes = np.array([document.size for document in documents], np.int64)
    return TokenFile(tokens, offsets, sizes, [document.id for document in documents])


def _pack(documents: list[Tokens], seq_len: int) -> Packed:
    file = token_file(documents)
    return Packed(file, pack(file.lengths, seq_len))
