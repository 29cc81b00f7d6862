"""Loads the parameters of a checkpoint, ours or another's, onto the devices that are here."""

import dataclasses

import jax
import jax.numpy as jnp

from mixtral_jax import lora_base
from mixtral_jax.checkpoint import Checkpoints, DamagedError
from mixtral_jax.config import AXES, Config, MeshConfig, ModelConfig, UserError, from_config_dict, resolve_mesh
from mixtral_jax.convert.foreign import Foreign
from mixtral_jax.convert.ours import Ours
from mixtral_jax.convert.restore import restore
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.fingerprint import fingerprints
from mixtral_jax.models import lora, mixtral
from mixtral_jax.models.layers import FLOAT32
from mixtral_jax.resolve import Checkpoint, resolve_checkpoint
from mixtral_jax.sharding import make_mesh, named_leaves, path_names, tree_shardings
from mixtral_jax.workdir import load_run

# What no shape shows and yet decides what weights compute.
SETTINGS = ("experts_per_token", "rope_theta", "norm_eps", "sliding_window")


def load(checkpoint: str | Checkpoint, mesh_sizes: dict[str, int] | None = None, for_decoding: bool = False):
    """Loads the parameters of a checkpoint, whatever mesh they were saved from.

    Args:
        checkpoint: as resolve_checkpoint takes or gives it.
        mesh_sizes: sizes of mesh axes, -1 for what is left of the devices; axes that are not named are 1. None spreads
            the parameters over as many devices as divide them, the rest are replicas: a run's own mesh says nothing
            about this machine.
        for_decoding: matrices in the compute dtype, which is what decoding casts them to anyway: half the memory of
            float32 where that is bfloat16. False: everything in float32.

    Returns:
        config (its mesh resolved for the devices here), model, mesh.

    Raises:
        UserError: no such checkpoint, a damaged one, or a mesh that does not fit.
    """
    checkpoint = _resolved(checkpoint)
    config = _for_devices(stored_config(checkpoint), jax.device_count(), mesh_sizes, for_decoding)
    mesh = make_mesh(config.mesh)
    shapes = mixtral.abstract(config.model)
    shardings = tree_shardings(shapes, mesh, shapes)

    def leaf(path, shape, sharding):
        cast = for_decoding and path_names(path)[-1] not in FLOAT32
        return jax.ShapeDtypeStruct(shape.shape, config.model.dtype if cast else shape.dtype, sharding=sharding)

    like = jax.tree_util.tree_map_with_path(leaf, shapes, shardings)
    return config, restore_weights(checkpoint, like), mesh


def restore_weights(checkpoint: str | Checkpoint, like: mixtral.Mixtral) -> mixtral.Mixtral:
    """Restores the parameters alone, each process only what its devices hold; of a LoRA run its base and adapters, merged.

    Args:
        checkpoint: as resolve_checkpoint takes or gives it.
        like: the model as ShapeDtypeStructs with NamedShardings; what is stored is cast to its dtypes.

    Returns:
        the model, on those shardings.

    Raises:
        UserError: the checkpoint cannot be read, or is of another model: the parameters or the keys are named.
        DamagedError: what was read is not what was saved.
    """
    checkpoint = _resolved(checkpoint)
    if checkpoint.step is not None and (config := stored_config(checkpoint)).lora.rank:
        return _restore_merged(checkpoint, config, like)
    weights = Foreign(checkpoint.folder) if checkpoint.step is None else Ours(checkpoint, in_order=False)
    try:
        _check_settings(checkpoint, weights.config.model, like.config)
        model = restore(weights, like)
    finally:
        weights.close()
    if checkpoint.step is not None:
        _verify(checkpoint, model)
    return model


def _restore_merged(checkpoint: Checkpoint, config: Config, like: mixtral.Mixtral) -> mixtral.Mixtral:
    """Restores a LoRA run's weights: its base, as that run held it, and the adapters merged into it."""
    _check_settings(checkpoint, config.model, like.config)
    adapted = lora.factors(config.lora)

    def base_leaf(path, leaf):
        name = path_names(path)[-1]
        # In the run's own dtypes whatever is asked for: what was trained is what is merged, to the bit.
        dtype = leaf.dtype if name not in adapted else "float32" if name in FLOAT32 else config.model.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    base_like = jax.tree_util.tree_map_with_path(base_leaf, like)
    mesh = jax.tree.leaves(like)[0].sharding.mesh
    source = lora_base.base_of(checkpoint, config)
    with jax.set_mesh(mesh):
        base = _random(config, base_like) if source is None else restore_weights(source, base_like)
        said = lora_base.meta(checkpoint).get("frozen")
        if said is not None:
            lora_base.refuse_changed(checkpoint, config, said, _frozen_fingerprints(base, config.model.dtype))
        shapes = lora.abstract(like.config, config.lora)
        shardings = tree_shardings(shapes, mesh, shapes)
        shapes = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)
        checkpoints = Checkpoints(checkpoint.folder)
        try:
            adapters = checkpoints.restore_params(checkpoint.step, shapes)
        finally:
            checkpoints.close()
        merged = lora.merge(base, adapters, like, donate=True)
    return jax.tree.map(
        lambda x, leaf: jax.device_put(x, leaf.sharding), merged, like
    )  # in the same words; nothing moves


