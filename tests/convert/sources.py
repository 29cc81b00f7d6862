"""Small models as the directories that others publish, made from reference.py's weights without torch."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from mixtral_jax.data.tokenizer import load_tokenizer
from tests.golden import reference

FUSED = "mlp.experts."


def config_json(shape: dict, **changes) -> dict:
    """A config.json as transformers 4 wrote it."""
    return {
        "model_type": "mixtral",
        "vocab_size": shape["vocab_size"],
        "num_hidden_layers": shape["num_layers"],
        "hidden_size": shape["d_model"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
        "head_dim": shape["head_dim"],
        "intermediate_size": shape["d_ff"],
        "num_local_experts": shape["num_experts"],
        "num_experts_per_tok": shape["experts_per_token"],
        "max_position_embeddings": 128,
        "rope_theta": shape["rope_theta"],
        "rms_norm_eps": 1e-5,
        "sliding_window": shape["sliding_window"] or None,
        "hidden_act": "silu",
        "router_aux_loss_coef": 0.02,
        "tie_word_embeddings": False,
    } | changes


def tensors(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names and shapes in Hugging Face's files. Written apart from convert/layout.py, which it is to check."""
    named = reference.to_hugging_face(weights)
    out = {}
    for name, array in named.items():
        if FUSED not in name:
            out[name.replace("mlp.gate.", "block_sparse_moe.gate.")] = array
            continue
        layer = name.partition(FUSED)[0] + "block_sparse_moe.experts."
        for e, matrix in enumerate(array):
            if name.endswith("gate_up_proj"):
                out[f"{layer}{e}.w1.weight"], out[f"{layer}{e}.w3.weight"] = np.split(matrix, 2)
            else:
                out[f"{layer}{e}.w2.weight"] = matrix
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def mistral_tensors(weights: dict[str, np.ndarray], shape: dict) -> dict[str, np.ndarray]:
    """The same in Mistral's names, heads' rows interleaved for its RoPE."""
    renames = [
        ("model.embed_tokens", "tok_embeddings"),
        ("model.norm", "norm"),
        ("lm_head", "output"),
        ("model.layers", "layers"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("block_sparse_moe", "feed_forward"),
        *((f"self_attn.{c}_proj", f"attention.w{c}") for c in "qkvo"),
    ]
    out = {}
    for name, array in tensors(weights).items():
        if "q_proj" in name or "k_proj" in name:
            heads = array.reshape(-1, shape["head_dim"], shape["d_model"])
            half = shape["head_dim"] // 2
            mixed = np.empty_like(heads)
            mixed[:, 0::2], mixed[:, 1::2] = heads[:, :half], heads[:, half:]
            array = mixed.reshape(array.shape)
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        out[name] = array
    return out


def write(folder: Path, arrays: dict[str, np.ndarray], config: dict, shards: int = 3, dtype="float32") -> Path:
    """Writes a Hugging Face directory with an index (one shard: without)."""
    folder.mkdir(parents=True)
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype]
    names = list(arrays)
    where = {}
    for k in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: arrays[name].astype(kind) for name in names[k::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(a.size for a in arrays.values()) * np.dtype(kind).itemsize
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}))
    return folder


def mixtral(folder: Path, name: str = "mixtral", shards: int = 3, dtype="float32", **changes) -> Path:
    """One of reference.py's Mixtrals as a Hugging Face directory."""
    shape = reference.SHAPES[name]
    return write(folder, tensors(reference.weights(shape)), config_json(shape, **changes), shards, dtype)


def read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, by safetensors' own reader."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        out |= load_file(path)
    return out


def dense(folder: Path, kind: str = "mistral") -> tuple[Path, dict[str, np.ndarray], dict]:
    """A dense model; returns the directory, its tensors and its config."""
    shape = reference.BASE | dict(num_experts=1, experts_per_token=1)
    arrays = {}
    for name, array in tensors(reference.weights(shape)).items():
        for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            name = name.replace(f"block_sparse_moe.experts.0.{ours}", f"mlp.{theirs}")
        if "block_sparse_moe" not in name:
            arrays[name] = array
    config = config_json(shape, model_type=kind)
    for key in ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"):
        del config[key]
    return write(folder, arrays, config, shards=2), arrays, config


def tokenizer_bytes(folder: Path) -> bytes:
    """Mixtral's own SentencePiece model."""
    load_tokenizer("mistral-v1", "").save(folder)
    return (folder / "tokenizer.model").read_bytes()
