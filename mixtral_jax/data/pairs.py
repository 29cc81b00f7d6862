"""Records of DPO, in the formats of TRL, as pairs of conversations: the same prompt with a chosen and a rejected answer.

    {"prompt": ..., "chosen": ..., "rejected": ...}     strings: a question and two answers; or lists of messages
    {"prompt": string, "chosen": [...], "rejected": [...]}     of messages: answers, or conversations with the prompt in
    {"chosen": ..., "rejected": ...}                    the prompt is what both begin with

Two strings are cut where they differ, and before the space there if there is one, as TRL does; two lists of messages
before the first answer that differs.
"""

from typing import NamedTuple

from mixtral_jax.config import UserError
from mixtral_jax.data.bad_rows import Unreadable
from mixtral_jax.data.chat import Message, check_order
from mixtral_jax.data.conversations import (
    Dropped,
    answered,
    as_answer,
    as_question,
    describe_keys,
    is_trained,
    read_messages,
    refuse_tools,
)


class Pair(NamedTuple):
    """Two conversations that end with an answer, and the prompt with which both begin; its answers have weight 0 there."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def parse_pair(record: dict) -> Pair | Dropped | Unreadable:
    """Reads a record of DPO.

    Args:
        record: the row; a key whose value is null counts as missing.

    Returns:
        The pair; or why the record is left out: by rule, or as one that cannot be read.
    """
    try:
        given = {key: value for key, value in record.items() if value is not None}
        refuse_tools(given)
        for key in ("chosen", "rejected"):
            if key not in given:
                raise UserError(_no_format(record, key))
        kinds = {type(given[key]) for key in ("chosen", "rejected")}
        if kinds == {str}:
            prompt, chosen, rejected = _strings(given)
        elif kinds == {list}:
            prompt, chosen, rejected = _messages(given)
        else:
            said = " and ".join(type(given[key]).__name__ for key in ("chosen", "rejected"))
            raise UserError(f"'chosen' and 'rejected' are of types {said}; both must be strings, or lists of messages")
        return _checked(prompt, chosen, rejected)
    except UserError as error:
        return Unreadable(str(error))


Parts = tuple[list[Message], list[Message], list[Message]]  # prompt, chosen, rejected


def _strings(given: dict) -> Parts:
    chosen, rejected = given["chosen"], given["rejected"]
    if "prompt" not in given and chosen != rejected:
        at = _common(chosen, rejected)
        if at and chosen[at] != rejected[at] and chosen[at - 1] == " ":
            at -= 1
        if not at:
            raise UserError("no key 'prompt', and 'chosen' and 'rejected' do not begin alike; give a prompt")
        prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
    else:
        prompt = given.get("prompt", "")
        if not isinstance(prompt, str):
            raise UserError(
                f"'prompt' is of type {type(prompt).__name__} and 'chosen' of type str; all must be strings, or lists of messages"
            )
    return as_question(prompt, "prompt"), as_answer(chosen, "chosen"), as_answer(rejected, "rejected")


def _messages(given: dict) -> Parts:
    chosen, rejected = (read_messages(given[key], key) for key in ("chosen", "rejected"))
    if chosen == rejected:  # identical, whatever the prompt
        return [], chosen, rejected
    if "prompt" not in given:
        return _cut(chosen, rejected)
    prompt = given["prompt"]
    said = as_question(prompt, "prompt") if isinstance(prompt, str) else read_messages(prompt, "prompt")
    if all(m[0]["role"] == "assistant" for m in (chosen, rejected) if m):
        return said, chosen, rejected
    common, chosen, rejected = _cut(chosen, rejected)
    if common[: len(said)] != said and not (isinstance(prompt, str) and said[0] in common):
        raise UserError(
            "'chosen' and 'rejected' are whole conversations, and 'prompt' is not in what they have in common; take the key away"
        )
    return common, chosen, rejected


def _cut(chosen: list[Message], rejected: list[Message]) -> Parts:
    """Cuts two conversations before the first answer that differs, so that both parts are whole messages."""
    at = _common(chosen, rejected)
    while at and not (chosen[at]["role"] == rejected[at]["role"] == "assistant" != chosen[at - 1]["role"]):
        at -= 1
    if not at:
        raise UserError("'chosen' and 'rejected' do not begin with the same question; a pair has one prompt")
    return chosen[:at], chosen[at:], rejected[at:]


def _common(a, b) -> int:
    """The length of what both begin with, so that something is left of each."""
    most = max(min(len(a), len(b)) - 1, 0)
    return next((i for i in range(most) if a[i] != b[i]), most)


def _checked(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Pair | Dropped:
    if not any(m["content"] for m in (*chosen, *rejected)):
        return Dropped("empty")
    if chosen == rejected:
        return Dropped("identical")
    for completion in (chosen, rejected):
        if not any(map(is_trained, completion)):
            return Dropped("no_trained_token")
    for key, completion in (("chosen", chosen), ("rejected", rejected)):
        if completion[0]["role"] != "assistant":
            raise UserError(f"{key}[0].role is {completion[0]['role']!r}; after a prompt comes an answer")
    pair = Pair(prompt, answered(prompt, chosen), answered(prompt, rejected))
    for key, messages in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        check_order(messages, last="assistant", key=f"prompt + {key}")
    return pair


def _no_format(record: dict, key: str) -> str:
    if "messages" in record or "completion" in record:
        return (
            f"no key {key!r}, and it is a conversation; set train.stage=sft, or give 'prompt', 'chosen' and 'rejected'"
        )
    has = describe_keys(record, ("prompt", "chosen", "rejected"))
    return f"no key {key!r}; it has {has}; give 'prompt', 'chosen' and 'rejected'"
