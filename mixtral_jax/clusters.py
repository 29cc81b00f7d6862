"""Where this process stands among others, as flags, our launcher's variables or a scheduler's say. It needs no jax."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mixtral_jax.config import UserError

FLAGS = ("coordinator", "processes", "process_id")
VARIABLES = tuple(f"MIXTRAL_JAX_{name.upper()}" for name in FLAGS)
LAUNCHER = "MIXTRAL_JAX_LAUNCHER"  # the launcher's process, in the environment of those it starts
MISTAKE = "\x1e"  # begins a mistake's words from a process that has not met the others: the launcher shows one of them
SILENCE = re.compile(r"process (\d+)(?:, which coordinates the others,)? has given no sign of life for \d+ s")


class Place(NamedTuple):
    """Where this process stands among the others."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process_id: int


def place_given(flags: Mapping[str, str | int | None], environment: Mapping[str, str] = os.environ) -> Place | None:
    """Reads the place that flags or MIXTRAL_JAX_* variables give; None where neither says anything.

    Raises:
        UserError: only some of the three are given, or they contradict each other.
    """
    given = [flags.get(name) for name in FLAGS]
    names, form = [f"--{name}" for name in FLAGS], "--coordinator=HOST:PORT --processes=N --process_id=I"
    if all(value in (None, "") for value in given):
        given, names = [environment.get(name) for name in VARIABLES], VARIABLES
        form = " ".join(f"{name}={value}" for name, value in zip(VARIABLES, ("HOST:PORT", "N", "I"), strict=True))
    if all(value in (None, "") for value in given):
        return None
    told = ", ".join(f"{name}={'(not given)' if v in (None, '') else v}" for name, v in zip(names, given, strict=True))
    if any(value in (None, "") for value in given):
        raise UserError(f"{told}; give all three ({form}) or none of them")
    coordinator = str(given[0])
    if not re.fullmatch(r".+:\d+", coordinator) or not 0 < int(coordinator.rpartition(":")[2]) < 65536:
        raise UserError(f"{told}; the coordinator is HOST:PORT, for example node001:8476")
    try:
        count, index = int(given[1]), int(given[2])
    except ValueError:
        raise UserError(f"{told}; the last two are whole numbers") from None
    if not 0 <= index < count:
        raise UserError(f"{told}; processes are numbered from 0 to {max(count - 1, 0)}")
    return Place(coordinator, count, index)


def silence(process: int | str, seconds: int) -> str:
    """What is said of a process that is no longer heard; SILENCE reads it."""
    who = ", which coordinates the others," if int(process) == 0 else ""
    return f"process {process}{who} has given no sign of life for {seconds} s"


def cluster(environment: Mapping[str, str] = os.environ) -> str | None:
    """The scheduler that started several processes, of those that jax finds by itself; None: this process is alone."""
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environment:
            raise UserError(
                f"mpirun started {environment['OMPI_COMM_WORLD_SIZE']} processes and this Open MPI (5 or later) does not say where "
                "the first is; add --coordinator=HOST:PORT --processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK"
            )
        return "Open MPI"
    if len((environment.get("TPU_WORKER_HOSTNAMES") or "").split(",")) > 1:
        return "TPU"
    if int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "TPU"
    return None


def on_tpu_vm() -> bool:
    """Whether this host has a TPU: whether it is one of several only its metadata server knows, which jax asks."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return ("tpu" in platforms or not platforms) and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists())


def connections(port: int) -> int | None:
    """How many connections a port of this host has; None where the system does not tell."""
    found = 0
    try:
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state = line.split()[:4]
                found += state == "01" and int(local.rpartition(":")[2], 16) == port  # 01: established
    except (OSError, ValueError):
        return None
    return found
