"""Out of memory, explained: what was asked for, what fills a device, and which keys would help most."""

import contextlib
import dataclasses
import errno
import math
import os
import re
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding

from mixtral_jax import backends
from mixtral_jax.config import AXES, Config, MeshConfig, ModelConfig, RunError, UserError, resolve_mesh, validate
from mixtral_jax.models import lora, mixtral
from mixtral_jax.preference import runs_reference
from mixtral_jax.sharding import named_leaves, tree_shardings

GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = r"([\d.]+)\s*([KMGTP]?)(?:i?B|\b)(?:ytes)?"
# What XLA says on CPUs, GPUs and TPUs, compiling and running; the first group of each is what was asked for.
_ASKED = (
    rf"out of memory (?:while trying to allocate|allocating|trying to allocate) {_SIZE}",
    rf"ran out of memory in memory space hbm\. used {_SIZE} of",
    rf"required for hlo temporaries \({_SIZE}\)",
    rf"attempting to (?:allocate|reserve) {_SIZE}",
    rf"failed to allocate (?:request for )?{_SIZE}",
    rf"unable to allocate {_SIZE} for an array",
)
_FREE = (rf"there are {_SIZE} free",)
_CAPACITY = (rf"used [\d.]+[KMGTP]? of {_SIZE} hbm", rf"exceeds available hbm \({_SIZE}\)")
_IS_OOM = re.compile(
    r"out of memory|ran out of memory|failed to allocate|that was not possible|bad_alloc|unable to allocate", re.I
)
_NOT_OURS = re.compile(r"memory space (smem|vmem|sflag)", re.I)  # a kernel's scratch memory; no key of ours changes it


class Available(NamedTuple):
    """Memory of one device in bytes; None where it is not known."""

    platform: str  # cpu, gpu or tpu
    limit: int | None
    free: int | None


