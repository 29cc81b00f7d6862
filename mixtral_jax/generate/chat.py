"""Conversations in the format of Mixtral-8x7B-Instruct (Mistral's instruct format v1).

    <s> [INST] question [/INST] answer</s> [INST] question [/INST] ...

The markers are plain text there. Every message is encoded by itself, as it was in training: encoding the whole text at
once would merge tokens across the borders, and a literal "<s>" in a message must not become BOS.
"""

import itertools
from collections.abc import Generator, Mapping, Sequence

from mixtral_jax.config import UserError
from mixtral_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer
from mixtral_jax.generate.engine import Continuation, stream
from mixtral_jax.models.decode import Prepared
from mixtral_jax.models.mixtral import Mixtral

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Turns a conversation whose last message is the user's into what the model continues with its answer.

    System prompts stand before the first question, wherever they were said. Neighbours of one role are one message,
    with an empty line between them. Both as mistral-common has it.

    Raises:
        UserError: an unknown role, an order that is no conversation, an empty answer, or a tokenizer of another format.
    """
    _check(tokenizer, messages)
    system = _joined(m for m in messages if m["role"] == "system")
    ids = [tokenizer.bos_id]
    for role, group in itertools.groupby(messages, key=lambda m: m["role"]):
        text = _joined(group)
        if role == "user":
            if system:
                text, system = f"{system}\n\n{text}", ""
            ids += tokenizer.encode(f"[INST] {text} [/INST]")
        elif role == "assistant":
            ids += [*tokenizer.encode(text), tokenizer.eos_id]
    return ids


def _joined(messages) -> str:
    return "\n\n".join(m["content"] for m in messages if m["content"])


def _check(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.is_control("[INST]"):
        raise UserError(
            f"the tokenizer {tokenizer.name} has [INST] as a token of its own (Mistral's instruct format v2 or later); "
            "chat knows v1 only, Mixtral-8x7B-Instruct's: give the prompt's text in that model's format without --chat"
        )
    roles = [m["role"] for m in messages]
    if unknown := sorted(set(roles) - {"system", "user", "assistant"}):
        raise UserError(f"role {unknown[0]!r}; a message is of system, user or assistant")
    spoken = [role for role in roles if role != "system"]
    if not spoken or spoken[0] != "user" or roles[-1] != "user":
        raise UserError(f"the roles are {', '.join(roles) or 'none'}; a conversation begins and ends with the user")
    if ("assistant", "system") in itertools.pairwise(roles):
        raise UserError("a system prompt follows an answer; it stands before a question")
    if not all(m["content"] for m in messages if m["role"] == "assistant"):
        raise UserError("an answer is empty; leave it out together with its question")


def reply(
    weights: Mixtral | Prepared, tokenizer: Tokenizer, messages: Sequence[Message], *, max_tokens: int, **settings
) -> Generator[str, None, Continuation]:
    """Answers a conversation, yielding the answer as it becomes final; its text is the content of the next message.

    Args:
        weights, tokenizer: see `stream`.
        messages: see `encode_chat`.
        max_tokens: the longest answer; less where the model's max_seq_len leaves less room.
        settings: sampling, seed, stop of `stream`.

    Returns:
        the Continuation (the generator's return value).

    Raises:
        UserError: see `encode_chat`; or the conversation has become too long for the model.
    """
    context = encode_chat(tokenizer, messages)
    pieces = stream(
        weights, tokenizer, [context], max_tokens=room(weights, [context], max_tokens), message=True, **settings
    )
    while True:
        try:
            yield next(pieces)[1]
        except StopIteration as end:
            return end.value[0]


def room(weights: Mixtral | Prepared, contexts: Sequence[Sequence[int]], max_tokens: int) -> int:
    """How long answers to these contexts may be, at most max_tokens.

    Raises:
        UserError: there is no room at all.
    """
    longest, limit = max(map(len, contexts)), weights.config.max_seq_len
    if longest >= limit:
        raise UserError(
            f"the conversation has {longest} tokens and the model's max_seq_len is {limit}; begin anew (/reset)"
        )
    return min(max_tokens, limit - longest)
