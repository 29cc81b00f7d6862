"""Runs the harness: finds its tasks and ours, lets it make requests and judge the answers, and names the results."""

import collections
import contextlib
import difflib
import functools
import json
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lm_eval
    import lm_eval.api.metrics
    import lm_eval.api.task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from mixtral_jax.evals.harness.adapter import Model, readable

from mixtral_jax.config import UserError
from mixtral_jax.evals.harness.answers import Answers
from mixtral_jax.evals.harness.presets import BOLD, PRESETS
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.work import bar

OWN = Path(__file__).parent / "tasks"
RESAMPLES = 1000  # of the bootstrap, for the standard errors that have no formula
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


class Catalogue(TaskManager):
    """The tasks there are. What goes wrong while one is loaded is explained."""

    def load(self, task_list):
        names = task_list if isinstance(task_list, list) else [task_list]
        try:
            return super().load(names)
        except UserError:
            raise
        except Exception as error:
            (name,) = names
            said = str(error).strip() or type(error).__name__
            raise UserError(f"{name}: {_remedy(self, name, error)} ({type(error).__name__}: {said})") from error


def _remedy(catalogue: Catalogue, name: str, error: Exception) -> str:
    """In words what of a task is missing, and what helps."""
    if isinstance(error, ImportError | AssertionError):
        return "a package that it needs is missing; pip install -r requirements-eval.txt"
    entry = catalogue.task_index.get(name)
    config = _config(entry) if entry else {}
    data = ":".join(str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key))
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    data = f"{data} {files}" if files else data or "its data set"
    return (
        f"the data set {data} is neither here nor can it be fetched; run the command once where the network is, with the same "
        "HF_HOME, or correct the task's file"
    )


def open_catalogue(settings: Settings, names: Sequence[str]) -> Catalogue:
    """Indexes the tasks of the package and of --task_path, and of the harness (it takes seconds) if one of its is asked for.

    Raises:
        UserError: a folder of --task_path is missing.
    """
    for folder in settings.task_path:
        if not Path(folder).expanduser().is_dir():
            raise UserError(f"--task_path={folder} is no folder; give folders with YAML files of tasks")
    paths = tuple(str(Path(folder).expanduser()) for folder in settings.task_path)
    found = _catalogue(paths, settings.prompts, False)
    single = {*found.all_subtasks, *found.all_tags}  # a group may be made of the harness's tasks
    return found if single.issuperset(names) else _catalogue(paths, settings.prompts, True)


@functools.lru_cache(8)
def _catalogue(paths: tuple[str, ...], prompts: str, defaults: bool) -> Catalogue:
    with _quiet():
        return Catalogue(
            include_path=[str(OWN), *paths],
            include_defaults=defaults,
            metadata={"prompts": prompts} if prompts else None,
        )


def check_task(catalogue: Catalogue, name: str, shots: int | None, settings: Settings) -> None:
    """Refuses an unknown task, one that runs generated code without leave, shots that would be ignored, and BOLD without prompts.

    Raises:
        UserError: it is one of these.
    """
    entry = catalogue.task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, [*catalogue.task_index, *PRESETS], 5, 0.6)
        meant = f"; near it are {', '.join(near)}" if near else ""
        raise UserError(
            f"--tasks={name} is no task of lm-evaluation-harness {_version()}, of the package or of --task_path, and no preset "
            f"({', '.join(PRESETS)}){meant}"
        )
    if _config(entry).get("unsafe_code") and not settings.run_generated_code:
        raise UserError(_UNSAFE.format(name=name))
    if shots and _config(entry).get("num_fewshot") == 0:
        raise UserError(
            f"{name} has 0 examples before each question, and its file allows no other number than 0: {shots} would be ignored; "
            f"leave @{shots} or --num_fewshot={shots} out, or run it without this task"
        )
    if name in BOLD and not settings.prompts:
        raise UserError(
            f"--tasks={name} needs BOLD's prompts: give --prompts=FOLDER with its files (gender_prompt.json and so on), from "
            "https://github.com/amazon-science/bold"
        )


_UNSAFE = (
    "--tasks={name} runs the programs that the model writes, on this machine and unprotected; give --run_generated_code to "
    "allow it, in a container, or leave the task out"
)


def _config(entry) -> Mapping[str, Any]:
    """A task's file, functions unresolved; {} of one that has none."""
    if entry.yaml_path is None or Path(entry.yaml_path).suffix not in (".yaml", ".yml"):
        return entry.cfg or {}
    return load_yaml(entry.yaml_path, resolve_func=False, recursive=True)


