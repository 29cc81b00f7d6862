"""Figures of routing, like figures 7, 9 and 10 of the Mixtral paper, and of experts that are chosen together."""

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mixtral_jax.evals.routing_counts import expected_together
from mixtral_jax.panels import HEATMAP, INK, LEGEND, MUTED, new_axes

MOST_SNIPPETS = 4  # in the picture of coloured text
# Of domains: Okabe and Ito's palette without its yellow, which is lost on white as a line.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#333333", "#999999")
MARKERS = "osD^vPX*"


def _shares(axes, each: Mapping, layer: int, choices: slice) -> None:
    """Bars of one panel: for each expert one of each domain."""
    experts, domains = each["experts"], each["domains"]
    width = 0.8 / len(domains)
    for i, counts in enumerate(domains.values()):
        n_E = np.sum(counts["choice_LKE"][layer][choices], axis=0)
        at_E = np.arange(experts) + (i - (len(domains) - 1) / 2) * width
        hatch = "//" if i // len(COLOURS) % 2 else None
        axes.bar(
            at_E, n_E / n_E.sum(), width, color=COLOURS[i % len(COLOURS)], edgecolor="white", linewidth=0.3, hatch=hatch
        )
    axes.axhline(1 / experts, color=INK, linewidth=1.1, linestyle="--")
    axes.set_xticks(range(0, experts, -(-experts // 16)))
    axes.grid(False, axis="x")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _legend(figure: Figure, each: Mapping, tall: float) -> None:
    """Domains above the panels."""
    handles = figure.axes[0].containers
    figure.legend(
        handles, list(each["domains"]), loc="upper left", bbox_to_anchor=(0.05, 1 - 0.05 / tall),
        ncols=min(len(handles), 5), **LEGEND,
    )  # fmt: skip


def shares(each: Mapping) -> Figure:
    """The share of all assignments by expert: a panel for each shown layer (figure 7)."""
    layers = each["shown_layers"]
    top = 0.5 + 0.22 * (-(-len(each["domains"]) // 5))
    tall = 2.3 * len(layers) + top + 0.4
    figure = Figure(figsize=(10.5, tall), dpi=110, facecolor="white")
    grid = figure.add_gridspec(
        len(layers), 1, left=0.075, right=0.985, top=1 - top / tall, bottom=0.55 / tall, hspace=0.42
    )
    for row, layer in enumerate(layers):
        axes = new_axes(figure, grid[row], f"layer {layer}")
        _shares(axes, each, layer, slice(None))
        axes.set_ylabel("share of assignments", color=MUTED, fontsize=10)
    axes.set_xlabel("expert", color=MUTED, fontsize=10)
    _legend(figure, each, tall)
    return figure


def shares_by_choice(each: Mapping) -> Figure:
    """The same for each choice: rows layers, columns first, second, ... choice (figure 9)."""
    layers, k = each["shown_layers"], each["experts_per_token"]
    columns = min(k, 4)
    top = 0.5 + 0.22 * (-(-len(each["domains"]) // 5))
    tall = 2.2 * len(layers) + top + 0.4
    figure = Figure(figsize=(max(5.2 * columns, 10.5), tall), dpi=110, facecolor="white")
    grid = figure.add_gridspec(
        len(layers), columns, left=0.06, right=0.985, top=1 - top / tall, bottom=0.55 / tall, hspace=0.45, wspace=0.16
    )
    for row, layer in enumerate(layers):
        for choice in range(columns):
            axes = new_axes(figure, grid[row, choice], f"layer {layer}, {_ordinal(choice)} choice")
            _shares(axes, each, layer, slice(choice, choice + 1))
            if choice == 0:
                axes.set_ylabel("share of choices", color=MUTED, fontsize=10)
            if row == len(layers) - 1:
                axes.set_xlabel("expert", color=MUTED, fontsize=10)
    _legend(figure, each, tall)
    return figure


def _ordinal(i: int) -> str:
    return ("first", "second", "third", "fourth")[i]


def repetition(each: Mapping) -> Figure:
    """Repetition of neighbours against the layer, by domain, with both baselines (figure 10)."""
    k, domains = each["experts_per_token"], each["domains"]
    kinds = {"first": "first choice"} | (
        {"any": "first or second choice" if k == 2 else f"any of {k} choices"} if k > 1 else {}
    )
    low = 0.2 + 0.2 * (-(-(len(domains) + 2) // 5))  # inches of the legend
    figure = Figure(figsize=(5.6 * max(len(kinds), 1.4), 4.2 + low), dpi=110, facecolor="white")
    grid = figure.add_gridspec(
        1, len(kinds), left=0.065, right=0.985, top=0.93, bottom=(low + 0.55) / (4.2 + low), wspace=0.16
    )
    layer = np.arange(each["layers"])
    for column, (kind, words) in enumerate(kinds.items()):
        axes = new_axes(figure, grid[column], words)
        for i, (name, counts) in enumerate(domains.items()):
            color = COLOURS[i % len(COLOURS)]
            share_L = np.asarray(counts[f"{kind}_repeats_L"]) / counts["pairs"]
            error_L = 1.96 * np.asarray(counts[f"{kind}_error_L"])
            axes.fill_between(layer, share_L - error_L, share_L + error_L, color=color, alpha=0.2, linewidth=0)
            style = {
                "marker": MARKERS[i % len(MARKERS)],
                "markersize": 4.5,
                "markeredgecolor": "white",
                "markeredgewidth": 0.4,
            }
            axes.plot(layer, share_L, color=color, linewidth=1.7, label=name, **style)
            if counts[f"{kind}_baseline_L"] is not None:
                label = "independent, with these shares" if i == len(domains) - 1 else None
                axes.plot(layer, counts[f"{kind}_baseline_L"], color=color, linewidth=1.2, linestyle=":", label=label)
        axes.axhline(
            each[f"random_{kind}_repetition"], color=INK, linewidth=1.2, linestyle="--", label="uniform at random"
        )
        axes.set_xlabel("layer", color=MUTED, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes = figure.axes[0]
    axes.set_ylabel("same expert as the token before", color=MUTED, fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.05, 0.0), ncols=5, **LEGEND)
    return figure


def together(each: Mapping) -> Figure:
    """Pairs of experts over what independence has: a matrix for each shown layer; all domains together."""
    layers, experts = each["shown_layers"], each["experts"]
    total_LEE = sum(np.asarray(counts["together_LEE"], np.int64) for counts in each["domains"].values())
    figure = Figure(figsize=(4.1 * len(layers) + 0.7, 4.3), dpi=110, facecolor="white")
    grid = figure.add_gridspec(
        1, len(layers) + 1, width_ratios=[1] * len(layers) + [0.04], left=0.05, right=0.94, wspace=0.2
    )
    for column, layer in enumerate(layers):
        axes = new_axes(figure, grid[column], f"layer {layer}")
        expected_EE = expected_together(total_LEE[layer])
        ratio_EE = np.full((experts, experts), np.nan)
        np.divide(total_LEE[layer], expected_EE, out=ratio_EE, where=expected_EE >= 1)
        shown_EE = np.log2(np.clip(ratio_EE, 0.25, 4))
        image = axes.imshow(shown_EE, cmap=HEATMAP, norm=TwoSlopeNorm(0, -2, 2))
        axes.grid(False)
        axes.set_xlabel("expert", color=MUTED, fontsize=10)
        ticks = range(0, experts, -(-experts // 16))
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        if experts <= 10:
            for i, j in zip(*np.nonzero(np.isfinite(ratio_EE))):
                color = "white" if abs(shown_EE[i, j]) > 1.2 else INK
                axes.text(j, i, f"{ratio_EE[i, j]:.2f}", ha="center", va="center", fontsize=8, color=color)
    figure.axes[0].set_ylabel("expert", color=MUTED, fontsize=10)
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[-1]))
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼ or less", "½", "1", "2", "4 or more"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, colors=INK)
    return figure
