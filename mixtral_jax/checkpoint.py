"""Checkpoints with Orbax: parameters, optimizer state and metadata as separate items of one step.

Arrays are stored under their names (`layers.w_gate_EDF`), so that a checkpoint does not depend on the layout of nnx or
optax trees, and the parameters can be restored alone, on any mesh.
"""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mixtral_jax.config import UserError
from mixtral_jax.sharding import named_leaves

# The largest piece in which an array is stored. Orbax's default is a device's whole shard, so that whoever wants one
# layer (an export, another mesh) would have to read and unpack all of it.
CHUNK_BYTES = 64 * 2**20
EXPERT_WEIGHTS = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")


def _save(tree) -> ocp.args.StandardSave:
    leaves = named_leaves(tree)
    return ocp.args.StandardSave(leaves, save_args={name: _save_args(name, leaf) for name, leaf in leaves.items()})


def _save_args(name: str, leaf) -> ocp.SaveArgs:
    """Large stacked arrays are cut by layer and by expert first: left to itself Orbax cuts the longest dimensions."""
    if leaf.nbytes <= CHUNK_BYTES:
        return ocp.SaveArgs()
    *parents, last = name.split(".")
    axes = (0,) if "layers" in parents else ()
    if axes and last in EXPERT_WEIGHTS:
        axes = (0, 1)
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)


def _refill(like, leaves: dict[str, jax.Array]):
    order = list(named_leaves(like))
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in order])


def _abstract(like) -> dict[str, jax.ShapeDtypeStruct]:
    return {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in named_leaves(like).items()}


class Checkpoints:
    """The checkpoints of a run, in `workdir/checkpoints/STEP`, written in the background."""

    def __init__(self, workdir: str | Path, keep: int = 1):
        """Opens (or creates) the folder; `keep` is the number of latest checkpoints that stay."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.folder = Path(workdir).resolve() / "checkpoints"
        # Named here, so that a fresh process can read an item's metadata before it restores anything.
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "opt_state": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, params, opt_state, meta: dict[str, Any]) -> None:
        """Starts a save and returns; arrays are copied before the call ends, so they may be donated afterwards."""
        items = ocp.args.Composite(
            params=_save(params),
            opt_state=_save(opt_state),
            meta=ocp.args.JsonSave(meta),
        )
        self._manager.save(step, args=items)

    def restore(self, step: int, params, opt_state) -> tuple[Any, Any]:
        """Restores a step onto the shardings of `params` and `opt_state` (arrays or ShapeDtypeStructs with shardings).

        Raises:
            UserError: the checkpoint is of another model or another optimizer, or was imported and has no optimizer state.
        """
        if not (self.folder / str(step) / "opt_state").is_dir():
            raise UserError(
                f"the checkpoint {self.folder}/{step} has no optimizer state (it was imported); train in another workdir"
            )
        self._check(step, "params", params, "model")
        self._check(step, "opt_state", opt_state, "optimizer")
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(params)),
            opt_state=ocp.args.StandardRestore(_abstract(opt_state)),
        )
        found = self._manager.restore(step, args=items)
        return _refill(params, found["params"]), _refill(opt_state, found["opt_state"])

    def restore_params(self, step: int, params):
        """Restores the parameters alone onto the shardings of `params`.

        Raises:
            UserError: the checkpoint is of another model.
        """
        self._check(step, "params", params, "model")
        items = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(params)))
        return _refill(params, self._manager.restore(step, args=items)["params"])

    def meta(self, step: int) -> dict[str, Any]:
        """Reads what was stored beside the arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def _check(self, step: int, item: str, like, what: str) -> None:
        """Refuses arrays of other names or shapes: Orbax would quietly pad or cut an array of another shape."""
        stored = {name: tuple(leaf.shape) for name, leaf in self._manager.item_metadata(step)[item].items()}
        wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(like).items()}
        names = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        if names:
            lines = [f"  {n}: checkpoint {stored.get(n, 'none')}, now {wanted.get(n, 'none')}" for n in names[:12]]
            more = [f"  and {len(names) - 12} more"] if len(names) > 12 else []
            raise UserError(
                f"the checkpoint {self.folder}/{step} is of another {what}; use its own configuration or another workdir:\n"
                + "\n".join(lines + more)
            )

    def close(self) -> None:
        """Waits for the save in flight and releases the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def store_run(workdir: Path, config: dict) -> None:
    """Writes config.json, what a run is resumed and evaluated with."""
    (workdir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_run(workdir: Path) -> dict:
    """Reads the config.json of a run.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    path = Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; --checkpoint takes the workdir of a run") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
