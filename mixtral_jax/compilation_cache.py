"""Compiled programs are kept on disk, so that a restart does not compile again what was compiled before."""

import hashlib
import logging
import os
import platform
from pathlib import Path

import jax
import jaxlib

_log = logging.getLogger(__name__)

ROOT = "~/.cache/mixtral_jax/xla"
MIN_SECONDS = 0.5  # what compiles faster is not worth a file; jax's own bound is 1 s


def enable(root: str | os.PathLike = ROOT) -> Path | None:
    """Turns jax's persistent compilation cache on; call it before anything is compiled.

    What the user has set stays: JAX_COMPILATION_CACHE_DIR chooses another folder, JAX_ENABLE_COMPILATION_CACHE=false
    turns the cache off. It starts no backend, so that it may be called before jax.distributed is initialised.

    Args:
        root: holds a folder for each version of jaxlib and kind of CPU.

    Returns:
        The folder in use; None if the cache is off, or if its folder cannot be written, which is only a warning.
    """
    path = location(root)
    if path is None:
        return None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if jax.config.jax_compilation_cache_dir:
        return path
    try:
        # For its owner alone: whoever can write into it can make this process run anything.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"[Errno 13] Permission denied: '{path}'")
    except OSError as error:
        _log.warning("programs are compiled anew in every run: no compilation cache (%s)", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    return path


def location(root: str | os.PathLike = ROOT) -> Path | None:
    """The folder that enable() would use, without making it; None if the user has turned the cache off."""
    if not jax.config.jax_enable_compilation_cache:
        return None
    chosen = jax.config.jax_compilation_cache_dir
    if chosen is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        return folder(root)
    return Path(chosen) if chosen else None


def folder(root: str | os.PathLike = ROOT) -> Path:
    """The folder for this version of jaxlib and this kind of CPU.

    A program compiled for one CPU may use instructions that another lacks. jax does not look at that, and homes are
    shared over machines.
    """
    return Path(root).expanduser() / f"jaxlib-{jaxlib.__version__}-{cpu_fingerprint()}"


def cpu_fingerprint(cpuinfo: str = "/proc/cpuinfo") -> str:
    """8 hexadecimal digits that stand for the CPU's model and its instruction sets."""
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part", "CPU implementer")
    try:
        first = Path(cpuinfo).read_text().split("\n\n")[0]
        facts = [line for line in first.splitlines() if line.partition("\t")[0].partition(":")[0].strip() in names]
    except OSError:  # not Linux
        facts = []
    text = "\n".join(sorted(facts) or [platform.processor(), platform.node()])
    return hashlib.sha256(f"{platform.machine()}\n{text}".encode()).hexdigest()[:8]
