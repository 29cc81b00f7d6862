"""metrics.jsonl: one JSON object a line, written as the run goes, safe against crashes and resumed runs.

Every line has "kind", "step" and "time" (seconds since 1970); the rest depends on the kind:

    session  written at each start of the run, `step` is the one it resumes from; never dropped;
             start_up (seconds from the beginning of the start to this line), process, host
    train    loss, token_loss (nats per token), balance_loss, router_z_loss, z_loss, gradient_norm, learning_rate,
             tokens, trained_tokens (those with a loss), tokens_per_second, mfu;
             data_wait_seconds, step_seconds, compile_seconds, checkpoint_seconds, eval_seconds, sample_seconds and
             other_seconds: averages over the steps since the last line; their sum is a step's wall time (timing.py);
             goodput: share of the wall time since the first session that went into steps that count, 0..1;
             of DPO also preference_loss, rewards/chosen, /rejected, /margins, /accuracies and logps/chosen, /rejected
             (preference.py: pair_terms), token_loss being that of the chosen answers;
             and per layer: load_LE (share of the assignments), entropy_L (nats), dropped_L (share), max_over_mean_L
    heldout  loss (nats per token), bits_per_byte; of DPO loss (the preference loss), accuracy with its 95% interval
             accuracy_low to accuracy_high, margin, chosen_reward, rejected_reward, chosen_logp, rejected_logp
    sample   number of the prompt, text; of SFT and DPO prompt and answer
    final    as heldout, and tokens or pairs; of pretraining unigram_bits_per_byte, bigram_bits_per_byte, baseline_tokens
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.appending import AppendFile
from mixtral_jax.config import RunError, UserError

KEPT_KINDS = ("session",)  # what happened to the run and not to its steps: a resume does not undo it


class JsonlWriter:
    """Appends metrics to a file, each line in it at once; use as a context manager or close() it."""

    def __init__(self, path: str | os.PathLike, resume_step: int | None = None, keep_going: bool = False):
        """Opens the file for appending, creating it and its folder where needed.

        A last line torn by a crash is cut off.

        Args:
            path: the file.
            resume_step: the step a run resumes from: lines of later steps, which the run will write again, are dropped
                (the file is replaced atomically), except those of KEPT_KINDS. -1 starts afresh. None keeps all lines.
            keep_going: see AppendFile.

        Raises:
            UserError: a line other than the last is not a JSON object.
            RunError: the file cannot be written.
        """
        path = Path(path)
        lines, clean = _read_lines(path) if path.exists() else ([], True)
        kept = lines if resume_step is None else [line for line in lines if _stays(line[1], resume_step)]
        if len(kept) < len(lines) or not clean:
            _replace(path, "".join(text + "\n" for text, _ in kept))
        self._file = AppendFile(path, keep_going)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line; for the arguments see make_line().

        Raises:
            ValueError: a value named kind, step, time or nonfinite.
            RunError: the file cannot be written.
        """
        self.append(make_line(kind, step, values))

    def append(self, line: Mapping[str, Any]) -> None:
        """Appends a line that make_line() made.

        Raises:
            RunError: the file cannot be written.
        """
        self._file.append(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def make_line(kind: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Makes a line of what JSON knows.

    Args:
        kind: what the line is: session, train, heldout, eval, sample or final.
        step: number of optimizer steps done.
        values: scalars, strings, None, and arrays or nested lists of numbers (NumPy, JAX or Python). Floats keep 7
            digits, the precision of float32. NaN and infinity, which JSON lacks, become null, and the names of
            their keys stand in "nonfinite".

    Raises:
        ValueError: a value named kind, step, time or nonfinite.
    """
    line = {"kind": kind, "step": int(step), "time": round(time.time(), 3)}
    taken = sorted({*line, "nonfinite"} & set(values))
    if taken:
        raise ValueError(f"metrics named {', '.join(taken)}; these names are the writer's own")
    nonfinite = []
    for key, value in values.items():
        line[key], finite = _plain(value)
        if not finite:
            nonfinite.append(key)
    return line | {"nonfinite": nonfinite} if nonfinite else line


def first_start(path: str | os.PathLike) -> float | None:
    """When the run was first started, seconds since 1970: what the first session line says; None if there is none.

    Raises:
        UserError: a line other than the last is not a JSON object.
    """
    path = Path(path)
    lines = read_jsonl(path) if path.exists() else []
    return next((line["time"] - line.get("start_up", 0.0) for line in lines if line.get("kind") == "session"), None)


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """Reads the lines of a metrics file in order; a torn last line, of a crash or of a run still writing, is left out.

    Raises:
        UserError: a line other than the last is not a JSON object.
    """
    return [line for _, line in _read_lines(Path(path))[0]]


def _stays(line: dict, resume_step: int) -> bool:
    return line.get("step", 0) <= resume_step or line.get("kind") in KEPT_KINDS


def _read_lines(path: Path) -> tuple[list[tuple[str, dict]], bool]:
    """Returns (text, object) of each whole line, and whether the file was nothing but whole lines."""
    # Split at newlines only: splitlines() would also split at U+2028, which a sample's text may hold.
    texts = path.read_bytes().split(b"\n")
    tail = texts.pop()  # empty where the last line is whole
    lines, clean = [], not tail
    for number, raw in enumerate([*texts, tail] if tail else texts, 1):
        try:
            text = raw.decode("utf-8")
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError("not an object")
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both of this kind
            if number < len(texts) + bool(tail):
                raise UserError(f"{path}, line {number}: not a JSON object ({error}); repair or remove it") from error
            return lines, False
        lines.append((text, line))
    return lines, clean


def _replace(path: Path, text: str) -> None:
    """Replaces a file atomically: a crash leaves the old or the new one, never half of it."""
    new = path.with_name(path.name + ".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def _plain(value: Any) -> tuple[Any, bool]:
    """Converts a value to what JSON knows; returns it and whether all of it was finite."""
    if value is None or isinstance(value, str | bool | int):
        return value, True
    if isinstance(value, float):
        return (float(f"{value:.7g}"), True) if math.isfinite(value) else (None, False)
    if isinstance(value, list | tuple):
        pairs = [_plain(item) for item in value]
        return [plain for plain, _ in pairs], all(finite for _, finite in pairs)
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":  # ml_dtypes' bfloat16 is of kind V
        array = array.astype(np.float32)
    return _plain(array.tolist())
