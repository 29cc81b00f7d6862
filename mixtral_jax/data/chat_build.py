"""The cache of one source of conversations or pairs: built from records, and opened again.

train.tokens, train.weights     raw uint16 or int32, and float32: documents one after another; the same of heldout
train.documents                 raw int64 [3, n]: each document's tokens, bytes of trained text, and row
entry.json                      the report, the files' names, bad rows, and size and SHA-256 of the six files
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixtral_jax.data.bad_rows import BadRows, Unreadable
from mixtral_jax.data.chat import Segment, assemble, plain_text, segments
from mixtral_jax.data.conversations import Dropped, before_answers, parse_conversation, prompt_text
from mixtral_jax.data.pairs import Pair, parse_pair
from mixtral_jax.data.records import Record, Stage
from mixtral_jax.data.shards import ENTRY, SPLITS, damage, hash_file, read_record, write_record
from mixtral_jax.data.text import hash_position
from mixtral_jax.data.tokens import Ids, TokenFile, map_array

DROPPED = ("too_long", "empty", "no_trained_token", "identical")  # the rules
BATCH_CHARACTERS = 1_000_000  # text tokenised at a time
ROW_CHARACTERS = 100  # what a row counts besides its text
SHOWN = 3  # ids of rows left out by a rule
INT64, FLOAT32 = np.dtype("<i8"), np.dtype("<f4")


@dataclass(frozen=True)
class Job:
    """What decides the documents besides the records."""

    tokenizer: object
    stage: Stage
    seq_len: int
    text_key: str
    heldout_fraction: float

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens on disk."""
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 2**16 else "<i4")


class Example(NamedTuple):
    """A conversation, one document, or a pair, two: the segments of each, and the prompt as a text."""

    documents: tuple[Sequence[Segment], ...]
    prompt: str


def read_example(record: dict, job: Job) -> Example | Dropped | Unreadable:
    """Reads a record of the job's stage.

    Raises:
        UserError: the tokenizer knows a later chat format only.
    """
    parsed = parse_conversation(record, job.text_key) if job.stage == "sft" else parse_pair(record)
    if isinstance(parsed, Dropped | Unreadable):
        return parsed
    if isinstance(parsed, str):
        return Example((plain_text(job.tokenizer, parsed),), parsed)
    if isinstance(parsed, Pair):
        both = tuple(segments(job.tokenizer, messages) for messages in (parsed.chosen, parsed.rejected))
        return Example(both, prompt_text(parsed.prompt))
    return Example((segments(job.tokenizer, parsed),), prompt_text(before_answers(parsed)))


class Tokenised(NamedTuple):
    """An example that is kept or too long: its documents as ids and loss weights, and the positions of all together."""

    example: Example
    documents: list[tuple[list[int], np.ndarray]]
    positions: int


def outcomes(rows: Iterable[Record], job: Job) -> Iterator[tuple[Record, Tokenised | Dropped | Unreadable]]:
    """Yields what becomes of each record, in order; of what is dropped for its length the documents too, as Tokenised.

    Raises:
        UserError: of the records, or the tokenizer knows a later chat format only.
    """
    for batch in _batches(_examples(rows, job)):
        examples = [found for _, found in batch if isinstance(found, Example)]
        texts = [segment.text for example in examples for document in example.documents for segment in document]
        encoded = iter(job.tokenizer.encode_many(texts))
        for record, found in batch:
            yield record, _tokenised(found, encoded, job) if isinstance(found, Example) else found


def _tokenised(example: Example, encoded: Iterator[Sequence[int]], job: Job) -> Tokenised | Dropped:
    documents = [
        assemble(job.tokenizer, document, itertools.islice(encoded, len(document))) for document in example.documents
    ]
    if len(documents) == 2 and documents[0][0] == documents[1][0]:  # v3 drops spaces at the end
        return Dropped("identical")
    return Tokenised(example, documents, sum(len(ids) - 1 for ids, _ in documents))


def _examples(rows: Iterable[Record], job: Job) -> Iterator[tuple[Record, Example | Dropped | Unreadable]]:
    for record in rows:
        content = record.content
        yield record, content if isinstance(content, Unreadable) else read_example(content, job)


def build(folder: Path, rows: Iterable[Record], job: Job, bad_rows: BadRows) -> int:
    """Tokenises records into the files of a folder.

    Args:
        folder: is there and empty.
        rows: the records.
        job: the rest that matters.
        bad_rows: told of the rows that cannot be read.

    Returns:
        The number of tokens.

    Raises:
        UserError: there is one bad row too many, or of the records.
    """
    with ExitStack() as stack:
        tally = _Tally(job, [stack.enter_context(_SplitWriter(folder, name, job.dtype)) for name in SPLITS])
        for record, found in outcomes(rows, job):
            tally.add(record, found, bad_rows)
        write_record(folder / ENTRY, tally.finish())
    return tally.counts["tokens"]


def open_built(folder: Path) -> tuple[TokenFile, TokenFile, dict]:
    """Opens both splits, mapped into memory, and the entry.

    Raises:
        FileNotFoundError, ValueError: it is not complete or is damaged.
    """
    entry = read_record(folder / ENTRY)
    if found := damage(folder, entry["files"], sums=False):
        raise ValueError("; ".join(found[:3]))
    return (*(_open_split(folder, split, entry) for split in SPLITS), entry)


