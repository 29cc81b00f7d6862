"""Runs evaluations on a stored checkpoint and writes their results."""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path

import jax

from mixtral_jax.config import UserError
from mixtral_jax.data import load_tokenizer, open_corpus
from mixtral_jax.evals import EVALS
from mixtral_jax.load import load, stored_corpus

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def evaluate(workdir: str, step: int | None, names: list[str], out: str) -> dict[str, dict[str, float]]:
    """Runs the named evaluations, prints a table, and writes OUT/results.json.

    Raises:
        UserError: an unknown evaluation, or no such checkpoint.
    """
    unknown = [name for name in names if name not in EVALS]
    if unknown or not names:
        raise UserError(f"unknown evaluation {', '.join(unknown) or '(none given)'}; there are {', '.join(EVALS)}")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the work: a bad path must not cost an evaluation
    except OSError as error:
        raise UserError(f"--out={out} cannot be made a folder: {error}") from error
    config, model, mesh, step = load(workdir, step)
    key = stored_corpus(workdir, step)
    stored = str(Path(workdir) / "tokenizer")
    tokenizer = load_tokenizer(stored, config.data.cache_dir)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=stored))
    corpus = open_corpus(config.data, tokenizer)
    if key is not None and corpus.key != key:
        raise UserError(
            f"the text that {workdir} was trained on has changed (files, data.heldout_fraction or the Python version): "
            "what is held out now may have been trained on; evaluate where the run was trained"
        )
    with jax.set_mesh(mesh):
        results = {name: EVALS[name](config, corpus, model) for name in names}
    print(f"{workdir}, step {step}")
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
        "checkpoint": f"{workdir}, step {step}",
        "versions": versions,
    }
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"  written to {folder / 'results.json'}")
    return results
