"""The hash of a corpus's content, and a memo of files' hashes, so that a corpus is not read whole at every start."""

import contextlib
import hashlib
import json
import logging
import os
import time
from pathlib import Path

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data.once import locked
from mixtral_jax.data.sources import relative_names, source_files

logger = logging.getLogger(__name__)

MEMO = "checksums.json"
SETTLED = 2.0  # seconds: two changes within a tick of the file system's clock look like one
TOLD = 2**31  # bytes whose reading is worth a message


def fingerprint(
    source: SourceConfig, files: list[tuple[str, Path]] | None = None, cache_dir: str | Path | None = None
) -> str:
    """Returns the SHA-256 over all that decides the documents: source, key, and every file's bytes and relative name.

    Args:
        source: the source.
        files: its files, if source_files was asked already.
        cache_dir: a folder that remembers the hashes of files; None reads every file.

    Raises:
        UserError: a file that cannot be read.
    """
    # Of a data set on the hub the Arrow files count too, as `datasets` wrote them here. Its own fingerprint would do
    # worse: it names a commit (which may change a README only) or, of a local folder, the times of its files.
    files = source_files(source) if files is None else files
    total = hashlib.sha256(f"{source.source}\0{source.text_key}\0".encode())
    for name, digest in zip(relative_names(files), _digests(files, cache_dir)):
        total.update(name.encode(errors="surrogateescape") + b"\0" + digest)
    return total.hexdigest()


def _digests(files: list[tuple[str, Path]], cache_dir: str | Path | None) -> list[bytes]:
    """The SHA-256 of each file; those in the memo, whose size, time and inode are unchanged, are not read."""
    memo_path = None if cache_dir is None else Path(cache_dir).expanduser() / MEMO
    memo = {} if memo_path is None else _read_memo(memo_path)
    found, new, told = [], {}, False
    for name, path in files:
        try:
            key, before = str(path.absolute()), _identity(path)
            if key in memo and memo[key][:3] == before:
                found.append(bytes.fromhex(memo[key][3]))
                continue
            if before[0] > TOLD and not told:
                logger.info("reading %s to see whether it has changed", name)
                told = True
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            settled = time.time() - before[1] / 1e9 >= SETTLED
            if settled and _identity(path) == before:
                new[key] = [*before, digest.hexdigest()]
            found.append(digest.digest())
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror}); make it readable or leave it out") from error
    if new and memo_path is not None:
        _write_memo(memo_path, new)
    return found


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read_memo(path: Path) -> dict[str, list]:
    """Returns path -> [size, mtime_ns, inode, sha256]; of a memo that is not one, nothing."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        memo = json.loads(path.read_bytes())
        if isinstance(memo, dict):
            return {key: entry for key, entry in memo.items() if _is_entry(entry)}
    return {}


def _is_entry(entry) -> bool:
    if not (isinstance(entry, list) and list(map(type, entry)) == [int, int, int, str] and len(entry[3]) == 64):
        return False
    return all(letter in "0123456789abcdef" for letter in entry[3])


def _write_memo(path: Path, new: dict[str, list]) -> None:
    # What cannot be remembered is read again, so a folder that cannot be written is no error here.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):  # else of two processes one would lose what the other has added
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(_read_memo(path) | new))
            os.replace(temporary, path)
