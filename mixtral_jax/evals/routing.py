"""Which experts the routers choose, on labelled text: the analysis of the Mixtral paper's section 5 (arXiv 2401.04088).

A row holds one window of one document, so that what shares its batch changes nothing.
"""

import base64
import functools
import hashlib
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mixtral_jax import distributed
from mixtral_jax.config import Config, UserError
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.distributed import rows_here
from mixtral_jax.evals.domains import domains
from mixtral_jax.evals.routing_counts import Counts, TokenCounts, add, count, errors, share_baselines, uniform_baselines
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.work import bar
from mixtral_jax.generate.engine import round_up
from mixtral_jax.models.routing import choices
from mixtral_jax.sharding import everywhere, place

TYPICAL_TOKENS, TYPICAL_MINIMUM = 12, 20  # tokens shown of an expert, and how often one must occur
SNIPPET_TOKENS = 120


class Window(NamedTuple):
    """A piece of a document as it is read."""

    tokens: np.ndarray  # int32
    uncounted: int  # tokens at the start that are no text: BOS


class Text(NamedTuple):
    """The windows of a domain, in the order of the text."""

    windows: list[Window]
    documents: int
    tokens: int  # without BOS


def check(config: Config, settings: Settings) -> None:
    """Refuses settings that cannot work.

    Raises:
        UserError: a layer that the model does not have, or no tokens.
    """
    layers = config.model.num_layers
    for layer in settings.routing_layers:
        if layer >= layers:
            raise UserError(
                f"--routing_layers={layer} and the model has {layers} layers; they are counted from 0: give 0 to {layers - 1}"
            )
    if settings.routing_tokens < 2:
        raise UserError(f"--routing_tokens={settings.routing_tokens}; a pair of neighbours takes 2: give at least 2")


