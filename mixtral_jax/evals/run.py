"""Runs evaluations on a stored checkpoint and writes their results."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from mixtral_jax import distributed
from mixtral_jax.config import Config, UserError
from mixtral_jax.data import Corpus
from mixtral_jax.evals import EVALS, pages
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.load import load, stored_config, stored_corpus, stored_meta, stored_tokenizer
from mixtral_jax.resolve import Checkpoint, resolve_checkpoint
from mixtral_jax.stages import STAGES

logger = logging.getLogger(__name__)

ALL = "all"
UNFINISHED = "unfinished"  # the folder of finished pieces of evaluations that are not
FOREIGN_TOKENS = 8192  # in a batch, for each device, of files of others
OF_OWN_TEXT = ("baselines", "preference")  # mean nothing where a checkpoint's text is not known
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def evaluate(
    spec: str,
    step: int | str | None,
    names: list[str] | None,
    out: str,
    settings: Settings | None = None,
    mesh_sizes: dict[str, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs evaluations on a checkpoint (see resolve.py), prints a table, and writes the reports.

    Args:
        spec, step: the checkpoint.
        names: of EVALS; None: all that mean something for the run's stage and are neither long nor want data; "all".
        out: a folder. OUT/results.json is written after each evaluation, and the pages at the end.
        settings: what the evaluations are told.
        mesh_sizes: see load.load.

    Returns:
        evaluation -> metric -> value.

    Raises:
        UserError: an unknown evaluation, one that means nothing for the run's stage, or no such checkpoint.
    """
    settings = settings or Settings()
    names = known(names)
    folder = output_folder(out)
    checkpoint = resolve_checkpoint(spec, step)
    stored = stored_config(checkpoint)
    if names is None and stored_corpus(checkpoint) is None:
        names = [name for name in fitting(stored.train.stage, None, "") if name not in OF_OWN_TEXT]
    names = fitting(stored.train.stage, names, str(checkpoint))
    refuse_early(names, stored, settings, checkpoint)
    subject, record = open_subject(checkpoint, settings, folder / UNFINISHED, mesh_sizes)
    short, kept = checkpoint.folder.name, {}

    def keep(results: dict, unfinished: list[str]) -> None:
        more = {"unfinished": unfinished} if unfinished else {}
        kept.update(results=results, record=more | record)
        write_json(folder / "results.json", {"results": results} | more | record)

    try:
        results = measure(subject, names, keep)
    except UserError:
        if distributed.speaks() and any(kept.get("results", {}).values()):
            with contextlib.suppress(UserError):  # a full disk: the first mistake is the one to tell
                pages.write(folder, f"{checkpoint} (unfinished)", {short: _drawable(kept["results"])}, kept["record"])
        raise
    if distributed.speaks():
        print(checkpoint)
        print(pages.terminal({short: results}))
        pages.write(folder, str(checkpoint), {short: results}, record)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        print(f"  written to {folder / 'results.json'}, report.md and report.html")
    return results


