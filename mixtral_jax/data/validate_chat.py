"""Reading all conversations or pairs once, without a cache: every row that is left out, counts, and what a run takes."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from mixtral_jax.config import Config, SourceConfig, UserError
from mixtral_jax.data.bad_rows import Unreadable
from mixtral_jax.data.chat_build import DROPPED, SPLITS, Job, Tokenised, outcomes
from mixtral_jax.data.chat_corpus import UNITS, nothing_left
from mixtral_jax.data.conversations import Dropped
from mixtral_jax.data.packing import pack, pack_pairs
from mixtral_jax.data.records import Record, records
from mixtral_jax.data.rows import parts
from mixtral_jax.data.sources import source_files
from mixtral_jax.data.text import hash_position
from mixtral_jax.data.validate import KEPT_BAD_ROWS, AllBadRows, Vocabulary, percentiles, run_report, shared_problems


def job_of(config: Config, source: SourceConfig, tokenizer) -> Job:
    """What decides the documents of a source in a run."""
    train = config.train
    return Job(tokenizer, train.stage, train.seq_len, source.text_key, config.data.heldout_fraction)


def why_left_out(found: Tokenised | Dropped | Unreadable, seq_len: int) -> str | None:
    """The rule by which a row is left out of a run, or None; an unreadable one is not asked for."""
    if isinstance(found, Dropped):
        return found.rule
    return "too_long" if found.positions > seq_len else None


def validate_chat(config: Config, tokenizer, bar: bool = False) -> dict:
    """Reads every row of data.sources as train.stage does and returns a report, made of what JSON knows.

    Args:
        config: data, and of train the stage, steps, batch_size and seq_len; of model the vocab_size.
        tokenizer: see tokenizer.py.
        bar: show a progress bar.

    Returns:
        "stage" and "problems", "bad_rows", "duplicates", "vocabulary" and "run" as `validate` returns them;
        "dropped": {"total", "rows": [[where, rule, positions or None]]}; "prompts": how many different ones on each side,
        "both": on both, and "nearly_both": if case and white space did not count; "sources": name -> the counts of its
        rows (these of "conversations" or "pairs", of each rule and of "bad" add up to "rows"), and of its splits.

    Raises:
        UserError: there are no such files, or they are plain text.
    """
    data, seq_len = config.data, config.train.seq_len
    unit = UNITS[config.train.stage]
    bad_rows, dropped, seen = AllBadRows(), _DroppedRows(), _Seen(tokenizer.vocab_size)
    counts, broken = {}, {}
    with tqdm(total=_file_bytes(data.sources), unit="B", unit_scale=True, desc="reading", disable=not bar) as shown:
        for source in data.sources:
            mine = counts[source.name] = _Source()
            broken[source.name] = []
            job = job_of(config, source, tokenizer)
            for record, found in outcomes(_rows(source, config.train.stage, broken[source.name], shown.update), job):
                mine.add(found, job)
                if isinstance(found, Unreadable):
                    bad_rows.add(record.name, record.number, found.reason)
                elif rule := why_left_out(found, seq_len):
                    dropped.add(record, rule, found)
                else:
                    seen.add(found, hash_position(found.example.prompt) < data.heldout_fraction)
            if not mine.counts["kept"] and not broken[source.name]:
                broken[source.name].append(str(nothing_left(source, mine.counts, unit, seq_len)))
    lengths = {name: {side: split.lengths for side, split in mine.splits.items()} for name, mine in counts.items()}
    epochs = [_epoch(lengths[source.name]["train"], config) for source in data.sources]
    report = {
        "stage": config.train.stage,
        "problems": [
            *(problem for of_source in broken.values() for problem in of_source),
            *shared_problems(config, tokenizer, lengths, bad_rows, broken, unit.removesuffix("s")),
        ],
        "bad_rows": bad_rows.report_of(data.max_bad_rows),
        "dropped": dropped.report(),
        "sources": {name: mine.report(unit) for name, mine in counts.items()},
        **seen.report(tokenizer),
        "run": run_report(config, epochs) if all(rows for rows, _ in epochs) else None,
    }
    if report["run"] is not None:
        _add_trained(report["run"], counts)
    return report


class _DroppedRows:
    """Collects the rows that are left out by rule."""

    def __init__(self):
        self._count, self._rows = 0, []

    def add(self, record: Record, rule: str, found: Tokenised | Dropped) -> None:
        self._count += 1
        if self._count <= KEPT_BAD_ROWS:
            self._rows.append([record.id, rule, found.positions if isinstance(found, Tokenised) else None])

    def report(self) -> dict:
        return {"total": self._count, "rows": self._rows}


class _Split:
    """Counts of one split of one source."""

    def __init__(self):
        self.units = self.turns = self.trained = self.bytes_ = 0
        self._lengths, self._answers = array("q"), array("q")

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, [n_documents] int64; a pair has two."""
        return np.array(self._lengths, np.int64)

    def add(self, found: Tokenised) -> None:
        self.units += 1
        self.turns += len(found.example.documents[0])
        for segments, (ids, weights) in zip(found.example.documents, found.documents):
            trained = int(np.count_nonzero(weights))
            self._lengths.append(len(ids))
            self._answers.append(trained)
            self.trained += trained
            self.bytes_ += sum(len(segment.text.encode()) for segment in segments if segment.weight)

    def report(self, unit: str) -> dict:
        lengths = self.lengths
        targets = int(lengths.sum()) - len(lengths)
        counts = {
            unit: self.units,
            "turns": self.turns,
            "tokens": int(lengths.sum()),
            "trained_tokens": self.trained,
            "trained_share": self.trained / targets if targets else None,
            "trained_bytes": self.bytes_,
            "document_tokens": percentiles(lengths),
        }
        if unit == "conversations":
            return counts | {"answer_tokens": percentiles(np.array(self._answers, np.int64))}
        both = np.array(self._answers, np.int64).reshape(-1, 2)
        return counts | {"chosen_tokens": percentiles(both[:, 0]), "rejected_tokens": percentiles(both[:, 1])}