def _random(config: Config, like: mixtral.Mixtral) -> mixtral.Mixtral:
    """The random model that a LoRA run without train.init_from is based on."""

    def build(key):
        made = named_leaves(mixtral.init(config.model, key))
        # A router bias that the run did not have is zero, as one that is not stored.
        return {n: made[n].astype(x.dtype) if n in made else jnp.zeros(x.shape, x.dtype) for n, x in leaves.items()}

    leaves = named_leaves(like)
    shardings = {name: leaf.sharding for name, leaf in leaves.items()}
    found = jax.jit(build, out_shardings=shardings)(jax.random.key(config.train.seed))
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in leaves])


def _frozen_fingerprints(base: mixtral.Mixtral, dtype: str) -> dict[str, str]:
    """Fingerprints of a base in the compute dtype; without the parameters that are held in less than that."""
    kinds = {n: jnp.dtype("float32" if n.rpartition(".")[2] in FLOAT32 else dtype) for n in named_leaves(base)}
    held = {n: leaf for n, leaf in named_leaves(base).items() if leaf.dtype.itemsize >= kinds[n].itemsize}
    return fingerprints({name: leaf.astype(kinds[name]) for name, leaf in held.items()})


def _verify(checkpoint: Checkpoint, model) -> None:
    """Compares the arrays with the fingerprints taken when they were saved, those that were not cast."""
    checkpoints = Checkpoints(checkpoint.folder)
    said = checkpoints.meta(checkpoint.step).get("arrays", {}).get("params", {})
    checkpoints.close()
    whole = {
        name: leaf for name, leaf in named_leaves(model).items() if str(leaf.dtype) == said.get(name, {}).get("dtype")
    }
    now = fingerprints(whole)
    wrong = [name for name in whole if now[name] != said[name]["fingerprint"]]
    if wrong:
        raise DamagedError(f"{checkpoint} is damaged: {', '.join(wrong[:5])} are not what was saved")


def stored_config(checkpoint: Checkpoint) -> Config:
    """The configuration of a checkpoint: a run's own; of others' files their model, and the defaults for the rest."""
    if checkpoint.step is not None:
        return from_config_dict(load_run(checkpoint.local))
    weights = Foreign(checkpoint.folder)
    weights.close()
    return weights.config


def stored_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that lies beside the weights.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if checkpoint.step is not None:
        path = checkpoint.local / "tokenizer"
        missing = None if path.is_dir() else "tokenizer/ (it was imported without one)"
    else:
        weights = Foreign(checkpoint.folder)
        weights.close()
        path = weights.tokenizer_file()
        missing = "tokenizer.model (a tokenizer.json cannot be read)" if path is None else None
    if missing:
        raise UserError(f"{checkpoint} has no {missing}; put the model's SentencePiece tokenizer.model there")
    return load_tokenizer(str(path), "")


def stored_meta(checkpoint: Checkpoint) -> dict:
    """What a checkpoint notes beside its arrays (interlude.save); nothing of one that is another's."""
    if checkpoint.step is None:
        return {}
    checkpoints = Checkpoints(checkpoint.folder)
    meta = checkpoints.meta(checkpoint.step)
    checkpoints.close()
    return meta


def stored_corpus(checkpoint: Checkpoint) -> str | None:
    """The key of the corpus that a checkpoint was trained on; None if it was imported or is another's."""
    return stored_meta(checkpoint).get("identity", {}).get("corpus")


def _resolved(checkpoint: str | Checkpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else resolve_checkpoint(checkpoint)


def _check_settings(checkpoint: Checkpoint, stored: ModelConfig, wanted: ModelConfig) -> None:
    lines = [
        f"  model.{key}: there {getattr(stored, key)}, here {getattr(wanted, key)}"
        for key in SETTINGS
        if getattr(stored, key) != getattr(wanted, key)
    ]
    if lines:
        raise UserError(
            f"{checkpoint}: these weights belong to other settings of the model; set the keys to its values:\n"
            + "\n".join(lines)
        )


def _for_devices(config: Config, devices: int, mesh_sizes: dict[str, int] | None, for_decoding: bool) -> Config:
    """Replaces the run's mesh and batch, which were chosen for another machine, by ones for the devices here.

    The batch is rounded up: evaluation fills it with empty rows, and they change nothing.
    """
    if mesh_sizes is None:
        fits = [n for n in range(1, devices + 1) if devices % n == 0]
        fsdp = max(n for n in fits if config.model.d_model % n == 0 and config.model.vocab_size % n == 0)
        mesh_sizes = {"data": devices // fsdp, "fsdp": fsdp}
    if for_decoding and mesh_sizes.get("context", 1) != 1:
        raise UserError(
            f"context={mesh_sizes['context']}: generation reads one token at a time and has no T to split; set context=1 and data instead"
        )
    mesh = MeshConfig(**{axis: mesh_sizes.get(axis, 1) for axis in AXES})
    rows = -(-config.train.batch_size // config.train.accumulation_steps // devices) * devices
    train = dataclasses.replace(config.train, batch_size=rows, accumulation_steps=1)
    # The kernels of the run's machine may not exist here.
    attention = "auto" if config.model.attention in ("cudnn", "splash") else config.model.attention
    backend = "auto" if config.model.expert_backend in ("megablox", "tokamax") else config.model.expert_backend
    # Dropless: with a bounded buffer it is the batch's other rows, and the mesh, that decide which tokens are dropped.
    kept = {"attention": attention, "expert_backend": backend, "buffer_factor": 0.0}
    model = dataclasses.replace(config.model, **kept)
    return resolve_mesh(dataclasses.replace(config, model=model, train=train, mesh=mesh), devices)
