"""Things that are built once on a machine and then kept: of many processes one builds, the others wait."""

import contextlib
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from mixtral_jax.config import UserError

logger = logging.getLogger(__name__)

DAMAGE = (FileNotFoundError, NotADirectoryError, EOFError, ValueError)  # what opening an incomplete thing raises


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a path, `path.lock`, waiting for it; where the file system has no locks it does nothing.

    Raises:
        OSError: the parent folder cannot be written.
    """
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that is writing %s", path)
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


@contextlib.contextmanager
def building(path: Path) -> Iterator[None]:
    """Makes the parent folder of a path in data.cache_dir and holds the path's lock.

    Raises:
        UserError: the parent folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path))
        except OSError as error:
            raise UserError(
                f"data.cache_dir: cannot write to {path.parent} ({error.strerror}); set data.cache_dir to a folder of yours"
            ) from error
        yield


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Gives a new folder beside `path`, which becomes `path` when the block ends well and vanishes when it does not.

    So a path that exists is whole. If another process was first (where there are no locks), its folder stays.
    """
    folder = path.with_name(f"{_mark(path)}{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        try:
            os.rename(folder, path)
        except OSError:
            if not path.exists():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Removes what builds of `path` (which may hold a *) on this host left when they were killed; needs its lock."""
    for leftover in path.parent.glob(_mark(path) + "*"):
        shutil.rmtree(leftover, ignore_errors=True)


def build_once(path: Path, open_: Callable, build: Callable[[Path], None]):
    """Returns open_(path); where that raises, or path is missing, build(folder) makes it first.

    The folder is built aside and renamed, so a path that exists is whole. Of several processes on a file system that
    has locks one builds and the others wait; without locks each builds and the first rename wins.

    Raises:
        UserError: the parent folder cannot be written.
    """
    with contextlib.suppress(*DAMAGE):
        return open_(path)
    with building(path):
        if path.exists():
            try:
                return open_(path)  # another process built it meanwhile
            except DAMAGE as error:
                logger.warning("%s is damaged (%s); building it again", path, error)
                shutil.rmtree(path)
        remove_leftovers(path)
        with aside(path) as folder:
            build(folder)
        return open_(path)


def _mark(path: Path) -> str:
    return f"{path.name}.building-{socket.gethostname()}-"
