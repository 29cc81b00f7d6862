"""The run in one picture: report.png, drawn from metrics.jsonl alone, so that it can be drawn again at any time.

python -m mixtral_jax.report WORKDIR
"""

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixtral_jax import panels, time_panels, tuning_panels
from mixtral_jax.jsonl import read_jsonl
from mixtral_jax.metrics import human
from mixtral_jax.progress import duration


def write_report(source: str | os.PathLike, out_png: str | os.PathLike, title: str) -> Path:
    """Draws a run's metrics into one PNG, also while the run goes on: whoever opens it sees the old or the new picture.

    Args:
        source: a workdir that holds metrics.jsonl, or such a file; jsonl.py describes its lines.
        out_png: the picture to write; its folder is created.
        title: the name of the run.

    Returns:
        The path of the picture.

    Raises:
        FileNotFoundError: there is no metrics file.
        ValueError: a line of it, other than the last, is broken.
        OSError: the picture cannot be written; an older one is left as it was.
    """
    source, out_png = Path(source), Path(out_png)
    lines = read_jsonl(source / "metrics.jsonl" if source.is_dir() else source)
    kinds: dict[str, list[dict]] = {"train": [], "heldout": [], "final": [], "session": [], "sample": []}
    for line in lines:
        kinds.setdefault(line.get("kind", ""), []).append(line)
    final = kinds["final"][-1] if kinds["final"] else None
    figure = draw(kinds["train"], kinds["heldout"], final, title, kinds["session"], kinds["sample"])
    out_png.parent.mkdir(parents=True, exist_ok=True)
    new = out_png.with_name(f".{out_png.name}.{os.getpid()}.new")
    try:
        figure.savefig(new, format="png", dpi=110, metadata={"Software": "mixtral_jax"})
        os.replace(new, out_png)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return out_png


def draw(
    train: Sequence[dict],
    heldout: Sequence[dict],
    final: dict | None,
    title: str,
    sessions: Sequence[dict] = (),
    samples: Sequence[dict] = (),
) -> Figure:
    """Lays out the panels; for the lines see jsonl.py."""
    load_SLE = panels.loads(train)[1]
    rows = load_SLE.shape[1] * load_SLE.shape[2] if load_SLE.size else 0
    heat = float(np.clip(0.16 * rows, 2.6, 9.0))
    text = 0.24 * len(tuning_panels.answer_lines(samples))
    text = text and text + 0.4
    figure = Figure(figsize=(16, 12.2 + heat + text), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12, hspace=0.02, wspace=0.02)
    grid = figure.add_gridspec(4 + bool(text), 6, height_ratios=[4.6, 3.2, 2.8, heat] + [text] * bool(text))
    figure.suptitle(f"{title}\n", fontsize=17, fontweight="bold", color=panels.INK)
    below = 1 - 0.52 / figure.get_figheight()
    figure.text(0.5, below, _summary(train, final, sessions), ha="center", va="top", fontsize=11, color=panels.MUTED)

    def axes(cell, title: str):
        return panels.new_axes(figure, cell, title)

    if any("rewards/margins" in line for line in train) or any("accuracy" in line for line in heldout):
        tuning_panels.draw_preference_loss(axes(grid[0, :4], "Preference loss"), train, heldout)
        tuning_panels.draw_accuracy(axes(grid[0, 4:], "Reward accuracy"), train, heldout)
    else:
        panels.draw_loss(axes(grid[0, :4], "Loss"), train, heldout, final, sessions)
        panels.draw_bits(axes(grid[0, 4:], "Held-out bits per byte"), heldout, final)
    panels.draw_schedule(axes(grid[1, :2], "Learning rate and gradient norm"), train)
    panels.draw_balance(axes(grid[1, 2:4], "Balance of the experts"), train)
    panels.draw_speed(axes(grid[1, 4:], "Throughput"), train)
    time_panels.draw_times(axes(grid[2, :4], "Where the time goes"), train)
    time_panels.draw_goodput(axes(grid[2, 4:], "Goodput"), train, sessions)
    panels.draw_loads(axes(grid[3, :], "Load of every expert: share of a layer's assignments"), train)
    if text:
        tuning_panels.draw_answers(axes(grid[4, :], "Answers before, during and after"), samples)
    return figure


def _summary(train: Sequence[dict], final: dict | None, sessions: Sequence[dict]) -> str:
    """The line below the title: how far, how long, how good, how fast."""
    if not train:
        return "no training steps yet"
    parts = [f"{train[-1]['step']:,} steps"]
    seconds = train[-1].get("time", 0) - train[0].get("time", 0)
    if seconds >= 1:
        parts.append(f"{duration(seconds)} h:mm:ss" if seconds >= 3600 else f"{duration(seconds)} min")
    if len(sessions) > 1:
        parts.append(time_panels.restarts(sessions))
    loss = panels.series(train, "token_loss")[1]
    if loss.size and "rewards/margins" not in train[-1]:
        parts.append(f"training loss {loss[-1]:.3f} nats/token")
    if final and final.get("bits_per_byte") is not None:
        parts.append(f"held-out {final['bits_per_byte']:.3f} bits/byte")
    if final and final.get("accuracy") is not None:
        interval = f"{final['accuracy_low']:.1%} to {final['accuracy_high']:.1%}"
        parts.append(f"held-out reward accuracy {final['accuracy']:.1%} ({interval} of {final['pairs']} pairs)")
    speed = panels.series(train, "tokens_per_second")[1]
    if speed.size:
        parts.append(f"{human(np.median(speed))} tokens/s")
    end = datetime.datetime.fromtimestamp(train[-1]["time"], datetime.UTC) if "time" in train[-1] else None
    return "   ·   ".join(parts + ([f"{end:%Y-%m-%d %H:%M} UTC"] if end else []))


def main(argv: list[str] | None = None) -> int:
    """Runs `python -m mixtral_jax.report` and returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m mixtral_jax.report",
        description="Draws WORKDIR/report.png from WORKDIR/metrics.jsonl, also while the run goes on.",
        epilog="exit status: 0 done, 2 there is no such run, 1 the picture cannot be written",
    )
    parser.add_argument("workdir", help="the workdir of a run, for example runs/demo")
    parser.add_argument("--out", help="where to write the picture (default: WORKDIR/report.png)")
    arguments = parser.parse_args(argv)
    workdir = Path(arguments.workdir)
    if not (workdir / "metrics.jsonl").is_file():
        print(f"error: {workdir / 'metrics.jsonl'} does not exist; give the workdir of a run", file=sys.stderr)
        return 2
    try:
        print(write_report(workdir, arguments.out or workdir / "report.png", workdir.resolve().name))
    except ValueError as error:  # a broken line
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
