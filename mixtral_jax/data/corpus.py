"""A run's corpus: a cache of tokens, or streams with the few documents that are held out of them."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mixtral_jax.config import DataConfig, SourceConfig, UserError
from mixtral_jax.data.bad_rows import BadRows
from mixtral_jax.data.cache import Corpus, Source, TokenFile, build_cache
from mixtral_jax.data.loader import Batches
from mixtral_jax.data.mixture import Mixture, Schedule
from mixtral_jax.data.packing import pack, pack_pairs
from mixtral_jax.data.remote_cache import build_once, place
from mixtral_jax.data.sources import relative_names, source_files
from mixtral_jax.data.stream import StreamBadRows, read
from mixtral_jax.data.text import Document, is_heldout
from mixtral_jax.data.windows import WINDOW_ROWS, StreamedBatches, TrainingDocuments, token_file

FORMAT = 1  # part of the key: raise it when the same stream gives other batches
# The held-out documents at the beginning of a stream are its held-out split, until there is enough, or enough was read.
HELDOUT_BYTES, HELDOUT_DOCUMENTS, SCANNED_DOCUMENTS = 1_000_000, 4096, 20_000


def open_corpus(data: DataConfig, tokenizer, progress: bool = True) -> Corpus:
    """Returns the corpus: of cached tokens, built where they are missing, or with data.streaming of streams.

    Raises:
        UserError: see build_cache and stream_corpus.
    """
    return stream_corpus(data, tokenizer) if data.streaming else build_cache(data, tokenizer, progress)


def open_batches(
    data: DataConfig, corpus: Corpus, tokenizer, *, batch_size: int, seq_len: int, seed: int, pairs: bool = False
) -> Mixture | StreamedBatches:
    """Returns the training batches of an open corpus, shuffled; with `pairs` its documents come in twos (see pack_pairs).

    Raises:
        UserError: a source has nothing to train on, or its weight is too small.
    """
    if data.streaming:
        return StreamedBatches(data, tokenizer, batch_size=batch_size, seq_len=seq_len, seed=seed)
    planned = pack_pairs if pairs else pack
    plans = [planned(source.train.lengths, seq_len, one_per_row=not data.packing) for source in corpus.sources]
    most = max(plan.most_pairs for plan in plans) if pairs else 0
    parts, first_pair = [], 0
    for s, (source, plan) in enumerate(zip(corpus.sources, plans)):
        rows = {"batch_size": batch_size, "seq_len": seq_len, "seed": seed, "source": s}
        parts.append(Batches(source.train, plan, **rows, pairs=most, first_pair=first_pair))
        first_pair += len(source.train.ids) // 2
    schedule = Schedule([source.name for source in corpus.sources], [source.weight for source in corpus.sources])
    return Mixture(parts, schedule, batch_size=batch_size)


def stream_corpus(data: DataConfig, tokenizer) -> Corpus:
    """Returns a corpus whose sources have no training split, only what is held out of the beginning of each stream.

    The held-out documents are kept under data.cache_dir. The key tells which streams these are, by the sizes of their
    files and not their content, which nobody reads twice; a data set of the hub is known by its name.

    Raises:
        UserError: a source cannot be read, or no document of any is held out.
    """
    sources, definitions = [], []
    for source in data.sources:
        files = [] if source.source == "hub" else source_files(source)
        sizes = [(name, path.stat().st_size) for name, (_, path) in zip(relative_names(files), files)]
        definition = (source.source, source.path if source.source == "hub" else sizes, source.text_key)
        definitions.append(definition)
        parts = (FORMAT, definition, tokenizer.fingerprint, data.heldout_fraction)
        times = [path.stat().st_mtime_ns for _, path in files]  # a file changed in place may hold out other text
        limits = (HELDOUT_BYTES, HELDOUT_DOCUMENTS, SCANNED_DOCUMENTS)
        entry = place(data.cache_dir, "streams", _hash((parts, times, limits)))
        heldout = build_once(entry, _load, lambda into, of=source: _save(into, _heldout(data, of, tokenizer)))
        sources.append(Source(source.name, source.weight, None, heldout))
    if not any(source.heldout.ids for source in sources):
        raise UserError(
            f"data.heldout_fraction={data.heldout_fraction} holds out none of the first {SCANNED_DOCUMENTS:,} documents "
            "of a stream; raise it, or add documents"
        )
    key = (FORMAT, WINDOW_ROWS, definitions, tokenizer.fingerprint, data.heldout_fraction)
    return Corpus(tuple(sources), _hash(key))


def first_documents(data: DataConfig, tokenizer, tokens: int) -> TokenFile:
    """Returns training documents from the beginning of each stream, about so many tokens in all, shared by weight.

    Raises:
        UserError: a source cannot be read.
    """
    total, bad_rows, found = sum(source.weight for source in data.sources), StreamBadRows(data.max_bad_rows, 1), []
    for source in data.sources:
        left = tokens * source.weight / total
        documents = TrainingDocuments(source, tokenizer, data.heldout_fraction, bad_rows.of_source(0))
        for document in documents.read():
            found.append(document)
            left -= len(document.ids)
            if left <= 0:
                break
    return token_file(found)


def _heldout(data: DataConfig, source: SourceConfig, tokenizer) -> TokenFile:
    """Tokenises the held-out documents at the beginning of a stream."""
    found = list(_heldout_documents(source, data))
    ids = tokenizer.encode_many([document.text for document in found])
    offsets = np.cumsum([0, *(len(one) + 2 for one in ids)], dtype=np.int64)
    tokens = [i for one in ids for i in (tokenizer.bos_id, *one, tokenizer.eos_id)]
    sizes = [len(document.text.encode()) for document in found]
    names = [document.id for document in found]
    return TokenFile(np.array(tokens, np.int32), offsets, np.array(sizes, np.int64), names)


def _heldout_documents(source: SourceConfig, data: DataConfig) -> Iterator[Document]:
    count = size = 0
    for scanned, (document, _) in enumerate(read(source, None, BadRows(data.max_bad_rows)), 1):
        if is_heldout(document.text, data.heldout_fraction):
            yield document
            count, size = count + 1, size + len(document.text.encode())
        if scanned >= SCANNED_DOCUMENTS or count >= HELDOUT_DOCUMENTS or size >= HELDOUT_BYTES:
            return


def _save(folder: Path, file: TokenFile) -> None:
    for name, array in (("tokens", file.tokens), ("offsets", file.offsets), ("bytes", file.bytes_)):
        np.save(folder / f"{name}.npy", array)
    (folder / "ids.json").write_text(json.dumps(file.ids))


def _load(folder: Path) -> TokenFile:
    tokens, offsets, sizes = (np.load(folder / f"{name}.npy") for name in ("tokens", "offsets", "bytes"))
    return TokenFile(tokens, offsets, sizes, json.loads((folder / "ids.json").read_text()))


def _hash(parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
