"""Rows as records, for the stages that train on conversations and pairs: dicts out of JSON lines, Parquet and Arrow.

The standard library's records are made of its documentation strings; text files have none.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data.bad_rows import Unreadable
from mixtral_jax.data.rows import parts, read_records

Stage = Literal["sft", "dpo"]

TICK_BYTES = 4_000_000  # of a file, read in one go
# Of a table's columns only these and data.text_key are read.
KEYS = {"sft": ("messages", "prompt", "completion", "tools"), "dpo": ("prompt", "chosen", "rejected", "tools")}


class Record(NamedTuple):
    """A row: the file's name, the row's number from 1 (0: the name says it all), and what is in it."""

    name: str
    number: int
    content: dict | Unreadable

    @property
    def id(self) -> str:
        """`name:number`, as the documents made of it are called."""
        return f"{self.name}:{self.number}" if self.number else self.name


def records(
    source: SourceConfig, files: list[tuple[str, Path]], stage: Stage, tick: Callable[[int], None] = lambda size: None
) -> Iterator[Record]:
    """Yields the rows of a source in order; blank lines are none.

    Args:
        source: the source.
        files: its files, as source_files returns them; those of `stdlib` are not looked at.
        stage: decides which keys a record has.
        tick: is called now and then with the bytes of the files that were read since.

    Raises:
        UserError: a source of plain text, or a file that cannot be read as its format.
    """
    refuse_text(source, stage)
    if source.source == "stdlib":
        import mixtral_jax.data.docstrings as docstrings  # reads the whole standard library

        for name, content in docstrings.instructions() if stage == "sft" else docstrings.preferences():
            yield Record(name, 0, content)
        return
    keys = (*KEYS[stage], *((source.text_key,) if stage == "sft" else ()))
    before = 0  # rows of the file before the part
    for part in parts(source, files, TICK_BYTES):
        before = (before if part.begin else 0) if part.first is None else part.first
        number = 0
        for number, content in read_records(part, keys):
            if content is not None:
                yield Record(part.name, before + number, content)
        before += number
        tick(part.size)


def refuse_text(source: SourceConfig, stage: Stage) -> None:
    """Refuses a source of plain text.

    Raises:
        UserError: it is one.
    """
    if source.source == "text":
        raise UserError(
            f"data.source=text with train.stage={stage}: a text file has no conversations; set data.source to jsonl, "
            "parquet, arrow, hub or stdlib, or train.stage=pretrain"
        )
