"""What a report shows of routing: tables in the Mixtral paper's own form, and figures like its figures 7 to 10."""

import html
from collections.abc import Mapping

import numpy as np

from mixtral_jax.evals.blocks import Block, Html, Plot, Table
from mixtral_jax.evals.coloured import figure, legend, spans
from mixtral_jax.evals.routing_counts import expected_together
from mixtral_jax.evals.routing_plots import MOST_SNIPPETS, repetition, shares, shares_by_choice, together

Found = Mapping[str, Mapping]  # {model: results}
# Mixtral 8x7B on The Pile, arXiv 2401.04088, table 5, percent: first choice in layers 0, 15, 31; first or second choice.
PAPER = {
    "ArXiv": (14.0, 27.9, 22.7, 46.5, 62.3, 52.9),
    "DM Mathematics": (14.1, 28.4, 19.7, 44.9, 67.0, 44.5),
    "Github": (14.9, 28.1, 19.7, 49.9, 66.9, 49.2),
    "Gutenberg": (13.9, 26.1, 26.3, 49.5, 63.1, 52.2),
    "PhilPapers": (13.6, 25.3, 22.1, 46.9, 61.9, 51.3),
    "PubMed Abstracts": (14.2, 24.6, 22.0, 48.6, 61.6, 51.8),
    "StackExchange": (13.6, 27.2, 23.6, 48.2, 64.6, 53.6),
    "Wikipedia (en)": (14.4, 23.6, 25.3, 49.8, 62.1, 51.8),
}
PAPER_LAYERS = (0, 15, 31)
MOST_COLUMNS = 16  # of experts in a table; of more the figure
SHOWN_TOKENS = 8
WHITESPACE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})


def report(found: Found) -> list[Block]:
    """The blocks, of several models side by side."""
    blocks: list[Block] = [repetition_table(found), shares_table(found)]
    for name, each in found.items():
        of = f" of {name}" if len(found) > 1 else ""
        blocks += [
            Plot(f"Share of assignments by expert{of}", shares(each), _shares_note(each)),
            Plot(
                f"Share of assignments by choice{of}",
                shares_by_choice(each),
                f"Dashed: the even share, 1/{each['experts']}.",
            ),
            Plot(f"Repetition by layer{of}", repetition(each), REPETITION_NOTE),
        ]
        if each["experts_per_token"] > 1:
            blocks.append(Plot(f"Experts chosen together{of}", together(each), TOGETHER_NOTE))
        blocks += [typical_table(each, of), *_texts(each, of)]
    if any(each["experts_per_token"] > 1 for each in found.values()):
        blocks.append(together_table(found))
    return blocks


REPETITION_NOTE = (
    "How often a token has the same expert as the token before it. Dashed: neighbours that choose uniformly at random. Dotted: "
    "neighbours that are independent, with experts as unevenly busy as they are in that domain and layer."
)
TOGETHER_NOTE = (
    "All domains together. How often two experts are chosen for the same token, over how often they would be if only the share "
    "of each mattered (quasi-independence, since a token's experts always differ): 2 is twice as often, 0.5 half as often."
)


def _shares_note(each: Mapping) -> str:
    worst = max(np.max(domain["share_error_LE"]) for domain in each["domains"].values())
    return (
        f"Dashed: the even share, 1/{each['experts']} = {1 / each['experts']:.1%}. Sampling error of a share: at most ± {196 * worst:.2g} "
        "percentage points (95%, over windows of text)."
    )


def like_paper(each: Mapping) -> bool:
    """Whether the paper's figures are of such a model: 32 layers, 2 of 8 experts."""
    return (each["layers"], each["experts"], each["experts_per_token"]) == (32, 8, 2)


def _kinds(each: Mapping) -> dict[str, str]:
    """The two measures of repetition, in words; of one choice there is one."""
    k = each["experts_per_token"]
    if k == 1:
        return {"first": "the one choice"}
    return {"first": "first choice", "any": "first or second choice" if k == 2 else f"any of {k} choices"}


