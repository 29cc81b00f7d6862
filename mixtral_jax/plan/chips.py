"""The chips there are, and the topologies they come in: data sheets, names, and how fast each mesh axis is on them."""

import dataclasses
import math
import re

import numpy as np

from mixtral_jax.config import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as jax sees it. Bandwidths in bytes/s, in one direction; peaks are dense bf16 FLOP/s."""

    platform: str  # tpu | gpu
    hbm_bytes: int  # what a program may use, less what the runtime keeps
    hbm_bandwidth: float
    peak_flops: float
    link: float  # of one link of the torus (tpu), or of all NVLinks together (gpu)
    network: float  # beyond the torus or the node, for each chip
    torus: int = 0  # dimensions of the torus
    wraps_from: int = 0  # a dimension of the torus has its wrap-around link where it is a multiple of this
    node: int = 0  # GPUs of a node


# TPU: cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e (peak, HBM, bandwidth; "interchip interconnect" is the sum of
# all links and both directions); one link, one direction, and the network's share of a chip as in
# jax-ml.github.io/scaling-book, "How to think about TPUs". hbm_bytes is what the compiler of libtpu 0.0.42 allows.
# GPU: NVIDIA's data sheets; peaks without sparsity; NVLink is half of the quoted sum; network: one 400 Gb/s port for each
# H100, H200 or B200, 200 Gb/s for an A100, as in DGX systems. A tenth of the memory is left to the driver and NCCL.
CHIPS = {
    "v4": Chip("tpu", int(31.25 * GIB), 1.2e12, 275e12, 45e9, 6.25e9, torus=3, wraps_from=4),
    "v5e": Chip("tpu", int(15.75 * GIB), 8.1e11, 197e12, 45e9, 3.125e9, torus=2, wraps_from=16),
    "v5p": Chip("tpu", int(95.74 * GIB), 2.765e12, 459e12, 90e9, 6.25e9, torus=3, wraps_from=4),
    "v6e": Chip("tpu", int(31.25 * GIB), 1.64e12, 918e12, 90e9, 12.5e9, torus=2, wraps_from=16),
    "a100": Chip("gpu", int(0.9 * 80e9), 2.039e12, 312e12, 300e9, 25e9, node=8),
    "h100": Chip("gpu", int(0.9 * 80e9), 3.35e12, 989e12, 450e9, 50e9, node=8),
    "h200": Chip("gpu", int(0.9 * 141e9), 4.8e12, 989e12, 450e9, 50e9, node=8),
    "b200": Chip("gpu", int(0.9 * 180e9), 8.0e12, 2250e12, 900e9, 50e9, node=8),
}
EXAMPLES = (
    "v4:4x4x4, v5e:16x16, v5p:4x4x4, v5p:8x8x16, v6e:16x16, h100:8x8 (8 nodes of 8), h200:16x8, a100:4x8, b200:8x8"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips and how they are wired: dimensions of a TPU torus, or nodes x GPUs."""

    name: str
    chip_name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Chips in all."""
        return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
    """Reads `v5p:4x4x4` (a torus of TPUs) or `h100:8x8` (8 nodes of 8 GPUs).

    Raises:
        UserError: no such chip, or a shape it does not come in.
    """
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.strip().lower())
    if not found or found[1] not in CHIPS:
        raise UserError(f"--topology={name!r} is not known; write CHIP:SHAPE, for example {EXAMPLES}")
    chip = CHIPS[found[1]]
    shape = tuple(int(n) for n in found[2].split("x"))
    want = chip.torus if chip.platform == "tpu" else 2
    if len(shape) != want or 0 in shape:
        kind = f"a torus of {want} dimensions" if chip.platform == "tpu" else "NODESxGPUS"
        raise UserError(f"--topology={name}: {found[1]} comes as {kind} and {found[2]} has {len(shape)} numbers")
    if chip.platform == "gpu" and shape[1] > chip.node:
        raise UserError(
            f"--topology={name}: a node has {chip.node} GPUs and {shape[1]} were asked for; write NODESxGPUS"
        )
    return Topology(name.strip().lower(), found[1], chip, shape)


def axis_extents(topology: Topology, coordinates) -> dict[int, list[int]]:
    """How far each mesh axis reaches along each physical dimension.

    Args:
        topology: the chips.
        coordinates: int array [*mesh shape, dimensions], the place of each device of the mesh.

    Returns:
        for each mesh axis by index, the number of distinct places along each physical dimension.
    """
    extents = {}
    for axis in range(coordinates.ndim - 1):
        line = coordinates[tuple(slice(None) if i == axis else 0 for i in range(coordinates.ndim - 1))]
        extents[axis] = [len(np.unique(line[:, d])) for d in range(line.shape[1])]
    return extents


def gpu_coordinates(topology: Topology, shape: tuple[int, ...]):
    """Node and place in the node of each device of a mesh in plain order, the last axis fastest."""
    index = np.arange(topology.num_devices).reshape(shape)
    return np.stack([index // topology.shape[1], index % topology.shape[1]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Wire:
    """What moves the bytes of one mesh axis, in bytes/s into a device."""

    bandwidth: float  # of gathers, scatters and reductions
    all_to_all: float  # of exchanges of every device with every other
    text: str


def wire(topology: Topology, extents: list[int]) -> Wire:
    """The bandwidth of a mesh axis from its reach along the physical dimensions.

    Torus: a gather along k dimensions uses 2k links where they wrap around, k where they do not. An all-to-all is bound by
    its bisection: if each of n devices sends S bytes, n S / 4 cross the middle of a dimension of extent d in each direction,
    over n / d lines with one link each, two where they wrap. GPUs: NVLink inside a node, and a device's own share of the
    network as soon as an axis leaves it; both are switched, so that an all-to-all costs what its bytes cost.
    """
    chip = topology.chip
    if chip.platform == "gpu":
        speed, text = (chip.network, "network") if extents[0] > 1 else (chip.link, "NVLink")
        return Wire(speed, speed, text)
    links = {
        d: 2 if extents[d] == size and size % chip.wraps_from == 0 else 1
        for d, size in enumerate(topology.shape)
        if extents[d] > 1
    }
    if not links:
        return Wire(chip.link, chip.link, "one link")
    n = math.prod(extents)
    slowest = max(extents[d] / (4 * count) for d, count in links.items())
    count = sum(links.values())
    text = f"{count} link{'s' if count > 1 else ''} along {' x '.join(str(extents[d]) for d in links)}"
    return Wire(count * chip.link, chip.link / slowest * (n - 1) / n, text)
