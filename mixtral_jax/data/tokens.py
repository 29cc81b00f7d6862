"""Splits of tokenised documents as they are read: arrays over many files, mapped into memory when they are touched."""

import contextlib
import functools
import json
import resource
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

import numpy as np

# A mapped file keeps a descriptor, and a process has only so many of them for everything it opens.
FEW_MAPPED, MOST_MAPPED = 16, 16384


@dataclass(frozen=True)
class TokenFile:
    """One split. Document i is tokens[offsets[i] : offsets[i + 1]], with BOS first and EOS last."""

    tokens: "np.ndarray | ShardedTokens"  # [n_tokens] uint16 or int32
    offsets: np.ndarray  # [n_documents + 1] int64
    bytes_: np.ndarray  # [n_documents] int64, length of the text in UTF-8
    ids: Sequence[str]  # [n_documents]
    weights: np.ndarray | None = None  # [n_tokens] float32, the loss weight of each token as a target; None: all 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each document, BOS and EOS included: [n_documents] int64."""
        return np.diff(self.offsets)


class ShardedTokens:
    """One array [n] over the files of many shards, read-only. A slice within a shard is a view, across shards a copy.

    `np.asarray` of it reads everything into memory unless there is just one shard: take slices. Of all shards of all
    arrays only so many are mapped at a time; the one that was mapped first makes room.
    """

    _mapped: ClassVar["deque[tuple[weakref.ref[ShardedTokens], int]]"] = deque()  # of the process, oldest first

    def __init__(self, pieces: Sequence[tuple[Path | np.ndarray, int]], dtype: np.dtype):
        """Args: (raw file or array, items in it) in order; the type of all of them. Files are opened when touched."""
        self.pieces = [piece for piece in pieces if piece[1]]  # an empty file cannot be mapped
        self.dtype = np.dtype(dtype)
        self._starts = [0, *accumulate(count for _, count in self.pieces)]
        self._arrays: list[np.ndarray | None] = [None] * len(self.pieces)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def shape(self) -> tuple[int]:
        """(n,)."""
        return (len(self),)

    def __getitem__(self, key: int | slice) -> np.ndarray:
        if not isinstance(key, slice):
            index = range(len(self))[key]
            return self[index : index + 1][0]
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise IndexError(f"a slice in steps of {step}; take every token and step through the copy")
        if start >= stop:
            return np.empty(0, self.dtype)
        first = bisect_right(self._starts, start) - 1
        if stop <= self._starts[first + 1]:
            offset = self._starts[first]
            return self._array(first)[start - offset : stop - offset]
        last = bisect_right(self._starts, stop - 1) - 1
        whole = np.empty(stop - start, self.dtype)
        for i in range(first, last + 1):  # one after another: a slice in use keeps its shard mapped
            begin, end = max(start, self._starts[i]), min(stop, self._starts[i + 1])
            whole[begin - start : end - start] = self._array(i)[begin - self._starts[i] : end - self._starts[i]]
        return whole

    def __array__(self, dtype=None, copy: bool | None = None) -> np.ndarray:
        if copy is False and len(self.pieces) > 1:
            raise ValueError(f"tokens in {len(self.pieces)} shards are no array without a copy; take slices")
        return np.array(self[:], dtype, copy=copy)

    def tolist(self) -> list[int]:
        """All tokens, as NumPy's tolist."""
        return self[:].tolist()

    def _array(self, i: int) -> np.ndarray:
        array = self._arrays[i]  # once: another thread may drop it from the list
        if array is None:
            piece, count = self.pieces[i]
            if isinstance(piece, Path):
                self._make_room()
                self._mapped.append((weakref.ref(self), i))
                piece = map_array(piece, self.dtype, count)
            array = self._arrays[i] = piece
        return array

    def _make_room(self) -> None:
        # Not by latest use: to note every use costs more than to map a shard again now and then.
        while len(self._mapped) >= FEW_MAPPED and len(self._mapped) >= _most_mapped():
            with contextlib.suppress(IndexError):  # another thread was faster
                tokens, i = self._mapped.popleft()
                if (owner := tokens()) is not None:
                    owner._arrays[i] = None


class Ids(Sequence):
    """The ids of a split's documents, spelled when asked for: a file's name, and the row's number where it has one."""

    def __init__(self, shards: Sequence[tuple[Path, int]], split: str, rows: np.ndarray):
        """Args: (the shard's entry, its documents in the split) in order; the split; [n_documents] int64, 0: no row."""
        self._entries = [path for path, _ in shards]
        self._starts = list(accumulate((count for _, count in shards), initial=0))
        self._rows = rows
        self._names = functools.lru_cache(maxsize=64)(lambda entry: _names(entry, split))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, key: int | slice) -> str | list[str]:
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        index = range(len(self))[key]
        shard = bisect_right(self._starts, index) - 1
        names, starts = self._names(self._entries[shard])
        name, row = names[bisect_right(starts, index - self._starts[shard]) - 1], int(self._rows[index])
        return f"{name}:{row}" if row else name


class _Joined(Sequence):
    def __init__(self, parts: Sequence[Sequence]):
        self._parts, self._starts = parts, list(accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, key):
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        index = range(len(self))[key]
        part = bisect_right(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]]


def join(files: Sequence[TokenFile]) -> TokenFile:
    """Puts splits one after another; tokens and ids stay where they are, offsets and bytes (16 per document) are copied."""
    if len(files) == 1:
        return files[0]
    starts = accumulate((len(file.tokens) for file in files), initial=0)
    offsets = [file.offsets[1:] + start for file, start in zip(files, starts)]
    pieces = [piece for file in files for piece in getattr(file.tokens, "pieces", [(file.tokens, len(file.tokens))])]
    return TokenFile(
        ShardedTokens(pieces, files[0].tokens.dtype),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
        np.concatenate([file.bytes_ for file in files]),
        _Joined([file.ids for file in files]),
        _joined_weights(files),
    )


def _joined_weights(files: Sequence[TokenFile]) -> np.ndarray | None:
    if all(file.weights is None for file in files):
        return None
    return np.concatenate([np.ones(len(f.tokens), np.float32) if f.weights is None else f.weights for f in files])


def map_array(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """Maps a raw file of `count` items into memory, read-only: a plain array, whose slices are cheaper than a memmap's."""
    return np.asarray(np.memmap(path, dtype, "r", shape=(count,))) if count else np.empty(0, dtype)


@functools.cache
def _most_mapped() -> int:
    """How many shards may be mapped: half of the descriptors, once the soft limit on them is as high as we may set it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems allow less than they promise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return MOST_MAPPED if soft == resource.RLIM_INFINITY else min(soft // 2, MOST_MAPPED)


def _names(entry: Path, split: str) -> tuple[list[str], list[int]]:
    """The names of the files in a shard and the number of the split's documents before each."""
    parts = json.loads(entry.read_bytes())["record"]["parts"]
    return [part["name"] for part in parts], [part[split] for part in parts]
