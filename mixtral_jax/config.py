"""The typed configuration. A ConfigDict becomes frozen dataclasses here, once, and every mistake is explained here.

Nothing in this file touches a device: a bad configuration is refused before anything is allocated.
"""

import dataclasses
import difflib
import json
import math
import typing
from typing import Any, Literal

from ml_collections import ConfigDict

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


def from_config_dict(config: ConfigDict | dict) -> Config:
    """Converts a ConfigDict (or the dict of a stored run) to the typed Config and validates it.

    Raises:
        UserError: an unknown or missing key, a wrong type, or values that contradict each other.
    """
    plain = config.to_dict() if isinstance(config, ConfigDict) else config
    typed = _convert(Config, plain, "")
    validate(typed)
    return typed


def _convert(cls, values: Any, prefix: str):
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the configuration'} is {values!r}; it must be a group of keys")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(hints)}"
            raise UserError(f"unknown key {prefix}{key}; {hint}")
    missing = [prefix + key for key in hints if key not in values]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; start from configs/common.py:base(), which has every key")
    return cls(**{key: _value(kind, values[key], prefix + key) for key, kind in hints.items()})


def _value(kind, value: Any, name: str):
    if kind is SourceConfig and isinstance(value, dict):
        # Written by hand as an item of a tuple, where no ConfigDict holds defaults.
        value = {"path": "", "text_key": "text", "name": value.get("path") or value.get("source"), **value}
    if dataclasses.is_dataclass(kind):
        return _convert(kind, value, name + ".")
    if typing.get_origin(kind) is Literal:
        options = typing.get_args(kind)
        if value not in options:
            raise UserError(f"{name}={value!r}; choose one of {', '.join(options)}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple | list):
            raise UserError(f"{name}={value!r} is of type {type(value).__name__}; it must be a tuple")
        item = typing.get_args(kind)[0]
        return tuple(_value(item, one, f"{name}[{i}]") for i, one in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value}; it must be a finite number")
    if type(value) is not kind:
        raise UserError(f"{name}={value!r} is of type {type(value).__name__}; it must be {kind.__name__}")
    return value


def _require(ok: bool, message: str):
    if not ok:
        raise UserError(message)


def divisors(n: int, limit: int = 64) -> str:
    """Lists the divisors of n up to a limit, for error messages."""
    return ", ".join(str(d) for d in range(1, min(n, limit) + 1) if n % d == 0)


def _divisible(name: str, value: int, by_name: str, by: int):
    if value % by:
        up, down = value + by - value % by, value - value % by
        fix = f"{down} or {up}" if down else f"{up}"
        raise UserError(
            f"{name}={value} is not divisible by {by_name}={by}; set {name} to {fix}, or {by_name} to one of {divisors(value)}"
        )


def validate(config: Config) -> None:
    """Checks everything that does not need the number of devices.

    Raises:
        UserError: naming the keys, both numbers and the fix.
    """
    _validate_ranges(config)
    _validate_model(config)
    _validate_optim(config.optim, config.train.steps)
    _validate_tuning(config)
    data, train = config.data, config.train
    _require(train.seed < 2**32, f"train.seed={train.seed}; seeds from 2**32 = {2**32} on repeat smaller ones")
    _require(
        train.sample_tokens < config.model.max_seq_len,
        f"train.sample_tokens={train.sample_tokens} leaves no room for a prompt in model.max_seq_len={config.model.max_seq_len}; lower it",
    )
    _divisible("train.batch_size", train.batch_size, "train.accumulation_steps", train.accumulation_steps)
    _require(
        0 < data.heldout_fraction < 1,
        f"data.heldout_fraction={data.heldout_fraction}; it must lie between 0 and 1, so that there is text to train on and to evaluate on",
    )
    _validate_sources(data)
    _require(
        data.tokenizer != "",
        "data.tokenizer is empty; use mistral-v1, bytes, stdlib:SIZE or the path of a SentencePiece model",
    )


def _validate_sources(data: DataConfig) -> None:
    _require(
        not (data.mixture and data.path),
        f"data.path={data.path!r} beside data.mixture; put the path into one of the mixture's items, or empty data.mixture",
    )
    for i, source in enumerate(data.sources):
        where = f"data.mixture[{i}]." if data.mixture else "data."
        needs = "a data set's name" if source.source == "hub" else "paths or globs separated by commas"
        _require(
            source.source == "stdlib" or source.path != "",
            f"{where}source={source.source} needs {where}path; set it to {needs}",
        )
        _require(source.weight > 0, f"{where}weight={source.weight}; it must be positive, or leave the source out")
    names = [source.name for source in data.sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    _require(not twice, f"data.mixture has more than one source named {', '.join(twice)}; give each a name of its own")


def _validate_ranges(config: Config) -> None:
    for group, keys in (
        (
            "model",
            "vocab_size num_layers d_model num_heads num_kv_heads head_dim d_ff num_experts experts_per_token max_seq_len expert_block",
        ),
        ("loss", "head_chunk"),
        (
            "train",
            "steps batch_size seq_len accumulation_steps log_every eval_batches sample_tokens checkpoints_to_keep",
        ),
        ("data", "workers"),
    ):
        for key in keys.split():
            value = getattr(getattr(config, group), key)
            _require(value >= 1, f"{group}.{key}={value}; it must be at least 1")
    for group, keys in (
        ("model", "sliding_window init_std norm_eps buffer_factor"),
        ("loss", "balance_weight router_z_weight z_weight bias_update_rate"),
        ("optim", "learning_rate warmup_steps decay_steps final_lr_ratio weight_decay eps clip_norm"),
        ("data", "max_bad_rows"),
        ("dpo", "gamma sft_weight"),
        ("lora", "rank"),
        ("train", "seed eval_every sample_every checkpoint_every checkpoint_keep_every skip_nonfinite"),
    ):
        for key in keys.split():
            value = getattr(getattr(config, group), key)
            _require(value >= 0, f"{group}.{key}={value}; it must not be negative")


def _validate_model(config: Config) -> None:
    model, loss, train = config.model, config.loss, config.train
    _divisible("model.num_heads", model.num_heads, "model.num_kv_heads", model.num_kv_heads)
    _require(model.head_dim % 2 == 0, f"model.head_dim={model.head_dim} is odd; RoPE turns pairs, so make it even")
    _require(
        model.experts_per_token <= model.num_experts,
        f"model.experts_per_token={model.experts_per_token} exceeds model.num_experts={model.num_experts}; lower the first or raise the second",
    )
    _require(
        model.buffer_factor == 0 or model.dispatch != "ring",
        f"model.buffer_factor={model.buffer_factor} with model.dispatch=ring, which has no such buffer and drops nothing; set the "
        "factor to 0, or model.dispatch=ragged",
    )
    _require(
        model.attention != "cudnn" or model.dtype == "bfloat16",
        f"model.attention=cudnn with model.dtype={model.dtype}; cuDNN has no float32, set model.dtype=bfloat16 or model.attention=chunked",
    )
    _require(
        model.attention != "splash" or model.head_dim % SPLASH_BLOCK == 0,
        f"model.attention=splash with model.head_dim={model.head_dim}; its lanes are {SPLASH_BLOCK} wide: set model.head_dim to a multiple, or model.attention=chunked",
    )
    _require(model.rope_theta > 0, f"model.rope_theta={model.rope_theta}; it must be positive (Mixtral: 1e6)")
    _require(
        train.seq_len <= model.max_seq_len,
        f"train.seq_len={train.seq_len} exceeds model.max_seq_len={model.max_seq_len}; lower the first or raise the second",
    )
    _require(
        loss.bias_update_rate == 0 or model.router_bias,
        f"loss.bias_update_rate={loss.bias_update_rate} has no bias to update; set model.router_bias=True or the rate to 0",
    )


def _validate_optim(optim: OptimConfig, steps: int) -> None:
    for key in ("b1", "b2"):
        value = getattr(optim, key)
        _require(0 <= value < 1, f"optim.{key}={value}; it must lie in [0, 1)")
    _require(
        optim.final_lr_ratio <= 1,
        f"optim.final_lr_ratio={optim.final_lr_ratio} exceeds 1; it is the last learning rate over the peak",
    )
    if optim.schedule != "constant":
        decay = optim.decay_steps if optim.schedule == "warmup_stable_decay" else 0
        _require(
            optim.warmup_steps + decay <= steps,
            f"optim.warmup_steps={optim.warmup_steps} plus optim.decay_steps={decay} exceed train.steps={steps}; shorten them or train longer",
        )
        _require(
            optim.schedule != "warmup_stable_decay" or optim.decay_steps > 0,
            "optim.decay_steps=0 leaves warmup_stable_decay without its decay; set it to about a tenth of train.steps",
        )
    if optim.moment_dtype == "bfloat16":
        _require(
            optim.name != "adafactor",
            "optim.moment_dtype=bfloat16: adafactor's moments are small; set it to float32",
        )
        for key in ("b1", "b2"):
            # bfloat16 keeps 8 bits: with 1 - beta under 2^-8, beta * m rounds back to m, and a large moment never shrinks.
            beta = getattr(optim, key)
            _require(
                1.0 - beta >= 2.0**-8,
                f"optim.{key}={beta} cannot decay a bfloat16 moment; lower it to 0.996 or set optim.moment_dtype=float32",
            )


def _validate_tuning(config: Config) -> None:
    """Checks what belongs to SFT, DPO and LoRA."""
    dpo, lora, optim, train = config.dpo, config.lora, config.optim, config.train
    tuning = train.stage != "pretrain"
    _require(
        not (tuning and config.data.streaming),
        f"data.streaming=True with train.stage={train.stage}; conversations are packed whole: set data.streaming=False",
    )
    smoothing = dpo.label_smoothing
    _require(
        0 <= smoothing < 0.5,
        f"dpo.label_smoothing={smoothing}; it is the share of pairs labelled wrongly and must be at least 0 and less than 0.5",
    )
    _require(
        smoothing == 0 or dpo.loss in ("sigmoid", "robust"),
        f"dpo.label_smoothing={smoothing} with dpo.loss={dpo.loss}, which has none; set it to 0, or dpo.loss=sigmoid or robust",
    )
    _require(dpo.beta > 0, f"dpo.beta={dpo.beta}; it must be positive (0.1 is usual)")
    _require(lora.rank == 0 or lora.alpha > 0, f"lora.alpha={lora.alpha}; it must be positive (16 is usual)")
    _require(lora.rank == 0 or lora.targets != (), "lora.targets is empty; name attention, experts or router")
    twice = sorted({target for target in lora.targets if lora.targets.count(target) > 1})
    _require(not twice, f"lora.targets names {', '.join(twice)} twice; name each once")
    _require(
        lora.rank == 0 or config.loss.bias_update_rate == 0,
        f"loss.bias_update_rate={config.loss.bias_update_rate} with lora.rank={lora.rank}: the base is frozen, its router_bias too; set the rate to 0",
    )
    _require(
        not (optim.freeze_router and lora.rank and "router" in lora.targets),
        "optim.freeze_router=True with router in lora.targets; leave one of them out",
    )
    _require(
        not (optim.freeze_router and config.loss.bias_update_rate),
        f"optim.freeze_router=True with loss.bias_update_rate={config.loss.bias_update_rate}, which moves the routers; set the rate to 0",
    )
    _require(
        train.sample_every == 0 or train.sample_prompts != (),
        "train.sample_prompts is empty; name one, or set train.sample_every=0",
    )


def resolve_mesh(config: Config, num_devices: int) -> Config:
    """Fills in the mesh's -1 and checks all that depends on the number of devices.

    Args:
        config: a validated configuration.
        num_devices: devices of all processes together.

    Returns:
        The same configuration with every mesh axis positive.

    Raises:
        UserError: the mesh does not fit the devices, or a dimension does not divide by its axes.
    """
    sizes = dataclasses.asdict(config.mesh)
    unknown = [axis for axis, size in sizes.items() if size == -1]
    bad = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    _require(not bad, f"{', '.join(bad)}; an axis has a positive size, or -1 for what is left of the devices")
    _require(len(unknown) <= 1, f"mesh.{' and mesh.'.join(unknown)} are both -1; only one axis can take what is left")
    known = 1
    for size in sizes.values():
        known *= size if size > 0 else 1
    shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if unknown:
        _require(
            num_devices % known == 0,
            f"the mesh ({shape}) needs a multiple of {known} devices and there are {num_devices}; lower an axis to a divisor of {num_devices}",
        )
        sizes[unknown[0]] = num_devices // known
    else:
        _require(
            known == num_devices,
            f"the mesh ({shape}) needs {known} devices and there are {num_devices}; set one axis to -1 to fill in what is left",
        )
    mesh = MeshConfig(**sizes)
    model, train = config.model, config.train
    _resolve_context(config, mesh.context)
    _divisible("model.num_experts", model.num_experts, "mesh.expert", mesh.expert)
    _divisible("model.d_model", model.d_model, "mesh.fsdp", mesh.fsdp)
    _divisible("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", mesh.tensor)
    _divisible("model.d_ff", model.d_ff, "mesh.tensor", mesh.tensor)
    _divisible("model.vocab_size", model.vocab_size, "mesh.tensor * mesh.fsdp", mesh.tensor * mesh.fsdp)
    micro = train.batch_size // train.accumulation_steps
    if micro % mesh.batch_shards:
        need = mesh.batch_shards * train.accumulation_steps
        raise UserError(
            f"train.batch_size={train.batch_size} over train.accumulation_steps={train.accumulation_steps} is {micro} sequences, not divisible by "
            f"mesh data x fsdp x expert = {mesh.batch_shards} batch shards; set train.batch_size to a multiple of {need}"
        )
    return dataclasses.replace(config, mesh=mesh)


def _resolve_context(config: Config, context: int) -> None:
    """Checks the length of rows against mesh.context and the attention that is chosen by name."""
    model, train = config.model, config.train
    block = SPLASH_BLOCK if model.attention == "splash" else 1
    pieces = block * (2 * context if context > 1 else 1)
    of = " * ".join([str(block)] * (block > 1) + ["2", "mesh.context"] * (context > 1))
    if train.seq_len % pieces:
        down, up = train.seq_len // pieces * pieces, -(-train.seq_len // pieces) * pieces
        raise UserError(
            f"train.seq_len={train.seq_len} is not divisible by {of} = {pieces} (model.attention={model.attention}, "
            f"mesh.context={context}); set train.seq_len to {f'{down} or {up}' if down else up}, or mesh.context=1 "
            f"with model.attention=chunked"
        )
    _require(
        model.attention != "cudnn" or context == 1,
        f"model.attention=cudnn with mesh.context={context}: cuDNN's packing takes whole rows; set mesh.context=1, or "
        "model.attention=chunked",
    )


def key_list() -> list[str]:
    """Returns all configuration keys as `group.key`, in order; a test freezes them."""
    groups = typing.get_type_hints(Config)
    return [f"{group}.{key}" for group, cls in groups.items() for key in typing.get_type_hints(cls)]
