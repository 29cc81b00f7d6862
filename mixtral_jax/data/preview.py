"""Batches as text: where documents begin and end, what is trained on, what is padding."""

import itertools
from collections.abc import Iterator

import numpy as np

from mixtral_jax.data.batch import Batch
from mixtral_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer

CYAN, GREEN, RED, GREY, RESET = "\033[36m", "\033[32m", "\033[31m", "\033[90m", "\033[0m"
ANSWERS = ("chosen", "rejected")  # of the documents of a pair
MARKERS = ("[INST]", "[/INST]")  # control tokens of Mistral's instruct formats from v2 on


def preview_lines(batch: Batch, tokenizer: Tokenizer, colour: bool) -> Iterator[str]:
    """Yields the rows of a batch: a legend, then a line for each document's start, its tokens, and the padding.

    In colour, trained tokens are green and tokens that are only read are grey; without, the latter stand in [[ ]]. Of
    pairs each document says which answer it has, and in colour rejected answers are red.
    """
    paint = (lambda code, text: f"{code}{text}{RESET}") if colour else (lambda code, text: text)
    only_read = (lambda text: paint(GREY, text)) if colour else (lambda text: f"[[{text}]]")
    pairs = "pairs_BP" in batch
    trained_on = paint(GREEN, "trained on" if colour else "plain: trained on")
    if pairs and colour:
        trained_on = f"{paint(GREEN, 'chosen')} and {paint(RED, 'rejected')} answers"
    special = _special(tokenizer)
    yield f"{trained_on}, {only_read('only read')}; {' and '.join(special.values())} are single tokens"
    for b, documents in enumerate(batch["documents"]):
        weights_T, segment_ids_T = batch["loss_weights_BT"][b], batch["segment_ids_BT"][b]
        trained, padding = np.count_nonzero(weights_T), np.count_nonzero(segment_ids_T == 0)
        yield paint(CYAN, f"=== row {b + 1}: {trained} trained tokens, {padding} padding")
        for segment, document in enumerate(documents, 1):
            inside = segment_ids_T == segment
            answer = (segment - 1) % 2
            kind = f", {ANSWERS[answer]}" if pairs else ""
            yield paint(CYAN, f"--- {document} ({np.count_nonzero(inside)} positions{kind})")
            ids = [int(batch["tokens_BT"][b][inside][0]), *batch["targets_BT"][b][inside].tolist()]
            text = only_read(_readable(tokenizer, special, ids, 0, 1))
            marks = weights_T[inside] > 0
            cuts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(marks)]  # where trained begins or ends
            for first, last in itertools.pairwise(cuts):
                run = _readable(tokenizer, special, ids, first + 1, last + 1)
                text += paint(RED if pairs and answer else GREEN, run) if marks[first] else only_read(run)
            yield text
        if padding:
            yield paint(GREY, f"... {padding} positions of padding")


def _special(tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens that no text has, and how they are shown."""
    found = {tokenizer.bos_id: "<BOS>", tokenizer.eos_id: "<EOS>"}
    if isinstance(tokenizer, SentencePieceTokenizer):
        found |= {tokenizer.piece_id(marker): marker for marker in MARKERS if tokenizer.is_control(marker)}
    return found


def _readable(tokenizer: Tokenizer, special: dict[int, str], ids: list[int], first: int, last: int) -> str:
    """Decodes ids first to last - 1 of a document, with special tokens made visible."""
    text, begin = "", first
    for i in [*(i for i in range(first, last) if ids[i] in special), last]:
        text += tokenizer.continuation(ids[:begin], ids[begin:i])
        text += special[ids[i]] if i < last else ""
        begin = i + 1
    return text
