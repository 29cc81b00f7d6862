"""The run in one picture: report.png, drawn from metrics.jsonl alone, so that it can be drawn again at any time."""

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixtral_jax import panels
from mixtral_jax.jsonl import read_jsonl
from mixtral_jax.metrics import human
from mixtral_jax.progress import duration


def write_report(source: str | os.PathLike, out_png: str | os.PathLike, title: str) -> Path:
    """Draws a run's metrics into one PNG.

    Args:
        source: a workdir that holds metrics.jsonl, or such a file; jsonl.py describes its lines.
        out_png: the picture to write; its folder is created.
        title: the name of the run.

    Returns:
        The path of the picture.

    Raises:
        FileNotFoundError: there is no metrics file.
        ValueError: a line of it, other than the last, is broken.
    """
    source, out_png = Path(source), Path(out_png)
    lines = read_jsonl(source / "metrics.jsonl" if source.is_dir() else source)
    kinds: dict[str, list[dict]] = {"train": [], "heldout": [], "final": []}
    for line in lines:
        kinds.setdefault(line.get("kind", ""), []).append(line)
    figure = draw(kinds["train"], kinds["heldout"], kinds["final"][-1] if kinds["final"] else None, title)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=110, metadata={"Software": "mixtral_jax"})
    return out_png


def draw(train: Sequence[dict], heldout: Sequence[dict], final: dict | None, title: str) -> Figure:
    """Lays out the panels; for the lines see jsonl.py."""
    load_SLE = panels.loads(train)[1]
    rows = load_SLE.shape[1] * load_SLE.shape[2] if load_SLE.size else 0
    heat = float(np.clip(0.16 * rows, 2.6, 9.0))
    figure = Figure(figsize=(16, 9.2 + heat), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12, hspace=0.02, wspace=0.02)
    grid = figure.add_gridspec(3, 6, height_ratios=[4.6, 3.2, heat])
    figure.suptitle(f"{title}\n", fontsize=17, fontweight="bold", color=panels.INK)
    below = 1 - 0.52 / figure.get_figheight()
    figure.text(0.5, below, _summary(train, final), ha="center", va="top", fontsize=11, color=panels.MUTED)

    def axes(cell, title: str):
        return panels.new_axes(figure, cell, title)

    panels.draw_loss(axes(grid[0, :4], "Loss"), train, heldout, final)
    panels.draw_bits(axes(grid[0, 4:], "Held-out bits per byte"), heldout, final)
    panels.draw_schedule(axes(grid[1, :2], "Learning rate and gradient norm"), train)
    panels.draw_balance(axes(grid[1, 2:4], "Balance of the experts"), train)
    panels.draw_speed(axes(grid[1, 4:], "Throughput"), train)
    panels.draw_loads(axes(grid[2, :], "Load of every expert: share of a layer's assignments"), train)
    return figure


def _summary(train: Sequence[dict], final: dict | None) -> str:
    """The line below the title: how far, how long, how good, how fast."""
    if not train:
        return "no training steps yet"
    parts = [f"{train[-1]['step']:,} steps"]
    seconds = train[-1].get("time", 0) - train[0].get("time", 0)
    if seconds >= 1:
        parts.append(f"{duration(seconds)} h:mm:ss" if seconds >= 3600 else f"{duration(seconds)} min")
    loss = panels.series(train, "token_loss")[1]
    if loss.size:
        parts.append(f"training loss {loss[-1]:.3f} nats/token")
    if final and final.get("bits_per_byte") is not None:
        parts.append(f"held-out {final['bits_per_byte']:.3f} bits/byte")
    speed = panels.series(train, "tokens_per_second")[1]
    if speed.size:
        parts.append(f"{human(np.median(speed))} tokens/s")
    end = datetime.datetime.fromtimestamp(train[-1]["time"], datetime.UTC) if "time" in train[-1] else None
    return "   ·   ".join(parts + ([f"{end:%Y-%m-%d %H:%M} UTC"] if end else []))
