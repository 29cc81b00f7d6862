"""Finished pieces of an evaluation, kept in a file, so that an interrupted one goes on where it was."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixtral_jax import distributed
from mixtral_jax.config import UserError

PIECE = 1_000_000  # characters of a message between processes


def key_of(what: Mapping[str, Any]) -> str:
    """A hash of everything that decides results; equal things give equal keys."""
    return hashlib.sha256(json.dumps(dict(what), sort_keys=True, default=str).encode()).hexdigest()


def bar(items: Iterable, what: str, unit: str, total: int | None = None, done: int = 0) -> tqdm:
    """A progress bar with ETA on process 0's terminal; `done` of `total` were finished before."""
    hidden = None if distributed.speaks() else True
    return tqdm(items, what, total=total, initial=done, unit=unit, leave=False, disable=hidden)


class Work:
    """Named results of one evaluation, each a JSON value. All processes put the same values; process 0 writes them.

    The file's first line says whose they are: results under another key are never taken. A context manager: it closes the file.
    """

    def __init__(self, folder: Path | None, name: str, key: str):
        """Opens FOLDER/NAME-KEY.jsonl and reads what is there; without a folder nothing is kept.

        Raises:
            UserError: the file cannot be read or written.
        """
        self._path = None if folder is None else folder / f"{name}-{key[:16]}.jsonl"
        self._file, self._key = None, key
        self._done: dict[str, Any] = {}
        if self._path is None:
            return
        lines = _whole_lines(self._path) if distributed.speaks() else []
        if distributed.speaks() and (not lines or json.loads(lines[0]) != {"key": key}):
            lines = [json.dumps({"key": key})]
        if distributed.speaks():
            with _explained(self._path):
                # Anew, without the line that an interruption cut.
                self._path.parent.mkdir(parents=True, exist_ok=True)
                temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
                temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")
                temporary.replace(self._path)
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (it stays open until close)
        for line in told("\n".join(lines)).splitlines()[1:]:
            name, value = json.loads(line)
            self._done[name] = value

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def __len__(self) -> int:
        return len(self._done)

    def __bool__(self) -> bool:
        return True  # an empty one is one too: `work or other` must not lose it

    def get(self, name: str, default=None) -> Any:
        """A finished piece's value."""
        return self._done.get(name, default)

    def put(self, name: str, value: Any) -> None:
        """Keeps a finished piece; it is in the file when this returns.

        Raises:
            UserError: the disk is full.
        """
        line = json.dumps([name, value])  # ASCII: no line separator of Unicode's can cut it
        self._done[name] = json.loads(line)[1]  # as it will be read back
        if self._file is not None:
            with _explained(self._path):
                self._file.write(f"{line}\n")
                self._file.flush()

    def close(self) -> None:
        """Lets go of the file and leaves it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file up to the first that is not whole; none of one that is not there."""
    with _explained(path):
        text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    lines = []
    for line in text.split("\n")[:-1]:
        try:
            json.loads(line)
        except ValueError:
            break
        lines.append(line)
    return lines


def told(text: str) -> str:
    """Process 0's text, on all processes."""
    if not distributed.together():
        return text
    count = distributed.decided("pieces", lambda: -(-len(text) // PIECE))
    pieces: Iterator[str] = (
        distributed.decided("piece", lambda i=i: text[i * PIECE : (i + 1) * PIECE]) for i in range(count)
    )
    return "".join(pieces)


class _explained:
    """Turns an OSError into a UserError that says what is kept."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError):
            raise UserError(
                f"{self._path}: {error.strerror or error}; what was finished before is kept there: make room or correct --out, and "
                "run the same command again to go on"
            ) from error
