"""Where a run's state comes from: its own checkpoints, the weights of another run, or chance."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mixtral_jax import distributed, load
from mixtral_jax.checkpoint import Checkpoints, DamagedError
from mixtral_jax.config import Config, RunError, UserError
from mixtral_jax.data import Corpus, load_tokenizer
from mixtral_jax.resolve import resolve_checkpoint
from mixtral_jax.sharding import replicated
from mixtral_jax.step import TrainState, abstract_state, init_state

# A run whose model computes something else is another run; the other keys of the model decide how, not what.
MODEL_KEYS = [
    "vocab_size",
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_ff",
    "num_experts",
    "experts_per_token",
    "rope_theta",
    "norm_eps",
    "sliding_window",
    "router_bias",
]


@dataclasses.dataclass
class Start:
    """A state to train on from, and what was stored with it."""

    state: TrainState
    shardings: Any
    step: int | None  # of the checkpoint; None for a new run
    meta: dict[str, Any]
    data: dict[str, Any] | None  # state of the data after that step; None for a new run


def identity(config: Config, tokenizer, corpus: Corpus) -> dict[str, Any]:
    """What makes a run this run: model, optimizer, and what decides its batches. Stored with each checkpoint."""
    train, lora = config.train, config.lora
    tuning = {}  # nothing for what every run was before there was anything else
    if train.stage != "pretrain":
        tuning |= {"train.stage": train.stage}
    if lora.rank:
        tuning |= {"lora.rank": lora.rank, "lora.alpha": lora.alpha, "lora.targets": list(lora.targets)}
    if not config.data.packing:
        tuning |= {"data.packing": False}
    return tuning | {
        **{f"model.{key}": getattr(config.model, key) for key in MODEL_KEYS},
        "optim.name": config.optim.name,
        "optim.moment_dtype": config.optim.moment_dtype,
        "corpus": corpus.key,  # files, tokenizer and data.heldout_fraction
        "tokenizer": tokenizer.fingerprint,
        "data.streaming": config.data.streaming,
        "data.mixture": [source.weight for source in config.data.mixture],
        "train.seed": train.seed,
        "train.batch_size": train.batch_size,
        "train.seq_len": train.seq_len,
    }


def find_state(
    config: Config, optimizer, mesh, checkpoints: Checkpoints, mine: dict, tokenizer, note: Callable
) -> Start:
    """Finds the state to start from.

    Args:
        config, optimizer, mesh, tokenizer: of the run.
        checkpoints: of its workdir.
        mine: the run's identity().
        note: shows a line to the user.

    Raises:
        UserError: the workdir's run is another one, or train.init_from does not fit.
        RunError: there are checkpoints and all of them are damaged.
    """
    # The policy, in this order: continue this run from its newest good checkpoint; else take the weights that
    # train.init_from names (a workdir, a step's folder or hf:DIR), with a new optimizer and step 0; else random weights.
    # With LoRA those weights are the frozen base (frozen.py), and what is continued or new are the adapters.
    damaged: dict[int, DamagedError] = {}
    for step in reversed(checkpoints.agreed_steps()):
        start, error = None, None
        try:
            start = _continue(config, optimizer, mesh, checkpoints, step, mine)
        except DamagedError as damage:
            error = damage
        told = [text for text in distributed.exchange("damage", str(error or "")) if text]
        if told:  # one process's shards are enough
            damaged[step] = error or DamagedError(told[0])
            continue
        for bad, error in damaged.items():
            note(f"WARNING: {error}. It was moved to {checkpoints.set_aside(bad)}; step {step} is the newest good one.")
        note(f"resumed from {checkpoints.folder}/{step}")
        return start
    if damaged:
        lines = "\n".join(f"  {error}" for error in damaged.values())
        raise RunError(
            f"no checkpoint in {checkpoints.folder} can be used:\n{lines}\nNothing was changed. To start again from the beginning "
            "move that folder away, or choose another workdir."
        )
    if config.train.init_from:
        _same_tokenizer(config.train.init_from, tokenizer, note)
    elif config.train.stage != "pretrain" or config.lora.rank:
        note("WARNING: train.init_from is empty, so this tunes random weights; name the checkpoint to start from")
    if config.train.init_from and not config.lora.rank:
        return _warm_start(config, optimizer, mesh, note)
    state, shardings = init_state(config, optimizer, mesh)
    return Start(state, shardings, None, {}, None)


def _continue(config: Config, optimizer, mesh, checkpoints: Checkpoints, step: int, mine: dict) -> Start:
    meta = checkpoints.meta(step)
    _check(config, checkpoints, step, meta, mine)
    data = checkpoints.data(step)
    like, shardings = abstract_state(config, optimizer, mesh)
    params, opt_state = checkpoints.restore(step, like.params, like.opt_state)
    now, skipped = jax.device_put((np.int32(step), np.int32(meta["skipped"])), replicated(mesh))
    return Start(TrainState(now, params, opt_state, skipped), shardings, step, meta, data)


def _check(config: Config, checkpoints: Checkpoints, step: int, meta: dict, mine: dict) -> None:
    workdir = checkpoints.folder.parent
    if "identity" not in meta:
        raise UserError(
            f"{workdir} holds imported weights and no run; train in another workdir with --config.train.init_from={workdir}"
        )
    stored = meta["identity"]
    lines = [
        f"  {name}: checkpoint {stored.get(name)}, now {mine.get(name)}"
        for name in {**mine, **stored}
        if stored.get(name) != mine.get(name)
    ]
    if lines:
        raise UserError(
            f"the run in {workdir} is another one; restore these values, or use another workdir "
            f"(with --config.train.init_from={workdir} to start from its weights):\n" + "\n".join(lines)
        )
    if step > config.train.steps:
        raise UserError(
            f"the newest checkpoint in {checkpoints.folder} is of step {step}, beyond train.steps={config.train.steps}; "
            f"set train.steps to at least {step}, or use another workdir"
        )


def _warm_start(config: Config, optimizer, mesh, note: Callable) -> Start:
    source = config.train.init_from
    like, _ = abstract_state(config, optimizer, mesh)
    params = load.restore_weights(source, like.params)
    note(f"weights from {source}, a new optimizer, step 0")
    state, shardings = init_state(config, optimizer, mesh, params)
    return Start(state, shardings, None, {}, None)


def _same_tokenizer(source: str, tokenizer, note: Callable) -> None:
    """Refuses weights that were trained with another tokenizer: their embedding would be noise."""
    found = resolve_checkpoint(source)
    place = found.local / ("tokenizer.model" if found.step is None else "tokenizer")
    if not place.exists():
        note(
            f"WARNING: {source} has no tokenizer beside it; nothing tells whether {tokenizer.name} is the one it was trained with"
        )
        return
    theirs = load_tokenizer(str(place), "")
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"train.init_from={source} was trained with another tokenizer (fingerprint {theirs.fingerprint[:16]}, now "
            f"{tokenizer.fingerprint[:16]}); set data.tokenizer={place}"
        )