def _open_split(folder: Path, split: str, entry: dict) -> TokenFile:
    count, tokens = entry[split]["documents"], entry[split]["tokens"]
    lengths, sizes, rows = np.fromfile(folder / f"{split}.documents", INT64).reshape(3, count)
    return TokenFile(
        map_array(folder / f"{split}.tokens", np.dtype(entry["dtype"]), tokens),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        sizes,
        Ids([(folder / ENTRY, count)], split, rows),
        map_array(folder / f"{split}.weights", FLOAT32, tokens),
    )


class _Tally:
    """Puts examples where they belong, and counts."""

    def __init__(self, job: Job, splits: "Sequence[_SplitWriter]"):
        self.counts: Counter = Counter()
        self._job, self._splits = job, splits
        self._bad, self._parts, self._positions = [], [], []
        self._seen: set[bytes] = set()
        self._examples: dict[str, list[str]] = {rule: [] for rule in DROPPED}

    def add(self, record: Record, found: Tokenised | Dropped | Unreadable, bad_rows: BadRows) -> None:
        self.counts["rows"] += 1
        if isinstance(found, Unreadable):
            bad_rows.add(record.name, record.number, found.reason)
            self._bad.append([record.name, record.number, found.reason])
        elif isinstance(found, Dropped):
            self._drop(record, found.rule)
        else:
            self.counts["longest"] = max(self.counts["longest"], found.positions)
            if found.positions > self._job.seq_len:
                self._drop(record, "too_long")
            else:
                self._place(record, *found[:2])

    def _place(self, record: Record, example: Example, documents: list[tuple[list[int], np.ndarray]]) -> None:
        position = hash_position(example.prompt)
        self._positions.append(position)
        split = self._splits[position < self._job.heldout_fraction]
        if not self._parts or self._parts[-1]["name"] != record.name:
            self._parts.append({"name": record.name} | {each.name: len(each.lengths) for each in self._splits})
        digest = hashlib.sha256()
        for segments_, (ids, weights) in zip(example.documents, documents):
            raw = np.array(ids, self._job.dtype).tobytes() + weights.astype(FLOAT32).tobytes()
            digest.update(raw)
            trained = sum(len(segment.text.encode()) for segment in segments_ if segment.weight)
            split.append(ids, weights, trained, record.number)
            self.counts["tokens"] += len(ids)
            self.counts["trained_tokens"] += int(np.count_nonzero(weights))
        self.counts["duplicates"] += digest.digest() in self._seen
        self._seen.add(digest.digest())
        self.counts[split.name] += 1

    def _drop(self, record: Record, rule: str) -> None:
        self.counts[rule] += 1
        if len(self._examples[rule]) < SHOWN:
            self._examples[rule].append(record.id)

    def finish(self) -> dict:
        """Completes the files, and returns the entry."""
        counts, unit = self.counts, "conversations" if self._job.stage == "sft" else "pairs"
        keys = ("rows", unit, *SPLITS, *DROPPED, "bad", "duplicates", "longest", "tokens", "trained_tokens")
        counts[unit], counts["bad"] = sum(counts[split] for split in SPLITS), len(self._bad)
        report = {key: counts[key] for key in keys}
        report["examples"] = {rule: ids for rule, ids in self._examples.items() if ids}
        entry = {"dtype": self._job.dtype.str, "report": report, "parts": self._parts, "bad": self._bad}
        entry["positions"] = [min(self._positions), max(self._positions)] if self._positions else None
        entry["files"] = {name: found for split in self._splits for name, found in split.finish().items()}
        for split in self._splits:
            entry[split.name] = {"documents": len(split.lengths), "tokens": sum(split.lengths)}
        return entry


class _SplitWriter:
    """Appends documents to the files of a split."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.name, self.lengths = name, []
        self._folder, self._dtype = folder, dtype
        self._columns: list[tuple[int, int, int]] = []

    def __enter__(self) -> "_SplitWriter":
        self._tokens = open(self._folder / f"{self.name}.tokens", "wb")
        self._weights = open(self._folder / f"{self.name}.weights", "wb")
        return self

    def __exit__(self, *exception) -> None:
        self._tokens.close()
        self._weights.close()

    def append(self, ids: Sequence[int], weights: np.ndarray, size: int, row: int) -> None:
        self._tokens.write(np.array(ids, self._dtype))
        self._weights.write(weights.astype(FLOAT32))
        self.lengths.append(len(ids))
        self._columns.append((len(ids), size, row))

    def finish(self) -> dict[str, dict]:
        """Completes the files, and returns their names with size and hash."""
        self.__exit__()
        columns = np.array(self._columns, INT64).reshape(-1, 3)
        (self._folder / f"{self.name}.documents").write_bytes(np.ascontiguousarray(columns.T).tobytes())
        paths = [self._folder / f"{self.name}.{what}" for what in ("tokens", "weights", "documents")]
        return {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in paths}


def _batches(found: Iterator[tuple]) -> Iterator[list[tuple]]:
    """Yields runs of (record, what it is) with so much text in their examples that tokenising in parallel pays."""
    batch, size = [], 0
    for record, one in found:
        batch.append((record, one))
        size += ROW_CHARACTERS
        if isinstance(one, Example):
            size += sum(len(segment.text) for document in one.documents for segment in document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
