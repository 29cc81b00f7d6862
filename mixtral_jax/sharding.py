"""The mesh, and shardings read off names.

A name such as `w_gate_EDF` says its own sharding: each letter maps to a mesh axis (docs/design.md has the legend).
Parameters and activations have separate tables because D is split over `fsdp` in weights and whole in activations.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixtral_jax.config import AXES, MeshConfig, UserError

BATCH = ("data", "fsdp", "expert")

PARAM_AXES = {
    "D": "fsdp",
    "E": "expert",
    "F": "tensor",
    "G": "tensor",
    "H": None,
    "L": None,
    "N": "tensor",
    "R": None,
    "V": "tensor",
}
ACT_AXES = {
    "B": BATCH,
    "D": None,
    "E": None,
    "G": "tensor",
    "H": None,
    "K": None,
    "L": None,
    "N": "tensor",
    "P": None,
    "R": None,
    "S": None,
    "T": "context",
    "V": "tensor",
}
# The one exception: D over fsdp would make every lookup gather the table, so V takes both axes and D stays whole.
EXCEPTIONS = {"embedding_VD": (("tensor", "fsdp"), None)}


def mesh_devices(shape: tuple[int, ...], devices) -> np.ndarray:
    """Orders devices for the mesh: slices of a multi-slice TPU job along `data`, neighbours near each other inside.

    Only `data` crosses the data centre's network then, once a step; the other axes talk in every layer.

    Args:
        shape: sizes in the order of config.AXES.
        devices: of all processes.

    Raises:
        UserError: the slices do not divide `data`.
    """
    devices = list(devices)
    slices = {getattr(device, "slice_index", 0) or 0 for device in devices}
    if devices[0].platform != "tpu" or len(slices) == 1:  # on GPUs it counts hosts, which any axis may cross
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    at, count = AXES.index("data"), len(slices)
    if shape[at] % count:
        raise UserError(
            f"mesh.data={shape[at]} and there are {count} slices; only data may cross slices: set mesh.data to a multiple of {count}"
        )
    inner, outer = list(shape), [1] * len(shape)
    inner[at], outer[at] = shape[at] // count, count
    return mesh_utils.create_hybrid_device_mesh(tuple(inner), tuple(outer), devices, allow_split_physical_axes=True)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Builds the mesh with all five axes named, in the order `config.AXES`.

    Args:
        config: resolved sizes (none is -1).
        devices: the devices to use; default: all of them, ordered so that neighbours on the mesh are near.
    """
    shape = tuple(getattr(config, axis) for axis in AXES)
    types = (AxisType.Auto,) * len(AXES)
    if devices is None:
        return Mesh(mesh_devices(shape, jax.devices()), AXES, axis_types=types)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=types)


def _spec(letters: str, table: dict, name: str) -> PartitionSpec:
    unknown = [letter for letter in letters if letter not in table]
    if unknown or not letters:
        raise ValueError(
            f"{name!r}: no sharding is known for {unknown or 'an empty suffix'}; letters: {''.join(table)}"
        )
    return PartitionSpec(*(table[letter] for letter in letters))


def suffix(name: str) -> str:
    """Returns the shape letters of a name: `w_gate_EDF` -> `EDF`.

    Raises:
        ValueError: the name has no suffix of capitals.
    """
    letters = name.rpartition("_")[2]
    if not letters.isalpha() or not letters.isupper():
        raise ValueError(f"{name!r} does not end in shape letters such as _EDF")
    return letters


def param_spec(name: str, ndim: int) -> PartitionSpec:
    """Reads a parameter's PartitionSpec off its name; one dimension more than letters is the stacked layers'.

    Raises:
        ValueError: unknown letter, missing suffix, or a rank that does not fit.
    """
    letters = suffix(name)
    spec = PartitionSpec(*EXCEPTIONS[name]) if name in EXCEPTIONS else _spec(letters, PARAM_AXES, name)
    if ndim == len(letters) + 1:
        return PartitionSpec(None, *spec)
    if ndim != len(letters):
        raise ValueError(f"{name!r} names {len(letters)} dimensions and the array has {ndim}")
    return spec


def act_spec(letters: str) -> PartitionSpec:
    """PartitionSpec of an activation with these letters, such as `BTD`."""
    return _spec(letters, ACT_AXES, letters)


def constrain(x, letters: str):
    """Pins an activation's sharding to its letters; without a mesh it returns `x` untouched, so unit tests need none."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, act_spec(letters))


def everywhere(x):
    """Gives every device all of `x`, so that each process can fetch it; without a mesh it returns `x` untouched."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def path_names(path) -> list[str]:
    """The readable parts of a tree path, without nnx's `value`: `['layers', 'w_gate_EDF']`."""
    parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return [part for part in parts if part != "value"]


