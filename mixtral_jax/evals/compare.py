"""A base model and what it was tuned into, on the same held-out conversations, pairs and questions."""

import contextlib
import dataclasses
import hashlib
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from mixtral_jax import distributed
from mixtral_jax.config import Config, UserError
from mixtral_jax.data import Corpus, TokenFile, open_chat_corpus
from mixtral_jax.evals import compare_report, pages
from mixtral_jax.evals.perplexity import Perplexity
from mixtral_jax.evals.preference import answer_tokens, heldout_reference, likelihood_ranking, reward_ranking
from mixtral_jax.evals.questions import Question, choose_questions, chosen_answers
from mixtral_jax.evals.run import (
    ALL,
    UNFINISHED,
    fitting,
    known,
    measure,
    merged,
    open_subject,
    output_folder,
    own_corpus,
    refuse_early,
    versions,
    write_json,
)
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.generate import sample
from mixtral_jax.load import stored_config, stored_tokenizer
from mixtral_jax.reference import score_pairs
from mixtral_jax.resolve import Checkpoint, resolve_checkpoint

logger = logging.getLogger(__name__)

ANSWERED_TOGETHER = 8  # questions in a batch


class Entrant(NamedTuple):
    """One of the models that are compared."""

    name: str
    checkpoint: Checkpoint
    config: Config  # as stored


class Heldout(NamedTuple):
    """What the models are compared on."""

    config: Config  # of the run whose data it is, as stored
    source: str  # the name of that run
    answers: TokenFile  # conversations
    pairs: Corpus | None
    questions: list[Question]


class Measured(NamedTuple):
    """What one model gives on the held-out data."""

    results: dict
    texts: list[str]  # its answers to the questions
    config: Config  # that its rows were made with
    log_probs: np.ndarray | None  # float32 [pairs, 2]


def compare(
    specs: Sequence[str],
    out: str,
    questions: int = 5,
    step: str | None = None,
    names: Sequence[str] | None = None,
    settings: Settings | None = None,
    mesh_sizes: dict[str, int] | None = None,
) -> dict:
    """Compares checkpoints: prints tables, and writes comparison.json, report.md and report.html into a folder.

    What was tuned, and the base before it, are compared on what the last tuned run held out, and answer its questions.
    Evaluations of EVALS are set side by side.

    Args:
        specs: the checkpoints (see resolve.py), the base first, then what it was tuned into. Held-out data, tokenizer and
            sample prompts are those of the last run of SFT or DPO among them.
        out: the folder.
        questions: how many held-out questions the models are asked besides train.sample_prompts.
        step: None, the newest of each workdir, or "best".
        names: evaluations; a checkpoint of a stage for which one means nothing goes without it. None: where nothing is tuned
            the short ones, else none.
        settings: of the evaluations. Where they do not name a text, perplexity reads the standard library's domains: held-out
            splits of several runs are different texts.
        mesh_sizes: see load.load.

    Returns:
        what is in comparison.json: of each model its results, evaluations, configuration, checkpoint and step; the questions
        with the data's and the models' answers; the data, notes and versions.

    Raises:
        UserError: fewer than two checkpoints, one that is missing, an unknown evaluation; where one is tuned, other
            tokenizers, rows that are too long for a model, or data that changed.
    """
    if len(specs) < 2:
        raise UserError(f"--compare={' '.join(specs)}; give at least two checkpoints, the base first")
    if questions < 0:
        raise UserError(f"--questions={questions}; it must be at least 0")
    settings = settings or Settings()
    settings = settings if settings.text else dataclasses.replace(settings, text=("stdlib",))
    names = known(names)
    entrants = _entrants([resolve_checkpoint(spec, step) for spec in specs])
    if not settings.window:  # the same for all, or one reads with more context than another
        shortest = min(min(each.config.train.seq_len, each.config.model.max_seq_len) for each in entrants)
        settings = dataclasses.replace(settings, window=shortest)
    tuned = [each for each in entrants if each.config.train.stage != "pretrain"]
    asked = {each.name: _asked(each, names, bool(tuned)) for each in entrants}
    _refuse_unfit(entrants, asked, names, settings)
    heldout = None
    if tuned:
        tokenizer = stored_tokenizer(tuned[-1].checkpoint)
        _require_alike(entrants, tuned[-1], tokenizer)
    folder = output_folder(out)
    if tuned:
        heldout = _open(entrants, tuned[-1], tokenizer, questions)
    results, evaluated, texts, scorers, record = {}, {}, [], {}, {}
    for i, entrant in enumerate(entrants, 1):
        logger.info("%d of %d: %s", i, len(entrants), entrant.checkpoint)
        own = _own_folder(folder, i, entrant.name)
        subject, record = open_subject(entrant.checkpoint, settings, own / UNFINISHED, mesh_sizes)

        def keep(found: dict, unfinished: list[str], name=entrant.name) -> None:
            evaluated[name] = found
            left = {name: unfinished} | {each.name: asked[each.name] for each in entrants if each.name not in evaluated}
            write_json(folder / "comparison.json", {"evals": evaluated, "unfinished": left, "results": results})

        evaluated[entrant.name] = measure(subject, asked[entrant.name], keep)
        measured = _measure(entrant, subject, heldout, scorers) if heldout else None
        mesh, meta = subject.mesh, subject.meta
        del subject  # the reference of a DPO run may have to be loaded
        if measured and heldout.pairs is not None and entrant.config.train.stage == "dpo":
            measured.results["preference"] = _rewards(entrant, measured, heldout, mesh, meta)
        results[entrant.name] = measured.results if measured else {}
        texts.append(measured.texts if measured else [])
    report = {
        "results": results,
        "evals": evaluated,
        "stage": {each.name: each.config.train.stage for each in entrants},
        "checkpoint": {each.name: str(each.checkpoint) for each in entrants},
        "step": {each.name: each.checkpoint.step for each in entrants},
        "questions": [
            {"question": asked.text, "held_out": asked.heldout, "answer": asked.answer}
            | {"answers": dict(zip(results, given))}
            for asked, given in zip(heldout.questions if heldout else [], zip(*texts), strict=True)
        ],
        "data": _described(heldout) if heldout else None,
        "notes": _notes(entrants, heldout) if heldout else [],
        "seed": settings.seed,
        "devices": record["devices"],
        "settings": record["settings"],
        "config": {each.name: each.config.to_dict() for each in entrants},
        "versions": versions(),
    }
    if distributed.speaks():
        _write(report, folder)
    return report