def measure(
    answers: Answers, subject: Subject, catalogue: Catalogue, name: str, shots: int | None, limit: int
) -> tuple[dict[str, Any], dict[str, list]]:
    """Runs a task or a group of tasks, on process 0.

    Returns:
        {"TASK/METRIC": value}; {TASK: its requests and answers}. Of a task that was told its shots TASK is TASK@SHOTS, of a
        group's member GROUP:MEMBER.

    Raises:
        UserError: its data are missing, or it cannot run on this model.
    """
    settings = subject.settings
    model = Model(answers, subject.tokenizer, subject.longest)
    seeds = {key: value + settings.seed for key, value in SEEDS.items()}
    with _quiet(), _unsafe_allowed(settings.run_generated_code), _own_random_numbers():
        try:
            found = lm_eval.simple_evaluate(
                model,
                tasks=[name],
                num_fewshot=shots,
                limit=limit or None,
                task_manager=catalogue,
                bootstrap_iters=RESAMPLES,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
                confirm_run_unsafe_code=settings.run_generated_code,
                **seeds,
            )
        except ValueError as error:
            if "unsafe" in str(error):  # a task within a group
                raise UserError(_UNSAFE.format(name=name)) from error
            raise
    asked = name if shots is None else f"{name}@{shots}"
    label = lambda task: asked if task == name else f"{asked}:{task}"  # noqa: E731
    results = {}
    for task, metrics in found["results"].items():
        results |= {f"{label(task)}/{key}": value for key, value in _metrics(metrics)}
        count = found["n-samples"].get(task)
        if count is not None:
            results[f"{label(task)}/samples"] = count["effective"]
            results[f"{label(task)}/shots"] = found["n-shot"].get(task, 0)
    for task, lines in found["samples"].items():
        results |= {f"{label(task)}/{key}": value for key, value in _by_group(lines).items()}
    samples = {label(task): [_shown(one, subject) for one in lines] for task, lines in found["samples"].items()}
    return results, samples


def _metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The harness's "METRIC,FILTER" as "METRIC" where the filter is none."""
    for key, value in metrics.items():
        if isinstance(value, int | float | np.number) and not isinstance(value, bool) and "," in key:
            name, _, kind = key.partition(",")
            yield (name if kind == "none" else key), value if isinstance(value, int) else float(value)


def _by_group(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of questions that say to which group they belong, each metric's mean by group: {"METRIC of GROUP": mean}."""
    found = collections.defaultdict(list)
    for sample in samples:
        for metric in sample["metrics"] if "group" in sample["doc"] else ():
            if isinstance(sample[metric], int | float):
                found[f"{metric} of {sample['doc']['group']}"].append(sample[metric])
    return {name: float(np.mean(values)) for name, values in found.items()}


def _shown(sample: Mapping[str, Any], subject: Subject) -> dict[str, Any]:
    """A sample for people, that goes through JSON."""
    text = json.loads(json.dumps(sample, default=str))
    text["arguments"] = [
        [readable(each, subject.tokenizer) if isinstance(each, str) else each for each in arguments]
        for arguments in text["arguments"]
    ]
    return text


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness speaks in errors only, its bars are ours, and its bootstrap forks no processes beside jax's threads."""
    log = logging.getLogger("lm_eval")
    others = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "evaluate")]
    levels = [each.level for each in (log, *others)]
    task, metrics = lm_eval.api.task, lm_eval.api.metrics
    before = task.tqdm, metrics.bootstrap_stderr
    task.tqdm = lambda items, total=None, **_: bar(items, "requests", "questions", total=total)
    metrics.bootstrap_stderr = _bootstrap_stderr
    try:
        for each in (log, *others):
            each.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        task.tqdm, metrics.bootstrap_stderr = before
        for each, level in zip((log, *others), levels):
            each.setLevel(level)


def _bootstrap_stderr(measure, values: Sequence[Any], iters: int) -> float:
    """Standard deviation of a measure over resamples of the values, as the harness computes it."""
    found = []
    for chunk in range(max(iters // 1000, 1)):
        draw = random.Random(chunk)
        found += [measure(draw.choices(values, k=len(values))) for _ in range(min(iters, 1000))]
    return float(np.std(found, ddof=1))


@contextlib.contextmanager
def _unsafe_allowed(allowed: bool) -> Iterator[None]:
    """Lets the `evaluate` package run generated code."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        if allowed:
            os.environ.pop("HF_ALLOW_CODE_EVAL")
            os.environ.update({} if before is None else {"HF_ALLOW_CODE_EVAL": before})


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """The harness seeds Python's and numpy's global generators; afterwards they are as before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
