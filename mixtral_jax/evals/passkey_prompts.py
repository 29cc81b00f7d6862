"""Prompts of the passkey evaluation: of an exact length in the tokenizer's own tokens, with a key at a given depth."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mixtral_jax.config import ModelConfig, UserError
from mixtral_jax.data.tokenizer import Tokenizer

TASK = (
    "One important fact is hidden in the long text that follows, and the rest of the text does not matter. Find the fact and "
    "keep it in mind, for you will be asked about it."
)
FILLER = (
    "Rain falls on the hills.",
    "The river runs to the sea.",
    "A boat leaves the harbour.",
    "Somebody waves from the pier.",
    "Then the rain begins again.",
)
LINE = "The pass key is {key}. Remember it: {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"

DIGITS = 5  # of every key: numbers of as many digits can be ranked against each other
KEYS = range(10 ** (DIGITS - 1), 10**DIGITS)
OTHERS = 9  # numbers that a key is ranked against
# Tokens that the answer may take: a space and the digits, one token each at most, and two more that show where the number ends.
ROOM = 1 + DIGITS + 2
LONGEST = 32768  # the paper's longest, and of the default


class Trial(NamedTuple):
    """One prompt and its answer."""

    length: int
    depth: float
    number: int
    key: str
    others: tuple[str, ...]
    context: list[int]  # as the model reads it
    seeable: bool  # the last mention of the key is there, and what it says can reach the answer

    @property
    def name(self) -> str:
        return f"{cell_name(self.length, self.depth)}/{self.number}"


class Grid(NamedTuple):
    """What is asked, and how far the model sees."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int  # of each cell
    seed: int
    limit: int  # tokens that the model can read, its answer included
    reach: float  # positions back that anything can come from


def cell_name(length: int, depth: float) -> str:
    """The name of a cell in results.json."""
    return f"{length}/{depth:g}"


def reach(model: ModelConfig) -> float:
    """How many positions back a token's influence can come from.

    A layer of a sliding window carries it window - 1 positions on, and L layers L times as far; without a window there is no limit.
    """
    return model.num_layers * (model.sliding_window - 1) if model.sliding_window else math.inf


def default_lengths(tokenizer: Tokenizer, limit: int) -> tuple[int, ...]:
    """Doubling up to the model's limit or LONGEST, from a sixteenth of it or the first that holds a little filler.

    A model too short for any gets the one length that it would need: its prompts are cut.
    """
    # Keys take other numbers of tokens where digits may share one: two mentions of DIGITS tokens are the most.
    needed = len(_read(tokenizer, _text("9" * DIGITS, 0, len(FILLER), 0))) + ROOM + 2 * DIGITS
    top = min(limit, LONGEST)
    lengths = [top >> halvings for halvings in range(4, -1, -1)]
    return tuple(length for length in lengths if length >= needed) or (needed,)


def trials(tokenizer: Tokenizer, grid: Grid, length: int) -> list[Trial]:
    """All trials of a length; each depends on the seed, the length, its depth and its number alone.

    Raises:
        UserError: the length is too short for the frame.
    """
    return [_trial(tokenizer, grid, length, depth, number) for depth in grid.depths for number in range(grid.trials)]


def refuse_short(tokenizer: Tokenizer, grid: Grid) -> None:
    """Refuses what `trials` would, without making the prompts: their frames are enough, and no model is needed.

    Raises:
        UserError: see `trials`.
    """
    for length in grid.lengths:
        for depth in grid.depths:
            for number in range(grid.trials):
                (key, *_), first = _drawn(grid, length, depth, number)
                _left(tokenizer, length, _text(key, 0, 0, first))


def _drawn(grid: Grid, length: int, depth: float, number: int) -> tuple[list[str], int]:
    """What chance decides of a trial: its key, then the others, and the number of the first sentence."""
    rng = np.random.default_rng([grid.seed, length, round(depth * 1e9), number])
    keys = [str(KEYS[i]) for i in rng.choice(len(KEYS), 1 + OTHERS, replace=False)]
    return keys, int(rng.integers(len(FILLER)))


def _trial(tokenizer: Tokenizer, grid: Grid, length: int, depth: float, number: int) -> Trial:
    (key, *others), first = _drawn(grid, length, depth, number)

    def text(count: int) -> str:
        before = round(depth * count)
        return _text(key, before, count - before, first)

    prompt = text(_sentences(tokenizer, text, length))
    context = _read(tokenizer, prompt)
    # Where the last mention of the key begins: at the first digit's token, which the space before it may be a part of.
    head = _read(tokenizer, prompt[: prompt.rindex(key)])
    at = len(head) if context[: len(head)] == head else len(head) - 1
    excess = len(context) + ROOM - grid.limit
    if excess > 0:  # cut from the left, behind BOS
        context, at = context[:1] + context[1 + excess :], at - excess
    seeable = at >= 1 and len(context) - 1 - at <= grid.reach
    return Trial(length, depth, number, key, tuple(others), context, seeable)


def _sentences(tokenizer: Tokenizer, text: Callable[[int], str], length: int) -> int:
    """The most sentences of filler with which a prompt and its answer have at most so many tokens."""

    def spare(count: int) -> int:
        return length - ROOM - len(_read(tokenizer, text(count)))

    count = int(_left(tokenizer, length, text(0)) / _per_sentence(tokenizer))
    while spare(count) < 0:
        count -= 1
    while spare(count + 1) >= 0:
        count += 1
    return count


def _left(tokenizer: Tokenizer, length: int, frame: str) -> int:
    """The tokens that a prompt without filler and its answer leave of a length."""
    left = length - ROOM - len(_read(tokenizer, frame))
    if left < 0:
        raise UserError(
            f"--passkey_lengths: {length} tokens cannot hold a prompt without any filler, which has {length - left} tokens of "
            f"{tokenizer.name} with the {ROOM} for the answer; give lengths of at least {length - left}"
        )
    return left


@functools.lru_cache(maxsize=8)
def _per_sentence(tokenizer: Tokenizer) -> float:
    """Tokens of a sentence of filler among others, on average."""
    short, long = (len(tokenizer.encode(" ".join(FILLER * cycles))) for cycles in (2, 6))
    return (long - short) / (4 * len(FILLER))


def _read(tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt as the model reads it: BOS and the whole text encoded at once."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def _text(key: str, before: int, after: int, first: int) -> str:
    """The prompt with so many sentences of filler before and after the key; `first` is the number of the first sentence."""
    sentences = [FILLER[(first + i) % len(FILLER)] for i in range(before + after)]
    parts = [TASK, " ".join(sentences[:before]), LINE.format(key=key), " ".join(sentences[before:]), QUESTION]
    return "\n".join(part for part in parts if part)


def answer_tokens(tokenizer: Tokenizer, number: str) -> list[int]:
    """The ids of a number as the prompt's next word."""
    before, whole = tokenizer.encode(QUESTION), tokenizer.encode(f"{QUESTION} {number}")
    if whole[: len(before)] == before:
        return whole[len(before) :]
    # A tokenizer whose pieces cross words spells the two otherwise than one after the other.
    return tokenizer.encode(f" {number}")
