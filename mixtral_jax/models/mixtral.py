"""Mixtral (arXiv 2401.04088) as a pytree: parameters and static configuration, nothing else."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.blocks import Stacks
from mixtral_jax.models import attention, lora, moe
from mixtral_jax.models.layers import apply_rope, embed, normal, rms_norm, rope_table
from mixtral_jax.models.lora import LayerAdapters
from mixtral_jax.sharding import constrain, named_leaves

# What the backward pass finds stored; everything else inside a layer is computed again.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "outputs": jax.checkpoint_policies.save_only_these_names("attention_out", "experts_out"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # With its input on the host too, a layer leaves nothing on the device.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_in", "attention_out", "experts_out"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + experts(norm(x)). Weights are float32, without biases.

    A frozen base's matrices are in the compute dtype, and lora.attach puts adapters beside them.
    """

    lora: LayerAdapters | None = None

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = config
        d, n, g, h, f, e = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim, c.d_ff, c.num_experts

        def weight(*shape):
            return nnx.Param(normal(rngs.params(), shape, c.init_std))

        self.config = config
        self.attention_norm_D = nnx.Param(jnp.ones(d))
        self.w_q_DNH = weight(d, n, h)
        self.w_k_DGH = weight(d, g, h)
        self.w_v_DGH = weight(d, g, h)
        self.w_o_NHD = weight(n, h, d)
        self.experts_norm_D = nnx.Param(jnp.ones(d))
        self.w_router_DE = weight(d, e)
        self.w_gate_EDF = weight(e, d, f)
        self.w_up_EDF = weight(e, d, f)
        self.w_down_EFD = weight(e, f, d)
        if c.router_bias:
            self.router_bias_E = nnx.Param(jnp.zeros(e))

    def attention(self, x_BTD, rope, segment_ids_BT, positions_BT, slots=None):
        """Grouped-query self-attention.

        Args:
            x_BTD, rope, segment_ids_BT, positions_BT: see __call__.
            slots: None attends within x (S is T); attention.Slots attends to the cache and x's one token.

        Returns:
            [B, T, D] in x's dtype, and the keys and values: x's own, [B, T, G, H] each, or the cache with them, [B, G, S, H].
        """
        dtype = x_BTD.dtype
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.w_q_DNH[...].astype(dtype))
        k_BTGH = jnp.einsum("BTD,DGH->BTGH", x_BTD, self.w_k_DGH[...].astype(dtype))
        v_BTGH = jnp.einsum("BTD,DGH->BTGH", x_BTD, self.w_v_DGH[...].astype(dtype))
        if self.lora is not None:
            q_BTNH = self.lora.attention("q", x_BTD, q_BTNH)
            k_BTGH = self.lora.attention("k", x_BTD, k_BTGH)
            v_BTGH = self.lora.attention("v", x_BTD, v_BTGH)
        q_BTNH = constrain(apply_rope(q_BTNH, *rope), "BTNH")
        k_BTGH = constrain(apply_rope(k_BTGH, *rope), "BTGH")
        if slots is None:
            keys_values = (k_BTGH, v_BTGH)
            out_BTNH = attention.self_attend(q_BTNH, *keys_values, segment_ids_BT, positions_BT, self.config)
        else:
            keys_values = attention.append(slots, k_BTGH, v_BTGH)
            out_BTNH = attention.attend_to_cache(q_BTNH, *keys_values, slots.at_B, self.config.sliding_window)
        w_o_NHD = self.w_o_NHD[...].astype(dtype)
        if slots is None:
            out_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, w_o_NHD)
        else:  # The same as matrices: XLA:CPU would copy the weights into the order of axes that attention left, at each step.
            out_BTD = out_BTNH.reshape(*x_BTD.shape[:2], -1) @ w_o_NHD.reshape(-1, x_BTD.shape[2])
        if self.lora is not None:
            out_BTD = self.lora.attention("o", out_BTNH, out_BTD)
        return constrain(out_BTD, "BTD"), keys_values

    def experts(self, x_BTD, valid_BT, separate=None, stacks=None):
        """Mixture of experts; returns [B, T, D] in x's dtype, RouterStats and Choices.

        `separate` replaces the stacked weights of the block: see moe.separate_experts. `stacks` are all layers' weights,
        to read this one's out of them: see kernels/blocks.py.
        """
        dtype = x_BTD.dtype
        # HIGHEST: by default a GPU rounds float32 operands to tf32 and a TPU to bf16, and near-ties would flip.
        x32_BTD = x_BTD.astype(jnp.float32)
        logits_BTE = jnp.einsum("BTD,DE->BTE", x32_BTD, self.w_router_DE[...], precision=lax.Precision.HIGHEST)
        if self.lora is not None:
            logits_BTE = self.lora.router(x32_BTD, logits_BTE)
        bias_E = self.router_bias_E[...] if self.config.router_bias else None
        logits_BTE = constrain(logits_BTE, "BTE")
        gates_BTK, index_BTK, stats = moe.route(logits_BTE, bias_E, valid_BT, self.config.experts_per_token)
        if separate is None:
            weights = (w[...].astype(dtype) for w in (self.w_gate_EDF, self.w_up_EDF, self.w_down_EFD))
            adapters = None if self.lora is None else self.lora.experts()
            scale = 1.0 if adapters is None else lora.scale(self.lora.config)
            given = (x_BTD, gates_BTK, index_BTK, *weights, self.config, adapters, scale, stacks)
            out_BTD, computed = moe.experts(*given)
        else:
            out_BTD, computed = moe.separate_experts(x_BTD, gates_BTK, index_BTK, separate, self.config)
        # In int32: a pod's batch has more than the 2^24 assignments up to which float32 counts, and some would seem dropped.
        sent = (index_BTK < self.config.num_experts).sum(dtype=jnp.int32)
        out_BTD, stats = constrain(out_BTD, "BTD"), stats._replace(dropped=(sent - computed).astype(jnp.float32))
        return out_BTD, stats, moe.Choices(index_BTK, gates_BTK, logits_BTE)

    def expert_stacks(self):
        """The expert weights as they are, of all layers where this is their stack; no gradient flows through them."""
        return [lax.stop_gradient(w[...]) for w in (self.w_gate_EDF, self.w_up_EDF, self.w_down_EFD)]

    def __call__(self, x_BTD, rope, segment_ids_BT, positions_BT, slots=None, separate=None, stacks=None):
        """Runs the layer; `slots` and `separate` are for generation (models/decode.py).

        Args:
            x_BTD: in the compute dtype.
            rope: rope_table of the positions.
            segment_ids_BT: int32 document of each token; 0, padding, goes to no expert.
            positions_BT: int32 position of each token in its document; with `slots` those say it.
            slots, separate, stacks: see `attention` and `experts`.

        Returns:
            the output [B, T, D], its RouterStats, and the keys and values [B, S, G, H] that were attended to.
        """
        return self.observed(x_BTD, rope, segment_ids_BT, positions_BT, slots, separate, stacks)[:3]

    def observed(self, x_BTD, rope, segment_ids_BT, positions_BT, slots=None, separate=None, stacks=None):
        """What __call__ returns, and the router's Choices."""
        eps = self.config.norm_eps
        with jax.named_scope("attention"):
            normed_BTD = rms_norm(x_BTD, self.attention_norm_D[...], eps)
            out_BTD, keys_values = self.attention(normed_BTD, rope, segment_ids_BT, positions_BT, slots)
            x_BTD = x_BTD + checkpoint_name(out_BTD, "attention_out")
        with jax.named_scope("experts"):
            normed_BTD = rms_norm(x_BTD, self.experts_norm_D[...], eps)
            out_BTD, stats, choices = self.experts(normed_BTD, segment_ids_BT > 0, separate, stacks)
            x_BTD = x_BTD + checkpoint_name(out_BTD, "experts_out")
        return x_BTD, stats, keys_values, choices


