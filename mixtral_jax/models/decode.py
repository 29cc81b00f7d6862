"""The model one token at a time: prefill and decode with a cache of keys and values, through the model's own blocks.

Both functions take either the `Mixtral` as it is trained (stacked layers; its experts are all read at every step) or the
`Prepared` weights of `prepare` (separate arrays; only the chosen experts are read).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from mixtral_jax.config import ModelConfig, UserError
from mixtral_jax.kernels.separate import FEW_ROWS
from mixtral_jax.models import attention, lora
from mixtral_jax.models.layers import FLOAT32, rms_norm, rope_table
from mixtral_jax.models.mixtral import Block, Mixtral, scan_layers
from mixtral_jax.models.moe import WEIGHTS, Stacked, separate_spec
from mixtral_jax.sharding import constrain, param_spec

# Of a program that decodes several rows on a CPU: (up to EIGEN_ROWS, more). All in one take longer to compile and leave more in
# memory (for 8 layers and 8 rows 0.1 GB); each program that a step consists of costs it half a millisecond or one, which is much
# of a step of few rows. Programs of 2 layers for 32 rows leave 0.05 GB less than programs of 4.
LAYERS_TOGETHER = 4, 2
# Up to so many rows and positions those programs multiply with Eigen: 2 to 5% faster for 4 rows and 7% for 8 than with YNN, XLA's own
# choice; the same for 16 rows and slower for more, and slower for attention (2,048 positions: a step takes a seventh longer).
EIGEN_ROWS, EIGEN_POSITIONS = 8, 1024


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
        """Bytes of all but the embedding, over all devices (one copy each)."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.blocks, self.slots, self.head_DV)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, and how many tokens each row has. B over the batch axes, G over `tensor`."""

    keys_values: Any  # (k, v), each [L, B, G, S, H] for a Mixtral and a list of L arrays [B, G, S, H] for Prepared
    length_B: jax.Array  # int32


