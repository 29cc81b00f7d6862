"""Text coloured by the expert that each token went to first (the Mixtral paper's figure 8), for pages and as a picture."""

import functools
import html
from collections.abc import Sequence

from matplotlib import font_manager, ft2font
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mixtral_jax.panels import INK, new_axes

# Okabe and Ito's palette, safe for colour-blind readers, its black lightened: text must be read on it.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#BBBBBB")
LINES = ("none", "solid", "dotted", "double")  # under the text of experts 8 to 15, 16 to 23, 24 to 31
COLUMNS, ROWS = 46, 11  # characters of a picture of a snippet
CELL, LINE, TAB = 0.086, 0.19, 4  # inches of a character and of a line; characters of a tab


def luminance(colour: str) -> float:
    """Relative luminance of #RRGGBB, 0 to 1 (WCAG 2)."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(a: str, b: str) -> float:
    """Contrast of two colours, 1 to 21 (WCAG 2; text wants 4.5)."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@functools.cache
def look(expert: int) -> tuple[str, str, str]:
    """Background, text colour and the line under the text; the first 32 experts all look different."""
    colour = COLOURS[expert % len(COLOURS)]
    ink = max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))
    return colour, ink, LINES[expert // len(COLOURS) % len(LINES)]


def _span(text: str, expert: int) -> str:
    colour, ink, line = look(expert)
    style = f"background:{colour};color:{ink}" + (f";border-bottom:2px {line} {ink}" if line != "none" else "")
    return f'<span style="{style}" title="expert {expert}">{html.escape(text)}</span>'


def spans(pieces: Sequence[str], experts: Sequence[int]) -> str:
    """Text as HTML: a coloured span for each token, its expert in the tooltip."""
    inside = "".join(_span(piece, expert) for piece, expert in zip(pieces, experts))
    style = "white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.6 ui-monospace,Menlo,Consolas,monospace"
    return f'<div style="{style};border:1px solid #d9dde5;padding:.5rem;margin:.2rem 0 .8rem">{inside}</div>'


def legend(experts: int) -> str:
    """Each expert's look, as HTML."""
    return f'<p style="line-height:2">{" ".join(_span(f" expert {expert} ", expert) for expert in range(experts))}</p>'


@functools.cache
def _font() -> font_manager.FontProperties:
    return font_manager.FontProperties(family="DejaVu Sans Mono", size=8.5)


@functools.cache
def _drawable() -> frozenset[int]:
    """The characters that the picture's font has; it comes with matplotlib."""
    return frozenset(ft2font.FT2Font(font_manager.findfont(_font())).get_charmap())


def cells(pieces: Sequence[str], columns: int = COLUMNS) -> list[tuple[int, int, int, str]]:
    """Lays tokens out in lines of monospaced cells.

    Returns:
        runs of cells of one token in one line: (number of the token, line, column, characters). A line break takes a cell
        as ↵, a tab TAB of them, and what the font does not have is a □.
    """
    runs: list[tuple[int, int, int, str]] = []
    line = column = 0
    for i, piece in enumerate(pieces):
        for character in piece.replace("\r", "").expandtabs(TAB):
            if column == columns:
                line, column = line + 1, 0
            shown = "↵" if character == "\n" else character if ord(character) in _drawable() else "□"
            if runs and runs[-1][:2] == (i, line):
                runs[-1] = (*runs[-1][:3], runs[-1][3] + shown)
            else:
                runs.append((i, line, column, shown))
            column += 1
            if character == "\n":
                line, column = line + 1, 0
    return runs


def figure(rows: Sequence[tuple[str, Sequence[str], dict[str, Sequence[int]]]], experts: int) -> Figure:
    """A picture of snippets: a row of panels for each, one panel for each layer.

    Args:
        rows: (name, tokens' texts, layer -> each token's first expert).
        experts: number of experts, for the legend.
    """
    layers = list(rows[0][2])
    heights = [min(max(run[1] for run in cells(pieces)) + 1, ROWS) for _, pieces, _ in rows]
    width = len(layers) * (COLUMNS * CELL + 0.35)
    tall = sum(heights) * LINE + 0.5 * len(rows) + 0.5
    made = Figure(figsize=(width, tall), dpi=130, facecolor="white")
    grid = made.add_gridspec(
        len(rows) + 1,
        len(layers),
        height_ratios=[*(h * LINE + 0.12 for h in heights), 0.3],
        left=0.012,
        right=0.988,
        top=1 - 0.3 / tall,
        bottom=0.06 / tall,
        wspace=0.05,
        hspace=0.38 * (len(rows) + 1) / (tall - 0.4),
    )
    for row, ((name, pieces, chosen), height) in enumerate(zip(rows, heights)):
        for column, layer in enumerate(layers):
            axes = new_axes(made, grid[row, column], f"{name}, layer {layer}")
            axes.title.set_fontsize(10)
            _blank(axes, COLUMNS, height)
            for i, line, start, text in cells(pieces):
                if line < height:
                    _draw(axes, start, line, text, chosen[layer][i])
    axes = made.add_subplot(grid[-1, :])
    _blank(axes, COLUMNS * len(layers), 1)
    named = min(experts, COLUMNS * len(layers) // 11)
    for expert in range(named):
        _draw(axes, expert * 11, 0, f"expert {expert:<2}", expert)
    return made


def _blank(axes, columns: int, lines: int) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, columns)
    axes.set_ylim(lines, 0)


def _draw(axes, column: int, line: int, text: str, expert: int) -> None:
    colour, ink, under = look(expert)
    axes.add_patch(
        Rectangle((column, line + 0.04), len(text), 0.92, facecolor=colour, edgecolor="white", linewidth=0.6)
    )
    if under != "none":
        style = {"solid": "-", "dotted": ":", "double": "--"}[under]
        axes.plot([column, column + len(text)], [line + 0.9] * 2, color=INK, linestyle=style, linewidth=1.2)
    for i, character in enumerate(text):
        axes.text(
            column + i + 0.5,
            line + 0.52,
            character,
            color=ink,
            fontproperties=_font(),
            ha="center",
            va="center",
            parse_math=False,
        )
