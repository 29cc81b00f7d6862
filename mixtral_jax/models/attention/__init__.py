"""Grouped-query attention (arXiv 2305.13245), causal within documents, behind one signature.

    attend(q_BTNH, k_BSGH, v_BSGH, queries, keys, window) -> out_BTNH in q's dtype

q_BTNH, k_BSGH, v_BSGH are rotated and in the compute dtype; query head n reads key/value head n // (N / G). queries and
keys are `Places`. window is the number of latest tokens a query sees, itself included; 0: all. The output of padding
queries is finite and means nothing. plain is the oracle of the others; docs/parallelism.md compares them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mixtral_jax import backends
from mixtral_jax.config import ModelConfig
from mixtral_jax.models.attention import chunked, cudnn, plain
from mixtral_jax.models.attention.plain import Places, visible
from mixtral_jax.sharding import act_spec, unzigzag, zigzag

__all__ = ["Places", "Slots", "attend_to_cache", "self_attend", "visible"]

BACKENDS = {"plain": plain.attend, "chunked": chunked.attend, "cudnn": cudnn.attend}


class Slots(NamedTuple):
    """One layer's keys and values of earlier tokens, and where the next token of each row goes.

    G before S, as a step multiplies them: in the other order XLA:CPU would copy the whole cache at every step.
    """

    k_BGSH: jax.Array  # in the compute dtype, rotated
    v_BGSH: jax.Array
    at_B: jax.Array  # int32, the position of each row's next token


def append(slots: Slots, k_BTGH, v_BTGH) -> tuple[jax.Array, jax.Array]:
    """Writes one token's key and value (T is 1) at each row's own place; returns k_BGSH, v_BGSH."""

    def write(row_GSH, new_TGH, at):
        return lax.dynamic_update_slice(row_GSH, new_TGH.swapaxes(0, 1), (0, at, 0))

    # vmap makes it a scatter with B as a batch dimension, which stays where B is; .at[rows, at] would gather it.
    return tuple(jax.vmap(write)(old, new, slots.at_B) for old, new in ((slots.k_BGSH, k_BTGH), (slots.v_BGSH, v_BTGH)))


def attend_to_cache(q_BTNH, k_BGSH, v_BGSH, at_B, window: int):
    """Decoding: one query of each row (T is 1), at position at_B of the row's one document, on keys from position 0."""
    b, _, s, _ = k_BGSH.shape
    queries = Places(jnp.ones((b, 1), jnp.int32), at_B[:, None], jnp.zeros(1, jnp.int32))
    position_S = jnp.arange(s, dtype=jnp.int32)
    keys = Places(jnp.ones((b, s), jnp.int32), jnp.broadcast_to(position_S[None, :], (b, s)), position_S)
    return plain.attend(q_BTNH, k_BGSH.swapaxes(1, 2), v_BGSH.swapaxes(1, 2), queries, keys, window)


def self_attend(q_BTNH, k_BTGH, v_BTGH, segment_ids_BT, positions_BT, config: ModelConfig):
    """Attention of whole rows on any mesh, by the backend that the configuration names.

    Each device has its rows (B over data, fsdp, expert) and heads (N, G over tensor). On a mesh with `context` it has two
    pieces of each row as well (columns are in zig-zag order: see sharding.zigzag) and gathers the keys and values of the
    others, which grouped queries make small; in the backward pass their gradients are reduce-scattered.

    Args:
        q_BTNH, k_BTGH, v_BTGH: see the module.
        segment_ids_BT, positions_BT: int32.
        config: names the backend and the window.

    Returns:
        [B, T, N, H] in q's dtype.

    Raises:
        UserError: the backend does not run here, or not with this T.
    """
    mesh = jax.sharding.get_abstract_mesh()
    context = 1 if mesh.empty else mesh.shape["context"]
    t = q_BTNH.shape[1]
    name = backends.attention(config, t, context)
    index_CT = jnp.asarray(zigzag(t, context).reshape(context, t // context))
    operand = None
    if name == "splash":
        from mixtral_jax.models.attention import splash  # the TPU's kernels take time to import

        operand = splash.masks(t, context, config.sliding_window)

    def local(q_btnh, k_btgh, v_btgh, segment_ids_bt, positions_bt, operand):
        queries = Places(segment_ids_bt, positions_bt, index_CT[0])
        keys = queries
        if context > 1:
            queries = queries._replace(index_T=index_CT[lax.axis_index("context")])
            k_btgh, v_btgh, *places = (
                unzigzag(lax.all_gather(a, "context", axis=1, tiled=True), context)
                for a in (k_btgh, v_btgh, segment_ids_bt, positions_bt)
            )
            keys = Places(*places, jnp.arange(t, dtype=jnp.int32))
        if name == "splash":
            return splash.attend(q_btnh, k_btgh, v_btgh, queries, keys, operand)
        return BACKENDS[name](q_btnh, k_btgh, v_btgh, queries, keys, config.sliding_window)

    arguments = (q_BTNH, k_BTGH, v_BTGH, segment_ids_BT, positions_BT, operand)
    if mesh.empty or mesh.size == 1:
        return local(*arguments)
    letters = ("BTNH", "BTGH", "BTGH", "BT", "BT")
    operand_spec = PartitionSpec() if operand is None else splash.masks_spec(operand, mesh)
    sharded = jax.shard_map(
        local,
        in_specs=(*map(act_spec, letters), operand_spec),
        out_specs=act_spec("BTNH"),
        check_vma=False,  # loops start from plain zeros; gradients are tested against the oracle
    )
    return sharded(*arguments)
