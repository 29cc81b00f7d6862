"""What a report is made of. An evaluation's `report` turns results into blocks, from the JSON alone; pages.py writes them."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure


class Table(NamedTuple):
    """Rows of cells: texts as they are, numbers with five significant digits, None as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float | None]]
    note: str = ""


class Plot(NamedTuple):
    """A figure, and in words what it shows, for who cannot see it."""

    title: str
    figure: Figure
    note: str = ""


class Words(NamedTuple):
    """Paragraphs of plain text."""

    title: str
    text: str


class Html(NamedTuple):
    """A piece of a page, escaped and self-contained: inline styles, no scripts, nothing from elsewhere."""

    title: str
    html: str
    plain: str  # what stands for it in report.md
    note: str = ""


Block = Table | Plot | Words | Html
