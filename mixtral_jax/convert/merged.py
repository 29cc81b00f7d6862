"""A LoRA run's checkpoint as plain weights, W + scale A B, merged block by block while they are read."""

from pathlib import Path

import jax
import numpy as np

from mixtral_jax import lora_base
from mixtral_jax.config import Config, UserError
from mixtral_jax.convert import layout
from mixtral_jax.convert.layout import Block
from mixtral_jax.convert.ours import explained, open_arrays
from mixtral_jax.fingerprint import Partial
from mixtral_jax.models import lora, mixtral
from mixtral_jax.models.layers import FLOAT32
from mixtral_jax.resolve import Checkpoint
from mixtral_jax.sharding import named_leaves

BIAS = "layers.router_bias_E"  # files of others have none; it is then zero
CACHE_BYTES = 64 * 2**20  # of the adapters' chunks: a block reads one expert's factors, and its neighbour the same


class Merged:
    """The weights of a LoRA run's base with the run's adapters in them; see weights.Weights.

    Like the training, it takes the base in the run's compute dtype. The sum is float32.

    Args:
        checkpoint: a step of a LoRA run.
        config: of that run.
        base: the opened base; it is closed with this.

    Attributes:
        base_dtypes: parameter -> dtype in which the base stores it.

    Raises:
        UserError: the adapters are damaged, or not of the model that config.json describes.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config, base):
        self.checkpoint, self.config, self._base = checkpoint, config, base
        self.where = checkpoint.folder / "checkpoints" / str(checkpoint.step)
        self.size, self.letters = base.size, base.letters
        self.base_dtypes = getattr(base, "base_dtypes", base.dtypes)
        self._pairs = {f"layers.{w}": ab for w, ab in lora.factors(config.lora).items()}
        self.dtypes = dict(base.dtypes) | dict.fromkeys(self._pairs, np.dtype(np.float32))
        folder = self.where / "params"
        with explained(folder):
            self._factors = open_arrays(folder, CACHE_BYTES)
        self._check_shapes()
        self._said = lora_base.meta(checkpoint).get("frozen")
        names = base.dtypes if self._said else ()
        self._seen = {name: Partial(layout.parameter_shape(name, self.size)) for name in names}

    def _check_shapes(self) -> None:
        model, adapters = mixtral.abstract(self.config.model), lora.abstract(self.config.model, self.config.lora)
        leaves = named_leaves(model) | named_leaves(adapters)
        wanted = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        stored = {name: tuple(array.shape) for name, array in self._factors.items()}
        stored |= {name: layout.parameter_shape(name, self.size) for name in self._base.dtypes}
        wrong = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
        lines = [f"  {name}: stored {stored.get(name)}, config {wanted.get(name)}" for name in wrong if name != BIAS]
        if lines:
            raise UserError(
                f"the adapters in {self.where} and their base {self._base.where} are not of the model in "
                f"{self.checkpoint.folder}/config.json:\n" + "\n".join(lines[:12])
            )

    def block(self, name: str, block: Block) -> np.ndarray:
        """Reads a block and merges it."""
        values = self._base.block(name, block)
        kind = "float32" if name.rpartition(".")[2] in FLOAT32 else self.config.model.dtype
        held = values.astype(kind, copy=False)
        self._note(name, block, held)
        if name not in self._pairs:
            return values
        with explained(self.where):
            a, b = (self._factor(f"layers.{factor}", name, block) for factor in self._pairs[name])
        merged = np.tensordot(a, b, axes=1)  # in place from here: blocks are large, and several are in flight
        merged *= np.float32(lora.scale(self.config.lora))
        merged += held
        return merged

    def _factor(self, factor: str, name: str, block: Block) -> np.ndarray:
        """The part of A or B that a block of W needs: the same layer, expert and range, where it has that letter."""
        index = layout.block_index(factor, self.letters[name], block)
        return self._factors[factor][index].read().result().astype(np.float32)

    def _note(self, name: str, block: Block, held: np.ndarray) -> None:
        if name not in self._seen:
            return
        index = layout.block_index(name, self.letters[name], block)
        start = tuple((one if isinstance(one, int) else one.start or 0) for one in index)
        part = held.reshape((1,) * (len(start) - held.ndim) + held.shape)
        self._seen[name].add(part, start)

    def check_base(self) -> None:
        """After all blocks were read once: compares the base with what it was in training.

        Raises:
            UserError: it is another one.
        """
        if isinstance(self._base, Merged):
            self._base.check_base()
        if self._said:
            now = {name: seen.text() for name, seen in self._seen.items() if seen.text() is not None}
            lora_base.refuse_changed(self.checkpoint, self.config, self._said, now)

    def tokenizer_file(self) -> Path | None:
        path = self.checkpoint.folder / "tokenizer" / "tokenizer.model"
        return path if path.is_file() else None

    def called(self, name: str) -> str:
        return name

    def close(self) -> None:
        self._factors.clear()
        self._base.close()


class Chance:
    """The random model of train.seed, which a LoRA run without train.init_from is based on; see weights.Weights.

    It is made whole in memory, for there is nowhere to read it from.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config):
        self.where, self.config, self.size = checkpoint.folder, config, layout.sizes(config.model)
        model = jax.jit(lambda key: mixtral.init(config.model, key))(jax.random.key(config.train.seed))
        self._arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}
        entries = layout.entries("huggingface")
        self.letters = {name: entries[name].letters if name in entries else "E" for name in self._arrays}
        self.dtypes = {name: array.dtype for name, array in self._arrays.items()}

    def block(self, name: str, block: Block) -> np.ndarray:
        return self._arrays[name][layout.block_index(name, self.letters[name], block)]

    def tokenizer_file(self) -> None:
        return None

    def called(self, name: str) -> str:
        return name

    def close(self) -> None:
        self._arrays.clear()
