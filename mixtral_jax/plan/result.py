"""One plan: a configuration on a topology, by formula alone or with the compiler's account; as JSON and as tables."""

import dataclasses
import datetime
import math
from typing import Any, NamedTuple

import jax

from mixtral_jax import memory, metrics
from mixtral_jax.config import AXES, Config, UserError, resolve_mesh
from mixtral_jax.models import mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.plan import amounts, aot, bounds, hlo, traffic
from mixtral_jax.plan.chips import Topology, axis_extents, wire
from mixtral_jax.step import TrainState, abstract_state


def resolve(config: Config, topology: Topology) -> Config:
    """The configuration as it would run on the topology: the mesh filled in, every backend named.

    Raises:
        UserError: the mesh does not fit the chips; both numbers are in the message.
    """
    try:
        resolved = resolve_mesh(config, topology.num_devices)
    except UserError as error:
        raise UserError(f"--topology={topology.name} has {topology.num_devices} chips: {error}") from error
    return aot.for_platform(resolved, topology.chip.platform)


def make(config: Config, topology: Topology, devices, *, compiled: bool = True, quiet: bool = False) -> dict[str, Any]:
    """Makes a plan.

    Args:
        config: of a run; its mesh may hold a -1.
        topology, devices: see chips.parse_topology and aot.topology_devices.
        compiled: False leaves the compiler out: memory is then an estimate.
        quiet: prints no progress.

    Returns:
        what plan.json holds; see docs/plan.md for its keys.

    Raises:
        UserError: the mesh does not fit the chips.
    """
    config = resolve(config, topology)
    mesh, coordinates = aot.plan_mesh(config, topology, devices)
    extents = dict(zip(mesh.axis_names, axis_extents(topology, coordinates).values()))
    shapes = shapes_of(config)
    result = by_formula(config, topology, extents, shapes)
    if compiled:
        label = f"{topology.name}, {axes_text({axis: size for axis, size in mesh.shape.items() if size > 1})}"
        lowered, _ = aot.lower(config, mesh)
        _add_account(result, config, aot.compile_step(lowered, label, quiet), mesh)
    if not result["fits"]:
        result["largest_buffers"] = result["largest_buffers"] or _known_buffers(config, shapes)
        result["knobs"] = _knobs(config, topology, shapes.like, result)
    return result


class Shapes(NamedTuple):
    """What a model's shape says, whatever the mesh."""

    like: TrainState  # shapes with the shardings of their names, on a mesh of one device
    parameters: int
    active: int


def shapes_of(config: Config) -> Shapes:
    """The state's shapes and the numbers of parameters; tracing the model takes about a second."""
    one = jax.sharding.AbstractMesh((1,) * len(AXES), AXES)
    # Where arrays lie is no part of their shape, and an abstract mesh has no memories to choose among.
    here = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="none"),
        optim=dataclasses.replace(config.optim, offload=False),
    )
    like, _ = abstract_state(here, make_optimizer(config.optim, config.train.steps), one)
    return Shapes(like, *mixtral.parameter_counts(config.model))


def by_formula(config: Config, topology: Topology, extents: dict[str, list[int]], shapes: Shapes) -> dict[str, Any]:
    """A plan without the compiler.

    Args:
        config: as `resolve` returns it.
        topology: the chips.
        extents: mesh axis -> its reach along each physical dimension (chips.axis_extents).
        shapes: see `shapes_of`.
    """
    sizes = dataclasses.asdict(config.mesh)
    wires = {axis: wire(topology, extents[axis]) for axis, size in sizes.items() if size > 1}
    found = traffic.transfers(config)
    times = bounds.seconds(config, topology, wires, found, shapes.parameters)
    buffers = traffic.receive_buffers(config)
    terms = [
        {"name": one.name, "kind": one.kind, "axes": list(one.axes), "bytes": one.bytes * one.times} for one in found
    ]
    return {
        **_head(config, topology, shapes),
        **_memory(config, topology, shapes.like),
        "traffic_bytes_per_device": {
            "formula": amounts.by_axis(found, sizes),
            "compiled": None,
            "terms": sorted(terms, key=lambda term: -term["bytes"]),
            "collectives": None,
        },
        "wires": {axis: dataclasses.asdict(one) for axis, one in wires.items()},
        "mfu_ceiling": times.pop("mfu_ceiling"),
        "mfu_predicted": times.pop("mfu_predicted"),
        "seconds_per_step": times,
        "tokens_per_second": config.train.batch_size * config.train.seq_len / times["predicted"],
        "dropless": buffers
        | {
            "buffer_factor": config.model.buffer_factor,
            "price_bytes": buffers["dropless"] - buffers["configured"],
        },
        "largest_buffers": [],
        "knobs": [],
    }


def _head(config: Config, topology: Topology, shapes: Shapes) -> dict[str, Any]:
    model, train = config.model, config.train
    per_token = metrics.flops_per_token(model, train.seq_len)
    return {
        "topology": topology.name,
        "devices": topology.num_devices,
        "mesh": dataclasses.asdict(config.mesh),
        "backends": {key: getattr(model, key) for key in ("attention", "dispatch", "expert_backend")},
        "remat": model.remat,
        "batch_size": train.batch_size,
        "accumulation_steps": train.accumulation_steps,
        "tokens_per_device_and_micro_batch": traffic.tokens_of_device(config),
        "estimated": topology.chip.platform == "gpu",
        "parameters": shapes.parameters,
        "active_parameters": shapes.active,
        "flops_per_token": per_token,
        "flops_per_step": per_token * train.batch_size * train.seq_len,
        "executed_flops_per_step_and_device": bounds.executed_flops(config),
        "date": datetime.date.today().isoformat(),
        "versions": _versions(),
        "config": config.to_dict(),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"jax": jax.__version__}
    try:
        found["libtpu"] = version("libtpu")
    except PackageNotFoundError:
        found["libtpu"] = "not installed"
    return found


