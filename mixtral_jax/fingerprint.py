"""Fingerprints of arrays: does what was read back equal what was saved, bit for bit, on whatever mesh?

Storage is trusted with nothing: the fingerprint is taken from the arrays before a save and from the arrays after a
restore, so it covers the file system, compression and the restore's own cutting and joining of shards.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.sharding import named_leaves

GOLDEN = np.uint32(0x9E3779B1)  # 2^32 over the golden ratio, odd (Knuth's multiplicative hashing)
SEEDS = (np.uint32(0), np.uint32(0x243F6A88))


def fingerprints(tree) -> dict[str, str]:
    """Returns name -> 16 hexadecimal digits for every leaf.

    Two sums modulo 2^32 over the elements, each hashed with its place (MurmurHash3's finaliser, two seeds). Sums of
    integers do not depend on order, so any mesh gives the same. The hash is one to one, so no change of a single element
    can escape; others do with probability about 2^-64.
    """
    found = _sums(named_leaves(tree))
    return {name: "".join(f"{int(part):08x}" for part in pair) for name, pair in jax.device_get(found).items()}


class Partial:
    """The fingerprint of an array that is never whole in memory: the sum of its parts', which may come in any order."""

    def __init__(self, shape: tuple[int, ...]):
        self._shape, self._left, self._sums = shape, math.prod(shape), [0, 0]

    def add(self, part, start: tuple[int, ...]) -> None:
        """Counts a part; it has the array's number of dimensions and begins at `start`. No element may come twice."""
        pair = _part(part, jnp.asarray(start, jnp.uint32), self._shape)
        self._sums = [(old + int(new)) % 2**32 for old, new in zip(self._sums, jax.device_get(pair))]
        self._left -= part.size

    def text(self) -> str | None:
        """As `fingerprints` writes it; None until all elements have come."""
        return None if self._left else "".join(f"{part:08x}" for part in self._sums)


@jax.jit
def _sums(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: _pair(leaf) for name, leaf in leaves.items()}


def _pair(leaf) -> tuple[jax.Array, jax.Array]:
    leaf = jax.device_put(leaf, jax.memory.Space.Device)  # offloaded moments are in host memory
    return _part(leaf, jnp.zeros(leaf.ndim, jnp.uint32), leaf.shape)


@functools.partial(jax.jit, static_argnums=2)
def _part(part, start, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The two sums over a part of an array of `shape`."""
    if part.dtype == bool:
        part = part.astype(jnp.uint8)
    if part.dtype.itemsize > 4:
        raise ValueError(f"a leaf of {part.dtype}; a run's arrays have at most 4 bytes an element")
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[part.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(part, width).astype(jnp.uint32)
    place = jnp.zeros(part.shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis) + start[axis]
    return tuple(_mixed(bits + place * GOLDEN + seed).sum(dtype=jnp.uint32) for seed in SEEDS)


def _mixed(h):
    """The finaliser of MurmurHash3 (Appleby, 2011), a bijection of 32 bits in which every bit moves every other."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
