"""From tokens to text, piece by piece: no broken characters, no lost spaces, and stop strings that cross tokens."""

from collections.abc import Sequence

from mixtral_jax.data.tokenizer import Tokenizer

# Tokens before the new ones that decoding sees. A character has at most 4 bytes, so 8 tokens hold any that is cut.
WINDOW = 8
BROKEN = "\ufffd"  # what a tokenizer shows for bytes that are no character, or not yet


class TextStream:
    """Turns one row's tokens into text that is final: once a piece is out it never changes."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stop: Sequence[str] = ()):
        """`context` is what the model has read; `stop` are strings that end the text and are not part of it."""
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._done = list(context[-WINDOW:])  # tokens whose text is known
        self._pending: list[int] = []  # tokens whose text may still change
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token and returns the text that is final now; often that is empty."""
        self._pending.append(token)
        text = self._decode()
        if text.endswith(BROKEN):
            # Perhaps a character whose other bytes are still to come. Bytes that never become one are let go when a
            # whole character follows, or at the end.
            return ""
        self._settle()
        return self._release(text)

    def finish(self) -> str:
        """Returns the rest."""
        text, self._held = self._release(self._decode()) + self._held, ""
        self._settle()
        return text

    def _decode(self) -> str:
        return self._tokenizer.continuation(self._done, self._pending)

    def _settle(self) -> None:
        self._done = (self._done + self._pending)[-WINDOW:]
        self._pending = []

    def _release(self, text: str) -> str:
        text = self._held + text
        self._held = ""
        if self.stopped:
            return ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How much of the text's end is a beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
