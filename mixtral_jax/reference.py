"""The reference's log-probabilities of every answer, computed once before DPO begins and kept on disk.

The reference never changes and has no gradient, so there is nothing it need be in memory for while training. The pairs are
visited in the order of the packing plan; the order of the training batches is none of its business.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from mixtral_jax import distributed
from mixtral_jax.config import Config, UserError
from mixtral_jax.data import Batches, TokenFile, pack_pairs
from mixtral_jax.data.once import DAMAGE, building
from mixtral_jax.data.remote_cache import Place, build_once, open_there
from mixtral_jax.data.remote_cache import place as place_of
from mixtral_jax.preference import answers
from mixtral_jax.resume import MODEL_KEYS
from mixtral_jax.sharding import everywhere, place

FORMAT = 1  # part of the key: raise it when the same weights and data give other numbers
SAVE_SECONDS = 20.0


class Reference(NamedTuple):
    """Log-probabilities of the answers of numbered pairs, float32 [n, 2]: chosen, rejected; of both splits."""

    train: np.ndarray
    heldout: np.ndarray


def add_to(batch: dict, log_probs: np.ndarray) -> dict:
    """Gives a batch of pairs the fields reference_chosen_BP and reference_rejected_BP, float32; 0 where there is no pair."""
    numbers_BP = batch["pairs_BP"]
    found_BP2 = np.where(numbers_BP[..., None] > 0, log_probs[np.maximum(numbers_BP, 1) - 1], 0).astype(np.float32)
    return batch | {"reference_chosen_BP": found_BP2[..., 0], "reference_rejected_BP": found_BP2[..., 1]}


class WithReference:
    """Batches that carry the reference's log-probabilities."""

    def __init__(self, batches, log_probs: np.ndarray):
        self._batches, self._log_probs = batches, log_probs

    def __getattr__(self, name: str):
        return getattr(self._batches, name)

    def batch(self, k: int) -> dict:
        """Returns global batch k."""
        return add_to(self._batches.batch(k), self._log_probs)

    def rows(self, k: int, start: int, stop: int | None = None) -> dict:
        """Returns rows start to stop - 1 of global batch k."""
        return add_to(self._batches.rows(k, start, stop), self._log_probs)


def open_reference(config: Config, corpus, fingerprints: dict[str, str], weights: Callable, mesh, note: Callable):
    """Returns the Reference of a corpus; for the arguments see `open_split`."""
    held = []  # loaded once for both splits, and let go at the end

    def once():
        if not held:
            held.append(weights())
        return held[0]

    return Reference(
        *(open_split(config, corpus, split, fingerprints, once, mesh, note) for split in Reference._fields)
    )


def open_split(
    config: Config, corpus, split: str, fingerprints: dict[str, str], weights: Callable, mesh, note: Callable
) -> np.ndarray:
    """Returns a split's log-probabilities under the reference, from the cache under data.cache_dir or computed.

    Args:
        config: its mesh resolved.
        corpus: of pairs.
        split: train or heldout.
        fingerprints: of the reference's weights.
        weights: returns the reference; called if something is missing in the cache.
        mesh: the current mesh.
        note: shows a line to the user.

    Returns:
        float32 [n, 2]: of each pair, its chosen and its rejected answer.

    Raises:
        UserError: the cache cannot be written.
    """
    file = getattr(corpus, split)
    pairs = len(file.ids) // 2
    at = place_of(config.data.cache_dir, "reference", _key(config, corpus, fingerprints, split))
    done, log_probs = _read(at, pairs, _rows(config))
    if done is None:
        note(f"reference log-probabilities of {pairs:,} pairs ({split}) from {at.local}")
        return log_probs
    rest = f", from batch {done} on" if done else ""
    note(f"computing the reference's log-probabilities of {pairs:,} pairs ({split}), once{rest} ...")
    return _compute(config, file, weights(), mesh, at, done, log_probs, split)


def _key(config: Config, corpus, fingerprints: dict[str, str], split: str) -> str:
    model, train = config.model, config.train
    settings = {key: getattr(model, key) for key in (*MODEL_KEYS, "dtype")}
    parts = (FORMAT, split, fingerprints, corpus.key, settings, train.seq_len, config.data.packing)
    if model.buffer_factor:  # what a bounded buffer drops depends on the other rows, and on who shares the experts
        parts += (model.buffer_factor, dataclasses.asdict(config.mesh), _rows(config))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _rows(config: Config) -> int:
    """Rows of a batch: those of a micro-batch of training."""
    return config.train.batch_size // config.train.accumulation_steps


def _open(folder: Path) -> np.ndarray:
    return np.load(folder / "log_probs.npy")


