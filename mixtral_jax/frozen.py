"""Weights that do not move while others train: LoRA's base, and the reference of DPO.

They come from where the run's weights came from (train.init_from, or train.seed), and every checkpoint notes their
fingerprints: a resume that would go on with other ones is refused.
"""

import dataclasses

import jax

from mixtral_jax import load, lora_base
from mixtral_jax.config import Config, UserError
from mixtral_jax.models import lora, mixtral
from mixtral_jax.preference import runs_reference
from mixtral_jax.resolve import resolve_checkpoint
from mixtral_jax.sharding import tree_shardings


def stays(config: Config) -> bool:
    """Whether the frozen weights are needed in every step, and not only once."""
    return bool(config.lora.rank) or runs_reference(config)


def abstract(config: Config, mesh) -> mixtral.Mixtral:
    """The frozen weights as ShapeDtypeStructs with shardings: in the compute dtype, what must be float32 in float32.

    That is what the policy's float32 weights are cast to where they are used, so that both compute the same. For that the
    experts' kernel is chosen too: adapted experts run on one that is made like `blocks`, whatever model.expert_backend says,
    and in bfloat16 other kernels round otherwise.
    """
    adapted = config.lora.rank and "experts" in config.lora.targets
    model = dataclasses.replace(config.model, expert_backend="blocks") if adapted else config.model
    shapes = jax.eval_shape(lora.freeze, mixtral.abstract(model))
    shardings = tree_shardings(shapes, mesh, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def weights(config: Config, mesh) -> mixtral.Mixtral:
    """Loads the weights a run starts from, in the layout of `abstract`.

    Raises:
        UserError: train.init_from does not fit the configuration.
    """
    like = abstract(config, mesh)
    if config.train.init_from:
        return load.restore_weights(config.train.init_from, like)
    shardings = jax.tree.map(lambda x: x.sharding, like)
    build = jax.jit(lambda key: lora.freeze(mixtral.init(like.config, key)), out_shardings=shardings)
    return build(jax.random.key(config.train.seed))


def check_source(config: Config, noted: dict | None) -> None:
    """Refuses a resume that forgets train.init_from, or brings one; `check` compares the weights, once they are loaded.

    Args:
        config: of the run.
        noted: what its checkpoint notes of the frozen weights; None: nothing, it is a new run.

    Raises:
        UserError: naming both.
    """
    source = config.train.init_from
    if noted is None or bool(source) == bool(noted["source"]):
        return
    if noted["source"]:
        raise UserError(
            f"train.init_from is empty, and this run began with {noted['source']!r}; give "
            f"--config.train.init_from={noted['source']} again"
        )
    raise UserError(
        f"train.init_from={source!r}, and this run began with random weights of train.seed; leave train.init_from empty, or "
        "begin in another workdir"
    )


def check(config: Config, noted: dict | None, now: dict) -> None:
    """Compares the frozen weights with those that a checkpoint was trained on; both as lora_base.record describes them.

    Raises:
        UserError: they are other ones.
    """
    if noted is None:
        return
    source = resolve_checkpoint(config.train.init_from) if config.train.init_from else None
    wrong = lora_base.changed(source, noted, now["fingerprints"])
    if wrong:
        raise UserError(
            f"train.init_from={config.train.init_from!r} holds other weights than this run began with (from {noted['source']!r}): "
            f"{len(wrong)} arrays differ, {wrong[0]} among them; restore that checkpoint, or name its step's folder, or "
            "begin in another workdir"
        )
