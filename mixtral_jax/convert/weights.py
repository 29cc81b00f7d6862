"""One view of all weights: a directory of Hugging Face's or Mistral's, or a checkpoint of ours, read in blocks of ours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from mixtral_jax import lora_base
from mixtral_jax.config import Config, from_config_dict
from mixtral_jax.convert import layout
from mixtral_jax.convert.foreign import Foreign
from mixtral_jax.convert.layout import Block
from mixtral_jax.convert.merged import BIAS, Chance, Merged
from mixtral_jax.convert.ours import Ours
from mixtral_jax.remote import is_remote
from mixtral_jax.resolve import FOREIGN, Checkpoint, is_foreign, resolve_checkpoint
from mixtral_jax.workdir import load_run


class Weights(Protocol):
    """Parameters of a Mixtral by our names, whatever they lie in: what Foreign and Ours have in common.

    Attributes:
        where: the directory, for messages.
        config: the whole configuration; of foreign files the model's part is read and the rest is default.
        size: letter -> size.
        dtypes: parameter -> dtype of what `block` reads, which is the stored one; float32 where adapters are merged.
        letters: parameter -> the letters of the file's tensor; the first is what blocks are cut along.
    """

    where: Path
    config: Config
    size: dict[str, int]
    dtypes: dict[str, np.dtype]
    letters: dict[str, str]

    def block(self, name: str, block: Block) -> np.ndarray:
        """Reads a block of a parameter, in its dtype and our order of dimensions."""

    def tokenizer_file(self) -> Path | None:
        """The SentencePiece model, if there is one."""

    def called(self, name: str) -> str:
        """A parameter's name, and what the files call it, for messages."""

    def close(self) -> None:
        """Releases the files."""


def written_dtypes(weights: Weights) -> dict[str, np.dtype]:
    """In which dtypes files of these weights are written by default: as stored; merged ones as the base is stored."""
    return weights.base_dtypes if isinstance(weights, Merged) else weights.dtypes


def check_base(weights: Weights) -> None:
    """After all blocks were read once: refuses merged weights whose base is not the one of the training.

    Raises:
        UserError: both are named.
    """
    if isinstance(weights, Merged):
        weights.check_base()


def open_weights(where: str | Path) -> Weights:
    """Opens a checkpoint of any kind; a directory of others may be named with or without `hf:`.

    Raises:
        UserError: it is none that we know, or damaged; or the base of adapters is not there.
    """
    here = not str(where).startswith(FOREIGN) and not is_remote(where)
    foreign = here and is_foreign(Path(where).expanduser())
    return open_checkpoint(resolve_checkpoint(f"{FOREIGN}{where}" if foreign else where))


def open_checkpoint(found: Checkpoint) -> Weights:
    """Opens a resolved checkpoint, to be read once in the order of `all_blocks`. Of a LoRA run it gives merged weights."""
    if found.step is None:
        return Foreign(found.folder)
    config = from_config_dict(load_run(found.folder))
    if config.lora.rank == 0:
        return Ours(found)
    source = lora_base.base_of(found, config)
    return Merged(found, config, Chance(found, config) if source is None else open_checkpoint(source))


def ordered(names) -> list[str]:
    """Parameter names in the order of files, the router's bias (which files do not have) last."""
    return [name for name in (*layout.entries("huggingface"), BIAS) if name in names]


def all_blocks(weights: Weights) -> Iterator[tuple[str, Block]]:
    """All blocks of all parameters, in the order in which Hugging Face writes files."""
    for name in ordered(weights.dtypes):
        yield from ((name, block) for block in layout.blocks(name, weights.letters[name], weights.size))


def total_bytes(weights: Weights) -> int:
    """Bytes of all parameters as stored."""
    return sum(
        int(np.prod(layout.parameter_shape(name, weights.size))) * d.itemsize for name, d in weights.dtypes.items()
    )


def as_float32(array: np.ndarray) -> np.ndarray:
    """Exact for the three dtypes there are."""
    return array.astype(np.float32) if array.dtype in (ml_dtypes.bfloat16, np.float16) else array
