"""What `--checkpoint` and `train.init_from` name: the workdir of a run, the folder of one of its steps, or `hf:DIR`."""

import dataclasses
import os
from pathlib import Path

from etils import epath

from mixtral_jax import mirror
from mixtral_jax.checkpoint import Checkpoints, steps_in
from mixtral_jax.config import UserError
from mixtral_jax.remote import first_line, folder, is_remote

FOREIGN, BEST = "hf:", "best"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where weights lie."""

    folder: Path | epath.Path  # the workdir of a run, or a directory of Hugging Face's or Mistral's
    step: int | None  # None: files of others

    @property
    def local(self) -> Path:
        """Where config.json and tokenizer/ are read: the folder, or what was fetched of one on an object store."""
        return mirror.local_copy(self.folder)

    def __str__(self) -> str:
        return f"{FOREIGN}{self.folder}" if self.step is None else f"{self.folder}, step {self.step}"


def parse_step(text: str) -> int | str:
    """Reads the value of --step: a number, or "best".

    Raises:
        UserError: it is neither.
    """
    if text == BEST or text.isdecimal():
        return text if text == BEST else int(text)
    raise UserError(f"--step={text}; give the number of a checkpoint, or best (the one of the lowest held-out loss)")


def resolve_checkpoint(spec: str | Path, step: int | str | None = None) -> Checkpoint:
    """Finds what a checkpoint's name means; no array is read yet.

    Of one on an object store the configuration and the tokenizer are fetched; its arrays are read where they are.

    Args:
        spec: a workdir (its newest step) or `WORKDIR/checkpoints/STEP`, here or on an object store, or `hf:DIR`.
        step: of a workdir, one of its steps instead of the newest; "best" is that of the lowest held-out loss.

    Raises:
        UserError: there is no such checkpoint, or its store cannot be read.
    """
    text = os.fspath(spec)
    name = text.removeprefix(FOREIGN)
    if not is_remote(name):
        return _find(Path(name).expanduser(), text, step)
    if text.startswith(FOREIGN):
        raise _copy_first(name)
    try:
        found = _find(folder(name), text, step)
    except UserError:
        raise
    except Exception as error:  # each store's library has errors of its own
        raise UserError(f"{text} cannot be read: {first_line(error)}") from error
    mirror.fetch_description(found.folder)
    return found


def _copy_first(name: str) -> UserError:
    return UserError(
        f"{name}: files of Hugging Face's or Mistral's are mapped from a disk and not read from an object store; copy them to a "
        f"folder of this machine first (gs://: gcloud storage cp -r {name} .)"
    )


def _find(path: Path | epath.Path, text: str, step: int | str | None) -> Checkpoint:
    if not path.is_dir():
        raise UserError(f"{path} is no directory; give a run's workdir, WORKDIR/checkpoints/STEP or hf:DIR")
    if text.startswith(FOREIGN):
        return _foreign(path, text, step)
    if (path / "params").is_dir() and path.name.isdecimal():
        if step not in (None, int(path.name)):
            raise UserError(f"{path} is step {path.name} and --step={step}; leave one of them out")
        return Checkpoint((path if is_remote(path) else path.absolute()).parent.parent, int(path.name))
    if is_foreign(path):
        if is_remote(path):
            raise _copy_first(str(path))
        raise UserError(f"{path} is no run of ours; for files of Hugging Face's or Mistral's write hf:{path}")
    if step == BEST:
        step = _best(path)
    checkpoints = path / "checkpoints"
    steps = [n for n in steps_in(checkpoints) if (checkpoints / str(n) / "params").is_dir()]
    if step not in (None, *steps) or not steps:
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(f"{path} has no checkpoint {'' if step is None else f'of step {step} '}(there: {there})")
    return Checkpoint(path, max(steps) if step is None else step)


def _best(workdir: Path | epath.Path) -> int:
    best = None
    if (workdir / "checkpoints").is_dir():
        checkpoints = Checkpoints(workdir)
        best = checkpoints.best()
        checkpoints.close()
    if best is None:
        raise UserError(
            f"{workdir} has no checkpoint whose held-out loss is known; it is where train.eval_every and "
            "train.checkpoint_every meet. Leave --step out for the newest"
        )
    return best


def is_foreign(path: Path) -> bool:
    """Whether a directory looks like one of Hugging Face's or Mistral's."""
    ours = (path / "checkpoints").is_dir() or (path / "params").is_dir()
    return not ours and any(any(path.glob(pattern)) for pattern in ("*.safetensors*", "params.json", "pytorch_model*"))


def _foreign(path: Path, text: str, step: int | None) -> Checkpoint:
    if step is not None:
        raise UserError(f"--step={step}: {text} has no steps; leave it out")
    if not is_foreign(path):
        raise UserError(
            f"{path} holds no weights of Hugging Face's or Mistral's (safetensors beside a config.json or params.json); "
            "hf: is for such a directory, and a run of ours is named without it"
        )
    return Checkpoint(path, None)