def prepare(model: Mixtral, stacked: bool = False) -> Prepared:
    """Lays the weights out for decoding: layers and experts as separate arrays, matrices in the compute dtype.

    It costs a second copy of all weights but the embedding, in model.config.dtype: for 8x7B 93 GB in bfloat16, over all
    devices together. Whoever no longer needs the model drops it and has the memory back; the peak is both at once. On a single CPU
    device and in the dtype that the weights have, there is no copy: the separate arrays are parts of the model's own memory
    (and a donated model is copied, not overwritten). Adapters (lora.attach) are merged, into a copy. Runs on the current mesh.

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
    split = _views if not stacked and _lies_ready(model.layers) else functools.partial(_copies, stacked=stacked)
    blocks, slots = zip(*split(model.layers), strict=True)
    head_DV = model.head_DV[...].astype(c.dtype)
    return Prepared(model.embedding_VD[...], list(blocks), list(slots), model.final_norm_D[...], head_DV, c)


def _lies_ready(layers: Block) -> bool:
    """Whether parts of the stacked arrays can be used where they lie: on one CPU device, with nothing to merge or cast."""
    if jax.default_backend() != "cpu" or layers.lora is not None:
        return False
    return all(
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and len(leaf.devices()) == 1
        and (leaf.dtype == layers.config.dtype or any(name in jax.tree_util.keystr(path) for name in FLOAT32))
        for path, leaf in jax.tree_util.tree_leaves_with_path(layers)
    )


def _views(layers: Block):
    """Yields what `_split_layer` makes of each layer, without a copy: what an index takes off the first axes is contiguous."""

    def part(whole, *index):
        return jax.device_put(whole[index], device, may_alias=True)

    (device,) = layers.w_router_DE[...].devices()
    # addressable_data is a jax.Array of its own: a numpy view of the model's would stand in the way of its donation for good.
    wholes = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), layers)
    experts = [getattr(wholes, name)[...] for name in WEIGHTS]
    for name in WEIGHTS:
        delattr(wholes, name)
    for i in range(layers.config.num_layers):
        slots = [[part(w, i, slice(e, e + 1)) for w in experts] for e in range(layers.config.num_experts)]
        yield jax.tree.map(lambda whole, i=i: part(whole, i), wholes), slots


def _copies(layers: Block, stacked: bool):
    return (_split_layer(layers, i, stacked) for i in range(layers.config.num_layers))


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


def prefill(weights: Mixtral | Prepared, tokens_BT, length_B, size: int):
    """Reads the prompts.

    Each of Prepared's layers is a call of one compiled function: in one program, L layers would take L times as long to compile.

    Args:
        weights: Mixtral or Prepared.
        tokens_BT: int32, padded on the right with any ids.
        length_B: int32, tokens of each row; 0 makes a row that costs nothing and means nothing.
        size: positions of the cache, at least T; prompt and continuation of every row must fit.

    Returns:
        logits_BV float32 of each row's next token, and the Cache.
    """
    if isinstance(weights, Mixtral):
        return _prefill_stacked(weights, tokens_BT, length_B, size)
    ends = dataclasses.replace(weights, blocks=[], slots=[])
    length_B, x_BTD, *places = _begin(ends, tokens_BT, length_B)
    keys_values = []
    for block, separate in zip(weights.blocks, weights.slots, strict=True):
        x_BTD, layer = _prefill_layer(block, separate, x_BTD, *places, size)
        keys_values.append(layer)
    logits_BV = _last_logits(ends, x_BTD, length_B)
    return logits_BV, Cache(tuple(map(list, zip(*keys_values, strict=True))), length_B)


@functools.partial(jax.jit, static_argnames="size")
def _prefill_stacked(weights: Mixtral, tokens_BT, length_B, size: int):
    length_B, x_BTD, *places = _begin(weights, tokens_BT, length_B)

    def body(x_BTD, block):
        return _prefill_layer(block, None, x_BTD, *places, size)

    x_BTD, keys_values = scan_layers(body, x_BTD, weights.layers, weights.config)
    return _last_logits(weights, x_BTD, length_B), Cache(keys_values, length_B)


@jax.jit
def _begin(weights: Mixtral | Prepared, tokens_BT, length_B):
    """length_B on the mesh, the embedded tokens x_BTD, the rotary table, segments and positions."""
    c = weights.config
    b, t = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(t)[None, :], (b, t))
    segment_ids_BT = (positions_BT < length_B[:, None]).astype(jnp.int32)
    rope = rope_table(positions_BT, c.head_dim, c.rope_theta)
    return length_B, _embed(weights, tokens_BT), rope, segment_ids_BT, positions_BT


@functools.partial(jax.jit, static_argnames="size", donate_argnames="x_BTD")
def _prefill_layer(block: Block, separate, x_BTD, rope, segment_ids_BT, positions_BT, size: int):
    """One layer: x_BTD, and its keys and values, each [B, G, size, H]."""
    x_BTD, _, keys_values = block(x_BTD, rope, segment_ids_BT, positions_BT, None, separate)
    # What a row has beyond its own length is never visible, and decode overwrites it.
    padding = ((0, 0), (0, 0), (0, size - x_BTD.shape[1]), (0, 0))
    return x_BTD, tuple(constrain(jnp.pad(a_BTGH.swapaxes(1, 2), padding), "BGSH") for a_BTGH in keys_values)


@jax.jit
def _last_logits(weights: Mixtral | Prepared, x_BTD, length_B):
    last_B11 = jnp.maximum(length_B - 1, 0)[:, None, None]
    return _logits(weights, jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0])


def decode(weights: Mixtral | Prepared, cache: Cache, token_B, active_B):
    """Reads one token of each row at the row's own position.

    One program; on a CPU, for more rows than FEW_ROWS, one for each LAYERS_TOGETHER of Prepared's layers, and those that have
    the same sizes share it.

    Args:
        weights: Mixtral or Prepared.
        cache: donated. It has no bound of its own: the caller stops before a row's length reaches its size.
        token_B: int32.
        active_B: bool; a row that is not goes to no expert and its length stays.

    Returns:
        logits_BV float32 of each row's next token, and the Cache with this token in it.
    """
    rows = token_B.shape[0]
    in_parts = isinstance(weights, Prepared) and jax.default_backend() == "cpu" and rows > FEW_ROWS
    if not in_parts or isinstance(token_B, jax.core.Tracer):  # a caller's jit is one program anyhow
        return _decode_at_once(weights, cache, token_B, active_B)
    positions = cache.keys_values[0][0].shape[2]
    few = rows <= EIGEN_ROWS
    layers = _layers_by_eigen if few and positions <= EIGEN_POSITIONS else _layers_by_default
    return _decode(weights, cache, token_B, active_B, layers, LAYERS_TOGETHER[0 if few else 1])


def _decode(
    weights: Mixtral | Prepared, cache: Cache, token_B, active_B, decode_layers=None, together: int | None = None
):
    """`together` layers at a time by decode_layers; all of them as a part of the caller's program without either."""
    decode_layers = decode_layers or _decode_layers
    stacked = isinstance(weights, Mixtral)
    ends = weights if stacked else dataclasses.replace(weights, blocks=[], slots=[])
    x_B1D, places, length_B = _begin_token(ends, cache.length_B, token_B, active_B)
    k, v = cache.keys_values
    if stacked:

        def body(x_B1D, inputs):
            return _decode_layer(*inputs, x_B1D, places)

        x_B1D, keys_values = scan_layers(body, x_B1D, (weights.layers, None, k, v), weights.config)
    else:
        keys_values = ([], [])
        together = together or len(k)
        for i in range(0, len(k), together):
            part = slice(i, i + together)
            layers = (weights.blocks[part], weights.slots[part], k[part], v[part])
            x_B1D, written = decode_layers(*layers, x_B1D, places)
            for all_layers, new in zip(keys_values, written, strict=True):
                all_layers.extend(new)
    return _token_logits(ends, x_B1D), Cache(keys_values, length_B)


