"""One plan: a configuration on a topology, by formula alone or with the compiler's account; as JSON and as tables."""

import dataclasses
import datetime
import math
from typing import Any

import jax

from mixtral_jax import memory, metrics
from mixtral_jax.config import Config, UserError, resolve_mesh
from mixtral_jax.models import mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.plan import aot, bounds, hlo, traffic
from mixtral_jax.plan.chips import Topology, axis_extents, wire
from mixtral_jax.step import abstract_state


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
    optimizer = make_optimizer(config.optim, config.train.steps)
    like, _ = abstract_state(config, optimizer, mesh)
    extents = axis_extents(topology, coordinates)
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    wires = {axis: wire(topology, extents[i]) for i, axis in enumerate(mesh.axis_names) if axis in sizes}
    found = traffic.transfers(config)
    total, active = mixtral.parameter_counts(config.model)
    result = _head(config, topology, total, active)
    account = None
    if compiled:
        lowered, _ = aot.lower(config, mesh)
        account = aot.compile_step(lowered, f"{topology.name}, {_axes(sizes)}", quiet)
        result["paths"] = aot.paths(account.lowered)
        result["compile_seconds"] = round(account.seconds, 1)
    result |= _memory(config, topology, like, account)
    result["knobs"] = [] if result["fits"] else _knobs(config, topology, like, result)
    result["traffic_bytes_per_device"] = _traffic(found, account, mesh)
    result["wires"] = {axis: dataclasses.asdict(one) for axis, one in wires.items()}
    times = bounds.seconds(config, topology, wires, found, total)
    result["mfu_ceiling"], result["mfu_predicted"] = times.pop("mfu_ceiling"), times.pop("mfu_predicted")
    result["seconds_per_step"] = times
    result["tokens_per_second"] = config.train.batch_size * config.train.seq_len / times["predicted"]
    buffers = traffic.receive_buffers(config)
    result["dropless"] = buffers | {
        "buffer_factor": config.model.buffer_factor,
        "price_bytes": buffers["dropless"] - buffers["configured"],
    }
    return result


def _head(config: Config, topology: Topology, total: int, active: int) -> dict[str, Any]:
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
        "parameters": total,
        "active_parameters": active,
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


def _memory(config: Config, topology: Topology, like, account) -> dict[str, Any]:
    """The table of memory: exact for the state and the batch; what a step adds from the compiler, else estimated."""
    state = memory.state_bytes(like)

    def sum_of(prefix):
        return sum(size for name, size in state.items() if name.startswith(prefix))

    rows = {"parameters": sum_of("params"), "optimizer": sum_of("opt_state")}
    shards = config.mesh.batch_shards * config.mesh.context
    rows["batch"] = len(aot.FIELDS) * 4 * config.train.batch_size * config.train.seq_len // shards
    gradients = rows["parameters"] * (1 if config.train.accumulation_steps == 1 else 2)
    limit = topology.chip.hbm_bytes
    measured = account.memory if account else None
    if measured:
        # Gradients are among the compiler's temporaries, and the new state lies where the old one was.
        rows["gradients"] = min(gradients, measured["temp"])
        rows["temporaries"] = measured["temp"] - rows["gradients"] + max(measured["output"] - measured["alias"], 0)
        rows["program"] = measured["program"]
    else:
        rows["gradients"] = gradients
        rows["temporaries"] = sum(memory.activations(config).values())
        rows["program"] = 0
    if config.optim.offload:
        rows["optimizer"] = 0
    needed = sum(rows.values())
    if account and not measured:
        needed, limit = account.used or needed, account.limit or limit
        rows["temporaries"] = max(needed - sum(rows.values()) + rows["temporaries"], 0)
    return {
        "fits": bool(needed <= limit and (account is None or measured is not None)),
        "hbm_bytes_per_device": rows,
        "hbm_bytes_needed": needed,
        "hbm_bytes_available": limit,
        "memory_from": "the compiler" if account else "formulas",
        "largest_buffers": (account.largest if account else None) or _known_buffers(config, state),
    }


def _known_buffers(config: Config, state: dict[str, int], count: int = 8) -> list[dict[str, Any]]:
    """The largest arrays of the state and the largest estimated temporaries, where the compiler lists none."""
    rows = [{"bytes": size, "shapes": name, "where": "state"} for name, size in state.items()]
    rows += [{"bytes": size, "shapes": name, "where": "estimated"} for name, size in memory.activations(config).items()]
    return sorted(rows, key=lambda row: -row["bytes"])[:count]


