"""Files of Hugging Face's or Mistral's -> a workdir of ours; a Mixtral made from a dense model; a LoRA run's merged weights."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from mixtral_jax.config import Config, UserError
from mixtral_jax.convert import layout, store
from mixtral_jax.convert.foreign import Foreign
from mixtral_jax.convert.merged import Merged
from mixtral_jax.convert.transfer import Transfer
from mixtral_jax.convert.weights import BIAS, as_float32, open_weights, total_bytes
from mixtral_jax.resolve import FOREIGN, resolve_checkpoint

ROUTER = "layers.w_router_DE"
EXPERTS = ("layers.w_gate_EDF", "layers.w_up_EDF", "layers.w_down_EFD")


def import_checkpoint(source: Path, target: Path) -> Config:
    """Imports a directory. Parameters keep their dtype in the checkpoint and are float32 once restored.

    Returns:
        the configuration stored with the checkpoint.

    Raises:
        UserError: the source is incomplete, damaged or of another architecture, or the target exists.
    """
    with store.new_directory(target) as folder:
        weights = open_weights(source)
        if not isinstance(weights, Foreign):
            raise UserError(f"{source} is a checkpoint of ours already")
        try:
            return _write(weights, weights.block, folder, "import")
        finally:
            weights.close()


def upcycle(
    source: Path, target: Path, experts: int, chosen: int, noise: float, router_std: float, seed: int
) -> Config:
    """Makes a Mixtral of a dense Mistral or Llama: every expert is a copy of its FFN (sparse upcycling, arXiv 2212.05055).

    The gates of a token sum to one, so without noise the logits are the dense model's, whatever the router does.

    Args:
        source: a dense model's directory.
        target: the new workdir.
        experts, chosen: E and K.
        noise: standard deviation of what is added to experts' weights, as a share of each block's own.
        router_std: standard deviation of the router's random weights; 0 would send all tokens to the same experts.
        seed: of the router and the noise.

    Raises:
        UserError: as for import_checkpoint, or impossible numbers.
    """
    if not 1 <= chosen <= experts:
        raise UserError(f"--experts_per_token={chosen} must lie between 1 and --experts={experts}")
    if not (0 <= noise <= 10 and 0 < router_std <= 10):
        raise UserError(
            f"--noise={noise} must lie in [0, 10] and --router_std={router_std} in (0, 10]; usual: 0 and 0.02"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed} must lie between 0 and {2**32 - 1}")

    with store.new_directory(target) as folder:
        dense = Foreign(resolve_checkpoint(FOREIGN + str(source).removeprefix(FOREIGN)).folder, (experts, chosen))

        def read(name: str, block: layout.Block) -> np.ndarray:
            dtype = dense.dtypes[name]
            # A stream of its own for every block: the result does not depend on the order of reading.
            key = (seed, list(dense.dtypes).index(name), block.layer or 0, block.expert or 0, block.start)
            rng = np.random.default_rng(key)
            if name == ROUTER:
                shape = dense.size["D"], block.stop - block.start
                return (router_std * rng.standard_normal(shape, np.float32)).astype(dtype)
            values = dense.block(name, block)
            if noise == 0 or name not in EXPERTS:
                return values
            exact = as_float32(values)
            return (exact + noise * exact.std() * rng.standard_normal(exact.shape, np.float32)).astype(dtype)

        try:
            return _write(dense, read, folder, "upcycle")
        finally:
            dense.close()


def merge(source: Path, target: Path, dtype: str | None) -> Config:
    """Writes the plain weights of a LoRA run, W + scale A B, as a checkpoint that needs no base.

    Args:
        source: a checkpoint of a LoRA run.
        target: the new workdir.
        dtype: of all parameters; None keeps the base's stored dtypes, and float32 where adapters were merged.

    Raises:
        UserError: the source has no adapters, its base is missing or has changed, or the target exists.
    """
    with store.new_directory(target) as folder:
        weights = open_weights(source)
        try:
            if not isinstance(weights, Merged):
                raise UserError(f"{source} has no adapters to merge; lora.rank is 0 in its configuration")
            dtypes = weights.dtypes if dtype is None else dict.fromkeys(weights.dtypes, np.dtype(dtype))

            def read(name: str, block: layout.Block) -> np.ndarray:
                return weights.block(name, block).astype(dtypes[name], copy=False)

            c = weights.config
            config = dataclasses.replace(
                c,
                model=dataclasses.replace(c.model, router_bias=BIAS in weights.dtypes),
                lora=dataclasses.replace(c.lora, rank=0),
                train=dataclasses.replace(c.train, init_from=""),
            )
            tokenizer = weights.tokenizer_file()
            with Transfer("merge", total_bytes(weights)) as transfer:
                store.write_workdir(folder, config, dtypes, weights.letters, read, tokenizer, transfer.advance)
            weights.check_base()
            other = weights.checkpoint.folder / "tokenizer"
            if tokenizer is None and other.is_dir():  # of bytes, which no file of others has
                shutil.copytree(other, folder / "tokenizer")
        finally:
            weights.close()
    return config


def _write(weights: Foreign, read, folder: Path, title: str) -> Config:
    config, tokenizer = weights.config, weights.tokenizer_file()
    with Transfer(title, total_bytes(weights)) as transfer:
        store.write_workdir(folder, config, weights.dtypes, weights.letters, read, tokenizer, transfer.advance)
    return config