def _own_folder(folder: Path, number: int, name: str) -> Path:
    """Where a model's samples and finished pieces go."""
    return folder / f"{number}-{''.join(c if c.isalnum() or c in '-_.' else '_' for c in name)}"


def _asked(entrant: Entrant, names: Sequence[str] | None, tuned: bool) -> list[str]:
    """The evaluations of one checkpoint: of those that were named, what means something for its stage."""
    if names is None:
        return [] if tuned else fitting(entrant.config.train.stage, None, entrant.name)
    everything = fitting(entrant.config.train.stage, [ALL], entrant.name)
    return everything if ALL in names else [name for name in dict.fromkeys(names) if name in everything]


def _refuse_unfit(entrants: Sequence[Entrant], asked: dict[str, list[str]], names, settings: Settings) -> None:
    for name in set(names or ()) - {ALL}:
        if not any(name in each for each in asked.values()):
            stages = ", ".join(f"{each.name} is of {each.config.train.stage}" for each in entrants)
            raise UserError(f"--evals={name} means nothing for any of the checkpoints ({stages}); leave it out")
    for each in entrants:
        refuse_early(asked[each.name], each.config, settings, each.checkpoint)


def _entrants(checkpoints: Sequence[Checkpoint]) -> list[Entrant]:
    """Names the checkpoints, as short as makes them different.

    Raises:
        UserError: one is given twice.
    """
    ways = (
        lambda c: c.folder.name,
        lambda c: f"{c.folder.name}, step {c.step}",
        lambda c: f"{c.folder.parent.name}/{c.folder.name}",
        str,
    )
    for way in ways:
        names = [way(checkpoint) for checkpoint in checkpoints]
        if len(set(names)) == len(names):
            return [Entrant(name, each, stored_config(each)) for name, each in zip(names, checkpoints)]
    twice = next(name for name in names if names.count(name) > 1)
    raise UserError(f"--compare: {twice} is given {names.count(twice)} times; give each checkpoint once")


