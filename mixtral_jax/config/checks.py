"""What makes no sense is refused here, naming the keys, both numbers and the fix; nothing here touches a device."""

from mixtral_jax.config.types import SPLASH_BLOCK, Config, DataConfig, OptimConfig, UserError


def require(ok: bool, message: str) -> None:
    """Raises UserError with the message unless it is so."""
    if not ok:
        raise UserError(message)


def divisors(n: int, limit: int = 64) -> str:
    """Lists the divisors of n up to a limit, for error messages."""
    return ", ".join(str(d) for d in range(1, min(n, limit) + 1) if n % d == 0)


def divisible(name: str, value: int, by_name: str, by: int) -> None:
    """Raises UserError, with the nearest values that fit, unless `value` divides by `by`."""
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
    require(train.seed < 2**32, f"train.seed={train.seed}; seeds from 2**32 = {2**32} on repeat smaller ones")
    require(
        train.sample_tokens < config.model.max_seq_len,
        f"train.sample_tokens={train.sample_tokens} leaves no room for a prompt in model.max_seq_len={config.model.max_seq_len}; lower it",
    )
    divisible("train.batch_size", train.batch_size, "train.accumulation_steps", train.accumulation_steps)
    require(
        0 < data.heldout_fraction < 1,
        f"data.heldout_fraction={data.heldout_fraction}; it must lie between 0 and 1, so that there is text to train on and to evaluate on",
    )
    _validate_sources(data)
    require(
        data.tokenizer != "",
        "data.tokenizer is empty; use mistral-v1, bytes, stdlib:SIZE or the path of a SentencePiece model",
    )


def _validate_sources(data: DataConfig) -> None:
    require(
        not (data.mixture and data.path),
        f"data.path={data.path!r} beside data.mixture; put the path into one of the mixture's items, or empty data.mixture",
    )
    for i, source in enumerate(data.sources):
        where = f"data.mixture[{i}]." if data.mixture else "data."
        needs = "a data set's name" if source.source == "hub" else "paths or globs separated by commas"
        require(
            source.source == "stdlib" or source.path != "",
            f"{where}source={source.source} needs {where}path; set it to {needs}",
        )
        require(source.weight > 0, f"{where}weight={source.weight}; it must be positive, or leave the source out")
    names = [source.name for source in data.sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"data.mixture has more than one source named {', '.join(twice)}; give each a name of its own")


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
            require(value >= 1, f"{group}.{key}={value}; it must be at least 1")
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
            require(value >= 0, f"{group}.{key}={value}; it must not be negative")


def _validate_model(config: Config) -> None:
    model, loss, train = config.model, config.loss, config.train
    divisible("model.num_heads", model.num_heads, "model.num_kv_heads", model.num_kv_heads)
    require(model.head_dim % 2 == 0, f"model.head_dim={model.head_dim} is odd; RoPE turns pairs, so make it even")
    require(
        model.experts_per_token <= model.num_experts,
        f"model.experts_per_token={model.experts_per_token} exceeds model.num_experts={model.num_experts}; lower the first or raise the second",
    )
    require(
        model.buffer_factor == 0 or model.dispatch != "ring",
        f"model.buffer_factor={model.buffer_factor} with model.dispatch=ring, which has no such buffer and drops nothing; set the "
        "factor to 0, or model.dispatch=ragged",
    )
    require(
        model.attention != "cudnn" or model.dtype == "bfloat16",
        f"model.attention=cudnn with model.dtype={model.dtype}; cuDNN has no float32, set model.dtype=bfloat16 or model.attention=chunked",
    )
    require(
        model.attention != "splash" or model.head_dim % SPLASH_BLOCK == 0,
        f"model.attention=splash with model.head_dim={model.head_dim}; its lanes are {SPLASH_BLOCK} wide: set model.head_dim to a multiple, or model.attention=chunked",
    )
    require(model.rope_theta > 0, f"model.rope_theta={model.rope_theta}; it must be positive (Mixtral: 1e6)")
    require(
        train.seq_len <= model.max_seq_len,
        f"train.seq_len={train.seq_len} exceeds model.max_seq_len={model.max_seq_len}; lower the first or raise the second",
    )
    require(
        loss.bias_update_rate == 0 or model.router_bias,
        f"loss.bias_update_rate={loss.bias_update_rate} has no bias to update; set model.router_bias=True or the rate to 0",
    )


