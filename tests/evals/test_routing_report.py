"""What a report shows of routing: from the JSON alone, of several models, and legible."""

import html.parser
import json
import re

import numpy as np
import pytest

from mixtral_jax.evals import coloured, routing_counts, routing_report
from mixtral_jax.evals.blocks import Html, Plot, Table
from mixtral_jax.evals.routing_counts import uniform_baselines


def results(layers=2, e=8, k=2, domains=("code", "prose"), seed=0, pieces=("<b>&", "\n", "\tx", "é", "\U0001f600")):
    """As routing yields them, through JSON; random choices."""
    rng = np.random.default_rng(seed)
    index = np.argsort(-rng.gumbel(size=(layers, 4, 50, e)), -1)[..., :k]
    counts = routing_counts.count(index, np.ones((4, 50), bool), e)
    first_L, any_L = routing_counts.share_baselines(counts)
    errors = routing_counts.errors(counts)
    shown = sorted({0, (layers - 1) // 2, layers - 1})
    domain = {
        "documents": 4,
        "tokens": 200,
        "pairs": 196,
        "windows": 4,
        **{name: counts[name] for name in ("choice_LKE", "together_LEE", "first_repeats_L", "any_repeats_L")},
        "first_baseline_L": first_L,
        "any_baseline_L": any_L,
        **{f"{kind}_error_L": errors[f"{kind}_L"] for kind in ("first", "any")},
        "share_error_LE": errors["share_LE"],
    }
    first, any_ = uniform_baselines(e, k)
    found = {
        "random_first_repetition": first,
        "random_any_repetition": any_,
        "experts": e,
        "experts_per_token": k,
        "layers": layers,
        "shown_layers": shown,
        "domains": dict.fromkeys(domains, domain),
        "typical_tokens": {
            str(layer): [[dict(token=9, text=" a", count=30, here=24, log_odds=4.0)], *([[]] * (e - 1))]
            for layer in shown
        },
        "snippets": {
            name: {
                "pieces": list(pieces),
                "first": {str(layer): [i % e for i in range(len(pieces))] for layer in shown},
            }
            for name in domains
        },
    }
    return json.loads(json.dumps(found, default=np.ndarray.tolist))


def tables(found) -> dict[str, Table]:
    return {block.title: block for block in routing_report.report(found) if isinstance(block, Table)}


def test_repetition_stands_in_the_papers_form_beside_its_figures():
    """Of 32 layers of 8 experts and of domains that it has; nothing is cited of others."""
    big = results(32, domains=("Github", "mine"))
    big["domains"]["Github"]["first_repeats_L"][15] = 55
    table = tables({"big": big})["Percentage of expert assignment repetitions"]
    assert table.columns[:5] == ["domain", "first choice, layer 0", "paper", "first choice, layer 15", "paper"]
    assert table.columns[-2:] == ["first or second choice, layer 31", "paper"]
    github, mine = table.rows
    assert github[0] == "Github"
    assert github[3] == pytest.approx(100 * 55 / 196, abs=0.01)
    assert github[2::2] == [14.9, 28.1, 19.7, 49.9, 66.9, 49.2]
    assert mine[2::2] == [None] * 6
    assert "uniform at random: 12.5% (first choice), 46.4% (first or second choice)" in table.note
    assert "13.6 to 14.9 / 23.6 to 28.4 / 19.7 to 26.3 / 44.9 to 49.9 / 61.6 to 67 / 44.5 to 53.6" in table.note
    small = tables({"small": results(domains=("Github",))})["Percentage of expert assignment repetitions"]
    assert "paper" not in small.columns


def test_models_of_other_shapes_stand_side_by_side():
    found = {"a": results(), "b": results(3, 4, 1), "c": results(1, 32, 8)}
    made = tables(found)
    table = made["Percentage of expert assignment repetitions"]
    assert table.columns[:2] == ["model", "domain"]
    assert [row[:2] for row in table.rows] == [[m, d] for m in "abc" for d in ("code", "prose")]
    at = table.columns.index("first choice, layer 2")
    assert [row[at] is None for row in table.rows] == [True, True, False, False, True, True], "a model has it or not"
    shares = made["Share of assignments by expert"]
    assert shares.columns[3:] == ["busiest", "its share", "least busy", "its share"], "32 experts fill no columns"
    plots = [block for block in routing_report.report(found) if isinstance(block, Plot)]
    assert len(plots) == 5 + 4 + 5, "of one choice nothing is chosen together"
    for block in plots:
        block.figure.savefig("/dev/null", format="png", dpi=40)


def test_shares_are_percent_of_all_choices():
    each = results()
    table = tables({"a": each})["Share of assignments by expert"]
    n_E = np.sum(each["domains"]["code"]["choice_LKE"][0], axis=0)
    assert table.rows[0][:2] == [0, "code"]
    np.testing.assert_allclose(table.rows[0][2:], 100 * n_E / n_E.sum(), atol=0.01)
    assert sum(table.rows[0][2:]) == pytest.approx(100, abs=0.05)


def test_the_extreme_pairs_are_named():
    each = results(1, domains=("code",))
    together_EE = np.full((8, 8), 100)
    together_EE[2, 5] = together_EE[5, 2] = 300
    together_EE[1, 7] = together_EE[7, 1] = 10
    each["domains"]["code"]["together_LEE"] = [together_EE.tolist()]
    (row,) = tables({"a": each})["Experts chosen together"].rows
    assert (row[1], row[3]) == ("2 and 5", "1 and 7")
    assert row[2] > 1.5, "its own pair raised what is expected of it"
    assert row[4] < 0.2


def test_typical_tokens_can_be_seen():
    rows = tables({"a": results()})["Typical tokens"].rows
    assert rows[0] == [0, 0, "␣a 80%"]
    assert rows[1] == [0, 1, None]
    assert routing_report.shown(dict(token=7, text="\ufffd")) == "#7"
    assert routing_report.shown(dict(token=7, text="\n")) == "↵"


class Words(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.text, self.open = "", []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        assert tag in ("p", "b", "div", "span"), "a token became markup"
        assert set(dict(attrs)) <= {"style", "title"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_coloured_text_is_escaped_and_says_each_expert():
    block = next(block for block in routing_report.report({"a": results()}) if isinstance(block, Html))
    parser = Words()
    parser.feed(block.html)
    assert parser.open == []
    assert parser.text.count("<b>&\n\txé\U0001f600") == 4, "two domains, two layers"
    for expert, text in enumerate(["&lt;b&gt;&amp;", "\n", "\tx", "é"]):
        assert re.search(f'<span style="[^"]*" title="expert {expert}">{text}</span>', block.html)
    assert not re.search(r"url\(|<script|class=|src=", block.html)


def test_experts_look_different_and_text_can_be_read():
    looks = [coloured.look(expert) for expert in range(32)]
    assert len(set(looks)) == 32
    assert coloured.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert all(coloured.contrast(background, ink) >= 4.5 for background, ink, _ in looks)


def test_tokens_are_laid_out_in_cells():
    """Lines break where the text does and where a line is full; what the font lacks is a box."""
    assert coloured.cells(["ab", "cde", "\n", "\U0001f600x", "\ty"], columns=4) == [
        (0, 0, 0, "ab"),
        (1, 0, 2, "cd"),
        (1, 1, 0, "e"),
        (2, 1, 1, "↵"),
        (3, 2, 0, "□x"),
        (4, 2, 2, "  "),
        (4, 3, 0, "  y"),
    ]
