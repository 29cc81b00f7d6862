"""Reports: tables for the terminal, report.md with pictures beside it, and report.html in one file that needs nothing else."""

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.config import UserError
from mixtral_jax.evals import EVALS
from mixtral_jax.evals.blocks import Block, Html, Plot, Table, Words
from mixtral_jax.progress import printable

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #1f2430; background: #fff;
  max-width: 1200px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.35rem; margin: 2.4rem 0 .4rem; border-bottom: 2px solid #d9dde5; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
nav a { margin-right: 1rem; }
a { color: #0b5cad; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e3e6ec; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #9aa3b2; background: #f6f7f9; vertical-align: bottom; }
td.number, th.number { text-align: right; }
td.number, td.short { white-space: nowrap; }
td.wide { min-width: 11rem; overflow-wrap: anywhere; }
tbody tr:hover { background: #f4f8fd; }
img { max-width: 100%; height: auto; }
.note { color: #525b6b; font-size: .92rem; max-width: 60rem; }
pre { background: #f6f7f9; padding: .7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; margin-top: .6rem; }
@media print { nav { display: none; } section { break-inside: auto; } }
"""
SHORT, WIDE = 16, 60  # characters up to which a cell is never broken, and from which its column is wide


def blocks(found: dict[str, dict[str, dict]]) -> dict[str, list[Block]]:
    """{model: {evaluation: results}} -> {evaluation: its blocks}, of all models side by side, in the order of EVALS."""
    named = {}
    for name, each in EVALS.items():
        measured = {model: results[name] for model, results in found.items() if name in results}
        if measured and (made := each.report(measured)):
            named[name] = made
    return named


def terminal(found: dict[str, dict[str, dict]]) -> str:
    """The first table of each evaluation, for a terminal; the pages have the others."""
    tables = [[block for block in made if isinstance(block, Table)] for made in blocks(found).values()]
    return "\n\n".join(_text_table(each[0]) for each in tables if each)


def write(
    folder: Path, title: str, found: dict[str, dict[str, dict]], record: dict, extra: Sequence[Block] = ()
) -> None:
    """Writes report.md, its pictures (plots/*.png) and report.html.

    Args:
        folder: exists.
        title: of the page.
        found: {model: {evaluation: results}}.
        record: what made them: checkpoint, settings, devices, versions, configuration.
        extra: blocks that stand before the evaluations'.

    Raises:
        UserError: they cannot be written; results.json is there already.
    """
    sections = ({"summary": list(extra)} if extra else {}) | blocks(found)
    page, text = _html(title, sections, record), []
    pictures: dict[str, bytes] = {}
    for name, made in sections.items():
        text += [f"## {name}", ""]
        for block in made:
            text += [*_markdown(name, block, pictures), ""]
    text = [f"# {_plain(title)}", "", *text, "## What made these figures", "", *_made_by_markdown(record)]
    try:
        (folder / "plots").mkdir(exist_ok=True)
        for name, content in pictures.items():
            (folder / "plots" / name).write_bytes(content)
        (folder / "report.md").write_text("\n".join(text).rstrip() + "\n", "utf-8")
        (folder / "report.html").write_text(page, "utf-8")
    except OSError as error:
        raise UserError(f"--out={folder} cannot be written: {error}; the figures are in results.json") from error


def cell(value) -> str:
    """A cell as text: five significant digits, thousands with commas, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 10_000 <= abs(value) < 10_000_000 else f"{value:.5g}"


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text_table(table: Table) -> str:
    rows = [[printable(cell(value)) for value in row] for row in (table.columns, *table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    numeric = [any(_is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]

    def line(row) -> str:
        cells = [text.rjust(width) if right else text.ljust(width) for text, width, right in zip(row, widths, numeric)]
        return ("  " + "  ".join(cells)).rstrip()

    return "\n".join(
        [table.title, line(rows[0]), "  " + "  ".join("-" * width for width in widths), *map(line, rows[1:])]
    )


def _plain(text: str) -> str:
    """Text inside Markdown, without a meaning of its own there."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(printable(text).split()))


def _markdown(section: str, block: Block, pictures: dict[str, bytes]) -> list[str]:
    lines = [f"### {_plain(block.title)}", ""] if block.title else []
    if isinstance(block, Table):
        lines.append(f"| {' | '.join(_plain(cell(value)) for value in block.columns)} |")
        numeric = [any(_is_number(row[i]) for row in block.rows) for i in range(len(block.columns))]
        lines.append(f"| {' | '.join('---:' if right else '---' for right in numeric)} |")
        lines += [f"| {' | '.join(_plain(cell(value)) for value in row)} |" for row in block.rows]
    elif isinstance(block, Plot):
        name = f"{section}-{len(pictures) + 1}.png"
        pictures[name] = _png(block)
        lines.append(f"![{_plain(block.title)}](plots/{name})")
    elif isinstance(block, Words):
        lines.append(_plain(block.text))
    else:
        lines += ["```", block.plain.replace("```", "'''"), "```"]
    note = getattr(block, "note", "")
    return [*lines, "", _plain(note)] if note else lines


def _png(plot: Plot) -> bytes:
    stream = io.BytesIO()
    plot.figure.savefig(stream, format="png", dpi=110, metadata={"Software": "mixtral_jax"})
    return stream.getvalue()


def _escaped(text: str, quote: bool = True) -> str:
    return html.escape(printable(text), quote)


def _html(title: str, sections: dict[str, list[Block]], record: dict) -> str:
    parts = [f"<h1>{_escaped(title)}</h1>", '<nav aria-label="sections">']
    parts += [f'<a href="#{_escaped(name)}">{_escaped(name)}</a>' for name in (*sections, "made-by")]
    parts.append("</nav>")
    for name, made in sections.items():
        parts.append(f'<section id="{_escaped(name)}"><h2>{_escaped(name)}</h2>')
        parts += [_html_block(block) for block in made]
        parts.append("</section>")
    parts.append(_made_by_html(record))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _html_block(block: Block) -> str:
    head = f"<h3>{_escaped(block.title)}</h3>" if block.title else ""
    note = getattr(block, "note", "")
    note = f'<p class="note">{_escaped(note)}</p>' if note else ""
    if isinstance(block, Table):
        return head + _html_table(block) + note
    if isinstance(block, Plot):
        picture = base64.b64encode(_png(block)).decode()
        alt = _escaped(f"{block.title}. {block.note}", quote=True)
        return f'{head}<img alt="{alt}" src="data:image/png;base64,{picture}">{note}'
    if isinstance(block, Html):
        return head + block.html + note
    return head + "".join(f"<p>{_escaped(part)}</p>" for part in block.text.split("\n\n"))


def _html_table(table: Table) -> str:
    numeric = [any(_is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]

    widest = [max((len(cell(row[i])) for row in table.rows), default=0) for i in range(len(table.columns))]
    kinds = [
        "number" if right else "wide" if width >= WIDE else "short" if width <= SHORT else ""
        for right, width in zip(numeric, widest)
    ]

    def cells(tag: str, row) -> str:
        marked = [(f' class="{kind}"' if kind else "", _escaped(cell(value))) for value, kind in zip(row, kinds)]
        return f"<tr>{''.join(f'<{tag}{kind}>{text}</{tag}>' for kind, text in marked)}</tr>"

    body = "".join(cells("td", row) for row in table.rows)
    return f'<div class="scroll"><table><thead>{cells("th", table.columns)}</thead><tbody>{body}</tbody></table></div>'


def _made_by_html(record: dict) -> str:
    parts = ['<section id="made-by"><h2>What made these figures</h2><div>']
    for name, value in record.items():
        if isinstance(value, dict):
            text = _escaped(json.dumps(value, indent=1, ensure_ascii=False))
            parts.append(f"<details><summary>{_escaped(name)}</summary><pre>{text}</pre></details>")
        else:
            parts.append(f"<p><b>{_escaped(name)}</b>: {_escaped(str(value))}</p>")
    return "".join([*parts, "</div></section>"])


def _made_by_markdown(record: dict) -> list[str]:
    lines = [f"- {name}: {_plain(str(value))}" for name, value in record.items() if not isinstance(value, dict)]
    versions = record.get("versions", {})
    said = ", ".join(f"{name} {value}" for name, value in versions.items())
    return [*lines, f"- versions: {said}", "- configuration and settings: results.json"]
