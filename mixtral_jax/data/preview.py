"""Batches as text: where documents begin and end, what is trained on, what is padding."""

import itertools
from collections.abc import Iterator

import numpy as np

from mixtral_jax.data.batch import Batch
from mixtral_jax.data.tokenizer import Tokenizer

CYAN, GREEN, GREY, RESET = "\033[36m", "\033[32m", "\033[90m", "\033[0m"


def preview_lines(batch: Batch, tokenizer: Tokenizer, colour: bool) -> Iterator[str]:
    """Yields the rows of a batch: a legend, then a line for each document's start, its tokens, and the padding.

    In colour, trained tokens are green and tokens that are only read are grey; without, the latter stand in [[ ]].
    """
    paint = (lambda code, text: f"{code}{text}{RESET}") if colour else (lambda code, text: text)
    only_read = (lambda text: paint(GREY, text)) if colour else (lambda text: f"[[{text}]]")
    trained_on = paint(GREEN, "trained on" if colour else "plain: trained on")
    yield f"{trained_on}, {only_read('only read')}; <BOS> and <EOS> are single tokens"
    for b, documents in enumerate(batch["documents"]):
        weights_T, segment_ids_T = batch["loss_weights_BT"][b], batch["segment_ids_BT"][b]
        trained, padding = np.count_nonzero(weights_T), np.count_nonzero(segment_ids_T == 0)
        yield paint(CYAN, f"=== row {b + 1}: {trained} trained tokens, {padding} padding")
        for segment, document in enumerate(documents, 1):
            inside = segment_ids_T == segment
            yield paint(CYAN, f"--- {document} ({np.count_nonzero(inside)} positions)")
            ids = [int(batch["tokens_BT"][b][inside][0]), *batch["targets_BT"][b][inside].tolist()]
            text = only_read(_readable(tokenizer, [], ids[:1]))
            marks = weights_T[inside] > 0
            cuts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(marks)]  # where trained begins or ends
            for first, last in itertools.pairwise(cuts):
                run = _readable(tokenizer, ids[: first + 1], ids[first + 1 : last + 1])
                text += paint(GREEN, run) if marks[first] else only_read(run)
            yield text
        if padding:
            yield paint(GREY, f"... {padding} positions of padding")


def _readable(tokenizer: Tokenizer, context: list[int], ids: list[int]) -> str:
    """Decodes a run of ids with BOS and EOS made visible; a segment has them at its ends only."""
    before = "<BOS>" if ids[:1] == [tokenizer.bos_id] else ""
    after = "<EOS>" if ids[-1:] == [tokenizer.eos_id] else ""
    return before + tokenizer.continuation(context, ids) + after
