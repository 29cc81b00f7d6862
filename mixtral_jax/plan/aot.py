"""Compiles the real train step for a machine that is not here, and asks the compiler what it takes."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from mixtral_jax import backends, frozen, memory
from mixtral_jax.config import AXES, Config, UserError
from mixtral_jax.optim import make_optimizer
from mixtral_jax.plan.chips import EXAMPLES, Topology, gpu_coordinates
from mixtral_jax.sharding import batch_sharding, make_mesh, mesh_devices, replicated, suffix
from mixtral_jax.stages import STAGES
from mixtral_jax.step import abstract_state, make_train_step

FIELDS = {
    "tokens_BT": np.int32,
    "targets_BT": np.int32,
    "loss_weights_BT": np.float32,
    "positions_BT": np.int32,
    "segment_ids_BT": np.int32,
}
PAIR_FIELDS = {"pairs_BP": np.int32, "reference_chosen_BP": np.float32, "reference_rejected_BP": np.float32}
PAIR_TOKENS = 512
# What libtpu asks the machine for; without a TPU the answers are invented, and nothing but its warnings depends on them.
_TPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is held, so that several plans may be made at a time
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
_PATHS = (
    ("ragged_all_to_all", r"@ragged_all_to_all\b"),
    ("megablox gmm", r"kernel_name = \"\w*(?<!t)gmm\w*\"|@t?gmm\b"),
    ("megablox tgmm", r"kernel_name = \"\w*tgmm\w*\"|@tgmm\b"),
    ("splash attention", r"splash_m[hq]a\w*"),
    ("pallas kernel (tpu_custom_call)", r"@tpu_custom_call\b"),
    ("shard_map", r"manual_computation|shmap_body|SPMDFullToShardShape"),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one compilation said. Bytes are of one device."""

    seconds: float
    cpu_seconds: float
    memory: dict[str, int] | None  # argument, output, alias, temp, program; None where it did not fit
    used: int | None  # bytes that the compiler asked for where it did not fit
    limit: int | None  # bytes that the compiler allows
    text: str  # the optimised module, or ""
    lowered: str  # the module before optimisation
    largest: list[dict[str, Any]]  # the largest buffers: bytes, shapes, where


def topology_devices(topology: Topology):
    """The devices of a topology: descriptions of TPUs, which can be compiled for and not run; for GPUs fake CPU devices.

    Raises:
        UserError: libtpu is not installed, it does not know the shape, or there are too few CPU devices.
    """
    if topology.chip.platform == "gpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.num_devices:
            raise UserError(
                f"--topology={topology.name} needs {topology.num_devices} fake CPU devices and there are {len(devices)}; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.num_devices} before the program starts"
            )
        return devices[: topology.num_devices]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name} needs TPU's compiler, libtpu, which is not installed (no TPU is needed); "
            "in a virtual environment of its own: pip install -r requirements-tpu.txt"
        )
    for name, value in _TPU_ENV.items():
        os.environ.setdefault(name, value)
    # A v4's two cores count as one device where programs run, and as two in libtpu's default.
    more = {"chip_config_name": "megacore"} if topology.chip_name == "v4" else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **more).devices
    except Exception as error:
        raise UserError(
            f"--topology={topology.name}: libtpu refuses it ({str(error).splitlines()[0]}); known are {EXAMPLES}"
        ) from error


def plan_mesh(config: Config, topology: Topology, devices):
    """The mesh of a resolved configuration on a topology, in the order that a run would use.

    Returns:
        the mesh, and the physical coordinates of its devices, int [*mesh shape, dimensions].
    """
    shape = tuple(getattr(config.mesh, axis) for axis in AXES)
    if topology.chip.platform == "gpu":
        return make_mesh(config.mesh, devices), gpu_coordinates(topology, shape)
    ordered = mesh_devices(shape, devices)
    coordinates = np.array([device.coords for device in ordered.ravel()]).reshape(*shape, -1)
    return make_mesh(config.mesh, ordered), coordinates


def for_platform(config: Config, platform: str) -> Config:
    """The configuration with every backend named, as it would run there; GPUs are compiled for on CPU devices."""
    model = config.model
    backends.refuse_foreign(model, platform)
    if platform == "gpu":
        # Its own kernels can be lowered beside a GPU only; the CPU's stand in for them.
        kernels = {"attention": "cudnn", "expert_backend": "tokamax"}
        auto = {key: "auto" for key, name in kernels.items() if getattr(model, key) == name}
        model = dataclasses.replace(model, **auto)
    return dataclasses.replace(config, model=backends.resolve(model, "tpu" if platform == "tpu" else "cpu"))


