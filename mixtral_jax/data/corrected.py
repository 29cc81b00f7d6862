"""A corrected copy of conversations or pairs: JSON lines with every row that a run can train on, mended where a rule can."""

import contextlib
import fnmatch
import json
import os
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mixtral_jax.config import Config, SourceConfig, UserError
from mixtral_jax.data.bad_rows import Unreadable
from mixtral_jax.data.chat_build import Tokenised, outcomes
from mixtral_jax.data.conversations import Dropped
from mixtral_jax.data.mend import BOM, mend
from mixtral_jax.data.records import KEYS, TICK_BYTES, Record
from mixtral_jax.data.rows import json_record, parts, read_records
from mixtral_jax.data.sources import SUFFIXES, source_files
from mixtral_jax.data.validate import KEPT_BAD_ROWS
from mixtral_jax.data.validate_chat import job_of, why_left_out

# Columns of a table that rules know, besides those that the stages read.
MORE_KEYS = ("conversations", "conversation", "system")


def write_corrected(config: Config, tokenizer, out: Path, bar: bool = False) -> dict:
    """Writes what a run can train on of data.source into a new file of JSON lines, mended by the rules of mend.py.

    The file appears when it is whole. A row keeps its other keys, of a table only those that matter. Rows that cannot be
    mended and those that a run would leave out by rule are not in it, so that reading it finds nothing to leave out.

    Args:
        config: as for validate_chat.
        tokenizer: decides what is too long.
        out: the file to write, none of the sources'.
        bar: show a progress bar.

    Returns:
        "file"; "rows" that were read, of which "kept" are in the file and "left_out" are not; "rules": rule -> rows that
        it mended; "rows_mended": [[where, [rules]]], "rows_left_out": [[where, why]].

    Raises:
        UserError: the source has no files of rows, or several sources; `out` is one of the source's files or would be;
            it cannot be written; no row is left.
    """
    data = config.data
    (source,) = data.sources if len(data.sources) == 1 else (None,)
    if source is None or source.source in ("stdlib", "text"):
        what = f"{len(data.sources)} sources" if source is None else f"data.source={source.source}"
        raise UserError(f"--write_corrected with {what}; it takes one source of jsonl, parquet, arrow or hub")
    files = source_files(source)
    _require_other(out, source, files)
    said = {"mended": [], "left_out": []}
    counts, rules = Counter(), Counter()
    try:
        with _aside(out) as file, tqdm(unit=" rows", desc="correcting", disable=not bar) as shown:
            mended: deque[list[str]] = deque()  # of the rows that are read and not yet looked at
            rows = _mended(source, files, config, mended)
            for record, found in outcomes(rows, job_of(config, source, tokenizer)):
                applied = mended.popleft()
                counts["rows"] += 1
                shown.update()
                why = _why(found, config.train.seq_len)
                line = None if why else _line(record.content)
                if line is None:
                    _note(said["left_out"], record, why or "nested too deeply to be written")
                else:
                    file.write(line)
                    counts["kept"] += 1
                    rules.update(applied)
                    if applied:
                        _note(said["mended"], record, applied)
            if not counts["kept"]:
                raise UserError(
                    f"none of the {counts['rows']} rows is left for {out}, so it is not written; see --validate"
                )
    except OSError as error:
        raise UserError(
            f"--write_corrected={out}: cannot be written ({error.strerror}); choose another file"
        ) from error
    return {
        "file": str(out),
        "rows": counts["rows"],
        "kept": counts["kept"],
        "left_out": counts["rows"] - counts["kept"],
        "rules": dict(rules),
        "rows_mended": said["mended"],
        "rows_left_out": said["left_out"],
    }


def _why(found: Tokenised | Dropped | Unreadable, seq_len: int) -> str | None:
    """Why a row is left out, for people; None if it is not."""
    if isinstance(found, Unreadable):
        return found.reason
    rule = why_left_out(found, seq_len)
    return f"{rule}: {found.positions} positions, train.seq_len={seq_len}" if rule == "too_long" else rule


def _mended(source: SourceConfig, files: list, config: Config, mended: deque[list[str]]) -> Iterator[Record]:
    """Yields the rows as they are after the rules, and appends to `mended` the rules that changed each."""
    for record, rules in _raw(source, files, config.train.stage):
        if isinstance(record.content, Unreadable):
            mended.append([])
            yield record
        else:
            content, applied = mend(record.content, config.train.stage)
            mended.append([*rules, *applied])
            yield record._replace(content=content)


def _raw(source: SourceConfig, files: list, stage: str) -> Iterator[tuple[Record, list[str]]]:
    """Yields the rows as they stand in the files, and the rule that was needed to read them."""
    keys = (*KEYS[stage], *MORE_KEYS, source.text_key)
    if source.source == "jsonl":
        for name, path in files:
            yield from _raw_lines(name, path, keys[0])
        return
    for part in parts(source, files, TICK_BYTES):
        for number, content in read_records(part, keys):
            if isinstance(content, dict):
                content = {key: value for key, value in content.items() if key in keys and value is not None}
            yield Record(part.name, part.first + number, content), []


def _raw_lines(name: str, path: Path, example: str) -> Iterator[tuple[Record, list[str]]]:
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                plain = line.removeprefix(BOM)
                if plain.strip():
                    yield Record(name, number, json_record(plain, example)), ["bom"] if plain != line else []
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); make it readable or leave it out") from error


def _line(content: dict) -> bytes | None:
    try:
        try:
            return json.dumps(content, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # half a surrogate pair in a key that nobody reads
            return json.dumps(content).encode() + b"\n"
    except RecursionError:
        return None


def _note(rows: list, record: Record, what) -> None:
    if len(rows) < KEPT_BAD_ROWS:
        rows.append([record.id, what])


def _require_other(out: Path, source: SourceConfig, files: list[tuple[str, Path]]) -> None:
    """Refuses a file that is one of the source's, or that would be found as one at the next reading."""
    if any(out.exists() and path.exists() and out.samefile(path) for _, path in files):
        raise UserError(f"--write_corrected={out} is a file of data.path; choose another, the source is never written")
    hub = source.source == "hub"
    items = [source.path.partition(":")[0]] if hub else source.path.split(",")
    for item in filter(None, (os.path.expanduser(part.strip()) for part in items)):
        inside = os.path.isdir(item) and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(item))
        counts = hub or out.suffix in SUFFIXES[source.source]
        if (inside and counts) or fnmatch.fnmatchcase(os.path.abspath(out), os.path.abspath(item)):
            raise UserError(f"--write_corrected={out} would be read as part of data.path={item}; choose another folder")


@contextlib.contextmanager
def _aside(out: Path) -> Iterator:
    """Opens a file beside `out` that becomes it when the block ends well, and vanishes when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
