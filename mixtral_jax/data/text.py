"""Sources of text: the standard library's own source, text files, JSON lines, Parquet. A document is an id and a string.

Documents come in a fixed order (sorted by file), and whether one is held out depends on its text alone.
"""

import glob
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixtral_jax.config import DataConfig, UserError

logger = logging.getLogger(__name__)

# What a directory in data.path stands for.
SUFFIXES = {"text": (".txt", ".md", ".py"), "jsonl": (".jsonl",), "parquet": (".parquet",)}
# Tests are left out on purpose (some distributions ship Python without them); the rest is not the standard library.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from: a file's path, or `path:line` for one of many in a file."""

    id: str
    text: str


def documents(data: DataConfig) -> Iterator[Document]:
    """Yields the corpus's documents, sorted by file; empty texts are left out and counted in the log.

    Raises:
        UserError: a file is missing or unreadable as its format (naming file and line), or there is no text at all.
    """
    count = empty = 0
    read = {"stdlib": _read_stdlib, "text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[data.source]
    for name, path in source_files(data):
        for document in read(name, path, data.text_key):
            if document.text:
                count += 1
                yield document
            else:
                empty += 1
    if empty:
        logger.info("%d empty documents were left out", empty)
    if not count:
        raise UserError(
            f"data.source={data.source}, data.path={data.path!r}: there is no text in it; set data.path to files that have some"
        )


def source_files(data: DataConfig) -> list[tuple[str, Path]]:
    """Returns the corpus's files as (name, path), sorted by name, each file once.

    Raises:
        UserError: a path or glob of data.path that matches no file.
    """
    if data.source == "stdlib":
        return _stdlib_files()
    found: dict[Path, str] = {}
    for item in filter(None, (part.strip() for part in data.path.split(","))):
        for path in _expand(item, SUFFIXES[data.source]):
            found.setdefault(path.resolve(), path.as_posix())
    return sorted((name, path) for path, name in found.items())


def fingerprint(data: DataConfig) -> str:
    """Returns the SHA-256 over all that decides the documents: source, key, and every file's name and bytes."""
    total = hashlib.sha256(f"{data.source}\0{data.text_key}\0".encode())
    for name, path in source_files(data):
        with open(path, "rb") as file:
            total.update(name.encode(errors="surrogateescape") + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def hash_position(text: str) -> float:
    """Returns the text's place in [0, 1), from the SHA-256 of its UTF-8."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def is_heldout(text: str, fraction: float) -> bool:
    """Tells whether a text belongs to the held-out split.

    Equal texts always fall on the same side, and what a smaller fraction holds out a larger one holds out too.
    """
    return hash_position(text) < fraction


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in names:
            # _sysconfigdata is not source: it records how this interpreter was built, so it differs everywhere.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                files.append((path.relative_to(root).as_posix(), path))
    if not files:
        raise UserError(
            f"data.source=stdlib: there is no Python source in {root}; set data.source=text and data.path to your own files"
        )
    return sorted(files)


def _expand(item: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Lists the files that one item of data.path stands for; hidden files below a directory do not count."""
    item = os.path.expanduser(item)
    # A name that exists is meant literally, even if it holds the brackets of a glob.
    matches = [item] if os.path.exists(item) else glob.glob(item, recursive=True)
    files = []
    for match in map(Path, matches):
        if match.is_dir():
            inside = (path for path in match.rglob("*") if path.suffix in suffixes and path.is_file())
            files += [
                path for path in inside if not any(part.startswith(".") for part in path.relative_to(match).parts)
            ]
        else:
            files.append(match)
    if not files:
        what = f"holds no {', '.join('*' + suffix for suffix in suffixes)}" if matches else "matches no file"
        raise UserError(f"data.path: {item} {what} (working directory {os.getcwd()}); correct the path or the glob")
    return files


def _read_stdlib(name: str, path: Path, text_key: str) -> Iterator[Document]:
    try:
        yield Document(name, path.read_bytes().decode())
    except UnicodeDecodeError:
        logger.info("%s is not UTF-8; left out", name)


def _read_text(name: str, path: Path, text_key: str) -> Iterator[Document]:
    try:
        yield Document(name, path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 ({error.reason} at byte {error.start}); convert it or leave it out of data.path"
        ) from error


def _read_jsonl(name: str, path: Path, text_key: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        # Bytes, so that a line ends at \n only: text mode would also count others, and editors would disagree.
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Document(f"{name}:{number}", _json_text(f"{name}:{number}", line, text_key))


def _json_text(where: str, line: bytes, text_key: str) -> str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: invalid UTF-8 ({error.reason} at byte {error.start} of the line); convert the file to UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: a JSON {type(record).__name__}; each line must be one JSON object, such as {{{text_key!r}: ...}}"
        )
    return _field(where, record, text_key)


def _read_parquet(name: str, path: Path, text_key: str) -> Iterator[Document]:
    for number, row in _parquet_rows(name, path):
        yield Document(f"{name}:{number}", _field(f"{name}:{number}", row, text_key))


def _parquet_rows(name: str, path: Path) -> Iterator[tuple[int, dict]]:
    # The files are local, so nothing here may reach for the hub; read by `datasets` when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset  # takes a second; the other sources do without

    try:
        # Streaming reads one row group at a time, and makes no second copy in the cache of `datasets`.
        files = glob.escape(str(path.resolve()))
        yield from enumerate(load_dataset("parquet", data_files=files, split="train", streaming=True), 1)
    except Exception as error:  # many libraries deep: whatever it is, the file could not be read as Parquet
        raise UserError(
            f"{name}: not readable as Parquet ({error}); write it again or leave it out of data.path"
        ) from error


def _field(where: str, record: dict, text_key: str) -> str:
    if text_key not in record:
        raise UserError(
            f"{where}: no key {text_key!r}; it has {', '.join(map(repr, record)) or 'none'}; set data.text_key"
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_key!r} is of type {type(text).__name__}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, "\ud800", which is no character
        raise UserError(
            f"{where}: {text_key!r} holds a lone surrogate at character {error.start}; remove it"
        ) from error
    return text