def abstract_batch(config: Config, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch's fields as shapes with shardings; of pairs PAIR_TOKENS positions make one."""
    rows, t = config.train.batch_size, config.train.seq_len
    fields = dict(FIELDS)
    if config.train.stage == "dpo":
        fields |= PAIR_FIELDS
    sizes = {"BT": (rows, t), "BP": (rows, max(t // PAIR_TOKENS, 1))}

    def field(name: str, dtype):
        letters = suffix(name)
        return jax.ShapeDtypeStruct(sizes[letters], dtype, sharding=batch_sharding(mesh, letters))

    return {name: field(name, dtype) for name, dtype in fields.items()}


def lower(config: Config, mesh):
    """Lowers the train step as a run does, the state donated and every output's sharding given.

    Args:
        config: resolved; its backends named (see `for_platform`).
        mesh: of descriptions of devices, or of devices.

    Returns:
        the lowered step, and the abstract state with its shardings.
    """
    optimizer = make_optimizer(config.optim, config.train.steps)
    like, shardings = abstract_state(config, optimizer, mesh)
    step = jax.jit(
        make_train_step(config, optimizer, STAGES[config.train.stage].loss),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    still = frozen.abstract(config, mesh) if frozen.stays(config) else None
    with jax.set_mesh(mesh):
        return step.lower(like, abstract_batch(config, mesh), still), like


def compile_step(lowered, label: str, quiet: bool = False) -> Compiled:
    """Compiles, and reads the compiler's account of memory; a step that does not fit is an answer, not an error."""
    start, cpu = time.perf_counter(), time.process_time()
    folder = Path(tempfile.mkdtemp(prefix="mixtral_jax_plan_"))
    text = lowered.as_text()
    try:
        with _elapsed(label, quiet):
            try:
                # The dump is read where the executable's own text fails, and says which buffers are large.
                compiled = lowered.compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
            except Exception as error:
                if not memory.is_oom(error):
                    raise
                used, limit = memory.used_and_limit(str(error))
                seconds = time.perf_counter() - start, time.process_time() - cpu
                return Compiled(*seconds, None, used, limit, "", text, _from_error(str(error)))
        stats = compiled.memory_analysis()
        sizes = {
            "argument": stats.argument_size_in_bytes,
            "output": stats.output_size_in_bytes,
            "alias": stats.alias_size_in_bytes,
            "temp": stats.temp_size_in_bytes,
            "program": stats.generated_code_size_in_bytes,
            "host": stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
        }
        seconds = time.perf_counter() - start, time.process_time() - cpu
        return Compiled(*seconds, sizes, None, None, _dumped(folder) or _own_text(compiled), text, _largest(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def paths(lowered_text: str) -> dict[str, int]:
    """The kernels and exchanges that a lowered module calls, and how often their names stand in it."""
    found = {name: len(re.findall(pattern, lowered_text)) for name, pattern in _PATHS}
    return {name: count for name, count in found.items() if count}


@contextlib.contextmanager
def _elapsed(label: str, quiet: bool):
    """Says on standard error, every ten seconds, that the compiler is still at work."""
    done = threading.Event()

    def talk():
        start = time.perf_counter()
        while not done.wait(10):
            print(f"  {label}: compiling, {time.perf_counter() - start:.0f} s ...", file=sys.stderr, flush=True)

    thread = threading.Thread(target=talk, daemon=True)
    if not quiet:
        thread.start()
    try:
        yield
    finally:
        done.set()


def _dumped(folder: Path) -> str:
    """The optimised module among the dumped files: the largest, for small ones belong to constants."""
    files = [*folder.glob("*after_optimizations.txt")]
    return max(files, key=lambda path: path.stat().st_size).read_text() if files else ""


def _own_text(compiled) -> str:
    try:
        return compiled.as_text()
    except Exception:
        # Of some asynchronous operations the executable cannot print itself; the traffic is then by formula only.
        return ""


def _largest(folder: Path, count: int = 8) -> list[dict[str, Any]]:
    """The largest buffers of the device's main memory, from the compiler's report of its allocations."""
    files = [*folder.glob("*memory-usage-report.txt")]
    if not files:
        return []
    text = max(files, key=lambda path: path.stat().st_size).read_text()
    main = text.split("Memory Space:")[1] if "Memory Space:" in text else text
    rows = re.findall(r"^\s*[\d.]+\w*\(\s*\d+%\);\s*([\d.]+)([KMGT]?i?B);\s*\d+;\s*\d+; (.*)$", main, re.M)
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    found = [{"bytes": int(float(size) * units.get(unit, 1)), "shapes": shapes[:200]} for size, unit, shapes in rows]
    return sorted(found, key=lambda row: -row["bytes"])[:count]


def _from_error(text: str, count: int = 8) -> list[dict[str, Any]]:
    """The largest buffers that the compiler lists when a program does not fit; none where it gave up before placing them."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = []
    for block in re.split(r"\n\s*\d+\. Size: ", text)[1:]:
        size = re.match(r"([\d.]+)([KMGT]?)", block)
        shape, where = re.search(r"Shape: (\S+)", block), re.search(r'op_name="(.*?)"', block)
        found.append(
            {
                "bytes": int(float(size[1]) * units[size[2]]),
                "shapes": shape[1] if shape else "",
                "where": where[1] if where else "",
            }
        )
    return sorted(found, key=lambda row: -row["bytes"])[:count]
