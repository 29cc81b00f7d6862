"""The token cache: every document is tokenised once, into flat arrays that all processes map into memory.

Each source has a folder named by a hash of all that decides its content, so what it means never changes. Its text is
cut into tasks (build.py), each of which becomes a shard (shards.py); an index (index.py) puts them in order.
"""

import errno
import functools
import hashlib
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mixtral_jax.config import DataConfig, SourceConfig, UserError
from mixtral_jax.data.bad_rows import BadRows
from mixtral_jax.data.build import Task, build_shards, make_tasks, shard_path, task_bytes
from mixtral_jax.data.fingerprint import fingerprint
from mixtral_jax.data.index import INDEX, bad_rows, open_index, put_together
from mixtral_jax.data.once import DAMAGE, build_once, building
from mixtral_jax.data.remote_cache import Place, fetch, place, send
from mixtral_jax.data.rows import parts, rows_before
from mixtral_jax.data.shards import SPLITS, Job, TooManyBadRows
from mixtral_jax.data.sources import source_files
from mixtral_jax.data.text import nothing_to_read
from mixtral_jax.data.tokens import TokenFile, join

__all__ = ["Corpus", "Source", "TokenFile", "build_cache", "build_once"]

logger = logging.getLogger(__name__)

FORMAT = 2  # part of the key: raise it when the meaning of the files changes


@dataclass(frozen=True)
class Source:
    """One source of a corpus, both splits; of a streamed source there is no training split."""

    name: str
    weight: float
    train: TokenFile | None
    heldout: TokenFile


@dataclass(frozen=True)
class Corpus:
    """The sources, and the key of their caches: equal keys mean equal documents, tokens and splits (weights and names apart)."""

    sources: tuple[Source, ...]
    key: str = ""
    report: dict | None = None  # of conversations and pairs: what was kept and what was left out, see chat_corpus.py

    @functools.cached_property
    def train(self) -> TokenFile:
        """The training documents of all sources, one source after another.

        Raises:
            ValueError: a source is streamed.
        """
        streamed = [source.name for source in self.sources if source.train is None]
        if streamed:
            raise ValueError(f"{', '.join(streamed)} is streamed: there is no training split to index")
        return join([source.train for source in self.sources])

    @functools.cached_property
    def heldout(self) -> TokenFile:
        """The held-out documents of all sources, one source after another."""
        return join([source.heldout for source in self.sources])


class _Opened(NamedTuple):
    key: str
    train: TokenFile
    heldout: TokenFile
    index: dict


def build_cache(data: DataConfig, tokenizer, progress: bool = True, verify: bool = False) -> Corpus:
    """Opens the corpus's token cache under data.cache_dir; what is missing of it or damaged is built first.

    With a data.cache_dir on an object store it is opened on this machine, fetched where the store has it, and sent where not.

    Args:
        data: the corpus; data.tokenizer is not read, the tokenizer is passed in.
        tokenizer: see tokenizer.py.
        progress: show a progress bar on a terminal, log lines elsewhere; False shows neither.
        verify: compare every file with its hash, not only with its size.

    Raises:
        UserError: bad or missing files, too many bad rows, a cache_dir that cannot be read, written or has no room, a corpus
            without held-out documents or a source without training documents.
        RunError: a process that tokenised was killed, or the store of a cache_dir does not take what was built.
        ValueError: data.streaming is set: a stream has no cache.
    """
    if data.streaming:
        raise ValueError("the corpus is streamed")
    skipped = BadRows(data.max_bad_rows)
    opened = [_open_or_build(data, source, tokenizer, skipped, progress, verify) for source in data.sources]
    require_both(data, [each.index for each in opened])
    for each in opened:
        send(_place(data, each.key), INDEX, progress)
    pairs = list(zip(data.sources, opened))
    key = hashlib.sha256(repr([each.key for each in opened]).encode()).hexdigest()[:32]
    return Corpus(tuple(Source(source.name, source.weight, each.train, each.heldout) for source, each in pairs), key)


def _place(data: DataConfig, key: str) -> Place:
    return place(data.cache_dir, "corpora", key)


def _open_or_build(
    data: DataConfig, source: SourceConfig, tokenizer, skipped: BadRows, progress: bool, verify: bool
) -> _Opened:
    """Opens a source's cache, built first if need be, and adds its bad rows to those of the sources before it."""
    files = source_files(source)
    here = place(data.cache_dir).local
    content = fingerprint(source, files, here)
    parts_of_key = (FORMAT, content, tokenizer.fingerprint, data.heldout_fraction)
    key = hashlib.sha256(repr(parts_of_key).encode()).hexdigest()[:32]
    folder = _place(data, key).local
    try:
        opened = _Opened(key, *open_index(folder, verify))
    except DAMAGE:
        with building(folder):
            fetch(_place(data, key), INDEX, progress)
            try:
                opened = _Opened(key, *open_index(folder, verify))  # another process built it meanwhile
            except DAMAGE as error:
                if (folder / INDEX).exists():
                    logger.warning("%s is damaged: %s", folder, error)
                job = Job(tokenizer, source.text_key, data.heldout_fraction, skipped.limit - skipped.count)
                _build(folder, source, files, job, skipped, progress, verify)
                if fingerprint(source, files, here) != content:
                    shutil.rmtree(folder)
                    raise UserError(f"{source.name}: files changed while they were tokenised; run it again") from None
                opened = _Opened(key, *open_index(folder, verify=False))
                _skip(folder, opened.index, skipped)
                return _with_text(opened, source)
    if skipped.count + opened.index["bad"] > skipped.limit:
        _skip(folder, opened.index, skipped)
    skipped.count += opened.index["bad"]
    return _with_text(opened, source)


