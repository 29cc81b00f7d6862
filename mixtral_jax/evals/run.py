"""Runs evaluations on a stored checkpoint and writes their results."""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path

import jax

from mixtral_jax.checkpoint import Checkpoints, load_run
from mixtral_jax.config import Config, MeshConfig, UserError, from_config_dict, resolve_mesh
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
        config (its mesh resolved for the devices here), model, mesh, step, the key of the corpus it was trained on.

    Raises:
        UserError: no such run or step.
    """
    workdir = Path(workdir)
    config = _for_devices(from_config_dict(load_run(workdir)), jax.device_count())
    folder = workdir / "checkpoints"
    known = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
    if not known or step not in (None, *known):
        there = ", ".join(map(str, known)) or "none"
        raise UserError(f"{workdir} has no checkpoint {'' if step is None else f'of step {step} '}(there: {there})")
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest() if step is None else step
    mesh = make_mesh(config.mesh)
    shapes = mixtral.abstract(config.model)
    shardings = tree_shardings(shapes, mesh, shapes)
    like = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )
    model = checkpoints.restore_params(step, like)
    key = checkpoints.meta(step)["identity"]["corpus"]
    checkpoints.close()
    return config, model, mesh, step, key


def _for_devices(config: Config, devices: int) -> Config:
    """Replaces the run's mesh and batch, which were chosen for another machine, by ones for the devices here.

    Parameters are split over as many devices as divide them, the rest are replicas. The batch is rounded up:
    evaluation fills it with empty rows, and they change nothing.
    """
    fits = [n for n in range(1, devices + 1) if devices % n == 0]
    fsdp = max(n for n in fits if config.model.d_model % n == 0 and config.model.vocab_size % n == 0)
    mesh = MeshConfig(data=devices // fsdp, fsdp=fsdp, expert=1, context=1, tensor=1)
    rows = -(-config.train.batch_size // config.train.accumulation_steps // devices) * devices
    train = dataclasses.replace(config.train, batch_size=rows, accumulation_steps=1)
    return resolve_mesh(dataclasses.replace(config, train=train, mesh=mesh), devices)


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
    config, model, mesh, step, key = load(workdir, step)
    tokenizer = load_tokenizer(str(Path(workdir) / "tokenizer"), config.data.cache_dir)
    corpus = build_cache(config.data, tokenizer)
    if corpus.key != key:
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
