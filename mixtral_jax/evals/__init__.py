"""Evaluations of a checkpoint. EVALS maps a name to a function and the stages whose runs it means something for.

The function is (config, corpus, model, meta) -> {metric: value}: the run's configuration for the devices here, its corpus,
its model with adapters merged, and what the checkpoint notes (load.stored_meta).
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from mixtral_jax.config import Config
from mixtral_jax.data import Corpus, first_documents, load_tokenizer
from mixtral_jax.evals import ngram
from mixtral_jax.evals.perplexity import Perplexity
from mixtral_jax.evals.preference import Preference, heldout_reference
from mixtral_jax.evals.questions import chosen_answers

logger = logging.getLogger(__name__)


class Eval(NamedTuple):
    """An evaluation, and the stages of training whose runs it is for."""

    run: Callable
    stages: tuple[str, ...]


def perplexity(config: Config, corpus: Corpus, model, meta: dict | None = None) -> dict[str, float]:
    """Loss, perplexity and bits per byte on the whole held-out split: of conversations the answers', of pairs the chosen ones'."""
    del meta
    heldout = corpus.heldout
    return Perplexity(config, chosen_answers(heldout) if config.train.stage == "dpo" else heldout)(model)


def preference(config: Config, corpus: Corpus, model, meta: dict) -> dict[str, float]:
    """Preference loss, reward accuracy and margin on the whole held-out split, against the run's own reference."""
    reference = heldout_reference(config, corpus, meta, jax.sharding.get_mesh(), logger.info)
    return Preference(config, corpus.heldout, reference)(model)


def heldout(config: Config, corpus: Corpus, reference=None):
    """What a stage is measured by while it trains: callable (params, limit, frozen) -> {"loss", ...}."""
    if config.train.stage == "dpo":
        return Preference(config, corpus.heldout, reference and reference.heldout)
    return Perplexity(config, corpus.heldout)


# Counting bigrams takes about 40 bytes of host memory a token: enough tokens for a strong baseline, and a bound.
BASELINE_TOKENS = 50_000_000
# Of a stream they must be read and tokenised for it: some seconds.
STREAM_BASELINE_TOKENS = 5_000_000


def baselines(config: Config, corpus: Corpus, model=None, meta: dict | None = None) -> dict[str, float]:
    """Unigram and bigram models in bits per byte on the held-out split; no model needed.

    Counted on the training split, or on its first BASELINE_TOKENS tokens if it is longer (whole documents); of streams
    on the first STREAM_BASELINE_TOKENS, which are read again for it. `baseline_tokens` says on how many. Of conversations
    and pairs, of which only the answers count, there are none.
    """
    del model, meta
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


EVALS = {
    "perplexity": Eval(perplexity, ("pretrain", "sft", "dpo")),
    "baselines": Eval(baselines, ("pretrain",)),
    "preference": Eval(preference, ("dpo",)),
}
