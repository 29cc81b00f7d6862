"""Benchmarks of lm-evaluation-harness, in process: `run`, `check` and `report` are the evaluation `lm_eval`.

The harness is an extra (requirements-eval.txt), so that it is imported when an evaluation asks for it and not before.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral_jax import distributed
from mixtral_jax.config import Config, UserError
from mixtral_jax.evals.harness.answers import Answers
from mixtral_jax.evals.harness.presets import LIMITS, PRESETS
from mixtral_jax.evals.harness.tables import blocks as report
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject

__all__ = ["check", "report", "run"]

logger = logging.getLogger(__name__)

FOLDER = "lm_eval"  # in --out, for the samples


def check(config: Config, settings: Settings) -> None:
    """Refuses what cannot work, before weights are read.

    Raises:
        UserError: the harness is not installed, a task is unknown, or one runs generated code without leave.
    """
    del config
    tasks = _tasks()
    asked = benchmarks(settings)
    catalogue = tasks.open_catalogue(settings, [name for name, _, _ in asked])
    for name, shots, _ in asked:
        tasks.check_task(catalogue, name, shots, settings)


def run(subject: Subject) -> Iterator[tuple[str, Any]]:
    """Runs benchmarks, one at a time.

    Yields:
        ("TASK/METRIC", value), its standard error as "TASK/METRIC_stderr", and of each task "TASK/samples" and
        "TASK/shots". TASK is as --tasks has it; of a group's member it is GROUP:MEMBER.

    Raises:
        UserError: at the end, for benchmarks that could not run; those of the others were yielded.
    """
    check(subject.config, subject.settings)
    tasks, asked, problems = _tasks(), benchmarks(subject.settings), []
    catalogue = tasks.open_catalogue(subject.settings, [name for name, _, _ in asked])
    with subject.work("lm_eval") as work:
        answers = Answers(subject, work)
        for number, (name, shots, limit) in enumerate(asked):
            if len(asked) > 1:
                subject.note(f"lm_eval, {number + 1} of {len(asked)}: {name}")
            found, samples, problem = answers.led(
                lambda name=name, shots=shots, limit=limit: _attempt(
                    lambda: tasks.measure(answers, subject, catalogue, name, shots, limit)
                )
            )
            yield from found.items()
            if distributed.speaks() and subject.folder is not None:
                _write(subject.folder.parent / FOLDER, samples)
            problems += [problem] if problem else []
    if problems:
        raise UserError(f"{len(problems)} of {len(asked)} benchmarks could not run:\n  " + "\n  ".join(problems))


def benchmarks(settings: Settings) -> list[tuple[str, int | None, int]]:
    """The tasks that the settings ask for, each once: name, examples before each question (None: its own), and at most so many questions (0: all).

    Raises:
        UserError: there is none, or what follows an @ is no number.
    """
    asked: dict[tuple[str, int | None], int] = {}
    for given in settings.tasks:
        for item in PRESETS.get(given, (given,)):
            name, at, shots = item.rpartition("@") if "@" in item else (item, "", "")
            if at and not shots.isdecimal():
                raise UserError(
                    f"--tasks={item}: {shots!r} is no number of examples; write TASK@SHOTS, as hellaswag@10"
                )
            own = settings.num_fewshot if settings.num_fewshot >= 0 else None
            number = own if own is not None else int(shots) if at else None
            asked.setdefault((name, number), settings.limit or LIMITS.get(given, 0))
    if not asked:
        raise UserError(f"--tasks is empty; name tasks of lm-evaluation-harness or presets: {', '.join(PRESETS)}")
    return [(name, shots, limit) for (name, shots), limit in asked.items()]


def _tasks():
    """The part that imports the harness.

    Raises:
        UserError: it is not installed.
    """
    try:
        from mixtral_jax.evals.harness import running
    except ImportError as error:
        if (error.name or "").startswith("mixtral_jax"):
            raise
        raise UserError(
            f"--evals=lm_eval needs lm-evaluation-harness ({error}); pip install -r requirements-eval.txt"
        ) from error
    return running


def _attempt(measure) -> tuple[dict[str, Any], dict[str, list], str]:
    """What a benchmark gives, or in words why it cannot run."""
    try:
        return *measure(), ""
    except UserError as error:
        return {}, {}, str(error)


def _write(folder: Path, samples: dict[str, list]) -> None:
    """Writes each task's requests and answers, a line each."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in samples.items():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / f"samples_{name.replace(':', '_')}.jsonl").write_text(text, "utf-8")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error}; make room or correct --out, and run the same command again to go on"
        ) from error
