"""Corpora of conversations (SFT) and of pairs (DPO): tokenised once, with the loss weight of every token.

A conversation is a document; a pair is two, chosen and rejected, one after the other. They are never cut. Each source
has a folder in data.cache_dir, made by chat_build.py, named by a hash of all that decides its content.
"""

import errno
import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mixtral_jax.config import DataConfig, SourceConfig, UserError
from mixtral_jax.data.bad_rows import BadRows
from mixtral_jax.data.cache import Corpus, Source, require_both
from mixtral_jax.data.chat_build import DROPPED, SPLITS, Job, build, open_built
from mixtral_jax.data.fingerprint import fingerprint
from mixtral_jax.data.records import Stage, records, refuse_text
from mixtral_jax.data.remote_cache import build_once, place
from mixtral_jax.data.shown import Shown
from mixtral_jax.data.sources import source_files
from mixtral_jax.data.tokens import TokenFile

logger = logging.getLogger(__name__)

FORMAT = 1  # part of the key: raise it when the same rows give other documents
UNITS = {"sft": "conversations", "dpo": "pairs"}


class _Opened(NamedTuple):
    key: str
    train: TokenFile
    heldout: TokenFile
    entry: dict


def open_chat_corpus(data: DataConfig, tokenizer, stage: Stage, seq_len: int, progress: bool = True) -> Corpus:
    """Opens the conversations or pairs of a run; what is not in data.cache_dir is tokenised first.

    The split is decided by the prompt, all that is said before the first trained answer, so that no prompt is on both
    sides; nor is it if one is a pair's and one a conversation's.

    Args:
        data: the corpus; data.tokenizer is not read, the tokenizer is passed in.
        tokenizer: see tokenizer.py.
        stage: sft: every document is a conversation; dpo: document 2 i is the chosen, 2 i + 1 the rejected one of pair i.
        seq_len: positions of a row. What does not fit in one row is left out: a conversation, or a pair, both together.
        progress: show how far tokenising is.

    Returns:
        The corpus, its token files with weights. Its `report` says under "sources" of each name the number of "rows",
        of the "conversations" or "pairs" kept ("train" and "heldout" of them), of rows left out by rule ("too_long",
        "empty", "no_trained_token", "identical") and because they cannot be read ("bad"): these add up to the rows.
        Besides "duplicates", which are kept, the "longest" row in positions, left out or not, the "tokens" and
        "trained_tokens" kept, and "examples", the first ids left out by each rule.

    Raises:
        UserError: bad or missing files, too many bad rows, plain text files, a source of which nothing is left, a cache_dir
            that cannot be written or has no room, no held-out prompts or a source without training prompts.
    """
    unit, skipped = UNITS[stage], BadRows(data.max_bad_rows)
    opened = [_open(data, source, tokenizer, stage, seq_len, skipped, progress) for source in data.sources]
    for source, each in zip(data.sources, opened):
        name = f"{source.name}: " if data.mixture else ""
        logger.info("%s%s", name, summary(each.entry["report"], unit, seq_len))
        if not each.entry["report"][unit]:
            raise nothing_left(source, each.entry["report"], unit, seq_len)
    require_both(data, [_prompts(each.entry) for each in opened], unit)
    key = hashlib.sha256(repr([each.key for each in opened]).encode()).hexdigest()[:32]
    report = {"sources": {source.name: each.entry["report"] for source, each in zip(data.sources, opened)}}
    pairs = zip(data.sources, opened)
    return Corpus(
        tuple(Source(source.name, source.weight, each.train, each.heldout) for source, each in pairs), key, report
    )


def summary(report: dict, unit: str, seq_len: int) -> str:
    """One source's part of the report in a line."""
    said = f"{report[unit]:,} {unit} (train {report['train']:,}, held out {report['heldout']:,})"
    words = {
        "too_long": f"too long (longest {report['longest']:,}, train.seq_len={seq_len:,})",
        "empty": "empty",
        "no_trained_token": "without a trained token",
        "identical": "with identical answers",
    }
    dropped = [f"{report[rule]:,} {words[rule]}" for rule in DROPPED if report[rule]]
    said += f"; dropped {', '.join(dropped)}" if dropped else ""
    said += f"; {report['bad']:,} bad row{'s' * (report['bad'] != 1)} skipped" if report["bad"] else ""
    return said + (f"; {report['duplicates']:,} occur more than once" if report["duplicates"] else "")


