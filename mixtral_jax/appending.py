"""Files that a run appends to: whole records or nothing, also when the disk is full or the folder is gone."""

import collections
import contextlib
import errno
import logging
import os
from pathlib import Path

from mixtral_jax.config import RunError

_log = logging.getLogger(__name__)

BACKLOG = 1000  # records that are kept in memory while a file cannot be written


class AppendFile:
    """A file that grows by whole records, each of them in the file when append() returns.

    A record that cannot be written leaves nothing behind, so that the next one does not stick to half of it. With
    `keep_going` a failure is logged once and the latest BACKLOG records wait until the file takes them again.
    """

    def __init__(self, path: str | os.PathLike, keep_going: bool = False):
        """Opens the file, creating it and its folder where needed.

        Raises:
            RunError: it cannot be opened.
        """
        self.path = Path(path)
        self._keep_going = keep_going
        self._waiting = collections.deque(maxlen=BACKLOG)
        self._failing, self._lost = False, 0
        self._fd: int | None = None
        self._end = 0  # where the last whole record ends
        self._stat: os.stat_result | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise self._explained(error) from error

    def append(self, record: bytes) -> None:
        """Writes a record at the end of the file, after those that still wait.

        Raises:
            RunError: the file cannot be written (unless keep_going); the record waits for the next call.
        """
        self._lost += len(self._waiting) == BACKLOG
        self._waiting.append(record)
        try:
            self._write_waiting()
        except RunError as error:
            if not self._keep_going:
                raise
            if not self._failing:
                _log.warning("%s. The run goes on; the latest %d lines wait in memory", error, BACKLOG)
            self._failing = True

    def close(self) -> None:
        """Tries once more to write what waits, and closes the file; a second call does nothing.

        Raises:
            RunError: something still waits and cannot be written (unless keep_going).
        """
        try:
            self._write_waiting()
        except RunError as error:
            if not self._keep_going:
                raise
            _log.warning("%s; %d lines are lost", error, self._lost + len(self._waiting))
        finally:
            self._waiting.clear()
            self._drop()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        try:
            if self._fd is None:
                self._open()
            self._check_still_there()
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._drop()  # the next record opens the file again
            raise self._explained(error) from error
        if self._failing:
            _log.warning("%s is written again; %d lines were lost", self.path, self._lost)
            self._failing, self._lost = False, 0

    def _write(self, record: bytes) -> None:
        done = 0
        try:
            while done < len(record):
                done += os.write(self._fd, record[done:])
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise
        self._end += len(record)

    def _open(self) -> None:
        """Opens the file; its folder must be there. What a failed write of ours may have left at its end is cut off."""
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        stat = os.fstat(self._fd)
        if self._stat is None or not os.path.samestat(stat, self._stat):
            self._end = stat.st_size
        elif stat.st_size > self._end:
            os.ftruncate(self._fd, self._end)
        self._stat = stat

    def _check_still_there(self) -> None:
        """Writing to a file that was deleted succeeds, and what is written is gone: the path must still lead to it."""
        if not os.path.samestat(os.stat(self.path), self._stat):
            raise OSError(errno.ESTALE, "it was replaced by another file while the run was writing it")

    def _drop(self) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None

    def _explained(self, error: OSError) -> RunError:
        fix = {errno.ENOSPC: "free some space on its disk", errno.EDQUOT: "raise the quota or free some space"}
        fix |= {
            errno.ENOENT: "its folder was removed or its disk is not mounted",
            errno.EACCES: "check its permissions",
        }
        hint = f"; {fix[error.errno]}" if error.errno in fix else ""
        return RunError(f"{self.path} cannot be written: {error.strerror or error}{hint}")
