"""Who died first, and when all stop: a thread beside the loop that talks with the other processes' threads.

The first process to end for a reason of its own writes the verdict, whoever sees it ends too. A process whose peers
vanished in the middle of a collective does not know why: it says so and waits. Process 0 then looks who is silent.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback

from mixtral_jax import clusters, distributed, last_words
from mixtral_jax.config import RunError, UserError
from mixtral_jax.interrupt import InterruptedRun

WORDS = ("alive", "suspect", "verdict", "stop", "error", "left", "silent")
ALIVE, SUSPECT, VERDICT, STOP, ERROR, LEFT, SILENT = (f"mixtral_jax/{word}/" for word in WORDS)
SILENT_SECONDS = 8  # without a sign of life, when something is known to be wrong
QUIET_SECONDS = 12  # without a sign of life: all say so, before jax misses a heartbeat and ends them with other words
PUZZLED_SECONDS = 25  # after these, with all alive, the first to complain is named
GRACE_SECONDS = 10  # for a process to end by itself, after the verdict
SAME_SECONDS = 3  # for process 0 to end with the same error
LINGER_SECONDS = 15  # process 0, which the others need to hear the verdict
WAIT_SECONDS = 75  # for a verdict
# What jax says where a collective or a barrier failed because another process is gone.
GONE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|socket closed|heartbeat|coordination|barrier|unavailable|aborted|"
    r"deadline_exceeded|peer",
    re.I,
)


class Watch:
    """The thread of one process."""

    def __init__(self):
        self._client, self._me, self._count = (
            distributed.client(),
            distributed.process_id(),
            distributed.process_count(),
        )
        self._tick = 0.5 + self._count / 250  # thousands of processes must not drown the coordinator
        self._launcher = int(os.environ.get(clusters.LAUNCHER) or 0)  # nobody else would end what it started
        self._over = threading.Event()
        self._boundary = threading.Lock()  # held while the processes agree on the step at which to stop
        self._step, self._stop_at, self._asked = 0, None, False
        self._seen: dict[int, tuple[str | None, float]] = {}  # process 0: the latest sign of life, and when it was new
        self._told: set[str] = set()  # the processes whose silence was told here
        self._answered = time.monotonic()  # when process 0 answered last
        self.dead = 0  # process 0: how many it has given up
        self._since: float | None = None  # process 0: when the first suspicion was heard
        self.number: int | None = None  # of the signal that stops the run, wherever it came
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        if self._me:
            threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def reached(self, step: int) -> bool:
        """Tells that the loop has dispatched a step; True if it is the one after which all stop.

        The processes dispatch the same steps, none more than two ahead of another. When one is asked to stop, each
        holds its loop at the next call until all have said how far they are; the furthest decides.
        """
        with self._boundary:
            self._step = step
            return self._stop_at is not None and step >= self._stop_at

    def ask_to_stop(self, number: int) -> None:
        """Asks all processes to stop at a step they agree on; safe in a signal handler."""
        self.number, self._asked = number, True

    def end(self) -> None:
        """Stops the thread."""
        self._over.set()
        self._thread.join(5)

    def _run(self) -> None:
        beat, failing, verdict_at = 0, None, None
        while not self._over.wait(self._tick):
            if os.getppid() != self._launcher and self._launcher:
                leave("ending, because the launcher is gone", 1)
            try:
                beat += 1
                self._client.key_value_set(f"{ALIVE}{self._me}", str(beat), True)
                self._agree_on_stop()
                if self._me == 0:
                    self._judge()
                said = self.verdict()
                self._tell_silence()
                failing, self._answered = None, time.monotonic()
            except Exception as error:
                failing = failing or time.monotonic()
                if time.monotonic() - failing > SILENT_SECONDS and not self._over.is_set():
                    leave(f"process 0, which coordinates the others, is gone ({_first_line(error)})", 1)
                continue
            if said is None or said["process"] == self._me:
                continue
            verdict_at = verdict_at or time.monotonic()
            if time.monotonic() - verdict_at > GRACE_SECONDS and not self._over.is_set():
                self.obey(said)

    def _tell_silence(self) -> None:
        """Says which processes process 0 no longer hears. Collectives may just hang then, and nobody complains."""
        for key, seconds in self._client.key_value_dir_get(SILENT):
            process = key.rpartition("/")[2]
            if process not in self._told and process != str(self._me):
                self._told.add(process)
                say(clusters.silence(process, int(seconds)))

    def _listen(self) -> None:
        """As _tell_silence, of process 0: the other thread hangs in its question."""
        while not self._over.wait(1):
            if time.monotonic() - self._answered > QUIET_SECONDS:
                say(clusters.silence(0, QUIET_SECONDS))
                return

    def obey(self, said: dict) -> None:
        """Ends this process as the verdict says."""
        leave(f"ending, because {said['text']}", said["status"])

    def verdict(self) -> dict | None:
        """What ended the run, if anything has: process, text, status."""
        found = self._client.key_value_dir_get(VERDICT)
        return json.loads(found[0][1]) if found else None

    def claim(self, process: int, text: str, status: int) -> dict:
        """Writes the verdict unless there is one; returns the one that stands."""
        with contextlib.suppress(Exception):  # somebody was first
            content = {"process": process, "text": text, "status": status}
            self._client.key_value_set(f"{VERDICT}first", json.dumps(content))
        return self.verdict()

    def suspect(self, text: str) -> None:
        """Tells process 0 that others are gone."""
        self._client.key_value_set(f"{SUSPECT}{self._me}", text, True)

    def _judge(self) -> None:
        """On process 0: once somebody has a suspicion, whoever gives no sign of life any more is dead."""
        now = time.monotonic()
        self._seen = self._seen or dict.fromkeys(range(self._count), (None, now))
        for key, beat in self._client.key_value_dir_get(ALIVE):
            process = int(key.rpartition("/")[2])
            if self._seen[process][0] != beat:
                self._seen[process] = (beat, now)
        complaints = self._client.key_value_dir_get(SUSPECT)
        if not complaints:
            for process, (beat, heard) in self._seen.items():
                if beat is not None and now - heard > max(QUIET_SECONDS, 8 * self._tick):
                    self._client.key_value_set(f"{SILENT}{process}", str(round(now - heard)), True)
            return
        if self._since is None:
            # What was not heard before the first complaint says nothing: this thread may have been held up itself.
            self._since, self._seen = now, {process: (beat, now) for process, (beat, _) in self._seen.items()}
        limit = max(SILENT_SECONDS, 4 * self._tick)
        silent = sorted((heard, i) for i, (_, heard) in self._seen.items() if now - heard > limit)
        if silent:
            self.dead = len(silent)
            others = f", and after it {', '.join(str(i) for _, i in silent[1:9])}" if silent[1:] else ""
            text = f"process {silent[0][1]} died without a word{others} (killed, out of memory, or its host is lost)"
            self.claim(silent[0][1], text, 1)
        elif now - self._since > PUZZLED_SECONDS:
            process = int(complaints[0][0].rpartition("/")[2])
            self.claim(process, f"process {process} lost its connection to the others: {complaints[0][1]}", 1)

    def _agree_on_stop(self) -> None:
        if self._stop_at is not None:
            return
        if self._asked:
            with contextlib.suppress(Exception):  # another was asked first
                self._client.key_value_set(f"{STOP}asked", str(self.number))
            self._asked = False
        asked = [value for key, value in self._client.key_value_dir_get(STOP) if key.endswith("asked")]
        if not asked:
            return
        with self._boundary:
            self.number = self.number or int(asked[0])
            self._client.key_value_set(f"{STOP}{self._me}", str(self._step), True)
            end = time.monotonic() + WAIT_SECONDS
            while time.monotonic() < end and self.verdict() is None:
                self._client.key_value_set(f"{ALIVE}{self._me}", f"stop {time.monotonic()}", True)
                steps = [int(v) for key, v in self._client.key_value_dir_get(STOP) if not key.endswith("asked")]
                if len(steps) == self._count:
                    self._stop_at = max(steps) + 1
                    return
                time.sleep(0.1)


_watch: Watch | None = None
_leaving = threading.Lock()


def begin() -> None:
    """Starts the watch, where several processes have met."""
    global _watch
    _watch = Watch()


def reached(step: int) -> bool:
    """See Watch.reached; False in a process that is alone."""
    return _watch is not None and _watch.reached(step)


def ask_to_stop(number: int) -> None:
    """See Watch.ask_to_stop; nothing in a process that is alone."""
    if _watch is not None:
        _watch.ask_to_stop(number)


def stopping() -> int | None:
    """The signal for which all processes stop, wherever it came; None in a process that is alone, or if there is none."""
    return None if _watch is None else _watch.number


def name() -> str:
    """What begins the lines of a process that is not process 0."""
    return "" if distributed.speaks() else f"process {distributed.process_id()}: "


def say(text: str) -> None:
    """Prints a line on stderr, under this process's name."""
    os.write(2, f"{name()}{text}\n".encode())


