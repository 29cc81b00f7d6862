"""Loads the parameters of a stored run onto the devices that are here."""

import dataclasses
from pathlib import Path

import jax

from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import AXES, Config, MeshConfig, UserError, from_config_dict, resolve_mesh
from mixtral_jax.models import mixtral
from mixtral_jax.sharding import make_mesh, tree_shardings
from mixtral_jax.workdir import load_run


def load(workdir: str | Path, step: int | None, mesh_sizes: dict[str, int] | None = None):
    """Loads the parameters of a run, whatever mesh they were saved from.

    Args:
        workdir: the folder of a run.
        step: one of its checkpoints; None takes the newest.
        mesh_sizes: sizes of mesh axes, -1 for what is left of the devices; axes that are not named are 1. None spreads
            the parameters over as many devices as divide them, the rest are replicas: a run's own mesh says nothing
            about this machine.

    Returns:
        config (its mesh resolved for the devices here), model, mesh, step.

    Raises:
        UserError: no such run or step, or a mesh that does not fit.
    """
    workdir = Path(workdir)
    config = _for_devices(from_config_dict(load_run(workdir)), jax.device_count(), mesh_sizes)
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
    checkpoints.close()
    return config, model, mesh, step


def restore_weights(spec: str, like):
    """Restores the parameters that `spec` names onto the shardings of `like`."""
    checkpoints = Checkpoints(spec)
    params = checkpoints.restore_params(checkpoints.latest(), like)
    checkpoints.close()
    return params


def stored_corpus(workdir: str | Path, step: int) -> str | None:
    """The key of the corpus that a checkpoint was trained on; None if it was imported."""
    checkpoints = Checkpoints(workdir)
    meta = checkpoints.meta(step)
    checkpoints.close()
    return meta["identity"]["corpus"] if "identity" in meta else None


def _for_devices(config: Config, devices: int, mesh_sizes: dict[str, int] | None) -> Config:
    """Replaces the run's mesh and batch, which were chosen for another machine, by ones for the devices here.

    The batch is rounded up: evaluation fills it with empty rows, and they change nothing.
    """
    if mesh_sizes is None:
        fits = [n for n in range(1, devices + 1) if devices % n == 0]
        fsdp = max(n for n in fits if config.model.d_model % n == 0 and config.model.vocab_size % n == 0)
        mesh_sizes = {"data": devices // fsdp, "fsdp": fsdp}
    mesh = MeshConfig(**{axis: mesh_sizes.get(axis, 1) for axis in AXES})
    rows = -(-config.train.batch_size // config.train.accumulation_steps // devices) * devices
    train = dataclasses.replace(config.train, batch_size=rows, accumulation_steps=1)
    return resolve_mesh(dataclasses.replace(config, train=train, mesh=mesh), devices)
