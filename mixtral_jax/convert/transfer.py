"""How far a conversion is: a bar in bytes on a terminal, a line now and then in a log."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

from mixtral_jax.distributed import speaks
from mixtral_jax.progress import duration, is_screen

SECONDS = 10.0  # between the lines of a log


class Transfer:
    """Counts bytes towards a total. Use it as a context manager; `advance` is given the bytes that are done."""

    def __init__(self, title: str, total: int, stream: TextIO | None = None):
        self._title, self._total, self._done = title, total, 0
        self._stream = sys.stderr if stream is None else stream
        self._start = self._last = time.perf_counter()
        self._bar = None
        if is_screen(self._stream) and speaks():
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=title, file=self._stream, dynamic_ncols=True)

    def __enter__(self) -> "Transfer":
        return self

    def __exit__(self, kind, *rest) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line(time.perf_counter())

    def advance(self, nbytes: int) -> None:
        """Notes that so many more bytes are done."""
        self._done += nbytes
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(nbytes)
        elif now - self._last >= SECONDS:
            self._line(now)

    def _line(self, now: float) -> None:
        self._last = now
        if not speaks():  # of several processes that load, one tells
            return
        seconds = now - self._start
        left = (self._total - self._done) * seconds / self._done if self._done else float("inf")
        rate = self._done / max(seconds, 1e-9) / 1e6
        self._stream.write(
            f"{self._title} {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB | {rate:.0f} MB/s | ETA {duration(left)}\n"
        )
        self._stream.flush()
