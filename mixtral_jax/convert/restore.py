"""Files of Hugging Face's or Mistral's straight onto devices: each process reads what its own devices hold.

A shard is filled on its device, block by block, so that host memory holds a few blocks whatever the model's size;
jax.make_array_from_callback would want all local shards of a parameter on the host at once (8x7B: up to 60 GB).
"""

import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.config import UserError
from mixtral_jax.convert import layout
from mixtral_jax.convert.transfer import Transfer
from mixtral_jax.convert.weights import BIAS, Foreign
from mixtral_jax.sharding import named_leaves

IN_FLIGHT = 256 * 2**20  # bytes that may be on their way to the devices

logger = logging.getLogger(__name__)


def restore_foreign(weights: Foreign, like):
    """Reads parameters onto the shardings of `like`.

    Args:
        weights: the opened directory.
        like: a model of ShapeDtypeStructs with NamedShardings; values are cast to its dtypes. A router bias, which
            files do not have, is zero: it then changes nothing.

    Returns:
        the same tree of arrays.

    Raises:
        UserError: the shapes are another model's.
    """
    leaves = named_leaves(like)
    _check_shapes(weights, leaves)
    if BIAS in leaves:
        logger.info("%s has no router bias: the model's starts at zero", weights.where)
    held = {name: _shards(leaf) for name, leaf in leaves.items()}
    total = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * len(held[name]) * weights.dtypes[name].itemsize
        for name, leaf in leaves.items()
        if name in weights.dtypes
    )
    arrays = []
    with Transfer("load", total) as transfer:
        for name, leaf in leaves.items():
            pieces = []
            for part, devices in held[name].items():
                pieces += _fill(weights, name, leaf, part, devices, transfer)
            arrays.append(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces))
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _check_shapes(weights: Foreign, leaves: dict) -> None:
    stored = {name: layout.parameter_shape(name, weights.size) for name in weights.dtypes}
    wanted = {name: tuple(leaf.shape) for name, leaf in leaves.items() if name != BIAS}
    wrong = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if wrong:
        lines = [
            f"  {name} ({weights.tensor(name)}): there {stored.get(name, 'none')}, here {wanted.get(name, 'none')}"
            for name in wrong
        ]
        raise UserError(
            f"{weights.where} is of another model; set the model.* keys as its config has them:\n" + "\n".join(lines)
        )


def _shards(leaf) -> dict[tuple[tuple[int, int], ...], list[jax.Device]]:
    """The different parts of an array, (begin, end) of each dimension, and the devices of this process that hold them."""
    held: dict = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        part = tuple(cut.indices(n)[:2] for cut, n in zip(index, leaf.shape, strict=True))
        held.setdefault(part, []).append(device)
    return held


def _fill(weights: Foreign, name: str, leaf, part, devices, transfer: Transfer) -> list[jax.Array]:
    """Makes one shard on each of `devices`, which all hold the same part."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    pieces = [jnp.zeros(shape, leaf.dtype, device=device) for device in devices]
    if name not in weights.dtypes:
        return pieces
    waiting = 0
    for block, where in layout.shard_blocks(name, weights.letters[name], weights.size, part):
        values = weights.block(name, block)
        values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
        pieces = [_put(piece, values, where) for piece in pieces]
        waiting += values.nbytes * len(devices)
        if waiting > IN_FLIGHT:
            jax.block_until_ready(pieces)
            waiting = 0
        transfer.advance(values.nbytes)
    return jax.block_until_ready(pieces)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole, block, where):
    """Writes a block in place; the cast happens on the device, so that bfloat16 travels as bfloat16."""
    return lax.dynamic_update_slice(whole, block.astype(whole.dtype), where)
