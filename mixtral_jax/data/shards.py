"""A shard: the tokens of some documents in a folder of its own, with an entry of what is in it and its files' hashes.

tokens of a split      train.tokens, heldout.tokens: raw uint16 or int32, documents one after another
columns of a split     train.documents, heldout.documents: raw int64 [3, n], each document's tokens, bytes and
                       row within its part
entry.json             counts, the parts with their names and bad rows, and size and SHA-256 of the four files
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtral_jax.data.bad_rows import Unreadable
from mixtral_jax.data.once import aside
from mixtral_jax.data.rows import Part, read
from mixtral_jax.data.text import hash_position

SPLITS = ("train", "heldout")
ENTRY = "entry.json"
BATCH_CHARACTERS = 4_000_000  # text tokenised at a time


@dataclass(frozen=True)
class Job:
    """What decides the content of the shards besides the text's parts; the limit only decides whether there is any."""

    tokenizer: object
    text_key: str
    heldout_fraction: float
    max_bad_rows: int  # that this source may still have

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens on disk."""
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 2**16 else "<i4")


class TooManyBadRows(Exception):
    """One bad row more than allowed; args: the part, the row's number in it, the reason."""


def task_key(task: Sequence[Part]) -> str:
    """Names what a shard is made of: equal keys mean the same pieces of the same files."""
    pieces = [(part.kind, part.name, part.begin, part.end, part.first) for part in task]
    return hashlib.sha256(repr(pieces).encode(errors="surrogatepass")).hexdigest()


def write_shard(path: Path, task: Sequence[Part], job: Job, encode: Callable, tick: Callable[[int], None]) -> list:
    """Tokenises the parts into the folder `path`, which appears when it is whole.

    Args:
        path: the folder to make.
        task: the parts.
        job: the rest that matters.
        encode: texts -> an iterable of the ids of each, without BOS and EOS.
        tick: is called now and then with the bytes of text that were done since.

    Returns:
        The bad rows: [part, number within the part, reason].

    Raises:
        TooManyBadRows: more than job.max_bad_rows in this shard alone.
        UserError: a file that is not readable as its format.
    """
    bad, parts, positions, empty = [], [], [], 0
    left = sum(part.size for part in task)
    with (
        aside(path) as folder,
        _SplitWriter(folder, "train", job) as train,
        _SplitWriter(folder, "heldout", job) as heldout,
    ):
        splits = (train, heldout)
        for part in task:
            starts = {split.name: len(split.lengths) for split in splits}
            parts.append({"name": part.name, "first": part.first, "rows": 0, "bad": []} | starts)
            for batch in _batches(_good_rows(part, job, parts[-1], bad)):
                found, done = _append(batch, splits, job, encode)
                positions += found
                empty += len(batch) - len(found)
                # Texts are a little shorter than their files (JSON's quotes), and `size` is a guess for other kinds.
                done = min(done, left)
                left -= done
                tick(done)
        tick(left)
        entry = {"task": task_key(task), "parts": parts, "empty": empty}
        entry["positions"] = [min(positions), max(positions)] if positions else None
        entry["files"] = {name: summary for split in splits for name, summary in split.finish().items()}
        entry |= {split.name: {"documents": len(split.lengths), "tokens": sum(split.lengths)} for split in splits}
        write_record(folder / ENTRY, entry)
    return bad


def read_shard(path: Path) -> dict:
    """Returns a shard's entry.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    return read_record(path / ENTRY)


def write_record(path: Path, record: dict) -> None:
    """Writes JSON with its own hash, so that a changed byte is noticed; the file appears when it is whole."""
    temporary = partial(path)
    temporary.write_text(json.dumps({"sha256": _hash_record(record), "record": record}))
    os.replace(temporary, path)


def partial(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def read_record(path: Path) -> dict:
    """Reads what write_record wrote.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    return check_record(path.read_bytes(), path)


def check_record(raw: bytes, path: Path | str) -> dict:
    """Reads the content of what write_record wrote, wherever `path` is.

    Raises:
        ValueError: it is damaged.
    """
    content = json.loads(raw)
    if not isinstance(content, dict) or set(content) != {"sha256", "record"}:
        raise ValueError(f"{path} is no record")
    if content["sha256"] != _hash_record(content["record"]):
        raise ValueError(f"{path} has another SHA-256 than it says")
    return content["record"]


def _hash_record(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def damage(folder: Path, files: dict[str, dict], sums: bool) -> list[str]:
    """Compares files with their entries, by size or (`sums`) by hash too; returns a sentence for each that differs."""

    def check(item: tuple[str, dict]) -> str | None:
        path, expected = folder / item[0], item[1]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{path} has {size} bytes instead of {expected['bytes']}"
            if sums and (digest := hash_file(path)) != expected["sha256"]:
                return f"{path} has the SHA-256 {digest} instead of {expected['sha256']}"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        return None

    if not sums:
        return list(filter(None, map(check, files.items())))
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter alone
        return list(filter(None, pool.map(check, files.items())))


def hash_file(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _SplitWriter:
    """Appends documents to the files of a split."""

    def __init__(self, folder: Path, name: str, job: Job):
        self.name, self.lengths = name, []
        self._folder, self._dtype = folder, job.dtype
        self._bos_id, self._eos_id = job.tokenizer.bos_id, job.tokenizer.eos_id
        self._bytes, self._rows = [], []
        self._hash = hashlib.sha256()
        self._file = open(folder / f"{name}.tokens", "wb")  # noqa: SIM115, closed by the context

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def append(self, ids: Sequence[int] | np.ndarray, size: int, row: int) -> None:
        document = np.empty(len(ids) + 2, self._dtype)
        document[0], document[1:-1], document[-1] = self._bos_id, ids, self._eos_id
        self._file.write(document)
        self._hash.update(document)
        self.lengths.append(len(document))
        self._bytes.append(size)
        self._rows.append(row)

    def finish(self) -> dict[str, dict]:
        """Completes the files and returns their names with size and hash."""
        size = self._file.tell()
        self._file.close()
        columns = np.array([self.lengths, self._bytes, self._rows], "<i8").tobytes()
        (self._folder / f"{self.name}.documents").write_bytes(columns)
        return {
            f"{self.name}.tokens": {"bytes": size, "sha256": self._hash.hexdigest()},
            f"{self.name}.documents": {"bytes": len(columns), "sha256": hashlib.sha256(columns).hexdigest()},
        }


def _append(batch: list, splits: Sequence[_SplitWriter], job: Job, encode: Callable) -> tuple[list[float], int]:
    """Tokenises a batch of (row, text); returns the documents' hash positions and the bytes of their text."""
    rows = [(row, text) for row, text in batch if text]
    positions, done = [], 0
    for (row, text), ids in zip(rows, encode([text for _, text in rows])):
        raw = text.encode()
        positions.append(hash_position(raw))
        split = splits[positions[-1] < job.heldout_fraction]
        split.append(ids, len(raw), row)
        done += len(raw)
    return positions, done


def _good_rows(part: Part, job: Job, record: dict, bad: list) -> Iterator[tuple[int, str]]:
    """Yields (number within the part, text), and notes the rows that cannot be read."""
    for number, text in read(part, job.text_key):
        record["rows"] = number
        if isinstance(text, Unreadable):
            if len(bad) >= job.max_bad_rows:
                raise TooManyBadRows(part, number, text.reason)
            bad.append([part, number, text.reason])
            record["bad"].append([number, text.reason])
        elif text is not None:
            yield number, text


def _batches(rows: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
