"""The folder of a run: who holds it, and the configuration that is kept in it."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from mixtral_jax import distributed, mirror, remote
from mixtral_jax.config import UserError

LOCK = "lock"


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Makes the folder and holds it: two runs in one folder would overwrite each other's checkpoints.

    The lock is the operating system's (flock), so it ends with the process, however that ends. On a network file system
    without locks it holds within one host only.

    Raises:
        UserError: the folder cannot be made or written, or another process holds it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / LOCK, "a+")  # noqa: SIM115, closed below
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be used: {error.strerror} ({error.filename}); choose a folder that can be written"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"--workdir={workdir} is in use by {file.read().strip() or 'another process'}; "
                "wait for it, stop it, or choose another workdir"
            ) from None
        except OSError as error:
            print(
                f"{workdir}/{LOCK}: no locks here ({error.strerror}); a second run would not be noticed",
                file=sys.stderr,
            )
        now = datetime.datetime.now().astimezone()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S %Z}\n")
        file.flush()
        yield


@contextlib.contextmanager
def held_by_all(workdir: str | Path) -> Iterator[Path]:
    """As `held`, for all processes together: process 0 holds the folder, and the others check that they see it.

    Of an object store, which has no locks, process 0 holds the local side, so that another host's run is not noticed.

    Yields:
        the folder, or its local side.

    Raises:
        UserError: also where a process does not see what process 0 wrote.
    """
    local = mirror.local_side(workdir)
    with held(local) if distributed.speaks() else contextlib.nullcontext():
        if mirror.is_remote(workdir):
            if distributed.speaks():
                mirror.pull(workdir, local)
            distributed.barrier("pulled")
        elif distributed.together():
            workdir = local
            told = distributed.exchange("held", (workdir / LOCK).read_text() if distributed.speaks() else "")[0]
            distributed.visible(workdir / LOCK, told, f"--workdir={workdir}")
        yield local


def store_run(workdir: Path, config: dict) -> None:
    """Writes config.json, what a run is resumed and evaluated with."""
    if mirror.is_remote(workdir):  # objects appear whole
        (remote.folder(workdir) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return
    new = workdir / "config.json.new"
    new.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(new, workdir / "config.json")  # a crash leaves the old or the new one, never half of it


def load_run(workdir: Path) -> dict:
    """Reads the config.json of a run.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    path = Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; --checkpoint takes the workdir of a run") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
