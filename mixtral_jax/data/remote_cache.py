"""data.cache_dir on an object store: entries are mapped from a folder of this machine, fetched from the store and sent to it.

An entry is a folder with a record that names its files with size and SHA-256 (shards.write_record). The record travels
last, both ways, so that half an entry is never taken for a whole one. Whoever finds an entry whole here and its record not
there sends it: process 0, which opens everything before the others do. Nothing about an entry depends on who made
it, except that JSON files spell the paths of the text.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mixtral_jax import remote
from mixtral_jax.config import RunError, UserError
from mixtral_jax.data.once import build_once as build_here
from mixtral_jax.data.once import building
from mixtral_jax.data.shards import check_record, damage, hash_file, partial, read_record, write_record
from mixtral_jax.data.shown import Shown

logger = logging.getLogger(__name__)

ROOT = "~/.cache/mixtral_jax/remote"
WHOLE = "whole.json"  # the record of an entry that has no index of its own
THREADS = 8  # files on their way at a time
PIECE = 8 * 2**20  # bytes read at a time
TRIES = 2  # a file that arrives damaged is asked for once more


class Place(NamedTuple):
    """Where an entry lies: on this machine, and on the object store that data.cache_dir names, if it names one."""

    local: Path
    url: str | None


def place(cache_dir: str | Path, *names: str) -> Place:
    """Returns the place of `cache_dir/name/...`; of a local cache_dir that is a folder and no more."""
    text = os.fspath(cache_dir)
    if not remote.is_remote(text):
        return Place(Path(text).expanduser().joinpath(*names), None)
    return Place(remote.local_side(text, ROOT).joinpath(*names), "/".join((text.rstrip("/"), *names)))


def build_once(at: Place, open_: Callable, build: Callable[[Path], None]):
    """As once.build_once, of a small folder that is fetched where the store has it, and sent there where it has not.

    Raises:
        UserError: also where the store cannot be read.
        RunError: the store does not take it.
    """
    if at.url is None:
        return build_here(at.local, open_, build)

    def make(folder: Path) -> None:
        if not fetch(Place(folder, at.url), WHOLE, progress=False):
            build(folder)
            write_record(folder / WHOLE, {"files": _described(folder)})

    found = build_here(at.local, open_, make)
    send(at, WHOLE, progress=False)
    return found


def open_there(at: Place, open_: Callable):
    """Opens what build_once keeps, fetched where only the store has it.

    Raises:
        FileNotFoundError, ValueError: there is none, here or there, or it is damaged.
        UserError: the store cannot be read.
    """
    if at.url is not None and not at.local.exists():
        with building(at.local):
            fetch(at, WHOLE, progress=False)
    return open_(at.local)


def fetch(at: Place, index: str, progress: bool = True) -> bool:
    """Brings an entry here, as far as it is not here yet; needs the entry's lock.

    What arrives twice with another hash than the record says is damaged on the store: the record there is then removed,
    so that the entry is made again and sent again.

    Args:
        at: of the entry; without a url nothing happens.
        index: the name of its record.
        progress: show a bar, or lines.

    Returns:
        whether the entry is whole here now.

    Raises:
        UserError: the store cannot be read, or there is no room here.
    """
    if at.url is None:
        return False
    record = _index_there(at, index)
    if record is None:
        return False
    for leftover in at.local.rglob("*.partial"):  # of a process that was killed
        leftover.unlink()
    files = json.loads(record)["record"]["files"]
    missing = {name: entry for name, entry in files.items() if not _is_here(at.local, name, entry)}
    size = sum(entry["bytes"] for entry in missing.values())
    try:
        for folder in {(at.local / name).parent for name in missing} | {at.local}:
            folder.mkdir(parents=True, exist_ok=True)
        if size > shutil.disk_usage(at.local).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if progress and missing:
            logger.info("fetching %s into %s", at.url, at.local)
        jobs = [(_fetch_file, at, name, entry) for name, entry in missing.items()]
        with Shown(size, progress, "fetching", "fetched") as shown:
            damaged = [name for name in _together(jobs, shown) if name]
        if not damaged:
            _write(at.local / index, record)
    except OSError as error:
        raise _no_room(at, size, error) from error
    if damaged:
        _take_out(at, index, damaged)
    return not damaged


def send(at: Place, index: str, progress: bool = True) -> None:
    """Sends an entry that is whole here to the store, unless it is whole there; files of the right size are kept there.

    Args:
        at, index, progress: as for `fetch`.

    Raises:
        UserError: the store cannot be read.
        RunError: it does not take a file, or one here cannot be read.
    """
    if at.url is None or _index_there(at, index) is not None:
        return
    with building(at.local):
        files = read_record(at.local / index)["files"]
        try:
            missing = {name: entry for name, entry in files.items() if not _is_there(at, name, entry)}
            size = sum(entry["bytes"] for entry in missing.values())
            if progress and missing:
                logger.info("sending %s to %s", at.local, at.url)
            jobs = [(_send_file, at, name, entry["bytes"]) for name, entry in missing.items()]
            with Shown(size, progress, "sending", "sent") as shown:
                for _ in _together(jobs, shown):
                    pass
            _send_file(at, index, 0)
        except Exception as error:  # each store's library has errors of its own
            raise RunError(
                f"data.cache_dir: {at.url} cannot be written: {remote.first_line(error)}; all of it is in {at.local}, and what "
                "the store has already is kept: run it again, or set data.cache_dir to a folder of this machine"
            ) from error


def _together(jobs: list[tuple], shown: Shown) -> Iterator:
    """Yields (function, arguments..., bytes) jobs' results, some of them at work at a time; the first error ends them."""
    with ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(*job) for job in jobs]
        try:
            for future in running:
                result, size = future.result()
                shown.add(size)
                yield result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_file(at: Place, name: str, entry: dict) -> tuple[str | None, int]:
    """Brings a file here; returns its name if it is damaged there, and its size."""
    target = at.local / name
    temporary = partial(target)
    for _ in range(TRIES):
        with open(temporary, "wb") as file:
            for piece in _pieces(f"{at.url}/{name}", at):
                file.write(piece)
        if not damage(temporary.parent, {temporary.name: entry}, sums=True):
            os.replace(temporary, target)
            return None, entry["bytes"]
    temporary.unlink()
    return name, entry["bytes"]


