"""From logits to a token: temperature, top-k, top-p, min-p, and random numbers that belong to a row and not to a batch."""

import collections
import dataclasses
import functools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mixtral_jax.config import UserError
from mixtral_jax.sharding import everywhere


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen; the filters apply in this order, as in transformers.

    Raises:
        UserError: a value that means nothing.
    """

    temperature: float = 0.0  # 0 takes the most likely token, and the filters have nothing to do
    top_k: int = 0  # keep the k most likely tokens, and those as likely as the last of them; 0: all
    top_p: float = 1.0  # keep the fewest most likely tokens whose probabilities reach p; 1: all
    min_p: float = 0.0  # keep tokens at least p times as likely as the most likely one; 0: all

    def __post_init__(self):
        for name, ok, must in (
            ("temperature", 0 <= self.temperature < float("inf"), "be 0 (greedy) or positive"),
            ("top_k", self.top_k >= 0, "be 0 (off) or positive"),
            ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]; 1 is off"),
            ("min_p", 0 <= self.min_p <= 1, "lie in [0, 1]; 0 is off"),
        ):
            if not ok:
                raise UserError(f"{name}={getattr(self, name)}; it must {must}")


def filtered(logits_BV, sampling: Sampling):
    """Logits over temperature, -inf where a filter refuses a token; softmax of it is the distribution sampled from.

    Args:
        logits_BV: float32.
        sampling: with a positive temperature.
    """
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        order_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
        prob_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
        # A token stays while those before it have not reached p, so the first one always stays.
        keep_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV < sampling.top_p
        rank_BV = jnp.argsort(order_BV, axis=-1)
        logits_BV = jnp.where(jnp.take_along_axis(keep_BV, rank_BV, axis=-1), logits_BV, -jnp.inf)
    if sampling.min_p > 0:
        floor_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)
    return logits_BV


def largest(logits_BV):
    """int32 [B]: where each row's largest logit is, the first of equals, as jnp.argmax has it (a NaN is the largest).

    As two reductions: XLA:CPU's argmax compares pairs of value and index one by one, and takes three times as long.
    """
    v = logits_BV.shape[-1]
    found_BV = (logits_BV == logits_BV.max(-1, keepdims=True)) | jnp.isnan(logits_BV)
    return jnp.where(found_BV, jnp.arange(v, dtype=jnp.int32)[None], v).min(-1)


@functools.partial(jax.jit, static_argnames=("sampling", "vocab_size"))
def choose(logits_BV, key_B, i, sampling: Sampling, vocab_size: int):
    """Chooses the next token of each row.

    Args:
        logits_BV: float32.
        key_B: each row's key.
        i: int32, number of the token in the continuation; with the row's key it decides the random numbers.
        sampling: static.
        vocab_size: ids from here on (of a vocabulary padded beyond the tokenizer's) are never chosen.

    Returns:
        token_B int32.
    """
    logits_BV = logits_BV[:, :vocab_size]
    if sampling.temperature == 0:
        return everywhere(largest(logits_BV))
    logits_BV = filtered(logits_BV, sampling)
    draw = jax.vmap(lambda key, logits_V: jax.random.categorical(jax.random.fold_in(key, i), logits_V))
    return everywhere(draw(key_B, logits_BV).astype(jnp.int32))


def row_keys(contexts: Sequence[Sequence[int]], seed: int):
    """One key per row, from the seed, the row's own tokens, and its number among equal rows.

    So a prompt gives the same text alone and in any batch, and the same prompt twice in a batch gives two texts.
    """
    seen: collections.Counter = collections.Counter()
    marks = []
    for context in contexts:
        mark = zlib.crc32(np.asarray(context, np.int32).tobytes())
        marks.append((mark, seen[mark]))
        seen[mark] += 1
    prompt_B, number_B = np.asarray(marks, np.uint32).T
    key = jax.random.key(seed)
    return jax.vmap(lambda a, b: jax.random.fold_in(jax.random.fold_in(key, a), b))(prompt_B, number_B)
