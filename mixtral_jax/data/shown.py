"""How far something long is, in bytes: a bar on a terminal, a line now and then elsewhere, or nothing."""

import contextlib
import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0


class Shown(contextlib.AbstractContextManager):
    """Counts bytes towards a total.

    Args:
        total: bytes there are to do.
        progress: False shows nothing.
        doing, done: what the bar and the lines call it.
    """

    def __init__(self, total: int, progress: bool, doing: str, done: str):
        self._total, self._lines, self._done = total, progress and not sys.stderr.isatty(), 0
        self._start = self._said = time.monotonic()
        self._word = done
        bar = progress and sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=doing, disable=not bar)

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def add(self, size: int) -> None:
        """Shows that so many more bytes are done."""
        self.to(self._done + size)

    def to(self, done: int) -> None:
        """Shows that so many bytes are done."""
        self._bar.update(done - self._done)
        self._done, now = done, time.monotonic()
        if self._lines and done and now - self._said >= LOG_SECONDS:
            self._said = now
            left = (now - self._start) / done * (self._total - done)
            sizes = [tqdm.format_sizeof(size, "B") for size in (done, self._total)]
            logger.info("%s %s of %s, %s left", self._word, *sizes, tqdm.format_interval(left))