def is_oom(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a device or on the host, at compile time or at run time."""
    if isinstance(error, UserError | RunError):
        return False  # explained already
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error)
    return isinstance(error, RuntimeError | ValueError) and bool(_IS_OOM.search(text)) and not _NOT_OURS.search(text)


def available(device: jax.Device | None = None) -> Available:
    """What a device has: its allocator's limit; on a CPU the machine's memory or the process's limit."""
    device = device or jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and stats.get("bytes_limit"):
        return Available(device.platform, stats["bytes_limit"], stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    if device.platform != "cpu":
        return Available(device.platform, None, None)
    limit = host_limit()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Available("cpu", limit, _host_free() if limit == total else None)


def host_limit() -> int:
    """Bytes this process may use on the host: the least of the machine's memory, its container's and its own limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    if own != resource.RLIM_INFINITY:
        limits.append(own)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such version of cgroups, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


def _host_free() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return None


def state_bytes(state, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Bytes of each array of a state on one device, by name.

    Args:
        state: arrays (also ones that were donated) or ShapeDtypeStructs, with their shardings.
        sizes: mesh axis -> size, to ask what another mesh would take; None: the mesh they are on.
    """

    def size(leaf) -> int:
        parts = 1
        if isinstance(leaf.sharding, NamedSharding):
            shape = leaf.sharding.mesh.shape if sizes is None else sizes
            for axes in leaf.sharding.spec:
                parts *= math.prod(shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
        return math.prod(leaf.shape) * leaf.dtype.itemsize // parts

    return {name: size(leaf) for name, leaf in named_leaves(state).items()}


def abstractly_sharded(tree, params, mesh: MeshConfig):
    """A tree of ShapeDtypeStructs with the shardings it would have on a resolved mesh; no device is needed.

    Args:
        tree, params: see sharding.tree_shardings.
        mesh: the sizes.
    """
    sizes = tuple(getattr(mesh, axis) for axis in AXES)
    shardings = tree_shardings(tree, jax.sharding.AbstractMesh(sizes, AXES), params)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, shardings)


def frozen_name(config: Config) -> str | None:
    """What the frozen weights of a run are called in tables; None where it has none."""
    return "frozen base" if config.lora.rank else "frozen reference" if runs_reference(config) else None


def frozen_bytes(config: Config) -> int:
    """Bytes on one device of the weights that every step needs and that have neither gradients nor moments.

    They are LoRA's base, or the reference that a DPO of all weights runs on the fly; 0 in other runs.
    """
    if frozen_name(config) is None:
        return 0
    base = jax.eval_shape(lora.freeze, mixtral.abstract(config.model))
    return sum(state_bytes(abstractly_sharded(base, base, config.mesh)).values())


def activations(config: Config) -> dict[str, int]:
    """Estimates the large temporary buffers of a train step on one device, in bytes; the mesh must be resolved.

    Rough, and meant for comparing settings: XLA shares buffers whose lives do not overlap and adds copies of its own.
    """
    model, mesh, train = backends.resolve(config.model), config.mesh, config.train
    item = 2 if model.dtype == "bfloat16" else 4
    rows = train.batch_size // train.accumulation_steps // mesh.batch_shards
    t, mine = train.seq_len, train.seq_len // mesh.context
    tokens = rows * mine
    stream = tokens * model.d_model * item
    heads = tokens * (2 * model.num_heads + 2 * model.num_kv_heads) // mesh.tensor * model.head_dim * item
    seen = t if model.attention == "plain" else min(t, 512)  # the others hold one block of keys at a time
    scores = rows * model.num_heads // mesh.tensor * mine * seen * (4 + item)
    routed = tokens * model.experts_per_token * model.d_model * item * _rows_over_share(model, mesh.expert)
    experts = 3 * model.num_experts // mesh.expert * model.d_model * model.d_ff // mesh.tensor * item
    # Gate and up, where the rows of the experts here are no more than the tokens' choices (moe.py:_multiply).
    keeps = model.expert_backend == "blocks" and mesh.expert == 1
    gate_up = 2 * tokens * model.experts_per_token * model.d_ff // mesh.tensor * item if keeps else 0
    kept = {
        "full": stream,
        "outputs": 3 * stream,
        "offload": 0,
        "dots": 3 * stream + heads,
        "none": 6 * stream + heads + (scores if model.attention == "plain" else 0) + 3 * routed + experts + gate_up,
    }[model.remat]
    return {
        f"kept for the backward pass, {model.num_layers} layers, model.remat={model.remat}": int(
            model.num_layers * kept
        ),
        f"attention scores of a layer, {rows} x {model.num_heads // mesh.tensor} heads x {mine} x {seen}": 2 * scores,
        "rows on their way to the experts of a layer": int(4 * routed),
        **(
            {"experts of a layer, gathered; without a gradient": experts}
            if config.lora.rank
            else {"experts of a layer in the compute type, and their gradient": 2 * experts}
        ),
        f"logits of {min(config.loss.head_chunk, mine)} positions, and their gradient": 2
        * (rows * min(config.loss.head_chunk, mine) * model.vocab_size // mesh.tensor * 4),
    }


def _rows_over_share(model: ModelConfig, shards: int) -> float:
    """Rows that a device has room for in its experts, over its even share of the routed rows."""
    if model.dispatch == "ring" or shards == 1:
        return float(shards)
    worst = shards * min(model.experts_per_token, model.num_experts // shards) / model.experts_per_token
    return min(worst, model.buffer_factor) if model.buffer_factor else worst


def explain_oom(
    error: BaseException,
    *,
    config: Config,
    state_or_abstract,
    compiled_or_none=None,
    have: Available | None = None,
) -> str | None:
    """Explains an error that means that memory ran out.

    Args:
        error: what was raised, when a step was compiled or run.
        config: its mesh is resolved.
        state_or_abstract: the TrainState, also one that was donated, or its ShapeDtypeStructs with shardings.
        compiled_or_none: the compiled step, whose memory_analysis() tells what its temporaries take.
        have: the memory of a device; default: that of the first local one.

    Returns:
        The explanation, of several lines; None if the error is another one.
    """
    if not is_oom(error):
        return None
    have = have or available()
    text = str(error)
    if have.platform != "cpu" and not isinstance(error, RuntimeError | ValueError):
        return _host_text(error, config)
    capacity = _first(_CAPACITY, text)
    if capacity:  # of a program that the compiler could not place: what is in use now does not matter
        have = have._replace(limit=capacity, free=None)
    asked, free = _first(_ASKED, text), _first(_FREE, text) or have.free
    rows = _rows(config, state_or_abstract, compiled_or_none)
    width = max(len(name) for name, *_ in rows)
    table = [f"  {name:<{width}}  {readable(size):>10}{note}" for name, size, note in rows]
    short = max(asked - (free or capacity), 0) if asked and (free or capacity) else None
    found = knobs(config, state_or_abstract, have, short)
    help_ = [f"  {i}. {label}: about {readable(gain)} less on each device" for i, (gain, label) in enumerate(found, 1)]
    lines = [_headline(have, asked, free), "On each device:", *table]
    lines += ["What would help most:", *help_] if help_ else ["Use more devices or a smaller model."]
    if short and help_ and sum(gain for gain, _ in found) < short:
        lines.append("  Together that may not be enough: use more devices or a smaller model.")
    return "\n".join(lines)


def used_and_limit(text: str) -> tuple[int | None, int | None]:
    """What a compiler's message about memory asks for and allows, in bytes; None where it does not say."""
    return _first(_ASKED, text), _first(_CAPACITY, text)


def _first(patterns: tuple[str, ...], text: str) -> int | None:
    """The first size that one of the patterns finds, in bytes."""
    for pattern in patterns:
        found = re.search(pattern, text, re.I)
        if found:
            return int(float(found[1]) * _UNITS[found[2].upper()])
    return None


def readable(count: float) -> str:
    """Formats bytes: 25.0 GiB, 3.1 MiB, 0.5 KiB."""
    scale, unit = next(((s, u) for s, u in ((GIB, "GiB"), (2**20, "MiB")) if count >= s), (2**10, "KiB"))
    return f"{count / scale:,.1f} {unit}"


def _headline(have: Available, asked: int | None, free: int | None) -> str:
    parts = [f"out of memory on a {have.platform.upper()} device"]
    if asked:
        parts.append(f"{readable(asked)} were asked for at once")
    if have.limit:
        parts.append(
            f"{readable(free)} of {readable(have.limit)} were free" if free else f"it has {readable(have.limit)}"
        )
    elif free:
        parts.append(f"{readable(free)} were free")
    return f"{parts[0]}: {', '.join(parts[1:])}" if parts[1:] else parts[0]


def _host_text(error: BaseException, config: Config) -> str:
    return (
        f"the host, not the accelerator, ran out of memory ({str(error) or type(error).__name__}); "
        f"it has {readable(host_limit())}. What would help: data.workers=1 (now {config.data.workers}), "
        f"data.streaming=True (now {config.data.streaming}), fewer processes on this host"
    )


def _rows(config: Config, state, compiled) -> list[tuple[str, int, str]]:
    """The table of the message: (name, bytes, remark), the state first, then what a step adds, largest first."""
    sizes = state_bytes(state)
    rows = []
    for title, prefix in (("parameters", "params"), ("optimizer state", "opt_state")):
        mine = {name: size for name, size in sizes.items() if name.startswith(prefix)}
        largest = sorted(mine, key=mine.get, reverse=True)[:3]
        named = ", ".join(
            f"{'.'.join(name.removeprefix(prefix + '.').split('.')[-3:])} {readable(mine[name])}" for name in largest
        )
        rows.append((title, sum(mine.values()), f"   {named}"))
    if name := frozen_name(config):
        rows.insert(0, (name, frozen_bytes(config), f"   {config.model.dtype}, without gradients and moments"))
    extra = activations(config) | {"gradients, float32": _gradients(config, state)}
    rows += [(name, extra[name], "   estimated") for name in sorted(extra, key=extra.get, reverse=True)]
    analysis = compiled.memory_analysis() if compiled is not None else None
    if analysis is not None:
        rows.append(("all temporaries of the compiled step", analysis.temp_size_in_bytes, "   from the compiler"))
    return rows


def _gradients(config: Config, state, sizes: Mapping[str, int] | None = None) -> int:
    params = sum(size for name, size in state_bytes(state, sizes).items() if name.startswith("params"))
    return params * (1 if config.train.accumulation_steps == 1 else 2)  # one micro-batch's, and their sum


def _total(config: Config, state) -> int:
    """Estimates what a device holds at the peak of a step under a configuration whose mesh is resolved."""
    sizes = dataclasses.asdict(config.mesh)
    held = state_bytes(state, sizes)
    total = sum(held.values()) + frozen_bytes(config)
    total += _gradients(config, state, sizes) + sum(activations(config).values())
    moments = {name: leaf for name, leaf in named_leaves(state).items() if name.startswith("opt_state") and leaf.ndim}
    if config.optim.moment_dtype == "bfloat16":
        total -= sum(held[name] // 2 for name, leaf in moments.items() if leaf.dtype.itemsize == 4)
    return total


def knobs(config: Config, state, have: Available, short: int | None) -> list[tuple[int, str]]:
    """The three changes that save most on a device, (bytes, text), as estimated; only ones the configuration allows."""
    now = _total(config, state)
    found = []
    for candidates in _changes(config):
        fitting = [(now - _total(changed, state), label) for label, changed in candidates]
        fitting = [(gain, label) for gain, label in fitting if gain > 0]
        if fitting:  # the smallest change that is enough, else the one that saves most
            enough = [item for item in fitting if short and item[0] >= short]
            found.append(enough[0] if enough else max(fitting) if short else fitting[0])
    if have.platform == "gpu" and have.limit and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        # jax takes 75% of a GPU unless told otherwise.
        found.append((int(have.limit * (0.95 / 0.75 - 1)), "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment"))
    return sorted(found, reverse=True)[:3]


def _changes(config: Config) -> Iterator[list[tuple[str, Config]]]:
    """For each key that saves memory its useful values, the smallest change first, as (text, changed configuration)."""
    train, mesh = config.train, config.mesh
    steps = [n for n in range(train.accumulation_steps + 1, train.batch_size + 1) if train.batch_size % n == 0]
    yield _valid(config, "train", "accumulation_steps", steps)
    yield _valid(config, "model", "remat", {"none": ["outputs", "full"], "full": []}.get(config.model.remat, ["full"]))
    chunk = min(config.loss.head_chunk, train.seq_len)
    yield _valid(config, "loss", "head_chunk", [chunk // n for n in (2, 4, 8) if chunk // n >= 16])
    if runs_reference(config):
        yield _valid(config, "dpo", "reference", ["precomputed"])
    if config.optim.moment_dtype != "bfloat16":
        yield _valid(config, "optim", "moment_dtype", ["bfloat16"], " in a new run")
    if mesh.data > 1:
        sizes = dict(data=1, fsdp=mesh.fsdp * mesh.data)
        label = f"mesh.fsdp={sizes['fsdp']} (now {mesh.fsdp}), mesh.data=1 (now {mesh.data})"
        yield _valid_mesh(config, label, sizes)
        return
    for axis in ("fsdp", "expert", "tensor"):
        size, devices = getattr(mesh, axis), math.prod(dataclasses.asdict(mesh).values())
        label = f"mesh.{axis}={2 * size} (now {size}) on {2 * devices} devices (now {devices})"
        found = _valid_mesh(config, label, {axis: 2 * size})
        if found:
            yield found
            return


def _valid(config: Config, group: str, key: str, values: list, remark: str = "") -> list[tuple[str, Config]]:
    found = []
    for value in values:
        part = dataclasses.replace(getattr(config, group), **{key: value})
        label = f"{group}.{key}={value} (now {getattr(getattr(config, group), key)}){remark}"
        found += _checked(label, dataclasses.replace(config, **{group: part}))
    return found


def _valid_mesh(config: Config, label: str, sizes: dict[str, int]) -> list[tuple[str, Config]]:
    return _checked(label, dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes)))


def _checked(label: str, config: Config) -> list[tuple[str, Config]]:
    """Nothing is proposed that the program would refuse."""
    try:
        validate(config)
        return [(label, resolve_mesh(config, math.prod(dataclasses.asdict(config.mesh).values())))]
    except UserError:
        return []
