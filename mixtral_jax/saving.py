"""What LoRA saves: bytes on each device of a run's parameters, gradients and moments, beside those of training all weights."""

import dataclasses

import jax

from mixtral_jax import memory
from mixtral_jax.config import Config
from mixtral_jax.models import lora, mixtral
from mixtral_jax.optim import make_optimizer


def state_rows(config: Config) -> dict[str, tuple[int, int]]:
    """Bytes on one device by category, (training all weights, this LoRA run), from abstract shapes alone.

    Args:
        config: of a LoRA run (lora.rank > 0), its mesh resolved.
    """
    model = config.model
    full = _trained(config, mixtral.abstract(model))
    mine = _trained(config, lora.abstract(model, config.lora))
    frozen = {f"frozen base, {model.dtype}": (0, memory.frozen_bytes(config))}
    return frozen | {name: (full[name], mine[name]) for name in full}


def _trained(config: Config, params) -> dict[str, int]:
    """Bytes on one device of what is trained: float32 masters, their gradients, and the optimizer's state."""
    moments = jax.eval_shape(make_optimizer(config.optim, config.train.steps).init, params)
    on_mesh = memory.abstractly_sharded({"params": params, "moments": moments}, params, config.mesh)
    sizes = memory.state_bytes(on_mesh)
    bytes_of = {key: sum(size for name, size in sizes.items() if name.startswith(key)) for key in on_mesh}
    # With accumulation one micro-batch's gradients exist beside their sum.
    copies = 1 if config.train.accumulation_steps == 1 else 2
    return {
        "trained parameters, float32": bytes_of["params"],
        "gradients, float32": copies * bytes_of["params"],
        f"optimizer state, {config.optim.name}{', in host memory' if config.optim.offload else ''}": bytes_of[
            "moments"
        ],
    }


def text(config: Config) -> str:
    """The saving as a table of a few lines, for the start of a LoRA run.

    Args:
        config: of a LoRA run, its mesh resolved.
    """
    rows = state_rows(config)
    total = tuple(sum(row[i] for row in rows.values()) for i in (0, 1))
    trained, _ = lora.parameter_counts(config.model, config.lora)
    all_, _ = mixtral.parameter_counts(config.model)
    sizes = {axis: size for axis, size in dataclasses.asdict(config.mesh).items() if size > 1}
    where = " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"
    head = f"on each device ({where})"
    width = max(map(len, (head, *rows)))
    line = f"  {{:<{width}}}  {{:>12}}  {{:>12}}"
    return "\n".join(
        [
            f"LoRA of rank {config.lora.rank} on {', '.join(config.lora.targets)}: {trained:,} parameters are trained, "
            f"{100 * trained / all_:.2f}% of {all_:,}",
            line.format(head, "all weights", "LoRA"),
            *(line.format(name, *map(memory.readable, row)) for name, row in rows.items()),
            line.format("together", *map(memory.readable, total)),
            f"  {memory.readable(total[0] - total[1])} less on each device, {100 * (1 - total[1] / total[0]):.0f}%; activations are beside these",
        ]
    )
