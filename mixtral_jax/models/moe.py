"""The sparse mixture of experts: route, permute, experts, unpermute. (Balance, the fifth verb, is in losses.py.)

Tokens reach experts on other devices by a ring-style exchange inside one shard_map: all-gather the tokens over the
`expert` axis, let each shard run its own experts, reduce-scatter the results. It is dropless and exact on every mesh.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mixtral_jax import backends
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import BACKENDS, separate
from mixtral_jax.sharding import act_spec, param_spec, suffix


class RouterStats(NamedTuple):
    """Sums over the valid tokens of a micro-batch, float32; stacked over layers they get a leading L.

    Sums and not means, so that micro-batches and evaluation batches add up without weighting mistakes.
    """

    count_E: jax.Array  # assignments of each expert
    prob_E: jax.Array  # sum of the softmax over all E experts
    z: jax.Array  # sum of logsumexp(logits)^2
    entropy: jax.Array  # sum of the entropy of that softmax, nats
    dropped: jax.Array  # assignments that no expert computed
    tokens: jax.Array  # number of valid tokens


def route(logits_BTE, bias_E, valid_BT, k: int):
    """Chooses K experts per token and their gates.

    The gate is the softmax over the K chosen logits (Mixtral, section 2.1). A bias, where there is one, steers the
    choice only and never the gate (aux-loss-free balancing, arXiv 2408.15664).

    Args:
        logits_BTE: router logits, float32.
        bias_E: float32, or None.
        valid_BT: bool; a padding token is sent to no expert (index E, gate 0).
        k: experts per token.

    Returns:
        gates_BTK float32, index_BTK int32, RouterStats.
    """
    e = logits_BTE.shape[-1]
    score_BTE = lax.stop_gradient(logits_BTE)
    if bias_E is not None:
        score_BTE = score_BTE + lax.stop_gradient(bias_E)[None, None, :]
    _, index_BTK = lax.top_k(score_BTE, k)
    # A masked sum instead of take_along_axis: its gradient is a masked broadcast, where a gather's would be a scatter.
    chosen_BTKE = index_BTK[..., None] == jnp.arange(e)[None, None, None, :]
    gates_BTK = jax.nn.softmax(jnp.where(chosen_BTKE, logits_BTE[:, :, None, :], 0).sum(-1), axis=-1)
    gates_BTK = jnp.where(valid_BT[..., None], gates_BTK, 0)

    valid = valid_BT.astype(jnp.float32)
    log_z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    prob_BTE = jnp.exp(logits_BTE - log_z_BT[..., None])
    entropy_BT = log_z_BT - (prob_BTE * logits_BTE).sum(-1)
    stats = RouterStats(
        count_E=(chosen_BTKE & valid_BT[..., None, None]).sum((0, 1, 2)).astype(jnp.float32),
        prob_E=(prob_BTE * valid[..., None]).sum((0, 1)),
        z=(jnp.square(log_z_BT) * valid).sum(),
        entropy=lax.stop_gradient((entropy_BT * valid).sum()),
        dropped=jnp.zeros(()),
        tokens=valid.sum(),
    )
    return gates_BTK, jnp.where(valid_BT[..., None], index_BTK, e).astype(jnp.int32), stats


@jax.custom_vjp
def permute(x_ND, row_token_M, token_rows_NK):
    """Copies each token's row to the K places its experts read: rows_MD = x[row_token].

    Args:
        x_ND: tokens.
        row_token_M: the token of each sorted row.
        token_rows_NK: the inverse, the K rows of each token. With it the backward pass is a gather too; autodiff would
            scatter-add, which is slow everywhere and not deterministic on a GPU.
    """
    del token_rows_NK
    return x_ND[row_token_M]


permute.defvjp(
    lambda x_ND, row_token_M, token_rows_NK: (x_ND[row_token_M], token_rows_NK),
    lambda token_rows_NK, d_MD: (d_MD[token_rows_NK].sum(1), None, None),
)


@jax.custom_vjp
def unpermute(rows_MD, gates_NK, row_token_M, token_rows_NK):
    """Combines the K results of each token: out = sum over k of gate * row, float32 sum, rows' dtype."""
    return _combine(rows_MD, gates_NK, token_rows_NK)


def _combine(rows_MD, gates_NK, token_rows_NK):
    gathered_NKD = rows_MD[token_rows_NK].astype(jnp.float32)
    return (gathered_NKD * gates_NK[..., None]).sum(1).astype(rows_MD.dtype)


def _unpermute_forward(rows_MD, gates_NK, row_token_M, token_rows_NK):
    return _combine(rows_MD, gates_NK, token_rows_NK), (rows_MD, gates_NK, row_token_M, token_rows_NK)


