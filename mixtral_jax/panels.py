"""The panels of the report: each draws one aspect of a run on its axes, from the lines of metrics.jsonl (see jsonl.py).

Each copes with few lines, and with none. Lines are dicts; a value that is missing or null is skipped.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mixtral_jax.metrics import human, short_float

# One colour, one meaning, in every panel (Okabe and Ito's palette, safe for colour-blind readers).
TRAIN, HELDOUT, RATE, NORM, BUSY, SPEED = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2"
INK, MUTED, GRID = "#222222", "#6b6b6b", "#e4e4e4"
HEATMAP = LinearSegmentedColormap.from_list("load", ["#08306b", "#4a90c4", "#f7f7f7", "#e8743b", "#7f1d05"])
HEATMAP_COLUMNS = 400  # more steps than that are averaged, so that the file stays small and no step is skipped
LEGEND = {"frameon": False, "fontsize": 9, "labelcolor": INK}


def new_axes(figure: Figure, cell, title: str) -> Axes:
    """Adds axes in the report's style to a cell of its grid."""
    axes = figure.add_subplot(cell)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9.5)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _tick(x: float) -> str:
    """A count as short as it goes: 5k, 12.5k."""
    text = human(x)
    number = text.rstrip("kMBT")
    return f"{float(number):g}{text[len(number) :]}"


def step_axis(axes: Axes, steps: np.ndarray) -> None:
    """Makes the x axis count these steps."""
    axes.set_xlabel("step", color=MUTED, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x) if abs(x) >= 1e4 else f"{x:g}"))
    if steps.size:
        first, last = float(steps.min()), float(steps.max())
        pad = 0.02 * (last - first) or 0.5
        axes.set_xlim(first - pad, last + pad)


def empty(axes: Axes, text: str) -> None:
    """Says in a panel why it shows nothing."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.grid(False)


def series(lines: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps, values), float64, of the lines that have a finite value."""
    pairs = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return tuple(np.array(pairs, np.float64).reshape(-1, 2).T)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about 1/20 of the run, so that the curve does not lag.

    At the start, where a loss falls fast, the window shrinks; at the end the line through the last window goes on.
    """
    n, half = len(values), len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(n - half)
    reach = np.minimum(half, i)
    inner = (total[i + reach + 1] - total[i - reach]) / (2 * reach + 1)
    last = np.arange(n - 2 * half - 1, n)
    slope, offset = np.polyfit(last - n, values[last], 1)
    return np.concatenate([inner, offset + slope * (last[half + 1 :] - n)])


def curve(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """Draws the raw values light and their smoothed course strong; few points are drawn as they are."""
    if len(values) >= 40:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.9)
        axes.plot(steps, _smooth(values), color=color, linewidth=1.9, label=label)
    else:
        axes.plot(steps, values, color=color, linewidth=1.9, marker="o", markersize=3.5, label=label)


def draw_loss(
    axes: Axes, train: Sequence[dict], heldout: Sequence[dict], final: dict | None, sessions: Sequence[dict] = ()
) -> None:
    """Token loss of the training batches, raw and smoothed, with the held-out points, in nats per token.

    The right axis and the baselines, in bits per byte, hold for the held-out text: its loss in nats per token and its
    bits per byte have one ratio, the bytes in a token. Thin upright lines are the steps the run was resumed from.
    """
    steps, loss = series(train, "token_loss")
    held_steps, held = series(heldout, "loss")
    if not loss.size and not held.size:
        return empty(axes, "no loss yet")
    for i, session in enumerate(sessions[1:]):
        label = "restart" if i == 0 else None
        axes.axvline(session["step"], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label=label, zorder=1)
    curve(axes, steps, loss, TRAIN, "training batches")
    if held.size:
        style = {"marker": "o", "markersize": 7, "markeredgecolor": "white", "linestyle": ":", "linewidth": 1}
        axes.plot(held_steps, held, color=HELDOUT, label="held-out text", **style)
        _best(axes, held_steps, held)
        mark(axes, held_steps[-1], held[-1], f"{held[-1]:.3f}")
    axes.set_ylabel("nats per token", color=MUTED, fontsize=10)
    axes.margins(y=0.08)
    step_axis(axes, np.concatenate([steps, held_steps]))
    # Opaque: baselines may run behind it.
    axes.legend(loc="upper right", **LEGEND | {"frameon": True, "edgecolor": "none", "framealpha": 0.95})
    scale = next((x["loss"] / x["bits_per_byte"] for x in heldout if x.get("loss") and x.get("bits_per_byte")), None)
    if scale is None:
        return
    right = axes.secondary_yaxis("right", functions=(lambda y: y / scale, lambda y: y * scale))
    right.set_ylabel("held-out bits per byte", color=MUTED, fontsize=10)
    right.tick_params(colors=INK, labelsize=9.5)
    right.spines["right"].set_color(MUTED)
    for name in ("unigram", "bigram"):
        bits = (final or {}).get(f"{name}_bits_per_byte")
        if bits is not None and bits * scale < axes.get_ylim()[1]:
            axes.axhline(bits * scale, color=MUTED, linewidth=1.1, linestyle="--")
            at = axes.get_yaxis_transform()  # left of the legend
            axes.annotate(name, (0.68, bits * scale), (0, 3), at, "offset points", ha="right", color=MUTED)


def mark(axes: Axes, x: float, y: float, text: str) -> None:
    """Writes a held-out point's value above it."""
    style = {"ha": "right", "color": HELDOUT, "fontsize": 10, "fontweight": "bold"}
    axes.annotate(text, (x, y), (-4, 11), textcoords="offset points", **style)


