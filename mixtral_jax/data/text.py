"""Documents: an id and a text, in a fixed order, and the rule that holds some of them out.

Documents come sorted by file, and whether one is held out depends on its text alone.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data.bad_rows import BadRows, Unreadable
from mixtral_jax.data.fingerprint import fingerprint
from mixtral_jax.data.rows import parts, read
from mixtral_jax.data.sources import source_files

__all__ = [
    "BadRows",
    "Document",
    "documents",
    "file_documents",
    "fingerprint",
    "hash_position",
    "is_heldout",
    "nothing_to_read",
    "source_files",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from: a file's path, or `path:row` for one of many in a file (jsonl: the line)."""

    id: str
    text: str


def documents(source: SourceConfig, bad_rows: BadRows | None = None) -> Iterator[Document]:
    """Yields the source's documents, sorted by file; empty texts are left out and counted in the log.

    Args:
        source: the source.
        bad_rows: counts rows that cannot be read, and says when there are too many; None allows none.

    Raises:
        UserError: a file is missing or unreadable as its format (naming file and line), there is one bad row too many,
            or there is no text at all.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    count = empty = 0
    for document in file_documents(source, source_files(source), bad_rows):
        if document.text:
            count += 1
            yield document
        else:
            empty += 1
    bad_rows.report()
    if empty:
        logger.info("%d empty documents were left out", empty)
    if not count:
        raise nothing_to_read(source)


def file_documents(source: SourceConfig, files: list[tuple[str, Path]], bad_rows: BadRows) -> Iterator[Document]:
    """Yields the documents of some of the source's files, the empty ones too.

    Args:
        source: the source.
        files: (name, path), as source_files returns them; of `hub` all of them, for their rows are numbered through.
        bad_rows: told of the rows that cannot be read.

    Raises:
        UserError: a file is unreadable as its format, or there is one bad row too many.
    """
    for part in parts(source, files):
        for number, text in read(part, source.text_key):
            number += part.first if number else 0
            if isinstance(text, Unreadable):
                bad_rows.add(part.name, number, text.reason)
            elif text is not None:
                yield Document(f"{part.name}:{number}" if number else part.name, text)


def nothing_to_read(source: SourceConfig) -> UserError:
    """The error of a source without text."""
    return UserError(
        f"data.source={source.source}, data.path={source.path!r}: there is no text in it; set data.path to files that have some"
    )


def hash_position(text: str | bytes) -> float:
    """Returns the text's place in [0, 1), from the SHA-256 of its UTF-8."""
    raw = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.sha256(raw).digest()[:6]) / 2**48


def is_heldout(text: str, fraction: float) -> bool:
    """Tells whether a text belongs to the held-out split.

    Equal texts always fall on the same side, and what a smaller fraction holds out a larger one holds out too.
    """
    return hash_position(text) < fraction