def named_leaves(tree) -> dict[str, jax.Array]:
    """Flattens a pytree to `{'layers.w_gate_EDF': leaf, ...}`; the names are what checkpoints and logs use."""
    return {".".join(path_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def tree_shardings(tree, mesh: Mesh, params):
    """NamedShardings for any tree that holds parameters or arrays that mirror them (gradients, moments).

    A leaf whose path ends in a parameter's path and whose shape is that parameter's is sharded like it. Anything else
    (counters, factored statistics) is small and replicated.

    Args:
        tree: arrays or ShapeDtypeStructs.
        mesh: the mesh.
        params: the parameters, the authority on names and shapes.
    """
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}

    def sharding(path, leaf):
        parts = path_names(path)
        for start in range(len(parts)):
            if shapes.get(".".join(parts[start:])) == leaf.shape:
                return NamedSharding(mesh, param_spec(parts[-1], len(leaf.shape)))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def without_context(mesh: Mesh) -> Mesh:
    """The same devices with the axis `context` of size 1, its replicas of the parameters joined to `data`'s.

    For what reads one token at a time and has no T to split. Parameters lie on both meshes alike: see `moved`.
    """
    devices = mesh.devices.transpose(0, 3, 1, 2, 4)
    sizes = dict(mesh.shape) | {"data": mesh.shape["data"] * mesh.shape["context"], "context": 1}
    return Mesh(devices.reshape([sizes[axis] for axis in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def moved(params, mesh: Mesh):
    """Parameters of another mesh of the same devices, seen as this mesh's: the same buffers, nothing is copied.

    Raises:
        ValueError: the two meshes would give a device different parts.
    """

    def leaf(path, x):
        sharding = NamedSharding(mesh, param_spec(path_names(path)[-1], x.ndim))
        if sharding.devices_indices_map(x.shape) != x.sharding.devices_indices_map(x.shape):
            raise ValueError(f"{path_names(path)[-1]}: the meshes {x.sharding.mesh} and {mesh} divide it differently")
        return jax.make_array_from_single_device_arrays(x.shape, sharding, [s.data for s in x.addressable_shards])

    return jax.tree_util.tree_map_with_path(leaf, params)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, letters: str = "BT") -> NamedSharding:
    """The sharding of a batch field."""
    return NamedSharding(mesh, act_spec(letters))


def constrain_params(tree):
    """Pins a tree of parameters or gradients to the shardings of their names; a no-op without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def pin(path, leaf):
        return jax.lax.with_sharding_constraint(leaf, param_spec(path_names(path)[-1], leaf.ndim))

    return jax.tree_util.tree_map_with_path(pin, tree)


def zigzag(t: int, shards: int) -> np.ndarray:
    """The order of a row's columns on a mesh whose axis `context` has so many shards: int32 [T], places in the row.

    The row is cut into 2 * shards pieces and shard i holds pieces i and 2 * shards - 1 - i. A query sees the keys before
    it, so an early piece is little work and a late one much; in these pairs all shards have the same.

    Raises:
        ValueError: T does not divide into the pieces; resolve_mesh checks train.seq_len.
    """
    if shards == 1:
        return np.arange(t, dtype=np.int32)
    if t % (2 * shards):
        raise ValueError(f"rows of {t} columns cannot be cut into 2 * {shards} pieces of equal size")
    pieces = np.arange(t, dtype=np.int32).reshape(2 * shards, -1)
    return np.concatenate([pieces[[i, 2 * shards - 1 - i]].reshape(-1) for i in range(shards)])


def unzigzag(x_BT, shards: int):
    """Puts columns (axis 1) that are in zig-zag order back into row order: two slices and no gather."""
    b, t = x_BT.shape[:2]
    pieces = x_BT.reshape(b, shards, 2, t // (2 * shards), *x_BT.shape[2:])
    return jnp.concatenate([pieces[:, :, 0], pieces[:, ::-1, 1]], axis=1).reshape(x_BT.shape)


def place(batch: dict, mesh: Mesh, start: int = 0, rows: int | None = None) -> dict[str, jax.Array]:
    """Puts a host batch's arrays on the mesh. What is no array stays behind.

    A field's layout is read off its name. On a mesh with `context` the columns of those that end in BT are put in zig-zag order: losses are sums over tokens, and
    positions and segment ids say where a token belongs. `hidden` relies on that order.

    Args:
        batch: all rows of the global batch, or those from `start` on that this process's devices hold
            (distributed.rows_here).
        mesh: the mesh.
        start: number of the first row that `batch` holds.
        rows: rows of the global batch; default: those of `batch`.
    """

    def put(name, value):
        letters = suffix(name)
        if letters == "BT" and mesh.shape["context"] > 1:
            value = value[:, zigzag(value.shape[1], mesh.shape["context"])]

        def part(index):
            first, stop, _ = index[0].indices(shape[0])
            return value[first - start : stop - start, index[1]]

        shape = (rows or len(value), *value.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, letters), part)

    return {name: put(name, value) for name, value in batch.items() if isinstance(value, np.ndarray)}
