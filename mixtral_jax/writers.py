"""Where metrics go: metrics.jsonl (the truth), TensorBoard, and Weights & Biases if the configuration asks for it."""

import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.config import Config, UserError
from mixtral_jax.events import EventFile
from mixtral_jax.jsonl import JsonlWriter, make_line, read_jsonl
from mixtral_jax.progress import printable

_log = logging.getLogger(__name__)

ROUTER = ("balance_loss", "router_z_loss")  # scalars that belong to the router's section


class MetricsWriter:
    """Writes each line to every place; use as a context manager or close() it."""

    def __init__(self, workdir: str | os.PathLike, config: Config, resume_step: int | None, keep_going: bool = False):
        """Opens workdir/metrics.jsonl, a file in workdir/tensorboard/ and, with train.wandb, a Weights & Biases run.

        Args:
            workdir: the folder of the run.
            config: `train.wandb` is the project; all of it is stored with the run there.
            resume_step: the step a run resumes from: what was written of later steps is dropped, and nothing is counted
                twice. -1 or None: there is no checkpoint, the run starts afresh.
            keep_going: a file that cannot be written is logged once, and its latest lines wait in memory until it can.

        Raises:
            UserError: train.wandb is set and Weights & Biases cannot be used.
            RunError: a file cannot be written.
        """
        require_wandb(config)
        workdir = Path(workdir)
        resume_step = -1 if resume_step is None else resume_step
        path = workdir / "metrics.jsonl"
        written = _last_step(path) if config.train.wandb else -1
        self._jsonl = JsonlWriter(path, resume_step, keep_going)
        self._events = EventFile(workdir / "tensorboard", resume_step, keep_going)
        self._wandb = None
        if config.train.wandb:
            self._wandb = WandbRun(workdir, config, resume_step >= 0, written)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line; for the arguments see jsonl.make_line().

        Raises:
            ValueError: a value named kind, step, time or nonfinite.
            RunError: a file cannot be written (unless keep_going).
        """
        line = make_line(kind, step, values)
        self._jsonl.append(line)
        tagged = tags(line)
        self._events.write(line["step"], line["time"], tagged)
        if self._wandb is not None:
            self._wandb.write(line["step"], tagged)

    def close(self) -> None:
        """Closes everything; a second call does nothing."""
        try:
            self._jsonl.close()
        finally:
            try:
                self._events.close()
            finally:
                if self._wandb is not None:
                    self._wandb.close()
                    self._wandb = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _last_step(path: Path) -> int:
    return max((line.get("step", 0) for line in read_jsonl(path)), default=-1) if path.exists() else -1


def _stored(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return {"id": str(found["id"]), "step": int(found["step"])}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and the run goes on under a new id") from error


def tags(line: Mapping[str, Any]) -> dict[str, float | str | list[float]]:
    """Sorts the values of a line into sections, as viewers group by what stands before the slash.

    `train/`, `heldout/`, `eval/`, `final/` hold a kind's scalars; of a train line seconds and goodput go to `time/`, what
    concerns the router to `router/`. A list over layers (entropy_L) becomes a scalar of each layer,
    `router_entropy/layer_03`; a table over layers and experts (load_LE) a histogram of each layer. Sessions and what is
    null are left out.
    """
    kind, found = line["kind"], {}
    if kind == "session":
        return found
    for key, value in line.items():
        if key in ("kind", "step", "time", "nonfinite", "number") or value is None:
            continue
        if isinstance(value, list):
            name, _, letters = key.rpartition("_")
            prefix = f"router_{name}/layer_" if letters in ("L", "LE") else f"{kind}_{key}/"
            found |= {f"{prefix}{i:02d}": item for i, item in enumerate(value) if _whole(item)}
        elif isinstance(value, str):
            found[f"{kind}/{key}{_number(line)}"] = printable(value)
        else:
            found[f"{_section(kind, key)}/{key}"] = value
    return found


def _number(line: Mapping[str, Any]) -> str:
    """Of several texts of a step all but the first have their number in the name."""
    return f"_{line['number']}" if line.get("number", 1) > 1 else ""


def _whole(item: Any) -> bool:
    return None not in item if isinstance(item, list) else item is not None


def _section(kind: str, key: str) -> str:
    if kind != "train":
        return kind
    if key.endswith("_seconds") or key == "goodput":
        return "time"
    return "router" if key in ROUTER else "train"


def require_wandb(config: Config) -> None:
    """Checks that Weights & Biases is there if the configuration asks for it; cheap, for the very start of a command.

    Raises:
        UserError: train.wandb is set and the package is missing.
    """
    if config.train.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"train.wandb={config.train.wandb!r} needs the wandb package: pip install wandb, or set train.wandb=''"
        )


class WandbRun:
    """A Weights & Biases run that outlives restarts. Its mode is wandb's own affair (WANDB_MODE=offline)."""

    def __init__(self, workdir: Path, config: Config, resumed: bool, written: int):
        """Starts the run, or resumes the one whose id lies in workdir/wandb.json.

        Args:
            workdir: the folder of the run.
            config: stored with the run.
            resumed: the training run resumes: then Weights & Biases being out of reach does not stop it.
            written: the last step that stands in metrics.jsonl, before the lines that a resume drops were dropped; -1.

        Raises:
            UserError: a first start, and wandb does not start.
        """
        import wandb

        path = workdir / "wandb.json"
        stored = _stored(path) if path.exists() else {"id": uuid.uuid4().hex[:12], "step": -1}
        # Its history only grows: a step that is there cannot be written again, and is not, whatever a crash undid.
        self._written = max(stored["step"], written) if path.exists() else -1
        new = path.with_name("wandb.json.new")
        new.write_text(json.dumps({"id": stored["id"], "step": self._written}) + "\n")
        os.replace(new, path)
        self._run = None
        try:
            self._run = wandb.init(
                project=config.train.wandb,
                id=stored["id"],
                resume="allow",
                name=workdir.resolve().name,
                dir=str(workdir),
                config=config.to_dict(),
            )
        except Exception as error:  # wandb's errors have no common base
            text = f"Weights & Biases did not start: {str(error) or type(error).__name__}"
            if not resumed:
                raise UserError(f"{text}; run `wandb login`, or set WANDB_MODE=offline or train.wandb=''") from error
            _log.warning("%s; training goes on without it", text)

    def write(self, step: int, tagged: Mapping[str, Any]) -> None:
        """Logs scalars and texts; a failure is said once, and training goes on without Weights & Biases."""
        values = {tag: value for tag, value in tagged.items() if not isinstance(value, list)}
        if self._run is None or not values or step <= self._written:
            return
        try:
            self._run.log(values, step=step)
        except Exception as error:
            _log.warning("Weights & Biases failed at step %d: %s; training goes on without it", step, error)
            self._run = None

    def close(self) -> None:
        """Ends the run; a failure is said and no more."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                _log.warning("Weights & Biases did not finish: %s", error)
            self._run = None
