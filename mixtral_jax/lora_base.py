"""What a run's frozen weights were when it began, and whether they still are: LoRA's base, the reference of DPO.

A checkpoint of adapters means nothing without the weights that were frozen. Its metadata says under "frozen" what they
were: {"source": train.init_from, "fingerprints": {name: ...} of the base in the compute dtype, "adapters": {name: ...} of
the base's own adapters, where that is a LoRA run}.
"""

from typing import Any

from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import Config, UserError, from_config_dict
from mixtral_jax.fingerprint import fingerprints
from mixtral_jax.models import lora
from mixtral_jax.resolve import Checkpoint, resolve_checkpoint
from mixtral_jax.workdir import load_run


def base_of(checkpoint: Checkpoint, config: Config) -> Checkpoint | None:
    """Finds the base of a LoRA run's checkpoint; None if it is the random model of train.seed.

    Raises:
        UserError: it is not where train.init_from says.
    """
    source = config.train.init_from
    if source == "":
        return None
    try:
        return resolve_checkpoint(source)
    except UserError as error:
        raise UserError(
            f"{checkpoint} holds adapters, and their base train.init_from={source} cannot be read: {error}. Put it back, "
            f"or set train.init_from in {checkpoint.folder}/config.json to where it is now"
        ) from None


def record(config: Config, base) -> dict[str, Any]:
    """What a run stores under "frozen" in the metadata of its checkpoints.

    Args:
        config: of the run.
        base: the frozen weights as lora.freeze leaves them, on whatever mesh.
    """
    source = config.train.init_from
    found = {"source": source, "fingerprints": fingerprints(base)}
    inner = resolve_checkpoint(source) if source else None
    return found if inner is None or not _is_lora(inner) else found | {"adapters": _adapters(inner)}


def refuse_changed(checkpoint: Checkpoint, config: Config, said: dict[str, Any], now: dict[str, str]) -> None:
    """Compares the base of a LoRA checkpoint that is read with what the checkpoint's metadata says of it.

    Args:
        checkpoint: of a LoRA run.
        config: of that run.
        said: its metadata's "frozen".
        now: fingerprints of the base's parameters in the compute dtype, all or some.

    Raises:
        UserError: the base is another one; both are named.
    """
    source = base_of(checkpoint, config)
    wrong = changed(source, said, now)
    if wrong:
        raise UserError(
            f"{checkpoint} holds adapters that were trained beside {said['source']}, and {source} has other weights now: "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}. Restore them, or set train.init_from in "
            f"{checkpoint.folder}/config.json to the folder of the right step"
        )


def changed(source: Checkpoint | None, said: dict[str, Any], now: dict[str, str]) -> list[str]:
    """The names of frozen parameters that are not what they were.

    What the base's own adapters were merged into is compared by those adapters, and a random base not at all where the run
    began with one: the last bit of a sum or of a normal number depends on the program that computes it.

    Args:
        source: where the frozen weights come from; None: the random model of train.seed.
        said: what a checkpoint's metadata has under "frozen".
        now: fingerprints of the parameters in the compute dtype, all or some.
    """
    if source is None:
        return list(now) if said["source"] else []
    merged = _adapted(source)
    wrong = [name for name, one in now.items() if name not in merged and one != said["fingerprints"].get(name)]
    if _is_lora(source):
        there, then = _adapters(source), said.get("adapters", {})
        wrong += [name for name in there | then if there.get(name) != then.get(name)]
    return wrong


def _is_lora(checkpoint: Checkpoint) -> bool:
    return checkpoint.step is not None and load_run(checkpoint.folder).get("lora", {}).get("rank", 0) > 0


def _adapted(source: Checkpoint | None) -> set[str]:
    """The parameters of a base that adapters were merged into, its own or its base's."""
    if source is None or not _is_lora(source):
        return set()
    config = from_config_dict(load_run(source.folder))
    return {f"layers.{name}" for name in lora.factors(config.lora)} | _adapted(base_of(source, config))


def _adapters(checkpoint: Checkpoint) -> dict[str, str]:
    """The fingerprints of a LoRA checkpoint's adapters, as they were saved."""
    return {name: one["fingerprint"] for name, one in meta(checkpoint)["arrays"]["params"].items()}


def meta(checkpoint: Checkpoint) -> dict[str, Any]:
    """The metadata of a checkpoint of ours."""
    checkpoints = Checkpoints(checkpoint.folder)
    try:
        return checkpoints.meta(checkpoint.step)
    finally:
        checkpoints.close()
