"""Runs evaluations on a stored checkpoint and writes their results."""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path

import jax

from mixtral_jax import distributed
from mixtral_jax.config import UserError
from mixtral_jax.data import open_corpus
from mixtral_jax.evals import EVALS
from mixtral_jax.load import load, stored_corpus, stored_tokenizer
from mixtral_jax.resolve import resolve_checkpoint

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def evaluate(spec: str, step: int | str | None, names: list[str], out: str) -> dict[str, dict[str, float]]:
    """Runs the named evaluations on a checkpoint (see resolve.py), prints a table, and writes OUT/results.json.

    Raises:
        UserError: an unknown evaluation, or no such checkpoint.
    """
    unknown = [name for name in names if name not in EVALS]
    if unknown or not names:
        raise UserError(f"unknown evaluation {', '.join(unknown) or '(none given)'}; there are {', '.join(EVALS)}")
    folder = Path(out)
    try:
        if distributed.speaks():
            folder.mkdir(parents=True, exist_ok=True)  # before the work: a bad path must not cost an evaluation
    except OSError as error:
        raise UserError(f"--out={out} cannot be made a folder: {error}") from error
    checkpoint = resolve_checkpoint(spec, step)
    tokenizer, key = stored_tokenizer(checkpoint), stored_corpus(checkpoint)
    config, model, mesh = load(checkpoint)
    if checkpoint.step is not None:  # the run's own tokenizer, wherever data.tokenizer has gone since
        stored = dataclasses.replace(config.data, tokenizer=str(checkpoint.local / "tokenizer"))
        config = dataclasses.replace(config, data=stored)
    with distributed.process_0_first("corpus"):
        corpus = open_corpus(config.data, tokenizer)
    distributed.same({"the corpus": corpus.key, "the checkpoint": str(checkpoint)}, "give all the same files")
    if key is not None and corpus.key != key:
        raise UserError(
            f"the text that {checkpoint} was trained on has changed (files, data.heldout_fraction or the Python version): "
            "what is held out now may have been trained on; evaluate where the run was trained"
        )
    with jax.set_mesh(mesh):
        results = {name: EVALS[name](config, corpus, model) for name in names}
    if not distributed.speaks():
        return results
    print(checkpoint)
    for name, values in results.items():
        for metric, value in values.items():
            print(
                f"  {name:<12} {metric:<24} {value:,.4f}"
                if isinstance(value, float)
                else f"  {name:<12} {metric:<24} {value:,}"
            )
    versions = {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}
    report = {
        "results": results,
        "config": config.to_dict(),
        "checkpoint": str(checkpoint),
        "versions": versions,
    }
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"  written to {folder / 'results.json'}")
    return results
