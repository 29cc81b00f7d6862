"""Which tensor of a file is which part of which parameter, and in what order its dimensions lie.

A file's matrix is [rows, columns]; `letters` says what they are, in the legend of docs/design.md: "NH D" is a matrix of
N*H rows and D columns. A parameter's own order is in its name. Nothing here reads or writes anything.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.sharding import suffix

BLOCK_BYTES = 32 * 2**20  # in float32; a block is what is in memory at a time, and one chunk of our checkpoints
FORMATS = ("huggingface", "mistral", "dense")

# parameter -> the rest of the tensor's name in Hugging Face's files, in Mistral's, in a dense model's, and its letters
_PARTS = {
    "attention_norm_D": ("input_layernorm", "attention_norm", None, "D"),
    "w_q_DNH": ("self_attn.q_proj", "attention.wq", None, "NH D"),
    "w_k_DGH": ("self_attn.k_proj", "attention.wk", None, "GH D"),
    "w_v_DGH": ("self_attn.v_proj", "attention.wv", None, "GH D"),
    "w_o_NHD": ("self_attn.o_proj", "attention.wo", None, "D NH"),
    "experts_norm_D": ("post_attention_layernorm", "ffn_norm", None, "D"),
    "w_router_DE": ("block_sparse_moe.gate", "feed_forward.gate", "", "E D"),
    "w_gate_EDF": ("block_sparse_moe.experts.{e}.w1", "feed_forward.experts.{e}.w1", "mlp.gate_proj", "F D"),
    "w_down_EFD": ("block_sparse_moe.experts.{e}.w2", "feed_forward.experts.{e}.w2", "mlp.down_proj", "D F"),
    "w_up_EDF": ("block_sparse_moe.experts.{e}.w3", "feed_forward.experts.{e}.w3", "mlp.up_proj", "F D"),
}
_ENDS = {
    "embedding_VD": ("model.embed_tokens", "tok_embeddings", "V D"),
    "final_norm_D": ("model.norm", "norm", "D"),
    "head_DV": ("lm_head", "output", "V D"),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours in a format's files. `template` holds {i} for the layer and {e} for the expert.

    An empty template means that the format has no such tensor (a dense model has no router).
    """

    template: str
    letters: str
    interleaved: bool = False  # RoPE pairs rows (2i, 2i + 1) of a head instead of ours, (i, i + H/2)


class Block(NamedTuple):
    """A part of a parameter: of one layer (None: not stacked), one expert (None: has none), a range of its first letter.

    A shard may hold a part of the columns too: `columns` is a range of the first letter of the file's second group.
    """

    layer: int | None
    expert: int | None
    start: int
    stop: int
    columns: tuple[int, int] | None = None  # None: all, or a vector


def entries(format: str) -> dict[str, Entry]:
    """Returns the table of a format: parameter name -> Entry, in the order in which Hugging Face writes files."""
    which = FORMATS.index(format)
    prefix = "layers.{i}." if format == "mistral" else "model.layers.{i}."
    table = {}
    for name, (*paths, letters) in _PARTS.items():
        path = paths[0] if paths[which] is None else paths[which]
        rotated = format == "mistral" and name in ("w_q_DNH", "w_k_DGH")
        table[f"layers.{name}"] = Entry(f"{prefix}{path}.weight" if path else "", letters, rotated)
    ends = {name: Entry(f"{paths[format == 'mistral']}.weight", letters) for name, (*paths, letters) in _ENDS.items()}
    return {"embedding_VD": ends.pop("embedding_VD")} | table | ends


def sizes(config: ModelConfig) -> dict[str, int]:
    """The size behind each letter."""
    c = config
    return {
        "L": c.num_layers,
        "D": c.d_model,
        "N": c.num_heads,
        "G": c.num_kv_heads,
        "H": c.head_dim,
        "F": c.d_ff,
        "E": c.num_experts,
        "V": c.vocab_size,
    }


def _dims(letters: str, size: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size[letter] for letter in letters if letter != " ")


