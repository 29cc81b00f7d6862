"""A stage of training is a data transform and a loss; the loop is the same for all."""

from collections.abc import Callable
from typing import NamedTuple

from mixtral_jax import losses
from mixtral_jax.config import Config
from mixtral_jax.data import Corpus, Mixture, StreamedBatches, open_batches


class Stage(NamedTuple):
    """What distinguishes one stage from another.

    batches(config, corpus, tokenizer) -> batches of the corpus's training documents, indexed or streamed.
    loss(model, batch, totals, loss_config) -> (loss, (terms, stats_L)); see losses.pretrain_loss.
    """

    batches: Callable
    loss: Callable


def packed_text(config: Config, corpus: Corpus, tokenizer) -> Mixture | StreamedBatches:
    """Documents packed into rows of train.seq_len, shuffled by train.seed, the sources mixed by their weights."""
    train = config.train
    return open_batches(
        config.data, corpus, tokenizer, batch_size=train.batch_size, seq_len=train.seq_len, seed=train.seed
    )


STAGES = {"pretrain": Stage(packed_text, losses.pretrain_loss)}
