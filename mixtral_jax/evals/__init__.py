"""Evaluations of a checkpoint. EVALS maps a name to a function (config, corpus, model) -> {metric: value}."""

from mixtral_jax.config import Config
from mixtral_jax.data import Corpus
from mixtral_jax.evals import ngram
from mixtral_jax.evals.perplexity import Perplexity


def perplexity(config: Config, corpus: Corpus, model) -> dict[str, float]:
    """Loss, perplexity and bits per byte on the whole held-out split."""
    return Perplexity(config, corpus.heldout)(model)


def baselines(config: Config, corpus: Corpus, model=None) -> dict[str, float]:
    """Unigram and bigram models counted on the training split, in bits per byte on the held-out split; no model needed."""
    del model
    train, heldout = corpus.train, corpus.heldout
    counts = ngram.count(train.tokens, train.offsets, config.model.vocab_size)
    found = ngram.score(counts, heldout.tokens, heldout.offsets, int(heldout.bytes_.sum()))
    return {
        "unigram_bits_per_byte": found.unigram_bits_per_byte,
        "bigram_bits_per_byte": found.bigram_bits_per_byte,
    }


EVALS = {"perplexity": perplexity, "baselines": baselines}
