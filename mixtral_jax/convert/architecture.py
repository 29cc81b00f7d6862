"""The shape of a model: config.json of Hugging Face, params.json of Mistral, and our Config, each read and written."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.config import (
    Config,
    DataConfig,
    DpoConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    UserError,
    validate,
)
from mixtral_jax.convert.shards import read_json

DENSE = ("mistral", "llama")
# What a config.json may say and we have no code for, with the values that mean "off".
_OFF = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "hidden_act": ("silu", None),
    "pretraining_tp": (1, None),
}
# The part of ModelConfig that no file says: how we compute. Values of configs/common.py; a test keeps them equal.
COMPUTE = dict(
    init_std=0.02,
    router_bias=False,
    scan_layers=True,
    remat="full",
    attention="auto",
    dispatch="auto",
    buffer_factor=0.0,
    expert_backend="auto",
    expert_block=256,
)


def run_config(model: ModelConfig, balance_weight: float, tokenizer: str) -> Config:
    """The configuration stored with an imported checkpoint: its model, and the defaults of configs/common.py.

    The package cannot import configs; a test keeps these values equal to base()'s.

    Args:
        model: the architecture.
        balance_weight: weight of the per-layer balance loss, 1.0 at uniform routing.
        tokenizer: data.tokenizer.
    """
    config = Config(
        model=model,
        loss=LossConfig(
            balance_weight, "per_layer", router_z_weight=1e-3, z_weight=0.0, bias_update_rate=0.0, head_chunk=512
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=3e-4,
            schedule="warmup_cosine",
            warmup_steps=100,
            decay_steps=0,
            final_lr_ratio=0.1,
            weight_decay=0.1,
            decay_embeddings=False,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            clip_norm=1.0,
            moment_dtype="float32",
            freeze_router=False,
            offload=False,
        ),
        mesh=MeshConfig(data=1, fsdp=-1, expert=1, context=1, tensor=1),
        data=DataConfig(
            source="stdlib",
            path="",
            text_key="text",
            mixture=(),
            streaming=False,
            max_bad_rows=0,
            tokenizer=tokenizer,
            cache_dir="~/.cache/mixtral_jax",
            heldout_fraction=0.02,
            workers=2,
            packing=True,
        ),
        dpo=DpoConfig(
            loss="sigmoid", beta=0.1, label_smoothing=0.0, gamma=0.5, sft_weight=0.0, reference="precomputed"
        ),
        lora=LoraConfig(rank=0, alpha=16.0, targets=("attention", "experts")),
        train=TrainConfig(
            stage="pretrain",
            seed=0,
            steps=1000,
            batch_size=256,
            seq_len=min(4096, model.max_seq_len),
            accumulation_steps=1,
            log_every=10,
            eval_every=500,
            eval_batches=16,
            evals=(),
            sample_every=500,
            sample_prompts=("def ",),
            sample_tokens=64,
            checkpoint_every=500,
            checkpoints_to_keep=3,
            checkpoint_keep_every=0,
            keep_best=True,
            init_from="",
            skip_nonfinite=0,
            continue_on_save_error=False,
            wandb="",
        ),
    )
    validate(config)
    return config


class _Keys:
    """A JSON object whose keys are fetched with their type checked."""

    def __init__(self, path: Path):
        self.path, self.values = path, read_json(path)

    def number(self, key: str, default=None, kind=int):
        """A finite number; `moe.num_experts` is the key num_experts of the object moe."""
        value = self.values
        for part in key.split("."):
            value = value.get(part)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.path} has no {key}; take the config of the original model")
        finite = type(value) in (int, float) and abs(value) <= sys.float_info.max
        if not finite or (kind is int and value != int(value)):
            raise UserError(f"{self.path}: {key}={value!r}; it must be a finite number of type {kind.__name__}")
        return kind(value)


def read_hugging_face(folder: Path, dense_experts: tuple[int, int] | None = None) -> tuple[ModelConfig, float, bool]:
    """Reads config.json.

    Args:
        folder: the directory.
        dense_experts: (E, K) to make of a dense model, which is what is then expected; None: a Mixtral.

    Returns:
        the model (dtype float32: see `compute_dtype`), the balance weight in our convention, whether the head is tied.

    Raises:
        UserError: another architecture, or a feature that our model does not have.
    """
    keys = _Keys(folder / "config.json")
    values, path = keys.values, keys.path
    kinds = ("mixtral",) if dense_experts is None else DENSE
    if values.get("model_type") not in kinds:
        verb = "import reads mixtral" if dense_experts is None else "upcycle reads mistral and llama"
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}; {verb}")
    for key, allowed in _OFF.items():
        if values.get(key) not in allowed:
            raise UserError(f"{path}: {key}={values[key]!r} is not supported; expected {allowed[0]!r}")
    tied = bool(values.get("tie_word_embeddings", False))
    if tied and dense_experts is None:
        raise UserError(f"{path}: tie_word_embeddings=true; a Mixtral has a head of its own")
    heads, width = keys.number("num_attention_heads"), keys.number("hidden_size")
    if heads < 1:
        raise UserError(f"{path}: num_attention_heads={heads}; it must be at least 1")
    if dense_experts is None:
        experts, chosen = keys.number("num_local_experts"), keys.number("num_experts_per_tok")
        balance = keys.number("router_aux_loss_coef", 0.001, float) * chosen
    else:
        (experts, chosen), balance = dense_experts, 0.04
    model = ModelConfig(
        vocab_size=keys.number("vocab_size"),
        num_layers=keys.number("num_hidden_layers"),
        d_model=width,
        num_heads=heads,
        num_kv_heads=keys.number("num_key_value_heads", heads),
        head_dim=keys.number("head_dim", width // heads),
        d_ff=keys.number("intermediate_size"),
        num_experts=experts,
        experts_per_token=chosen,
        max_seq_len=keys.number("max_position_embeddings"),
        rope_theta=_rope_theta(keys, default=1e4 if values["model_type"] == "llama" else None),
        norm_eps=keys.number("rms_norm_eps", kind=float),
        sliding_window=keys.number("sliding_window", 0),
        dtype="float32",
        **COMPUTE,
    )
    return model, balance, tied


def _rope_theta(keys: _Keys, default: float | None) -> float:
    """Theta stands at the top level (older files), in rope_parameters (transformers 5), or in both."""
    place = "rope_parameters" if keys.values.get("rope_parameters") else "rope_scaling"
    inside = keys.values.get(place) or {}
    if not isinstance(inside, dict):
        raise UserError(f"{keys.path}: {place}={inside!r}; it must be an object")
    kind = inside.get("rope_type", inside.get("type", "default"))
    if kind != "default":
        raise UserError(f"{keys.path}: RoPE of type {kind!r} is not supported; Mixtral has the default one")
    holders = {"rope_theta": keys.values, f"{place}.rope_theta": inside}
    found = {keys.number(key, kind=float) for key, held in holders.items() if held.get("rope_theta") is not None}
    if len(found) > 1:
        raise UserError(f"{keys.path}: rope_theta is {sorted(found)} in two places; make them agree")
    if not found and default is None:
        raise UserError(f"{keys.path} has no rope_theta; add the one the model was trained with (Mixtral: 1000000.0)")
    return found.pop() if found else default


def read_mistral(folder: Path) -> tuple[ModelConfig, float, bool]:
    """Reads params.json; returns the same as `read_hugging_face`.

    Raises:
        UserError: a dense model, or keys missing.
    """
    keys = _Keys(folder / "params.json")
    moe = keys.values.get("moe")
    if not isinstance(moe, dict) or not {"num_experts", "num_experts_per_tok"} <= moe.keys():
        raise UserError(f"{keys.path} has no moe with num_experts and num_experts_per_tok; import reads a Mixtral")
    if keys.values.get("tied_embeddings"):
        raise UserError(f"{keys.path}: tied_embeddings=true; a Mixtral has a head of its own")
    model = ModelConfig(
        vocab_size=keys.number("vocab_size"),
        num_layers=keys.number("n_layers"),
        d_model=keys.number("dim"),
        num_heads=keys.number("n_heads"),
        num_kv_heads=keys.number("n_kv_heads"),
        head_dim=keys.number("head_dim"),
        d_ff=keys.number("hidden_dim"),
        num_experts=keys.number("moe.num_experts"),
        experts_per_token=keys.number("moe.num_experts_per_tok"),
        # Mixtral's own params.json leaves these three out: they are Mixtral's values.
        max_seq_len=keys.number("max_position_embeddings", keys.number("max_seq_len", 32768)),
        rope_theta=keys.number("rope_theta", 1e6, float),
        sliding_window=keys.number("sliding_window", 0),
        norm_eps=keys.number("norm_eps", kind=float),
        dtype="float32",
        **COMPUTE,
    )
    return model, 0.04, False


def compute_dtype(dtypes: set[np.dtype]) -> str:
    """The dtype to compute in that loses nothing of stored weights: bfloat16 for bfloat16, float32 for the others."""
    return "bfloat16" if {np.dtype(d).name for d in dtypes} == {"bfloat16"} else "float32"


def to_hugging_face(config: Config, dtype: str, bos_id: int, eos_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json.

    Both spellings of theta and dtype are written: transformers 5 reads rope_parameters and dtype, older ones the others.

    Args:
        config: of the run.
        dtype: of the tensors.
        bos_id, eos_id: the tokenizer's.
    """
    m = config.model
    balance = config.loss.balance_weight
    if config.loss.balance_mode == "per_layer":
        balance = _shortest(balance / m.experts_per_token)
    values = {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "dtype": dtype,
        "eos_token_id": eos_id,
        "head_dim": m.head_dim,
        "hidden_act": "silu",
        "hidden_size": m.d_model,
        "initializer_range": m.init_std,
        "intermediate_size": m.d_ff,
        "max_position_embeddings": m.max_seq_len,
        "model_type": "mixtral",
        "num_attention_heads": m.num_heads,
        "num_experts_per_tok": m.experts_per_token,
        "num_hidden_layers": m.num_layers,
        "num_key_value_heads": m.num_kv_heads,
        "num_local_experts": m.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": m.norm_eps,
        "rope_parameters": {"rope_theta": m.rope_theta, "rope_type": "default"},
        "rope_theta": m.rope_theta,
        "router_aux_loss_coef": balance,
        "router_jitter_noise": 0.0,
        "sliding_window": m.sliding_window or None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": m.vocab_size,
    }
    generation = {"_from_model_config": True, "bos_token_id": bos_id, "eos_token_id": eos_id}
    return values, generation


def _shortest(value: float) -> float:
    """0.04 * 2 / 2 must not become 0.039999999999999994."""
    return float(f"{value:.12g}") if math.isfinite(value) else value
