"""Rules that turn rows in other forms, or with small mistakes, into the formats of SFT and DPO.

Each rule has one meaning only; what would need a guess is left alone, and reading the row says what is wrong with it.
"""

from collections.abc import Callable, Iterator

from mixtral_jax.data.records import Stage

BOM = b"\xef\xbb\xbf"
RULES = {
    "bom": "a byte order mark before a line is taken away",
    "sharegpt": "ShareGPT's names: conversations -> messages (dpo: prompt), from and value -> role and content, a system "
    "prompt beside them becomes the first message, one message instead of a list becomes a list of it",
    "role": "roles by other names: human, prompter -> user; gpt, bot, model, chatgpt -> assistant; in lower case, no spaces",
    "weight": "the weight of a message that is no answer is taken away",
    "empty_message": "an empty system prompt is left out, an empty question or answer together with its other half (sft)",
    "leading_answer": "answers before the first question are left out (sft)",
    "trailing_question": "what follows the last answer is left out (sft)",
}
ROLES = {"human": "user", "prompter": "user"} | dict.fromkeys(("gpt", "bot", "model", "chatgpt"), "assistant")
LISTS = ("messages", "prompt", "completion", "chosen", "rejected")


def mend(record: dict, stage: Stage) -> tuple[dict, list[str]]:
    """Applies the rules to a record.

    Args:
        record: the row; it is not changed.
        stage: the stage that is to read it.

    Returns:
        The record, and the names of the rules that changed it, in the order of RULES.
    """
    applied = []
    for rule, change in _CHANGES.items():
        changed = change(record, stage)
        if changed != record:
            record, applied = changed, [*applied, rule]
    return record, applied


def _sharegpt(record: dict, stage: Stage) -> dict:
    record = dict(record)
    for key in ("conversations", "conversation"):
        into = "messages" if stage == "sft" else "prompt"
        if isinstance(record.get(key), list) and record.get(into) is None:
            messages = [_renamed(message) for message in record.pop(key)]
            system = record.get("system")
            if isinstance(system, str) and not any(_role(message) == "system" for message in messages):
                del record["system"]
                messages = [{"role": "system", "content": system}, *messages] if system else messages
            record[into] = messages
    if stage == "dpo":
        for key in ("chosen", "rejected"):
            if isinstance(record.get(key), dict):
                record[key] = [record[key]]
    return _each_message(record, _renamed)


def _renamed(message):
    """A message with ShareGPT's keys as one with ours; in tables a message may have all four, two of them null."""
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    theirs = {"role": message["from"], "content": message["value"]}
    ours = {key: message[key] for key in ("role", "content") if key in message}
    if all(value is None for value in ours.values()):
        return theirs | rest
    return ours | rest if theirs == {"role": None, "content": None} else message


def _known_role(message):
    role = _role(message)
    if role is None:
        return message
    plain = role.strip().lower()
    return message | {"role": ROLES.get(plain, plain)}


def _without_weight(message):
    no_answer = _role(message) in ("system", "user")
    return {key: value for key, value in message.items() if key != "weight"} if no_answer else message


def _without_empty(record: dict, stage: Stage) -> dict:
    return _conversation(record, stage, _full)


def _full(messages: list) -> list:
    """The messages that say something; of an exchange with nothing but empty questions or answers neither half."""
    kept = []
    for exchange in _exchanges(messages):
        halves = ([message for message in exchange if _role(message) == role] for role in ("user", "assistant"))
        whole = not any(half and all(map(_is_empty, half)) for half in halves)
        kept += [m for m in exchange if not _is_empty(m) and (whole or _role(m) == "system")]
    return kept


def _exchanges(messages: list) -> Iterator[list]:
    """Cuts a conversation after each run of answers."""
    exchange = []
    for message in messages:
        if exchange and _role(exchange[-1]) == "assistant" != _role(message):
            yield exchange
            exchange = []
        exchange.append(message)
    yield exchange


def _after_question(record: dict, stage: Stage) -> dict:
    def cut(messages: list) -> list:
        roles = [_role(message) for message in messages]
        first = roles.index("user") if "user" in roles else 0
        return [message for i, message in enumerate(messages) if i > first or roles[i] != "assistant"]

    return _conversation(record, stage, cut)


def _to_last_answer(record: dict, stage: Stage) -> dict:
    def cut(messages: list) -> list:
        answers = [i for i, message in enumerate(messages) if _role(message) == "assistant"]
        return messages[: answers[-1] + 1] if answers else messages

    return _conversation(record, stage, cut)


def _conversation(record: dict, stage: Stage, change: Callable[[list], list]) -> dict:
    """Changes the messages of a conversation of SFT: all its roles and contents must be strings or None."""
    messages = record.get("messages")
    if stage != "sft" or not isinstance(messages, list) or not all(map(_is_plain, messages)):
        return record
    return record | {"messages": change(messages)}


def _each_message(record: dict, change: Callable) -> dict:
    lists = {key: record[key] for key in LISTS if isinstance(record.get(key), list)}
    return record | {key: [change(message) for message in messages] for key, messages in lists.items()}


def _is_plain(message) -> bool:
    return _role(message) is not None and "content" in message and isinstance(message["content"], str | None)


def _is_empty(message: dict) -> bool:
    return not (message["content"] or "").strip() and not (message.get("tool_calls") or message.get("function_call"))


def _role(message) -> str | None:
    role = message.get("role") if isinstance(message, dict) else None
    return role if isinstance(role, str) else None


_CHANGES = {
    "sharegpt": _sharegpt,
    "role": lambda record, stage: _each_message(record, _known_role),
    "weight": lambda record, stage: _each_message(record, _without_weight),
    "empty_message": _without_empty,
    "leading_answer": _after_question,
    "trailing_question": _to_last_answer,
}
