"""The plan of a pod: `python -m mixtral_jax.plan --config=... --topology=... --out=plan.json`."""

import json
import os
from pathlib import Path

from absl import flags

from mixtral_jax import cli
from mixtral_jax.config import UserError

USAGE = """
Says what a run will need before a chip is rented: compiles the real train step for the topology (no TPU is needed,
only its compiler: pip install -r requirements-tpu.txt) and prints memory, FLOPs, traffic and time.

    python -m mixtral_jax.plan --config=configs/mixtral_8x7b.py --topology=v5p:4x4x4 --out=plan.json --plot=plan.png
    python -m mixtral_jax.plan --config=configs/mixtral_8x7b.py --topology=v5p:4x4x4 --config.mesh.expert=4
    python -m mixtral_jax.plan --config=configs/mixtral_8x7b.py --topology=v6e:16x16 --search
    python -m mixtral_jax.plan --config=configs/mixtral_8x7b.py --topology=h100:8x8      # 8 nodes of 8; estimated

Exit status: 0 also where it does not fit (plan.json says so in "fits"), 2 a mistake in the command. See docs/plan.md.
"""

_CONFIG = cli.define_config_flag()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "CHIP:SHAPE, such as v5p:4x4x4, v6e:16x16 or h100:8x8 (nodes x GPUs)."
)
_OUT = flags.DEFINE_string("out", "", "Where the plan is written as JSON.")
_PLOT = flags.DEFINE_string("plot", "", "Where a picture of the memory is written as PNG.")
_COMPILE = flags.DEFINE_bool("compile", True, "--nocompile: formulas only, in seconds; memory is then an estimate.")
_SEARCH = flags.DEFINE_bool(
    "search", False, "Tries meshes, micro-batches and remat policies at the configuration's batch."
)
_BEST = flags.DEFINE_integer("compile_best", 4, "How many plans of --search are compiled.", lower_bound=1)


def main() -> None:
    """Plans."""
    config = cli.typed_config(_CONFIG.value)
    if not _TOPOLOGY.value:
        raise UserError("--topology is missing; for example --topology=v5p:4x4x4")
    # The modules below look at devices when they are used, not when they are imported, but flags come first.
    from mixtral_jax.plan import aot, plot, result, search, table
    from mixtral_jax.plan.chips import parse_topology

    topology = parse_topology(_TOPOLOGY.value)
    for path in filter(None, (_OUT.value, _PLOT.value)):
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: there is no folder {Path(path).absolute().parent}")
    if not _SEARCH.value:
        result.resolve(config, topology)  # a mesh that does not fit is refused before anything slow
    _use_cpu(topology.num_devices if topology.chip.platform == "gpu" else 1)
    devices = aot.topology_devices(topology)
    if _SEARCH.value:
        found = search.search(config, topology, devices, compile_best=_BEST.value)
        plans = found["plans"]
        print(f"{found['tried']} plans by formula; the best of them compiled:\n{table.ranking(plans)}\n")
        output = plans[0] | {"search": found} if plans else {"search": found}
    else:
        plans = [result.make(config, topology, devices, compiled=_COMPILE.value)]
        output = plans[0]
    if plans:
        print(table.plan(plans[0]))
    if _OUT.value:
        Path(_OUT.value).write_text(json.dumps(output, indent=1) + "\n")
    if _PLOT.value and plans:
        plot.draw(plans, Path(_PLOT.value))


def _use_cpu(devices: int) -> None:
    """Nothing here runs on an accelerator; a cluster of GPUs is compiled for as so many fake CPU devices."""
    import jax

    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    cli.run(main, USAGE)
