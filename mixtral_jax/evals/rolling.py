"""Log-likelihood of whole documents, however long: every token once, in windows of the model's rows."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mixtral_jax.evals.scorer import Request
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.work import Work, bar

PIECE_BATCHES = 8  # documents of about so many batches are scored together and then kept


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


def score_documents(subject: Subject, work: Work, name: str, texts: Iterable[str], width: int) -> list[DocumentScore]:
    """Scores documents, those that `work` does not have; without tokens they are left out.

    Args:
        subject: whose mesh is current.
        work: keeps each document under `name` and a hash of its text: a text that has changed is scored anew.
        name: of the text.
        texts: the documents, the same ones in the same order each time.
        width: tokens of a window.
    """
    found: dict[int, DocumentScore] = {}
    shown = bar([], name, "document")
    room = PIECE_BATCHES * (
        subject.settings.batch_tokens or subject.config.train.batch_size * subject.config.train.seq_len
    )
    documents = ((i, text) for i, text in enumerate(texts))
    while True:
        piece: list[tuple[int, str, str, list[int]]] = []
        size = 0
        for i, text in documents:
            shown.update()
            key = f"{name}/{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:32]}"
            if key in work:
                found[i] = DocumentScore(*work.get(key))
                continue
            ids = subject.tokenizer.encode(text)
            if ids:
                piece.append((i, key, text, ids))
                size += len(ids)
            if size >= room:
                break
        if not piece:
            break
        nll = _nll(subject, [ids for *_, ids in piece], width)
        for (i, key, text, ids), value in zip(piece, nll):
            found[i] = DocumentScore(value, len(ids), len(text.encode(errors="replace")), len(re.split(r"\s+", text)))
            work.put(key, list(found[i]))
    shown.close()
    return [found[i] for i in sorted(found)]


def _nll(subject: Subject, documents: Sequence[list[int]], width: int) -> list[float]:
    """Negative log-likelihoods of documents; the windows of all are scored together, and summed in their own order."""
    cut = [list(windows(ids, subject.tokenizer.bos_id, width)) for ids in documents]
    requests = list(itertools.chain.from_iterable(cut))
    sums = np.zeros(len(requests))
    for i, scored in subject.scorer(subject.model, requests):
        sums[i] = np.sum(scored.log_probs, dtype=np.float64)
    ends = np.cumsum([len(each) for each in cut])
    return [-float(part.sum()) for part in np.split(sums, ends[:-1])]
