"""Conversations as token ids, in Mistral's instruct formats; the ids are those of mistral-common.

    v1 (8x7B-Instruct)    <s> [INST] question [/INST] answer</s> [INST] question [/INST] ...
    v3 (8x22B-Instruct)   the same, where [INST] and [/INST] are tokens of their own

In v1 the markers are plain text, part of the question's. Every message is encoded by itself, as it was in training:
encoding the whole text at once would merge tokens across the borders, and a literal "<s>" in a message must not become
BOS. Tokenizers of v2 have v3's ids as long as there are no tools. A tokenizer without such markers speaks v1.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.config import UserError
from mixtral_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer

ROLES = ("system", "user", "assistant")

# {"role": one of ROLES, "content": text}, and of an answer to train on perhaps "weight": a number, by default 1.
Message = Mapping[str, Any]


class Segment(NamedTuple):
    """A text that is encoded by itself, the special tokens round it, and the loss weight of all of them as targets."""

    text: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    weight: float


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Turns a conversation whose last message is the user's into what the model continues with its answer.

    System prompts stand before the first question (v1) or the last one (v3), wherever they were said. Neighbours of one
    role are one message, with an empty line between them. v3 drops the spaces at the end of an answer. All as
    mistral-common has it.

    Raises:
        UserError: an unknown role, an order that is no conversation, an empty answer, or a tokenizer of a later format.
    """
    check_order(messages, last="user")
    return _encode(tokenizer, messages)[0]


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], np.ndarray]:
    """Turns a conversation that ends with an answer into what a model is trained on.

    An answer's tokens and its EOS have the answer's weight, 1 unless it says otherwise; everything else has 0. Answers
    that are neighbours are one message if their weights are equal, else two, each with its EOS. The ids begin with those
    of encode_chat for everything before the last answer.

    Returns:
        The ids, and for each its loss weight as a target: float32 [n].

    Raises:
        UserError: see `encode_chat`.
    """
    check_order(messages, last="assistant")
    return _encode(tokenizer, messages)


def segments(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Segment]:
    """Cuts a conversation that check_order has accepted into the texts to encode.

    Raises:
        UserError: a tokenizer of a later format.
    """
    opening, closing = _markers(tokenizer)
    groups = [(role, weight, list(group)) for (role, weight), group in itertools.groupby(messages, _role_and_weight)]
    system = joined(m for m in messages if m["role"] == "system")
    questions = [i for i, (role, _, _) in enumerate(groups) if role == "user"]
    prompted = questions[-1 if opening else 0]
    found = []
    for i, (role, weight, group) in enumerate(groups):
        text = joined(group)
        if role == "user":
            text = f"{system}\n\n{text}" if system and i == prompted else text
            found.append(Segment(text if opening else f"[INST] {text} [/INST]", opening, closing, 0.0))
        elif role == "assistant":
            text = text.rstrip(" ") if opening else text
            found.append(Segment(text, (), (tokenizer.eos_id,), 1.0 if weight is None else float(weight)))
    return found


def plain_text(tokenizer: Tokenizer, text: str) -> list[Segment]:
    """A text as a document of its own, every token trained."""
    return [Segment(text, (), (tokenizer.eos_id,), 1.0)]


def assemble(
    tokenizer: Tokenizer, found: Sequence[Segment], encoded: Iterable[Sequence[int]]
) -> tuple[list[int], np.ndarray]:
    """Puts segments, each text encoded, behind one BOS: the ids, and their loss weights, float32 [n]."""
    ids, weights, counts = [tokenizer.bos_id], [0.0], [1]
    for segment, one in zip(found, encoded, strict=True):
        ids += (*segment.before, *one, *segment.after)
        weights.append(segment.weight)
        counts.append(len(segment.before) + len(one) + len(segment.after))
    return ids, np.repeat(np.array(weights, np.float32), counts)


def joined(messages: Iterable[Message]) -> str:
    """The text of neighbours, with an empty line between them; empty ones do not count."""
    return "\n\n".join(m["content"] for m in messages if m["content"])


def check_order(messages: Sequence[Message], last: str, key: str = "messages") -> None:
    """Refuses roles that are no conversation, as mistral-common does, and answers before any question.

    Args:
        messages: the conversation.
        last: the role of its last message.
        key: what errors call it.

    Raises:
        UserError: naming the message.
    """
    roles = [m["role"] for m in messages]
    for i, role in enumerate(roles):
        if role not in ROLES:
            raise UserError(f"{key}[{i}].role is {role!r}; a message is of {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        if role == "assistant" and not messages[i]["content"]:
            raise UserError(f"{key}[{i}].content, an answer, is empty; leave it out together with its question")
        if role == "assistant" and "user" not in roles[:i]:
            raise UserError(f"{key}[{i}] is an answer before any question; a conversation begins with the user")
        if role == "system" and i and roles[i - 1] == "assistant":
            raise UserError(f"{key}[{i}], a system prompt, follows an answer; it stands before a question")
    if "user" not in roles or roles[-1] != last:
        said = ", ".join(roles) or "none"
        raise UserError(f"the roles of {key} are {said}; they begin with the user and end with the {last}")


def _encode(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], np.ndarray]:
    found = segments(tokenizer, messages)
    return assemble(tokenizer, found, [tokenizer.encode(segment.text) for segment in found])


def _role_and_weight(message: Message) -> tuple[str, float | None]:
    return message["role"], message.get("weight") if message["role"] == "assistant" else None


def _markers(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of [INST] and [/INST]; nothing where they are plain text."""
    if not (isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.is_control("[INST]")):
        return (), ()
    if tokenizer.is_control("[SYSTEM_PROMPT]"):
        raise UserError(
            f"the tokenizer {tokenizer.name} is of Mistral's instruct format v7 or later, no Mixtral's; use the tokenizer "
            "of Mixtral-8x7B-Instruct (v1) or of Mixtral-8x22B-Instruct (v3)"
        )
    return (tokenizer.piece_id("[INST]"),), (tokenizer.piece_id("[/INST]"),)
