"""Runs evaluations on a stored checkpoint and writes their results."""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path

import jax

from mixtral_jax.checkpoint import Checkpoints, load_run
from mixtral_jax.config import Config, UserError, from_config_dict, resolve_mesh
from mixtral_jax.data import build_cache, load_tokenizer
from mixtral_jax.evals import EVALS
from mixtral_jax.models import mixtral
from mixtral_jax.sharding import make_mesh, tree_shardings

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def load(workdir: str | Path, step: int | None):
    """Loads the parameters of a run onto the devices that are here, whatever mesh they were saved from.

    Args:
        workdir: the folder of a run.
        step: one of its checkpoints; None takes the newest.

    Returns:
        config (its mesh resolved for the devices here), model, mesh, step.

    Raises:
        UserError: no such run or step.
    """
    workdir = Path(workdir)
    stored = load_run(workdir)
    # A run's own mesh says nothing about this machine: spread the parameters over all devices.
    stored["mesh"] = {axis: -1 if axis == "fsdp" else 1 for axis in stored["mesh"]}
    config = resolve_mesh(_fit_batch(from_config_dict(stored)), jax.device_count())
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest() if step is None else step
    if step is None or step not in checkpoints.steps():
        known = ", ".join(str(s) for s in checkpoints.steps()) or "none"
        raise UserError(f"{workdir} has no checkpoint {'' if step is None else f'of step {step} '}(there: {known})")
    mesh = make_mesh(config.mesh)
    shapes = mixtral.abstract(config.model)
    shardings = tree_shardings(shapes, mesh, shapes)
    like = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )
    model = checkpoints.restore_params(step, like)
    checkpoints.close()
    return config, model, mesh, step


def _fit_batch(config: Config) -> Config:
    """Rounds the batch up to the devices: evaluation pads it with empty rows, and they change nothing."""
    devices = jax.device_count()
    rows = -(-config.train.batch_size // config.train.accumulation_steps // devices) * devices
    train = dataclasses.replace(config.train, batch_size=rows, accumulation_steps=1)
    return dataclasses.replace(config, train=train)


def evaluate(workdir: str, step: int | None, names: list[str], out: str) -> dict[str, dict[str, float]]:
    """Runs the named evaluations, prints a table, and writes OUT/results.json.

    Raises:
        UserError: an unknown evaluation, or no such checkpoint.
    """
    unknown = [name for name in names if name not in EVALS]
    if unknown or not names:
        raise UserError(f"unknown evaluation {', '.join(unknown) or '(none given)'}; there are {', '.join(EVALS)}")
    config, model, mesh, step = load(workdir, step)
    tokenizer = load_tokenizer(str(Path(workdir) / "tokenizer"), config.data.cache_dir)
    corpus = build_cache(config.data, tokenizer)
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
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
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
