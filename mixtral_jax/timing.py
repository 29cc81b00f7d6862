"""Where the wall time of a run goes: a breakdown per log interval, and the goodput of the whole run across restarts.

The loop fetches the metrics of step k after it has dispatched step k+1, so the host waits for the device in that fetch.
"step" is the dispatch and the fetch: the device's step time, as long as the host has nothing else to wait for.
"data_wait" is the time in which no batch was there. Batches are read ahead, so it is near 0 unless reading is slower
than the device; then the device still works on the step it has for a part of that time, and idles for the rest.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

CATEGORIES = ("data_wait", "step", "compile", "checkpoint", "eval", "sample")
OTHER = "other"  # what is not measured


class Breakdown:
    """Seconds spent in each category; every moment counts once, so that the seconds sum to the wall time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        """Starts counting. Args: clock: seconds; tests replace it."""
        self._clock = clock
        self._mark = clock()
        self._open = [OTHER]
        self._seconds = self._zeros()

    @contextlib.contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Counts the time inside as `category`: `with breakdown.measure("eval"): ...`.

        Inside another measurement the outer one stands still meanwhile.

        Raises:
            ValueError: the category is not one of CATEGORIES.
        """
        if category not in CATEGORIES:
            raise ValueError(f"no category {category!r}; there are {', '.join(CATEGORIES)}")
        self._charge()
        self._open.append(category)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Returns the seconds of each of CATEGORIES and of "other" since the last take(), and starts from zero.

        Their sum is the wall time since then. A measurement that is still open goes on in the next interval.
        """
        self._charge()
        taken, self._seconds = self._seconds, self._zeros()
        return taken

    def _charge(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._mark
        self._mark = now

    @staticmethod
    def _zeros() -> dict[str, float]:
        return dict.fromkeys((*CATEGORIES, OTHER), 0.0)


def per_step(seconds: Mapping[str, float], steps: int) -> dict[str, float]:
    """Names what take() returned as a train line does: `data_wait_seconds` and so on, averages over `steps` steps."""
    return {f"{category}_seconds": value / max(steps, 1) for category, value in seconds.items()}


def data_wait_share(scalars: Mapping[str, float | None]) -> float | None:
    """The share of a step that the loop waited for data, 0..1, from a train line; None where it is not known."""
    wait, step = scalars.get("data_wait_seconds"), scalars.get("step_seconds")
    if wait is None or step is None or wait + step <= 0:
        return None
    return wait / (wait + step)


class Goodput:
    """The share of the wall time since a run was first started that went into steps that count.

    Not productive are start-up, compilation, evaluation, waits for checkpoints and data, the time between a crash and
    the restart, and steps that a crash undid. The last needs no bookkeeping: `productive_seconds` is stored in each
    checkpoint, and a resume takes up the value of the checkpoint it starts from.
    """

    def __init__(self, first_start: float, productive_seconds: float = 0.0):
        """Takes up the count.

        Args:
            first_start: when the run was first started, seconds since 1970; see jsonl.first_start.
            productive_seconds: those stored in the checkpoint a run resumes from.
        """
        self._first_start = first_start
        self.productive_seconds = productive_seconds

    def add(self, seconds: float) -> None:
        """Adds the "step" seconds of an interval of the breakdown."""
        self.productive_seconds += seconds

    def value(self, now: float) -> float:
        """The goodput, 0..1, at the time `now` (seconds since 1970); never over 1, also where a clock was set back."""
        elapsed = max(now - self._first_start, self.productive_seconds)
        return self.productive_seconds / elapsed if elapsed > 0 else 0.0
