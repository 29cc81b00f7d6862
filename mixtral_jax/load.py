"""Loads the parameters of a stored run onto the devices that are here."""

import dataclasses
from pathlib import Path

import jax

from mixtral_jax.checkpoint import Checkpoints, load_run
from mixtral_jax.config import AXES, Config, UserError, from_config_dict, resolve_mesh
from mixtral_jax.models import mixtral
from mixtral_jax.sharding import make_mesh, tree_shardings


def load(workdir: str | Path, step: int | None, mesh_sizes: dict[str, int] | None = None):
    """Loads the parameters of a run, whatever mesh they were saved from.

    Args:
        workdir: the folder of a run.
        step: one of its checkpoints; None takes the newest.
        mesh_sizes: sizes of mesh axes, -1 for what is left of the devices; axes that are not named are 1. None spreads
            the parameters over all devices with fsdp: a run's own mesh says nothing about this machine.

    Returns:
        config (its mesh resolved for the devices here), model, mesh, step.

    Raises:
        UserError: no such run or step, or a mesh that does not fit.
    """
    workdir = Path(workdir)
    stored = load_run(workdir)
    sizes = {"fsdp": -1} if mesh_sizes is None else mesh_sizes
    stored["mesh"] = {axis: sizes.get(axis, 1) for axis in AXES}
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
