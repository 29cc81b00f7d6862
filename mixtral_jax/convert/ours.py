"""Checkpoints of ours, of training or imported, read in blocks whatever their chunks are."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts

from mixtral_jax.config import UserError, from_config_dict
from mixtral_jax.convert import layout
from mixtral_jax.convert.layout import Block
from mixtral_jax.models import mixtral
from mixtral_jax.resolve import Checkpoint
from mixtral_jax.sharding import named_leaves
from mixtral_jax.workdir import load_run

CACHE_BYTES = 128 * 2**20


class Ours:
    """A checkpoint of ours.

    Args:
        checkpoint: a step of a run.
        in_order: all blocks are to be read once, in the order of `all_blocks`. An imported checkpoint, whose chunks are
            those blocks, then needs no cache; training's checkpoints are cut otherwise.

    Raises:
        UserError: it is damaged, or not of the model that config.json describes.
    """

    def __init__(self, checkpoint: Checkpoint, in_order: bool = True):
        self._local = checkpoint.local
        self.where = checkpoint.folder / "checkpoints" / str(checkpoint.step)
        self.config = from_config_dict(load_run(self._local))
        self.size = layout.sizes(self.config.model)
        entries = layout.entries("huggingface")
        folder = self.where / "params"
        cache = 0 if in_order and not (self.where / "opt_state").is_dir() else CACHE_BYTES
        with explained(folder):
            self._arrays = open_arrays(folder, cache)
        self.letters = {name: entries[name].letters if name in entries else "E" for name in self._arrays}
        self.dtypes = {name: np.dtype(array.dtype.numpy_dtype) for name, array in self._arrays.items()}
        wanted = {n: tuple(leaf.shape) for n, leaf in named_leaves(mixtral.abstract(self.config.model)).items()}
        stored = {name: tuple(array.shape) for name, array in self._arrays.items()}
        if stored != wanted:
            wrong = sorted(n for n in wanted.keys() | stored.keys() if wanted.get(n) != stored.get(n))
            lines = [f"  {n}: checkpoint {stored.get(n)}, config {wanted.get(n)}" for n in wrong]
            raise UserError(f"{folder} is not of the model in {checkpoint.folder}/config.json:\n" + "\n".join(lines))

    def block(self, name: str, block: Block) -> np.ndarray:
        """See weights.Weights, as for the other methods."""
        with explained(self.where):
            return self._arrays[name][layout.block_index(name, self.letters[name], block)].read().result()

    def tokenizer_file(self) -> Path | None:
        path = self._local / "tokenizer" / "tokenizer.model"
        return path if path.is_file() else None

    def called(self, name: str) -> str:
        return name

    def close(self) -> None:
        self._arrays.clear()


def open_arrays(folder: Path, cache: int) -> dict[str, ts.TensorStore]:
    """Opens the arrays of a checkpoint's item by their names, sharing so many bytes of cache."""
    metadata = json.loads((folder / "_METADATA").read_text())
    name = str(folder)
    base = f"{name}/" if "://" in name else f"file://{folder.resolve()}/"  # tensorstore reads gs:// and s3:// by itself
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache}})
    arrays = {}
    for value in metadata["tree_metadata"].values():
        name = ".".join(item["key"] for item in value["key_metadata"])
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if metadata.get("use_ocdbt") else f"{base}{name}/"
        arrays[name] = ts.open({"driver": driver, "kvstore": store}, read=True, context=context).result()
    return arrays


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Says of a failing read which folder it was."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is damaged or incomplete, take another step or copy it again: {error}") from error
