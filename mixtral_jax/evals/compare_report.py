"""A comparison of models as a table for the terminal, blocks of a page and a picture, from what is in comparison.json alone."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mixtral_jax.evals.blocks import Block, Plot, Table, Words
from mixtral_jax.panels import INK, LEGEND, MUTED, empty, new_axes
from mixtral_jax.progress import printable

HEADS = ("model", "stage", "step", "answer loss", "bits/byte", "summed", "mean", "reward accuracy", "reward margin")
# What ranks the pairs: (part of the results, metric, in words, colour of Okabe and Ito's palette)
RANKINGS = (
    ("pairs", "summed", "chosen answer likelier: sum of log-probabilities", "#0072B2"),
    ("pairs", "mean", "chosen answer likelier: mean", "#56B4E9"),
    ("preference", "accuracy", "reward accuracy", "#D55E00"),
)
LOSS = "#009E73"
NAME_WIDTH, TEXT_WIDTH = 22, 155  # characters of a line of the picture
FEW = 4  # models whose names and figures have room beside each other
MOST_QUESTIONS = 12  # in the picture; the page has all


def table(report: dict) -> str:
    """The figures for a terminal, with the notes."""
    rows = [HEADS, *_rows(report)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    notes = [
        textwrap.fill(note, 118, initial_indent="  ", subsequent_indent="  ")
        for note in [*_legend(report), *_said(report)]
    ]
    return "\n".join([*lines, "", *notes])


def blocks(report: dict) -> list[Block]:
    """The page's part: the figures, the notes, and the answers side by side."""
    notes = "\n\n".join([*_legend(report), *_said(report)])
    made: list[Block] = [
        Table("On what was held out", HEADS, _rows(report)),
        Words("", notes),
        Plot(
            "In bars",
            draw(report | {"questions": [], "notes": []}),
            "Bars of the answers' loss and of the pairs ranked right.",
        ),
    ]
    if report["questions"]:
        heads = ("question", "the data's answer", *report["results"])
        rows = [
            [asked["question"] + (" *" if not asked["held_out"] else ""), asked["answer"], *asked["answers"].values()]
            for asked in report["questions"]
        ]
        made.append(Table("Greedy answers", heads, rows))
    return made


def draw(report: dict) -> Figure:
    """The picture: bars of loss and of accuracy, and the answers as text."""
    lines = _answer_lines(report["questions"])
    notes = [line for note in _said(report) for line in textwrap.wrap(printable(note), TEXT_WIDTH + NAME_WIDTH)]
    text = 0.235 * len(lines)
    figure = Figure(figsize=(16, 6.6 + 0.24 * len(notes) + text), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12, hspace=0.02, wspace=0.02)
    grid = figure.add_gridspec(
        2 + bool(text), 5, height_ratios=[5.2, 0.24 * len(notes) + 0.3] + [text + 0.5] * bool(text)
    )
    names = [_short(name) for name in report["results"]]
    title = " / ".join(names)
    figure.suptitle(title if len(title) < 100 else f"{len(names)} models", fontsize=16, fontweight="bold", color=INK)
    found = list(report["results"].values())
    _draw_loss(new_axes(figure, grid[0, :2], "Loss of the held-out answers, nats per token"), names, found)
    _draw_rankings(new_axes(figure, grid[0, 2:], "Held-out pairs ranked right, with 95% intervals"), names, found)
    _write_lines(new_axes(figure, grid[1, :], ""), [("", note) for note in notes])
    if text:
        _write_lines(new_axes(figure, grid[2, :], "Greedy answers"), lines)
    return figure


def _rows(report: dict) -> list[list[str]]:
    rows = []
    for name, found in report["results"].items():
        step = report["step"][name]
        row = [printable(name), report["stage"][name], "-" if step is None else f"{step:,}"]
        row += [f"{found['answers']['loss']:.4f}", f"{found['answers']['bits_per_byte']:.4f}"]
        for part, metric, *_ in RANKINGS:
            row.append(_with_interval(found[part], metric, ".1%") if part in found else "-")
        rows.append([*row, _with_interval(found["preference"], "margin", ".3f") if "preference" in found else "-"])
    return rows


def _with_interval(found: dict, metric: str, form: str) -> str:
    return f"{found[metric]:{form}} ({found[f'{metric}_low']:{form}} to {found[f'{metric}_high']:{form}})"


def _legend(report: dict) -> list[str]:
    return [
        "Answer loss: nats per token of the held-out answers. Summed, mean: how often the chosen answer of a held-out pair is "
        "likelier than the rejected one, by the sum or the mean of its tokens' log-probabilities. Reward: the log-probability "
        "against that of the reference the run started from. In brackets 95% intervals."
    ]


