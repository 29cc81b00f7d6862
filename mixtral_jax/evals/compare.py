"""A base model and what it was tuned into, on the same held-out conversations, pairs and questions."""

import dataclasses
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from tqdm import tqdm

from mixtral_jax import distributed
from mixtral_jax.config import Config, UserError
from mixtral_jax.data import Corpus, TokenFile, open_chat_corpus
from mixtral_jax.evals import compare_report
from mixtral_jax.evals.perplexity import Perplexity
from mixtral_jax.evals.preference import answer_tokens, heldout_reference, likelihood_ranking, reward_ranking
from mixtral_jax.evals.questions import Question, choose_questions, chosen_answers
from mixtral_jax.evals.run import merged, output_folder, own_corpus, versions
from mixtral_jax.generate import sample
from mixtral_jax.load import load, stored_config, stored_meta, stored_tokenizer
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


def compare(specs: Sequence[str], out: str, questions: int = 5, step: str | None = None) -> dict:
    """Compares checkpoints, prints a table, and writes comparison.json, .md and .png into a folder.

    Args:
        specs: the checkpoints (see resolve.py), the base first, then what it was tuned into. Held-out data, tokenizer and
            sample prompts are those of the last run of SFT or DPO among them.
        out: the folder.
        questions: how many held-out questions the models are asked besides train.sample_prompts.
        step: None, the newest of each workdir, or "best".

    Returns:
        what is in comparison.json: of each model its results, configuration, checkpoint and step; the questions with the
        data's and the models' answers; the data, notes and versions.

    Raises:
        UserError: fewer than two checkpoints, one that is missing, none of SFT or DPO, other tokenizers, rows that are
            too long for a model, or data that changed.
    """
    if len(specs) < 2:
        raise UserError(f"--compare={' '.join(specs)}; give at least two checkpoints, the base first")
    if questions < 0:
        raise UserError(f"--questions={questions}; it must be at least 0")
    entrants = _entrants([resolve_checkpoint(spec, step) for spec in specs])
    last = _last_tuned(entrants)
    tokenizer = stored_tokenizer(last.checkpoint)
    _require_alike(entrants, last, tokenizer)
    folder = output_folder(out)
    heldout = _open(entrants, last, tokenizer, questions)
    results, texts, scorers = {}, [], {}
    for i, entrant in enumerate(entrants, 1):
        logger.info("%d of %d: %s", i, len(entrants), entrant.checkpoint)
        found, answers = _measure(entrant, heldout, tokenizer, scorers)
        results[entrant.name] = found
        texts.append(answers)
    report = {
        "results": results,
        "stage": {each.name: each.config.train.stage for each in entrants},
        "checkpoint": {each.name: str(each.checkpoint) for each in entrants},
        "step": {each.name: each.checkpoint.step for each in entrants},
        "config": {each.name: each.config.to_dict() for each in entrants},
        "questions": [
            {"question": asked.text, "held_out": asked.heldout, "answer": asked.answer}
            | {"answers": dict(zip(results, given))}
            for asked, given in zip(heldout.questions, zip(*texts), strict=True)
        ],
        "data": _described(heldout),
        "notes": _notes(entrants, heldout),
        "versions": versions(),
    }
    if distributed.speaks():
        _write(report, folder)
    return report


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


def _last_tuned(entrants: Sequence[Entrant]) -> Entrant:
    tuned = [each for each in entrants if each.config.train.stage != "pretrain"]
    if not tuned:
        given = ", ".join(str(each.checkpoint) for each in entrants)
        raise UserError(
            f"--compare: 0 of {len(entrants)} checkpoints are of SFT or DPO ({given}), so there are no held-out "
            "conversations to compare them on; give one that is, or evaluate each with --checkpoint"
        )
    return tuned[-1]


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


def _measure(
    entrant: Entrant, heldout: Heldout, tokenizer, scorers: dict[Config, Perplexity]
) -> tuple[dict, list[str]]:
    """Returns a model's results, and its answers to the questions; scorers are kept, for models of one shape are compiled once."""
    own, model, mesh = load(entrant.checkpoint)
    last = heldout.config
    train = dataclasses.replace(last.train, batch_size=own.train.batch_size, accumulation_steps=1)
    config = dataclasses.replace(merged(last), model=own.model, mesh=own.mesh, train=train)
    if config not in scorers:
        scorers[config] = Perplexity(config, heldout.answers)
    with jax.set_mesh(mesh):
        results = {"answers": scorers[config](model)}
        if heldout.pairs is not None:
            pairs = heldout.pairs.heldout
            log_probs, tokens = score_pairs(config, pairs, model, mesh, "held-out pairs"), answer_tokens(pairs)
            results["pairs"] = likelihood_ranking(log_probs, tokens)
        texts = _answers(model, tokenizer, heldout)
        if heldout.pairs is not None and own.train.stage == "dpo":
            del model  # the reference may have to be loaded
            # Its reference and its loss, on the rows that are compared.
            started = dataclasses.replace(train, stage="dpo", init_from=own.train.init_from, seed=own.train.seed)
            config = dataclasses.replace(config, train=started, dpo=own.dpo)
            reference = heldout_reference(config, heldout.pairs, stored_meta(entrant.checkpoint), mesh, logger.info)
            results["preference"] = reward_ranking(own.dpo, log_probs, tokens, reference)
    return results, texts


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
    """Writes the three files and prints the table."""
    try:
        (folder / "comparison.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (folder / "comparison.md").write_text(compare_report.markdown(report), "utf-8")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # an answer may hold any character
            compare_report.draw(report).savefig(
                folder / "comparison.png", dpi=110, metadata={"Software": "mixtral_jax"}
            )
    except OSError as error:
        raise UserError(f"--out={folder} cannot be written: {error}") from error
    print(compare_report.table(report))
    print(f"written to {folder / 'comparison.json'}, comparison.md and comparison.png")
