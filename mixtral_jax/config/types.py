"""The typed configuration: frozen dataclasses with the keys of configs/common.py, and the two kinds of error."""

import dataclasses
import json
import typing
from typing import Any, Literal

SPLASH_BLOCK = 128  # rows of the TPU's attention kernel come in multiples of it
AXES = ("data", "fsdp", "expert", "context", "tensor")


class UserError(ValueError):
    """A mistake of the user's, explained in its message; programs print it without a stack trace and exit with 2."""


class RunError(RuntimeError):
    """A fault of the run itself, explained in its message; programs print it without a stack trace and exit with `status`."""

    status = 1


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a Mixtral (arXiv 2401.04088, Table 1). Letters: see docs/design.md."""

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    num_experts: int
    experts_per_token: int
    max_seq_len: int
    rope_theta: float
    norm_eps: float
    sliding_window: int
    init_std: float
    router_bias: bool
    dtype: Literal["float32", "bfloat16"]
    scan_layers: bool
    remat: Literal["none", "outputs", "dots", "full", "offload"]
    attention: Literal["auto", "plain", "chunked", "cudnn", "splash"]
    dispatch: Literal["auto", "ring", "ragged"]
    buffer_factor: float
    expert_backend: Literal["auto", "blocks", "dense", "megablox", "tokamax"]
    expert_block: int


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms and the size of the head's chunks."""

    balance_weight: float
    balance_mode: Literal["per_layer", "huggingface"]
    router_z_weight: float
    z_weight: float
    bias_update_rate: float
    head_chunk: int


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and clipping."""

    name: Literal["adamw", "muon", "adafactor"]
    learning_rate: float
    schedule: Literal["warmup_cosine", "warmup_stable_decay", "constant"]
    warmup_steps: int
    decay_steps: int
    final_lr_ratio: float
    weight_decay: float
    decay_embeddings: bool
    b1: float
    b2: float
    eps: float
    clip_norm: float
    moment_dtype: Literal["float32", "bfloat16"]
    freeze_router: bool
    offload: bool


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, "what is left of the devices"."""

    data: int
    fsdp: int
    expert: int
    context: int
    tensor: int

    @property
    def batch_shards(self) -> int:
        """How many ways the batch is split: over data, fsdp and expert."""
        return self.data * self.fsdp * self.expert


SourceKind = Literal["stdlib", "text", "jsonl", "parquet", "arrow", "hub"]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of text. In data.mixture only `source` and `weight` must be given."""

    source: SourceKind
    path: str
    text_key: str
    name: str  # how reports call it
    weight: float  # its share of the rows, relative to the other sources'


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: SourceKind
    path: str
    text_key: str
    mixture: tuple[SourceConfig, ...]
    streaming: bool
    max_bad_rows: int
    tokenizer: str
    cache_dir: str
    heldout_fraction: float
    workers: int
    packing: bool

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of text: those of data.mixture, or the one of data.source."""
        return self.mixture or (SourceConfig(self.source, self.path, self.text_key, self.source, 1.0),)


PreferenceLoss = Literal["sigmoid", "robust", "ipo", "hinge", "sigmoid_norm", "simpo", "apo_zero"]


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimization (arXiv 2305.18290) and its relatives; read in the stage dpo only."""

    loss: PreferenceLoss
    beta: float
    label_smoothing: float
    gamma: float
    sft_weight: float
    reference: Literal["precomputed", "on_the_fly"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) on a frozen base; rank 0 trains all weights."""

    rank: int
    alpha: float
    targets: tuple[Literal["attention", "experts", "router"], ...]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch and rhythm of a run."""

    stage: Literal["pretrain", "sft", "dpo"]
    seed: int
    steps: int
    batch_size: int
    seq_len: int
    accumulation_steps: int
    log_every: int
    eval_every: int
    eval_batches: int
    evals: tuple[str, ...]
    sample_every: int
    sample_prompts: tuple[str, ...]
    sample_tokens: int
    checkpoint_every: int
    checkpoints_to_keep: int
    checkpoint_keep_every: int
    keep_best: bool
    init_from: str
    skip_nonfinite: int
    continue_on_save_error: bool
    wandb: str

    def evals_every(self) -> dict[str, int]:
        """`evals` as {evaluation: every how many steps}.

        Raises:
            UserError: an item is no NAME@STEPS, or a name comes twice.
        """
        found: dict[str, int] = {}
        for item in self.evals:
            name, _, steps = item.partition("@")
            if not name or not steps.isdecimal() or int(steps) < 1 or name in found:
                raise UserError(
                    f"train.evals={self.evals}: {item!r} is no NAME@STEPS, or a second one of that name; write routing@1000"
                )
            found[name] = int(steps)
        return found


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    mesh: MeshConfig
    data: DataConfig
    dpo: DpoConfig
    lora: LoraConfig
    train: TrainConfig

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the nested plain dict that is stored as JSON with a run: lists, not tuples."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def key_list() -> list[str]:
    """Returns all configuration keys as `group.key`, in order; a test freezes them."""
    groups = typing.get_type_hints(Config)
    return [f"{group}.{key}" for group, cls in groups.items() for key in typing.get_type_hints(cls)]