def _prompts(entry: dict) -> dict:
    """What require_both asks for: a pair is one of its documents, since the split is by prompts."""
    counts = {split: {"documents": entry["report"][split]} for split in SPLITS}
    return {"positions": entry["positions"], "shards": [counts]}


def _open(
    data: DataConfig, source: SourceConfig, tokenizer, stage: Stage, seq_len: int, skipped: BadRows, progress: bool
) -> _Opened:
    """Opens a source's cache, built first if need be, and adds its bad rows to those of the sources before it."""
    refuse_text(source, stage)
    files = source_files(source)
    here = place(data.cache_dir).local
    content = _content(source, files, here)
    key = _hash((FORMAT, stage, content, tokenizer.fingerprint, seq_len, data.heldout_fraction))
    # The files' names are in the ids of documents, but a corpus that was moved is the same one.
    names = [name for name, _ in files]
    at = place(data.cache_dir, "chat", _hash((key, names)))
    job = Job(tokenizer, stage, seq_len, source.text_key, data.heldout_fraction)
    built = False

    def make(into: Path) -> None:
        nonlocal built
        built = True
        _build(into, source, files, job, skipped, progress)
        if _content(source, files, here) != content:
            raise UserError(f"{source.name}: files changed while they were tokenised; run it again")

    opened = _Opened(key, *build_once(at, open_built, make))
    bad = opened.entry["bad"]
    if not built and skipped.count + len(bad) > skipped.limit:
        for name, number, reason in bad:
            skipped.add(name, number, reason)
    skipped.count += 0 if built else len(bad)
    return opened


def _build(folder: Path, source: SourceConfig, files: list, job: Job, skipped: BadRows, progress: bool) -> None:
    start = time.perf_counter()
    if progress:
        logger.info("tokenising data.source=%s with %s (once)", source.source, job.tokenizer.name)
    # The standard library's files are read by docstrings.py, which does not say how far it is.
    size = 0 if source.source == "stdlib" else sum(path.stat().st_size for _, path in files)
    try:
        with Shown(size, progress and size > 0, "tokenising", "tokenised") as shown:
            done = build(folder, records(source, files, job.stage, shown.add), job, skipped)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"data.cache_dir: no room in {folder.parent}; free some, or set data.cache_dir to a larger disk"
        ) from error
    skipped.report()
    if progress:
        logger.info("tokenised %s tokens in %.1f s", f"{done:,}", time.perf_counter() - start)


def _content(source: SourceConfig, files: list, cache_dir: Path) -> str:
    """The hash of all that decides the rows."""
    found = fingerprint(source, files, cache_dir)
    if source.source != "stdlib":
        return found
    program = Path(__file__).with_name("docstrings.py").read_bytes()  # decides what becomes of the files
    return _hash((found, hashlib.sha256(program).hexdigest()))


def nothing_left(source: SourceConfig, report: dict, unit: str, seq_len: int) -> UserError:
    """The error of a source of which no conversation or pair is left, with its part of the report."""
    where = f"data.source={source.source}, data.path={source.path!r}"
    if not report["rows"]:
        return UserError(f"{where}: there are no rows in it; set data.path to files that have some")
    counts = {rule: report[rule] for rule in (*DROPPED, "bad") if report[rule]}
    said = ", ".join(f"{count} {rule.replace('_', ' ')}" for rule, count in counts.items())
    fix = "give rows with answers to train on"
    if report["too_long"]:
        fix = f"the longest has {report['longest']} positions and train.seq_len={seq_len}; raise train.seq_len (and model.max_seq_len)"
    return UserError(f"{where}: none of its {report['rows']} rows is left for {unit} ({said}); {fix}")


def _hash(parts: Sequence) -> str:
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()[:32]