def _best(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """A star at the lowest held-out point, the checkpoint to keep; nothing while there is one point only."""
    if len(values) > 1:
        at = int(values.argmin())
        style = {"marker": "*", "markersize": 15, "markeredgecolor": "white", "linestyle": "none", "zorder": 4}
        label = f"best: {values[at]:.3f} at step {steps[at]:,.0f}"
        axes.plot(steps[at], values[at], color=HELDOUT, label=label, **style)


def draw_bits(axes: Axes, heldout: Sequence[dict], final: dict | None) -> None:
    """Bars of the final held-out bits per byte against unigram and bigram; before the end, the curve so far."""
    if final is None:
        steps, bits = series(heldout, "bits_per_byte")
        if not bits.size:
            return empty(axes, "not evaluated yet")
        axes.plot(steps, bits, color=HELDOUT, marker="o", linewidth=1.6, label="so far (no final evaluation)")
        _best(axes, steps, bits)
        mark(axes, steps[-1], bits[-1], f"{bits[-1]:.3f}")
        axes.margins(y=0.15)
        step_axis(axes, steps)
        axes.legend(loc="upper right", **LEGEND)
        return
    bars = [
        ("unigram", final.get("unigram_bits_per_byte"), "#c4c4c4"),
        ("bigram", final.get("bigram_bits_per_byte"), "#9a9a9a"),
        ("this run", final.get("bits_per_byte"), HELDOUT),
    ]
    bars = [bar for bar in bars if bar[1] is not None]
    if not bars:
        return empty(axes, "the final evaluation was not finite")
    names, values, colors = zip(*bars)
    axes.bar(names, values, color=colors, width=0.62)
    for i, value in enumerate(values):
        style = {"ha": "center", "color": INK, "fontsize": 12, "fontweight": "bold"}
        axes.annotate(f"{value:.3f}", (i, value), (0, 4), textcoords="offset points", **style)
    axes.set_ylim(0, max(values) * 1.14)
    axes.set_ylabel("bits per byte, lower is better", color=MUTED, fontsize=10)
    axes.grid(False, axis="x")
    axes.tick_params(axis="x", length=0, labelsize=11)


def draw_schedule(axes: Axes, train: Sequence[dict]) -> None:
    """Learning rate (left axis) and gradient norm before clipping (right axis, logarithmic)."""
    steps, rate = series(train, "learning_rate")
    norm_steps, norm = series(train, "gradient_norm")
    if not rate.size and not norm.size:
        return empty(axes, "no steps yet")
    axes.plot(steps, rate, color=RATE, linewidth=2, label="learning rate (left)")
    axes.set_ylim(0, max(rate, default=1) * 1.25 or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: short_float(x)))
    right = axes.twinx()
    right.spines[["top", "left"]].set_visible(False)
    right.spines["right"].set_color(MUTED)
    right.tick_params(colors=INK, labelsize=9.5)
    positive = norm > 0
    curve(right, norm_steps[positive], norm[positive], NORM, "gradient norm (right)")
    _log_axis(right, norm[positive])
    step_axis(axes, steps)
    handles = [*axes.get_lines(), *(line for line in right.get_lines() if not line.get_label().startswith("_"))]
    axes.legend(handles, [line.get_label() for line in handles], loc="upper right", ncols=2, **LEGEND)


