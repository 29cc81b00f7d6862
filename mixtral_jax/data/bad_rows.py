"""Rows that cannot be read: what is wrong with them, and how many of them a corpus may have."""

import logging
from dataclasses import dataclass

from mixtral_jax.config import UserError

logger = logging.getLogger(__name__)

SHOWN = 20


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What a row is when its text cannot be read."""

    reason: str


class BadRows:
    """Counts the rows that cannot be read: up to `limit` are skipped and logged, the next one is an error."""

    def __init__(self, limit: int = 0, count: int = 0):
        """Args: how many may be skipped; how many were already."""
        self.limit, self.count = limit, count

    def add(self, name: str, number: int, reason: str) -> None:
        """Notes a bad row; number 0 is a whole file.

        Raises:
            UserError: there were `limit` bad rows before it.
        """
        sentence = f"{name}:{number}: {reason}" if number else f"{name} {reason}"
        if self.count >= self.limit:
            before = (
                f"; {self.count} bad rows were skipped before it, data.max_bad_rows={self.limit}" if self.limit else ""
            )
            raise UserError(sentence + before)
        self.count += 1
        if self.count <= SHOWN:
            logger.warning("skipped %s", sentence)

    def report(self) -> None:
        """Logs how many were skipped, if not all of them were shown."""
        if self.count > SHOWN:
            logger.warning("%d bad rows were skipped in all; the first %d are above", self.count, SHOWN)


def no_key(keys, text_key: str) -> Unreadable:
    """What is wrong with a row of these keys."""
    return Unreadable(f"no key {text_key!r}; it has {', '.join(map(repr, keys)) or 'none'}; set data.text_key")


def check_text(text, text_key: str) -> str | Unreadable:
    """Returns the value of a row's key if it is text that UTF-8 can spell."""
    if not isinstance(text, str):
        return Unreadable(f"{text_key!r} is of type {type(text).__name__}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, "\ud800", which is no character
        return Unreadable(f"{text_key!r} holds a lone surrogate at character {error.start}; remove it")
    return text