def _require_alike(entrants: Sequence[Entrant], last: Entrant, tokenizer) -> None:
    """Refuses what cannot be compared on the rows of the last tuned run.

    Raises:
        UserError: another tokenizer, or a model that cannot take rows so long.
    """
    for each in entrants:
        theirs = stored_tokenizer(each.checkpoint)
        if theirs.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"--compare: {each.checkpoint} has the tokenizer {theirs.name} of {theirs.vocab_size} ids and "
                f"{last.checkpoint} has {tokenizer.name} of {tokenizer.vocab_size}; losses per token and log-probabilities of "
                "different tokenizers cannot be compared: leave one of them out"
            )
        limit, needed = each.config.model.max_seq_len, last.config.train.seq_len
        if limit < needed:
            raise UserError(
                f"--compare: the rows of {last.checkpoint} have train.seq_len={needed} positions and {each.checkpoint} has "
                f"model.max_seq_len={limit}; leave one of them out"
            )


def _open(entrants: Sequence[Entrant], last: Entrant, tokenizer, count: int) -> Heldout:
    """Opens what the last tuned run held out; of the standard library both conversations and pairs."""
    config = last.config
    corpus, pairs, data, train = own_corpus(last.checkpoint, config, tokenizer), None, config.data, config.train
    if train.stage == "dpo":
        pairs = corpus
    if all(source.source == "stdlib" for source in data.sources):
        with distributed.process_0_first("corpora"):
            corpus = open_chat_corpus(data, tokenizer, "sft", train.seq_len)
            pairs = pairs or open_chat_corpus(data, tokenizer, "dpo", train.seq_len)
        answers = corpus.heldout
    else:
        answers = corpus.heldout if pairs is None else chosen_answers(corpus.heldout)
    room = min(each.config.model.max_seq_len for each in entrants) - train.sample_tokens
    asked = choose_questions(answers, tokenizer, train.sample_prompts, count, data.heldout_fraction, room)
    return Heldout(config, last.name, answers, pairs, asked)


def _measure(entrant: Entrant, subject: Subject, heldout: Heldout, scorers: dict[Config, Perplexity]) -> Measured:
    """Measures a model; scorers are kept, for models of one shape are compiled once.

    Each result is kept as soon as it is there, and an interrupted comparison takes it from there.
    """
    own, mesh, last = subject.config, subject.mesh, heldout.config
    train = dataclasses.replace(last.train, batch_size=own.train.batch_size, accumulation_steps=1)
    config = dataclasses.replace(merged(last), model=own.model, mesh=own.mesh, train=train)
    if config not in scorers:
        scorers[config] = Perplexity(config, heldout.answers)
    results, log_probs = {}, None
    with jax.set_mesh(mesh), subject.work("compare", heldout=_identity(heldout), own=entrant.config.to_dict()) as work:

        def once(name: str, make: Callable):
            if name not in work:
                work.put(name, make())
            return work.get(name)

        results["answers"] = once("answers", lambda: scorers[config](subject.model))
        if heldout.pairs is not None:
            pairs = heldout.pairs.heldout
            scored = once("pairs", lambda: score_pairs(config, pairs, subject.model, mesh, "held-out pairs").tolist())
            log_probs = np.asarray(scored, np.float32)
            results["pairs"] = likelihood_ranking(log_probs, answer_tokens(pairs))
        texts = once("texts", lambda: _answers(subject.model, subject.tokenizer, heldout))
    return Measured(results, texts, config, log_probs)


def _rewards(entrant: Entrant, measured: Measured, heldout: Heldout, mesh, meta: dict) -> dict[str, float]:
    """How a DPO run ranks the pairs by reward: with its own reference and loss, on the rows that are compared."""
    own, config = entrant.config, measured.config
    train = dataclasses.replace(config.train, stage="dpo", init_from=own.train.init_from, seed=own.train.seed)
    config = dataclasses.replace(config, train=train, dpo=own.dpo)
    with jax.set_mesh(mesh):
        reference = heldout_reference(config, heldout.pairs, meta, mesh, logger.info)
    tokens = answer_tokens(heldout.pairs.heldout)
    return reward_ranking(own.dpo, measured.log_probs, tokens, reference)


