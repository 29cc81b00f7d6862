"""Pages: everything escaped, everything inside, what the tables say in the pages too."""

import html
import json
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from mixtral_jax.config import UserError
from mixtral_jax.evals import EVALS, Eval, pages
from mixtral_jax.evals.blocks import Html, Plot, Table, Words
from mixtral_jax.progress import printable

NASTY = '<script>alert("x")</script> | *_`& \u2028 [a](b) \x1b[31m'


def blocks(found):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [0, 1])
    rows = [[NASTY, 1, 0.123456789, None], ["total", 1_234_567, 123456.7, "text"]]
    return [
        Table(f"{len(found)} models", ["name", "count", "value", NASTY], rows, note="a note & more"),
        Plot("A line", figure, "It rises."),
        Words("Said", f"First.\n\n{NASTY}"),
        Html("Coloured", '<span style="background:#fff">ok</span>', "ok"),
    ]


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setitem(EVALS, "planted", Eval(None, ("pretrain",), blocks))
    record = {"checkpoint": NASTY, "versions": {"jax": "1"}, "config": {"model": {"d_model": 8}}}
    pages.write(tmp_path, NASTY, {"a": {"planted": {"x": 1}}, "b": {"planted": {}}}, record)
    return tmp_path


class Outside(HTMLParser):
    """Collects what a page would fetch or run."""

    def __init__(self):
        super().__init__()
        self.found, self.open, self.pictures = [], [], 0

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag in ("script", "link", "iframe", "object"):
            self.found.append(tag)
        for name, value in attributes:
            if name.startswith("on") or (name in ("src", "href") and not value.startswith(("data:", "#"))):
                self.found.append((name, value))
        self.pictures += tag == "img"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_and_runs_nothing(page):
    text = (page / "report.html").read_text()
    parser = Outside()
    parser.feed(text)
    assert parser.found == []
    assert parser.open == []
    assert parser.pictures == 1
    for word in (
        "0.12346",
        "1,234,567",
        "123,457",
        "a note &amp; more",
        "It rises.",
        "<h2>planted</h2>",
        "2 models",
        "d_model",
    ):
        assert word in text
    assert text.count(html.escape(printable(NASTY))) >= 4
    assert 'style="background:#fff">ok' in text


def test_markdown_says_the_same(page):
    text = (page / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1, "every row has as many cells"
    assert "| total | 1,234,567 | 123,457 | text |" in text
    assert "<script>" not in text
    assert "](plots/planted-1.png)" in text
    assert (page / "plots" / "planted-1.png").read_bytes().startswith(b"\x89PNG")


def test_the_terminal_gets_the_tables(monkeypatch):
    monkeypatch.setitem(EVALS, "planted", Eval(None, ("pretrain",), blocks))
    text = pages.terminal({"a": {"planted": {"x": 1}}})
    assert "1,234,567" in text
    assert "\x1b" not in text


def test_pages_that_cannot_be_written_are_explained(tmp_path):
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written.*results.json"):
        pages.write(tmp_path, "t", {}, {})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "True"),
        (12, "12"),
        (1234567, "1,234,567"),
        (1.5, "1.5"),
        (0.000012345678, "1.2346e-05"),
        (98765.4, "98,765"),
        (123456789.0, "1.2346e+08"),
        (float("nan"), "nan"),
    ],
)
def test_cells(value, text):
    assert pages.cell(value) == text


def test_numbers_of_several_models_stand_beside_each_other():
    report = EVALS["perplexity"].report({"a": {"loss": 1.0}, "b": {"loss": 2.0, "tokens": 3}})
    assert json.dumps(report)
