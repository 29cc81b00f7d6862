"""The token cache: every document is tokenised once, into flat arrays that all processes map into memory.

A cache is a folder named by a hash of all that decides its content, so nothing in it is ever updated.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mixtral_jax.config import DataConfig, UserError
from mixtral_jax.data.text import Document, documents, fingerprint, hash_position, is_heldout, source_files

logger = logging.getLogger(__name__)

FORMAT = 1  # part of the key: raise it when the meaning of the files changes
SPLITS = ("train", "heldout")
DAMAGE = (FileNotFoundError, NotADirectoryError, EOFError, ValueError)  # what opening an incomplete cache raises
BATCH_CHARACTERS = 4_000_000  # text tokenised at a time


@dataclass(frozen=True)
class TokenFile:
    """One split. Document i is tokens[offsets[i] : offsets[i + 1]], with BOS first and EOS last."""

    tokens: np.ndarray  # [n_tokens] uint16 or int32, memory-mapped
    offsets: np.ndarray  # [n_documents + 1] int64
    bytes_: np.ndarray  # [n_documents] int64, length of the text in UTF-8
    ids: list[str]  # [n_documents]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each document, BOS and EOS included: [n_documents] int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Source:
    """One source of a corpus, both splits; of a streamed source there is no training split."""

    name: str
    weight: float
    train: TokenFile | None
    heldout: TokenFile


@dataclass(frozen=True)
class Corpus:
    """The sources, and the key of their caches: equal keys mean equal documents, tokens and splits (weights apart)."""

    sources: tuple[Source, ...]
    key: str = ""

    @property
    def train(self) -> TokenFile:
        """The training documents of all sources."""
        (source,) = self.sources
        return source.train

    @property
    def heldout(self) -> TokenFile:
        """The held-out documents of all sources."""
        (source,) = self.sources
        return source.heldout


def build_cache(data: DataConfig, tokenizer, progress: bool = True) -> Corpus:
    """Opens the corpus's token cache under data.cache_dir, and builds it first if it is missing or damaged.

    Args:
        data: the corpus; data.tokenizer is not read, the tokenizer is passed in.
        tokenizer: see tokenizer.py.
        progress: show a progress bar on a terminal, log lines elsewhere; False shows neither.

    Raises:
        UserError: bad or missing files, a cache_dir that cannot be written, or a split without documents.
    """
    parts = (FORMAT, fingerprint(data), tokenizer.fingerprint, data.heldout_fraction)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    path = Path(data.cache_dir).expanduser() / "corpora" / key

    def build(folder: Path):
        start = time.perf_counter()
        if progress:
            logger.info("tokenising data.source=%s with %s into %s (once)", data.source, tokenizer.name, path)
        counts = _write_corpus(data, tokenizer, folder, progress and sys.stderr.isatty())
        if progress:
            logger.info("tokenised %s in %.1f s", counts, time.perf_counter() - start)

    return build_once(path, lambda folder: _open_corpus(folder, data, key), build)


def build_once(path: Path, open_: Callable, build: Callable[[Path], None]):
    """Returns open_(path); where that raises, or path is missing, build(folder) makes it first.

    The folder is built aside and renamed, so a path that exists is whole. Of several processes on a file system that
    has locks one builds and the others wait; without locks each builds and the first rename wins.

    Raises:
        UserError: the parent folder cannot be written.
    """
    with contextlib.suppress(*DAMAGE):
        return open_(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(path.name + ".lock"), "w")  # noqa: SIM115, closed below
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write to {path.parent} ({error.strerror}); set data.cache_dir to a folder of yours"
        ) from error
    with lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            try:
                return open_(path)  # another process built it meanwhile
            except DAMAGE as error:
                logger.warning("%s is damaged (%s); building it again", path, error)
                shutil.rmtree(path)
        building = f"{path.name}.building-{socket.gethostname()}-"
        for leftover in path.parent.glob(building + "*"):  # of a build on this host that was killed: we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        folder = path.with_name(f"{building}{os.getpid()}")
        folder.mkdir()
        try:
            build(folder)
            _rename(folder, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return open_(path)


def _rename(folder: Path, path: Path) -> None:
    try:
        os.rename(folder, path)
    except OSError:
        if not path.exists():  # else: without locks another process was first, and its folder is as good
            raise


class _SplitWriter:
    """Appends documents to a split's folder; the tokens go straight to disk. Leaving the context completes the files."""

    def __init__(self, folder: Path, dtype: np.dtype):
        folder.mkdir()
        self._folder, self._dtype = folder, dtype
        self._file = open(folder / "tokens.npy", "wb")  # noqa: SIM115, closed by the context
        self._header(0)
        self._lengths: list[int] = []
        self._bytes: list[int] = []
        self._ids: list[str] = []

    def _header(self, count: int) -> None:
        # NumPy pads headers so that the first dimension can grow in place.
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": self._dtype.str, "fortran_order": False, "shape": (count,)}
        )

    def append(self, document: Document, ids: list[int]) -> None:
        self._file.write(np.array(ids, self._dtype).tobytes())
        self._lengths.append(len(ids))
        self._bytes.append(len(document.text.encode()))
        self._ids.append(document.id)

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._header(sum(self._lengths))
        self._file.close()
        np.save(self._folder / "offsets.npy", np.cumsum([0, *self._lengths], dtype=np.int64))
        np.save(self._folder / "bytes.npy", np.array(self._bytes, np.int64))
        (self._folder / "ids.json").write_text(json.dumps(self._ids))

    def __str__(self) -> str:
        return f"{len(self._ids):,} documents, {sum(self._lengths):,} tokens"


