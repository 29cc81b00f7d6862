"""Reading all of the data once, without a cache: every bad row, counts, statistics of tokens, and what a run takes."""

import contextlib
import hashlib
import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm

from mixtral_jax.config import Config, DataConfig, SourceConfig, UserError
from mixtral_jax.data import stream
from mixtral_jax.data.mixture import Schedule
from mixtral_jax.data.packing import pack
from mixtral_jax.data.rows import parts
from mixtral_jax.data.sources import source_files
from mixtral_jax.data.text import Document, file_documents, is_heldout, nothing_to_read
from mixtral_jax.data.windows import epoch_size

logger = logging.getLogger(__name__)

KEPT_BAD_ROWS = 100_000  # of more only the number is known
CHUNK_CHARACTERS = 1_000_000  # text tokenised at a time
PERCENTILES = {"p1": 1, "p50": 50, "p99": 99, "max": 100}


def validate(config: Config, tokenizer, bar: bool = False) -> dict:
    """Reads every document of data.sources and returns a report, made of what JSON knows.

    Args:
        config: data, and of train the steps, batch_size and seq_len; of model the vocab_size.
        tokenizer: see tokenizer.py.
        bar: show a progress bar.

    Returns:
        "problems": sentences, none if a run can start; "bad_rows": {"total", "allowed", "rows": [[where, reason]]};
        "sources": name -> {"train", "heldout"} -> counts; "duplicates": documents whose text came before;
        "vocabulary": {"size", "used", "fallback_share"}; "run": what train.steps take, None where they cannot run.

    Raises:
        UserError: there are no such files.
    """
    data, train = config.data, config.train
    total = _text_bytes(data.sources, data.streaming)
    bad_rows, texts, vocabulary, counts, broken = AllBadRows(), _Texts(), Vocabulary(tokenizer.vocab_size), {}, {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=not bar) as shown:
        for source in data.sources:
            found = counts[source.name] = {"train": _Split(), "heldout": _Split()}
            broken[source.name] = []
            readable = _documents(source, data.streaming, bad_rows, broken[source.name])
            for document, ids in _tokenised(readable, tokenizer):
                texts.add(document)
                vocabulary.add(ids)
                side = "heldout" if is_heldout(document.text, data.heldout_fraction) else "train"
                shown.update(found[side].add(document, ids))
    lengths = {name: {side: split.lengths for side, split in both.items()} for name, both in counts.items()}
    epochs = [_epoch(both["train"], data, train.seq_len) for both in lengths.values()]
    return {
        "problems": [
            *itertools.chain(*broken.values()),
            *shared_problems(config, tokenizer, lengths, bad_rows, broken, "document"),
        ],
        "bad_rows": bad_rows.report_of(data.max_bad_rows),
        "sources": {name: {side: split.report() for side, split in both.items()} for name, both in counts.items()},
        "duplicates": texts.duplicates(),
        "vocabulary": vocabulary.report(tokenizer),
        "run": run_report(config, epochs) if all(rows for rows, _ in epochs) else None,
    }


class AllBadRows:
    """Collects the rows that cannot be read; none of them is an error."""

    def __init__(self):
        self.count, self._rows = 0, []

    def add(self, name: str, number: int, reason: str) -> None:
        """Notes a bad row; number 0 is a whole file."""
        self.count += 1
        if self.count <= KEPT_BAD_ROWS:
            self._rows.append([f"{name}:{number}" if number else name, reason])

    def report(self) -> None:
        """Says nothing; validate does."""

    def report_of(self, allowed: int) -> dict:
        """Returns the rows, with how many of them a run allows."""
        return {"total": self.count, "allowed": allowed, "rows": self._rows}


class _Split:
    """Counts of one split of one source."""

    def __init__(self):
        self._lengths, self.bytes_ = array("q"), 0

    @property
    def lengths(self) -> np.ndarray:
        return np.array(self._lengths, np.int64)

    def add(self, document: Document, ids: list[int]) -> int:
        """Counts a document and returns its bytes."""
        size = len(document.text.encode())
        self._lengths.append(len(ids) + 2)  # BOS and EOS
        self.bytes_ += size
        return size

    def report(self) -> dict:
        lengths = self.lengths
        tokens = int(lengths.sum())
        return {
            "documents": len(lengths),
            "tokens": tokens,
            "bytes": self.bytes_,
            "bytes_per_token": self.bytes_ / tokens if tokens else None,
            "document_tokens": percentiles(lengths),
        }


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """The percentiles of PERCENTILES, of values that occur, so that the median of two is one of them; 0 of none."""
    at = np.percentile(lengths, list(PERCENTILES.values()), method="inverted_cdf") if len(lengths) else [0] * 4
    return dict(zip(PERCENTILES, map(int, at)))


class Vocabulary:
    """Which ids occur how often."""

    def __init__(self, vocab_size: int):
        self._counts = np.zeros(vocab_size, np.int64)

    def add(self, ids: list[int]) -> None:
        """Counts the ids of a text."""
        np.add.at(self._counts, ids, 1)

    def report(self, tokenizer) -> dict:
        """Returns "size", "used" and "fallback_share"."""
        total, fallback = int(self._counts.sum()), list(tokenizer.fallback_ids)
        return {
            "size": len(self._counts),
            "used": int(np.count_nonzero(self._counts)),
            "fallback_share": float(self._counts[fallback].sum()) / max(total, 1),
        }


