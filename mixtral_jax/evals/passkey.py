"""Is a number found again that was hidden in a long text? After Mohtashami and Jaggi (arXiv 2305.16300).

A prompt says that something important is hidden, goes on with short sentences over and over, names a pass key twice in one
line somewhere among them, and ends with a question whose next words are the number. It is measured in two ways:

    generation   the model writes on, greedily; the first number it writes is the key or is not
    likelihood   the log-probability of the key after the prompt is higher than those of OTHERS random numbers, or is not
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from mixtral_jax.config import Config, UserError
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evals.passkey_prompts import (
    DIGITS,
    FILLER,
    KEYS,
    LINE,
    OTHERS,
    QUESTION,
    ROOM,
    TASK,
    Grid,
    Trial,
    answer_tokens,
    cell_name,
    default_lengths,
    reach,
    refuse_short,
    trials,
)
from mixtral_jax.evals.preference import wilson
from mixtral_jax.evals.scorer import Request, total
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.work import Work, bar
from mixtral_jax.evals.writer import Writer


class Reader(NamedTuple):
    """What answers trials; each yields (number of the trial in the sequence, answer), in any order, each once."""

    write: Callable[[Sequence[Trial]], Iterator[tuple[int, str]]]  # what follows the prompt
    score: Callable[[Sequence[Trial]], Iterator[tuple[int, list[float]]]]  # log-probabilities of the key and the others


def check(config: Config, settings: Settings) -> None:
    """Refuses settings that cannot work.

    Raises:
        UserError: a length of 0, a depth beyond 1, or nothing to do.
    """
    for length in settings.passkey_lengths:
        if length < 1:
            raise UserError(f"--passkey_lengths: {length} tokens; a length must be at least 1")
    for depth in settings.passkey_depths:
        if not 0 <= depth <= 1:
            raise UserError(f"--passkey_depths: {depth:g}; a depth lies between 0 (the key stands first) and 1 (last)")
    if not settings.passkey_depths or settings.passkey_trials < 1:
        raise UserError(
            f"--passkey_depths={','.join(f'{depth:g}' for depth in settings.passkey_depths)} "
            f"--passkey_trials={settings.passkey_trials}; give at least one depth and one trial"
        )


def check_lengths(config: Config, settings: Settings, tokenizer: Tokenizer) -> None:
    """Refuses lengths that cannot hold a prompt, in the tokenizer's tokens.

    Raises:
        UserError: naming the length and the least.
    """
    refuse_short(tokenizer, grid_of(config, tokenizer, settings))


def grid_of(config: Config, tokenizer: Tokenizer, settings: Settings) -> Grid:
    """What a model of a configuration is asked."""
    count, longest = settings.passkey_trials, config.model.max_seq_len
    return Grid(
        tuple(dict.fromkeys(settings.passkey_lengths)) or default_lengths(tokenizer, longest),
        tuple(dict.fromkeys(settings.passkey_depths)),
        min(settings.limit or count, count),
        settings.seed,
        longest,
        reach(config.model),
    )


def first_number(text: str) -> str | None:
    """The first number in a text, its digits as they stand there."""
    found = re.search("[0-9]+", text)
    return found and found[0]


def measure(grid: Grid, tokenizer: Tokenizer, reader: Reader, work: Work) -> Iterator[tuple[str, Any]]:
    """Asks all trials whose key can be seen, by generation and by likelihood.

    Args:
        grid: what is asked.
        tokenizer: lengths are counted in its tokens.
        reader: what answers.
        work: finished trials, taken from there and put there.

    Yields:
        "cells", each cell's figures by "LENGTH/DEPTH"; then those of all trials together.
    """
    hits, cells = [], {}
    count = len(grid.lengths) * len(grid.depths) * grid.trials
    with bar((), "passkey", "trial", total=2 * count) as progress:
        for length in sorted(grid.lengths):
            asked = trials(tokenizer, grid, length)
            seeable = [trial for trial in asked if trial.seeable]
            _ask(seeable, "written", reader.write, work, progress)
            _ask(seeable, "scores", reader.score, work, progress)
            progress.update(2 * (len(asked) - len(seeable)))
            for depth in grid.depths:
                found = [_hit(trial, work) for trial in seeable if trial.depth == depth]
                hits += found
                cells[cell_name(length, depth)] = _figures(found, grid.trials)
    yield from _figures(hits, count).items()
    yield "generation_baseline", 1 / len(KEYS)
    yield "likelihood_baseline", 1 / (1 + OTHERS)
    yield "max_seq_len", grid.limit
    yield "lengths", sorted(grid.lengths)
    yield "depths", list(grid.depths)
    yield "cells", cells


def _ask(seeable: Sequence[Trial], what: str, answer: Callable, work: Work, progress) -> None:
    """Has those trials answered that are not yet."""
    left = [trial for trial in seeable if f"{trial.name}/{what}" not in work]
    progress.update(len(seeable) - len(left))
    for i, found in answer(left) if left else ():
        work.put(f"{left[i].name}/{what}", found)
        progress.update()


class _Hit(NamedTuple):
    """What a trial came to."""

    written: bool
    ranked: bool
    log_prob: float  # of the key


def _hit(trial: Trial, work: Work) -> _Hit:
    key, *others = work.get(f"{trial.name}/scores")
    # Among equals nothing is found: a model that tells no numbers apart has no hits.
    return _Hit(first_number(work.get(f"{trial.name}/written")) == trial.key, key > max(others), key)


def _figures(hits: Sequence[_Hit], asked: int) -> dict[str, Any]:
    """Shares with 95% intervals over the trials whose key can be seen, and how many of those asked it cannot."""
    n = len(hits)
    found = {"trials": n, "unseeable": asked - n}
    if not n:
        return found
    for name, share in (
        ("accuracy", sum(hit.written for hit in hits) / n),
        ("likelihood_accuracy", sum(hit.ranked for hit in hits) / n),
    ):
        low, high = wilson(share, n)
        found |= {name: share, f"{name}_low": low, f"{name}_high": high}
    return found | {"log_prob_per_digit": math.fsum(hit.log_prob for hit in hits) / n / DIGITS}


def reader_of(subject: Subject) -> Reader:
    """The model as it answers trials."""
    tokenizer = subject.tokenizer

    def write(asked: Sequence[Trial]) -> Iterator[tuple[int, str]]:
        writer = Writer(subject, fast=False)  # few tokens: no second copy of the weights
        for i, done in writer([trial.context for trial in asked], [ROOM] * len(asked)):
            yield i, done.text

    def score(asked: Sequence[Trial]) -> Iterator[tuple[int, list[float]]]:
        requests = [
            Request(trial.context, answer_tokens(tokenizer, number))
            for trial in asked
            for number in (trial.key, *trial.others)
        ]
        scores: dict[int, dict[int, float]] = {}
        for i, scored in subject.scorer(subject.model, requests):
            trial, place = divmod(i, 1 + OTHERS)
            scores.setdefault(trial, {})[place] = total(scored)[0]
            if len(scores[trial]) == 1 + OTHERS:
                mine = scores.pop(trial)
                yield trial, [mine[place] for place in range(1 + OTHERS)]

    return Reader(write, score)


def passkey(subject: Subject) -> Iterator[tuple[str, Any]]:
    """Accuracy by generation and by likelihood, over lengths and depths; see the module."""
    tokenizer, grid = subject.tokenizer, grid_of(subject.config, subject.tokenizer, subject.settings)
    texts = [TASK, *FILLER, LINE, QUESTION]
    with subject.work("passkey", texts=texts, counts=[DIGITS, OTHERS, ROOM]) as work:
        found = dict(measure(grid, tokenizer, reader_of(subject), work))
    if found["unseeable"]:
        subject.note(
            f"passkey: of {found['trials'] + found['unseeable']} trials {found['unseeable']} have a key beyond the model's sight "
            f"(max_seq_len={grid.limit}, sliding_window={subject.config.model.sliding_window}) and are not counted"
        )
    yield from found.items()