def finished() -> None:
    """Leaves the others at the end of a run that went well; waits for them, within bounds."""
    global _watch
    if _watch is None:
        return
    import jax

    try:
        distributed.barrier("end")  # however long process 0 still writes; a death in the meantime is noticed
        watch, _watch = _watch, None
        watch.end()
        jax.distributed.shutdown()
    except Exception as error:  # what was to be done is done
        say(f"the others did not leave together: {_first_line(error)}")


def failed(error: BaseException, status: int) -> None:
    """Ends this process, and through the verdict all others, after an error; returns where this process is alone.

    Args:
        error: what ended the run here. One that only says that others are gone waits for the verdict.
        status: the exit status.
    """
    if _watch is None:
        return
    explained = isinstance(error, UserError | RunError | InterruptedRun)
    if _others_gone(error):
        say(f"the connection to other processes failed ({_first_line(error)}); waiting to hear which of them died")
        _wait_for_verdict(error)
    text = str(error) if explained else "".join(traceback.format_exception(error))
    shown = text if isinstance(error, InterruptedRun) else f"error: {text}" if explained else text
    me = distributed.process_id()
    what = "was stopped" if isinstance(error, InterruptedRun) else "failed"
    try:
        _watch.claim(me, f"process {me} {what}: {_first_line(error)}", status)
    except Exception as gone:
        shown += f"\n(process 0 could not be told: {_first_line(gone)})"
    leave("" if _said_by_process_0(text) else shown, status)