def _pieces(url: str, at: Place) -> Iterable[bytes]:
    """What an object holds; of one that is gone, nothing."""
    try:
        with remote.folder(url).open("rb") as file:
            while piece := file.read(PIECE):
                yield piece
    except FileNotFoundError:
        return
    except Exception as error:
        raise _unreadable(at, error) from error


def _send_file(at: Place, name: str, size: int) -> tuple[None, int]:
    target = remote.folder(f"{at.url}/{name}")
    target.parent.mkdir(parents=True, exist_ok=True)  # of stores that have folders
    with open(at.local / name, "rb") as file, target.open("wb") as out:
        shutil.copyfileobj(file, out, PIECE)
    return None, size


def _index_there(at: Place, index: str) -> bytes | None:
    """The record of an entry on the store; None where there is none, or one that is damaged."""
    content = b"".join(_pieces(f"{at.url}/{index}", at))
    if not content:
        return None
    with contextlib.suppress(ValueError):
        check_record(content, f"{at.url}/{index}")
        return content
    logger.warning("%s/%s is damaged; making it again", at.url, index)
    return None


def _is_here(folder: Path, name: str, entry: dict) -> bool:
    """Whether a file need not be fetched. JSON of the same size may spell other paths."""
    return not damage(folder, {name: entry}, sums=name.endswith(".json"))


def _is_there(at: Place, name: str, entry: dict) -> bool:
    """Whether a file need not be sent. JSON is: of the same size it may spell other paths."""
    if name.endswith(".json"):
        return False
    try:
        return remote.folder(f"{at.url}/{name}").stat().length == entry["bytes"]
    except FileNotFoundError:
        return False


def _take_out(at: Place, index: str, damaged: list[str]) -> None:
    names = ", ".join(damaged[:3]) + (f" and {len(damaged) - 3} more" if damaged[3:] else "")
    logger.warning("%s is damaged (%s is not what %s says); making it again", at.url, names, index)
    for name in (index, *damaged):
        try:
            remote.folder(f"{at.url}/{name}").unlink(missing_ok=True)
        except Exception as error:
            logger.warning("%s/%s cannot be removed: %s", at.url, name, remote.first_line(error))


def _described(folder: Path) -> dict[str, dict]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in files}


def _write(path: Path, content: bytes) -> None:
    temporary = partial(path)
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _unreadable(at: Place, error: Exception) -> UserError:
    return UserError(
        f"data.cache_dir: {at.url} cannot be read: {remote.first_line(error)}; what is here is in {at.local}. Make the store "
        "reachable, or set data.cache_dir to a folder of this machine"
    )


def _no_room(at: Place, size: int, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(at.local).free
        return UserError(
            f"data.cache_dir: no room in {at.local} for {at.url}: {size / 1e6:,.0f} MB are to be fetched and {free / 1e6:,.0f} MB "
            f"are left; free some, or make {Path(ROOT).expanduser()} a link to a larger disk"
        )
    return UserError(
        f"data.cache_dir: {at.url} cannot be kept in {at.local} ({error.strerror}); make that folder one that can be written"
    )
