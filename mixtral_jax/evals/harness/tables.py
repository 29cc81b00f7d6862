"""Tables of benchmarks: the paper's score, ours, and how far they are apart."""

from mixtral_jax.evals.blocks import Block, Table
from mixtral_jax.evals.harness.presets import PAPER

WIDTH = 1.96  # standard errors on each side of a 95% interval
# Where the paper says nothing: the first of these that a task has.
MAIN = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "pass@1", "sentiment")


def blocks(found: dict[str, dict]) -> list[Block]:
    """The benchmarks of the paper beside its scores, and then every metric there is."""
    tables = []
    tasks = _tasks(found)
    # Members of a group have their place in the second table.
    tasks = [task for task in tasks if ":" not in task or task.partition(":")[0] not in tasks]
    rows = [row for task in tasks for row in _row(task, found)]
    if rows:
        several = len(found) > 1
        columns = ["benchmark", "metric", "shots", *(["model"] if several else []), "paper", "ours", "+-", "difference"]
        rows = [row if several else [*row[:3], *row[4:]] for row in rows]
        notes = [f"{task}: {PAPER[task].note}." for task in tasks if task in PAPER and PAPER[task].note]
        note = "+- is 1.96 standard errors of ours; the paper's scores are of Mixtral 8x7B. " + " ".join(notes)
        tables.append(Table("Benchmarks", columns, rows, note.strip()))
    rest = _everything(found)
    if rest:
        columns = ["metric", *(part for name in found for part in (name, "+-"))]
        tables.append(Table("All metrics of the benchmarks", columns, rest, "+- is 1.96 standard errors."))
    return tables


def _tasks(found: dict[str, dict]) -> list[str]:
    """The tasks in the order of the results."""
    return list(dict.fromkeys(name.rpartition("/")[0] for each in found.values() for name in each))


def _row(task: str, found: dict[str, dict]) -> list[list]:
    """A task's main metric, a row for each model that has it."""
    paper = PAPER.get(task)
    names = (paper.metric,) if paper else MAIN
    scale = paper.scale if paper else 1.0
    rows = []
    for model, results in found.items():
        metric = next((name for name in names if _value(results, f"{task}/{name}") is not None), None)
        if metric is None:
            continue
        ours = results[f"{task}/{metric}"] * scale
        stderr = _value(results, f"{task}/{_stderr(metric)}")
        score = paper.score if paper else None
        shots = _value(results, f"{task}/shots")
        shots = shots if shots is not None else task.partition("@")[2] or None
        width = None if stderr is None else WIDTH * stderr * scale
        rows.append([task, metric, shots, model, score, ours, width, None if score is None else ours - score])
    return rows


def _everything(found: dict[str, dict]) -> list[list]:
    names = dict.fromkeys(name for each in found.values() for name in each)
    rows = []
    for name in names:
        metric = name.rpartition("/")[2]
        if metric.partition(",")[0].endswith("_stderr") or metric in ("samples", "shots"):
            continue
        row = [name]
        for results in found.values():
            stderr = _value(results, f"{name.rpartition('/')[0]}/{_stderr(metric)}")
            row += [_value(results, name), None if stderr is None else WIDTH * stderr]
        rows.append(row)
    return rows


def _stderr(metric: str) -> str:
    """The name of a metric's standard error; the filter stays behind."""
    name, comma, kind = metric.partition(",")
    return f"{name}_stderr{comma}{kind}"


def _value(results: dict, name: str) -> float | None:
    value = results.get(name)
    return value if isinstance(value, int | float) else None
