"""The sparse mixture of experts: route, permute, experts, unpermute. (Balance, the fifth verb, is in losses.py.)

Everything after routing happens inside one shard_map; dispatch.py says how tokens reach experts on other devices.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mixtral_jax import backends
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import BACKENDS, separate
from mixtral_jax.kernels.adapters import ExpertAdapters, grouped_swiglu_lora
from mixtral_jax.kernels.blocks import Stacks
from mixtral_jax.models import dispatch
from mixtral_jax.models.permute import permute, sort_by_expert, unpermute
from mixtral_jax.sharding import act_spec, param_spec, suffix

WEIGHTS = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
# In the order of ExpertAdapters.
ADAPTERS = (
    "lora_gate_a_EDR",
    "lora_gate_b_ERF",
    "lora_up_a_EDR",
    "lora_up_b_ERF",
    "lora_down_a_EFR",
    "lora_down_b_ERD",
)


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


class Stacked(NamedTuple):
    """The expert weights of one layer for generation on one device: see models/decode.py:prepare."""

    w_gate_EDF: jax.Array
    w_up_EDF: jax.Array
    w_down_EFD: jax.Array


class Choices(NamedTuple):
    """What a router decided, of each token; stacked over layers they get a leading L."""

    index_BTK: jax.Array  # int32 experts, the first choice first; E where the token is padding
    gates_BTK: jax.Array  # float32; 0 where the token is padding
    logits_BTE: jax.Array  # float32, adapters included and the balancing bias not


def reads_stacks(config: ModelConfig) -> bool:
    """Whether layers read expert weights out of all layers' stacks (kernels/blocks.py:Stacks).

    On one device, in float32: elsewhere a layer's weights are gathered or cast first, which is a copy anyhow.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    return alone and config.dtype == "float32" and backends.resolve(config).expert_backend == "blocks"


