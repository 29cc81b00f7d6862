"""Records of SFT, in the formats of TRL and mistral-finetune, as conversations to train on.

{"messages": [{"role": ..., "content": ..., "weight": ...}, ...]}     weight: of an answer, 0 leaves it out
{"prompt": ..., "completion": ...}         two strings, a question and its answer; or two lists of messages
{"text": ...}                              plain text, trained whole; the key is data.text_key
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixtral_jax.config import UserError
from mixtral_jax.data.bad_rows import Unreadable, check_text
from mixtral_jax.data.chat import Message, check_order, joined

MOST_WEIGHT = float(np.finfo(np.float32).max)


class Dropped(NamedTuple):
    """A record that is left out by a rule, which is no mistake: "empty", "no_trained_token" or "identical"."""

    rule: str


def parse_conversation(record: dict, text_key: str) -> list[Message] | str | Dropped | Unreadable:
    """Reads a record of SFT.

    Args:
        record: the row; a key whose value is null counts as missing.
        text_key: the key of plain text.

    Returns:
        A conversation that ends with an answer and has a trained one, each message with its role, content and, where
        it was given, weight; or a plain text; or why the record is left out: by rule, or as one that cannot be read.
    """
    try:
        given = {key: value for key, value in record.items() if value is not None}
        refuse_tools(given)
        if "messages" in given:
            return _trained(read_messages(given["messages"], "messages"), "messages")
        if "prompt" in given or "completion" in given:
            return _prompt_and_completion(given)
        if text_key not in given:
            raise UserError(_no_format(record, text_key))
        text = check_text(given[text_key], text_key)
        return text or Dropped("empty")
    except UserError as error:
        return Unreadable(str(error))


def before_answers(messages: Sequence[Message]) -> Sequence[Message]:
    """All that is said before a conversation's first trained answer."""
    return messages[: next(i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0)]


def prompt_text(prompt: Sequence[Message]) -> str:
    """A prompt as one text, which decides the split: equal for prompts that mistral-common has the same ids for."""
    system = joined(m for m in prompt if m["role"] == "system")
    groups = itertools.groupby(prompt, key=lambda m: m["role"])
    said = ((role, joined(group)) for role, group in groups if role != "system")
    return "\0".join([system, *(f"{role}\0{text}" for role, text in said)])


def read_messages(value, key: str) -> list[Message]:
    """Reads a list of messages; the order of the roles is not checked here.

    Raises:
        UserError: it is no such list; the reason names the message.
    """
    if not isinstance(value, list):
        raise UserError(f"{key} is of type {type(value).__name__}; it must be a list of messages")
    return [_message(one, f"{key}[{i}]") for i, one in enumerate(value)]


def is_trained(message: Message) -> bool:
    """Whether there is an answer in it to train on."""
    return message["role"] == "assistant" and message.get("weight") != 0 and bool(message["content"].strip())


def refuse_tools(given: dict) -> None:
    """Refuses a record that defines tools, which would be lost.

    Raises:
        UserError: there are some.
    """
    if given.get("tools"):
        raise UserError("it has 'tools', which are not supported; leave the row out, or take the key away")


def _message(value, key: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{key} is of type {type(value).__name__}; it must be an object with role and content")
    for name in ("role", "content"):
        if name not in value:
            raise UserError(f"{key} has no {name}; it has {', '.join(map(repr, value)) or 'nothing'}")
    for name in ("tool_calls", "function_call"):
        if value.get(name):
            raise UserError(f"{key}.{name}: calls of tools are not supported; leave the row out")
    role = value["role"]
    if role not in ("system", "user", "assistant"):
        raise UserError(f"{key}.role is {role!r:.60}; it must be system, user or assistant")
    message = {"role": role, "content": _content(value["content"], f"{key}.content")}
    weight = value.get("weight")
    if weight is not None:
        message["weight"] = _weight(weight, role, f"{key}.weight")
    return message


def _content(value, key: str) -> str:
    """A text, or parts of text, which mistral-common joins with an empty line between them."""
    if not isinstance(value, list):
        return _text(value, key)
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part, dict):
            raise UserError(f'{key}[{i}] is of type {kind!r:.60}; only {{"type": "text", "text": ...}} is supported')
        texts.append(_text(part.get("text"), f"{key}[{i}].text"))
    return "\n\n".join(filter(None, texts))


def _text(value, key: str) -> str:
    text = check_text(value, key)
    if isinstance(text, Unreadable):
        raise UserError(text.reason)
    return text


def _weight(value, role: str, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key} is of type {type(value).__name__}; it must be a number of at least 0")
    if not 0 <= value <= MOST_WEIGHT:  # nor NaN
        raise UserError(f"{key} is {value}; it must be a finite number of at least 0")
    weight = float(np.float32(value))  # as it is stored: what rounds to 0 there trains nothing
    if weight and role != "assistant":
        raise UserError(f"{key} is {value} of a message of the {role}; only answers are trained, take it away")
    return weight


def _prompt_and_completion(given: dict) -> list[Message] | Dropped:
    for key, other in (("prompt", "completion"), ("completion", "prompt")):
        if key not in given:
            raise UserError(f"it has {other!r} but no {key!r}; give both, or 'messages'")
    prompt, completion = given["prompt"], given["completion"]
    if isinstance(prompt, str) != isinstance(completion, str):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise UserError(f"'prompt' and 'completion' are of types {kinds}; both must be strings, or lists of messages")
    if isinstance(prompt, str):
        prompt, completion = as_question(prompt, "prompt"), as_answer(completion, "completion")
    else:
        prompt, completion = read_messages(prompt, "prompt"), read_messages(completion, "completion")
        if completion and completion[0]["role"] != "assistant":
            raise UserError(f"completion[0].role is {completion[0]['role']!r}; a completion begins with an answer")
    return _trained(answered(prompt, completion), "prompt + completion")


def as_question(text, key: str) -> list[Message]:
    """A string as a message of the user's."""
    return [{"role": "user", "content": _text(text, key)}]


def as_answer(text, key: str) -> list[Message]:
    """A string as an answer."""
    return [{"role": "assistant", "content": _text(text, key)}]


def answered(prompt: Sequence[Message], completion: Sequence[Message]) -> list[Message]:
    """A prompt, of which nothing is trained, and what is said after it.

    Raises:
        UserError: the prompt ends with an answer, which would be one with the next.
    """
    if prompt and prompt[-1]["role"] == "assistant":
        raise UserError("prompt ends with an answer; it must end with what is answered")
    return [m | {"weight": 0.0} if m["role"] == "assistant" else m for m in prompt] + list(completion)


def _trained(messages: list[Message], key: str) -> list[Message] | Dropped:
    if not any(m["content"] for m in messages):
        return Dropped("empty")
    if any(m["role"] == "assistant" for m in messages) and not any(map(is_trained, messages)):
        return Dropped("no_trained_token")
    check_order(messages, last="assistant", key=key)
    return messages


def _no_format(record: dict, text_key: str) -> str:
    if "chosen" in record and "rejected" in record:
        return "it has 'chosen' and 'rejected', a pair; set train.stage=dpo, or give 'messages'"
    has = describe_keys(record, ("messages", "prompt", "completion", text_key))
    return f"no key 'messages', 'prompt' and 'completion', or {text_key!r} (data.text_key); it has {has}"


def describe_keys(record: dict, looked_for: Sequence[str]) -> str:
    """Lists a record's keys; of the other columns of a table nobody knows the values."""
    said = (f"{key!r}{' (null)' if record[key] is None and key in looked_for else ''}" for key in record)
    return ", ".join(said) or "none"
