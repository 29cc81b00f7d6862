"""Small layers: RMSNorm, rotary embedding, and the initialiser that every weight uses."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x_BTD, scale_D, eps: float):
    """RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * scale, statistics in float32, result in x's dtype."""
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
