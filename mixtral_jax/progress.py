"""The live voice of a run: a bar on a terminal, plain lines in a log, and the throughput meter behind them."""

import collections
import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import numpy as np
from absl import logging as absl_logging
from tqdm import tqdm

from mixtral_jax import distributed
from mixtral_jax.metrics import human, short_float
from mixtral_jax.timing import data_wait_share


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """Shows the package's own messages (a tokenizer being trained, a cache being built) on stderr while a command runs.

    The libraries are silent: what they log is either raised as an exception too, which a command explains, or of no use.
    Orbax would report every file, and a failed save as a stack trace and as futures that nobody asked for.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_named)
    ours = logging.getLogger("mixtral_jax")
    before = (ours.level, ours.propagate)
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before[0])
        ours.propagate = before[1]


def _named(record: logging.LogRecord) -> bool:
    """Of several processes the first tells what all do; warnings and errors of the others carry their number."""
    if not distributed.speaks():
        record.msg = f"process {distributed.process_id()}: {record.msg}"
    return distributed.speaks() or record.levelno >= logging.WARNING


def _unraisable(unraisable) -> None:
    """Shows an exception in a callback, but for writes of a failed save that end after Orbax has given up on it."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def printable(text: str) -> str:
    """Escapes control characters, which a young model's samples are full of; a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float) -> str:
    """Formats a time as m:ss or h:mm:ss; "?" where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def status(scalars: Mapping[str, Any]) -> str:
    """Puts a step's metrics in one line; those that are absent or None are left out.

    Args:
        scalars: loss (or token_loss where there is no loss), tokens_per_second, mfu (0..1), balance_loss, learning_rate;
            data_wait_seconds and step_seconds, of which the wait's share is shown when it is more than 5% of the step;
            rewards/accuracies and rewards/margins, of DPO; dropped_L, the share of assignments that no expert computed, shown when there are any.
    """
    loss = scalars.get("loss", scalars.get("token_loss"))
    wait = data_wait_share(scalars)
    dropped = float(np.mean(scalars.get("dropped_L", 0.0)))
    parts = (
        (loss, lambda x: f"loss {x:.3f}"),
        (scalars.get("tokens_per_second"), lambda x: f"{human(x)} tok/s"),
        (scalars.get("mfu"), lambda x: f"MFU {100 * x:.3g}%" if x < 0.1 else f"MFU {100 * x:.0f}%"),
        (scalars.get("rewards/accuracies"), lambda x: f"accuracy {x:.0%}"),
        (scalars.get("rewards/margins"), lambda x: f"margin {x:.3f}"),
        (wait if wait is not None and wait > 0.05 else None, lambda x: f"data wait {x:.0%}"),
        (scalars.get("balance_loss"), lambda x: f"balance {x:.2f}"),
        (dropped or None, lambda x: f"DROPPED {100 * x:.2g}%"),
        (scalars.get("learning_rate"), lambda x: f"lr {short_float(x)}"),
    )
    return " | ".join(text(float(value)) for value, text in parts if value is not None)


def is_screen(stream: TextIO) -> bool:
    """Whether a bar can be drawn: on a terminal that knows its width (one in a container may say 0)."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # a stream without a file descriptor, or closed
        return False


class Progress:
    """A tqdm bar where the stream is a terminal, else a line every log_every steps. Both say the same."""

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        stream: TextIO | None = None,
        silent: bool = False,
        log_every: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts the bar.

        Args:
            total_steps: steps of the whole run.
            first_step: steps done before this process: 0, or the step a run resumed from.
            stream: where to write; standard error by default.
            silent: write nothing: of several processes one speaks.
            log_every: off a terminal, the steps whose line is printed (and the last step's); a terminal shows all.
            clock: seconds; tests replace it.
        """
        self._total = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._silent = silent
        self._log_every = log_every
        self._clock = clock
        self._start: tuple[int, float] | None = None  # (step, time) of the first update: compilation lies before it
        self._bar = None
        if is_screen(self._stream) and not silent:
            layout = "{percentage:3.0f}% {bar:16} {desc}"
            self._bar = tqdm(
                total=total_steps, initial=first_step, file=self._stream, bar_format=layout, dynamic_ncols=True
            )
            self._bar.set_description_str(f"step {first_step}/{total_steps} | compiling")

    def update(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Shows that `step` steps are done; for scalars see status()."""
        now = self._clock()
        if self._start is None:
            self._start = (step, now)
        done = step - self._start[0]
        left = (now - self._start[1]) / done * (self._total - step) if done else math.inf
        text = f"step {step}/{self._total} | {status(scalars)} | ETA {duration(left if step < self._total else 0)}"
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._log_every == 0 or step == self._total:
            self._print(text)

    def note(self, text: str) -> None:
        """Prints lines of their own (an evaluation, a sample), above the bar where there is one."""
        if self._bar is None:
            self._print(text)
            return
        self._bar.clear()
        self._print(text)
        self._bar.refresh()

    def close(self) -> None:
        """Leaves the last state of the bar on the screen; a second call does nothing."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()

    def _print(self, text: str) -> None:
        if not self._silent:
            self._stream.write(text + "\n")
            self._stream.flush()


class Throughput:
    """Tokens per second over the latest steps, without compilation and without evaluations and checkpoints.

    The first tick only starts the clock, so the first step, which compiles, never counts. An interval with a pause()
    inside is left out as a whole and not merely shortened: the device goes on with the step it was given, so that
    neither the interval's time nor the pause's alone is that step's. Only while there is nothing else (an evaluation in
    every interval) is its time less the pause taken.
    """

    def __init__(self, tokens_per_step: int, window: int = 50, clock: Callable[[], float] = time.perf_counter):
        """Args: tokens of one optimizer step, all devices together; latest intervals to average; seconds (for tests)."""
        self._tokens = tokens_per_step
        self._clock = clock
        self._clean = collections.deque(maxlen=window)  # (seconds, steps) of intervals without a pause
        self._paused = collections.deque(maxlen=window)  # and of those with one, less the pause
        self._last: float | None = None
        self._pause: float | None = None

    def tick(self, steps: int = 1) -> float | None:
        """Notes that `steps` more steps are done (their results are here); returns tokens_per_second."""
        now = self._clock()
        if self._last is not None:
            seconds = now - self._last - (self._pause or 0.0)
            (self._clean if self._pause is None else self._paused).append((seconds, steps))
        self._last, self._pause = now, None
        return self.tokens_per_second

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of all devices together; None before two ticks."""
        intervals = self._clean or self._paused
        seconds = sum(seconds for seconds, _ in intervals)
        return self._tokens * sum(steps for _, steps in intervals) / seconds if seconds > 0 else None

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside is not training: `with throughput.pause(): evaluate()`."""
        begin = self._clock()
        try:
            yield
        finally:
            self._pause = (self._pause or 0.0) + self._clock() - begin