class _Texts:
    """Which texts occurred before."""

    def __init__(self):
        self._texts = array("Q")

    def add(self, document: Document) -> None:
        self._texts.append(int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8]))

    def duplicates(self) -> int:
        return len(self._texts) - len(np.unique(np.array(self._texts, np.uint64)))


def _documents(source: SourceConfig, streaming: bool, bad_rows: AllBadRows, broken: list[str]) -> Iterator[Document]:
    """Yields what can be read of a source, and notes in `broken` what is wrong with the rest: a file, or all of it."""
    count, empty, bad_before = 0, 0, bad_rows.count
    for reader in _readers(source, streaming, bad_rows):
        try:
            for document in reader:
                count, empty = count + bool(document.text), empty + (not document.text)
                if document.text:
                    yield document
        except UserError as error:  # of this file; the next ones are read all the same
            broken.append(str(error))
    if empty:
        logger.info("%s: %d empty documents were left out", source.name, empty)
    if not count and not broken and bad_rows.count == bad_before:
        broken.append(str(nothing_to_read(source)))


def _readers(source: SourceConfig, streaming: bool, bad_rows: AllBadRows) -> Iterator[Iterator[Document]]:
    """Yields the documents of each file; a data set of the hub is one file."""
    if source.source == "hub" and streaming:
        yield (document for document, _ in stream.read(source, None, bad_rows))
    elif source.source == "hub":
        yield file_documents(source, source_files(source), bad_rows)
    else:
        for file in source_files(source):
            yield file_documents(source, [file], bad_rows)


def _tokenised(found: Iterable[Document], tokenizer) -> Iterator[tuple[Document, list[int]]]:
    chunk, size = [], 0
    for document in found:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK_CHARACTERS:
            yield from zip(chunk, tokenizer.encode_many([document.text for document in chunk]))
            chunk, size = [], 0
    yield from zip(chunk, tokenizer.encode_many([document.text for document in chunk]))


def _text_bytes(sources: Iterable[SourceConfig], streaming: bool) -> int | None:
    """The text of all sources in bytes, about; None if nobody knows."""
    if streaming and any(source.source == "hub" for source in sources):
        return None
    files = [(source, source_files(source)) for source in sources]
    with contextlib.suppress(UserError):  # a file that is not of its format; reading it will say so
        return sum(part.size for source, of_source in files for part in parts(source, of_source))
    return None


def shared_problems(
    config: Config, tokenizer, lengths: dict, bad_rows: AllBadRows, broken: dict, unit: str
) -> Iterator[str]:
    """Yields what else keeps a run from starting.

    Args:
        config: the run.
        tokenizer: its tokenizer.
        lengths: source -> split -> an array with an item for each document.
        bad_rows: the rows that cannot be read.
        broken: source -> what was said about it already.
        unit: what sentences call a document.
    """
    data = config.data
    if bad_rows.count > data.max_bad_rows:
        yield (
            f"{bad_rows.count:,} rows cannot be read, and data.max_bad_rows={data.max_bad_rows} may be skipped; "
            "mend them or raise it"
        )
    for name, both in lengths.items():
        if not len(both["train"]) and not broken[name]:  # else that is why
            yield f"{name} has no training {unit}; add text, or lower data.heldout_fraction={data.heldout_fraction}"
    if not any(len(both["heldout"]) or broken[name] for name, both in lengths.items()):
        yield f"no {unit} is held out; add text, or raise data.heldout_fraction={data.heldout_fraction}"
    if tokenizer.vocab_size > config.model.vocab_size:
        yield (
            f"the tokenizer has {tokenizer.vocab_size:,} ids and model.vocab_size={config.model.vocab_size}; "
            f"raise it to at least {tokenizer.vocab_size}"
        )


def _epoch(lengths: np.ndarray, data: DataConfig, seq_len: int) -> tuple[int, int]:
    """Returns (rows, tokens) of one epoch of a source."""
    if data.streaming:
        return epoch_size(lengths, seq_len)
    plan = pack(lengths, seq_len, one_per_row=not data.packing)
    return plan.n_rows, plan.n_tokens


def run_report(config: Config, epochs: list[tuple[int, int]]) -> dict:
    """What train.steps take from each source, given (rows, positions that are no padding) of its epoch; each has rows."""
    data, train = config.data, config.train
    rows = train.steps * train.batch_size
    schedule = Schedule([source.name for source in data.sources], [source.weight for source in data.sources])
    used = schedule.usage(rows, epochs)
    tokens = sum(usage.tokens for usage in used)
    return {
        "steps": train.steps,
        "batch_size": train.batch_size,
        "seq_len": train.seq_len,
        "positions": rows * train.seq_len,
        "padding": 1 - tokens / (rows * train.seq_len),
        "sources": {
            usage.name: {
                "rows": usage.rows,
                "tokens": usage.tokens,
                "epochs": usage.epochs,
                "rows_per_epoch": n_rows,
                "padding": 1 - n_tokens / (n_rows * train.seq_len),
                # At the source's share of the rows.
                "steps_per_epoch": train.steps / usage.epochs if usage.epochs else None,
            }
            for usage, (n_rows, n_tokens) in zip(used, epochs)
        },
    }