def _memory(config: Config, topology: Topology, like) -> dict[str, Any]:
    """The table of memory: exact for the state and the batch, estimated for what a step adds."""
    state = memory.state_bytes(like, dataclasses.asdict(config.mesh))
    params = sum(size for name, size in state.items() if name.startswith("params"))
    moments = sum(size for name, size in state.items() if name.startswith("opt_state"))
    shards = config.mesh.batch_shards * config.mesh.context
    rows = {
        "parameters": params,
        "optimizer": 0 if config.optim.offload else moments,
        "batch": len(aot.FIELDS) * 4 * config.train.batch_size * config.train.seq_len // shards,
        "gradients": params * (1 if config.train.accumulation_steps == 1 else 2),
        "temporaries": sum(memory.activations(config).values()),
        "program": 0,
    }
    if name := memory.frozen_name(config):
        rows[name] = memory.frozen_bytes(config)
    needed, limit = sum(rows.values()), topology.chip.hbm_bytes
    return {
        "fits": needed <= limit,
        "hbm_bytes_per_device": rows,
        "hbm_bytes_needed": needed,
        "hbm_bytes_available": limit,
        "host_bytes_per_device": moments if config.optim.offload else 0,
        "memory_from": "formulas",
    }


def _add_account(result: dict[str, Any], config: Config, account: aot.Compiled, mesh) -> None:
    """Replaces what was estimated by what the compiler says."""
    result["paths"] = aot.paths(account.lowered)
    result["compile_seconds"] = round(account.seconds, 1)
    result["compile_cpu_seconds"] = round(account.cpu_seconds, 1)
    result["memory_from"] = "the compiler"
    result["largest_buffers"] = account.largest
    rows = result["hbm_bytes_per_device"]
    if account.memory is None:
        result["fits"] = False
        result["hbm_bytes_available"] = account.limit or result["hbm_bytes_available"]
        result["hbm_bytes_needed"] = account.used or result["hbm_bytes_needed"]
        rest = sum(size for name, size in rows.items() if name != "temporaries")
        rows["temporaries"] = max(result["hbm_bytes_needed"] - rest, 0)
        return
    # Gradients are among the compiler's temporaries, and the new state lies where the old one was.
    fresh = account.memory["temp"] + max(account.memory["output"] - account.memory["alias"], 0)
    rows["gradients"] = min(rows["gradients"], fresh)
    rows["temporaries"] = fresh - rows["gradients"]
    rows["program"] = account.memory["program"]
    result["host_bytes_per_device"] = account.memory["host"]
    result["hbm_bytes_needed"] = sum(rows.values())
    result["fits"] = result["hbm_bytes_needed"] <= result["hbm_bytes_available"]
    if account.text:
        read = hlo.collectives(account.text, tuple(mesh.shape.values()), mesh.axis_names)
        result["traffic_bytes_per_device"]["compiled"] = amounts.by_axis(read, dict(mesh.shape))
        result["traffic_bytes_per_device"]["collectives"] = _counted(read)
        result["traffic_bytes_per_device"]["largest"] = _largest(read)


def _known_buffers(config: Config, shapes: Shapes, count: int = 8) -> list[dict[str, Any]]:
    """The largest arrays of the state and the largest estimated temporaries, where the compiler lists none."""
    state = memory.state_bytes(shapes.like, dataclasses.asdict(config.mesh))
    rows = [{"bytes": size, "shapes": name, "where": "state"} for name, size in state.items()]
    rows += [{"bytes": size, "shapes": name, "where": "estimated"} for name, size in memory.activations(config).items()]
    return sorted(rows, key=lambda row: -row["bytes"])[:count]


def _counted(read: list[hlo.Collective]) -> dict[str, int]:
    """How many collectives of each kind the compiled module has; loops count once."""
    return {kind: sum(one.kind == kind for one in read) for kind in hlo.KINDS if any(one.kind == kind for one in read)}


def _largest(read: list[hlo.Collective], count: int = 20) -> list[dict[str, Any]]:
    """The collectives of the compiled module that move most in a step."""
    most = sorted(read, key=lambda one: -one.bytes * one.times)[:count]
    return [
        {"kind": one.kind, "axes": list(one.axes), "bytes": one.bytes * one.times, "times": one.times, "name": one.name}
        for one in most
    ]


def axes_text(sizes: dict[str, int]) -> str:
    """A mesh in words."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"


def _knobs(config: Config, topology: Topology, like, result: dict[str, Any]) -> list[str]:
    """What would make a step that does not fit smaller, as estimated."""
    short = result["hbm_bytes_needed"] - result["hbm_bytes_available"]
    have = memory.Available(topology.chip.platform, result["hbm_bytes_available"], None)
    found = memory.knobs(config, like, have, short)
    return [f"{label}: about {memory.readable(gain)} less on each device" for gain, label in found]


def per_device(result: dict[str, Any]) -> float:
    """Bytes that a device receives in a step over all axes, by formula."""
    return math.fsum(result["traffic_bytes_per_device"]["formula"].values())
