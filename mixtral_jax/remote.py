"""Paths of object stores, such as gs://bucket/run: told from folders, opened with epath, and given a folder on this machine."""

import hashlib
import os
from pathlib import Path

from etils import epath

from mixtral_jax.config import UserError

MARK = "://"
SCHEMES = ("gs://", "s3://", "az://")  # for each epath needs a library: gcsfs, s3fs, adlfs


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is that of an object store, such as gs://bucket/run, and not of a file system that is mounted."""
    return MARK in os.fspath(path)


def folder(path: str | os.PathLike) -> Path | epath.Path:
    """A path that can be looked into, wherever it is: an epath.Path of an object store, else an absolute Path.

    Raises:
        UserError: a kind of store that nobody here knows.
    """
    if not is_remote(path):
        return Path(path).resolve()
    try:
        return epath.Path(path)
    except KeyError as error:
        raise UserError(f"{path} is of an unknown kind of store; known are {', '.join(SCHEMES)}") from error


def local_side(path: str | os.PathLike, root: str) -> Path:
    """The folder under `root` that stands on this machine for one of an object store; a local path stands for itself."""
    if not is_remote(path):
        return Path(path)
    text = os.fspath(path).rstrip("/")
    return Path(root).expanduser() / f"{text.rpartition('/')[2]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def first_line(error: BaseException) -> str:
    """What a store's library says, in one line; some raise without a word."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
