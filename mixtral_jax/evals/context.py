"""Perplexity against the length of the context: the same tokens scored again and again, with more and more before them.

The paper's Figure 4 (right) shows it on proof-pile. Of each document the last tokens are scored, so that what changes from
length to length is the context alone.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mixtral_jax.config import Config, UserError
from mixtral_jax.evals.blocks import Block, Plot, Table
from mixtral_jax.evals.domains import domains
from mixtral_jax.evals.scorer import Request
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.text_perplexity import COLOURS, Z95
from mixtral_jax.evals.work import bar
from mixtral_jax.panels import LEGEND, MUTED, new_axes

LONGEST, SHORTEST = 32768, 64
SCORED = 256  # tokens of a document, at most; half the shortest length where that is less
# Read off Figure 4 of the paper: tokens of context -> perplexity of Mixtral 8x7B on proof-pile.
PAPER = {512: 3.8, 5120: 2.1, 32768: 1.9}


def lengths(config: Config, settings: Settings) -> list[int]:
    """The lengths in tokens: those that were asked for, or doubling up to what the model reads.

    Raises:
        UserError: one is longer than that, or too short to leave context and scored tokens.
    """
    longest = config.model.max_seq_len
    asked = sorted(set(settings.context_lengths))
    for length in asked:
        if not 2 <= length <= longest:
            raise UserError(f"--context_lengths={length}; it must lie between 2 and the model's max_seq_len={longest}")
    if asked:
        return asked
    last = min(longest, LONGEST)
    first = min(max(SHORTEST, last // 64), last)
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found if found[-1] == last else [*found, last]


def check(config: Config, settings: Settings) -> None:
    """Refuses lengths that the model does not have, and text that is not there, before weights are read."""
    lengths(config, settings)
    if settings.context_documents < 1:
        raise UserError(f"--context_documents={settings.context_documents}; it must be at least 1")
    domains(settings)


def context(subject: Subject) -> Iterator[tuple[str, Any]]:
    """Perplexity of the last tokens of documents by the number of tokens that are read, BOS and they themselves included.

    BOS stands first in every window, also where it begins inside a document: the model has never read a text without.

    Yields:
        for each length L: L/loss (nats per token), L/perplexity, and L/loss_low and L/loss_high, the 95% interval over
        documents; then documents, scored_tokens (of each) and lengths.

    Raises:
        UserError: no document is long enough.
    """
    settings, tokenizer = subject.settings, subject.tokenizer
    asked = lengths(subject.config, settings)
    scored = min(SCORED, asked[0] // 2)
    tails = _tails(subject, asked[-1])
    with subject.work("context", tails=tails, scored=scored) as work:
        left = [(i, length) for length in asked for i in range(len(tails)) if f"{length}/{i}" not in work]
        requests = []
        for i, length in left:
            ids = tails[i]
            requests.append(Request([tokenizer.bos_id, *ids[len(ids) - length : -scored]], ids[-scored:]))
        found = subject.scorer(subject.model, requests)
        for k, each in bar(found, "context", "window", len(asked) * len(tails), len(asked) * len(tails) - len(left)):
            i, length = left[k]
            work.put(f"{length}/{i}", -float(np.mean(each.log_probs, dtype=np.float64)))
        for length in asked:
            loss = np.array([work.get(f"{length}/{i}") for i in range(len(tails))])
            yield f"{length}/loss", float(loss.mean())
            yield f"{length}/perplexity", float(np.exp(loss.mean()))
            spread = Z95 * loss.std(ddof=1) / np.sqrt(len(loss)) if len(loss) > 1 else None
            yield f"{length}/loss_low", None if spread is None else float(loss.mean() - spread)
            yield f"{length}/loss_high", None if spread is None else float(loss.mean() + spread)
    yield "documents", len(tails)
    yield "scored_tokens", scored
    yield "lengths", asked


def _tails(subject: Subject, longest: int) -> list[list[int]]:
    """The last tokens of documents that have as many, the domains taking turns."""
    settings, found, best = subject.settings, [], 0
    readers = [iter(domain) for domain in domains(settings).values()]
    wanted = min(settings.context_documents, settings.limit or settings.context_documents)
    with bar([], "reading documents", "document", wanted) as shown:
        while readers and len(found) < wanted:
            for reader in list(readers):
                ids, size = _next_long(reader, subject.tokenizer, longest)
                best = max(best, size)
                if ids is None:
                    readers.remove(reader)
                elif len(found) < wanted:
                    found.append(ids)
                    shown.update()
    if not found:
        raise UserError(
            f"context: no document has {longest} tokens, the longest has {best}; give longer text (--text=NAME=SOURCE:PATH) or "
            f"--context_lengths up to {best}"
        )
    return found


def _next_long(reader: Iterator[str], tokenizer, longest: int) -> tuple[list[int] | None, int]:
    """The last tokens of the next document that is long enough, and the length of the longest that was seen."""
    best = 0
    for text in reader:
        ids = tokenizer.encode(text)
        best = max(best, len(ids))
        if len(ids) >= longest:
            return ids[-longest:], best
    return None, best


def report(found: dict[str, dict]) -> list[Block]:
    """A table and a curve for each model, and what the paper shows for another text."""
    asked = sorted(set(itertools.chain.from_iterable(each["lengths"] for each in found.values())))
    rows = [[f"{length:,}", *(each.get(f"{length}/perplexity") for each in found.values())] for length in asked]
    first = next(iter(found.values()))
    note = (
        f"The last {first['scored_tokens']} tokens of {first['documents']} documents, with that many tokens read in all. The paper's "
        "Mixtral 8x7B reads off at about "
        + ", ".join(f"{value:g} at {length:,}" for length, value in PAPER.items())
        + " tokens on proof-pile, another text."
    )
    return [
        Table("Perplexity by length of context", ["tokens", *found], rows, note),
        Plot("Perplexity against context", _curve(found, asked), "Shaded: the 95% interval over documents."),
    ]


def _curve(found: dict[str, dict], asked: Sequence[int]) -> Figure:
    figure = Figure(figsize=(7.5, 4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = new_axes(figure, figure.add_gridspec(1, 1)[0, 0], "")
    for k, (model, each) in enumerate(found.items()):
        x = [length for length in asked if f"{length}/loss" in each]
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(x, [each[f"{length}/perplexity"] for length in x], marker="o", color=colour, label=model)
        low, high = ([each[f"{length}/loss_{end}"] for length in x] for end in ("low", "high"))
        if None not in low:
            axes.fill_between(x, np.exp(low), np.exp(high), color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(asked)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("tokens of context", color=MUTED)
    axes.set_ylabel("perplexity", color=MUTED)
    if len(found) > 1:
        axes.legend(**LEGEND)
    return figure
