"""Evaluations of a model. EVALS maps a name to what runs it, what draws it, and the stages whose runs it means something for.

An evaluation is an iterator of named results: it takes a Subject and yields (metric, value), values that go through JSON.
What a report shows is made of those values alone. The results are the same on all processes.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.config import Config
from mixtral_jax.data import Corpus, Tokenizer, first_documents, load_tokenizer
from mixtral_jax.evals import (
    context,
    harness,
    mt_bench,
    ngram,
    passkey,
    passkey_report,
    routing,
    routing_report,
    text_perplexity,
)
from mixtral_jax.evals.blocks import Block, Table
from mixtral_jax.evals.perplexity import Perplexity
from mixtral_jax.evals.preference import Preference, heldout_reference
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject

logger = logging.getLogger(__name__)


class Eval(NamedTuple):
    """An evaluation."""

    run: Callable[[Subject], Iterator[tuple[str, Any]]]
    stages: tuple[str, ...]  # of training whose runs it is for
    report: Callable[[dict[str, dict]], list[Block]]  # {model: results} -> what a report shows of them, side by side
    check: Callable[[Config, Settings], None] | None = (
        None  # refuses settings that cannot work, before weights are read
    )
    check_tokens: Callable[[Config, Settings, Tokenizer], None] | None = None  # the same, where it takes the tokenizer
    default: bool = True  # runs where nobody says which; False: it is long, or wants data


def scalars(title: str) -> Callable[[dict[str, dict]], list[Block]]:
    """A report of all that is a number: metrics by models."""

    def blocks(found: dict[str, dict]) -> list[Block]:
        names = dict.fromkeys(
            name for each in found.values() for name, value in each.items() if isinstance(value, int | float)
        )
        rows = [[name, *(each.get(name) for each in found.values())] for name in names]
        return [Table(title, ["metric", *found], rows)]

    return blocks


def preference(subject: Subject) -> Iterator[tuple[str, Any]]:
    """Preference loss, reward accuracy and margin on the whole held-out split, against the run's own reference."""
    config, corpus = subject.config, subject.corpus
    reference = heldout_reference(config, corpus, subject.meta, subject.mesh, subject.note)
    given = {
        "corpus": corpus.key,
        "rows": [config.train.batch_size, config.train.seq_len, config.data.packing],
        "dpo": dataclasses.asdict(config.dpo),
        "sums": 2,  # raise it when the sums of a batch are others
        "reference": None
        if reference is None
        else hashlib.sha256(np.ascontiguousarray(reference).tobytes()).hexdigest(),
    }
    with subject.work("preference", **given) as work:
        yield from Preference(config, corpus.heldout, reference)(subject.model, work=work).items()


def ngrams(subject: Subject) -> Iterator[tuple[str, Any]]:
    """See `baselines`."""
    yield from baselines(subject.config, subject.corpus).items()


def heldout(config: Config, corpus: Corpus, reference=None):
    """What a stage is measured by while it trains: callable (params, limit, frozen) -> {"loss", ...}."""
    if config.train.stage == "dpo":
        return Preference(config, corpus.heldout, reference and reference.heldout)
    return Perplexity(config, corpus.heldout)


# Counting bigrams takes about 40 bytes of host memory a token: enough tokens for a strong baseline, and a bound.
BASELINE_TOKENS = 50_000_000
# Of a stream they must be read and tokenised for it: some seconds.
STREAM_BASELINE_TOKENS = 5_000_000


def baselines(config: Config, corpus: Corpus) -> dict[str, float]:
    """Unigram and bigram models in bits per byte on the held-out split; no model needed.

    Counted on the training split, or on its first BASELINE_TOKENS tokens if it is longer (whole documents); of streams
    on the first STREAM_BASELINE_TOKENS, which are read again for it. `baseline_tokens` says on how many. Of conversations
    and pairs, of which only the answers count, there are none.
    """
    if config.train.stage != "pretrain":
        return {}
    heldout = corpus.heldout
    if config.data.streaming:
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.cache_dir, config.data.heldout_fraction)
        train = first_documents(config.data, tokenizer, STREAM_BASELINE_TOKENS)
    else:
        train = corpus.train
    documents = max(int(np.searchsorted(train.offsets, BASELINE_TOKENS, side="right")) - 1, 1)
    offsets = train.offsets[: documents + 1]
    counts = ngram.count(train.tokens[: offsets[-1]], offsets, config.model.vocab_size)
    found = ngram.score(counts, heldout.tokens, heldout.offsets, int(heldout.bytes_.sum()))
    return {
        "unigram_bits_per_byte": found.unigram_bits_per_byte,
        "bigram_bits_per_byte": found.bigram_bits_per_byte,
        "baseline_tokens": int(offsets[-1]),
    }


STAGES = ("pretrain", "sft", "dpo")

EVALS = {
    "perplexity": Eval(text_perplexity.perplexity, STAGES, text_perplexity.report, text_perplexity.check),
    "baselines": Eval(ngrams, ("pretrain",), scalars("Counts of words and pairs of words on the same text")),
    "preference": Eval(preference, ("dpo",), scalars("Reward accuracy and margins")),
    "routing": Eval(routing.routing, STAGES, routing_report.report, routing.check),
    "context": Eval(context.context, STAGES, context.report, context.check, default=False),
    "passkey": Eval(passkey.passkey, STAGES, passkey_report.report, passkey.check, passkey.check_lengths, False),
    "lm_eval": Eval(harness.run, STAGES, harness.report, harness.check, default=False),
    "mt_bench": Eval(mt_bench.mt_bench, STAGES, mt_bench.report, mt_bench.check, default=False),
}
