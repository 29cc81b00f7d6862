"""Which mesh, micro-batch and remat policy: all by formula, the best few by the compiler."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from mixtral_jax.config import AXES, Config, UserError, validate
from mixtral_jax.plan import aot
from mixtral_jax.plan import result as plan
from mixtral_jax.plan.chips import Topology, axis_extents

REMAT = ("none", "outputs", "full")
# Formulas know the large buffers only; what they call twice the memory the compiler has sometimes made fit.
HOPELESS = 2.0


def candidates(config: Config, topology: Topology) -> Iterator[Config]:
    """Every mesh, number of micro-batches and remat policy that the program would accept on these chips."""
    n, model = topology.num_devices, config.model
    for expert, tensor, context in itertools.product(_divisors(model.num_experts), _powers(8), _powers(8)):
        for fsdp in _divisors(n):
            data = n // (expert * tensor * context * fsdp)
            if data * expert * tensor * context * fsdp != n:
                continue
            mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
            rows = config.train.batch_size // mesh.batch_shards
            for steps, remat in itertools.product(_divisors(max(rows, 1)), REMAT):
                changed = dataclasses.replace(
                    config,
                    mesh=mesh,
                    model=dataclasses.replace(model, remat=remat),
                    train=dataclasses.replace(config.train, accumulation_steps=steps),
                )
                found = _accepted(changed, topology)
                if found:
                    yield found


def search(
    config: Config, topology: Topology, devices, *, compile_best: int = 4, quiet: bool = False
) -> dict[str, Any]:
    """Ranks what fits by predicted time.

    Args:
        config: its mesh, accumulation_steps and remat are what is searched; the batch stays.
        topology, devices: see chips.parse_topology and aot.topology_devices.
        compile_best: so many plans, which formulas like best, are compiled.
        quiet: shows no progress bar.

    Returns:
        plans: those compiled that fit, the best first (of equals the one with more room), then those that did not; estimates: the twenty best by formula;
        tried: how many there were.

    Raises:
        UserError: no mesh fits the chips.
    """
    tried = list(candidates(config, topology))
    if not tried:
        rows = config.train.batch_size
        raise UserError(
            f"no mesh of {topology.num_devices} chips takes train.batch_size={rows}; raise it to a multiple of the chips, "
            "or use fewer chips"
        )
    shapes, extents = plan.shapes_of(tried[0]), {}
    estimates = []
    for one in tqdm(tried, desc="formulas", unit="plan", disable=quiet):
        if one.mesh not in extents:
            _, coordinates = aot.plan_mesh(one, topology, devices)
            extents[one.mesh] = dict(zip(AXES, axis_extents(topology, coordinates).values()))
        estimates.append(plan.by_formula(one, topology, extents[one.mesh], shapes))
    order = sorted(range(len(tried)), key=lambda i: _rank(estimates[i]))
    hopeful = [i for i in order if estimates[i]["hbm_bytes_needed"] < HOPELESS * estimates[i]["hbm_bytes_available"]]
    done: list[dict[str, Any]] = []
    with tqdm(total=compile_best, desc="compiling", unit="plan", disable=quiet) as bar:
        for i in hopeful:
            # A plan that did not fit does not count: the search goes on down the list, within twice the number.
            if sum(one["fits"] for one in done) >= compile_best or len(done) >= 2 * compile_best:
                break
            done.append(plan.make(tried[i], topology, devices, quiet=True))
            bar.update(done[-1]["fits"])
    done.sort(key=lambda one: (not one["fits"], _seconds(one), one["hbm_bytes_needed"]))
    return {"plans": done, "estimates": [estimates[i] for i in order[:20]], "tried": len(tried)}


def _rank(estimate: dict[str, Any]) -> tuple:
    """What fits by formula first, then by predicted time; of equals the one with less traffic."""
    return (not estimate["fits"], _seconds(estimate), plan.per_device(estimate))


def _seconds(one: dict[str, Any]) -> float:
    """The predicted time to three digits: more the formulas do not know, and equals are ranked by something else."""
    return float(f"{one['seconds_per_step']['predicted']:.3g}")


def _accepted(config: Config, topology: Topology) -> Config | None:
    try:
        validate(config)
        return plan.resolve(config, topology)
    except UserError:
        return None


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length())]