def _partial(at: Place) -> Path:
    """Where what is done so far is kept, on this machine: it depends on the batch size, so that is in it."""
    return at.local.with_name(at.local.name + ".partial.npz")


def _read(at: Place, n: int, rows: int) -> tuple[int | None, np.ndarray]:
    """Returns how many batches of so many rows are done (None: all pairs) and what is known; the same on all processes."""
    nothing = np.zeros((n, 2), np.float32)

    def look() -> tuple[int | None, np.ndarray]:
        with contextlib.suppress(*DAMAGE):
            return None, open_there(at, _open)
        with contextlib.suppress(OSError, KeyError, *DAMAGE), np.load(_partial(at)) as stored:
            if stored["rows"] == rows and stored["log_probs"].shape == (n, 2):
                return int(stored["done"]), stored["log_probs"]
        return 0, nothing

    if not distributed.together():
        return look()
    done, log_probs = look() if distributed.speaks() else (0, nothing)
    return distributed.decided("reference", lambda: done), multihost_utils.broadcast_one_to_all(log_probs)


def _keep(at: Place, done: int, rows: int, log_probs: np.ndarray) -> None:
    """Keeps what is done so far, on process 0."""
    if not distributed.speaks():
        return
    path = _partial(at)
    with _writable(path), building(at.local):
        new = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        np.savez(new, done=done, rows=rows, log_probs=log_probs)
        os.replace(new, path)


def _store(at: Place, log_probs: np.ndarray) -> None:
    """Puts all of it into the cache, on process 0."""
    if distributed.speaks():
        with _writable(at.local):
            build_once(at, _open, lambda folder: np.save(folder / "log_probs.npy", log_probs))
            _partial(at).unlink(missing_ok=True)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {path} cannot be written ({error.strerror}); set data.cache_dir to a folder of yours with room, "
            "or dpo.reference=on_the_fly"
        ) from error


def _compute(config: Config, file: TokenFile, model, mesh, at: Place, first: int, log_probs, split: str) -> np.ndarray:
    """Computes from batch `first` on, saving now and then what is done."""
    saved = time.monotonic()

    def keep(done: int, log_probs: np.ndarray) -> None:
        nonlocal saved
        if time.monotonic() - saved > SAVE_SECONDS:
            _keep(at, done, _rows(config), log_probs)
            saved = time.monotonic()

    log_probs = score_pairs(config, file, model, mesh, f"reference, {split}", (first, log_probs), keep)
    _store(at, log_probs)
    return log_probs


# Of the module, so that models of one shape are compiled once.
@functools.partial(jax.jit, static_argnames="head_chunk")
def _sums(model, batch: dict, head_chunk: int):
    found = answers(model, batch, head_chunk)[0]
    return everywhere((batch["pairs_BP"], found.chosen_BP, found.rejected_BP))


def score_pairs(
    config: Config,
    file: TokenFile,
    model,
    mesh,
    title: str,
    known: tuple[int, np.ndarray] | None = None,
    keep: Callable[[int, np.ndarray], None] = lambda done, log_probs: None,
) -> np.ndarray:
    """Computes the log-probability of each answer of each pair under a model, in the order of the packing plan.

    Args:
        config: train.seq_len, data.packing and loss.head_chunk are read, and the batch.
        file: the pairs.
        model: on the mesh.
        mesh: the current mesh.
        title: of the bar.
        known: how many batches are done, and what they gave; None: nothing.
        keep: is told after every batch how many are done, and what they gave.

    Returns:
        float32 [n, 2]: of each pair, its chosen and its rejected answer, in nats.
    """
    rows = _rows(config)
    plan = pack_pairs(file.lengths, config.train.seq_len, one_per_row=not config.data.packing)
    sizes = {"batch_size": rows, "seq_len": config.train.seq_len, "seed": 0, "shuffle": False}
    batches = Batches(file, plan, **sizes, pairs=plan.most_pairs)
    start, stop = distributed.rows_here(mesh, rows)
    first, log_probs = known or (0, np.zeros((len(file.ids) // 2, 2), np.float32))

    log_probs = log_probs.copy()
    steps = range(first, batches.n_eval_batches)
    shown = {"unit": "batch", "leave": False, "disable": None if distributed.speaks() else True}
    for k in tqdm(steps, title, initial=first, total=batches.n_eval_batches, **shown):
        batch = place(batches.eval_batch(k, start, stop), mesh, start, rows)
        numbers_BP, chosen_BP, rejected_BP = jax.device_get(_sums(model, batch, config.loss.head_chunk))
        real_BP = numbers_BP > 0
        log_probs[numbers_BP[real_BP] - 1] = np.stack([chosen_BP[real_BP], rejected_BP[real_BP]], -1)
        keep(k + 1, log_probs)
    return log_probs
