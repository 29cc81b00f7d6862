"""A checkpoint -> a Hugging Face directory that transformers and vLLM load like the original."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mixtral_jax.config import UserError
from mixtral_jax.convert import architecture, layout, store
from mixtral_jax.convert.shards import CODES, Planned, plan_shards, write_index, write_shard
from mixtral_jax.convert.tokenizer_json import write_tokenizer
from mixtral_jax.convert.transfer import Transfer
from mixtral_jax.convert.weights import BIAS, Weights, check_base, open_weights, written_dtypes
from mixtral_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from mixtral_jax.remote import is_remote

logger = logging.getLogger(__name__)


def export_checkpoint(source: Path, target: Path, dtype: str | None, max_shard_bytes: int) -> list[str]:
    """Writes safetensors shards with their index, config.json, generation_config.json and the tokenizer.

    Args:
        source: a checkpoint of ours (or a foreign directory, to change its format, dtype or shards).
        target: the new directory.
        dtype: bfloat16 or float32; None keeps each parameter's stored dtype, which loses nothing. Of a LoRA run the
            merged weights are written, by default each rounded once to the dtype in which the base stores it.
        max_shard_bytes: the size of a file; a larger tensor has one of its own.

    Returns:
        the names of the shards.

    Raises:
        UserError: the source is damaged, cannot be said in Hugging Face's format, or the target exists or is on an object store.
    """
    if is_remote(target):
        raise UserError(
            f"--to={target}: the files are written in place, which an object store does not do; export into a folder of this machine "
            f"and copy it (gs://: gcloud storage cp -r FOLDER {target})"
        )
    with store.new_directory(target) as folder:
        weights = open_weights(source)
        try:
            _refuse_bias(weights)
            tensors = _tensors(weights, None if dtype is None else np.dtype(dtype))
            files = plan_shards(tensors, max_bytes=max_shard_bytes)
            with Transfer("export", sum(tensor.nbytes for tensor in tensors)) as transfer:
                for name, group in files.items():
                    write_shard(folder / name, group, transfer.advance)
            check_base(weights)
            write_index(folder, files)
            _describe(weights, folder, dtype)
        finally:
            weights.close()
    return list(files)


def _refuse_bias(weights: Weights) -> None:
    """Files have no place for the router's bias; leaving it out changes which experts are chosen."""
    if BIAS not in weights.dtypes:
        return
    blocks = layout.blocks(BIAS, weights.letters[BIAS], weights.size)
    if any(weights.block(BIAS, block).any() for block in blocks):
        raise UserError(
            f"{weights.where} has a router bias (model.router_bias) and Hugging Face's Mixtral has none; without it the model "
            "would choose other experts"
        )


def _tensors(weights: Weights, dtype: np.dtype | None) -> list[Planned]:
    """All tensors to be written, layer by layer, as transformers orders them."""
    entries = layout.entries("huggingface")
    first, *inner, norm, head = entries
    planned, dtypes = [], written_dtypes(weights)

    def add(name: str, layer: int | None, expert: int | None):
        kind = dtype or dtypes[name]
        parts = _parts(weights, name, entries[name], layer, expert, kind)
        tensor = layout.tensor_name(entries[name], layout.Block(layer, expert, 0, 0))
        planned.append(Planned(tensor, layout.tensor_shape(entries[name], weights.size), kind, parts))

    add(first, None, None)
    for layer in range(weights.size["L"]):
        for name in inner:
            for expert in layout.stacks(name, weights.size)[1]:
                add(name, layer, expert)
    add(norm, None, None)
    add(head, None, None)
    return planned


def _parts(weights: Weights, name: str, entry: layout.Entry, layer, expert, dtype: np.dtype) -> Callable:
    width = layout.step(name, entry.letters, weights.size)
    total = weights.size[entry.letters[0]]

    def parts():
        for start in range(0, total, width):
            block = layout.Block(layer, expert, start, min(start + width, total))
            yield layout.to_rows(name, entry, weights.block(name, block)).astype(dtype, copy=False)

    return parts


def _describe(weights: Weights, folder: Path, dtype: str | None) -> None:
    """The files beside the weights."""
    bos, eos = 1, 2
    tokenizer = weights.tokenizer_file()
    if tokenizer is not None:
        model = tokenizer.read_bytes()
        found = SentencePieceTokenizer(model, str(tokenizer))
        bos, eos = found.bos_id, found.eos_id
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        reason = write_tokenizer(folder, model, weights.config.model.max_seq_len)
        if reason:
            logger.warning("no tokenizer.json was written: %s", reason)
    else:
        logger.warning("%s has no tokenizer.model: the export has no tokenizer", weights.where)
        if weights.config.data.tokenizer == "bytes":
            bos, eos = ByteTokenizer.bos_id, ByteTokenizer.eos_id
    config, generation = architecture.to_hugging_face(weights.config, dtype or _common_dtype(weights), bos, eos)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _common_dtype(weights: Weights) -> str:
    """The dtype of most bytes: what config.json calls the model's."""
    total = dict.fromkeys(CODES, 0)
    for name, dtype in written_dtypes(weights).items():
        total[dtype] += int(np.prod(layout.parameter_shape(name, weights.size)))
    return max(total, key=total.get).name
