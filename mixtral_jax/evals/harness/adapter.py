"""Our model as a language model of lm-evaluation-harness, with the meaning that its `hf` backend gives every request.

A text gets BOS in front. What is too long is cut from the left. A document's rolling log-likelihood is that of disjoint
windows behind BOS; like `hf`, it counts the document's own BOS after that as its first token.
"""

import re
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mixtral_jax.config import UserError
from mixtral_jax.data.chat import check_order, segments
from mixtral_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer
from mixtral_jax.evals.harness.answers import Answers, Writing, sampling_of
from mixtral_jax.evals.scorer import Request

MAX_NEW_TOKENS = 256  # of a generation whose task names no number, as in `hf`

# In a conversation that has become a string, a special token is its id between two characters of private use, and a third
# stands where a message's text begins or ends: each is encoded by itself. No text of a data set has them.
OPEN, CLOSE, BORDER = "\ue0a1", "\ue0a2", "\ue0a3"
_SPECIAL = re.compile(f"{OPEN}([0-9]+){CLOSE}|{BORDER}")


class Model(TemplateLM):
    """Turns the harness's requests into tokens, and the answers back into what it expects."""

    def __init__(self, answers: Answers, tokenizer: Tokenizer, longest: int):
        """Args: answers: computes them; tokenizer: the model's; longest: tokens that the model can read."""
        super().__init__()
        self._answers, self._tokenizer, self._longest = answers, tokenizer, longest

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self._longest

    @property
    def tokenizer_name(self) -> str:
        return f"{self._tokenizer.name}-{self._tokenizer.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "mistral" if chat_template else ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """A text's ids behind BOS (unless add_special_tokens is False); a conversation's are as they are."""
        if OPEN in string:
            return self._conversation_ids(string)
        bos = [] if add_special_tokens is False else [self._tokenizer.bos_id]
        return bos + self._tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in Mistral's instruct format as a string that tok_encode understands.

        Args:
            chat_history: messages with role and content.
            add_generation_prompt: False leaves the last message, an answer's beginning, open to be continued.
        """
        messages = [{"role": each["role"], "content": each["content"]} for each in chat_history]
        check_order(messages, last=messages[-1]["role"] if not add_generation_prompt else "user")
        found = segments(self._tokenizer, messages)
        pieces = [_mark([self._tokenizer.bos_id])]
        for each in found:
            pieces += [_mark(each.before), each.text, _mark(each.after) or BORDER]
        if not add_generation_prompt:
            pieces.pop()
        return "".join(pieces)

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        for request in requests:
            if not request.args[1]:
                raise UserError(
                    f"a question of the task {request.task_name} has an empty answer to score; correct doc_to_choice or "
                    "doc_to_target"
                )
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._longest,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[i] += log_likelihood
        return totals

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        seen: dict[int, int] = {}
        asked = []
        for request in requests:
            number = seen[id(request)] = seen.get(id(request), -1) + 1
            asked.append(self._writing(*request.args, number))
        return self._answers.texts(asked)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **_
    ) -> list[tuple[float, bool]]:
        return self._answers.scores([self._cut(context, continuation) for _, context, continuation in requests])

    def _cut(self, context: list[int], continuation: list[int]) -> Request:
        """Leaves of context and continuation the last longest + 1 tokens; the last of them is scored and not read."""
        if not 0 < len(continuation) <= self._longest:
            raise UserError(
                f"an answer of {len(continuation)} tokens is to be scored; it must have at least 1, and at most the model's "
                f"max_seq_len={self._longest}"
            )
        room = self._longest + 1 - len(continuation)
        return Request(context[-room:], continuation)

    def _writing(self, text: str, settings: dict[str, Any], number: int) -> Writing:
        known = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        stop = handle_stop_sequences(known.pop("until"), eos=self._eos_text)
        count = known.pop("max_gen_toks")
        if count >= self._longest:
            raise UserError(
                f"answers of up to {count} tokens are asked for and the model's max_seq_len is {self._longest}: there is no room "
                "for the question; set max_gen_toks in the task's generation_kwargs"
            )
        sampling = sampling_of(known)
        context = self.tok_encode(text)[-(self._longest - count) :]
        return Writing(tuple(context), count, tuple(stop), sampling, number if sampling[0] else 0)

    @property
    def _eos_text(self) -> str | None:
        """EOS where a model spells it out; it ends a text as well."""
        tokenizer = self._tokenizer
        if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.piece_id("</s>") == tokenizer.eos_id:
            return "</s>"
        return None

    def _conversation_ids(self, string: str) -> list[int]:
        ids, at = [], 0
        for found in _SPECIAL.finditer(string):
            ids += self._text_ids(string[at : found.start()])
            ids += [int(found[1])] if found[1] else []
            at = found.end()
        # What is put after the prompt is the answer's beginning; the harness parts it from the prompt by a space.
        return ids + self._text_ids(string[at:].removeprefix(" "))

    def _text_ids(self, text: str) -> list[int]:
        # An empty message of a tokenizer with a dummy prefix has no token.
        return self._tokenizer.encode(text) if text else []


def readable(text: str, tokenizer: Tokenizer) -> str:
    """A conversation's string for people: special tokens by their names."""
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    if isinstance(tokenizer, SentencePieceTokenizer):
        names |= {tokenizer.piece_id(piece): piece for piece in ("[INST]", "[/INST]") if tokenizer.is_control(piece)}
    return _SPECIAL.sub(lambda found: names.get(int(found[1]), found[1]) if found[1] else "", text)


def _mark(ids: Sequence[int]) -> str:
    return "".join(f"{OPEN}{i}{CLOSE}" for i in ids)
