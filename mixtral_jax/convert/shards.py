"""Directories of safetensors files: opened and checked against their index, or written in a stream."""

import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mixtral_jax.config import UserError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict:
    """Reads a JSON object.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


class Shards:
    """All tensors of a directory's safetensors files. Opening reads headers only; `read` reads a part of one tensor.

    Attributes:
        tensors: name -> (shape, dtype).

    Raises:
        UserError: a shard is missing, cut short or damaged, holds a dtype we do not know, or the index lies.
    """

    def __init__(self, folder: Path, pattern: str = "*.safetensors", index: str = INDEX):
        self.folder = folder
        self.tensors: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self._files, self._where = {}, {}
        found = sorted(path.name for path in folder.glob(pattern))
        listed = self._index(folder / index) if (folder / index).is_file() else None
        if listed is None and not found:
            raise UserError(f"{folder} holds no {pattern} file")
        missing = sorted(set(listed.values()) - set(found)) if listed is not None else self._missing_by_number(found)
        if missing:
            raise UserError(f"{folder}: missing {', '.join(missing)}; fetch it again")
        if listed is not None and (extra := sorted(set(found) - set(listed.values()))):
            raise UserError(f"{folder}: {', '.join(extra)} is not in {index}; remove it or fix the index")
        for name in found:
            self._open(name)
        if listed is not None:
            self._check_index(folder / index, listed)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor, in the file's dtype; nothing else of it is read."""
        return self._files[self._where[name]].get_slice(name)[index]

    def close(self) -> None:
        """Forgets the open files; their maps go with them."""
        self._files.clear()

    def _index(self, path: Path) -> dict[str, str]:
        content = read_json(path)
        metadata = content.get("metadata", {})
        if not isinstance(metadata, dict):
            raise UserError(f"{path}: metadata={metadata!r}; it must be an object")
        self._total = metadata.get("total_size")
        listed = content.get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise UserError(f"{path} has no weight_map from tensors to files")
        return listed

    @staticmethod
    def _missing_by_number(found: list[str]) -> list[str]:
        """Without an index, `model-00001-of-00003` tells how many shards there should be."""
        missing = []
        for name in found:
            if match := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\.safetensors)", name):
                head, _, count, end = match.groups()
                wanted = {f"{head}{k:0{len(count)}d}-of-{count}{end}" for k in range(1, int(count) + 1)}
                missing += sorted(wanted - set(found))
        return sorted(set(missing))

    def _open(self, name: str) -> None:
        path = self.folder / name
        try:
            file = safe_open(path, "numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or cut short ({error}); fetch it again") from None
        self._files[name] = file
        for tensor in file.keys():  # noqa: SIM118 (not a dict)
            if tensor in self._where:
                raise UserError(f"{tensor} is in both {self._where[tensor]} and {name} of {self.folder}")
            part = file.get_slice(tensor)
            if part.get_dtype() not in DTYPES:
                raise UserError(
                    f"{path}: {tensor} is of dtype {part.get_dtype()}; weights are {', '.join(DTYPES)} (quantised ones cannot be read)"
                )
            self._where[tensor] = name
            self.tensors[tensor] = (tuple(part.get_shape()), DTYPES[part.get_dtype()])

    def _check_index(self, path: Path, listed: dict[str, str]) -> None:
        lies = [
            f"  {name}: the index says {listed.get(name, 'nothing')}, it is in {self._where.get(name, 'no file')}"
            for name in sorted(listed.keys() | self._where.keys())
            if listed.get(name) != self._where.get(name)
        ]
        if lies:
            more = f"\n  and {len(lies) - 10} more" if len(lies) > 10 else ""
            raise UserError(f"{path} does not describe the files beside it:\n" + "\n".join(lies[:10]) + more)
        total = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.tensors.values())
        if self._total is not None and self._total != total:
            raise UserError(
                f"{path}: total_size is {self._total} and the tensors hold {total} bytes; files and index are not of one model"
            )


class Planned:
    """A tensor about to be written: its name, shape, dtype, and a source of its bytes, part after part."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype, parts: Callable[[], Iterator[np.ndarray]]):
        self.name, self.shape, self.dtype, self.parts = name, shape, dtype, parts
        self.nbytes = int(np.prod(shape)) * dtype.itemsize


def plan_shards(tensors: list[Planned], max_bytes: int) -> dict[str, list[Planned]]:
    """Deals tensors out to files of at most max_bytes, in order; a larger tensor has a file of its own."""
    groups: list[list[Planned]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > max_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{k:05d}-of-{len(groups):05d}.safetensors": group for k, group in enumerate(groups, 1)}


def write_shard(path: Path, tensors: list[Planned], advance: Callable[[int], None]) -> None:
    """Writes one safetensors file in a stream: the format's own library wants the whole file in memory.

    Args:
        path: the file.
        tensors: what it holds; each one's parts must add up to its size.
        advance: called with the bytes written.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        header[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            begin = file.tell()
            for part in tensor.parts():
                file.write(np.ascontiguousarray(part, tensor.dtype).reshape(-1).view(np.uint8).data)
                advance(part.size * tensor.dtype.itemsize)
            if file.tell() - begin != tensor.nbytes:
                raise RuntimeError(f"{tensor.name}: wrote {file.tell() - begin} bytes instead of {tensor.nbytes}")


def write_index(folder: Path, files: dict[str, list[Planned]]) -> None:
    """Writes the index where there is more than one file, as transformers does."""
    if len(files) == 1:
        return
    total = sum(tensor.nbytes for group in files.values() for tensor in group)
    where = {tensor.name: file for file, group in files.items() for tensor in group}
    content = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
