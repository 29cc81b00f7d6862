"""Small layers: the embedding, RMSNorm, rotary embedding, and the initialiser that every weight uses."""

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.sharding import act_spec, param_spec

# Parameters that are float32 wherever they are used; everything else is cast to the compute dtype.
FLOAT32 = ("w_router_DE", "router_bias_E", "attention_norm_D", "experts_norm_D", "final_norm_D")


def embed(embedding_VD, tokens_BT, dtype):
    """Looks tokens up: [B, T, D] in dtype.

    On a mesh the table (V over tensor and fsdp) is gathered over fsdp, in dtype, and each device looks up its own tokens.
    XLA would leave the table where it is, look up the tokens of all devices of fsdp everywhere and sum over them, and
    in the backward pass make and reduce the gradient of the whole table on each device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return embedding_VD[tokens_BT].astype(dtype)

    def local(embedding_vD, tokens_bt):
        table_vD = lax.all_gather(embedding_vD.astype(dtype), "fsdp", axis=0, tiled=True)
        tokens_bt = tokens_bt - lax.axis_index("tensor") * table_vD.shape[0]
        mine_bt = (tokens_bt >= 0) & (tokens_bt < table_vD.shape[0])
        x_btD = jnp.where(mine_bt[..., None], _rows(table_vD, jnp.where(mine_bt, tokens_bt, 0)), 0)
        return lax.psum(x_btD, "tensor")

    sharded = jax.shard_map(
        local,
        in_specs=(param_spec("embedding_VD", 2), act_spec("BT")),
        out_specs=act_spec("BTD"),
        check_vma=False,  # gradients are tested against one device
    )
    return sharded(embedding_VD, tokens_BT)


@jax.custom_vjp
def _rows(table_VD, tokens_BT):
    """table[tokens], whose gradient is summed in float32 whatever the table's dtype."""
    return table_VD[tokens_BT]


def _rows_backward(saved, d_BTD):
    table_VD, tokens_BT = saved
    d_VD = jnp.zeros(table_VD.shape, jnp.float32).at[tokens_BT].add(d_BTD.astype(jnp.float32))
    return d_VD.astype(table_VD.dtype), None


_rows.defvjp(lambda table_VD, tokens_BT: (table_VD[tokens_BT], (table_VD, tokens_BT)), _rows_backward)


def rms_norm(x_BTD, scale_D, eps: float):
    """RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * scale, statistics in float32, result in x's dtype.

    In float32 the backward pass makes it again from x: autodiff would keep three arrays of x's size. In bfloat16 not: a result made
    again may be rounded at another place of the fused program than the one that the loss was computed with.
    """
    norm = jax.checkpoint(_norm, static_argnums=2) if x_BTD.dtype == jnp.float32 else _norm
    return norm(x_BTD, scale_D, eps)


def _norm(x_BTD, scale_D, eps: float):
    x32_BTD = x_BTD.astype(jnp.float32)
    inverse_BT1 = lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + eps)
    return (x32_BTD * inverse_BT1 * scale_D.astype(jnp.float32)[None, None, :]).astype(x_BTD.dtype)


def rope_table(positions_BT, head_dim: int, theta: float):
    """Rotary angles (arXiv 2104.09864).

    Returns:
        cos, sin: float32 [B, T, H/2]; frequency i is theta^(-2i/H).
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_BT.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_BTNH, cos, sin):
    """Rotates pairs (i, i + H/2), the half-split convention of Hugging Face weights, in float32.

    Mistral's own files pair (2i, 2i + 1) instead; converting between the two permutes rows of the q and k weights.
    """
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def normal(key, shape: tuple[int, ...], std: float):
    """Float32 normal initial values with the given standard deviation."""
    return std * jax.random.normal(key, shape, jnp.float32)