def _said_by_process_0(text: str) -> bool:
    """Whether process 0 ends with the same error, as all do after a mistake of the user's; one voice is enough."""
    with contextlib.suppress(Exception):
        if distributed.speaks():
            _watch._client.key_value_set(f"{ERROR}0", text, True)
            return False
        end = time.monotonic() + SAME_SECONDS
        while time.monotonic() < end:
            found = _watch._client.key_value_dir_get(ERROR)
            if found:
                return found[0][1] == text
            time.sleep(0.1)
    return False


def _others_gone(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is what jax raises where another process is gone."""
    while error is not None:
        explained = isinstance(error, UserError | RunError)
        if isinstance(error, RuntimeError | ValueError) and not explained and GONE.search(str(error)):
            return True
        error = error.__cause__
    return False


def _wait_for_verdict(error: BaseException) -> None:
    end = time.monotonic() + WAIT_SECONDS
    with contextlib.suppress(Exception):  # the thread sees that too, and ends this process
        _watch.suspect(_first_line(error))
        while time.monotonic() < end:
            said = _watch.verdict()
            if said is not None:
                _watch.obey(said)
            time.sleep(0.2)
    time.sleep(max(end - time.monotonic(), 0))


def leave(text: str, status: int) -> None:
    """Prints why and ends the process at once; process 0, without whom nobody hears anything, waits for the others."""
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # another thread of this process is at it
    last_words.farewell()
    if text:
        say(text)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(Exception):
        client, count = distributed.client(), distributed.process_count()
        client.key_value_set(f"{LEFT}{distributed.process_id()}", "", True)
        end = time.monotonic() + (LINGER_SECONDS if distributed.speaks() else 0)
        while time.monotonic() < end and len(client.key_value_dir_get(LEFT)) < count - _watch.dead:
            time.sleep(0.1)
    os._exit(status)


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
