"""Answers to conversations: the formats are in data/chat.py."""

from collections.abc import Generator, Sequence

from mixtral_jax.config import UserError
from mixtral_jax.data.chat import Message, encode_chat
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.generate.engine import Continuation, stream
from mixtral_jax.models.decode import Prepared
from mixtral_jax.models.mixtral import Mixtral

__all__ = ["Message", "encode_chat", "reply", "room"]


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
