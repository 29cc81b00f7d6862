"""Stored weights straight onto devices: each process reads what its own devices hold.

A shard is filled on its device, block by block, so that host memory holds a few blocks whatever the model's size.
jax.make_array_from_callback would want all local shards of a parameter on the host at once (8x7B: up to 60 GB), and so
does Orbax: it took 3.6 GB beside the arrays of a checkpoint of 5 GB.
"""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mixtral_jax.config import UserError
from mixtral_jax.convert import layout
from mixtral_jax.convert.transfer import Transfer
from mixtral_jax.convert.weights import BIAS, Weights
from mixtral_jax.sharding import named_leaves

# Each shard is filled by its device alone, whatever mesh the caller has set.
NO_MESH = jax.sharding.Mesh(np.empty((), object), ())
IN_FLIGHT = 64 * 2**20  # bytes that may be on their way to the devices

logger = logging.getLogger(__name__)


def restore(weights: Weights, like):
    """Reads parameters onto the shardings of `like`.

    Args:
        weights: opened, of whatever kind.
        like: a model of ShapeDtypeStructs with NamedShardings; values are cast to its dtypes. A router bias that was
            not stored is zero: it then changes nothing.

    Returns:
        the same tree of arrays.

    Raises:
        UserError: the shapes are another model's.
    """
    leaves = named_leaves(like)
    _check_shapes(weights, leaves)
    if BIAS in leaves and BIAS not in weights.dtypes:
        logger.info("%s has no router bias: the model's starts at zero", weights.where)
    held = {name: _held(leaf) for name, leaf in leaves.items()}
    total = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * len(held[name]) * weights.dtypes[name].itemsize
        for name, leaf in leaves.items()
        if name in weights.dtypes
    )
    arrays = []
    with Transfer("load", total) as transfer, jax.set_mesh(NO_MESH):
        for name, leaf in leaves.items():
            pieces = _fill(weights, name, leaf, held[name], transfer)
            arrays.append(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces))
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _check_shapes(weights: Weights, leaves: dict) -> None:
    stored = {name: layout.parameter_shape(name, weights.size) for name in weights.dtypes}
    wanted = {name: tuple(leaf.shape) for name, leaf in leaves.items() if name != BIAS or BIAS in stored}
    wrong = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if wrong:
        lines = [
            f"  {weights.called(name)}: there {stored.get(name, 'none')}, here {wanted.get(name, 'none')}"
            for name in wrong
        ]
        raise UserError(
            f"{weights.where} is of another model; set the model.* keys as its config has them:\n" + "\n".join(lines)
        )


def _held(leaf) -> dict[tuple[tuple[int, int], ...], list[jax.Device]]:
    """The different parts of an array, (begin, end) of each dimension, and the devices of this process that hold them."""
    held: dict = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        part = tuple(cut.indices(n)[:2] for cut, n in zip(index, leaf.shape, strict=True))
        held.setdefault(part, []).append(device)
    return held


def _fill(weights: Weights, name: str, leaf, held: dict, transfer: Transfer) -> list[jax.Array]:
    """Makes the parameter's shards; devices that hold the same part share what is read.

    The parts advance together, because those that differ in columns lie in the same pages and chunks of the files.
    """
    shape = leaf.sharding.shard_shape(leaf.shape)
    shards = [[_zeros(shape, leaf.dtype, device) for device in devices] for devices in held.values()]
    if name not in weights.dtypes:
        return [piece for pieces in shards for piece in pieces]
    waiting = 0
    cuts = [layout.shard_blocks(name, weights.letters[name], weights.size, part) for part in held]
    for together in zip(*cuts, strict=True):
        for i, (block, where) in enumerate(together):
            values = weights.block(name, block)
            values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
            shards[i] = [_put(piece, values, where) for piece in shards[i]]
            waiting += values.nbytes * len(shards[i])
            if waiting > IN_FLIGHT:
                jax.block_until_ready(shards)
                waiting = 0
            transfer.advance(values.nbytes)
    return [piece for pieces in jax.block_until_ready(shards) for piece in pieces]


def _zeros(shape: tuple[int, ...], dtype, device: jax.Device) -> jax.Array:
    """Made where it stays: jnp.zeros(device=...) makes it on the first device and copies it."""
    with jax.default_device(device):
        return jax.device_put(jnp.zeros(shape, dtype), device)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole, block, where):
    """Writes a block in place; the cast happens on the device, so that bfloat16 travels as bfloat16."""
    return lax.dynamic_update_slice(whole, block.astype(whole.dtype), where)