def _said(report: dict) -> list[str]:
    data = report["data"]
    return [
        f"Held out by {data['run']} ({', '.join(data['sources'])}; data.heldout_fraction={data['heldout_fraction']:g}): "
        f"{data['conversations']:,} answers, {data['pairs']:,} pairs.",
        *report["notes"],
    ]


def _star(asked: dict) -> str:
    return "" if asked["held_out"] else " \\*"


def _answers(asked: dict) -> list[tuple[str, str]]:
    """(who, what): the data's own answer, where it is known, and those of the models."""
    own = [] if asked["answer"] is None else [("the data's answer", asked["answer"])]
    return own + list(asked["answers"].items())


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH // 2 - 1]}..{name[1 - NAME_WIDTH // 2 :]}"


def _answer_lines(questions: Sequence[dict]) -> list[tuple[str, str]]:
    """(name, line): a question has no name and is bold; lines that go on have an empty one."""
    lines: list[tuple[str, str]] = []
    for asked in questions[:MOST_QUESTIONS]:
        star = "" if asked["held_out"] else " *"
        lines += [("question", line) for line in _wrapped(asked["question"] + star)]
        for name, answer in _answers(asked):
            first, *rest = _wrapped(answer)
            lines += [(_short(name), first), *(("", line) for line in rest)]
        lines.append(("", ""))
    return lines[:-1]


def _wrapped(text: str) -> list[str]:
    words = " ".join(printable(text).split())
    return textwrap.wrap(words, TEXT_WIDTH, max_lines=3, placeholder=" ...") or ["(nothing)"]


def _draw_loss(axes: Axes, names: Sequence[str], results: Sequence[dict]) -> None:
    loss = np.array([found["answers"]["loss"] for found in results])
    axes.bar(np.arange(len(loss)), loss, width=0.6, color=LOSS)
    for i, found in enumerate(results):
        bits = found["answers"]["bits_per_byte"]
        said = f"{loss[i]:.3f}\n{bits:.3f} bits/byte" if len(results) <= FEW else f"{loss[i]:.2f}"
        axes.annotate(said, (i, loss[i]), (0, 4), textcoords="offset points", ha="center", fontsize=9.5, color=INK)
    axes.set_ylim(0, loss.max() * 1.2)
    _name_models(axes, names)


def _draw_rankings(axes: Axes, names: Sequence[str], results: Sequence[dict]) -> None:
    there = [ranking for ranking in RANKINGS if any(ranking[0] in found for found in results)]
    if not there:
        return empty(axes, "the data has no pairs")
    width = 0.8 / len(there)
    size = 9.5 if len(results) <= FEW else 7
    for j, (part, metric, label, color) in enumerate(there):
        places = [i for i, found in enumerate(results) if part in found]
        values = np.array([[results[i][part][f"{metric}{end}"] for end in ("", "_low", "_high")] for i in places])
        x, (mean, low, high) = np.array(places) + (j - (len(there) - 1) / 2) * width, values.T
        bars = {"width": 0.92 * width, "color": color, "label": label, "ecolor": INK, "capsize": 4}
        # Lists: of arrays of length 1 matplotlib warns.
        axes.bar(x, mean, yerr=[(mean - low).tolist(), (high - mean).tolist()], **bars)
        for at, value, top in zip(x, mean, high):
            said = f"{value:.1%}" if size > 9 else f"{value:.0%}"
            axes.annotate(said, (at, top), (0, 3), textcoords="offset points", ha="center", fontsize=size, color=INK)
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle="--")
    axes.set_ylim(0, 1.2)  # room for the legend above an interval that reaches 1
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    _name_models(axes, names)
    axes.legend(loc="upper left", ncols=len(there), **LEGEND)


def _name_models(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(np.arange(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(False, axis="x")
    if len(names) > FEW:
        for label in axes.get_xticklabels():
            label.set(rotation=20, ha="right", rotation_mode="anchor")


def _write_lines(axes: Axes, lines: Sequence[tuple[str, str]]) -> None:
    """Writes (name, line) under each other; of a question the line is bold and at the left edge, of a note too, but muted."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    indented = any(name for name, _ in lines)
    for i, (name, line) in enumerate(lines):
        y = 1 - (i + 0.5) / len(lines)
        # Monospaced, so that lines are as wide as they were counted; whatever they are, they move no axes.
        style = {"transform": axes.transAxes, "fontsize": 9.5, "fontfamily": "monospace", "va": "center"}
        style |= {"parse_math": False, "in_layout": False}
        if name == "question":
            axes.text(0, y, line, color=INK, fontweight="bold", **style)
            continue
        axes.text(0.008, y, name, color=MUTED, **style)
        axes.text(0.137 if indented else 0, y, line, color=INK if indented else MUTED, **style)
