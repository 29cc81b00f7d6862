"""The mesh: what commands say of it, and the checks that need the number of devices."""

import dataclasses
import re

from mixtral_jax.config.checks import divisible, require
from mixtral_jax.config.types import AXES, SPLASH_BLOCK, Config, MeshConfig, UserError


def mesh_sizes(text: str | None) -> dict[str, int] | None:
    """Reads --mesh of a command: AXIS=SIZE,..., a size may be -1; None stays None.

    Raises:
        UserError: it says something else.
    """
    if text is None:
        return None
    sizes = {}
    for item in text.split(","):
        axis, _, size = item.partition("=")
        if axis not in AXES or not re.fullmatch(r"-1|\d{1,9}", size):
            raise UserError(f"--mesh={text}: {item!r} is no AXIS=SIZE; axes are {', '.join(AXES)}, a size may be -1")
        sizes[axis] = int(size)
    return sizes


def resolve_mesh(config: Config, num_devices: int) -> Config:
    """Fills in the mesh's -1 and checks all that depends on the number of devices.

    Args:
        config: a validated configuration.
        num_devices: devices of all processes together.

    Returns:
        The same configuration with every mesh axis positive.

    Raises:
        UserError: the mesh does not fit the devices, or a dimension does not divide by its axes.
    """
    sizes = dataclasses.asdict(config.mesh)
    unknown = [axis for axis, size in sizes.items() if size == -1]
    bad = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    require(not bad, f"{', '.join(bad)}; an axis has a positive size, or -1 for what is left of the devices")
    require(len(unknown) <= 1, f"mesh.{' and mesh.'.join(unknown)} are both -1; only one axis can take what is left")
    known = 1
    for size in sizes.values():
        known *= size if size > 0 else 1
    shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if unknown:
        require(
            num_devices % known == 0,
            f"the mesh ({shape}) needs a multiple of {known} devices and there are {num_devices}; lower an axis to a divisor of {num_devices}",
        )
        sizes[unknown[0]] = num_devices // known
    else:
        require(
            known == num_devices,
            f"the mesh ({shape}) needs {known} devices and there are {num_devices}; set one axis to -1 to fill in what is left",
        )
    mesh = MeshConfig(**sizes)
    model, train = config.model, config.train
    _resolve_context(config, mesh.context)
    divisible("model.num_experts", model.num_experts, "mesh.expert", mesh.expert)
    divisible("model.d_model", model.d_model, "mesh.fsdp", mesh.fsdp)
    divisible("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", mesh.tensor)
    divisible("model.d_ff", model.d_ff, "mesh.tensor", mesh.tensor)
    divisible("model.vocab_size", model.vocab_size, "mesh.tensor * mesh.fsdp", mesh.tensor * mesh.fsdp)
    micro = train.batch_size // train.accumulation_steps
    if micro % mesh.batch_shards:
        need = mesh.batch_shards * train.accumulation_steps
        raise UserError(
            f"train.batch_size={train.batch_size} over train.accumulation_steps={train.accumulation_steps} is {micro} sequences, not divisible by "
            f"mesh data x fsdp x expert = {mesh.batch_shards} batch shards; set train.batch_size to a multiple of {need}"
        )
    return dataclasses.replace(config, mesh=mesh)


def _resolve_context(config: Config, context: int) -> None:
    """Checks the length of rows against mesh.context and the attention that is chosen by name."""
    model, train = config.model, config.train
    block = SPLASH_BLOCK if model.attention == "splash" else 1
    pieces = block * (2 * context if context > 1 else 1)
    of = " * ".join([str(block)] * (block > 1) + ["2", "mesh.context"] * (context > 1))
    if train.seq_len % pieces:
        down, up = train.seq_len // pieces * pieces, -(-train.seq_len // pieces) * pieces
        raise UserError(
            f"train.seq_len={train.seq_len} is not divisible by {of} = {pieces} (model.attention={model.attention}, "
            f"mesh.context={context}); set train.seq_len to {f'{down} or {up}' if down else up}, or mesh.context=1 "
            f"with model.attention=chunked"
        )
    require(
        model.attention != "cudnn" or context == 1,
        f"model.attention=cudnn with mesh.context={context}: cuDNN's packing takes whole rows; set mesh.context=1, or "
        "model.attention=chunked",
    )