def _validate_optim(optim: OptimConfig, steps: int) -> None:
    for key in ("b1", "b2"):
        value = getattr(optim, key)
        require(0 <= value < 1, f"optim.{key}={value}; it must lie in [0, 1)")
    require(
        optim.final_lr_ratio <= 1,
        f"optim.final_lr_ratio={optim.final_lr_ratio} exceeds 1; it is the last learning rate over the peak",
    )
    if optim.schedule != "constant":
        decay = optim.decay_steps if optim.schedule == "warmup_stable_decay" else 0
        require(
            optim.warmup_steps + decay <= steps,
            f"optim.warmup_steps={optim.warmup_steps} plus optim.decay_steps={decay} exceed train.steps={steps}; shorten them or train longer",
        )
        require(
            optim.schedule != "warmup_stable_decay" or optim.decay_steps > 0,
            "optim.decay_steps=0 leaves warmup_stable_decay without its decay; set it to about a tenth of train.steps",
        )
    if optim.moment_dtype == "bfloat16":
        require(
            optim.name != "adafactor",
            "optim.moment_dtype=bfloat16: adafactor's moments are small; set it to float32",
        )
        for key in ("b1", "b2"):
            # bfloat16 keeps 8 bits: with 1 - beta under 2^-8, beta * m rounds back to m, and a large moment never shrinks.
            beta = getattr(optim, key)
            require(
                1.0 - beta >= 2.0**-8,
                f"optim.{key}={beta} cannot decay a bfloat16 moment; lower it to 0.996 or set optim.moment_dtype=float32",
            )


def _validate_tuning(config: Config) -> None:
    """Checks what belongs to SFT, DPO and LoRA."""
    dpo, lora, optim, train = config.dpo, config.lora, config.optim, config.train
    tuning = train.stage != "pretrain"
    require(
        not (tuning and config.data.streaming),
        f"data.streaming=True with train.stage={train.stage}; conversations are packed whole: set data.streaming=False",
    )
    smoothing = dpo.label_smoothing
    require(
        0 <= smoothing < 0.5,
        f"dpo.label_smoothing={smoothing}; it is the share of pairs labelled wrongly and must be at least 0 and less than 0.5",
    )
    require(
        smoothing == 0 or dpo.loss in ("sigmoid", "robust"),
        f"dpo.label_smoothing={smoothing} with dpo.loss={dpo.loss}, which has none; set it to 0, or dpo.loss=sigmoid or robust",
    )
    require(dpo.beta > 0, f"dpo.beta={dpo.beta}; it must be positive (0.1 is usual)")
    require(lora.rank == 0 or lora.alpha > 0, f"lora.alpha={lora.alpha}; it must be positive (16 is usual)")
    require(lora.rank == 0 or lora.targets != (), "lora.targets is empty; name attention, experts or router")
    twice = sorted({target for target in lora.targets if lora.targets.count(target) > 1})
    require(not twice, f"lora.targets names {', '.join(twice)} twice; name each once")
    require(
        lora.rank == 0 or config.loss.bias_update_rate == 0,
        f"loss.bias_update_rate={config.loss.bias_update_rate} with lora.rank={lora.rank}: the base is frozen, its router_bias too; set the rate to 0",
    )
    require(
        not (optim.freeze_router and lora.rank and "router" in lora.targets),
        "optim.freeze_router=True with router in lora.targets; leave one of them out",
    )
    require(
        not (optim.freeze_router and config.loss.bias_update_rate),
        f"optim.freeze_router=True with loss.bias_update_rate={config.loss.bias_update_rate}, which moves the routers; set the rate to 0",
    )
    train.evals_every()
    require(
        train.sample_every == 0 or train.sample_prompts != (),
        "train.sample_prompts is empty; name one, or set train.sample_every=0",
    )
