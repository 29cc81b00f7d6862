"""Unigram and bigram baselines in bits per byte: what a language model has to beat.

Counted on training tokens, scored on held-out tokens. The smoothing is tuned on the very text it is scored on, which
favours the baselines: a model that beats them beats the best they could do.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

_COARSE = 33  # points of a search grid, before it is refined around the best


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sparse n-gram counts over documents; V is the vocabulary, U the number of distinct bigrams."""

    unigram_V: np.ndarray  # int64, how often each token is a target: any token of a document but its first
    context_V: np.ndarray  # int64, how often each token is followed by another
    key_U: np.ndarray  # int64, sorted: v * V + w of a bigram "v w"
    bigram_U: np.ndarray  # int64, how often it occurs

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.unigram_V)


@dataclasses.dataclass(frozen=True)
class NgramResult:
    """The baselines' scores with the smoothing that reached them."""

    unigram_bits_per_byte: float
    bigram_bits_per_byte: float
    interpolation: str  # the bigram's weight with its tuned value, for people
    unigram_alpha: float


def count(tokens, offsets, vocab_size: int) -> Counts:
    """Counts targets and bigrams; a bigram never crosses from one document into the next.

    Args:
        tokens: int[n], documents one after another, each [BOS ... EOS].
        offsets: int[docs + 1], document i is tokens[offsets[i]:offsets[i + 1]].
        vocab_size: V.

    Raises:
        ValueError: offsets that do not divide the tokens, or a token outside 0..V-1.
    """
    previous, following = _pairs(tokens, offsets, vocab_size)
    key_U, bigram_U = np.unique(previous * vocab_size + following, return_counts=True)
    return Counts(
        unigram_V=np.bincount(following, minlength=vocab_size).astype(np.int64),
        context_V=np.bincount(previous, minlength=vocab_size).astype(np.int64),
        key_U=key_U,
        bigram_U=bigram_U.astype(np.int64),
    )


def score(counts: Counts, tokens, offsets, total_bytes: int) -> NgramResult:
    """Scores held-out text: bits per byte = sum of -log2 p over the targets / total_bytes.

    The unigram is add-alpha: p(w) = (c(w) + alpha) / (sum c + alpha V). The bigram is interpolated with it:
    p(w|v) = lam(v) c(v, w) / c(v) + (1 - lam(v)) p(w), and lam(v) = 0 where v was never seen. Of a constant lam, of
    lam(v) = c(v) / (c(v) + kappa) and of c(v) / (c(v) + kappa t(v)), t(v) the number of different tokens seen after v
    (Witten and Bell, 1991), the one that scores best is taken.

    Args:
        counts: of the training text.
        tokens, offsets: the held-out text, as for count().
        total_bytes: its length in bytes (UTF-8), over which the bits are spread.

    Raises:
        ValueError: nothing to score, or tokens and offsets that count() would refuse too.
    """
    held = count(tokens, offsets, counts.vocab_size)
    if total_bytes <= 0 or not len(held.key_U):
        raise ValueError(
            f"held-out text of {total_bytes} bytes with {held.bigram_U.sum()} tokens to predict; both must be positive"
        )

    def unigram_bits(alpha: float) -> float:
        return _bits(held.unigram_V, unigram(counts, alpha))

    alpha, unigram_best = _minimise(unigram_bits, 1e-6, 1e4)
    previous, following = np.divmod(held.key_U, counts.vocab_size)
    p_follow = unigram(counts, alpha)[following]
    p_pair = _relative_frequency(counts, held.key_U)
    best = (math.inf, "")
    for formula, weight_V, low, high in _weights(counts):

        def bigram_bits(value: float, weight_V=weight_V) -> float:
            lam = weight_V(value)[previous]
            return _bits(held.bigram_U, lam * p_pair + (1 - lam) * p_follow)

        value, bits = _minimise(bigram_bits, low, high)
        best = min(best, (bits, formula.format(value)))
    return NgramResult(unigram_best / total_bytes, best[0] / total_bytes, best[1], alpha)


def unigram(counts: Counts, alpha: float) -> np.ndarray:
    """Returns p(w) for all w, float64[V]; sums to 1."""
    total = counts.unigram_V.sum() + alpha * counts.vocab_size
    return (counts.unigram_V + alpha) / total


def _weights(counts: Counts) -> list[tuple[str, Callable[[float], np.ndarray], float, float]]:
    """The forms of lam(v) that compete: (formula, function of the tuned value -> float64[V], its lowest, its highest)."""
    c_V = counts.context_V.astype(np.float64)
    t_V = np.bincount(counts.key_U // counts.vocab_size, minlength=counts.vocab_size).astype(np.float64)
    seen_V = c_V > 0
    return [
        ("lam = {:.4f}", lambda lam: lam * seen_V, 1e-3, 0.9999),
        ("lam = c(v) / (c(v) + {:.4g})", lambda kappa: c_V / (c_V + kappa), 1e-3, 1e6),
        ("lam = c(v) / (c(v) + {:.4g} t(v))", lambda kappa: c_V / np.maximum(c_V + kappa * t_V, 1e-300), 1e-4, 1e4),
    ]


def _pairs(tokens, offsets, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (previous token, target) for every target, int64 each."""
    tokens, offsets = np.asarray(tokens), np.asarray(offsets, np.int64)
    n = len(tokens)
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != n or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"offsets must rise from 0 to the number of tokens, {n}; they are {offsets[:3]} ... {offsets[-3:]}"
        )
    if n and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(f"tokens lie in {tokens.min()}..{tokens.max()}, outside the vocabulary 0..{vocab_size - 1}")
    is_target = np.ones(n, bool)
    starts = offsets[:-1]
    is_target[starts[starts < n]] = False  # empty documents at the end start past it
    following = tokens[is_target].astype(np.int64)
    previous = tokens[:-1][is_target[1:]].astype(np.int64)
    return previous, following


def _relative_frequency(counts: Counts, key_H: np.ndarray) -> np.ndarray:
    """Returns c(v, w) / c(v) of the given bigrams; 0 where v was never seen."""
    place = np.searchsorted(counts.key_U, key_H)
    inside = place < len(counts.key_U)
    found = np.zeros(len(key_H), bool)
    found[inside] = counts.key_U[place[inside]] == key_H[inside]
    pair = np.zeros(len(key_H), np.float64)
    pair[found] = counts.bigram_U[place[found]]
    return pair / np.maximum(counts.context_V[key_H // counts.vocab_size], 1)


def _bits(times: np.ndarray, p: np.ndarray) -> float:
    """Sum of -log2 p over events that happen so many times; infinite if an impossible one happens."""
    p = p[times > 0]
    return math.inf if (p <= 0).any() else float(-(times[times > 0] * np.log2(p)).sum())


def _minimise(f: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """Returns (x, f(x)) of the least f on a grid even in log x, refined three times around its best point."""
    for _ in range(4):
        grid = np.geomspace(low, high, _COARSE)
        values = [f(x) for x in grid]
        i = int(np.argmin(values))
        low, high = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
    return float(grid[i]), values[i]
