"""The index of a cache: puts the shards' documents in one order, and opens them again.

shards/000000/ ...                    see shards.py
train.offsets, train.bytes, train.rows  of all shards' documents: raw int64; the same of heldout
cache.json                            counts, and size and SHA-256 of every file; written last
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mixtral_jax.data.build import shard_path
from mixtral_jax.data.shards import ENTRY, SPLITS, damage, hash_file, partial, read_record, read_shard, write_record
from mixtral_jax.data.tokens import Ids, ShardedTokens, TokenFile, map_array

INDEX = "cache.json"
COLUMNS = ("offsets", "bytes", "rows")
INT64 = np.dtype("<i8")


def put_together(folder: Path, n_shards: int, dtype: np.dtype) -> dict:
    """Makes a cache of whole shards complete, and returns its index; needs the cache's lock."""
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    entries = [read_shard(shard_path(folder, i)) for i in range(n_shards)]
    files = {}
    for i, entry in enumerate(entries):
        path = shard_path(folder, i)
        files |= {f"{path.relative_to(folder)}/{name}": found for name, found in entry["files"].items()}
        entry_file = path / ENTRY
        files[f"{path.relative_to(folder)}/{ENTRY}"] = {
            "bytes": entry_file.stat().st_size,
            "sha256": hash_file(entry_file),
        }
    first_rows = list(_first_rows(entries))
    for split in SPLITS:
        files |= _write_columns(folder, split, entries, first_rows)
    ends = [position for entry in entries for position in entry["positions"] or ()]
    index = {
        "dtype": dtype.str,
        "shards": [{split: entry[split] for split in SPLITS} for entry in entries],
        "positions": [min(ends), max(ends)] if ends else None,
        "empty": sum(entry["empty"] for entry in entries),
        "bad": sum(len(part["bad"]) for entry in entries for part in entry["parts"]),
        "files": files,
    }
    write_record(folder / INDEX, index)
    return index


def open_index(folder: Path, verify: bool) -> tuple[TokenFile, TokenFile, dict]:
    """Opens both splits of a complete cache, and returns its index too; the files are only mapped into memory.

    Args:
        folder: the cache.
        verify: compare every file with its hash, not only with its size.

    Raises:
        FileNotFoundError, ValueError: the cache is not complete or is damaged.
    """
    index = read_record(folder / INDEX)
    found = damage(folder, index["files"], verify)
    if found:
        raise ValueError("; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else ""))
    return (*(_open_split(folder, split, index) for split in SPLITS), index)


def bad_rows(folder: Path, n_shards: int) -> Iterator[tuple[str, int, str]]:
    """Yields (file, row, reason) of the rows that were left out because they could not be read, in order."""
    entries = [read_shard(shard_path(folder, i)) for i in range(n_shards)]
    for entry, firsts in zip(entries, _first_rows(entries)):
        for part, first in zip(entry["parts"], firsts):
            for number, reason in part["bad"]:
                yield part["name"], number and first + number, reason


def _open_split(folder: Path, split: str, index: dict) -> TokenFile:
    paths = [shard_path(folder, i) for i in range(len(index["shards"]))]
    counts = [shard[split] for shard in index["shards"]]
    documents = sum(count["documents"] for count in counts)
    sizes = (documents + 1, documents, documents)
    offsets, bytes_, rows = (map_array(folder / f"{split}.{name}", INT64, n) for name, n in zip(COLUMNS, sizes))
    pieces = [(path / f"{split}.tokens", count["tokens"]) for path, count in zip(paths, counts)]
    ids = Ids([(path / ENTRY, count["documents"]) for path, count in zip(paths, counts)], split, rows)
    return TokenFile(ShardedTokens(pieces, np.dtype(index["dtype"])), offsets, bytes_, ids)


def _first_rows(entries: list[dict]) -> Iterator[list[int]]:
    """Yields, for each shard, the rows of its file before each part; where nobody has counted, the parts before did."""
    counted = Counter()
    for entry in entries:
        firsts = []
        for part in entry["parts"]:
            firsts.append(counted[part["name"]] if part["first"] is None else part["first"])
            counted[part["name"]] += part["rows"]
        yield firsts


def _write_columns(folder: Path, split: str, entries: list[dict], first_rows: list[list[int]]) -> dict[str, dict]:
    """Writes a split's columns, shard by shard, and returns the files' sizes and hashes."""
    names = [f"{split}.{column}" for column in COLUMNS]
    temporary = [partial(folder / name) for name in names]
    sums = [hashlib.sha256() for _ in names]
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in temporary]
        total = 0

        def write(*columns: np.ndarray) -> None:
            for file, digest, column in zip(files, sums, columns):
                raw = column.astype(INT64).tobytes()
                file.write(raw)
                digest.update(raw)

        write(np.zeros(1))
        for i, (entry, firsts) in enumerate(zip(entries, first_rows)):
            count = entry[split]["documents"]
            columns = np.fromfile(shard_path(folder, i) / f"{split}.documents", INT64).reshape(3, count)
            in_part = np.diff([part[split] for part in entry["parts"]] + [count])
            before = np.where(columns[2] > 0, np.repeat(np.array(firsts, np.int64), in_part), 0)
            write(total + np.cumsum(columns[0]), columns[1], columns[2] + before)
            total += entry[split]["tokens"]
    found = {}
    for name, path, digest in zip(names, temporary, sums):
        found[name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
        os.replace(path, folder / name)
    return found
