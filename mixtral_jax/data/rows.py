"""Rows of text out of files: whole files, JSON lines, Parquet and Arrow. A part of a file is what is read in one go.

A row is a number and a text; a row that cannot be read is a number and a reason, and the caller decides what that means.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data.bad_rows import Unreadable, check_text, no_key
from mixtral_jax.data.tables import group_sizes, read_table, read_table_records

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a file. Row i of it, from 1, has the id `name:{first + i}`; the one row of a whole file is row 0."""

    kind: str
    name: str
    path: str
    begin: int  # bytes; of Parquet row groups, of Arrow record batches
    end: int
    size: int  # bytes of its text, about
    first: int | None  # rows before it that the numbers count; None: nobody has counted them


Row = tuple[int, str | Unreadable | None]  # None: a blank line, which is no document


def parts(source: SourceConfig, files: list[tuple[str, Path]], cut: int | None = None) -> Iterator[Part]:
    """Yields the parts of a source's files, in order.

    Args:
        source: the source.
        files: its files, as source_files returns them.
        cut: bytes of text in a part, about; None leaves files whole.

    Raises:
        UserError: a file that cannot be opened as its format.
    """
    row = 0
    for name, path in files:
        with _readable(name):
            if source.source == "jsonl":
                yield from _line_parts(name, path, cut)
            elif source.source in ("stdlib", "text"):
                size = path.stat().st_size
                yield Part(source.source, name, str(path), 0, size, size, 0)
            else:
                # The rows of a data set on the hub are numbered through all its files.
                row = row if source.source == "hub" else 0
                for rows, part in _table_parts(source.source, name, path, cut, row):
                    row += rows
                    yield part


def read(part: Part, text_key: str) -> Iterator[Row]:
    """Yields (number from 1 within the part, text), or (0, text) for a whole file.

    Raises:
        UserError: the file is gone or is not readable as its format.
    """
    with _readable(part.name):
        if part.kind in ("stdlib", "text"):
            yield from _read_file(part)
        elif part.kind == "jsonl":
            for number, line in _read_lines(part):
                yield number, _json_text(line, text_key) if line else None
        else:
            yield from read_table(part.kind, part.name, part.path, part.begin, part.end, text_key)


def read_records(part: Part, keys: Sequence[str]) -> Iterator[tuple[int, dict | Unreadable | None]]:
    """Yields (number from 1 within the part, record); None is a blank line. Of a table's row only `keys` have values.

    Raises:
        UserError: the file is gone or is not readable as its format.
    """
    with _readable(part.name):
        if part.kind == "jsonl":
            for number, line in _read_lines(part):
                yield number, json_record(line, keys[0]) if line else None
        else:
            yield from read_table_records(part.kind, part.name, part.path, part.begin, part.end, keys)


def rows_before(part: Part) -> int:
    """The number of rows before the part; counts the lines of its file where nobody has done so."""
    if part.first is not None:
        return part.first
    left, lines = part.begin, 0
    with open(part.path, "rb") as file:
        while chunk := file.read(min(left, READ_BYTES)):
            left -= len(chunk)
            lines += chunk.count(b"\n")
    return lines


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); make it readable or leave it out") from error


def _line_parts(name: str, path: Path, cut: int | None) -> Iterator[Part]:
    size, begin = path.stat().st_size, 0
    with open(path, "rb") as file:
        while begin < size:
            end = size
            if cut is not None and begin + cut < size:
                file.seek(begin + cut - 1)
                file.readline()  # to the next line's start, or no further if this is one
                end = min(file.tell(), size)
            yield Part("jsonl", name, str(path), begin, end, end - begin, 0 if begin == 0 else None)
            begin = end


def _table_parts(kind: str, name: str, path: Path, cut: int | None, row: int) -> Iterator[tuple[int, Part]]:
    """Yields (rows, part) of a table's file: runs of row groups or record batches of about `cut` bytes."""
    begin, size, rows = 0, 0, 0
    sizes = list(group_sizes(kind, name, str(path)))
    for i, (group_rows, group_bytes) in enumerate(sizes, 1):
        size, rows = size + group_bytes, rows + group_rows
        if i == len(sizes) or (cut is not None and size >= cut):
            yield rows, Part(kind, name, str(path), begin, i, size, row)
            begin, size, rows, row = i, 0, 0, row + rows


def _read_file(part: Part) -> Iterator[Row]:
    try:
        yield 0, Path(part.path).read_bytes().decode()
    except UnicodeDecodeError as error:
        if part.kind == "stdlib":
            logger.info("%s is not UTF-8; left out", part.name)
        else:
            what = f"{error.reason} at byte {error.start}"
            yield 0, Unreadable(f"is not UTF-8 ({what}); convert it or leave it out of data.path")


def _read_lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line), the line empty if it is blank."""
    # Bytes, so that a line ends at \n only: text mode would also count others, and editors would disagree.
    with open(part.path, "rb", buffering=READ_BYTES) as file:
        file.seek(part.begin)
        left = part.end - part.begin
        for number, line in enumerate(file, 1):
            yield number, line if line.strip() else b""
            left -= len(line)
            if left <= 0:
                return


def _json_text(line: bytes, text_key: str) -> str | Unreadable:
    record = json_record(line, text_key)
    if isinstance(record, Unreadable):
        return record
    return check_text(record[text_key], text_key) if text_key in record else no_key(record, text_key)


def json_record(line: bytes, example: str) -> dict | Unreadable:
    """Reads a line as a JSON object; `example` is a key that such a line may have, for the message."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Unreadable(
            f"invalid UTF-8 ({error.reason} at byte {error.start} of the line); convert the file to UTF-8"
        )
    except (ValueError, RecursionError) as error:
        return Unreadable(f"not JSON ({error}); each line must be one JSON object")
    if not isinstance(record, dict):
        return Unreadable(
            f"a JSON {type(record).__name__}; each line must be one JSON object, such as {{{example!r}: ...}}"
        )
    return record