def _traffic(found, account, mesh) -> dict[str, Any]:
    sizes = dict(mesh.shape)
    read = hlo.collectives(account.text, tuple(sizes.values()), mesh.axis_names) if account and account.text else None
    terms = [
        {"name": one.name, "kind": one.kind, "axes": list(one.axes), "bytes": one.bytes * one.times} for one in found
    ]
    return {
        "formula": traffic.by_axis(found, sizes),
        "compiled": hlo.by_axis(read, sizes) if read is not None else None,
        "terms": sorted(terms, key=lambda term: -term["bytes"]),
        "collectives": _counted(read) if read is not None else None,
    }


def _counted(read: list[hlo.Collective]) -> dict[str, int]:
    """How many collectives of each kind the compiled module has; loops count once."""
    return {kind: sum(one.kind == kind for one in read) for kind in hlo.KINDS if any(one.kind == kind for one in read)}


def _axes(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"


def _knobs(config: Config, topology: Topology, like, result: dict[str, Any]) -> list[str]:
    """What would make a step that does not fit smaller, as estimated."""
    short = result["hbm_bytes_needed"] - result["hbm_bytes_available"]
    have = memory.Available(topology.chip.platform, result["hbm_bytes_available"], None)
    found = memory.knobs(config, like, have, short)
    return [f"{label}: about {memory.readable(gain)} less on each device" for gain, label in found]


def table(result: dict[str, Any]) -> str:
    """The plan for a person, in lines."""
    gib, t, times = memory.GIB, result["traffic_bytes_per_device"], result["seconds_per_step"]
    mark = " (estimated)" if result["estimated"] or result["memory_from"] == "formulas" else ""
    mesh = _axes({axis: size for axis, size in result["mesh"].items() if size > 1})
    tokens = result["tokens_per_device_and_micro_batch"]
    lines = [
        f"{result['topology']}: {result['devices']} chips as {mesh}; {', '.join(result['backends'].values())}; remat {result['remat']}",
        f"{metrics.human(result['parameters'], 4)} parameters, {metrics.human(result['active_parameters'], 4)} active per token; "
        f"batch {result['batch_size']} in {result['accumulation_steps']} micro-batches, {tokens:,} tokens a chip each",
        "",
        f"memory of a chip{mark}",
    ]
    need, have = result["hbm_bytes_needed"], result["hbm_bytes_available"]
    lines += [f"  {name:<14}{size / gib:9.2f} GiB" for name, size in result["hbm_bytes_per_device"].items()]
    verdict = "fits" if result["fits"] else "DOES NOT FIT"
    lines.append(f"  {'in all':<14}{need / gib:9.2f} GiB of {have / gib:.2f} GiB: {verdict} ({need / have:.0%})")
    for row in [] if result["fits"] else result["largest_buffers"]:
        lines.append(f"    {row['bytes'] / gib:9.2f} GiB  {row['shapes'][:80]}  {row.get('where', '')[-60:]}")
    lines += [f"    {text}" for text in result["knobs"]]
    drop = result["dropless"]
    lines.append(
        f"  staying dropless: {drop['dropless'] / gib:.2f} GiB a receive buffer, {drop['configured'] / gib:.2f} GiB with "
        f"model.buffer_factor={drop['buffer_factor']:g}; a layer holds several of them"
    )
    lines += ["", "traffic of a chip and step, received", f"  {'axis':<10}{'formula':>12}{'compiled':>12}   over"]
    for axis, amount in t["formula"].items():
        got = f"{t['compiled'][axis] / gib:8.2f} GiB" if t["compiled"] else "-"
        lines.append(f"  {axis:<10}{amount / gib:8.2f} GiB{got:>12}   {result['wires'][axis]['text']}")
    lines += ["", f"time of a step{' (estimated)' if result['estimated'] else ''}"]
    lines.append(f"  {'compute':<22}{times['compute']:9.3f} s   with what is computed again, at the data sheet's peak")
    lines.append(f"  {'memory':<22}{times['hbm']:9.3f} s")
    lines += [f"  {f'interconnect, {axis}':<22}{s:9.3f} s" for axis, s in times["interconnect"].items()]
    lines.append(
        f"  bound {times['bound']:.3f} s by {times['bound_by']}: MFU ceiling {result['mfu_ceiling']:.1%}; tokens' transfers "
        f"waited for: {times['predicted']:.3f} s, {result['mfu_predicted']:.1%}, {metrics.human(result['tokens_per_second'])} tokens/s"
    )
    lines.append(
        f"FLOPs: {result['flops_per_token'] / 1e9:.1f} GF a token, {result['flops_per_step'] / 1e15:,.1f} PF a step"
    )
    if result.get("paths"):
        lines.append("paths: " + ", ".join(f"{name} x{count}" for name, count in result["paths"].items()))
    if "compile_seconds" in result:
        lines.append(f"compiled in {result['compile_seconds']:.0f} s")
    return "\n".join(lines)


def per_device(result: dict[str, Any]) -> float:
    """Bytes that a device receives in a step over all axes, by formula."""
    return math.fsum(result["traffic_bytes_per_device"]["formula"].values())
