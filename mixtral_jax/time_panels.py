"""The panels of the report about time: where a step's seconds go, and how much of the wall time counted."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mixtral_jax.panels import GRID, INK, LEGEND, MUTED, empty, step_axis
from mixtral_jax.timing import CATEGORIES, OTHER

# Training is quiet, what holds it up is loud (Okabe and Ito's palette).
COLORS = {
    "step": "#9ecae1",
    "data_wait": "#D55E00",
    "compile": "#CC79A7",
    "checkpoint": "#E69F00",
    "eval": "#009E73",
    "sample": "#F0E442",
    OTHER: "#bdbdbd",
}
COLUMNS = 120  # more lines than that are averaged
GOODPUT = "#0072B2"


def seconds(train: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps [S] and seconds per step [S, categories in the order of COLORS] of the lines that have them."""
    names = [f"{category}_seconds" for category in COLORS]
    lines = [line for line in train if line.get("step_seconds") is not None]
    table = [[line.get(name) or 0.0 for name in names] for line in lines]
    return np.array([line["step"] for line in lines], float), np.array(table, float).reshape(-1, len(names))


def draw_times(axes: Axes, train: Sequence[dict]) -> None:
    """Share of the wall time by category, stacked; the bars are as wide as the steps they stand for."""
    steps, table_SC = seconds(train)
    assert set(COLORS) == {*CATEGORIES, OTHER}
    if not steps.size or not table_SC.sum() > 0:
        return empty(axes, "not measured yet")
    starts = np.concatenate([[0.0], steps[:-1]])  # a line holds the averages over the steps since the line before it
    totals_SC = table_SC * np.maximum(steps - starts, 1)[:, None]
    groups = np.array_split(np.arange(len(steps)), min(len(steps), COLUMNS))
    share_GC = np.stack([totals_SC[group].sum(0) for group in groups])
    share_GC = share_GC / np.maximum(share_GC.sum(1, keepdims=True), 1e-30)
    left = np.array([starts[group[0]] for group in groups])
    width = np.array([steps[group[-1]] for group in groups]) - left
    bottom = np.zeros(len(groups))
    overall = totals_SC.sum(0) / totals_SC.sum()
    for i, (name, color) in enumerate(COLORS.items()):
        if overall[i] > 0:
            label = (
                f"{name.replace('_', ' ')} {overall[i]:.1%}"
                if overall[i] >= 1e-3
                else f"{name.replace('_', ' ')} <0.1%"
            )
            axes.bar(left, share_GC[:, i], width, bottom, color=color, align="edge", linewidth=0, label=label)
            bottom = bottom + share_GC[:, i]
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    axes.grid(False, axis="x")
    step_axis(axes, np.array([0.0, steps[-1]]))
    axes.set_xlim(0, steps[-1])
    style = LEGEND | {"handlelength": 1.0, "handleheight": 1.0, "columnspacing": 1.4, "borderpad": 0}
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.22, 1, 0), mode="expand", ncols=len(COLORS), **style)


def draw_goodput(axes: Axes, train: Sequence[dict], sessions: Sequence[dict]) -> None:
    """Goodput over the wall time since the first start; grey is from a session's last line to the next start."""
    points = [(line["time"], line["goodput"]) for line in train if line.get("goodput") is not None and "time" in line]
    starts = [session["time"] - session.get("start_up", 0.0) for session in sessions if "time" in session]
    if not points or not starts:
        return empty(axes, "not measured yet")
    times, goodput = np.array(points).T
    scale, unit = next(
        ((s, u) for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes")) if times[-1] - starts[0] >= 2 * s),
        (1, "seconds"),
    )
    x = (times - starts[0]) / scale
    for start in starts[1:]:
        before = times[times < start]
        begin = ((before[-1] if before.size else starts[0]) - starts[0]) / scale
        axes.axvspan(begin, (start - starts[0]) / scale, color=GRID, linewidth=0, zorder=0.5)
        axes.axvline((start - starts[0]) / scale, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.plot(x, goodput, color=GOODPUT, linewidth=1.9, marker="o" if len(x) < 40 else None, markersize=3.5)
    axes.set_ylim(0, 1.18)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    axes.set_xlim(0, x[-1] * 1.02 or 1)
    axes.set_xlabel(f"{unit} since the first start", color=MUTED, fontsize=10)
    text = f"{goodput[-1]:.1%} went into steps that count" + (f", {restarts(sessions)}" if len(starts) > 1 else "")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2}
    axes.text(0.99, 0.97, text, transform=axes.transAxes, ha="right", va="top", color=INK, fontsize=10, bbox=box)


def restarts(sessions: Sequence[dict]) -> str:
    """Counts in words: 1 restart, 3 restarts."""
    count = max(len(sessions) - 1, 0)
    return f"{count} restart{'' if count == 1 else 's'}"
