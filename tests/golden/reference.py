"""Small Mixtrals for parity with transformers: their shapes, weights, batches, and the two naming schemes.

Shared by the script that makes the goldens and by the tests. Nothing here imports torch or jax.
"""

import numpy as np

BASE = dict(
    vocab_size=64,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    num_experts=4,
    experts_per_token=2,
    rope_theta=1e6,
    sliding_window=0,
)
SHAPES = {
    "mixtral": BASE,
    "wide_heads": BASE
    | dict(
        vocab_size=80, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=16, d_ff=24, num_experts=8, rope_theta=1e4
    ),
    "window_top3": BASE
    | dict(vocab_size=50, num_kv_heads=4, d_ff=40, num_experts=6, experts_per_token=3, sliding_window=7),
}
# Compared live only, without stored goldens.
LIVE = SHAPES | {
    "one_key_head": BASE
    | dict(
        vocab_size=97, num_layers=2, d_model=64, num_heads=8, num_kv_heads=1, d_ff=80, num_experts=3, rope_theta=5e5
    ),
    "deep_top4_of_16": BASE
    | dict(num_layers=5, d_model=48, num_heads=3, num_kv_heads=3, head_dim=32, num_experts=16, experts_per_token=4),
    "narrow_window_top4_of_5": BASE
    | dict(d_ff=112, num_experts=5, experts_per_token=4, num_kv_heads=1, rope_theta=1e5, sliding_window=5),
}
ROWS, LENGTH, PADDED = 3, 24, 9  # the last row is PADDED tokens long, the rest of it is padding


def dimensions(shape: dict) -> dict[str, tuple[int, ...]]:
    """The parameters by our names."""
    s = shape
    l, d, n, g, h = s["num_layers"], s["d_model"], s["num_heads"], s["num_kv_heads"], s["head_dim"]
    f, e, v = s["d_ff"], s["num_experts"], s["vocab_size"]
    return {
        "embedding_VD": (v, d),
        "layers.attention_norm_D": (l, d),
        "layers.w_q_DNH": (l, d, n, h),
        "layers.w_k_DGH": (l, d, g, h),
        "layers.w_v_DGH": (l, d, g, h),
        "layers.w_o_NHD": (l, n, h, d),
        "layers.experts_norm_D": (l, d),
        "layers.w_router_DE": (l, d, e),
        "layers.w_gate_EDF": (l, e, d, f),
        "layers.w_up_EDF": (l, e, d, f),
        "layers.w_down_EFD": (l, e, f, d),
        "final_norm_D": (d,),
        "head_DV": (d, v),
    }


def weights(shape: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by our names. RandomState: its stream is frozen for ever. Large enough to route sharply."""
    rng = np.random.RandomState(seed)
    dims = dimensions(shape)
    norm = {name: 1.0 if "norm" in name else 0.0 for name in dims}
    return {name: (norm[name] + 0.2 * rng.standard_normal(size)).astype(np.float32) for name, size in dims.items()}


def batch(shape: dict) -> dict[str, np.ndarray]:
    """Tokens with right padding in the last row, and the mask of real tokens."""
    rng = np.random.RandomState(1)
    tokens = rng.randint(0, shape["vocab_size"], (ROWS, LENGTH))
    mask = np.ones((ROWS, LENGTH), np.int32)
    mask[-1, PADDED:] = 0
    return {"tokens": tokens.astype(np.int32), "mask": mask}


def to_hugging_face(ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our names to those of transformers 5 in memory (fused experts); all its matrices are [out, in]."""
    theirs = {
        "model.embed_tokens.weight": ours["embedding_VD"],
        "model.norm.weight": ours["final_norm_D"],
        "lm_head.weight": ours["head_DV"].T,
    }
    d = ours["embedding_VD"].shape[1]
    for i in range(ours["layers.w_router_DE"].shape[0]):
        layer = {name.removeprefix("layers."): a[i] for name, a in ours.items() if name.startswith("layers.")}
        gate_up_EDF = np.concatenate([layer["w_gate_EDF"], layer["w_up_EDF"]], axis=-1)
        named = {
            "input_layernorm.weight": layer["attention_norm_D"],
            "post_attention_layernorm.weight": layer["experts_norm_D"],
            "self_attn.q_proj.weight": layer["w_q_DNH"].reshape(d, -1).T,
            "self_attn.k_proj.weight": layer["w_k_DGH"].reshape(d, -1).T,
            "self_attn.v_proj.weight": layer["w_v_DGH"].reshape(d, -1).T,
            "self_attn.o_proj.weight": layer["w_o_NHD"].reshape(-1, d).T,
            "mlp.gate.weight": layer["w_router_DE"].T,
            "mlp.experts.gate_up_proj": gate_up_EDF.swapaxes(1, 2),
            "mlp.experts.down_proj": layer["w_down_EFD"].swapaxes(1, 2),
        }
        theirs |= {f"model.layers.{i}.{name}": a for name, a in named.items()}
    return theirs


def from_hugging_face(theirs: dict[str, np.ndarray], like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse, used on gradients; `like` gives names and shapes."""

    def stack(name):
        return np.stack([theirs[f"model.layers.{i}.{name}"] for i in range(like["layers.w_router_DE"].shape[0])])

    def linear(name):
        return stack(f"{name}.weight").swapaxes(1, 2)

    gate_up_LEDF = stack("mlp.experts.gate_up_proj").swapaxes(2, 3)
    gate, up = np.split(gate_up_LEDF, 2, axis=-1)
    ours = {
        "embedding_VD": theirs["model.embed_tokens.weight"],
        "final_norm_D": theirs["model.norm.weight"],
        "head_DV": theirs["lm_head.weight"].T,
        "layers.attention_norm_D": stack("input_layernorm.weight"),
        "layers.experts_norm_D": stack("post_attention_layernorm.weight"),
        "layers.w_q_DNH": linear("self_attn.q_proj"),
        "layers.w_k_DGH": linear("self_attn.k_proj"),
        "layers.w_v_DGH": linear("self_attn.v_proj"),
        "layers.w_o_NHD": linear("self_attn.o_proj"),
        "layers.w_router_DE": linear("mlp.gate"),
        "layers.w_gate_EDF": gate,
        "layers.w_up_EDF": up,
        "layers.w_down_EFD": stack("mlp.experts.down_proj").swapaxes(2, 3),
    }
    return {name: a.reshape(like[name].shape) for name, a in ours.items()}
