"""Directories of Hugging Face's or Mistral's: opened, checked to the last tensor, and read in blocks of ours."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np

from mixtral_jax.config import ModelConfig, UserError
from mixtral_jax.convert import architecture, layout
from mixtral_jax.convert.layout import Block
from mixtral_jax.convert.shards import Shards
from mixtral_jax.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from mixtral_jax.models import mixtral
from mixtral_jax.sharding import named_leaves


class Foreign:
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
        _check_complete(model, {name: layout.parameter_shape(name, self.size) for name in self._entries})

    def block(self, name: str, block: Block) -> np.ndarray:
        """See weights.Weights, as for the other methods."""
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
        # Old Llama files carry RoPE's frequencies, which follow from rope_theta: they are no weights.
        found = {name: is_ for name, is_ in self._shards.tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
        wanted = {}
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


def _check_complete(model: ModelConfig, filled: dict[str, tuple[int, ...]]) -> None:
    """The model itself is the authority on what parameters there are.

    Raises:
        RuntimeError: our own tables and the model disagree.
    """
    wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(mixtral.abstract(model)).items()}
    if wanted != filled:
        names = sorted(n for n in wanted.keys() | filled.keys() if wanted.get(n) != filled.get(n))
        raise RuntimeError(f"layout.py and models/mixtral.py disagree on {', '.join(names)}")