def top_k(score_BTE, k: int):
    """Indices of the k highest scores of each token, [B, T, K] int32, on any mesh.

    In shard_map, because XLA's partitioner would gather the scores of all devices' tokens before it sorts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return lax.top_k(score_BTE, k)[1]
    local = jax.shard_map(lambda s: lax.top_k(s, k)[1], in_specs=act_spec("BTE"), out_specs=act_spec("BTK"))
    return local(score_BTE)


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
    index_BTK = top_k(score_BTE, k)
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


def local_experts(
    x_BTD,
    gates_BTK,
    index_BTK,
    w_gate_eDF,
    w_up_eDF,
    w_down_eFD,
    config: ModelConfig,
    adapters: ExpertAdapters | None = None,
    scale: float = 1.0,
    exact: bool = True,
    stacks: Stacks | None = None,
):
    """Permute, experts, unpermute on the experts that are here.

    Args:
        x_BTD: tokens.
        gates_BTK: float32 gates.
        index_BTK: expert of this shard, 0..e-1; e means none of them.
        w_gate_eDF, w_up_eDF, w_down_eFD: weights in x's dtype.
        config: names the backend and its block.
        adapters: of these experts, any float dtype. With them the weights get no gradient, and the kernel is that of
            kernels/adapters.py, whatever config.expert_backend says.
        scale: of the adapters' products.
        exact: the assignments are to experts that are here, all of them; see `_multiply`.
        stacks: the weights by reference, where `reads_stacks`.

    Returns:
        out_BTD (the part of these experts), computed: number of assignments that were computed, int32.
    """
    weights = (w_gate_eDF, w_up_eDF, w_down_eFD)
    multiply = _multiply(weights, x_BTD.shape[0] * x_BTD.shape[1], config, adapters, scale, exact, stacks)
    return _sorted_experts(x_BTD, gates_BTK, index_BTK, w_gate_eDF.shape[0], multiply)


def _multiply(
    weights,
    tokens: int,
    config: ModelConfig,
    adapters: ExpertAdapters | None,
    scale: float,
    exact: bool,
    stacks: Stacks | None = None,
) -> Callable:
    """The kernel as a function of grouped rows; no expert has more rows than `tokens`.

    `exact` says that there are no more rows than assignments. A buffer for the worst case has several times as many, too
    many for keeping F-wide values of all of them.
    """
    block = min(config.expert_block, tokens)  # a larger block would only multiply padding (when decoding)
    if adapters is not None:
        return lambda rows_MD, sizes_e: grouped_swiglu_lora(rows_MD, weights, adapters, sizes_e, block, scale)
    backend = backends.resolve(config).expert_backend
    grouped_swiglu = BACKENDS[backend]
    if backend == "blocks":
        grouped_swiglu = functools.partial(grouped_swiglu, keep=exact and config.remat == "none", stacks=stacks)
    return lambda rows_MD, group_sizes_e: grouped_swiglu(rows_MD, *weights, group_sizes_e, block)


def _sorted_experts(x_BTD, gates_BTK, index_BTK, e: int, multiply: Callable):
    """Permute, multiply(rows_MD, group_sizes_e), unpermute; returns what `local_experts` does."""

    def run(rows_MD, group_sizes_e):
        return multiply(rows_MD, group_sizes_e), group_sizes_e.sum()

    return _between_permutes(x_BTD, gates_BTK, index_BTK, e, run)


def _between_permutes(x_BTD, gates_BTK, index_BTK, experts: int, run: Callable):
    """Sorts the rows by expert and combines what `run(rows_MD, group_sizes)` -> (rows_MD, computed) makes of them."""
    b, t, d = x_BTD.shape
    k = gates_BTK.shape[-1]
    row_token_M, token_rows_NK, group_sizes = sort_by_expert(index_BTK.reshape(b * t, k), experts)
    rows_MD = permute(x_BTD.reshape(b * t, d), row_token_M, token_rows_NK)
    rows_MD, computed = run(rows_MD, group_sizes)
    out_ND = unpermute(rows_MD, gates_BTK.reshape(b * t, k), row_token_M, token_rows_NK)
    return out_ND.reshape(b, t, d), computed


def ring_experts(x_bTD, gates_bTK, index_bTK, *weights, config: ModelConfig, adapters=None, scale: float = 1.0):
    """Inside shard_map: gathers the tokens of all shards of `expert`, and reduce-scatters the sums of these experts.

    Args and returns as `local_experts`, with global indices and this shard's tokens.
    """
    gathered = (lax.all_gather(a, dispatch.AXIS, axis=0, tiled=True) for a in (x_bTD, gates_bTK, index_bTK))
    x_BTD, gates_BTK, index_BTK = gathered
    e = weights[0].shape[0]
    index_BTK = index_BTK - lax.axis_index(dispatch.AXIS) * e
    index_BTK = jnp.where((index_BTK >= 0) & (index_BTK < e), index_BTK, e)
    out_BTD, computed = local_experts(x_BTD, gates_BTK, index_BTK, *weights, config, adapters, scale, exact=False)
    return lax.psum_scatter(out_BTD, dispatch.AXIS, scatter_dimension=0, tiled=True), computed


def ragged_experts(x_bTD, gates_bTK, index_bTK, *weights, config: ModelConfig, adapters=None, scale: float = 1.0):
    """Inside shard_map: sends each row to the shard of `expert` that owns its expert, and the result back.

    Args and returns as `local_experts`, with global indices and this shard's tokens; `computed` counts the rows that
    came here and had room.
    """
    shards, e = lax.axis_size(dispatch.AXIS), weights[0].shape[0]
    tokens, k = x_bTD.shape[0] * x_bTD.shape[1], gates_bTK.shape[-1]
    capacity = dispatch.buffer_rows(tokens, k, shards, e, config.buffer_factor, config.expert_block)
    multiply = _multiply(weights, shards * tokens, config, adapters, scale, exact=False)

    def run(rows_MD, group_sizes_E):
        return dispatch.ragged(rows_MD, group_sizes_E, capacity, multiply)

    return _between_permutes(x_bTD, gates_bTK, index_bTK, shards * e, run)


def experts(
    x_BTD,
    gates_BTK,
    index_BTK,
    w_gate_EDF,
    w_up_EDF,
    w_down_EFD,
    config: ModelConfig,
    adapters: ExpertAdapters | None = None,
    scale: float = 1.0,
    stacks: Stacks | None = None,
):
    """The experts on any mesh; without a mesh, `local_experts`. Same arguments, whole arrays.

    Returns:
        out_BTD, computed: int32 number of assignments that were computed, over all devices; a pod has more than float32 counts.
    """
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local_experts(x_BTD, gates_BTK, index_BTK, *weights, config, adapters, scale, stacks=stacks)
    if mesh.shape[dispatch.AXIS] == 1:
        travel = local_experts  # TPUs refuse an exchange among one
    else:
        travel = {"ring": ring_experts, "ragged": ragged_experts}[backends.resolve(config).dispatch]

    def shard(x_bTD, gates_bTK, index_bTK, weights, adapters):
        # Gathered inside, so that the gradients of weights split over `fsdp` are reduce-scattered.
        weights = _gather(weights, WEIGHTS)
        adapters = None if adapters is None else ExpertAdapters(*_gather(adapters, ADAPTERS))
        out_bTD, computed = travel(x_bTD, gates_bTK, index_bTK, *weights, config=config, adapters=adapters, scale=scale)
        # F is split over `tensor`, so each device there holds a part of the sum. Every one of them counted.
        computed = lax.psum(computed, ("data", "fsdp", "expert", "context"))
        return lax.psum(out_bTD, "tensor"), computed

    token_specs = (act_spec("BTD"), act_spec("BTK"), act_spec("BTK"))
    weight_specs = tuple(param_spec(name, 3) for name in WEIGHTS)
    adapter_specs = None if adapters is None else ExpertAdapters(*(param_spec(name, 3) for name in ADAPTERS))
    sharded = jax.shard_map(
        shard,
        in_specs=(*token_specs, weight_specs, adapter_specs),
        out_specs=(act_spec("BTD"), PartitionSpec()),
        check_vma=False,  # the kernels' loops start from plain zeros; gradients are tested against the oracle
    )
    return sharded(x_BTD, gates_BTK, index_BTK, weights, adapters)


def _gather(arrays, names) -> list:
    """Inside shard_map: parameters whole in D, the letter that is split over `fsdp`; one without D is whole there."""

    def whole(a, letters: str):
        if "D" not in letters:
            return a
        axis = letters.index("D")
        if a.shape[0] == 1:
            # One expert here: as a matrix, for with that axis of 1 libtpu makes an all-reduce of the gradient's scatter.
            return lax.all_gather(a[0], "fsdp", axis=axis - 1, tiled=True)[None]
        return lax.all_gather(a, "fsdp", axis=axis, tiled=True)

    return [whole(a, suffix(name)) for a, name in zip(arrays, names, strict=True)]


def stacked_experts(x_BTD, gates_BTK, index_BTK, weights: Stacked, config: ModelConfig):
    """`local_experts` for generation: few rows read only the experts that they pick, by index."""
    b, t, d = x_BTD.shape
    if b * t > separate.FEW_ROWS:
        return local_experts(x_BTD, gates_BTK, index_BTK, *weights, config)
    from mixtral_jax.kernels import picked  # a GPU's kernels, which take time to import

    index_NK = index_BTK.reshape(b * t, -1)
    out_ND = picked.swiglu(x_BTD.reshape(b * t, d), gates_BTK.reshape(b * t, -1), index_NK, *weights)
    return out_ND.reshape(b, t, d), (index_NK < weights.w_gate_EDF.shape[0]).sum(dtype=jnp.int32)


def local_separate_experts(x_BTD, gates_BTK, index_BTK, weights_e, config: ModelConfig):
    """`local_experts` over separate weights: for each expert here w_gate_DF, w_up_DF, w_down_FD in x's dtype."""
    b, t, d = x_BTD.shape
    k, e = gates_BTK.shape[-1], len(weights_e)
    if b * t > separate.FEW_ROWS:
        block = min(config.expert_block, b * t)  # as in local_experts

        # An expert has at most every token once.
        branches = separate.branches(block) if block == b * t else ()

        def multiply(rows_MD, group_sizes_e):
            return separate.grouped_swiglu(rows_MD, weights_e, group_sizes_e, block, branches)

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
            each device holds one expert of each slot, and expert i of shard s is global expert s * E / n + i. Or Stacked.
        config: names the block.

    Returns:
        out_BTD, computed: int32 number of assignments that were computed, over all devices; a pod has more than float32 counts.
    """
    if isinstance(slots, Stacked):
        return stacked_experts(x_BTD, gates_BTK, index_BTK, slots, config)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        weights_e = [[w[0] for w in slot] for slot in slots]
        out_BTD, computed = local_separate_experts(x_BTD, gates_BTK, index_BTK, weights_e, config)
        return out_BTD, computed
    specs = [separate_spec(name, config.d_ff) for name in WEIGHTS]
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
        computed = lax.psum(computed, ("data", "expert", "context"))
        # Without fsdp among the token axes each of its devices has counted its own tokens only.
        return lax.psum(out_bTD, "tensor"), computed if "fsdp" in token_axes else lax.psum(computed, "fsdp")

    sharded = jax.shard_map(
        shard,
        in_specs=(act_spec("BTD"), act_spec("BTK"), act_spec("BTK"), [specs] * len(slots)),
        out_specs=(act_spec("BTD"), PartitionSpec()),
        check_vma=False,  # as in `experts`
    )
    return sharded(x_BTD, gates_BTK, index_BTK, slots)