def shown_layers(layers: int, settings: Settings) -> list[int]:
    """The layers in tables: those of --routing_layers, or the first, middle and last (of 32: 0, 15, 31)."""
    return sorted(set(settings.routing_layers or (0, (layers - 1) // 2, layers - 1)))


def read(texts: Iterable[str], tokenizer: Tokenizer, most: int, width: int, documents: int = 0) -> Text:
    """Cuts documents into windows.

    Args:
        texts: documents; empty ones are skipped.
        tokenizer: of the model.
        most: tokens, BOS not among them; the last document is cut there.
        width: of a window. BOS stands before a document; the later windows of a long one start without it, and without
            context.
        documents: at most so many; 0: as many as `most` allows.
    """
    windows: list[Window] = []
    left, taken = most, 0
    for text in itertools.islice(texts, documents or None):
        ids = np.asarray(tokenizer.encode_array(text)[:left], np.int32)
        if not len(ids):
            continue
        whole = np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])
        windows += [Window(whole[at : at + width], int(at == 0)) for at in range(0, len(whole), width)]
        left, taken = left - len(ids), taken + 1
        if not left:
            break
    return Text(windows, taken, most - left)


def routing(subject: Subject) -> Iterator[tuple[str, Any]]:
    """Shares, repetition, experts chosen together, typical tokens and coloured text, by domain and layer.

    Repetitions are fractions of pairs of neighbours in one window. `domains` holds the integer counts; docs/evaluation.md
    says what each is.

    Raises:
        UserError: a domain without two tokens in a row.
    """
    c, settings = subject.config.model, subject.settings
    layers = shown_layers(c.num_layers, settings)
    texts = _read_all(subject)
    hashed = _fingerprint(texts)
    distributed.same({"the text for routing": hashed}, "give all the same files")
    # Whose tokens are typical: over all domains.
    typical = {layer: TokenCounts(c.num_experts) for layer in layers}
    found, snippets = {}, {}
    runner = Runner(subject, layers)
    with (
        subject.work("routing", text=hashed, layers=layers) as work,
        bar((), "routing", "token", total=sum(map(_to_read, texts.values()))) as progress,
    ):
        for name, text in texts.items():
            counts, first = None, [None] * len(text.windows)
            for picked, batch, chosen in runner(name, text, work):
                counts = add(counts, batch)
                for i, each in zip(picked, chosen):
                    first[i] = each
                progress.update(sum(len(text.windows[i].tokens) for i in picked))
            for i, layer in enumerate(layers):
                _add_tokens(typical[layer], text, [each[i] for each in first])
            found[name] = _described(counts, text)
            snippets[name] = _snippet(text, first, layers, subject.tokenizer)
            yield from _headlines(name, found[name], layers)
    uniform = uniform_baselines(c.num_experts, c.experts_per_token)
    yield from zip(("random_first_repetition", "random_any_repetition"), uniform)
    yield "experts", c.num_experts
    yield "experts_per_token", c.experts_per_token
    yield "layers", c.num_layers
    yield "shown_layers", layers
    yield "domains", found
    yield "typical_tokens", {str(layer): _spelled(typical[layer], subject.tokenizer) for layer in layers}
    yield "snippets", snippets


def _read_all(subject: Subject) -> dict[str, Text]:
    settings = subject.settings
    width = subject.window
    texts = {}
    for name, documents in bar(domains(settings).items(), "reading text", "domain"):
        texts[name] = read(documents, subject.tokenizer, settings.routing_tokens, width, settings.limit)
        if not any(len(each.tokens) - each.uncounted > 1 for each in texts[name].windows):
            raise UserError(
                f"--text: the domain {name} has {texts[name].tokens} tokens in {texts[name].documents} documents and windows of "
                f"{width}, and no two in a row; give longer text, or leave it out"
            )
    return texts


def _to_read(text: Text) -> int:
    return sum(len(window.tokens) for window in text.windows)


def _fingerprint(texts: Mapping[str, Text]) -> str:
    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(f"{name} {len(text.windows)}\n".encode())
        for window in text.windows:
            digest.update(f"{len(window.tokens)} {window.uncounted}\n".encode() + window.tokens.tobytes())
    return digest.hexdigest()


# Of the module, so that models of one shape are compiled once.
@functools.partial(jax.jit, static_argnames="kind")
def _index(model, batch: dict, kind: np.dtype):
    found_L = choices(model, batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"])
    return everywhere(found_L.index_BTK.astype(kind))


class Runner:
    """Runs windows through the model, long ones first, and counts; finished batches come from the work instead."""

    def __init__(self, subject: Subject, layers: Sequence[int]):
        self._subject, self._layers = subject, np.asarray(layers)
        self._e = subject.config.model.num_experts
        self._kind = np.dtype(np.uint8 if self._e < 256 else np.uint16)  # E itself stands for padding

    def __call__(self, name: str, text: Text, work) -> Iterator[tuple[list[int], dict, list[np.ndarray]]]:
        """Yields (numbers of windows, their counts, of each window its counted tokens' first choices [layers, n])."""
        order = sorted(range(len(text.windows)), key=lambda i: (-len(text.windows[i].tokens), i))
        while order:
            width = round_up(len(text.windows[order[0]].tokens))
            rows = self._subject.scorer.rows(self._subject.mesh, width)
            picked, order = order[:rows], order[rows:]
            # A piece is named by what it holds: with batches of another size none is taken for another.
            piece = f"{name}: {len(order)} windows left after {len(picked)}"
            if piece not in work:
                work.put(piece, self._run([text.windows[i] for i in picked], rows, width))
            done = work.get(piece)
            lengths = [len(text.windows[i].tokens) - text.windows[i].uncounted for i in picked]
            first = self._unpacked(done["first"], sum(lengths))
            yield picked, done["counts"], np.split(first, np.cumsum(lengths)[:-1], axis=1)

    def _run(self, windows: Sequence[Window], rows: int, width: int) -> dict[str, Any]:
        mesh = self._subject.mesh
        start, stop = rows_here(mesh, rows)
        batch, counted_BT = _batch(windows, rows, width)
        here = {name: value[start:stop] for name, value in batch.items()}
        index_LBTK = jax.device_get(_index(self._subject.model, place(here, mesh, start, rows), self._kind))
        counts = count(index_LBTK, counted_BT, self._e)
        first = index_LBTK[self._layers][:, counted_BT, 0]
        packed = base64.b64encode(zlib.compress(first.tobytes(), 6)).decode()
        return {"counts": {name: value.tolist() for name, value in counts.items()}, "first": packed}

    def _unpacked(self, packed: str, tokens: int) -> np.ndarray:
        content = zlib.decompress(base64.b64decode(packed))
        return np.frombuffer(content, self._kind).reshape(len(self._layers), tokens)


def _batch(windows: Sequence[Window], rows: int, width: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One window a row; and which tokens are counted. Rows that are left are empty and reach no expert."""
    tokens_BT, segment_ids_BT = np.zeros((2, rows, width), np.int32)
    counted_BT = np.zeros((rows, width), bool)
    for row, window in enumerate(windows):
        tokens_BT[row, : len(window.tokens)] = window.tokens
        segment_ids_BT[row, : len(window.tokens)] = 1
        counted_BT[row, window.uncounted : len(window.tokens)] = True
    positions_BT = segment_ids_BT * np.arange(width, dtype=np.int32)
    return {"tokens_BT": tokens_BT, "positions_BT": positions_BT, "segment_ids_BT": segment_ids_BT}, counted_BT


def _add_tokens(counts: TokenCounts, text: Text, first: list[np.ndarray]) -> None:
    counts.add(np.concatenate([w.tokens[w.uncounted :] for w in text.windows]), np.concatenate(first))


def _described(counts: Counts, text: Text) -> dict[str, Any]:
    """A domain's results: counts, and the baselines and errors that follow from them."""
    first_L, any_L = share_baselines(counts)
    kept = ("choice_LKE", "together_LEE", "first_repeats_L", "any_repeats_L")
    return {
        "documents": text.documents,
        **{name: int(counts[name]) for name in ("tokens", "pairs", "windows")},
        **{name: counts[name].tolist() for name in kept},
        "first_baseline_L": first_L.tolist(),
        "any_baseline_L": None if any_L is None else any_L.tolist(),
        **{f"{name.replace('_', '_error_')}": value.tolist() for name, value in errors(counts).items()},
    }


def _headlines(name: str, found: Mapping, layers: Sequence[int]) -> Iterator[tuple[str, float]]:
    yield f"{name}/tokens", found["tokens"]
    for layer in layers:
        for kind in ("first", "any"):
            yield f"{name}/layer {layer}/{kind}_repetition", found[f"{kind}_repeats_L"][layer] / found["pairs"]
        assigned = np.sum(found["choice_LKE"][layer], axis=0)
        yield f"{name}/layer {layer}/largest_share", float(assigned.max() / assigned.sum())


def _snippet(text: Text, first: list[np.ndarray], layers: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """The start of the first document that is long enough, or of the longest, with each token's first expert in each layer."""
    lengths = [each.shape[1] if window.uncounted else 0 for each, window in zip(first, text.windows)]
    at = next((i for i, n in enumerate(lengths) if n >= SNIPPET_TOKENS), int(np.argmax(lengths)))
    window = text.windows[at]
    ids = window.tokens[window.uncounted :][:SNIPPET_TOKENS].tolist()
    pieces = [tokenizer.continuation(ids[:i], ids[i : i + 1]) for i in range(len(ids))]
    return {
        "pieces": pieces,
        "first": {str(layer): chosen[: len(ids)].tolist() for layer, chosen in zip(layers, first[at])},
    }


def _spelled(counts: TokenCounts, tokenizer: Tokenizer) -> list[list[dict]]:
    """The typical tokens of each expert, with their text as it reads within a line."""
    before = tokenizer.encode("a")
    found = counts.typical(TYPICAL_TOKENS, TYPICAL_MINIMUM)
    return [[each | {"text": tokenizer.continuation(before, [each["token"]])} for each in row] for row in found]
