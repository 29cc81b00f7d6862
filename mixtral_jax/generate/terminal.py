"""What a person sees: text on stdout as it is made, everything else on stderr, and the conversation's loop."""

import contextlib
import re
import sys
import time
from collections.abc import Generator, Iterator, Sequence

from mixtral_jax.config import UserError
from mixtral_jax.generate.chat import Message, reply
from mixtral_jax.generate.engine import Continuation
from mixtral_jax.progress import printable


def say(text: str) -> None:
    """Prints to stderr: stdout is for the text alone."""
    print(text, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Prints text as it is; to a terminal, which would obey them, without control characters."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def show(pieces: Generator[tuple[int, str], None, list[Continuation]], heads: Sequence[str]) -> None:
    """Streams one text as it comes; of several, the first one streams and the others follow whole.

    Args:
        pieces: from `stream`.
        heads: what is written before each continuation: its prompt, or nothing.
    """
    began, times = time.perf_counter(), []  # a time for each token
    try:
        while True:
            row, piece = next(pieces)
            if not times:
                write(heads[0])
            times.append(time.perf_counter())
            if row == 0:
                write(piece)
    except StopIteration as end:
        done = end.value
    write("\n")
    for head, continuation in list(zip(heads, done, strict=True))[1:]:
        write(f"{'-' * 40}\n{head}{continuation.text}\n")
    reasons = ", ".join(sorted({continuation.reason for continuation in done}))
    say(f"{len(times)} tokens, ended by {reasons}; the first after {times[0] - began:.2f} s, compilation included")
    after = len(times) - len(heads)  # all rows have their first token at the same time
    if after > 0:
        rate = after / (times[-1] - times[0])
        say(f"then {rate:,.1f} tokens/s over {len(heads)} row{'s' * (len(heads) > 1)}")


def converse(weights, tokenizer, system: str, **settings) -> None:
    """Reads questions from stdin, line by line, and streams answers, until /quit or the end of the input.

    Args:
        weights, tokenizer: see `stream`.
        system: a system prompt, or "".
        settings: max_tokens, sampling, seed, stop.
    """
    messages = start = [{"role": "system", "content": system}] if system else []
    if sys.stdin.isatty():
        say("/reset begins a new conversation, /quit or Ctrl-D ends; Ctrl-C cuts an answer short")
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            messages = start
            say("a new conversation")
        elif re.fullmatch(r"/\w+", line):
            say(f"there is no {line}; commands are /reset and /quit")
        elif line:
            messages = _turn(weights, tokenizer, [*messages, {"role": "user", "content": line}], settings)


def _turn(weights, tokenizer, messages: list[Message], settings: dict) -> list[Message]:
    """Prints the answer and returns the conversation with it; without the question where nothing was said."""
    text = ""
    try:
        for piece in reply(weights, tokenizer, messages, **settings):
            text += piece
            write(piece)
    except KeyboardInterrupt:
        say("\ncut short")
    except UserError as error:
        say(f"error: {error}")
    write("\n")
    return [*messages, {"role": "assistant", "content": text}] if text else messages[:-1]


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):  # not part of every Python
        import readline  # noqa: F401 (its import gives input() a line editor and a history)
    while True:
        try:
            yield input("> " if sys.stdout.isatty() else "").strip()
        except EOFError:
            return
