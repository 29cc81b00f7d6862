"""Tiny runs of every stage on rows of their own, for tests of tuning and of what comes after it."""

import json
from pathlib import Path

from mixtral_jax import evals, trainer
from tests.helpers import tiny
from tests.processes import write_corpus

SMALL = dict(
    data__heldout_fraction=0.3,
    model__num_layers=1,
    model__vocab_size=320,
    train__seq_len=64,
    train__steps=4,
    train__checkpoint_every=2,
    train__eval_every=0,
    train__sample_every=0,
    train__log_every=1,
    optim__warmup_steps=1,
)
WORDS = ["red", "blue", "green", "grey"]


def write_rows(folder: Path) -> None:
    """Writes text, conversations and pairs; the chosen answers are the conversations'."""
    rows = [(f"Say {WORDS[i % 4]} {i}.", WORDS[i % 4], WORDS[(i + 1) % 4]) for i in range(60)]
    with open(folder / "sft.jsonl", "w") as file:
        for question, right, _ in rows:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": right}]
            file.write(json.dumps({"messages": messages}) + "\n")
    with open(folder / "dpo.jsonl", "w") as file:
        for question, right, wrong in rows:
            file.write(json.dumps({"prompt": question, "chosen": right, "rejected": wrong}) + "\n")
    write_corpus(folder / "corpus", 20)


def prepare(folder: Path) -> None:
    """Writes the rows, and trains the run `base` that the others start from."""
    write_rows(folder)
    fit_in(folder, "base", data__path=str(folder / "corpus"), data__source="text", train__steps=1)


def fit_in(folder: Path, name: str, **changes) -> dict[str, float]:
    """Trains a tiny run in a folder, in this process."""
    settings = SMALL | dict(data__cache_dir=str(folder / "cache"), mesh__data=-1)
    return trainer.fit(tiny(**settings | changes), folder / name, evals.heldout, evals.baselines)


def tune_in(folder: Path, name: str, stage: str, **changes) -> dict[str, float]:
    """Trains a stage on its rows from the run `base`."""
    data = dict(train__stage=stage, data__source="jsonl", data__path=str(folder / f"{stage}.jsonl"))
    return fit_in(folder, name, **data | dict(train__init_from=str(folder / "base")) | changes)
