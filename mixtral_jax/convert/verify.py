"""Compares two checkpoints of any kind, parameter by parameter, block by block."""

import dataclasses
from pathlib import Path

import numpy as np

from mixtral_jax.convert.transfer import Transfer
from mixtral_jax.convert.weights import Weights, all_blocks, as_float32, open_weights, ordered, total_bytes

# How we compute, not what the model is.
_IGNORED = {
    "dtype",
    "init_std",
    "scan_layers",
    "remat",
    "attention",
    "dispatch",
    "buffer_factor",
    "expert_backend",
    "expert_block",
}


@dataclasses.dataclass
class Difference:
    """What separates a parameter of A from B's: differing values of all, the largest difference, both dtypes."""

    differing: int = 0
    values: int = 0
    largest: float = 0.0
    dtypes: tuple[str, str] = ("", "")


def compare(first: Path, second: Path) -> tuple[dict[str, Difference], list[str]]:
    """Compares values as float32 (exact for bfloat16 and float16) and the architecture.

    Returns:
        per parameter its Difference; lines that say where the models' shapes or settings differ. Where shapes differ
        no values are compared.

    Raises:
        UserError: one of them is no checkpoint, or damaged.
    """
    a = open_weights(first)
    try:
        b = open_weights(second)
    except BaseException:
        a.close()
        raise
    try:
        lines = _settings(a, b)
        return ({} if a.size != b.size else _values(a, b)), lines
    finally:
        a.close()
        b.close()


def _settings(a: Weights, b: Weights) -> list[str]:
    left, right = vars(a.config.model), vars(b.config.model)
    return [f"{key}: {left[key]} and {right[key]}" for key in left if key not in _IGNORED and left[key] != right[key]]


def _values(a: Weights, b: Weights) -> dict[str, Difference]:
    result = {}
    with Transfer("verify", total_bytes(a)) as transfer:
        for name, block in all_blocks(a):
            if name not in b.dtypes:
                continue
            if name not in result:
                result[name] = Difference(dtypes=(a.dtypes[name].name, b.dtypes[name].name))
            found = result[name]
            x, y = as_float32(a.block(name, block)), as_float32(b.block(name, block))
            # Bits, so that NaN equals itself and 0.0 differs from -0.0.
            differs = x.view(np.uint32) != y.view(np.uint32)
            count = int(differs.sum())
            found.values += x.size
            found.differing += count
            if count:
                gap = float(np.abs(x[differs].astype(np.float64) - y[differs]).max())
                found.largest = max(found.largest, gap) if gap == gap else float("nan")
            transfer.advance(x.size * a.dtypes[name].itemsize)
    return result


def table(differences: dict[str, Difference], lines: list[str]) -> tuple[str, bool]:
    """Returns the report, and whether the two are equal."""
    rows = []
    for name in ordered(differences):
        d = differences[name]
        kinds = d.dtypes[0] if d.dtypes[0] == d.dtypes[1] else " / ".join(d.dtypes)
        verdict = f"{d.differing:,} differ, by at most {d.largest:.3g}" if d.differing else "equal"
        rows.append(f"  {name:<26} {kinds:<20} {d.values:>16,} values  {verdict}")
    rows += [f"  config: {line}" for line in lines]
    equal = not lines and bool(differences) and not any(d.differing for d in differences.values())
    rows.append("equal" if equal else "DIFFERENT")
    return "\n".join(rows), equal
