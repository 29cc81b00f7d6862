"""One view of all weights: a directory of Hugging Face's or Mistral's, or a checkpoint of ours, read in blocks of ours."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts

from mixtral_jax.config import Config, ModelConfig, UserError, from_config_dict
from mixtral_jax.convert import architecture, layout
from mixtral_jax.convert.layout import Block
from mixtral_jax.convert.shards import Shards
from mixtral_jax.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from mixtral_jax.models import mixtral
from mixtral_jax.resolve import FOREIGN, Checkpoint, is_foreign, resolve_checkpoint
from mixtral_jax.sharding import named_leaves
from mixtral_jax.workdir import load_run

CACHE_BYTES = 256 * 2**20
BIAS = "layers.router_bias_E"


class Weights:
    """Parameters of a Mixtral by our names, whatever they lie in.

    Attributes:
        where: the directory, for messages.
        config: the whole configuration; of foreign files the model's part is read and the rest is default.
        size: letter -> size.
        dtypes: parameter -> stored dtype.
        letters: parameter -> the letters of the file's tensor; the first is what blocks are cut along.
    """

    where: Path
    config: Config
    size: dict[str, int]
    dtypes: dict[str, np.dtype]
    letters: dict[str, str]

    def block(self, name: str, block: Block) -> np.ndarray:
        """Reads a block of a parameter, in its stored dtype and our order of dimensions."""
        raise NotImplementedError

    def tokenizer_file(self) -> Path | None:
        """The SentencePiece model, if there is one."""
        raise NotImplementedError

    def called(self, name: str) -> str:
        """A parameter's name and what the files call it, {i} being the layer and {e} the expert; for messages."""
        return name

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """All blocks of all parameters, in the order in which Hugging Face writes files."""
        for name in ordered(self.dtypes):
            yield from ((name, block) for block in layout.blocks(name, self.letters[name], self.size))

    def nbytes(self) -> int:
        """Bytes of all parameters as stored."""
        return sum(
            int(np.prod(layout.parameter_shape(name, self.size))) * d.itemsize for name, d in self.dtypes.items()
        )

    def close(self) -> None:
        """Releases the files."""


def ordered(names) -> list[str]:
    """Parameter names in the order of files, the router's bias (which files do not have) last."""
    return [name for name in (*layout.entries("huggingface"), BIAS) if name in names]


def check_complete(model: ModelConfig, filled: dict[str, tuple[int, ...]]) -> None:
    """The model itself is the authority on what parameters there are.

    Raises:
        RuntimeError: our own tables and the model disagree.
    """
    wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(mixtral.abstract(model)).items()}
    if wanted != filled:
        names = sorted(n for n in wanted.keys() | filled.keys() if wanted.get(n) != filled.get(n))
        raise RuntimeError(f"layout.py and models/mixtral.py disagree on {', '.join(names)}")


class Foreign(Weights):
    """Weights in files of Hugging Face's or Mistral's, each tensor used exactly once.

    Args:
        where: the directory.
        dense: (E, K) where a dense model is to be read as a Mixtral with E copies of its FFN.

    Raises:
        UserError: what is missing, superfluous or of the wrong shape, by name.
    """

    def __init__(self, where: Path, dense: tuple[int, int] | None = None):
        self.where = where
        if dense is None and _is_mistrals(where):
            self.format = "mistral"
            model, balance, tied = architecture.read_mistral(where)
            if not sorted(where.glob("consolidated*.safetensors")) and sorted(where.glob("consolidated*.pt")):
                raise UserError(f"{where} holds .pt files, which only torch can read; fetch the safetensors instead")
            self._shards = Shards(where, "consolidated*.safetensors", "consolidated.safetensors.index.json")
        else:
            self.format = "huggingface" if dense is None else "dense"
            model, balance, tied = architecture.read_hugging_face(where, dense)
            self._shards = Shards(where, "model*.safetensors")
        self.size = layout.sizes(model)
        self._entries = layout.entries(self.format)
        if tied and self._entries["head_DV"].template not in self._shards.tensors:
            self._entries["head_DV"] = self._entries["embedding_VD"]
        self.letters = {name: entry.letters for name, entry in self._entries.items()}
        self._check()
        self.dtypes = self._parameter_dtypes()
        model = dataclasses.replace(model, dtype=architecture.compute_dtype(set(self.dtypes.values())))
        self.config = architecture.run_config(model, balance, self._tokenizer_spec(model.vocab_size))
        check_complete(model, {name: layout.parameter_shape(name, self.size) for name in self._entries})

    def block(self, name: str, block: Block) -> np.ndarray:
        entry = self._entries[name]
        rows = self._shards.read(layout.tensor_name(entry, block), layout.file_ranges(entry, block, self.size))
        return layout.to_parameter(name, entry, rows, self.size).astype(self.dtypes[name], copy=False)

    def tokenizer_file(self) -> Path | None:
        names = ("tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v3")
        return next((self.where / name for name in names if (self.where / name).is_file()), None)

    def _tokenizer_spec(self, vocab_size: int) -> str:
        """data.tokenizer: mistral-v1 where the file is that or there is none, else the file."""
        path, usual = self.tokenizer_file(), "mistral-v1"
        if path is None:
            return usual
        found = SentencePieceTokenizer(path.read_bytes(), str(path))
        if found.vocab_size > vocab_size:
            raise UserError(f"{path} has {found.vocab_size} ids and the model {vocab_size}; it is another model's")
        return usual if load_tokenizer(usual, "").fingerprint == found.fingerprint else str(path.resolve())

    def close(self) -> None:
        self._shards.close()

    def called(self, name: str) -> str:
        return f"{name} ({self._entries[name].template})" if name in self._entries else name

    def _tensors(self, name: str) -> list[str]:
        """The tensors that fill a parameter."""
        entry = self._entries[name]
        if not entry.template:
            return []
        layers, experts = layout.stacks(name, self.size)
        if self.format == "dense":
            experts = (None,)  # one tensor, copied to every expert
        return [layout.tensor_name(entry, Block(i, e, 0, 0)) for i in layers for e in experts]

    def _check(self) -> None:
        """Every tensor is used once, every parameter filled once, every shape right."""
        found, wanted = self._shards.tensors, {}
        uses = Counter()
        for name, entry in self._entries.items():
            for tensor in self._tensors(name):
                wanted[tensor] = layout.tensor_shape(entry, self.size)
                uses[tensor] += 1
        twice = [tensor for tensor, count in uses.items() if count > 1]
        if twice and self._entries["head_DV"] is not self._entries["embedding_VD"]:
            raise RuntimeError(f"layout.py uses {twice[0]} twice")
        problems = [f"missing {name} {list(wanted[name])}" for name in wanted if name not in found]
        problems += [f"unknown {name} {list(found[name][0])}" for name in found if name not in wanted]
        problems += [
            f"{name} is {list(found[name][0])} and the config makes it {list(wanted[name])}"
            for name in wanted
            if name in found and found[name][0] != wanted[name]
        ]
        if problems:
            more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise UserError(
                f"{self.where}: tensors and config do not fit together:\n"
                + "\n".join(f"  {p}" for p in problems[:12])
                + more
            )

    def _parameter_dtypes(self) -> dict[str, np.dtype]:
        """A parameter keeps its tensors' dtype; where they differ float32, which holds all three exactly."""
        result = {}
        for name in self._entries:
            kinds = {self._shards.tensors[tensor][1] for tensor in self._tensors(name)}
            result[name] = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        return result


