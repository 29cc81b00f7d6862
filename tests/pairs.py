"""Random pairs of answers as a TokenFile, for tests of DPO."""

import dataclasses

import numpy as np

from mixtral_jax.data import Batches, TokenFile, pack_pairs
from tests.helpers import tiny


def dpo(**changes):
    """The tiny configuration as a DPO run; keys as of helpers.tiny."""
    settings = {"train__stage": "dpo", "train__seq_len": 64, "model__vocab_size": 64, "model__num_layers": 1}
    return tiny(**settings | changes)


def random_pairs(n: int, seed: int = 0, vocab: int = 64, longest: int = 12) -> TokenFile:
    """n pairs of random tokens: a prompt that both answers share, BOS 1 first and EOS 2 last, answers weighted 1."""
    rng = np.random.default_rng(seed)
    tokens, weights, lengths = [], [], []
    for _ in range(n):
        prompt = [1, *rng.integers(3, vocab, rng.integers(2, 8))]
        for _ in range(2):
            answer = [*rng.integers(3, vocab, rng.integers(1, longest)), 2]
            tokens += [*prompt, *answer]
            weights += [0] * len(prompt) + [1] * len(answer)
            lengths.append(len(prompt) + len(answer))
    ids = [f"pairs:{i // 2 + 1}" for i in range(2 * n)]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    sizes = np.array(lengths, np.int64)
    return TokenFile(np.array(tokens, np.int32), offsets, sizes, ids, np.array(weights, np.float32))


def swapped(file: TokenFile) -> TokenFile:
    """The same pairs with chosen and rejected exchanged."""
    order = np.arange(len(file.ids)).reshape(-1, 2)[:, ::-1].reshape(-1)
    spans = [slice(file.offsets[i], file.offsets[i + 1]) for i in order]
    offsets = np.cumsum([0, *(file.lengths[order])], dtype=np.int64)
    joined = [np.concatenate([a[span] for span in spans]) for a in (file.tokens, file.weights)]
    return dataclasses.replace(file, tokens=joined[0], weights=joined[1], offsets=offsets, bytes_=file.bytes_[order])


def batches(config, file: TokenFile, one_per_row: bool = False, rows: int | None = None) -> Batches:
    """Batches of the pairs in their plan's order."""
    plan = pack_pairs(file.lengths, config.train.seq_len, one_per_row=one_per_row)
    rows = plan.n_rows if rows is None else rows
    sizes = {"batch_size": rows, "seq_len": config.train.seq_len, "seed": 0, "shuffle": False}
    return Batches(file, plan, **sizes, pairs=plan.most_pairs)
