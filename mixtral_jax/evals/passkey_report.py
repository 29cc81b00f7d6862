"""What a report shows of the passkey evaluation: a summary, accuracy by length, and a heatmap of each model."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mixtral_jax.evals.blocks import Block, Plot, Table
from mixtral_jax.evals.passkey_prompts import DIGITS, KEYS, cell_name
from mixtral_jax.panels import INK, MUTED, new_axes

PAPER = 1.0  # Mixtral 8x7B, figure 4 (left): at all lengths to 32k and all depths
MEASURES = {
    "accuracy": ("generation", "generation_baseline"),
    "likelihood_accuracy": ("likelihood", "likelihood_baseline"),
}
SHARES = LinearSegmentedColormap.from_list("share", ["#f4f8fc", "#9ecae1", "#2171b5", "#08306b"])


def report(found: dict[str, dict[str, Any]]) -> list[Block]:
    """{model: results} -> blocks."""
    return [_summary(found), _by_length(found), *(_heatmaps(name, results) for name, results in found.items())]


def _summary(found: dict[str, dict[str, Any]]) -> Table:
    rows = [["the paper, Mixtral 8x7B", "generation", 100 * PAPER, None, None, None, None, None]]
    for name, results in found.items():
        for measure, (words, baseline) in MEASURES.items():
            share = results.get(measure)
            ours = [
                None if x is None else 100 * x
                for x in (share, results.get(f"{measure}_low"), results.get(f"{measure}_high"))
            ]
            missing = None if share is None or words != "generation" else 100 * (share - PAPER)
            rows.append([name, words, *ours, missing, 100 * results[baseline], results["trials"]])
    columns = ["model", "by", "found, %", "95% from", "to", "minus the paper's", "chance, %", "trials"]
    digits = ", ".join(
        f"{name} {results['log_prob_per_digit']:.3f}"
        for name, results in found.items()
        if "log_prob_per_digit" in results
    )
    note = (
        "By generation: the first number written is the key. By likelihood: the key is likelier than nine other numbers. "
        f"Mean log-probability of the key per digit, nats (chance: {math.log(1 / len(KEYS)) / DIGITS:.3f}): {digits or 'none'}."
    )
    unseeable = {name: results["unseeable"] for name, results in found.items() if results["unseeable"]}
    if unseeable:
        note += " Not counted, for the key is beyond what the model can see: " + ", ".join(
            f"{count:,} trials of {name}" for name, count in unseeable.items()
        )
        note += "."
    return Table("Passkey: found in all trials", columns, rows, note)


def _by_length(found: dict[str, dict[str, Any]]) -> Table:
    lengths = sorted({length for results in found.values() for length in results["lengths"]})
    columns = ["tokens", "the paper, %"]
    columns += [f"{name}, by {words}, %" for name in found for words, _ in MEASURES.values()]
    rows = []
    for length in lengths:
        row = [length, 100 * PAPER if length <= 32768 else None]
        for results in found.values():
            cells = [results["cells"].get(cell_name(length, depth), {}) for depth in results["depths"]]
            for measure in MEASURES:
                row.append(_mean([(cell.get(measure), cell.get("trials", 0)) for cell in cells]))
        rows.append(row)
    return Table(
        "Passkey: found by length, over all depths", columns, rows, "A dash: no key of that length can be seen."
    )


def _mean(shares: list[tuple[float | None, int]]) -> float | None:
    """In percent, over the trials whose key can be seen."""
    known = [(share, n) for share, n in shares if share is not None]
    return 100 * sum(share * n for share, n in known) / sum(n for _, n in known) if known else None


def _heatmaps(name: str, results: dict[str, Any]) -> Plot:
    """Two heatmaps, by generation and by likelihood."""
    lengths, depths = results["lengths"], results["depths"]
    width, height = max(11.0, 2 + 1.6 * len(lengths)), 1.9 + 0.6 * len(depths)
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    grid, image = figure.add_gridspec(1, 2), None
    for column, (measure, (words, baseline)) in enumerate(MEASURES.items()):
        axes = new_axes(figure, grid[0, column], f"By {words} (chance {100 * results[baseline]:.3g}%)")
        image = _heatmap(axes, results, measure)
        if column == 0:
            axes.set_ylabel("depth of the key, 0 first", color=MUTED, fontsize=10)
    bar = figure.colorbar(image, ax=figure.axes, pad=0.01, fraction=0.03, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0%", "50%", "100%"], color=INK, fontsize=9.5)
    bar.outline.set_visible(False)
    note = "Share of keys found, in percent, and its 95% interval."
    if any(cell["unseeable"] for cell in results["cells"].values()):
        note += (
            " Hatched: the key cannot be seen. With a star: in some of the trials it cannot, and they are not counted."
        )
    return Plot(f"Passkey: {name}", figure, note)


def _heatmap(axes: Axes, results: dict[str, Any], measure: str):
    lengths, depths, cells = results["lengths"], results["depths"], results["cells"]
    of = [[cells[cell_name(length, depth)] for length in lengths] for depth in depths]
    shares = np.array([[np.nan if cell.get(measure) is None else cell[measure] for cell in row] for row in of])
    image = axes.imshow(np.ma.masked_invalid(shares), cmap=SHARES, vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(of):
        for x, cell in enumerate(row):
            if not cell["trials"]:
                style = {"facecolor": "#f1f1f1", "edgecolor": "#9a9a9a", "hatch": "////", "linewidth": 0}
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **style))
                continue
            star = "*" if cell["unseeable"] else ""
            color = "white" if shares[y, x] > 0.6 else INK
            style = {"ha": "center", "color": color}
            axes.text(x, y, f"{100 * shares[y, x]:.0f}{star}", va="bottom", fontsize=10.5, fontweight="bold", **style)
            interval = f"{100 * cell[f'{measure}_low']:.0f} to {100 * cell[f'{measure}_high']:.0f}"
            axes.text(x, y + 0.06, interval, va="top", fontsize=8, **style)
    for x in range(1, len(lengths)):
        axes.axvline(x - 0.5, color="white", linewidth=2)
    for y in range(1, len(depths)):
        axes.axhline(y - 0.5, color="white", linewidth=2)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_xlabel("length, tokens", color=MUTED, fontsize=10)
    return image
