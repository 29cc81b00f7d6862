"""Every configuration key with its default, and the parser for a config's argument. Imports nothing from the package."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """Returns a ConfigDict that holds every key there is; a config file changes values and never adds keys."""
    c = ConfigDict()
    c.model = ConfigDict(
        dict(
            vocab_size=32000,  # V
            num_layers=32,  # L
            d_model=4096,  # D
            num_heads=32,  # N, query heads
            num_kv_heads=8,  # G, key/value heads
            head_dim=128,  # H
            d_ff=14336,  # F, hidden width of one expert
            num_experts=8,  # E
            experts_per_token=2,  # K
            max_seq_len=32768,  # the longest sequence RoPE is meant for
            rope_theta=1e6,
            norm_eps=1e-5,
            sliding_window=0,  # a query sees this many latest tokens; 0: all
            init_std=0.02,
            router_bias=False,  # a per-expert bias that only steers the choice (aux-loss-free balancing)
            dtype="bfloat16",  # activations and matmuls; weights, router, norms and loss stay float32
            scan_layers=True,  # one compiled layer body; False unrolls
            remat="full",  # none | outputs | dots | full: what the backward pass recomputes; offload: outputs, on the host
            attention="auto",  # plain (the oracle) | chunked | cudnn (GPU) | splash (TPU); auto: the platform's
            dispatch="auto",  # how tokens reach experts: ring | ragged; auto: the platform's
            buffer_factor=0.0,  # rows a device may receive over its even share, ragged only; 0: all, nothing is dropped
            expert_backend="auto",  # blocks | dense (the oracle: E / K times the work) | megablox (TPU) | tokamax (GPU)
            expert_block=256,  # rows in one block of the blocks backend
        )
    )
    c.loss = ConfigDict(
        dict(
            balance_weight=0.04,  # load balance, per layer, 1.0 at uniform routing; a Hugging Face weight c is 2c here
            balance_mode="per_layer",  # per_layer | huggingface (pools the layers; 2.0 at uniform routing)
            router_z_weight=1e-3,
            z_weight=0.0,  # final-logit z-loss
            bias_update_rate=0.0,  # step of model.router_bias once per optimizer step
            head_chunk=512,  # positions whose logits exist at the same time
        )
    )
    c.optim = ConfigDict(
        dict(
            name="adamw",  # adamw | muon | adafactor
            learning_rate=3e-4,
            schedule="warmup_cosine",  # warmup_cosine | warmup_stable_decay | constant
            warmup_steps=100,
            decay_steps=0,  # length of the decay in warmup_stable_decay
            final_lr_ratio=0.1,  # the last learning rate over the peak
            weight_decay=0.1,
            decay_embeddings=False,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            clip_norm=1.0,  # 0: no clipping
            moment_dtype="float32",
            freeze_router=False,  # the routers keep the weights they start with
            offload=False,  # keep the moments in host memory (accelerators only)
        )
    )
    c.mesh = ConfigDict(dict(data=1, fsdp=-1, expert=1, context=1, tensor=1))  # -1: what is left of the devices
    c.data = ConfigDict(
        dict(
            source="stdlib",  # stdlib | text | jsonl | parquet | arrow | hub
            path="",  # paths, folders or globs, separated by commas; of hub NAME, NAME:SUBSET or NAME:SUBSET:SPLIT
            text_key="text",  # the field that holds the text
            mixture=(),  # instead of the three above: dict(source=, weight=, path=, text_key=, name=), one per source
            streaming=False,  # tokenise while training, without a cache
            max_bad_rows=0,  # rows that may be skipped because they cannot be read
            tokenizer="mistral-v1",  # mistral-v1 | bytes | stdlib:SIZE (trained once, cached) | a SentencePiece .model
            cache_dir="~/.cache/mixtral_jax",
            heldout_fraction=0.02,  # share of documents, by hash of their text, kept for evaluation
            workers=2,  # threads that read ahead
            packing=True,  # several documents in a row; False: one
        )
    )
    c.dpo = ConfigDict(
        dict(
            loss="sigmoid",  # sigmoid | robust | ipo | hinge | sigmoid_norm | simpo (no reference) | apo_zero
            beta=0.1,  # how far the policy may go from the reference; smaller is farther
            label_smoothing=0.0,  # share of pairs that are taken to be labelled wrongly (sigmoid and robust)
            gamma=0.5,  # margin of simpo
            sft_weight=0.0,  # of the mean loss of the chosen answers' tokens, added to the preference loss
            reference="precomputed",  # precomputed: its log-probs, once, into a cache | on_the_fly: the starting weights stay in memory
        )
    )
    c.lora = ConfigDict(
        dict(
            rank=0,  # R of the adapters; 0: all weights are trained
            alpha=16.0,  # the adapters' product is scaled by alpha / rank
            targets=("attention", "experts"),  # and "router"
        )
    )
    c.train = ConfigDict(
        dict(
            stage="pretrain",  # pretrain | sft | dpo
            seed=0,
            steps=1000,
            batch_size=256,  # sequences in one optimizer step, over all devices and accumulation steps
            seq_len=4096,  # T
            accumulation_steps=1,
            log_every=10,
            eval_every=500,
            eval_batches=16,  # batches of an evaluation during training; the final one reads the whole held-out split
            evals=(),  # evaluations of eval.py during training, NAME@STEPS each: ("routing@1000", "passkey@5000")
            sample_every=500,
            sample_prompts=("def ",),  # continued; in sft and dpo they are questions and are answered
            sample_tokens=64,
            checkpoint_every=500,
            checkpoints_to_keep=3,  # the latest
            checkpoint_keep_every=0,  # and every checkpoint of a multiple of so many steps; 0: none
            keep_best=True,  # and the one of the lowest held-out loss
            init_from="",  # weights to start from: a workdir, a folder of one step, or hf:DIR; "" is random
            skip_nonfinite=0,  # steps of a run that may be skipped because the loss or the gradient is not finite
            continue_on_save_error=False,  # go on training when a checkpoint cannot be written
            wandb="",  # a Weights & Biases project; "" is off
        )
    )
    return c


def parse_arg(arg: str | None, **defaults):
    """Parses a config's argument, `--config=FILE:arg`, against typed defaults.

    Args:
        arg: comma-separated items; `name` alone means `name=True`, else `name=value`.
        **defaults: the known names; a value is converted to the type of its default.

    Returns:
        A ConfigDict of the defaults overridden by the argument.

    Raises:
        ValueError: an unknown name, a value that does not convert, or `tiny` beside others.
    """
    values = dict(defaults)
    items = [item for item in (arg or "").split(",") if item]
    for item in items:
        name, _, text = item.partition("=")
        if name not in defaults:
            raise ValueError(f"unknown config argument {name!r}; this config knows {', '.join(sorted(defaults))}")
        kind = type(defaults[name])
        if kind is bool:
            if text.lower() not in ("", "true", "false", "1", "0"):
                raise ValueError(f"config argument {name}={text!r} is not true or false")
            values[name] = text.lower() in ("", "true", "1")
        else:
            try:
                values[name] = kind(text)
            except ValueError as error:
                raise ValueError(f"config argument {name}={text!r} is not of type {kind.__name__}") from error
    if values.get("tiny") and len(items) > 1:
        raise ValueError(
            f"config argument {arg!r}: tiny fixes all sizes and goes alone; change others with --config.GROUP.KEY"
        )
    return ConfigDict(values)


def shrink(c: ConfigDict) -> ConfigDict:
    """Turns any config into a version that trains in seconds on a CPU, keeping its proportions where it can."""
    c.model.update(
        vocab_size=512,
        num_layers=2,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        d_ff=96,
        max_seq_len=128,
        dtype="float32",
        remat="none",
        expert_block=16,
    )
    c.loss.update(head_chunk=32)
    c.optim.update(learning_rate=3e-3, warmup_steps=5, decay_steps=0)
    if c.optim.schedule == "warmup_stable_decay":
        c.optim.update(decay_steps=5)
    c.mesh.update(data=1, fsdp=-1, expert=1, context=1, tensor=1)
    c.data.update(source="stdlib", path="", tokenizer="bytes")
    c.train.update(
        steps=20,
        batch_size=8,
        seq_len=64,
        accumulation_steps=1,
        log_every=5,
        eval_every=10,
        eval_batches=2,
        sample_every=10,
        sample_tokens=16,
        checkpoint_every=10,
    )
    if c.train.stage != "pretrain":
        # A conversation or a pair is not cut: its bytes, a token each, must have room.
        c.model.update(max_seq_len=1024)
        c.train.update(batch_size=8, seq_len={"sft": 512, "dpo": 1024}[c.train.stage])
        c.data.update(heldout_fraction=0.02)
        c.lora.update(rank=min(c.lora.rank, 4))
    return c