def tensor_shape(entry: Entry, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of the tensor in the file: a vector or a matrix."""
    return tuple(math.prod(_dims(group, size)) for group in entry.letters.split(" "))


def parameter_shape(name: str, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a parameter of ours, its stacked layers in front."""
    stacked = (size["L"],) if name.startswith("layers.") else ()
    return stacked + _dims(suffix(name), size)


def stacks(name: str, size: Mapping[str, int]) -> tuple[range | tuple[None], range | tuple[None]]:
    """The layers and the experts of a parameter, which are tensors of their own in files; (None,) where it has none."""
    has_experts = suffix(name)[0] == "E" and len(suffix(name)) > 1
    return (range(size["L"]) if name.startswith("layers.") else (None,), range(size["E"]) if has_experts else (None,))


def tensor_name(entry: Entry, block: Block) -> str:
    """The tensor in the file that holds a block."""
    return entry.template.format(i=block.layer, e=block.expert)


def _own_letters(name: str) -> str:
    """A parameter's letters without those that a block has one of (L is not in the name, E of an expert's matrix is)."""
    letters = suffix(name)
    return letters[1:] if letters[0] == "E" and len(letters) > 1 else letters


def step(name: str, letters: str, size: Mapping[str, int]) -> int:
    """How much of the first letter goes into one block."""
    whole = math.prod(_dims(_own_letters(name), size)) * 4
    return max(1, min(size[letters[0]], BLOCK_BYTES * size[letters[0]] // whole))


def blocks(name: str, letters: str, size: Mapping[str, int]) -> Iterator[Block]:
    """Cuts a parameter into blocks, tensor after tensor."""
    layers, experts = stacks(name, size)
    width = step(name, letters, size)
    for i in layers:
        for e in experts:
            for start in range(0, size[letters[0]], width):
                yield Block(i, e, start, min(start + width, size[letters[0]]))


def block_index(name: str, letters: str, block: Block) -> tuple[int | slice, ...]:
    """Where a block lies in the parameter, as an index."""
    lead = tuple(i for i in (block.layer, block.expert) if i is not None)
    first, second = (*(group[0] for group in letters.split(" ")), None)[:2]
    cut = {first: slice(block.start, block.stop)}
    if block.columns is not None:
        cut[second] = slice(*block.columns)
    return lead + tuple(cut.get(letter, slice(None)) for letter in _own_letters(name))


def chunk_shape(name: str, letters: str, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape in which a parameter is stored: one block a chunk, so that writing never reads."""
    layers, experts = stacks(name, size)
    lead = [1 for stack in (layers, experts) if stack != (None,)]
    width = step(name, letters, size)
    return (*lead, *(width if letter == letters[0] else size[letter] for letter in _own_letters(name)))


def shard_blocks(
    name: str, letters: str, size: Mapping[str, int], part: tuple[tuple[int, int], ...]
) -> Iterator[tuple[Block, tuple[int, ...]]]:
    """Cuts a shard of a parameter into blocks.

    Args:
        name, letters: of the parameter, and of the file's tensor.
        size: letter -> size.
        part: the shard, (begin, end) of each dimension of the parameter.

    Yields:
        a block, and where it begins in the shard, a number for each dimension.

    Raises:
        ValueError: the shard is cut along a letter inside a group, whose parts are no ranges of rows or columns.
    """
    has_layers, has_experts = (stack != (None,) for stack in stacks(name, size))
    order = "L" * has_layers + suffix(name)
    bounds = dict(zip(order, part, strict=True))
    first, second = (*(group[0] for group in letters.split(" ")), None)[:2]
    ranges = {first, second} | set("L" * has_layers + "E" * has_experts)
    if cut := [letter for letter in order if letter not in ranges and bounds[letter] != (0, size[letter])]:
        raise ValueError(f"{name}: a shard cut along {', '.join(cut)} is no range of rows and columns")
    row = math.prod(bounds[letter][1] - bounds[letter][0] for letter in _own_letters(name) if letter != first)
    width = max(1, BLOCK_BYTES // (4 * row))
    begin, end = bounds[first]
    for i in range(*bounds["L"]) if has_layers else (None,):
        for e in range(*bounds["E"]) if has_experts else (None,):
            for start in range(begin, end, width):
                at = {"L": i, "E": e, first: start}
                where = tuple(at[letter] - bounds[letter][0] if at.get(letter) is not None else 0 for letter in order)
                yield Block(i, e, start, min(start + width, end), bounds[second] if second else None), where


def file_ranges(entry: Entry, block: Block, size: Mapping[str, int]) -> tuple[slice, ...]:
    """The rows, and of a matrix the columns, of the file's tensor that a block holds; a head's rows stay together."""
    ranges = []
    for group, bounds in zip(entry.letters.split(" "), ((block.start, block.stop), block.columns)):
        inner = math.prod(_dims(group[1:], size))
        ranges.append(slice(None) if bounds is None else slice(bounds[0] * inner, bounds[1] * inner))
    return tuple(ranges)


def to_parameter(name: str, entry: Entry, rows: np.ndarray, size: Mapping[str, int]) -> np.ndarray:
    """Turns a part of a file's tensor into a block of our parameter: same dtype, contiguous, in the name's order."""
    letters = entry.letters.replace(" ", "")
    dims = []
    for group, length in zip(entry.letters.split(" "), rows.shape, strict=True):
        inner = _dims(group[1:], size)
        dims += [length // math.prod(inner), *inner]
    array = rows.reshape(dims)
    if entry.interleaved:  # [N, H, D]: rows (pair, first or second) -> (first or second, pair)
        n, h, d = array.shape
        array = array.reshape(n, h // 2, 2, d).swapaxes(1, 2).reshape(n, h, d)
    return np.ascontiguousarray(array.transpose([letters.index(letter) for letter in _own_letters(name)]))


def to_rows(name: str, entry: Entry, block: np.ndarray) -> np.ndarray:
    """The inverse of `to_parameter`: a block of ours as rows of the file's tensor. Hugging Face's order only."""
    own, groups = _own_letters(name), entry.letters.split(" ")
    array = block.transpose([own.index(letter) for letter in "".join(groups)])
    lead = math.prod(array.shape[: len(groups[0])])
    return np.ascontiguousarray(array.reshape((lead, -1) if len(groups) == 2 else (lead,)))
