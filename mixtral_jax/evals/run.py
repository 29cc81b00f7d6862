"""Runs evaluations on a stored checkpoint and writes their results."""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path

import jax

from mixtral_jax import distributed
from mixtral_jax.config import Config, UserError
from mixtral_jax.data import Corpus
from mixtral_jax.evals import EVALS
from mixtral_jax.load import load, stored_config, stored_corpus, stored_meta, stored_tokenizer
from mixtral_jax.resolve import Checkpoint, resolve_checkpoint
from mixtral_jax.stages import STAGES

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def evaluate(spec: str, step: int | str | None, names: list[str] | None, out: str) -> dict[str, dict[str, float]]:
    """Runs evaluations on a checkpoint (see resolve.py), prints a table, and writes OUT/results.json.

    Args:
        spec, step: the checkpoint.
        names: of EVALS; None: all that mean something for the run's stage.
        out: a folder.

    Raises:
        UserError: an unknown evaluation, one that means nothing for the run's stage, or no such checkpoint.
    """
    names = None if names is None else list(names)
    unknown = [name for name in names or () if name not in EVALS]
    if unknown or names == []:
        raise UserError(f"unknown evaluation {', '.join(unknown) or '(none given)'}; there are {', '.join(EVALS)}")
    folder = output_folder(out)
    checkpoint = resolve_checkpoint(spec, step)
    names = _fitting(checkpoint, stored_config(checkpoint).train.stage, names)
    tokenizer = stored_tokenizer(checkpoint)
    config, model, mesh = load(checkpoint)
    if checkpoint.step is not None:  # the run's own tokenizer, wherever data.tokenizer has gone since
        data = dataclasses.replace(config.data, tokenizer=str(checkpoint.local / "tokenizer"))
        config = dataclasses.replace(config, data=data)
    corpus, meta = own_corpus(checkpoint, config, tokenizer), stored_meta(checkpoint)
    with jax.set_mesh(mesh):
        results = {name: EVALS[name].run(merged(config), corpus, model, meta) for name in names}
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
    report = {
        "results": results,
        "config": config.to_dict(),
        "checkpoint": str(checkpoint),
        "versions": versions(),
    }
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"  written to {folder / 'results.json'}")
    return results


def _fitting(checkpoint: Checkpoint, stage: str, names: list[str] | None) -> list[str]:
    """The evaluations that were asked for, or all that mean something for the stage."""
    fitting = [name for name, each in EVALS.items() if stage in each.stages]
    for name in names or ():
        if name not in fitting:
            raise UserError(
                f"--evals={name} is for runs of train.stage={' or '.join(EVALS[name].stages)}, and {checkpoint} is of "
                f"{stage}; for it there are {', '.join(fitting)}"
            )
    return fitting if names is None else names


def output_folder(out: str) -> Path:
    """Makes the folder of --out, before the work: a bad path must not cost an evaluation.

    Raises:
        UserError: it cannot be made.
    """
    folder = Path(out)
    try:
        if distributed.speaks():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be made a folder: {error}") from error
    return folder


def own_corpus(checkpoint: Checkpoint, config: Config, tokenizer) -> Corpus:
    """Opens the corpus that a checkpoint's run was trained on.

    Raises:
        UserError: it has changed since.
    """
    with distributed.process_0_first("corpus"):
        corpus = STAGES[config.train.stage].corpus(config, tokenizer)
    distributed.same({"the corpus": corpus.key, "the checkpoint": str(checkpoint)}, "give all the same files")
    key = stored_corpus(checkpoint)
    if key is not None and corpus.key != key:
        raise UserError(
            f"the text that {checkpoint} was trained on has changed (files, data.heldout_fraction or the Python version): "
            "what is held out now may have been trained on; evaluate where the run was trained"
        )
    return corpus


def merged(config: Config) -> Config:
    """The configuration of a model whose adapters are merged, as load.load gives it: one without adapters."""
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=0))


def versions() -> dict[str, str]:
    """The versions that results were made with."""
    return {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}