def _log_axis(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic y axis with plain numbers 1, 2, 5 ... and room for the legend at the top."""
    if not values.size:
        axes.set_yticks([])
        return
    low, high = values.min() / 1.3, values.max() * 1.3
    high *= (high / low) ** 0.2
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for marks in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        ticks = [m * 10**d for d in decades for m in marks if low <= m * 10**d <= high]
        if len(ticks) >= 4:
            break
    axes.set_yticks(ticks if len(ticks) >= 3 else MaxNLocator(5).tick_values(low, high)[1:-1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: short_float(x)))
    axes.minorticks_off()


def draw_balance(axes: Axes, train: Sequence[dict]) -> None:
    """Balance loss and the busiest expert's load over the mean: the worst layer, and the spread over layers."""
    steps, balance = series(train, "balance_loss")
    with_load = [line for line in train if line.get("max_over_mean_L") and None not in line["max_over_mean_L"]]
    if not balance.size and not with_load:
        return empty(axes, "no router statistics yet")
    if with_load:
        load_steps = np.array([line["step"] for line in with_load])
        peak_SL = np.array([line["max_over_mean_L"] for line in with_load])
        axes.fill_between(load_steps, peak_SL.min(1), peak_SL.max(1), color=BUSY, alpha=0.18, linewidth=0)
        curve(axes, load_steps, peak_SL.max(1), BUSY, "busiest expert / mean: worst layer, band: all layers")
    curve(axes, steps, balance, TRAIN, "balance loss")
    axes.axhline(1.0, color=MUTED, linewidth=1, linestyle="--")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.95), high + 0.3 * (high - low))
    step_axis(axes, steps)
    axes.legend(loc="upper right", **LEGEND)


def draw_speed(axes: Axes, train: Sequence[dict]) -> None:
    """Tokens per second, with MFU said in the corner."""
    steps, speed = series(train, "tokens_per_second")
    if not speed.size:
        return empty(axes, "not measured yet")
    curve(axes, steps, speed, SPEED, "tokens per second")
    axes.set_ylim(0, speed.max() * 1.25)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
    step_axis(axes, steps)
    mfu = series(train, "mfu")[1]
    text = f"median {human(np.median(speed))} tok/s" + (f", MFU {np.median(mfu):.1%}" if mfu.size else "")
    axes.text(0.99, 0.97, text, transform=axes.transAxes, ha="right", va="top", color=INK, fontsize=10)


def loads(train: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps [S] and load shares [S, L, E], each layer's summing to 1, of the lines that have them all."""
    lines = [line for line in train if line.get("load_LE")]
    if not lines:
        return np.zeros(0), np.zeros((0, 0, 0))
    steps, load_SLE = np.array([line["step"] for line in lines]), np.array([line["load_LE"] for line in lines], float)
    finite = np.isfinite(load_SLE).all((1, 2))
    steps, load_SLE = steps[finite], load_SLE[finite]
    return steps, load_SLE / np.maximum(load_SLE.sum(-1, keepdims=True), 1e-30)


def draw_loads(axes: Axes, train: Sequence[dict]) -> None:
    """Heatmap: a row per (layer, expert), a column per step; white is the fair share 1/E, red more, blue less."""
    steps, load_SLE = loads(train)
    if not steps.size:
        return empty(axes, "no router statistics yet")
    columns = np.array_split(np.arange(len(steps)), min(len(steps), HEATMAP_COLUMNS))
    load_CLE = np.stack([load_SLE[column].mean(0) for column in columns])
    centres = np.array([steps[column].mean() for column in columns])
    between = (centres[1:] + centres[:-1]) / 2
    edges = np.concatenate([[steps[0] - 0.5], between, [steps[-1] + 0.5]])
    _, layers, e = load_CLE.shape
    high = max(2 / e, float(load_CLE.max()))
    norm = TwoSlopeNorm(vcenter=1 / e, vmin=0.0, vmax=high) if e > 1 else None
    rows = load_CLE.reshape(len(columns), layers * e).T
    image = axes.pcolormesh(edges, np.arange(layers * e + 1), rows, cmap=HEATMAP, norm=norm, rasterized=True)
    for layer in range(1, layers):
        axes.axhline(layer * e, color=INK, linewidth=1.0)
    every = -(-layers // 16)
    shown = range(0, layers, every)
    axes.set_yticks([(layer + 0.5) * e for layer in shown], [f"layer {layer}" for layer in shown])
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    step_axis(axes, steps)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(layers * e, 0)  # layer 0 on top
    slim = {"pad": 0.008, "fraction": 0.02, "aspect": max(10, 2.2 * axes.figure.get_figheight())}
    bar = axes.figure.colorbar(image, ax=axes, **slim)
    ticks = np.unique([0.0, 0.5 / e, 1 / e, (1 / e + high) / 2, high])
    bar.set_ticks(ticks, labels=[f"{tick:.1%}" + (" = 1/E" if np.isclose(tick, 1 / e) else "") for tick in ticks])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9.5, colors=INK)
