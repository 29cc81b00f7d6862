"""Checkpoints with Orbax: parameters, optimizer state, data state and metadata as separate items of one step.

Arrays are stored under their names (`layers.w_gate_EDF`), so that a checkpoint does not depend on the layout of nnx or
optax trees, and the parameters can be restored alone, on any mesh. The metadata holds a fingerprint of every array and
of itself: what comes back is what was saved, or the checkpoint is called damaged.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mixtral_jax import distributed
from mixtral_jax.config import RunError, UserError
from mixtral_jax.fingerprint import fingerprints
from mixtral_jax.remote import folder, is_remote
from mixtral_jax.sharding import named_leaves

# The largest piece in which an array is stored. Orbax's default is a device's whole shard, so that whoever wants one
# layer (an export, another mesh) would have to read and unpack all of it.
CHUNK_BYTES = 64 * 2**20
# Parts of names of folders that are no checkpoint: of Orbax, still being written; of ours, being removed.
COMMITTED = "commit_success.txt"  # Orbax's mark of a whole checkpoint on an object store, where nothing can be renamed
UNFINISHED, REMOVED = "orbax-checkpoint-tmp", ".removed"
FILE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOENT)
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


class _Noted:
    """A future of Orbax's that keeps its error: Orbax's own thread takes it away and waits for the other processes."""

    def __init__(self, future, note: Callable[[Exception], None]):
        self._future, self._note = future, note

    def result(self, timeout: float | None = None):
        try:
            return self._future.result(timeout)
        except Exception as error:
            self._note(error)
            raise


def _handler(note: Callable[[Exception], None]) -> ocp.StandardCheckpointHandler:
    """A handler that notes what goes wrong in the background in this process. Orbax knows its arguments by its class."""
    handler = ocp.StandardCheckpointHandler()
    save = handler.async_save

    async def async_save(*args, **kwargs):
        return [_Noted(each, note) for each in await save(*args, **kwargs) or []]

    handler.async_save = async_save
    return handler


class DamagedError(RunError):
    """A checkpoint cannot be read, or what was read is not what was saved."""


class SaveError(RunError):
    """A checkpoint could not be written; the earlier ones are as they were."""


class Checkpoints:
    """The checkpoints of a run, in `workdir/checkpoints/STEP`, written in the background.

    A folder named STEP is whole: Orbax writes it aside and renames it, and what is removed is renamed before it is.
    """

    def __init__(
        self,
        workdir: str | Path,
        keep: int = 1,
        *,
        keep_every: int = 0,
        keep_best: bool = False,
        keep_going: bool = False,
    ):
        """Opens (or creates) the folder.

        Args:
            workdir: the folder of the run.
            keep: how many of the latest checkpoints stay.
            keep_every: those of a multiple of so many steps stay too; 0 for none.
            keep_going: a failed save does not end the run; matters to several processes only.
            keep_best: the one with the lowest "heldout_loss" in its metadata stays too.
        """
        self.folder = folder(workdir) / "checkpoints"
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._keep_going = keep_going
        self._pending: int | None = None  # the step whose save is in flight
        self._failed = False  # some save
        self._broken: Exception | None = None  # what broke this process's part of the save in flight
        self._removing: list[threading.Thread] = []
        self._open()

    def _open(self) -> None:
        # Named here, so that a fresh process can read an item's metadata before it restores anything.
        handlers = {
            "params": _handler(self._note),
            "opt_state": _handler(self._note),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        # What is kept is decided below, after a save is known to be whole.
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)

    def _note(self, error: Exception) -> None:
        self._broken = self._broken or error

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """All finished checkpoints, oldest first."""
        return steps_in(self.folder)

    def agreed_steps(self) -> list[int]:
        """As steps(), but what process 0 sees, on all: another's view of a network's file system may lag."""
        return distributed.decided("steps", self.steps)

    def clean(self) -> list[str]:
        """Removes what a killed process left half-written or half-removed; returns the folders' names.

        Only the process that holds the workdir does so; all call it.
        """
        found = distributed.decided("clean", self._clean)
        if found:
            self._manager.reload()  # it may have taken one of them for a checkpoint
        return found

    def _clean(self) -> list[str]:
        found = [path for path in self.folder.iterdir() if path.is_dir() and not _is_whole(path)]
        found = [
            path for path in found if path.name.isdigit() or UNFINISHED in path.name or path.name.endswith(REMOVED)
        ]
        for path in found:
            _remove_tree(path)
        return sorted(path.name for path in found)

    def save(self, step: int, params, opt_state, meta: dict[str, Any], data: dict[str, Any] | None = None) -> None:
        """Starts a save and returns; arrays are copied before the call ends, so they may be donated afterwards.

        Args:
            step: the number of the checkpoint.
            params, opt_state: trees of arrays.
            meta: what is stored beside them; "heldout_loss" decides which is best.
            data: the state of the data, see data.loader.prefetch.

        Raises:
            SaveError: this save or the one before it failed.
        """
        self.finish()
        items = {"params": params, "opt_state": opt_state}
        meta = sealed(meta | {"arrays": {item: _described(tree) for item, tree in items.items()}})
        arguments = ocp.args.Composite(
            params=_save(params),
            opt_state=_save(opt_state),
            data=ocp.args.JsonSave(sealed({"state": data or {}})),
            meta=ocp.args.JsonSave(meta),
        )
        self._pending, self._broken = step, None
        self._attempt("save", lambda: self._manager.save(step, args=arguments))

    def poll(self) -> int | None:
        """Returns the step of a save that has ended since the last call, or None; never waits.

        One process of several sees the end of its own part only, so that there the next save or finish() tells.

        Raises:
            SaveError: that save failed.
        """
        if self._pending is None or distributed.together() or self._manager.is_saving_in_progress():
            return None
        return self.finish()

    def failing(self) -> None:
        """Raises the error of this process's part of the save in flight, if there is one already; never waits.

        Raises:
            SaveError: it failed here. The other processes do not know yet.
        """
        if self._pending is None:
            return
        if self._broken is not None:
            self._told(self._pending, _first_line(self._broken), self._broken)

    def finish(self) -> int | None:
        """Waits for the save in flight; returns its step, or None if there was none.

        Raises:
            SaveError: it failed.
        """
        if self._pending is None:
            return None
        while distributed.together() and not self._keep_going and self._manager.is_saving_in_progress():
            self.failing()  # Orbax would wait for the others, which it does not tell
            time.sleep(0.02)
        self._attempt("finish", self._manager.wait_until_finished)
        step, self._pending = self._pending, None
        if not distributed.decided("whole", lambda: (self.folder / str(step)).is_dir()):
            raise SaveError(f"the checkpoint of step {step} has vanished from {self.folder}")
        self._remove_old()
        return step

    def _attempt(self, name: str, act: Callable) -> None:
        """Does a part of a save on all processes; where one fails, all have failed and leave no trace of it.

        Raises:
            SaveError: one failed.
        """
        error = None
        try:
            act()
        except Exception as raised:
            error = raised
        if error is not None and distributed.together() and not self._keep_going:
            self._told(
                self._pending, _first_line(error), error
            )  # the others wait inside Orbax; the run's end ends them
        told = distributed.exchange(name, "" if error is None else _first_line(error))
        failed = [(i, text) for i, text in enumerate(told) if text]
        if not failed:
            return
        step, self._pending, self._failed = self._pending, None, True
        with contextlib.suppress(OSError, RunError):
            self.clean()
            self._open()  # the failed manager would repeat its error for ever
        i, text = failed[0]
        self._told(step, f"process {i}: {text}" if distributed.together() else text, error)

    def _told(self, step: int, reason: str, error: Exception | None) -> None:
        last = self.latest()
        stands = "there is no earlier one" if last is None else f"{self.folder}/{last} is the last good one"
        raise SaveError(
            f"the checkpoint of step {step} could not be written: {reason}; {stands}{_room(self.folder)}"
        ) from error

    def _remove_old(self) -> None:
        """Removes what need not be kept, on process 0."""
        best = self.best() if self._keep_best else None
        distributed.decided("removed", lambda: self._remove(best))
        self._manager.reload()

    def _remove(self, best: int | None) -> None:
        steps = self.steps()
        kept = set(steps[-self._keep :])
        if self._keep_every:
            kept |= {step for step in steps if step % self._keep_every == 0}
        kept.add(best)
        for step in steps:
            if step in kept:
                continue
            if is_remote(self.folder):
                with contextlib.suppress(Exception):
                    (self.folder / str(step) / COMMITTED).unlink()  # what is left is not whole, so it is no checkpoint
                    _remove_tree(self.folder / str(step))
                continue
            doomed = self.folder / f"{step}{REMOVED}"
            with contextlib.suppress(OSError):  # a folder that cannot be removed costs space and nothing else
                # A rename is all or nothing: a process killed here leaves no half of a checkpoint under its number.
                (self.folder / str(step)).rename(doomed)
                thread = threading.Thread(target=shutil.rmtree, args=(doomed,), kwargs={"ignore_errors": True})
                thread.start()
                self._removing.append(thread)

    def best(self) -> int | None:
        """The step with the lowest held-out loss, or None."""
        losses = {}
        for step in self.agreed_steps():
            with contextlib.suppress(DamagedError):
                loss = self.meta(step).get("heldout_loss")
                if loss is not None and math.isfinite(loss):
                    losses[step] = loss
        return min(losses, key=losses.get, default=None)

    def restore(self, step: int, params, opt_state) -> tuple[Any, Any]:
        """Restores a step onto the shardings of `params` and `opt_state` (arrays or ShapeDtypeStructs with shardings).

        Raises:
            UserError: the checkpoint is of another model or another optimizer, or was imported and has no optimizer state.
            DamagedError: it cannot be read, or is not what was saved.
        """
        arrays = self.meta(step).get("arrays", {})
        if "opt_state" not in arrays and not (self.folder / str(step) / "opt_state").is_dir():
            raise UserError(
                f"the checkpoint {self.folder}/{step} has no optimizer state (it was imported); "
                "train in another workdir, with train.init_from set to this one"
            )
        return tuple(self._restore(step, {"params": params, "opt_state": opt_state}, arrays))

    def restore_params(self, step: int, params):
        """Restores the parameters alone onto the shardings of `params`.

        Raises:
            UserError: the checkpoint is of another model.
            DamagedError: it cannot be read, or is not what was saved.
        """
        (found,) = self._restore(step, {"params": params}, self.meta(step).get("arrays", {}))
        return found

    def _restore(self, step: int, wanted: dict[str, Any], arrays: dict[str, dict]) -> list[Any]:
        for item, like in wanted.items():
            self._check(step, item, like, arrays.get(item))
        items = {item: ocp.args.StandardRestore(_abstract(like)) for item, like in wanted.items()}
        found = self._read(step, ocp.args.Composite(**items))
        for item in wanted:
            said, is_ = arrays.get(item), found[item]
            if said is None:  # imported: there was nothing to take fingerprints of before it was written
                continue
            now = fingerprints(is_)
            wrong = [name for name in now if now[name] != said[name]["fingerprint"]]
            if wrong:
                raise DamagedError(
                    f"the checkpoint {self.folder}/{step} is damaged: {len(wrong)} of {len(now)} arrays are not what was saved "
                    f"({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''})"
                )
        return [_refill(like, found[item]) for item, like in wanted.items()]

    def meta(self, step: int) -> dict[str, Any]:
        """Reads what was stored beside the arrays.

        Raises:
            DamagedError: it cannot be read, or is not what was saved.
        """
        return self._sealed(step, "meta")

    def data(self, step: int) -> dict[str, Any]:
        """Reads the state of the data; {} where there is none.

        Raises:
            DamagedError: it cannot be read, or is not what was saved.
        """
        return self._sealed(step, "data")["state"]

    def _sealed(self, step: int, item: str) -> dict[str, Any]:
        found = self._read(step, ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]
        # Imported checkpoints have metadata without a seal, and nothing in it that decides anything.
        if not isinstance(found, dict) or (
            ("seal" in found or "arrays" in found or item == "data") and sealed(found) != found
        ):
            raise DamagedError(f"the checkpoint {self.folder}/{step} is damaged: its {item} is not what was saved")
        return found

    def set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint to `workdir/damaged/`, out of the way of the next save; returns where it is now.

        Process 0 does; all call it.
        """
        target = distributed.decided("set aside", lambda: str(self._set_aside(step)))
        self._manager.reload()
        return Path(target)

    def _set_aside(self, step: int) -> Path:
        folder = self.folder.parent / "damaged"
        folder.mkdir(exist_ok=True)
        names = (f"{step}" + (f"-{n}" if n else "") for n in range(10**6))
        target = next(folder / name for name in names if not (folder / name).exists())
        (self.folder / str(step)).rename(target)
        return target

    def _read(self, step: int, arguments: ocp.args.Composite):
        try:
            return self._manager.restore(step, args=arguments)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # out of memory says nothing about the checkpoint
        except Exception as error:  # Orbax and tensorstore raise many kinds for files that are missing, cut or changed
            raise DamagedError(f"the checkpoint {self.folder}/{step} is damaged: {_first_line(error)}") from error

    def _check(self, step: int, item: str, like, said: dict[str, dict] | None) -> None:
        """Refuses arrays of other names or shapes: Orbax would quietly pad or cut an array of another shape."""
        if said is not None:
            stored = {name: tuple(leaf["shape"]) for name, leaf in said.items()}
        else:
            found = self._manager.item_metadata(step)[item]
            stored = {name: tuple(leaf.shape) for name, leaf in found.items()}
        wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(like).items()}
        names = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        if names:
            what = {"params": "model", "opt_state": "optimizer"}[item]
            lines = [f"  {n}: checkpoint {stored.get(n, 'none')}, now {wanted.get(n, 'none')}" for n in names[:12]]
            more = [f"  and {len(names) - 12} more"] if len(names) > 12 else []
            raise UserError(
                f"the checkpoint {self.folder}/{step} is of another {what}; use its own configuration or another workdir:\n"
                + "\n".join(lines + more)
            )

    def close(self) -> None:
        """Waits for the save in flight and releases the folder.

        Raises:
            SaveError: that save failed.
        """
        try:
            self.finish()
        finally:
            for thread in self._removing:
                thread.join()
            if self._failed and distributed.speaks():
                with contextlib.suppress(OSError):
                    self._clean()  # again: writes of a failed save may still have been under way when it was given up
            self._manager.close()


