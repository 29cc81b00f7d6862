"""The model one token at a time: prefill and decode with a cache of keys and values, through the model's own blocks.

Both functions take either the `Mixtral` as it is trained (stacked layers; its experts are all read at every step) or the
`Prepared` weights of `prepare` (separate arrays; only the chosen experts are read).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from mixtral_jax.config import ModelConfig, UserError
from mixtral_jax.models import attention, lora
from mixtral_jax.models.layers import FLOAT32, rms_norm, rope_table
from mixtral_jax.models.mixtral import Block, Mixtral, scan_layers
from mixtral_jax.models.moe import WEIGHTS, Stacked, separate_spec
from mixtral_jax.sharding import constrain, param_spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """Weights laid out for decoding; made by `prepare`."""

    embedding_VD: Any
    blocks: list[Block]  # without their expert weights
    slots: list  # for each layer, the separate expert weights: see moe.separate_experts
    final_norm_D: Any
    head_DV: Any
    config: ModelConfig = dataclasses.field(metadata=dict(static=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the new arrays, over all devices (one copy each); the embedding is shared with the model."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.blocks, self.slots, self.head_DV)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, and how many tokens each row has. B over the batch axes, G over `tensor`."""

    keys_values: Any  # (k, v), each [L, B, S, G, H] for a Mixtral and a list of L arrays [B, S, G, H] for Prepared
    length_B: jax.Array  # int32


def prepare(model: Mixtral, stacked: bool = False) -> Prepared:
    """Lays the weights out for decoding: layers and experts as separate arrays, matrices in the compute dtype.

    It costs a second copy of all weights but the embedding, in model.config.dtype: for 8x7B 93 GB in bfloat16, over all
    devices together (`Prepared.nbytes` says it exactly). Adapters (lora.attach) are merged into the copy. Whoever no longer needs the model drops it and has the memory
    back; the peak is both at once. Runs on the current mesh.

    Args:
        model: the weights.
        stacked: keeps each layer's experts in one array, for kernels that pick them by index (kernels/picked.py); on one
            device only.

    Raises:
        UserError: stacked, on a mesh of several devices.
    """
    c = model.config
    mesh = jax.sharding.get_abstract_mesh()
    if stacked and not mesh.empty and mesh.size > 1:
        raise UserError(f"prepare(stacked=True) is for one device and the mesh has {mesh.size}; leave out stacked")
    blocks, slots = [], []
    for i in range(c.num_layers):
        block, layer_slots = _split_layer(model.layers, i, stacked)
        blocks.append(block)
        slots.append(layer_slots)
    head_DV = model.head_DV[...].astype(c.dtype)
    return Prepared(model.embedding_VD[...], blocks, slots, model.final_norm_D[...], head_DV, c)


