"""What `--checkpoint` and `train.init_from` name: the workdir of a run, the folder of one of its steps, or `hf:DIR`."""

import dataclasses
from pathlib import Path

from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import UserError

FOREIGN, BEST = "hf:", "best"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where weights lie."""

    folder: Path  # the workdir of a run, or a directory of Hugging Face's or Mistral's
    step: int | None  # None: files of others

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

    Args:
        spec: a workdir (its newest step), `WORKDIR/checkpoints/STEP`, or `hf:DIR`.
        step: of a workdir, one of its steps instead of the newest; "best" is that of the lowest held-out loss.

    Raises:
        UserError: there is no such checkpoint.
    """
    text = str(spec)
    path = Path(text.removeprefix(FOREIGN)).expanduser()
    if not path.is_dir():
        raise UserError(f"{path} is no directory; give a run's workdir, WORKDIR/checkpoints/STEP or hf:DIR")
    if text.startswith(FOREIGN):
        return _foreign(path, text, step)
    if (path / "params").is_dir() and path.name.isdecimal():
        if step not in (None, int(path.name)):
            raise UserError(f"{path} is step {path.name} and --step={step}; leave one of them out")
        return Checkpoint(path.absolute().parent.parent, int(path.name))
    if is_foreign(path):
        raise UserError(f"{path} is no run of ours; for files of Hugging Face's or Mistral's write hf:{path}")
    if step == BEST:
        step = _best(path)
    folder = path / "checkpoints"
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdecimal() and (p / "params").is_dir()]
    if step not in (None, *steps) or not steps:
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(f"{path} has no checkpoint {'' if step is None else f'of step {step} '}(there: {there})")
    return Checkpoint(path, max(steps) if step is None else step)


def _best(workdir: Path) -> int:
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