def steps_in(folder: Path) -> list[int]:
    """The steps that have a finished checkpoint in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and _is_whole(path))


def _is_whole(path: Path) -> bool:
    """Whether a folder is a finished checkpoint: its name says so, where Orbax renames; on an object store a mark in it."""
    return path.name.isdigit() and (not is_remote(path) or (path / COMMITTED).exists())


def _remove_tree(path: Path) -> None:
    if is_remote(path):
        path.rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """Returns metadata with a checksum of itself under "seal"."""
    content = {key: value for key, value in meta.items() if key != "seal"}
    text = json.dumps(content, sort_keys=True)
    return content | {"seal": hashlib.sha256(text.encode()).hexdigest()}


def _described(tree) -> dict[str, dict[str, Any]]:
    found = fingerprints(tree)
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "fingerprint": found[name]}
        for name, leaf in named_leaves(tree).items()
    }


def _first_line(error: Exception) -> str:
    """What a person needs of an error: the operating system's words where they are in it, else its beginning."""
    text = str(error)
    told = next((os.strerror(number) for number in FILE_ERRORS if os.strerror(number) in text), None)
    return told or (text.strip() or type(error).__name__).splitlines()[0][:300]


def _room(folder: Path) -> str:
    """Says how full the disk is, where that can be told."""
    if is_remote(folder):
        return ""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return f". {folder} cannot be looked at: {error.strerror}"
    return f". {folder} has {usage.free / 1e6:,.0f} MB free of {usage.total / 1e6:,.0f} MB"