def repetition_table(found: Found) -> Table:
    """The paper's table 5: rows domains, columns layers, percent; the paper's figure beside ours where it has one."""
    columns = _columns(found)
    cited = [column for column in columns if any(_cited(each, domain, column) for each, domain in _all_domains(found))]
    names = []
    for kind, layer in columns:
        words = next(w for each in found.values() for name, w in _kinds(each).items() if name == kind)
        names += [f"{words}, layer {layer}", *(["paper"] if (kind, layer) in cited else [])]
    several, rows = len(found) > 1, []
    for model, each in found.items():
        for domain, counts in each["domains"].items():
            row: list = [*([model] if several else []), domain]
            for column in columns:
                row += [_percent(each, counts, *column), *([_cited(each, domain, column)] if column in cited else [])]
            rows.append(row)
    head = [*(["model"] if several else []), "domain"]
    return Table("Percentage of expert assignment repetitions", [*head, *names], rows, _repetition_words(found))


def _columns(found: Found) -> list[tuple[str, int]]:
    layers = sorted({layer for each in found.values() for layer in each["shown_layers"]})
    kinds = dict.fromkeys(kind for each in found.values() for kind in _kinds(each))
    return [(kind, layer) for kind in kinds for layer in layers]


def _all_domains(found: Found):
    return [(each, domain) for each in found.values() for domain in each["domains"]]


def _percent(each: Mapping, counts: Mapping, kind: str, layer: int) -> float | None:
    if kind not in _kinds(each) or layer >= each["layers"]:
        return None
    return round(100 * counts[f"{kind}_repeats_L"][layer] / counts["pairs"], 2)


def _cited(each: Mapping, domain: str, column: tuple[str, int]) -> float | None:
    kind, layer = column
    if not like_paper(each) or domain not in PAPER or layer not in PAPER_LAYERS:
        return None
    return PAPER[domain][PAPER_LAYERS.index(layer) + 3 * (kind == "any")]


def _repetition_words(found: Found) -> str:
    parts = []
    for model, each in found.items():
        kinds, domains = _kinds(each), each["domains"].values()
        chance = ", ".join(f"{100 * each[f'random_{kind}_repetition']:.1f}% ({words})" for kind, words in kinds.items())
        shares = [
            f"{100 * min(values):.1f} to {100 * max(values):.1f}% ({words})"
            for kind, words in kinds.items()
            if (values := _baselines(each, kind))
        ]
        worst = max(max(counts[f"{kind}_error_L"]) for counts in domains for kind in kinds)
        parts.append(
            f"{f'{model}: ' if len(found) > 1 else ''}uniform at random: {chance}; independent neighbours with the shares that experts have here: "
            f"{', '.join(shares)}. Sampling error: at most ± {196 * worst:.2g} percentage points (95%, over windows)."
        )
    low, high = np.min(list(PAPER.values()), 0), np.max(list(PAPER.values()), 0)
    said = " / ".join(f"{a:g} to {b:g}" for a, b in zip(low, high))
    parts.append(f"Paper, Mixtral 8x7B on The Pile, first choice in layers 0 / 15 / 31, then first or second: {said}.")
    return "Percent of pairs of neighbouring tokens. " + " ".join(parts)


def _baselines(each: Mapping, kind: str) -> list[float]:
    """Of the shown layers, in all domains."""
    return [
        counts[f"{kind}_baseline_L"][layer]
        for counts in each["domains"].values()
        if counts[f"{kind}_baseline_L"] is not None
        for layer in each["shown_layers"]
    ]


def shares_table(found: Found) -> Table:
    """Percent of assignments, any choice: a row for each layer and domain; experts as columns if they are few."""
    several = len(found) > 1
    most = max(each["experts"] for each in found.values())
    few = most <= MOST_COLUMNS
    names = [f"expert {e}" for e in range(most)] if few else ["busiest", "its share", "least busy", "its share"]
    rows = []
    for model, each in found.items():
        for layer in each["shown_layers"]:
            for domain, counts in each["domains"].items():
                n_E = np.sum(counts["choice_LKE"][layer], axis=0)
                share_E = np.round(100 * n_E / n_E.sum(), 2)
                cells = [float(share) for share in share_E] + [None] * (most - len(share_E))
                if not few:
                    high, low = int(share_E.argmax()), int(share_E.argmin())
                    cells = [f"expert {high}", float(share_E[high]), f"expert {low}", float(share_E[low])]
                rows.append([*([model] if several else []), layer, domain, *cells])
    head = [*(["model"] if several else []), "layer", "domain"]
    note = "Percent of all assignments (first, second, ... choice); the counts of each choice in all layers are in results.json."
    return Table("Share of assignments by expert", [*head, *names], rows, note)