def _unpermute_backward(saved, d_ND):
    rows_MD, gates_NK, row_token_M, token_rows_NK = saved
    row_gate_M = jnp.zeros(rows_MD.shape[0], jnp.float32).at[token_rows_NK].set(gates_NK, unique_indices=True)
    d_rows_MD = (d_ND[row_token_M].astype(jnp.float32) * row_gate_M[:, None]).astype(rows_MD.dtype)
    d_gates_NK = jnp.einsum("NKD,ND->NK", rows_MD[token_rows_NK], d_ND, preferred_element_type=jnp.float32)
    return d_rows_MD, d_gates_NK, None, None


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def sort_by_expert(index_NK, e: int):
    """Sorts the N*K assignments by expert; assignments to no expert of this shard (index e) come last.

    Returns:
        row_token_M, token_rows_NK, group_sizes_e (int32).
    """
    n, k = index_NK.shape
    flat_M = index_NK.reshape(-1)
    order_M = jnp.argsort(flat_M, stable=True)
    rank_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(n * k, dtype=order_M.dtype), unique_indices=True)
    group_sizes_e = (flat_M[:, None] == jnp.arange(e)[None, :]).sum(0, dtype=jnp.int32)
    return order_M // k, rank_M.reshape(n, k), group_sizes_e


def local_experts(x_BTD, gates_BTK, index_BTK, w_gate_eDF, w_up_eDF, w_down_eFD, config: ModelConfig):
    """Permute, experts, unpermute on the experts that are here.

    Args:
        x_BTD: tokens.
        gates_BTK: float32 gates.
        index_BTK: expert of this shard, 0..e-1; e means none of them.
        w_gate_eDF, w_up_eDF, w_down_eFD: weights in x's dtype.
        config: names the backend and its block.

    Returns:
        out_BTD (the part of these experts), computed: number of assignments that were computed, int32.
    """
    grouped_swiglu = BACKENDS[backends.resolve(config).expert_backend]
    # An expert has at most one row of each token: a larger block would only multiply padding (when decoding).
    block = min(config.expert_block, x_BTD.shape[0] * x_BTD.shape[1])

    def multiply(rows_MD, group_sizes_e):
        return grouped_swiglu(rows_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block)

    return _sorted_experts(x_BTD, gates_BTK, index_BTK, w_gate_eDF.shape[0], multiply)


def _sorted_experts(x_BTD, gates_BTK, index_BTK, e: int, multiply: Callable):
    """Permute, multiply(rows_MD, group_sizes_e), unpermute; returns what `local_experts` does."""
    b, t, d = x_BTD.shape
    k = gates_BTK.shape[-1]
    row_token_M, token_rows_NK, group_sizes_e = sort_by_expert(index_BTK.reshape(b * t, k), e)
    rows_MD = permute(x_BTD.reshape(b * t, d), row_token_M, token_rows_NK)
    rows_MD = multiply(rows_MD, group_sizes_e)
    out_ND = unpermute(rows_MD, gates_BTK.reshape(b * t, k), row_token_M, token_rows_NK)
    return out_ND.reshape(b, t, d), group_sizes_e.sum()


def experts(x_BTD, gates_BTK, index_BTK, w_gate_EDF, w_up_EDF, w_down_EFD, config: ModelConfig):
    """The experts on any mesh; without a mesh, `local_experts`. Same arguments, whole arrays.

    Returns:
        out_BTD, computed: float32 number of assignments that were computed, over all devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        out_BTD, computed = local_experts(x_BTD, gates_BTK, index_BTK, w_gate_EDF, w_up_EDF, w_down_EFD, config)
        return out_BTD, computed.astype(jnp.float32)

    def shard(x_bTD, gates_bTK, index_bTK, *weights):
        w_gate_eDF, w_up_eDF, w_down_eFD = (
            lax.all_gather(w, "fsdp", axis=axis, tiled=True) for w, axis in zip(weights, (1, 1, 2))
        )
        x_BTD, gates_BTK, index_BTK = (
            lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x_bTD, gates_bTK, index_bTK)
        )
        e = w_gate_eDF.shape[0]
        index_BTK = index_BTK - lax.axis_index("expert") * e
        index_BTK = jnp.where((index_BTK >= 0) & (index_BTK < e), index_BTK, e)
        out_BTD, computed = local_experts(x_BTD, gates_BTK, index_BTK, w_gate_eDF, w_up_eDF, w_down_eFD, config)
        out_bTD = lax.psum_scatter(out_BTD, "expert", scatter_dimension=0, tiled=True)
        # F is split over `tensor`, so each device there holds a part of the sum. Every one of them counted.
        computed = lax.psum(computed, ("data", "fsdp", "expert", "context"))
        return lax.psum(out_bTD, "tensor"), computed.astype(jnp.float32)

    names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
    token_specs = (act_spec("BTD"), act_spec("BTK"), act_spec("BTK"))
    sharded = jax.shard_map(
        shard,
        in_specs=token_specs + tuple(param_spec(name, 3) for name in names),
        out_specs=(act_spec("BTD"), PartitionSpec()),
        check_vma=False,  # the kernels' loops start from plain zeros; gradients are tested against the oracle
    )
    return sharded(x_BTD, gates_BTK, index_BTK, w_gate_EDF, w_up_EDF, w_down_EFD)


def local_separate_experts(x_BTD, gates_BTK, index_BTK, weights_e, config: ModelConfig):
    """`local_experts` over separate weights: for each expert here w_gate_DF, w_up_DF, w_down_FD in x's dtype."""
    b, t, d = x_BTD.shape
    k, e = gates_BTK.shape[-1], len(weights_e)
    if b * t > separate.FEW_ROWS:
        block = min(config.expert_block, b * t)  # as in local_experts

        def multiply(rows_MD, group_sizes_e):
            return separate.grouped_swiglu(rows_MD, weights_e, group_sizes_e, block)

        return _sorted_experts(x_BTD, gates_BTK, index_BTK, e, multiply)
    index_NK = index_BTK.reshape(b * t, k)
    out_ND = separate.few(x_BTD.reshape(b * t, d), gates_BTK.reshape(b * t, k), index_NK, weights_e)
    return out_ND.reshape(b, t, d), (index_NK < e).sum(dtype=jnp.int32)