def _with_text(opened: _Opened, source: SourceConfig) -> _Opened:
    if not opened.index["positions"]:
        raise nothing_to_read(source)
    return opened


def _build(
    folder: Path, source: SourceConfig, files: list, job: Job, skipped: BadRows, progress: bool, verify: bool
) -> None:
    """Makes the shards that are missing and puts the cache together; needs the lock."""
    start = time.perf_counter()
    if progress:
        logger.info("tokenising data.source=%s with %s into %s (once)", source.source, job.tokenizer.name, folder)
    cut = task_bytes(sum(path.stat().st_size for _, path in files))
    tasks = make_tasks(parts(source, files, cut), cut)
    try:
        build_shards(folder, tasks, job, progress, verify, complete=(folder / INDEX).exists())
        index = put_together(folder, len(tasks), job.dtype)
    except TooManyBadRows as error:
        part, number, reason = error.args
        BadRows(skipped.limit, skipped.limit).add(part.name, number and number + rows_before(part), reason)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _no_room(folder, tasks, job) from error
    if index["empty"]:
        logger.info("%d empty documents were left out", index["empty"])
    if progress:
        said = "; ".join(
            f"{shown}: {_total(index, split, 'documents'):,} documents, {_total(index, split, 'tokens'):,} tokens"
            for split, shown in zip(SPLITS, ("train", "held out"))
        )
        logger.info("tokenised %s in %.1f s", said, time.perf_counter() - start)


def _total(index: dict, split: str, what: str) -> int:
    return sum(shard[split][what] for shard in index["shards"])


def _skip(folder: Path, index: dict, skipped: BadRows) -> None:
    """Logs the bad rows that the cache leaves out.

    Raises:
        UserError: with those before they are more than the limit.
    """
    for name, row, reason in bad_rows(folder, len(index["shards"])):
        skipped.add(name, row, reason)
    if index["bad"]:
        skipped.report()


def _no_room(folder: Path, tasks: list[Task], job: Job) -> UserError:
    """The error of a full disk, with the room that the rest takes: as much per byte of text as the finished shards."""
    sizes = [sum(part.size for part in task) for task in tasks]
    written = [
        sum(file.stat().st_size for file in path.iterdir()) if (path := shard_path(folder, i)).exists() else 0
        for i in range(len(tasks))
    ]
    done = sum(size for size, there in zip(sizes, written) if there)
    per_byte = sum(written) / done if done else job.dtype.itemsize  # a token a byte is the most there is
    needed, left = (sum(sizes) - done) * per_byte, shutil.disk_usage(folder).free
    return UserError(
        f"data.cache_dir: no room in {folder}: about {needed / 1e6:,.0f} MB more are needed and {left / 1e6:,.0f} MB are left; "
        f"free some, or set data.cache_dir to a larger disk ({sum(map(bool, written))} of {len(tasks)} shards are kept)"
    )


def require_both(data: DataConfig, indices: list[dict], what: str = "documents") -> None:
    """Refuses a corpus without held-out documents or a source without training documents, with a fraction that works.

    A source without held-out documents is fine in a mixture: the others are evaluated.

    Args:
        data: the corpus.
        indices: of each source the `positions`, the first and the last of its documents, and the counts of its `shards`.
        what: how errors call the documents.
    """
    fraction = data.heldout_fraction
    low = min(index["positions"][0] for index in indices)
    highest = [index["positions"][1] for index in indices]
    high = min(highest)
    if low < fraction <= high:
        return
    empty = "held-out" if fraction <= low else "training"
    count = sum(_total(index, split, "documents") for index in indices for split in SPLITS)
    who = f" of {data.sources[highest.index(high)].name}" if empty == "training" and data.mixture else ""
    if low >= high:
        one = "one file of data.source=text is one document" if what == "documents" else "the prompt decides the split"
        fix = f"add different {what} ({one})"
    else:
        # Hold out as little as possible, or leave as little as possible to hold out; never more digits than needed.
        edge = low if fraction <= low else high
        fix = f"set data.heldout_fraction={_between(low, high, edge)}, or add {what}"
    raise UserError(
        f"data.heldout_fraction={fraction} leaves the {empty} split{who} empty: there are {count} {what}; {fix}"
    )


def _between(low: float, high: float, edge: float) -> float:
    """Returns a short number in (low, high], near the edge."""
    for digits in range(2, 16):
        for value in (round(edge + sign * 10.0**-digits, digits) for sign in (0, 1, -1)):
            if low < value <= high and 0 < value < 1:
                return value
    return high