class _Source:
    """Counts of one source."""

    def __init__(self):
        self.counts: Counter = Counter()
        self.splits = {side: _Split() for side in SPLITS}

    def add(self, found: Tokenised | Dropped | Unreadable, job: Job) -> None:
        self.counts["rows"] += 1
        if isinstance(found, Tokenised):
            self.counts["longest"] = max(self.counts["longest"], found.positions)
        rule = "bad" if isinstance(found, Unreadable) else why_left_out(found, job.seq_len)
        if rule is None:
            side = SPLITS[hash_position(found.example.prompt) < job.heldout_fraction]
            self.splits[side].add(found)
        self.counts[rule or "kept"] += 1

    def report(self, unit: str) -> dict:
        counts = {key: self.counts[key] for key in ("rows", *DROPPED, "bad", "longest")}
        return {unit: self.counts["kept"]} | counts | {side: split.report(unit) for side, split in self.splits.items()}


class _Seen:
    """Which ids occur how often, and which conversations and prompts occurred before; hashes of 8 bytes."""

    def __init__(self, vocab_size: int):
        self._vocabulary, self._documents = Vocabulary(vocab_size), array("Q")
        self._prompts = {side: array("Q") for side in SPLITS}
        self._near_prompts = {side: array("Q") for side in SPLITS}

    def add(self, found: Tokenised, heldout: bool) -> None:
        whole = hashlib.sha256()
        for ids, weights in found.documents:
            self._vocabulary.add(ids)
            whole.update(np.array(ids, np.int32).tobytes() + weights.tobytes())
        self._documents.append(int.from_bytes(whole.digest()[:8]))
        # What the model reads, which need not be what the split is made of: that it decides the side is to be found out.
        ids, weights = found.documents[0]
        first = int(np.argmax(weights > 0))
        plain = len(found.example.documents[0]) == 1
        prompt = np.array(ids if plain else ids[:first], np.int32).tobytes()
        self._prompts[SPLITS[heldout]].append(_hash(prompt))
        near = " ".join(found.example.prompt.casefold().split())
        self._near_prompts[SPLITS[heldout]].append(_hash(near.encode()))

    def report(self, tokenizer) -> dict:
        train, heldout = (np.unique(np.array(self._prompts[side], np.uint64)) for side in SPLITS)
        near = (np.array(self._near_prompts[side], np.uint64) for side in SPLITS)
        return {
            "duplicates": len(self._documents) - len(np.unique(np.array(self._documents, np.uint64))),
            "prompts": {
                "train": len(train),
                "heldout": len(heldout),
                "both": len(np.intersect1d(train, heldout)),
                "nearly_both": len(np.intersect1d(*near)),
            },
            "vocabulary": self._vocabulary.report(tokenizer),
        }


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8])


def _rows(source: SourceConfig, stage: str, broken: list[str], tick) -> Iterator[Record]:
    """Yields the rows that can be read of a source, and notes in `broken` which files cannot be."""
    if source.source == "text":
        yield from records(source, [], stage)  # refuses it
    files = source_files(source)
    # The rows of a data set of the hub are numbered through all its files, those of the library are in none.
    for group in [files] if source.source in ("hub", "stdlib") else [[file] for file in files]:
        try:
            yield from records(source, group, stage, tick)
        except UserError as error:  # of this file; the next ones are read all the same
            broken.append(str(error))


def _file_bytes(sources) -> int | None:
    """The bytes of all files that records() tells of; None where a file is not of its format, which reading will say."""
    try:
        return sum(
            part.size
            for source in sources
            if source.source not in ("stdlib", "text")
            for part in parts(source, source_files(source))
        )
    except UserError:
        return None


def _epoch(lengths: np.ndarray, config: Config) -> tuple[int, int]:
    """Returns (rows, positions that are no padding) of one epoch of a source."""
    planned = pack_pairs if config.train.stage == "dpo" else pack
    plan = planned(lengths, config.train.seq_len, one_per_row=not config.data.packing)
    return plan.n_rows, plan.n_tokens


def _add_trained(run: dict, counts: dict[str, _Source]) -> None:
    """Adds the trained tokens of the run."""
    for name, used in run["sources"].items():
        used["trained_tokens"] = round(used["epochs"] * counts[name].splits["train"].trained)
    run["trained_tokens"] = sum(used["trained_tokens"] for used in run["sources"].values())
    run["trained_share"] = run["trained_tokens"] / run["positions"]
