"""Which mesh, micro-batch and remat policy: all by formula, the best few by the compiler."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from mixtral_jax.config import Config, UserError, validate
from mixtral_jax.plan import result as plan
from mixtral_jax.plan.chips import Topology

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
                if _accepted(changed, topology):
                    yield changed


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
        plans: those compiled that fit, the best first, then those that did not; estimates: the twenty best by formula;
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
    estimates = [
        plan.make(one, topology, devices, compiled=False, quiet=True)
        for one in tqdm(tried, desc="formulas", unit="plan", disable=quiet)
    ]
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
    done.sort(key=lambda one: (not one["fits"], one["seconds_per_step"]["predicted"]))
    return {"plans": done, "estimates": [estimates[i] for i in order[:20]], "tried": len(tried)}


def _rank(estimate: dict[str, Any]) -> tuple:
    """What fits by formula first, then by predicted time; of equals the one with less traffic."""
    return (not estimate["fits"], round(estimate["seconds_per_step"]["predicted"], 3), plan.per_device(estimate))


def _accepted(config: Config, topology: Topology) -> bool:
    try:
        validate(config)
        plan.resolve(config, topology)
    except UserError:
        return False
    return True


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length())]


def table(plans: list[dict[str, Any]]) -> str:
    """The ranking for a person."""
    lines = [
        f"{'mesh (data fsdp expert context tensor)':<40}{'micro':>6}{'remat':>9}{'GiB':>8}{'s/step':>9}{'MFU':>7}{'ceiling':>9}"
    ]
    for one in plans:
        mesh = " x ".join(str(size) for size in one["mesh"].values())
        lines.append(
            f"{mesh:<40}{one['accumulation_steps']:>6}{one['remat']:>9}{one['hbm_bytes_needed'] / 2**30:>8.1f}"
            f"{one['seconds_per_step']['predicted']:>9.3f}{one['mfu_predicted']:>7.1%}{one['mfu_ceiling']:>9.1%}"
            + ("" if one["fits"] else "   does not fit")
        )
    return "\n".join(lines)
