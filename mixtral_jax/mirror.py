"""Workdirs on object stores: a local side for what is appended and drawn, copied up when there is something to show.

An object cannot be appended to, locked or renamed. So metrics, the picture, the configuration and the tokenizer live in a
local folder and are copied to the workdir after each evaluation and checkpoint and at the end; checkpoints are
written there directly, by Orbax. What a crash keeps from being copied is the metrics since the last checkpoint, from
which the run goes on, so that it writes them again.
"""

import contextlib
import os
from pathlib import Path

from etils import epath

from mixtral_jax import remote
from mixtral_jax.config import RunError, UserError
from mixtral_jax.remote import is_remote

__all__ = ["fetch_description", "is_remote", "local_copy", "local_side", "pull", "push"]

ROOT = "~/.cache/mixtral_jax/workdirs"
READ_ROOT = "~/.cache/mixtral_jax/checkpoints"  # of what is only read: a run may be going on in the other
DESCRIPTION = ("config.json", "tokenizer/*")
FILES = ("config.json", "metrics.jsonl", "wandb.json", "report.png", "tokenizer/*", "tensorboard/*")


def local_side(workdir: str | os.PathLike) -> Path:
    """The local folder of a workdir: its own if it is local."""
    return remote.local_side(workdir, ROOT)


def pull(workdir: str | os.PathLike, local: Path) -> None:
    """Makes the local side what the workdir holds; what else lies there is of a run that was never copied up.

    Raises:
        UserError: the object store cannot be reached.
    """
    for path in _files(local):
        path.unlink()
    try:
        remote = epath.Path(workdir)
        for path in _files(remote):
            target = local / path.relative_to(remote)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    except Exception as error:  # each store's library has errors of its own
        raise UserError(f"--workdir={workdir} cannot be read: {error}") from error


def push(local: Path, workdir: str | os.PathLike, copied: dict[str, tuple[int, int]]) -> None:
    """Copies up what has changed.

    Args:
        local, workdir: from where to where.
        copied: size and time of change (ns) of each file as it was copied last; brought up to date.

    Raises:
        RunError: the object store does not take it.
    """
    for path in _files(local):
        name, stat = str(path.relative_to(local)), path.stat()
        if copied.get(name) == (stat.st_size, stat.st_mtime_ns):
            continue
        try:
            target = epath.Path(workdir) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        except Exception as error:
            raise RunError(f"{workdir}/{name} cannot be written: {error}") from error
        copied[name] = (stat.st_size, stat.st_mtime_ns)


def local_copy(workdir: str | os.PathLike) -> Path:
    """Where `fetch_description` puts the files of a workdir; a local workdir itself."""
    return remote.local_side(workdir, READ_ROOT)


def fetch_description(workdir: str | os.PathLike) -> None:
    """Fetches the configuration and the tokenizer of a workdir on an object store, for whoever reads its weights.

    Several processes of a host may do so at a time: each file is replaced as a whole.

    Raises:
        UserError: the object store cannot be reached, or the files cannot be kept here.
    """
    local, there = local_copy(workdir), set()
    try:
        source = remote.folder(workdir)
        for path in _files(source, DESCRIPTION):
            target = local / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            new = target.with_name(f"{target.name}.{os.getpid()}.new")
            new.write_bytes(path.read_bytes())
            os.replace(new, target)
            there.add(target)
        for path in set(_files(local, DESCRIPTION)) - there:
            if not path.name.endswith(".new"):
                path.unlink(missing_ok=True)
        if not any(path.parent.name == "tokenizer" for path in there):
            with contextlib.suppress(OSError):
                (local / "tokenizer").rmdir()
    except Exception as error:  # each store's library has errors of its own
        raise UserError(f"{workdir} cannot be read into {local}: {remote.first_line(error)}") from error


def _files(root: Path | epath.Path, patterns: tuple[str, ...] = FILES) -> list:
    found = []
    for pattern in patterns:
        head, _, tail = pattern.rpartition("/")
        place = root / head if head else root
        names = sorted(place.iterdir()) if tail == "*" and place.is_dir() else [place / tail] if tail != "*" else []
        found += [path for path in names if path.is_file()]
    return found
