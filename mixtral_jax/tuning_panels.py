"""The report's panels of SFT and DPO: how a policy ranks pairs, and what it answers before, during and after."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from mixtral_jax.panels import HELDOUT, INK, LEGEND, MUTED, TRAIN, curve, empty, mark, series, step_axis
from mixtral_jax.progress import printable

ANSWER_WIDTH = 150  # characters of a line
MOST_PROMPTS = 4


def draw_preference_loss(axes: Axes, train: Sequence[dict], heldout: Sequence[dict]) -> None:
    """The preference loss of training batches and of the held-out pairs; the loss of a policy that is its reference is dashed."""
    steps, loss = series(train, "preference_loss")
    held_steps, held = series(heldout, "loss")
    if not loss.size and not held.size:
        return empty(axes, "no loss yet")
    curve(axes, steps, loss, TRAIN, "training batches")
    if held.size:
        style = {"marker": "o", "markersize": 7, "markeredgecolor": "white", "linestyle": ":", "linewidth": 1}
        axes.plot(held_steps, held, color=HELDOUT, label="held-out pairs", **style)
        mark(axes, held_steps[-1], held[-1], f"{held[-1]:.3f}")
    if held.size and held_steps[0] == 0:
        axes.axhline(held[0], color=MUTED, linewidth=1.1, linestyle="--", label=f"at the start: {held[0]:.3f}")
    axes.set_ylabel("preference loss", color=MUTED, fontsize=10)
    axes.margins(y=0.08)
    step_axis(axes, np.concatenate([steps, held_steps]))
    axes.legend(loc="upper right", **LEGEND)


def draw_accuracy(axes: Axes, train: Sequence[dict], heldout: Sequence[dict]) -> None:
    """Reward accuracy: the share of pairs whose chosen answer has the higher reward, held out with its 95% interval."""
    steps, accuracy = series(train, "rewards/accuracies")
    lines = [line for line in heldout if line.get("accuracy") is not None and line["step"] > 0]  # at 0 all are ties
    if not accuracy.size and not lines:
        return empty(axes, "not evaluated yet")
    curve(axes, steps, accuracy, TRAIN, "training batches")
    if lines:
        held_steps, held, low, high = np.array(
            [[line[key] for key in ("step", "accuracy", "accuracy_low", "accuracy_high")] for line in lines]
        ).T
        style = {
            "fmt": "o:",
            "markersize": 7,
            "markeredgecolor": "white",
            "linewidth": 1,
            "elinewidth": 1.8,
            "capsize": 4,
        }
        axes.errorbar(
            held_steps, held, np.stack([held - low, high - held]), color=HELDOUT, label="held-out pairs, 95%", **style
        )
        mark(axes, held_steps[-1], held[-1], f"{held[-1]:.1%}")
    axes.axhline(0.5, color=MUTED, linewidth=1, linestyle="--")
    axes.set_ylim(0, 1.15)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    step_axis(axes, np.concatenate([steps, np.array([line["step"] for line in lines])]))
    axes.legend(loc="upper right", ncols=2, **LEGEND)


def answer_lines(samples: Sequence[dict]) -> list[tuple[str, str]]:
    """What the panel of answers says, as (kind, line): each prompt, and its first, middle and last answer."""
    prompts: dict[str, dict[int, str]] = {}
    for line in samples:
        if line.get("prompt") is not None:
            prompts.setdefault(line["prompt"], {})[line["step"]] = line.get("answer") or ""
    lines = []
    for prompt, answers in list(prompts.items())[:MOST_PROMPTS]:
        lines += [("prompt", text) for text in _wrapped(prompt)]
        steps = sorted(answers)
        for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
            head = f"step {step}:  "
            lines += [("answer", text) for text in _wrapped(head + answers[step], " " * len(head))]
    return lines


def _wrapped(text: str, indent: str = "") -> list[str]:
    words = printable(" ".join(text.split()))
    return textwrap.wrap(words, ANSWER_WIDTH, subsequent_indent=indent, max_lines=3, placeholder=" ...") or [""]


def draw_answers(axes: Axes, samples: Sequence[dict]) -> None:
    """Writes the answers as text."""
    lines = answer_lines(samples)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for i, (kind, text) in enumerate(lines):
        style = {"color": INK, "fontweight": "bold"} if kind == "prompt" else {"color": MUTED}
        place = (0.0 if kind == "prompt" else 0.015, 1 - (i + 0.7) / max(len(lines), 1))
        axes.text(*place, text.replace("$", r"\$"), transform=axes.transAxes, fontsize=10, va="center", **style)
