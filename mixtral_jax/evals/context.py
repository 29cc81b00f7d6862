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
from mixtral_jax.evals.text_perplexity import COLOURS, mean_interval
from mixtral_jax.evals.work import Work, bar
from mixtral_jax.generate.engine import round_up
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
        documents; but for the shortest L/change, by how much the loss differs from that at the shortest, and
        L/change_low and L/change_high, its 95% interval over the pairs of one document's two losses, much narrower than
        the other as easy documents stay easy; then documents, scored_tokens (of each) and lengths.

    Raises:
        UserError: no document is long enough.
    """
    settings = subject.settings
    asked = lengths(subject.config, settings)
    scored = min(SCORED, asked[0] // 2)
    tails = _tails(subject, asked[-1])
    shortest = None
    windows = bar([], "context", "window", len(asked) * len(tails))
    with subject.work("context", tails=tails, scored=scored) as work, windows as shown:
        for length in asked:
            losses = _losses(subject, work, [ids[-length:] for ids in tails], scored, shown)
            for name, value in zip(("loss", "loss_low", "loss_high"), mean_interval(losses)):
                yield f"{length}/{name}", value
            yield f"{length}/perplexity", float(np.exp(losses.mean()))
            if shortest is None:
                shortest = losses
                continue
            for name, value in zip(("change", "change_low", "change_high"), mean_interval(losses - shortest)):
                yield f"{length}/{name}", value
    yield "documents", len(tails)
    yield "scored_tokens", scored
    yield "lengths", asked


def _losses(subject: Subject, work: Work, rows: Sequence[list[int]], scored: int, shown) -> np.ndarray:
    """The mean loss of the last tokens of rows of one length; float64 [rows]."""
    length, found = len(rows[0]), []
    # A batch is finished or not: so every row shares it with the same ones, however often it was interrupted.
    size = subject.scorer.rows(subject.mesh, round_up(length))
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]
        name = f"{length}/{first}-{first + len(batch)}"
        if name not in work:
            requests = [Request([subject.tokenizer.bos_id, *ids[:-scored]], ids[-scored:]) for ids in batch]
            each = dict(subject.scorer(subject.model, requests))
            work.put(name, [-float(np.mean(each[i].log_probs, dtype=np.float64)) for i in range(len(batch))])
        found += work.get(name)
        shown.update(len(batch))
    return np.array(found)


def _tails(subject: Subject, longest: int) -> list[list[int]]:
    """The last tokens of documents that have as many, the domains taking turns."""
    settings, found, best = subject.settings, [], 0
    readers = [(iter(domain), domain.joined) for domain in domains(settings).values()]
    wanted = min(settings.context_documents, settings.limit or settings.context_documents)
    with bar([], "reading documents", "document", wanted) as shown:
        while readers and len(found) < wanted:
            for reader in list(readers):
                ids, size = _next_long(*reader, subject.tokenizer, longest)
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


def _next_long(reader: Iterator[str], joined: bool, tokenizer, longest: int) -> tuple[list[int] | None, int]:
    """The last tokens of the next document that is long enough, and the length of the longest that was seen.

    Args:
        reader: a domain's documents.
        joined: documents that are too short are put together with the next ones, an empty line between them.
    """
    best, before = 0, []
    for text in reader:
        ids = tokenizer.encode(text)
        if len(ids) < longest and joined:
            ids = before = before + (tokenizer.encode("\n\n") if before else []) + ids
        best = max(best, len(ids))
        if len(ids) >= longest:
            return ids[-longest:], best
    return None, best


def report(found: dict[str, dict]) -> list[Block]:
    """A table and a curve for each model, and what the paper shows for another text."""
    asked = sorted(set(itertools.chain.from_iterable(each["lengths"] for each in found.values())))
    rows = [[f"{length:,}", *(each.get(f"{length}/perplexity") for each in found.values())] for length in asked]
    texts = {
        name: f"the last {each['scored_tokens']} tokens of {each['documents']} documents"
        for name, each in found.items()
    }
    same = len(set(texts.values())) == 1
    said = next(iter(texts.values())) if same else ", ".join(f"{name}: {text}" for name, text in texts.items())
    note = (
        f"Of {said}, with that many tokens read in all. The paper's "
        "Mixtral 8x7B reads off at about "
        + ", ".join(f"{value:g} at {length:,}" for length, value in PAPER.items())
        + " tokens on proof-pile, another text."
    )
    return [
        Table("Perplexity by length of context", ["tokens", *found], rows, note),
        _changes(found, asked),
        Plot("Perplexity against context", _curve(found, asked), "Shaded: the 95% interval over documents."),
    ]


def _changes(found: dict[str, dict], asked: Sequence[int]) -> Table:
    """How much more context helps: of the same documents, so without the differences between documents."""
    rows = []
    for length in asked:
        cells = []
        for each in found.values():
            change, low, high = (each.get(f"{length}/change{end}") for end in ("", "_low", "_high"))
            shown = None if change is None else f"{change:+.4f}"
            cells.append(shown if low is None else f"{shown} ({low:+.4f} to {high:+.4f})")
        if any(cells):
            rows.append([f"{length:,}", *cells])
    note = "Nats per token against the same tokens with the shortest context (95% interval, paired by document); below 0 context helps."
    return Table("Change of the loss with more context", ["tokens", *found], rows, note)


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
