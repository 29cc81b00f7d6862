"""Which implementation "auto" means on which platform: attention, how tokens reach experts, how experts multiply."""

import dataclasses
import importlib.util

import jax

from mixtral_jax.config import SPLASH_BLOCK, ModelConfig, UserError

# The H100 and TPU choices follow docs/design.md, "Experts" and "Attention"; the CPU's are measured in benchmarks/.
DEFAULTS = {
    "cpu": {"attention": "chunked", "dispatch": "ring", "expert_backend": "blocks"},
    "gpu": {"attention": "cudnn", "dispatch": "ring", "expert_backend": "tokamax"},
    "tpu": {"attention": "splash", "dispatch": "ragged", "expert_backend": "megablox"},
}
# Kernels that a platform cannot run. A CPU runs all of them, to test them.
FOREIGN = (
    ("expert_backend", "megablox", "gpu"),
    ("expert_backend", "tokamax", "tpu"),
    ("attention", "splash", "gpu"),
    ("attention", "cudnn", "tpu"),
)
PORTABLE = {"expert_backend": "blocks", "attention": "chunked"}


def attention(config: ModelConfig, t: int, context: int) -> str:
    """The implementation of attention for rows of T on a mesh whose axis `context` has so many shards.

    The kernels of accelerators are for training's shapes, which resolve_mesh checks when they are chosen by name; prompts
    of other lengths, and what "auto" would choose for a shape it cannot, go through `chunked`.
    """
    chosen = resolve(config).attention
    multiple = SPLASH_BLOCK * (2 * context if context > 1 else 1)
    if (chosen == "splash" and t % multiple) or (chosen == "cudnn" and context > 1):
        return "chunked"
    return chosen


def _capability() -> tuple[int, ...]:
    """The compute capability of the GPU that is here."""
    return tuple(map(int, jax.local_devices()[0].compute_capability.split(".")))


def refuse_foreign(config: ModelConfig, platform: str) -> None:
    """Refuses what was named and cannot run on a platform; looks at no device.

    Raises:
        UserError: it names what can.
    """
    for key, name, where in FOREIGN:
        if (getattr(config, key), platform) == (name, where):
            raise UserError(
                f"model.{key}={name} has no kernels for a {where}; set it to {DEFAULTS[where][key]}, {PORTABLE[key]} or auto"
            )


def resolve(config: ModelConfig, platform: str | None = None) -> ModelConfig:
    """Replaces every "auto" by the platform's implementation; what was chosen by name stays.

    Args:
        config: a model.
        platform: "cpu", "gpu" or "tpu"; default: the one that jax uses here. Whoever compiles for another machine (the
            plan of a pod) must name it.

    Returns:
        The model with every backend named.

    Raises:
        UserError: what was named cannot run on the platform.
    """
    platform = platform or jax.default_backend()
    chosen = dict(DEFAULTS.get(platform, DEFAULTS["cpu"]))
    if chosen["attention"] == "cudnn" and config.dtype != "bfloat16":
        chosen["attention"] = "chunked"  # cuDNN's flash attention has no float32
    if chosen["attention"] == "cudnn" and jax.default_backend() == "gpu" and _capability() < (9, 0):
        chosen["attention"] = "chunked"  # it packs documents on Hopper and later only
    if chosen["attention"] == "splash" and config.head_dim % 128:
        chosen["attention"] = "chunked"  # the TPU kernel's lanes are 128 wide
    if chosen["expert_backend"] == "tokamax" and importlib.util.find_spec("tokamax") is None:
        chosen["expert_backend"] = "blocks"
    refuse_foreign(config, platform)
    return dataclasses.replace(
        config, **{name: value for name, value in chosen.items() if getattr(config, name) == "auto"}
    )
