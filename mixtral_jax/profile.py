"""A profile of a few steps: what the devices and the host did, as a trace for a viewer."""

import os
from pathlib import Path

import jax

from mixtral_jax import distributed
from mixtral_jax.config import UserError


def parse_profile(text: str) -> tuple[int, int] | None:
    """Reads the steps to profile, "FIRST:STOP": steps count from 1, FIRST is the first, STOP the one after the last.

    "10:15" is the five steps 10 to 14. The first steps of a process compile and read ahead, so start later.

    Returns:
        first, stop; None for an empty text, which is no profile.

    Raises:
        UserError: the text is not two numbers with 1 <= FIRST < STOP.
    """
    if not text:
        return None
    first, colon, stop = text.partition(":")
    if not (colon and first.strip().isascii() and first.strip().isdigit() and stop.strip().isdigit()):
        raise UserError(
            f"--profile={text}; it must be FIRST:STOP, two step numbers, for example 10:15 (steps 10 to 14)"
        )
    steps = int(first), int(stop)
    if steps[0] < 1:
        raise UserError(f"--profile={text} starts at step {steps[0]}; steps count from 1")
    if steps[0] >= steps[1]:
        raise UserError(
            f"--profile={text} has no steps: it ends before step {steps[1]} and starts at {steps[0]}; "
            f"for one step write {steps[0]}:{steps[0] + 1}"
        )
    return steps


class Profiler:
    """Traces the steps first .. stop - 1 into workdir/profile; call step() before each step and close() at the end."""

    def __init__(self, workdir: str | os.PathLike, first: int, stop: int):
        """Prepares; nothing is written before the first of the steps. For first and stop see parse_profile()."""
        self.folder = Path(workdir) / "profile"
        # Processes of one host would write the same files; the steps of the first are like those of all.
        self._first, self._stop = (first, stop) if distributed.speaks() else (0, 0)
        self._running = self._done = False

    def step(self, k: int, latest=None) -> str | None:
        """Starts or ends the trace as step k, counted from 1, is about to be dispatched.

        A run that resumes inside the range traces what is left of it.

        Args:
            k: the next step.
            latest: arrays that the step before it returned; they are waited for where a trace starts or ends, so that
                it holds its own steps whole and no other.

        Returns:
            When the trace has just ended, lines that say where it lies and how to open it.
        """
        if self._running and k >= self._stop:
            jax.block_until_ready(latest)
            return self._end()
        if not self._running and not self._done and self._first <= k < self._stop:
            jax.block_until_ready(latest)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(self.folder)
            except Exception as error:  # a run goes on without a profile, whatever the reason
                self._done = True
                return f"no profile: {error}"
            self._running = True
        return None

    def close(self) -> str | None:
        """Ends a trace that still runs (a shorter run, or a failed one) and returns as step(); once is enough."""
        return self._end() if self._running else None

    def _end(self) -> str:
        self._running, self._done = False, True
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            return f"no profile: {error}"
        traces = sorted(self.folder.glob("plugins/profile/*/*.trace.json.gz"))
        where = traces[-1] if traces else self.folder
        return (
            f"profile     {where}\n"
            "            open that file at https://ui.perfetto.dev; or pip install xprof, then\n"
            f"            xprof --logdir={self.folder} (or tensorboard --logdir={self.folder})"
        )
