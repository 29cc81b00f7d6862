"""Log-likelihood of whole documents, however long: every token once, in windows of the model's rows."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mixtral_jax.evals.scorer import Request
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.work import Work, bar, key_of

PIECE_BATCHES = 16  # documents of so many batches' bytes, a few batches of tokens, are scored together and then kept


class DocumentScore(NamedTuple):
    """A document's negative log-likelihood in nats, and how long it is in several measures."""

    nll: float
    tokens: int  # without BOS
    bytes_: int  # of UTF-8
    words: int  # between white space, as lm-evaluation-harness counts


def windows(ids: Sequence[int], bos: int, width: int) -> Iterator[Request]:
    """Cuts a document so that every token is scored once, in windows of at most `width` tokens that are read.

    As lm-evaluation-harness does: the first window begins with BOS, a later one with the token before it, and the last
    reaches back as far as the width allows.
    """
    first = min(width, len(ids))
    yield Request([bos], ids[:first])
    done = first
    while done < len(ids):
        count = min(width, len(ids) - done)
        stop = done + count
        yield Request(ids[stop - width - 1 : done], ids[done:stop])
        done = stop


def score_documents(
    subject: Subject, work: Work, name: str, texts: Iterable[str], width: int, total: int | None = None
) -> list[DocumentScore]:
    """Scores documents, those that `work` does not have; without tokens they are left out.

    Args:
        subject: whose mesh is current.
        work: keeps pieces of documents, each under a hash of its texts: what has changed is scored anew.
        name: of the text, for the progress bar.
        texts: the documents, the same ones in the same order each time.
        width: tokens of a window.
        total: how many documents there are.
    """
    found: list[DocumentScore] = []
    room = PIECE_BATCHES * (
        subject.settings.batch_tokens or subject.config.train.batch_size * subject.config.train.seq_len
    )
    with bar([], name, "document", total) as shown:
        for piece in _pieces(texts, room):
            key = key_of({"texts": piece})
            if key not in work:
                work.put(key, _scores(subject, piece, width))
            found += [DocumentScore(*each) for each in work.get(key)]
            shown.update(len(piece))
    return found


def _pieces(texts: Iterable[str], room: int) -> Iterator[list[str]]:
    """Neighbouring documents, of `room` bytes or a little more together (a token has one at least).

    The texts alone decide where a piece ends, not what is finished: so a window shares its batch with the same ones,
    and has the same log-probabilities to the last digit, whether an evaluation was interrupted or not.
    """
    piece: list[str] = []
    size = 0
    for text in texts:
        piece.append(text)
        size += len(text.encode(errors="replace"))
        if size >= room:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _scores(subject: Subject, texts: Sequence[str], width: int) -> list[DocumentScore]:
    encoded = [(text, ids) for text in texts if (ids := subject.tokenizer.encode(text))]
    nll = _nll(subject, [ids for _, ids in encoded], width)
    return [
        DocumentScore(value, len(ids), len(text.encode(errors="replace")), len(re.split(r"\s+", text)))
        for (text, ids), value in zip(encoded, nll)
    ]


def _nll(subject: Subject, documents: Sequence[list[int]], width: int) -> list[float]:
    """Negative log-likelihoods of documents; the windows of all are scored together, and summed in their own order."""
    cut = [list(windows(ids, subject.tokenizer.bos_id, width)) for ids in documents]
    requests = list(itertools.chain.from_iterable(cut))
    sums = np.zeros(len(requests))
    for i, scored in subject.scorer(subject.model, requests):
        sums[i] = np.sum(scored.log_probs, dtype=np.float64)
    ends = np.cumsum([len(each) for each in cut])
    return [-float(part.sum()) for part in np.split(sums, ends[:-1])]
