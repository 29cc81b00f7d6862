"""The reference's log-probabilities of every answer, computed once before DPO begins and kept on disk.

The reference never changes and has no gradient, so there is nothing it need be in memory for while training. The pairs are
visited in the order of the packing plan; the order of the training batches is none of its business.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from mixtral_jax import distributed
from mixtral_jax.config import Config, UserError
from mixtral_jax.data import Batches, TokenFile, pack_pairs
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
    """Returns the Reference of a corpus, from the cache under data.cache_dir or computed.

    Args:
        config: its mesh resolved.
        corpus: of pairs.
        fingerprints: of the reference's weights.
        weights: returns the reference; called if something is missing in the cache.
        mesh: the current mesh.
        note: shows a line to the user.

    Raises:
        UserError: the cache cannot be written.
    """
    held = []  # loaded once for both splits, and let go at the end
    found = []
    for split, file in (("train", corpus.train), ("heldout", corpus.heldout)):
        path = _path(config, corpus, fingerprints, split)
        done, log_probs = _read(path, len(file.ids) // 2)
        if done is not None:
            pairs = len(file.ids) // 2
            rest = f", from batch {done} on" if done else ""
            note(f"computing the reference's log-probabilities of {pairs:,} pairs ({split}), once{rest} ...")
            held = held or [weights()]
            log_probs = _compute(config, file, held[0], mesh, path, done, log_probs, split)
        else:
            note(f"reference log-probabilities of {len(log_probs):,} pairs ({split}) from {path}")
        found.append(log_probs)
    return Reference(*found)


def _path(config: Config, corpus, fingerprints: dict[str, str], split: str) -> Path:
    model, train = config.model, config.train
    settings = {key: getattr(model, key) for key in (*MODEL_KEYS, "dtype")}
    key = (FORMAT, split, fingerprints, corpus.key, settings, train.seq_len, config.data.packing)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return Path(config.data.cache_dir).expanduser() / "reference" / f"{name}.npz"


def _read(path: Path, n: int) -> tuple[int | None, np.ndarray]:
    """Returns how many batches are done (None: all of them) and what is known; the same on all processes."""

    def look() -> tuple[int | None, np.ndarray]:
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError):
            with np.load(path) as stored:
                done, log_probs = int(stored["done"]), stored["log_probs"]
            if log_probs.shape == (n, 2):
                return (None if done < 0 else done), log_probs
        return 0, np.zeros((n, 2), np.float32)

    if not distributed.together():
        return look()
    done, log_probs = look() if distributed.speaks() else (0, np.zeros((n, 2), np.float32))
    return distributed.decided("reference", lambda: done), multihost_utils.broadcast_one_to_all(log_probs)


def _write(path: Path, done: int, log_probs: np.ndarray) -> None:
    if not distributed.speaks():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        np.savez(new, done=done, log_probs=log_probs)
        os.replace(new, path)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {path} cannot be written ({error.strerror}); set data.cache_dir to a folder of yours with room, "
            "or dpo.reference=on_the_fly"
        ) from error


def _compute(config: Config, file: TokenFile, model, mesh, path: Path, first: int, log_probs, split: str) -> np.ndarray:
    """Computes from batch `first` on, saving now and then what is done."""
    rows = config.train.batch_size // config.train.accumulation_steps
    plan = pack_pairs(file.lengths, config.train.seq_len, one_per_row=not config.data.packing)
    sizes = {"batch_size": rows, "seq_len": config.train.seq_len, "seed": 0, "shuffle": False}
    batches = Batches(file, plan, **sizes, pairs=plan.most_pairs)
    start, stop = distributed.rows_here(mesh, rows)

    @jax.jit
    def run(model, batch):
        found = answers(model, batch, config.loss.head_chunk)[0]
        return everywhere((batch["pairs_BP"], found.chosen_BP, found.rejected_BP))

    saved, log_probs = time.monotonic(), log_probs.copy()
    steps = range(first, batches.n_eval_batches)
    shown = {"unit": "batch", "leave": False, "disable": None if distributed.speaks() else True}
    for k in tqdm(steps, f"reference, {split}", initial=first, total=batches.n_eval_batches, **shown):
        batch = place(batches.eval_batch(k, start, stop), mesh, start, rows)
        numbers_BP, chosen_BP, rejected_BP = jax.device_get(run(model, batch))
        real_BP = numbers_BP > 0
        log_probs[numbers_BP[real_BP] - 1] = np.stack([chosen_BP[real_BP], rejected_BP[real_BP]], -1)
        if time.monotonic() - saved > SAVE_SECONDS:
            _write(path, k + 1, log_probs)
            saved = time.monotonic()
    _write(path, -1, log_probs)
    return log_probs
