"""cuDNN's flash attention on packed rows. The one place that imports jax's private module.

jax.nn.dot_product_attention takes packing as a dense mask only, 2 GiB a row at 32k tokens. cuDNN itself packs through
offsets and lengths of documents (Hopper and later, cuDNN 9.6), which only the private module hands on.
"""

import jax.numpy as jnp
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo as fused

from mixtral_jax.config import UserError
from mixtral_jax.models.attention.chunked import attend as attend_chunked
from mixtral_jax.models.attention.plain import Places

CUDNN = 90600  # 9.6.0, as cuDNN writes it
CAPABILITY = "9.0"
MIN_MEAN_DOCUMENT = 256  # tokens: see `most_documents`


def most_documents(t: int) -> int:
    """Documents of a row that cuDNN is prepared for. It writes statistics [B * documents, N, T] in float32, used or not."""
    return min(max(t // MIN_MEAN_DOCUMENT, 8), 64)


def spans(segment_ids_BT, most: int):
    """Where the documents of each row begin and how long they are; padding (id 0) is none.

    Args:
        segment_ids_BT: int32; documents are contiguous.
        most: documents of a row.

    Returns:
        begin_BM, length_BM: int32, -1 where a row has fewer than `most` documents. What is beyond them is left out.
        count_B: int32, documents of each row.
    """
    t = segment_ids_BT.shape[1]
    before_BT = jnp.pad(segment_ids_BT, ((0, 0), (1, 0)))[:, :t]
    after_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, 1)))[:, 1:]
    place_T = jnp.arange(t, dtype=jnp.int32)[None, :]

    def first(is_BT):
        found = jnp.sort(jnp.where(is_BT, place_T, t), axis=1)[:, :most]
        return jnp.pad(found, ((0, 0), (0, most - found.shape[1])), constant_values=t)

    begins_BT = (segment_ids_BT > 0) & (segment_ids_BT != before_BT)
    begin_BM, end_BM = first(begins_BT), first((segment_ids_BT > 0) & (segment_ids_BT != after_BT))
    there_BM = begin_BM < t
    return (
        jnp.where(there_BM, begin_BM, -1),
        jnp.where(there_BM, end_BM + 1 - begin_BM, -1),
        begins_BT.sum(1, dtype=jnp.int32),
    )


def attend(q_BTNH, k_BSGH, v_BSGH, queries: Places, keys: Places, window: int):
    """See mixtral_jax.models.attention for the signature; T is S and columns are in row order.

    Rows with more documents than `most_documents` go through `chunked`, with the same result.

    Raises:
        UserError: there is no cuDNN here, or the dtype is not bfloat16.
    """
    try:
        found = fused.check_cudnn_version()
    except RuntimeError:
        found = 0
    if found < CUDNN or not fused.check_compute_capability(CAPABILITY):
        raise UserError(
            f"model.attention=cudnn packs documents with cuDNN {CUDNN} and compute capability {CAPABILITY} (Hopper) or later; "
            f"here is {f'cuDNN {found} or an older GPU' if found else 'no cuDNN'}; set model.attention=chunked"
        )
    if q_BTNH.dtype != jnp.bfloat16:
        raise UserError(
            f"model.attention=cudnn with {q_BTNH.dtype}; set model.dtype=bfloat16 or model.attention=chunked"
        )
    begin_BM, length_BM, count_B = spans(queries.segment_ids_BT, most_documents(q_BTNH.shape[1]))

    def packed(q_BTNH, k_BSGH, v_BSGH):
        return _packed(q_BTNH, k_BSGH, v_BSGH, queries.segment_ids_BT > 0, begin_BM, length_BM, window)

    def fallback(q_BTNH, k_BSGH, v_BSGH):
        return attend_chunked(q_BTNH, k_BSGH, v_BSGH, queries, keys, window)

    few = count_B.max() <= begin_BM.shape[1]
    return lax.cond(few, packed, fallback, q_BTNH, k_BSGH, v_BSGH)


def _packed(q_BTNH, k_BSGH, v_BSGH, valid_BT, begin_BM, length_BM, window: int):
    n, h = q_BTNH.shape[2:]

    def keep(x_BTNH):
        # cuDNN leaves the padding's outputs and gradients as it found the memory, and NaN times 0 is NaN.
        return jnp.where(valid_BT[:, :, None, None], x_BTNH, 0)

    # jax scales the offsets of keys by the number of query heads too, so there must be as many key heads.
    k_BSNH, v_BSNH = (jnp.repeat(a, n // a.shape[2], axis=2) for a in (k_BSGH, v_BSGH))
    offsets_BM = jnp.pad(begin_BM, ((0, 0), (0, 1)), constant_values=-1)
    out_BTNH = fused.dot_product_attention(
        *map(keep, (q_BTNH, k_BSNH, v_BSNH)),
        q_seqlen=length_BM,
        kv_seqlen=length_BM,
        q_offsets=offsets_BM,
        kv_offsets=offsets_BM,
        scale=h**-0.5,
        mask_type=fused.MaskType.PADDING_CAUSAL,
        qkv_layout="BTNH",
        sliding_window_length=window or None,
    )
    return keep(out_BTNH)
