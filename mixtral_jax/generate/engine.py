"""The loop: prompts in, tokens one step at a time, text out."""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Literal

import jax
import numpy as np

from mixtral_jax.config import ModelConfig, UserError
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.generate.sampling import Sampling, choose, row_keys
from mixtral_jax.generate.text import TextStream
from mixtral_jax.models.decode import Prepared, decode, prefill
from mixtral_jax.models.mixtral import Mixtral
from mixtral_jax.sharding import BATCH, moved, without_context

# Lengths are rounded up to steps of at least this many positions, so that similar ones share one compilation.
STEP = 64


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What one prompt became."""

    text: str  # without the prompt, the stop string and EOS
    tokens: list[int]  # as sampled; those of a stop string and EOS included
    reason: Literal["eos", "stop", "length"]


def steps(
    weights: Mixtral | Prepared,
    contexts: Sequence[Sequence[int]],
    active: np.ndarray,
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    vocab_size: int,
) -> Iterator[np.ndarray]:
    """Samples token after token for a batch of contexts of any lengths.

    Step i + 1 is dispatched before the tokens of step i are fetched, so that the device does not wait for the host.

    Args:
        weights: Mixtral or Prepared, on the current mesh if there is one.
        contexts: token ids of each row, at least one each.
        active: bool, one for each context. The caller clears a row's when it is finished; its tokens then mean nothing.
        max_tokens, sampling, seed: see `stream`.
        vocab_size: ids below this are sampled.

    Yields:
        int32 [number of contexts], max_tokens times.
    """
    n = len(contexts)
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in BATCH]))
    rows = -(-n // shards) * shards
    width = round_up(max(map(len, contexts)))
    tokens_BT, length_B = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, context in enumerate(contexts):
        tokens_BT[row, : len(context)], length_B[row] = context, len(context)
    # Rows that fill up the mesh's shards are empty and never active, so they reach no expert.
    filler = [[]] * (rows - n)
    key_B = row_keys([*contexts, *filler], seed)
    logits_BV, cache = prefill(weights, tokens_BT, length_B, round_up(width + max_tokens))
    token_B = choose(logits_BV, key_B, np.int32(0), sampling, vocab_size)
    for i in range(1, max_tokens):
        before_B = token_B
        active_B = np.concatenate([active, np.zeros(len(filler), bool)])
        logits_BV, cache = decode(weights, cache, token_B, active_B)
        token_B = choose(logits_BV, key_B, np.int32(i), sampling, vocab_size)
        yield np.asarray(before_B)[:n]
    yield np.asarray(token_B)[:n]


def round_up(n: int) -> int:
    """To a multiple of STEP, and of long ones to four lengths for each doubling: at most a quarter more than n."""
    step = max(STEP, 2 ** (n.bit_length() - 3))
    return -(-n // step) * step


def stream(
    weights: Mixtral | Prepared,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    message: bool = False,
) -> Generator[tuple[int, str], None, list[Continuation]]:
    """Continues prompts and yields text as it becomes final.

    Args:
        weights: a Mixtral, or the Prepared weights of models/decode.py:prepare (faster; another copy of the weights). The
            mesh, if any, is the current one (`jax.set_mesh`).
        tokenizer: the run's tokenizer.
        prompts: texts, which get BOS in front, or token ids, which are taken as they are.
        max_tokens: longest continuation.
        sampling: default: greedy.
        seed: of the sampling. A prompt's text depends on it and the prompt, not on the rest of the batch.
        stop: strings that end a text and are not part of it.
        message: the continuation is a text of its own, as a chat's answer is, and not the prompt's next words: of a
            tokenizer that puts a space before every text (Mixtral's) that space is none of it.

    Yields:
        (row, piece), once for every token sampled: the text of prompt number `row` that is final now. It is empty while a
        character is incomplete or a stop string may have begun. A row's pieces concatenate to its final text.

    Returns:
        a Continuation for each prompt (the generator's return value).

    Raises:
        UserError: nothing to do, or a prompt too long for the model.
    """
    contexts = _contexts(weights.config, tokenizer, prompts, max_tokens)
    streams = [TextStream(tokenizer, [] if message else context, stop) for context in contexts]
    tokens: list[list[int]] = [[] for _ in contexts]
    texts, reasons = [""] * len(contexts), ["length"] * len(contexts)
    active = np.ones(len(contexts), bool)
    vocab_size = min(tokenizer.vocab_size, weights.config.vocab_size)
    arguments = dict(max_tokens=max_tokens, sampling=sampling or Sampling(), seed=seed, vocab_size=vocab_size)
    for token_B in steps(weights, contexts, active, **arguments):
        for row in np.flatnonzero(active):
            token = int(token_B[row])
            tokens[row].append(token)
            last = token == tokenizer.eos_id
            piece = streams[row].finish() if last else streams[row].push(token)
            if len(tokens[row]) == max_tokens and not last:
                piece += streams[row].finish()
            if last or streams[row].stopped:
                reasons[row] = "stop" if streams[row].stopped else "eos"
                active[row] = False
            texts[row] += piece
            yield int(row), piece
        if not active.any():
            break
    return [Continuation(*row) for row in zip(texts, tokens, reasons, strict=True)]


def _contexts(config: ModelConfig, tokenizer: Tokenizer, prompts, max_tokens: int) -> list[list[int]]:
    """The prompts' token ids, or a UserError for what cannot be done."""
    contexts = [[tokenizer.bos_id, *tokenizer.encode(p)] if isinstance(p, str) else list(p) for p in prompts]
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}; it must be at least 1")
    if not contexts or not all(contexts):
        raise UserError("there is no prompt, or one without tokens; give at least one token each")
    longest = max(map(len, contexts))
    if longest + max_tokens > config.max_seq_len:
        raise UserError(
            f"a prompt of {longest} tokens plus max_tokens={max_tokens} exceed the model's max_seq_len={config.max_seq_len}; "
            f"shorten the prompt or set max_tokens to at most {max(config.max_seq_len - longest, 0)}"
        )
    return contexts


def generate(weights: Mixtral | Prepared, tokenizer: Tokenizer, prompts, **arguments) -> list[Continuation]:
    """Continues prompts and returns when all are done; arguments as for `stream`."""
    pieces = stream(weights, tokenizer, prompts, **arguments)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def sample(
    model: Mixtral,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    message: bool = False,
) -> list[str]:
    """Continues prompts during training, on the parameters as they are: no second copy of the weights.

    Args:
        model: parameters on any mesh; the mesh, if any, is the current one (`jax.set_mesh`). Over `context` the work is
            not split: one token at a time has no T to split.
        tokenizer: the run's tokenizer.
        prompts: texts, which get BOS in front, or token ids. Of a prompt too long for the model the end is kept.
        max_tokens: length of the continuation; it ends earlier at EOS, or where the model's max_seq_len leaves no room.
        temperature: 0 takes the most likely token.
        seed: of the sampling.
        message: see `stream`.

    Returns:
        The continuations alone.
    """
    mesh = jax.sharding.get_mesh()
    if not mesh.empty and mesh.shape["context"] > 1:
        mesh = without_context(mesh)
        model = moved(model, mesh)
    limit = model.config.max_seq_len
    max_tokens = min(max_tokens, limit - 1)
    contexts = [[tokenizer.bos_id, *tokenizer.encode(p)] if isinstance(p, str) else list(p) for p in prompts]
    contexts = [context[max_tokens - limit :] for context in contexts]
    with jax.transfer_guard("allow"), contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
        settings = {"sampling": Sampling(temperature=temperature), "seed": seed, "message": message}
        return [done.text for done in generate(model, tokenizer, contexts, max_tokens=max_tokens, **settings)]