def _identity(heldout: Heldout) -> dict:
    """What decides the results besides the model: the held-out rows and the questions."""
    pairs = None if heldout.pairs is None else heldout.pairs.key
    asked = [[asked.text, list(map(int, asked.context))] for asked in heldout.questions]
    train = heldout.config.train
    tokens = hashlib.sha256(np.ascontiguousarray(heldout.answers.tokens).tobytes()).hexdigest()
    return {
        "answers": tokens,
        "pairs": pairs,
        "questions": asked,
        "tokens": train.sample_tokens,
        "seq_len": train.seq_len,
    }


def _answers(model, tokenizer, heldout: Heldout) -> list[str]:
    questions, train = heldout.questions, heldout.config.train
    starts = range(0, len(questions), ANSWERED_TOGETHER)
    shown = {"unit": "batch", "leave": False, "disable": None if distributed.speaks() else True}
    texts = []
    for start in tqdm(starts, "answers", **shown):
        contexts = [asked.context for asked in questions[start : start + ANSWERED_TOGETHER]]
        texts += sample(
            model, tokenizer, contexts, max_tokens=train.sample_tokens, temperature=0.0, seed=0, message=True
        )
    return texts


def _described(heldout: Heldout) -> dict:
    """What is said of the data."""
    data = heldout.config.data
    return {
        "run": heldout.source,
        "sources": [f"{source.source} {source.path}".strip() for source in data.sources],
        "heldout_fraction": data.heldout_fraction,
        "conversations": len(heldout.answers.ids),
        "pairs": 0 if heldout.pairs is None else len(heldout.pairs.heldout.ids) // 2,
    }


def _notes(entrants: Sequence[Entrant], heldout: Heldout) -> list[str]:
    """What a reader of the figures must know: who may have read the held-out answers."""
    mine, notes = heldout.config.data, []
    compared = {source.source for source in mine.sources}
    for each in entrants:
        data, train = each.config.data, each.config.train
        theirs = {source.source for source in data.sources}
        if each.checkpoint.step is None:
            notes.append(f"Whether {each.name}, files of others, was trained on these answers is not known.")
        elif train.stage != "pretrain":
            if data.heldout_fraction < mine.heldout_fraction:
                notes.append(
                    f"{each.name} held out {data.heldout_fraction:g} of its prompts, fewer than the {mine.heldout_fraction:g} "
                    "compared here: it may have been trained on some of these questions."
                )
        elif "stdlib" in theirs & compared:
            notes.append(
                f"{each.name} was pretrained on the standard library's source, which contains the documentation strings that "
                "the answers are made of: it, and what was tuned from it, may have read chosen and rejected answers there, though "
                "never as answers to these questions."
            )
        else:
            notes.append(f"Whether the text that {each.name} was pretrained on contains these answers is not known.")
    if any(not asked.heldout for asked in heldout.questions):
        notes.append("Questions marked * are among train.sample_prompts and not held out.")
    if heldout.pairs is None:
        notes.append(f"The data of {heldout.source} has no pairs, so nothing is ranked.")
    return notes


def _write(report: dict, folder: Path) -> None:
    """Writes the files, prints the tables, and lets go of what was kept for an interruption."""
    write_json(folder / "comparison.json", report)
    found, extra = report["evals"], []
    tables = [pages.terminal(found)] if any(found.values()) else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # an answer may hold any character
        if report["data"] is not None:
            extra = compare_report.blocks(report)
            tables.insert(0, compare_report.table(report))
            picture = compare_report.draw(report)
            try:
                picture.savefig(folder / "comparison.png", dpi=110, metadata={"Software": "mixtral_jax"})
            except OSError as error:
                raise UserError(f"--out={folder} cannot be written: {error}") from error
        record = {
            name: report[name] for name in ("checkpoint", "step", "seed", "devices", "settings", "config", "versions")
        }
        pages.write(folder, " / ".join(report["results"]), found, record, extra)
    for number, name in enumerate(report["checkpoint"], 1):
        own = _own_folder(folder, number, name)
        shutil.rmtree(own / UNFINISHED, ignore_errors=True)
        with contextlib.suppress(OSError):  # there are samples in it
            own.rmdir()
    print("\n\n".join(tables))
    print(f"written to {folder / 'comparison.json'}, report.md and report.html")
