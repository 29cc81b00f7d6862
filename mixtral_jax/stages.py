"""A stage of training is a data transform and a loss; the loop is the same for all."""

from collections.abc import Callable
from typing import NamedTuple

from mixtral_jax import losses, preference
from mixtral_jax.config import Config
from mixtral_jax.data import Corpus, Mixture, StreamedBatches, open_batches, open_chat_corpus, open_corpus


class Stage(NamedTuple):
    """What distinguishes one stage from another.

    corpus(config, tokenizer) -> the documents, conversations or pairs to train on and those that are held out.
    batches(config, corpus, tokenizer) -> batches of the corpus's training documents, indexed or streamed.
    loss(model, batch, totals, config, reference) -> (loss, (terms, stats_L)); see losses.pretrain_loss. The reference is
        a model whose weights do not move, or None.
    """

    corpus: Callable
    batches: Callable
    loss: Callable


def text(config: Config, tokenizer) -> Corpus:
    """Documents of text."""
    return open_corpus(config.data, tokenizer)


def conversations(config: Config, tokenizer) -> Corpus:
    """Conversations whose answers are trained on."""
    return open_chat_corpus(config.data, tokenizer, "sft", config.train.seq_len)


def pairs(config: Config, tokenizer) -> Corpus:
    """Pairs of a chosen and a rejected answer to the same question."""
    return open_chat_corpus(config.data, tokenizer, "dpo", config.train.seq_len)


def packed(config: Config, corpus: Corpus, tokenizer) -> Mixture | StreamedBatches:
    """Documents packed into rows of train.seq_len, shuffled by train.seed, the sources mixed by their weights."""
    train = config.train
    return open_batches(
        config.data,
        corpus,
        tokenizer,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        seed=train.seed,
        pairs=train.stage == "dpo",
    )


def next_token(model, batch: dict, totals: losses.Totals, config: Config, reference=None):
    """The loss of the next token, of text and of answers."""
    del reference
    return losses.pretrain_loss(model, batch, totals, config.loss)


STAGES = {
    "pretrain": Stage(text, packed, next_token),
    "sft": Stage(conversations, packed, next_token),
    "dpo": Stage(pairs, packed, preference.dpo_loss),
}