def _is_mistrals(where: Path) -> bool:
    """Where both descriptions lie in a directory, the files of weights decide."""
    if (where / "params.json").is_file() and (where / "config.json").is_file():
        return not any(where.glob("model*.safetensors")) and any(where.glob("consolidated*"))
    return (where / "params.json").is_file()


class Ours(Weights):
    """A checkpoint of ours.

    Args:
        checkpoint: a step of a run.
        in_order: all blocks are to be read once, in the order of `blocks`. An imported checkpoint, whose chunks are
            those blocks, then needs no cache; training's checkpoints are cut otherwise.

    Raises:
        UserError: it is not of the model that config.json describes.
    """

    def __init__(self, checkpoint: Checkpoint, in_order: bool = True):
        self.workdir = checkpoint.folder
        self.where = self.workdir / "checkpoints" / str(checkpoint.step)
        self.config = from_config_dict(load_run(self.workdir))
        self.size = layout.sizes(self.config.model)
        entries = layout.entries("huggingface")
        folder = self.where / "params"
        metadata = json.loads((folder / "_METADATA").read_text())
        names = [".".join(item["key"] for item in v["key_metadata"]) for v in metadata["tree_metadata"].values()]
        cache = 0 if in_order and not (self.where / "opt_state").is_dir() else CACHE_BYTES
        context = ts.Context({"cache_pool": {"total_bytes_limit": cache}})
        self._arrays = {
            name: ts.open(self._spec(folder, name, metadata), read=True, context=context).result() for name in names
        }
        self.letters = {name: entries[name].letters if name in entries else "E" for name in names}
        self.dtypes = {name: np.dtype(array.dtype.numpy_dtype) for name, array in self._arrays.items()}
        wanted = {n: tuple(leaf.shape) for n, leaf in named_leaves(mixtral.abstract(self.config.model)).items()}
        stored = {name: tuple(array.shape) for name, array in self._arrays.items()}
        if stored != wanted:
            wrong = sorted(n for n in wanted.keys() | stored.keys() if wanted.get(n) != stored.get(n))
            lines = [f"  {n}: checkpoint {stored.get(n)}, config {wanted.get(n)}" for n in wrong]
            raise UserError(f"{folder} is not of the model in {self.workdir}/config.json:\n" + "\n".join(lines))

    @staticmethod
    def _spec(folder: Path, name: str, metadata: dict) -> dict:
        base = f"file://{folder.resolve()}/"
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        if metadata.get("use_ocdbt"):
            return {"driver": driver, "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
        return {"driver": driver, "kvstore": f"{base}{name}/"}

    def block(self, name: str, block: Block) -> np.ndarray:
        return self._arrays[name][layout.block_index(name, self.letters[name], block)].read().result()

    def tokenizer_file(self) -> Path | None:
        path = self.workdir / "tokenizer" / "tokenizer.model"
        return path if path.is_file() else None

    def close(self) -> None:
        self._arrays.clear()


def open_weights(where: str | Path) -> Weights:
    """Opens a checkpoint of any kind; a directory of others may be named with or without `hf:`.

    Raises:
        UserError: it is none that we know, or damaged.
    """
    foreign = not str(where).startswith(FOREIGN) and is_foreign(Path(where).expanduser())
    found = resolve_checkpoint(f"{FOREIGN}{where}" if foreign else where)
    return Foreign(found.folder) if found.step is None else Ours(found)


def as_float32(array: np.ndarray) -> np.ndarray:
    """Exact for the three dtypes there are."""
    return array.astype(np.float32) if array.dtype in (ml_dtypes.bfloat16, np.float16) else array