def typical_table(each: Mapping, of: str = "") -> Table:
    """The tokens that tell most of each expert."""
    rows = []
    for layer, experts in each["typical_tokens"].items():
        for expert, tokens in enumerate(experts):
            said = " · ".join(
                f"{shown(token)} {100 * token['here'] / token['count']:.0f}%" for token in tokens[:SHOWN_TOKENS]
            )
            rows.append([int(layer), expert, said or None])
    note = (
        "First choice, all domains together: the tokens whose odds of going to the expert exceed those of any token most, and how "
        "many percent of their occurrences go there. Spaces are ␣, line breaks ↵; #12 is a token without a text of its own."
    )
    return Table(f"Typical tokens{of}", ["layer", "expert", "tokens"], rows, note)


def shown(token: Mapping) -> str:
    """A token's text without white space, or its number."""
    text = token["text"].translate(WHITESPACE)
    return text if text.isprintable() and text and "\ufffd" not in text else f"#{token['token']}"


def together_table(found: Found) -> Table:
    """Of the shown layers the pairs of experts that are chosen together oftener, and more rarely, than independence has it."""
    several, rows = len(found) > 1, []
    for model, each in found.items():
        if each["experts_per_token"] == 1:
            continue
        for layer in each["shown_layers"]:
            (low, i, j), (high, k, m) = _extremes(total_together(each)[layer])
            rows.append([*([model] if several else []), layer, f"{k} and {m}", high, f"{i} and {j}", low])
    head = [*(["model"] if several else []), "layer"]
    names = ["oftenest together", "times as often", "most rarely together", "times as often"]
    return Table("Experts chosen together", [*head, *names], rows, TOGETHER_NOTE)


def total_together(each: Mapping) -> np.ndarray:
    """Tokens that chose both of two experts, over all domains: int64 [L, E, E]."""
    return sum(np.asarray(counts["together_LEE"], np.int64) for counts in each["domains"].values())


def _extremes(together_EE: np.ndarray):
    """(ratio to independence, expert, expert): of the rarest pair, and of the most frequent; of pairs that could occur."""
    expected_EE = expected_together(together_EE)
    pairs = [(i, j) for i in range(len(together_EE)) for j in range(i) if expected_EE[i, j] >= 1]
    ratios = sorted((round(float(together_EE[i, j] / expected_EE[i, j]), 3), j, i) for i, j in pairs)
    return (ratios[0], ratios[-1]) if ratios else ((None, "-", "-"), (None, "-", "-"))


def _texts(each: Mapping, of: str) -> list[Block]:
    """The snippets, as a page and as a picture."""
    snippets, experts = each["snippets"], each["experts"]
    parts = [legend(experts)]
    for domain, snippet in snippets.items():
        panels = "".join(
            f'<div style="flex:1 1 20rem"><b>{html.escape(domain)}, layer {layer}</b>{spans(snippet["pieces"], chosen)}</div>'
            for layer, chosen in snippet["first"].items()
        )
        parts.append(f'<div style="display:flex;flex-wrap:wrap;gap:.8rem">{panels}</div>')
    note = "The start of a document of each domain; a token's colour is its first expert, which a tooltip names."
    rows = [(domain, snippet["pieces"], snippet["first"]) for domain, snippet in snippets.items()]
    picture = figure(rows[:MOST_SNIPPETS], experts)
    return [
        Html(f"Text coloured by first expert{of}", "".join(parts), "The picture below shows it.", note),
        Plot(f"Text coloured by first expert, as a picture{of}", picture, note),
    ]
