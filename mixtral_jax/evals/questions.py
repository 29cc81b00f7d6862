"""Held-out questions and the answers that are given for them, out of conversations as tokens."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixtral_jax.data import TokenFile, encode_chat, is_heldout
from mixtral_jax.data.conversations import prompt_text


class Question(NamedTuple):
    """What models are asked."""

    text: str
    context: list[int]  # the ids that a model continues with its answer
    answer: str | None  # the first trained answer of the data; None where the question is not among the held-out ones
    heldout: bool  # False: it may have been trained on


def chosen_answers(pairs: TokenFile) -> TokenFile:
    """The chosen answer of each pair, as a conversation."""
    documents = range(0, len(pairs.ids), 2)
    spans = [slice(pairs.offsets[i], pairs.offsets[i + 1]) for i in documents]
    tokens, weights = (np.concatenate([array[span] for span in spans]) for array in (pairs.tokens, pairs.weights))
    lengths = pairs.lengths[0::2]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    ids = [pairs.ids[i] for i in documents]
    return dataclasses.replace(
        pairs, tokens=tokens, weights=weights, offsets=offsets, bytes_=pairs.bytes_[0::2], ids=ids
    )


def choose_questions(
    conversations: TokenFile, tokenizer, prompts: Sequence[str], count: int, heldout_fraction: float, longest: int
) -> list[Question]:
    """Chooses what models are asked: the same for the same data.

    Args:
        conversations: the held-out ones.
        tokenizer: theirs.
        prompts: questions that are asked in any case, first.
        count: how many more are taken from the conversations, evenly spread over them.
        heldout_fraction: of the split; it decides on which side a prompt is.
        longest: tokens of a question taken from the conversations, at most.
    """
    places: dict[tuple[int, ...], int] = {}  # each question's first conversation
    for i in range(len(conversations.ids)):
        if context := _context(conversations, i):
            places.setdefault(tuple(context), i)
    found = []
    for prompt in prompts:
        message = {"role": "user", "content": prompt}
        context = encode_chat(tokenizer, [message])
        place = places.pop(tuple(context), None)
        answer = None if place is None else _answer(conversations, place, tokenizer)
        found.append(Question(prompt, context, answer, is_heldout(prompt_text([message]), heldout_fraction)))
    fitting = [(context, place) for context, place in places.items() if len(context) <= longest]
    picked = np.unique(np.linspace(0, len(fitting) - 1, min(count, len(fitting))).round().astype(int))
    for context, place in (fitting[i] for i in picked):
        answer = _answer(conversations, place, tokenizer)
        found.append(Question(_question(context, tokenizer), list(context), answer, True))
    return found


def _trained(conversations: TokenFile, i: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a conversation, and where they are trained."""
    span = slice(conversations.offsets[i], conversations.offsets[i + 1])
    return np.asarray(conversations.tokens[span]), np.asarray(conversations.weights[span]) > 0


def _context(conversations: TokenFile, i: int) -> list[int]:
    """What stands before the first trained answer; nothing of a text without a question."""
    tokens, trained = _trained(conversations, i)
    first = int(trained.argmax())
    return tokens[:first].tolist() if first > 1 else []


def _answer(conversations: TokenFile, i: int, tokenizer) -> str:
    tokens, trained = _trained(conversations, i)
    answer = tokens[trained.argmax() :].tolist()
    return tokenizer.decode(answer[: answer.index(tokenizer.eos_id)])


def _question(context: Sequence[int], tokenizer) -> str:
    """A question as a person would write it; markers that are no text of their own vanish when it is decoded."""
    text = tokenizer.decode(list(context[1:])).strip()
    return text.removeprefix("[INST]").removesuffix("[/INST]").strip()