def separate_spec(name: str, d_ff: int) -> PartitionSpec:
    """The layout of w_gate_EDF, w_up_EDF or w_down_EFD as separate arrays [expert shards, D, F] or [.., F, D].

    F takes `fsdp` beside `tensor`: weights then stay where they are, and the few tokens travel instead. Where F does not
    divide by both, the weights are whole on every device of `fsdp`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    f_axes = ("tensor", "fsdp") if d_ff % (mesh.shape["tensor"] * mesh.shape["fsdp"]) == 0 else ("tensor",)
    letters = {"E": "expert", "D": None, "F": f_axes}
    return PartitionSpec(*(letters[letter] for letter in suffix(name)))


def separate_experts(x_BTD, gates_BTK, index_BTK, slots, config: ModelConfig):
    """The experts on any mesh, for weights laid out by models/decode.py:prepare.

    Args:
        x_BTD, gates_BTK, index_BTK: see `local_experts`, whole arrays.
        slots: E / n triples of w_gate, w_up [n, D, F] and w_down [n, F, D], n being the size of the mesh axis `expert`:
            each device holds one expert of each slot, and expert i of shard s is global expert s * E / n + i.
        config: names the block.

    Returns:
        out_BTD, computed: float32 number of assignments that were computed, over all devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        weights_e = [[w[0] for w in slot] for slot in slots]
        out_BTD, computed = local_separate_experts(x_BTD, gates_BTK, index_BTK, weights_e, config)
        return out_BTD, computed.astype(jnp.float32)
    specs = [separate_spec(name, config.d_ff) for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")]
    # Where F is split over fsdp, the tokens of all its devices meet all its parts of F.
    token_axes = ("fsdp", "expert") if "fsdp" in specs[0][2] else ("expert",)

    def shard(x_bTD, gates_bTK, index_bTK, slots):
        x_BTD, gates_BTK, index_BTK = (
            lax.all_gather(a, token_axes, axis=0, tiled=True) for a in (x_bTD, gates_bTK, index_bTK)
        )
        e = len(slots)
        index_BTK = index_BTK - lax.axis_index("expert") * e
        index_BTK = jnp.where((index_BTK >= 0) & (index_BTK < e), index_BTK, e)
        weights_e = [[w[0] for w in slot] for slot in slots]
        out_BTD, computed = local_separate_experts(x_BTD, gates_BTK, index_BTK, weights_e, config)
        out_bTD = lax.psum_scatter(out_BTD, token_axes, scatter_dimension=0, tiled=True)
        computed = lax.psum(computed, ("data", "expert", "context")).astype(jnp.float32)
        # Without fsdp among the token axes each of its devices has counted its own tokens only.
        return lax.psum(out_bTD, "tensor"), computed if "fsdp" in token_axes else lax.psum(computed, "fsdp")

    sharded = jax.shard_map(
        shard,
        in_specs=(act_spec("BTD"), act_spec("BTK"), act_spec("BTK"), [specs] * len(slots)),
        out_specs=(act_spec("BTD"), PartitionSpec()),
        check_vma=False,  # as in `experts`
    )
    return sharded(x_BTD, gates_BTK, index_BTK, slots)