_decode_at_once = jax.jit(_decode, donate_argnames="cache")


@jax.jit
def _begin_token(weights: Mixtral | Prepared, at_B, token_B, active_B):
    """The embedded tokens x_B1D; the places that every layer needs; and the rows' lengths after this token."""
    rope = rope_table(at_B[:, None], weights.config.head_dim, weights.config.rope_theta)
    places = (rope, active_B[:, None].astype(jnp.int32), at_B)
    return _embed(weights, token_B[:, None]), places, at_B + active_B


def _decode_layers(blocks: list[Block], slots: list, k: list, v: list, x_B1D, places):
    """Some layers, one after the other: x_B1D, and their keys and values with this token's."""
    keys_values = []
    for layer in zip(blocks, slots, k, v, strict=True):
        x_B1D, written = _decode_layer(*layer, x_B1D, places)
        keys_values.append(written)
    return x_B1D, tuple(map(list, zip(*keys_values, strict=True)))


_layers_by_default = jax.jit(_decode_layers, donate_argnames=("k", "v", "x_B1D"))
_layers_by_eigen = jax.jit(
    _decode_layers,
    donate_argnames=("k", "v", "x_B1D"),
    compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""},  # nothing is given to YNN
)


def _decode_layer(block: Block, separate, k_BGSH, v_BGSH, x_B1D, places):
    rope, active_B1, at_B = places
    slots = attention.Slots(k_BGSH, v_BGSH, at_B)
    x_B1D, _, keys_values = block(x_B1D, rope, active_B1, at_B[:, None], slots, separate)
    return x_B1D, tuple(constrain(a, "BGSH") for a in keys_values)


@jax.jit
def _token_logits(weights: Mixtral | Prepared, x_B1D):
    return _logits(weights, x_B1D[:, 0])
