"""What evaluations can be told. eval.py makes a flag of every field; evaluations during training take the defaults."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from mixtral_jax.config import UserError


def _told(default, words: str):
    return field(default=default, metadata={"help": words})


@dataclasses.dataclass(frozen=True)
class Settings:
    """One field a flag. Lists are written with commas. The text in `help` is the flag's."""

    text: tuple[str, ...] = _told(
        (),
        "Labelled text for perplexity, context and routing: NAME=SOURCE:PATH, for example arxiv=jsonl:arxiv.jsonl,code=text:src; "
        "stdlib is the domains of the running Python's library. Default: perplexity reads the run's own held-out split, the "
        "others stdlib.",
    )
    limit: int = _told(
        0, "At most so many documents a domain, questions a task, trials a cell, ...; 0: what each takes by itself."
    )
    batch_tokens: int = _told(0, "Tokens in a batch, over all devices; 0: as many as a training batch of the run.")
    window: int = _told(
        0,
        "Tokens that perplexity of --text and routing read at once; 0: a row of the run, in a comparison the shortest of all.",
    )
    seed: int = _told(0, "Of everything that is drawn: filler and keys, sampled answers, shuffled examples.")

    context_lengths: tuple[int, ...] = _told(
        (), "context: lengths in tokens. Default: doubling from 1/64 of the model's max_seq_len up to it, or to 32768."
    )
    context_documents: int = _told(64, "context: documents whose last tokens are scored.")

    passkey_lengths: tuple[int, ...] = _told(
        (), "passkey: lengths in tokens. Default: doubling up to the model's max_seq_len, or to 32768."
    )
    passkey_depths: tuple[float, ...] = _told((0.0, 0.25, 0.5, 0.75, 1.0), "passkey: where the key stands, 0 first.")
    passkey_trials: int = _told(10, "passkey: trials of each length and depth.")

    routing_tokens: int = _told(50_000, "routing: tokens of each domain, at most.")
    routing_layers: tuple[int, ...] = _told((), "routing: layers in the tables. Default: the first, middle and last.")

    tasks: tuple[str, ...] = _told(
        ("local",),
        "lm_eval: tasks of lm-evaluation-harness (TASK, or TASK@SHOTS with examples before each question) or presets: local "
        "(embedded, no network), quick, paper, paper_multilingual, bias.",
    )
    num_fewshot: int = _told(-1, "lm_eval: examples before each question; -1: the preset's or the task's own.")
    task_path: tuple[str, ...] = _told((), "lm_eval: folders with task files of your own.")
    chat_template: bool = _told(False, "lm_eval: put requests into the instruct format.")
    run_generated_code: bool = _told(
        False,
        "lm_eval: allow humaneval and mbpp to run the programs that the model writes, on this machine, unprotected.",
    )
    prompts: str = _told("", "lm_eval: for bold, the prompts: a folder with BOLD's JSON files.")

    mt_bench_questions: str = _told("", "mt_bench: FastChat's question.jsonl. Default: a few questions of our own.")
    mt_bench_tokens: int = _told(1024, "mt_bench: tokens of an answer, at most.")


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Settings from flags, whose lists hold strings.

    Raises:
        UserError: an item of a list is no number where one is meant, or a number is negative that cannot be.
    """
    kinds, read = typing.get_type_hints(Settings), {}
    for name, value in given.items():
        read[name] = value
        if isinstance(value, list | tuple):
            (kind, _) = typing.get_args(kinds[name])
            try:
                read[name] = tuple(kind(item) for item in value)
            except ValueError as error:
                raise UserError(f"--{name}={','.join(map(str, value))}: {error}; write {_EXAMPLES[kind]}") from error
    for name, value in read.items():
        lowest = -1 if name == "num_fewshot" else 0
        items = value if isinstance(value, tuple) else (value,)
        for item in items:
            if isinstance(item, int | float) and not isinstance(item, bool) and item < lowest:
                raise UserError(f"--{name}={item}; it must be at least {lowest}")
    return Settings(**read)


_EXAMPLES = {int: "whole numbers with commas, as 1024,4096", float: "numbers with commas, as 0,0.5,1"}