class Mixtral(nnx.Module):
    """Embedding, L stacked blocks, final norm, untied head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        v, d = config.vocab_size, config.d_model
        self.embedding_VD = nnx.Param(normal(rngs.params(), (v, d), config.init_std))
        # A layer after the other: all at once would need as much again for the random bits of all weights.
        self.layers = lax.map(lambda rngs: Block(config, rngs), rngs.split(config.num_layers))
        self.final_norm_D = nnx.Param(jnp.ones(d))
        self.head_DV = nnx.Param(normal(rngs.params(), (d, v), config.init_std))

    def hidden(self, tokens_BT, positions_BT, segment_ids_BT):
        """All but the head.

        Args:
            tokens_BT: int32 token ids.
            positions_BT: int32 position of each token in its own document.
            segment_ids_BT: int32 document of each token in its row; 0 is padding.

        On a mesh with `context` the columns of all are in the order of sharding.zigzag, as sharding.place puts them.

        Returns:
            x_BTD after the final norm, in config.dtype; RouterStats with a leading L.
        """
        c = self.config
        x_BTD = constrain(embed(self.embedding_VD[...], tokens_BT, c.dtype), "BTD")
        rope = rope_table(positions_BT, c.head_dim, c.rope_theta)

        whole = self.layers.expert_stacks() if c.scan_layers and moe.reads_stacks(c) else None

        def body(x_BTD, inputs):
            block, layer = inputs
            stacks = None if whole is None else Stacks(*whole, layer)
            return block(checkpoint_name(x_BTD, "layer_in"), rope, segment_ids_BT, positions_BT, stacks=stacks)[:2]

        if c.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[c.remat], prevent_cse=not c.scan_layers)
        x_BTD, stats_L = scan_layers(body, x_BTD, (self.layers, jnp.arange(c.num_layers)), c)
        return rms_norm(x_BTD, self.final_norm_D[...], c.norm_eps), stats_L

    def __call__(self, tokens_BT, positions_BT, segment_ids_BT):
        """The full logits: float32 [B, T, V], and RouterStats with a leading L. Training uses `hidden` and chunks."""
        x_BTD, stats_L = self.hidden(tokens_BT, positions_BT, segment_ids_BT)
        head_DV = self.head_DV[...].astype(x_BTD.dtype)
        return jnp.einsum("BTD,DV->BTV", x_BTD, head_DV, preferred_element_type=jnp.float32), stats_L


def scan_layers(body, x_BTD, layers: Block, config: ModelConfig):
    """Runs `body` over the stacked layers: one compiled body, or unrolled when config.scan_layers is off."""
    if config.scan_layers:
        return lax.scan(body, x_BTD, layers)
    outputs = []
    for i in range(config.num_layers):
        x_BTD, out = body(x_BTD, jax.tree.map(lambda a, i=i: a[i], layers))
        outputs.append(out)
    return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def init(config: ModelConfig, key) -> Mixtral:
    """A model with random float32 weights: normal with std init_std, norms 1. Trace it under jit for large shapes."""
    return Mixtral(config, nnx.Rngs(params=key))


def abstract(config: ModelConfig) -> Mixtral:
    """The model with ShapeDtypeStructs for weights: any size, no memory."""
    return jax.eval_shape(lambda key: init(config, key), jax.random.key(0))


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Counts parameters from abstract shapes.

    Returns:
        total, active: active counts K of the E experts, the input embedding included.
    """
    total = active = 0
    for name, leaf in named_leaves(abstract(config)).items():
        total += leaf.size
        is_expert = name.rpartition(".")[2] in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
        active += leaf.size * config.experts_per_token // config.num_experts if is_expert else leaf.size
    return total, active
