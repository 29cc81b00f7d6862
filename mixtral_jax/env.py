"""What a bug report needs to know of this environment.

    python -m mixtral_jax.env
    python -m mixtral_jax.env --config=configs/mixtral_8x7b.py --config.mesh.expert=8
    python -m mixtral_jax.env --json

Prints versions, the machine, its devices, the mesh that a configuration gets here, and the settings of XLA and jax.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from absl import flags

import mixtral_jax
from mixtral_jax import cli, compilation_cache, distributed, memory
from mixtral_jax.config import Config, UserError, resolve_mesh

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "datasets", "sentencepiece", "grain"),
    *("ml_collections", "tensorstore", "tensorboard", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "wandb"),
)
OPTIONAL = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "wandb")
# No other variables: what is printed is pasted into public reports.
VARIABLES = ("XLA_", "JAX_", "LIBTPU_", "TPU_", "CUDA_VISIBLE_DEVICES")


def collect(config: Config | None) -> dict[str, Any]:
    """Collects what is printed, as plain values; a part that fails says why and stops nothing."""
    return {
        "mixtral_jax": mixtral_jax.__version__,
        "commit": commit(Path(__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "packages": versions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "host_memory_bytes": memory.host_limit(),
        "devices": devices(),
        "mesh": None if config is None else mesh(config),
        "variables": variables(os.environ),
        "compilation_cache": cache(),
    }


def versions() -> dict[str, str | None]:
    """The installed version of each of PACKAGES; optional ones only where they are."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name not in OPTIONAL:
                found[name] = None
    return found


def commit(root: Path) -> str | None:
    """The git commit of a checkout, with "+changes" where files differ from it; None if it is none."""
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def devices() -> dict[str, Any]:
    """Kind, number and memory of the devices, or the error of a backend that does not start."""
    try:
        local = jax.local_devices()
        return {
            "platform": jax.default_backend(),
            "kind": local[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "memory_bytes": memory.available(local[0]).limit,
        }
    except RuntimeError as error:
        return {"error": str(error)}


def mesh(config: Config) -> dict[str, Any]:
    """The axes of the mesh that a configuration gets on the devices here, or why it gets none."""
    try:
        sizes = resolve_mesh(config, jax.device_count()).to_dict()["mesh"]
        return {axis: size for axis, size in sizes.items() if size > 1} or {"one device": 1}
    except (UserError, RuntimeError) as error:
        return {"error": str(error)}


def variables(environment: dict[str, str]) -> dict[str, str]:
    """The variables that change what XLA and jax do."""
    return {name: value for name, value in sorted(environment.items()) if name.startswith(VARIABLES)}


def cache() -> dict[str, Any]:
    """The folder of the compilation cache that commands use here, and what lies in it."""
    path = compilation_cache.location()
    if path is None:
        return {"folder": None}
    files = [file for file in path.glob("*-cache") if file.is_file()] if path.is_dir() else []
    return {"folder": str(path), "programs": len(files), "bytes": sum(file.stat().st_size for file in files)}


def text(found: dict[str, Any]) -> str:
    """Puts what was collected into aligned rows, those of a group indented."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            width = max(map(len, value), default=0)
            lines += [name] + [f"  {key:<{width}}  {_shown(key, item)}" for key, item in value.items()]
            if not value:
                lines[-1] += ": none"
        elif name != "mesh" or value is not None:
            lines.append(f"{name:<18}  {_shown(name, value)}")
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "none"
    return memory.readable(value) if name.endswith("bytes") else str(value)


def main() -> None:
    """Prints the report."""
    config = flags.FLAGS.config
    cli.join_processes()
    found = collect(None if config is None else cli.typed_config(config))
    if distributed.speaks():
        print(json.dumps(found, indent=2) if flags.FLAGS.json else text(found))


if __name__ == "__main__":
    # Defined here, so that the module can be imported beside a program with flags of its own.
    cli.define_config_flag()
    cli.define_process_flags()
    flags.DEFINE_bool("json", False, "Prints one JSON object.")
    cli.run(main, __doc__)