def _open_corpus(folder: Path, data: DataConfig, key: str) -> Corpus:
    (source,) = data.sources
    splits = (_open_split(folder / name) for name in SPLITS)
    return Corpus((Source(source.name, source.weight, *splits),), key)


def _open_split(folder: Path) -> TokenFile:
    """Opens a split.

    Raises:
        FileNotFoundError, ValueError: a file is missing, cut short or at odds with the others.
    """
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    offsets, bytes_ = np.load(folder / "offsets.npy"), np.load(folder / "bytes.npy")
    ids = json.loads((folder / "ids.json").read_text())
    counts = {"tokens": len(tokens), "offsets": int(offsets[-1]) if len(offsets) else -1}
    if counts["tokens"] != counts["offsets"] or not len(ids) == len(bytes_) == len(offsets) - 1:
        raise ValueError(f"{folder.name}: {counts}, {len(ids)} ids, {len(bytes_)} lengths do not agree")
    return TokenFile(tokens, offsets, bytes_, ids)


def _write_corpus(data: DataConfig, tokenizer, folder: Path, bar: bool) -> str:
    """Tokenises the corpus into folder/train and folder/heldout and returns the counts, in words."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
    positions = []
    # The texts are a little shorter than their files (JSON's quotes); of Parquet, compressed, the total is unknown.
    total = None if data.source == "parquet" else sum(path.stat().st_size for _, path in source_files(data))
    with (
        _SplitWriter(folder / "train", dtype) as train,
        _SplitWriter(folder / "heldout", dtype) as heldout,
        tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=not bar) as shown,
    ):
        for batch in _batches(documents(data)):
            for document, ids in zip(batch, tokenizer.encode_many([document.text for document in batch])):
                positions.append(hash_position(document.text))
                writer = heldout if is_heldout(document.text, data.heldout_fraction) else train
                writer.append(document, [tokenizer.bos_id, *ids, tokenizer.eos_id])
            shown.update(sum(len(document.text.encode()) for document in batch))
    _require_both(np.array(positions), data.heldout_fraction)
    return f"train: {train}; held out: {heldout}"


def _batches(items: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in items:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _require_both(positions: np.ndarray, fraction: float) -> None:
    """Refuses a corpus whose documents all fall on one side of the split, with a fraction that would part them."""
    low, high = float(positions.min()), float(positions.max())
    if low < fraction <= high:
        return
    empty = "held-out" if fraction <= low else "training"
    if low == high:
        fix = "add different documents (one file of data.source=text is one document)"
    else:
        # Hold out as little as possible, or leave as little as possible to hold out; never more digits than needed.
        edge = low if fraction <= low else high
        fix = f"set data.heldout_fraction={_between(low, high, edge)}, or add documents"
    raise UserError(
        f"data.heldout_fraction={fraction} leaves the {empty} split empty: there are {len(positions)} documents; {fix}"
    )


def _between(low: float, high: float, edge: float) -> float:
    """Returns a short number in (low, high], near the edge."""
    for digits in range(2, 16):
        for value in (round(edge + sign * 10.0**-digits, digits) for sign in (0, 1, -1)):
            if low < value <= high and 0 < value < 1:
                return value
    return high
