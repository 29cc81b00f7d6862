"""SIGTERM and SIGINT: a run that is asked to stop finishes its step, saves, and says how to go on."""

import os
import signal
import types
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class InterruptedRun(KeyboardInterrupt):
    """A signal ended the run; its status is what a shell reports for it: 128 + the signal's number.

    It may be raised anywhere, so it is no Exception: whoever handles those would take it for a fault of what it was doing.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.status = 128 + number


class Interrupt:
    """Holds the signals back until the loop asks: `with Interrupt(how) as interrupt: ... if interrupt.number: ...`.

    The first signal is noted; a second one ends the run at once, as it would without this class. Before `arm()` and after
    `disarm()`, when there is nothing to save, the first one does so too.
    """

    def __init__(self, how_to_resume: str, tell: Callable[[int], None] = lambda number: None):
        """Args: how_to_resume ends every message; tell is called with the number of the first signal that waits."""
        self.number: int | None = None
        self._how, self._tell = how_to_resume, tell
        self._idle: str | None = "before the first step; nothing was lost"
        self._before: dict[int, object] = {}

    def arm(self) -> None:
        """From now on there is something to save."""
        self._idle = None

    def disarm(self, state: str) -> None:
        """From now on all is saved; `state` says so to the user whom a signal stops.

        Raises:
            InterruptedRun: one has come already.
        """
        self._idle = state
        if self.number is not None:  # it came while the last step was saved
            raise InterruptedRun(f"stopped by {signal.Signals(self.number).name} {state}; {self._how}", self.number)

    def stopped(self, saved: str) -> InterruptedRun:
        """The exception with which the loop ends after it has saved."""
        return InterruptedRun(f"stopped by {signal.Signals(self.number).name}; {saved}; {self._how}", self.number)

    def _received(self, number: int, frame: types.FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._idle is not None:
            raise InterruptedRun(f"stopped by {name} {self._idle}; {self._how}", number)
        if self.number is not None:
            raise InterruptedRun(f"stopped by a second {name} without a save; {self._how}", number)
        self.number = number
        self._tell(number)
        # Not print: the signal may have come in the middle of one, and buffered streams refuse to be entered twice.
        os.write(2, f"\n{name}: saving after this step, then stopping; a second signal stops at once\n".encode())

    def __enter__(self) -> "Interrupt":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
