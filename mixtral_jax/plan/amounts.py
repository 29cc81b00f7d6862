"""Bytes that a device receives: of one collective, divided among mesh axes, and summed over a step."""

import math
from collections.abc import Iterable
from typing import Protocol


class Amount(Protocol):
    """What formulas and compiled modules say of a collective."""

    axes: tuple[str, ...]
    bytes: float  # that a device receives each time
    times: int  # how often a step runs it


def moved(kind: str, result: int, n: int) -> float:
    """Bytes that one of n devices receives, from the bytes of the collective's result on one device.

    An all-reduce is a reduce-scatter and an all-gather (the ring algorithm, and the bound of any).
    """
    if kind == "reduce-scatter":
        return float(result * (n - 1))
    if kind == "collective-permute":
        return float(result)
    return result * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def by_axis(found: Iterable[Amount], sizes: dict[str, int]) -> dict[str, float]:
    """Bytes a device receives in a step over each mesh axis of more than one device."""
    total = {axis: 0.0 for axis, size in sizes.items() if size > 1}
    for one in found:
        for axis, amount in split(one.axes, one.bytes * one.times, sizes).items():
            total[axis] += amount
    return total


def split(axes: tuple[str, ...], amount: float, sizes: dict[str, int]) -> dict[str, float]:
    """Divides a collective's bytes among its axes, as if it ran axis by axis, the last (the nearest devices) first.

    With n and m devices: (nm - 1) / nm = (m - 1) / m + (n - 1) / nm.
    """
    n = math.prod(sizes[axis] for axis in axes)
    whole, left = amount * n / max(n - 1, 1), 1.0
    parts = {}
    for axis in reversed(axes):
        parts[axis] = whole * left * (sizes[axis] - 1) / sizes[axis]
        left /= sizes[axis]
    return parts
