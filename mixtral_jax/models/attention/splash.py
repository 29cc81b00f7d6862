"""Splash attention: JAX's Pallas kernel for TPUs, which skips blocks that a static mask hides.

The mask is causality and window by a token's place in its row; documents come in as segment ids. A kernel's masks are
arrays with the blocks of queries in front, so that over `context` each device is given those of its own queries.
On a CPU the kernel is interpreted, which is slow and meant for tests; the choice is made where the program is lowered.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info_lib
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.models.attention.plain import Places
from mixtral_jax.sharding import zigzag

LANES = 128  # the kernel's smallest block
BLOCK = 512


class _Mask(mask_lib.Mask):
    """Queries in the order of a mesh's columns, keys in row order. The kernel computes it from q_sequence."""

    def __init__(self, t: int, context: int, window: int):
        self.shape_, self.window = (t, t), window
        self.q_sequence = zigzag(t, context)

    @property
    def shape(self):
        return self.shape_

    def mask_function(self, queries, keys):
        seen = queries >= keys
        return seen & (queries - keys < self.window) if self.window else seen

    def __getitem__(self, slices):
        rows, columns = slices
        return self.mask_function(self.q_sequence[rows][:, None], np.arange(self.shape_[1])[columns][None, :])

    def __eq__(self, other):
        return self.window == other.window and np.array_equal(self.q_sequence, other.q_sequence)

    def __hash__(self):
        return hash((self.shape_, self.window))


def block_size(t: int, context: int) -> int:
    """The largest block that divides what a device has of a row in one piece; 0 if not even LANES does."""
    piece = t // (2 * context) if context > 1 else t
    return next((size for size in (BLOCK, BLOCK // 2, LANES) if piece % size == 0), 0)


@functools.lru_cache
def masks(t: int, context: int, window: int):
    """The kernel for rows of T, for any number of heads: a pytree of its mask's arrays; see `masks_spec`."""
    size = block_size(t, context)
    sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), size)
    mask = mask_lib.MultiHeadMask([_Mask(t, context, window)])
    # As kernels.make_splash_mha, but with arrays of the host: the program may be compiled for devices that are not here.
    forward, mask_function = mask_info_lib.process_mask(mask, (size, size), q_seq_shards=context)
    backward, _ = mask_info_lib.process_mask_dkv(mask, (size, size), q_seq_shards=context)
    return kernels.SplashAttentionKernel(
        forward,
        forward,
        backward,
        block_sizes=kernels.BlockSizes(**sizes),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=mask_function,
        interpret=False,
    )


def masks_spec(kernel, mesh):
    """How `masks` lie on a mesh: blocks of queries over `context`."""
    return kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, "context")))


def attend(q_BTNH, k_BSGH, v_BSGH, queries: Places, keys: Places, kernel):
    """See mixtral_jax.models.attention for the signature; `kernel`, this device's part of `masks`, knows the window."""
    scale = q_BTNH.shape[-1] ** -0.5
    q_BNTH = ((q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)).swapaxes(1, 2)
    segments = kernels.SegmentIds(queries.segment_ids_BT, keys.segment_ids_BT)

    def run(interpret: bool):
        infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
        one_row = kernels.SplashAttentionKernel(*infos, **{**kernel.kwargs, "interpret": interpret})
        return lambda q_BNTH, k_BGSH, v_BGSH, segments: jax.vmap(one_row)(q_BNTH, k_BGSH, v_BGSH, segments)

    arguments = (q_BNTH, k_BSGH.swapaxes(1, 2), v_BSGH.swapaxes(1, 2), segments)
    return lax.platform_dependent(*arguments, cpu=run(True), default=run(False)).swapaxes(1, 2)