def open_subject(
    checkpoint: Checkpoint, settings: Settings, unfinished: Path | None, mesh_sizes: dict[str, int] | None = None
) -> tuple[Subject, dict]:
    """Loads a checkpoint.

    Returns:
        what evaluations are given; what a report says of how its figures were made.

    Raises:
        UserError: no such checkpoint, a damaged one, of another shape than it says, or another model's tokenizer.
    """
    tokenizer, wanted = stored_tokenizer(checkpoint), stored_config(checkpoint).model.vocab_size
    if tokenizer.vocab_size > wanted:
        raise UserError(
            f"{checkpoint}: its tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and the model's vocab_size is {wanted}; put "
            "the tokenizer there that the model was trained with"
        )
    config, model, mesh = load(checkpoint, mesh_sizes)
    if checkpoint.step is not None:  # the run's own tokenizer, wherever data.tokenizer has gone since
        data = dataclasses.replace(config.data, tokenizer=str(checkpoint.local / "tokenizer"))
        config = dataclasses.replace(config, data=data)
    if stored_corpus(checkpoint) is None:  # of others: the batch is the default of training, a large cluster's
        rows = min(max(FOREIGN_TOKENS // config.train.seq_len, 1) * mesh.size, config.train.batch_size)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))
    subject = Subject(
        name=str(checkpoint),
        config=merged(config),
        model=model,
        mesh=mesh,
        tokenizer=tokenizer,
        settings=settings,
        open_corpus=lambda: own_corpus(checkpoint, config, tokenizer),
        note=logger.info,
        meta=stored_meta(checkpoint),
        folder=unfinished,
        own_text=stored_corpus(checkpoint) is not None,
    )
    record = {
        "checkpoint": str(checkpoint),
        "step": checkpoint.step,
        "seed": settings.seed,
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "settings": dataclasses.asdict(settings),
        "config": config.to_dict(),
        "versions": versions(),
    }
    return subject, record


def measure(
    subject: Subject, names: Sequence[str], keep: Callable[[dict, list[str]], None]
) -> dict[str, dict[str, Any]]:
    """Runs evaluations; keep(results, names that are left) is called after each, on all processes.

    One that ends with a mistake of the user's is among those left, and what it gave before is among the results.

    Returns:
        evaluation -> metric -> value.
    """
    results: dict[str, dict[str, Any]] = {}
    with jax.set_mesh(subject.mesh):
        for number, name in enumerate(names, 1):
            subject.note(f"{number} of {len(names)}: {name}")
            found = results[name] = {}
            try:
                for metric, value in EVALS[name].run(subject):
                    found[metric] = value
            except UserError:
                with contextlib.suppress(UserError):  # a full disk: the first mistake is the one to tell
                    keep(results, list(names[number - 1 :]))
                raise
            keep(results, list(names[number:]))
    return results


def _drawable(results: dict[str, dict]) -> dict[str, dict]:
    """What a report can be made of: an evaluation that ended early gave what its report needs, or perhaps not."""
    found = {}
    for name, each in results.items():
        with contextlib.suppress(LookupError, TypeError, ValueError):
            EVALS[name].report({"": each})
            found[name] = each
    return found


def refuse_early(names: Sequence[str], config: Config, settings: Settings, checkpoint: Checkpoint) -> None:
    """Lets evaluations refuse settings that cannot work, before weights are read.

    Args:
        names, settings: what is to be measured, and how.
        config, checkpoint: of what; its tokenizer is loaded if an evaluation asks for it.

    Raises:
        UserError: one does.
    """
    if settings.window > config.model.max_seq_len:
        raise UserError(
            f"--window={settings.window} exceeds the model's max_seq_len={config.model.max_seq_len}; lower it"
        )
    for name in names:
        if EVALS[name].check is not None:
            EVALS[name].check(config, settings)
    asking = [EVALS[name].check_tokens for name in names if EVALS[name].check_tokens is not None]
    tokenizer = stored_tokenizer(checkpoint) if asking else None
    for check in asking:
        check(config, settings, tokenizer)


def known(names: list[str] | None) -> list[str] | None:
    """Checks the names of evaluations.

    Raises:
        UserError: one is unknown, or none is given.
    """
    names = None if names is None else list(names)
    unknown = [name for name in names or () if name not in (*EVALS, ALL)]
    if unknown or names == []:
        raise UserError(
            f"unknown evaluation {', '.join(unknown) or '(none given)'}; there are {', '.join(EVALS)} (or {ALL})"
        )
    return names


def write_json(path: Path, report: dict) -> None:
    """Writes a report on process 0, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    if not distributed.speaks():
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(_finite(report), indent=2, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written: {error}; finished pieces are kept in {path.parent / UNFINISHED}: make room or correct "
            "--out, and run the same command again to go on"
        ) from error


def _finite(value):
    """A value with null for what JSON does not know: NaN and infinity."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fitting(stage: str, names: Sequence[str] | None, whose: str) -> list[str]:
    """The evaluations that were asked for; without names the short ones that mean something for a stage of training.

    Raises:
        UserError: one means nothing for that stage.
    """
    there = [name for name, each in EVALS.items() if stage in each.stages]
    if names is None:
        return [name for name in there if EVALS[name].default]
    if ALL in names:
        return there
    for name in names:
        if name not in there:
            raise UserError(
                f"--evals={name} is for runs of train.stage={' or '.join(EVALS[name].stages)}, and {whose} is of "
                f"{stage}; for it there are {', '.join(there)}"
            )
    return list(dict.fromkeys(names))


def output_folder(out: str) -> Path:
    """Makes the folder of --out, before the work: a bad path must not cost an evaluation.

    Raises:
        UserError: it cannot be made, or nothing can be written into it.
    """
    folder = Path(out)
    if not distributed.speaks():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be made a folder: {error}") from error
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be written into: {error.strerror or error}; give another folder"
        ) from error
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
