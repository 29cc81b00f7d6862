"""Perplexity of a run's held-out split and of labelled text: per token, byte, word and document, by domain."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixtral_jax.config import Config, UserError
from mixtral_jax.data import TokenFile
from mixtral_jax.evals.blocks import Block, Plot, Table
from mixtral_jax.evals.domains import domains
from mixtral_jax.evals.perplexity import Perplexity
from mixtral_jax.evals.questions import chosen_answers
from mixtral_jax.evals.rolling import DocumentScore, score_documents
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.panels import INK, LEGEND, MUTED, new_axes

Z95 = 1.959963984540054  # of the normal distribution, for 95%
HELDOUT = "the run's held-out split"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's palette


def check(config: Config, settings: Settings) -> None:
    """Refuses text that is not there before weights are read; see domains.domains."""
    del config
    if settings.text:
        domains(settings)


def perplexity(subject: Subject) -> Iterator[tuple[str, Any]]:
    """Of the held-out split, of several sources by source; with --text of its domains and all of them together.

    On the held-out split: loss (nats per token), perplexity, bits_per_byte, tokens; documents are cut into rows as in
    training. Of conversations the answers' tokens count, of pairs the chosen ones'. On --text: see `_of_documents`.
    """
    if subject.settings.text or not subject.own_text:
        yield from _of_text(subject)
        return
    config, corpus = subject.config, subject.corpus
    yield from _of_split(subject, "held-out", corpus.heldout)
    if len(corpus.sources) > 1 and config.train.stage == "pretrain":
        for source in corpus.sources:
            for metric, value in _of_split(subject, source.name, source.heldout):
                yield f"{source.name}/{metric}", value


def _of_split(subject: Subject, name: str, split: TokenFile) -> Iterator[tuple[str, Any]]:
    config = subject.config
    split = chosen_answers(split) if config.train.stage == "dpo" else split
    train = config.train
    rows = {
        "name": name,
        "corpus": subject.corpus.key,
        "rows": train.batch_size // train.accumulation_steps,
        "seq_len": train.seq_len,
        "packing": config.data.packing,
    }
    with subject.work("heldout", **rows) as work:
        yield from Perplexity(config, split)(subject.model, work=work).items()


def _of_text(subject: Subject) -> Iterator[tuple[str, Any]]:
    settings, everything, width = subject.settings, [], subject.window
    seen = {}
    for name, domain in domains(settings).items():
        with subject.work(f"perplexity-{_file_name(name)}", text=settings.text, domain=name, width=width) as work:
            total = sum(1 for _ in itertools.islice(domain, settings.limit or None))
            texts = itertools.islice(domain, settings.limit or None)
            scores = score_documents(subject, work, name, texts, width, total)
        if not scores:
            raise UserError(f"--text: the domain {name} has no text; correct its path or leave it out")
        everything += scores
        for metric, value in _of_documents(scores).items():
            yield f"{name}/{metric}", value
        if subject.own_text and (trained := domain.trained(subject.config)) is not None:
            seen[name] = trained
    yield from _of_documents(everything).items()
    yield "window", width
    if seen:
        yield "trained_on", seen


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def _of_documents(scores: Sequence[DocumentScore]) -> dict[str, float]:
    """Measures of documents.

    Returns:
        loss: nats per token; perplexity: exp of it; bits_per_byte; word_perplexity: exp of nats per word;
        document_nll: nats of a document, the mean, with its 95% interval document_nll_low to _high over documents (normal
        approximation; null of one document); tokens, bytes, words, documents.
    """
    nll, tokens, sizes, words = np.array(scores, np.float64).T
    total, n = nll.sum(), len(scores)
    mean, low, high = mean_interval(nll)
    return {
        "loss": float(total / tokens.sum()),
        "perplexity": _exp(total / tokens.sum()),
        "bits_per_byte": float(total / math.log(2) / sizes.sum()),
        "word_perplexity": _exp(total / words.sum()),
        "document_nll": mean,
        "document_nll_low": low,
        "document_nll_high": high,
        "tokens": int(tokens.sum()),
        "bytes": int(sizes.sum()),
        "words": int(words.sum()),
        "documents": n,
    }


def mean_interval(values: np.ndarray) -> tuple[float, float | None, float | None]:
    """The mean, and its 95% interval by the normal approximation; None of one value."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    half = float(Z95 * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def _exp(x: float) -> float | None:
    """exp(x), or None beyond what a float holds: a random model's perplexity of long words."""
    return float(np.exp(x)) if x < 700 else None


def report(found: dict[str, dict]) -> list[Block]:
    """Tables of the totals and of each domain, and bars of bits per byte."""
    names = [name for name in next(iter(found.values())) if "/" not in name and name != "trained_on"]
    rows = [[name.replace("_", " "), *(each.get(name) for each in found.values())] for name in names]
    made: list[Block] = [
        Table("Perplexity", ["metric", *found], rows, "loss: nats per token. " + _what(found)),
    ]
    labels = list(dict.fromkeys(key.rpartition("/")[0] for each in found.values() for key in each if "/" in key))
    if labels:
        made += [_table(found, labels), Plot("Bits per byte by domain", _bars(found, labels), "Lower is better.")]
    return made


def _what(found: dict[str, dict]) -> str:
    if not any("documents" in each for each in found.values()):
        return (
            f"On {HELDOUT}, documents cut into rows as in training. By token and byte only: the split is kept as tokens, whose "
            "words are not counted. By word and document: --text=NAME=SOURCE:PATH."
        )
    said = "Every token of a document is scored once; its nll is a document's sum, in nats, with the 95% interval of the mean."
    seen = {name: share for each in found.values() for name, share in each.get("trained_on", {}).items()}
    if any(seen.values()):
        parts = ", ".join(f"{name} {share:.0%}" for name, share in seen.items())
        said += f" Documents whose file a run here was trained on: {parts}."
    return said


def _table(found: dict[str, dict], labels: Sequence[str]) -> Table:
    metrics = ("loss", "perplexity", "bits_per_byte", "word_perplexity", "document_nll", "tokens", "documents")
    metrics = [
        name for name in metrics if any(f"{label}/{name}" in each for label in labels for each in found.values())
    ]
    rows = [
        [label, model, *(each.get(f"{label}/{name}") for name in metrics)]
        for label in labels
        for model, each in found.items()
    ]
    return Table("By domain", ["domain", "model", *(name.replace("_", " ") for name in metrics)], rows)


def _bars(found: dict[str, dict], labels: Sequence[str]) -> Figure:
    figure = Figure(figsize=(max(7.0, 1.4 * len(labels) + 2), 3.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = new_axes(figure, figure.add_gridspec(1, 1)[0, 0], "")
    width = 0.8 / len(found)
    for k, (model, each) in enumerate(found.items()):
        values = [each.get(f"{label}/bits_per_byte", math.nan) for label in labels]
        at = np.arange(len(labels)) + (k - (len(found) - 1) / 2) * width
        axes.bar(at, values, 0.92 * width, color=COLOURS[k % len(COLOURS)], label=model)
        for x, value in zip(at, values):
            if math.isfinite(value):
                axes.annotate(
                    f"{value:.2f}", (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=8, color=INK
                )
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.set_ylabel("bits per byte", color=MUTED)
    axes.grid(False, axis="x")
    if len(found) > 1:
        axes.legend(**LEGEND)
    return figure