@functools.partial(jax.jit, static_argnames="stacked")
def _split_layer(layers: Block, i, stacked: bool):
    """One layer out of the stack: the block without its experts, and the experts as slots."""
    block = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), layers)
    if block.lora is not None:
        lora.merge_layer(block)
    c = block.config
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["expert"]
    stacks, whole = [], []
    for name in WEIGHTS:
        w_EDF = getattr(block, name)[...].astype(c.dtype)
        delattr(block, name)
        if stacked:
            whole.append(w_EDF)
            continue
        w_neDF = w_EDF.reshape(shards, c.num_experts // shards, *w_EDF.shape[1:])
        slots = [w_neDF[:, e] for e in range(w_neDF.shape[1])]
        if not mesh.empty:
            slots = [lax.with_sharding_constraint(w, separate_spec(name, c.d_ff)) for w in slots]
        stacks.append(slots)
    for name, param in list(vars(block).items()):
        if isinstance(param, nnx.Param):
            value = param[...] if name in FLOAT32 else param[...].astype(c.dtype)
            if not mesh.empty:
                value = lax.with_sharding_constraint(value, param_spec(name, value.ndim))
            setattr(block, name, nnx.Param(value))
    return block, Stacked(*whole) if stacked else [list(slot) for slot in zip(*stacks, strict=True)]


def _layers(weights: Mixtral | Prepared, x_BTD, rope, segment_ids_BT, positions_BT, cache: Cache | None):
    """Runs all layers; returns x_BTD and the layers' keys and values in the form that Cache holds."""
    at_B = None if cache is None else cache.length_B

    def body(x_BTD, inputs):
        block, separate, keys_values = inputs
        slots = None if cache is None else attention.Slots(*keys_values, at_B)
        x_BTD, _, keys_values = block(x_BTD, rope, segment_ids_BT, positions_BT, slots, separate)
        return x_BTD, tuple(constrain(a, "BSGH") for a in keys_values)

    old = None if cache is None else cache.keys_values
    if isinstance(weights, Mixtral):
        return scan_layers(body, x_BTD, (weights.layers, None, old), weights.config)
    keys, values = [], []
    for i, (block, separate) in enumerate(zip(weights.blocks, weights.slots, strict=True)):
        past = None if old is None else (old[0][i], old[1][i])
        x_BTD, (k_BSGH, v_BSGH) = body(x_BTD, (block, separate, past))
        keys.append(k_BSGH)
        values.append(v_BSGH)
    return x_BTD, (keys, values)


def _embed(weights: Mixtral | Prepared, tokens_BT):
    return constrain(weights.embedding_VD[...][tokens_BT].astype(weights.config.dtype), "BTD")


def _logits(weights: Mixtral | Prepared, x_BD):
    """float32 [B, V], whole on every device: sampling needs the whole row."""
    x_B1D = rms_norm(x_BD[:, None], weights.final_norm_D[...], weights.config.norm_eps)
    head_DV = weights.head_DV[...].astype(x_BD.dtype)
    logits_BV = jnp.einsum("BD,DV->BV", x_B1D[:, 0], head_DV, preferred_element_type=jnp.float32)
    if jax.sharding.get_abstract_mesh().empty:
        return logits_BV
    return lax.with_sharding_constraint(logits_BV, PartitionSpec())


@functools.partial(jax.jit, static_argnames="size")
def prefill(weights: Mixtral | Prepared, tokens_BT, length_B, size: int):
    """Reads the prompts.

    Args:
        weights: Mixtral or Prepared.
        tokens_BT: int32, padded on the right with any ids.
        length_B: int32, tokens of each row; 0 makes a row that costs nothing and means nothing.
        size: positions of the cache, at least T; prompt and continuation of every row must fit.

    Returns:
        logits_BV float32 of each row's next token, and the Cache.
    """
    c = weights.config
    b, t = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(t)[None, :], (b, t))
    segment_ids_BT = (positions_BT < length_B[:, None]).astype(jnp.int32)
    rope = rope_table(positions_BT, c.head_dim, c.rope_theta)
    x_BTD, keys_values = _layers(weights, _embed(weights, tokens_BT), rope, segment_ids_BT, positions_BT, None)
    last_B11 = jnp.maximum(length_B - 1, 0)[:, None, None]
    logits_BV = _logits(weights, jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0])

    def grow(a):
        # What a row has beyond its own length is never visible, and decode overwrites it.
        padding = [(0, 0)] * (a.ndim - 3) + [(0, size - t), (0, 0), (0, 0)]
        return jnp.pad(a, padding)

    return logits_BV, Cache(jax.tree.map(grow, keys_values), length_B)


@functools.partial(jax.jit, donate_argnames="cache")
def decode(weights: Mixtral | Prepared, cache: Cache, token_B, active_B):
    """Reads one token of each row at the row's own position.

    Args:
        weights: Mixtral or Prepared.
        cache: donated. It has no bound of its own: the caller stops before a row's length reaches its size.
        token_B: int32.
        active_B: bool; a row that is not goes to no expert and its length stays.

    Returns:
        logits_BV float32 of each row's next token, and the Cache with this token in it.
    """
    c = weights.config
    at_B = cache.length_B
    rope = rope_table(at_B[:, None], c.head_dim, c.rope_theta)
    x_B1D = _embed(weights, token_B[:, None])
    active_B1 = active_B[:, None].astype(jnp.int32)
    x_B1D, keys_values = _layers(weights, x_B1D, rope, active_B1, at_B[:, None], cache)
    return _logits(weights, x_B1D[:, 0]), Cache(keys_values, at_B + active_B)
