"""Several processes that work as one: how they find each other, wait for each other, agree, and share a batch's rows.

With one process every function here returns at once. Words travel through the key-value store of jax's coordination
service, which process 0 runs; arrays through XLA's collectives. docs/processes.md tells the whole of it.
"""

import contextlib
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils

from mixtral_jax import last_words
from mixtral_jax.config import AXES, RunError, UserError
from mixtral_jax.sharding import batch_sharding

FLAGS = ("coordinator", "processes", "process_id")
VARIABLES = tuple(f"MIXTRAL_JAX_{name.upper()}" for name in FLAGS)
WAIT_SECONDS = 300  # for the others, at the start
HEARTBEAT_SECONDS = 30  # after so long a silence jax's coordinator gives a process up for dead
LEAVE_SECONDS = 60  # for the others, at the end
DAY_MS = 24 * 3600 * 1000  # a barrier's limit: only a death should end the wait, and the coordinator tells of that


class Place(NamedTuple):
    """Where this process stands among the others."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process_id: int


_number = itertools.count()  # of exchanges and barriers; all processes make them in the same order


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


def _on_tpu_vm() -> bool:
    """Whether this host has a TPU: whether it is one of several only its metadata server knows, which jax asks."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return ("tpu" in platforms or not platforms) and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists())


def start(flags: Mapping[str, str | int | None], wait_seconds: int = WAIT_SECONDS) -> None:
    """Joins the other processes, if there are any; before anything asks jax for its devices.

    Args:
        flags: coordinator, processes, process_id; None or "" where not given. Without them MIXTRAL_JAX_COORDINATOR and so
            on count, then SLURM, Open MPI, TPU pods and GKE as jax finds them; else this process is alone.
        wait_seconds: how long to wait for the others.

    Raises:
        UserError: only some of the flags are given, or they contradict each other.
        RunError: the others did not come.
    """
    place = place_given(flags)
    found = None if place else cluster()
    if place is not None and place.processes > 1:
        known = dict(zip(("coordinator_address", "num_processes", "process_id"), place, strict=True))
        _initialize(wait_seconds, cluster_detection_method="deactivate", **known)
    elif place is None and (found or _on_tpu_vm()):
        try:
            _initialize(wait_seconds)
        except ValueError as error:
            if found:
                raise RunError(
                    f"{found} started several processes and jax does not find the others: {error}"
                ) from error
    if jax.process_count() > 1:
        from mixtral_jax import watch  # it imports this module

        watch.begin()
        if not speaks():
            last_words.prepare(process_id(), coordinator())


def _initialize(wait_seconds: int, **known) -> None:
    if jax.config.jax_cpu_collectives_implementation == "none":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    timer = threading.Timer(wait_seconds, _give_up, (wait_seconds,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=wait_seconds + 60,  # its own end is a stack trace of C++ that names nobody
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except RuntimeError as error:  # jax's own error is a RuntimeError
        raise RunError(f"joining the other processes failed: {error}") from error
    finally:
        timer.cancel()


def _give_up(seconds: int) -> None:
    """Ends this process, whose main thread waits inside jax for processes that do not come."""
    at, count = coordinator() or "an unknown address", process_count()
    came = connections(int(at.rpartition(":")[2])) if speaks() and at.rpartition(":")[2].isdigit() else None
    who = f"{came} of {count} processes came" if came else "not all processes came"
    name = "" if speaks() else f"process {process_id()}: "
    fix = (
        "look whether each host started its process, can reach that address, and was told the same number of processes"
    )
    os.write(2, f"{name}error: {who} within {seconds} s at {at}; {fix}\n".encode())
    os._exit(1)


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


def client():
    """jax's client of the coordination service, which has no public name; None in a process that is alone."""
    from jax._src import distributed

    return distributed.global_state.client


def coordinator() -> str:
    """HOST:PORT of process 0's coordination service."""
    from jax._src import distributed

    return distributed.global_state.coordinator_address


def together() -> bool:
    """Whether there are other processes. It starts no backend."""
    return client() is not None and process_count() > 1


def process_id() -> int:
    """The number of this process. It starts no backend, so that it can be asked at any time."""
    from jax._src import distributed

    return distributed.global_state.process_id or 0


def process_count() -> int:
    """The number of processes. It starts no backend."""
    from jax._src import distributed

    return distributed.global_state.num_processes or 1


def speaks() -> bool:
    """Whether this process prints and writes what all have in common; the others tell their errors only."""
    return process_id() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if together():
        client().wait_at_barrier(f"mixtral_jax/{next(_number)}/{name}", DAY_MS)


def exchange(name: str, text: str) -> list[str]:
    """Gives every process every process's text, by number; all must call it, and it waits for all."""
    if not together():
        return [text]
    key = f"mixtral_jax/{next(_number)}/{name}"
    client().key_value_set(f"{key}/{process_id()}", text)
    client().wait_at_barrier(f"{key}/written", DAY_MS)
    found = dict(client().key_value_dir_get(key))
    client().wait_at_barrier(f"{key}/read", DAY_MS)
    if speaks():
        client().key_value_delete(key)
    return [next(v for k, v in found.items() if k.endswith(f"/{i}")) for i in range(process_count())]


def decided(name: str, decide: Callable):
    """Returns what decide() gives on process 0, where alone it runs; the value must go through JSON.

    What it raises there is raised on all, as a RunError elsewhere.
    """
    if not together():
        return decide()
    error, found = None, None
    if speaks():
        try:
            found = decide()
        except Exception as raised:
            error = raised
    told = exchange(name, json.dumps([found, str(error) if error else None]) if speaks() else "")[0]
    if error is not None:
        raise error
    found, failed = json.loads(told)
    if failed:
        raise RunError(failed)
    return found


@contextlib.contextmanager
def process_0_first(name: str) -> Iterator[None]:
    """Lets process 0 do it alone and then the others: they find what it built, or build it on their own disks."""
    if not speaks():
        barrier(name)
    yield
    if speaks():
        barrier(name)


def same(what: Mapping[str, object], fix: str) -> None:
    """Checks that all processes have the same values.

    Raises:
        UserError: a process's values are not process 0's; each that differs is named with both values.
    """
    texts = exchange("same", json.dumps(dict(what), sort_keys=True, default=str))
    if len(set(texts)) == 1:
        return
    all_values = [json.loads(text) for text in texts]
    lines = [
        f"  {name}: process 0 {all_values[0].get(name)}, process {i} {values.get(name)}"
        for i, values in enumerate(all_values)
        for name in all_values[0]
        if values.get(name) != all_values[0].get(name)
    ]
    raise UserError("the processes do not agree; " + fix + ":\n" + "\n".join(lines[:12]))


def rows_here(mesh, n_rows: int) -> tuple[int, int]:
    """The rows of a global batch that the devices of this process hold, as start and stop.

    Processes whose devices share rows (context or tensor lie across them) get the same ones. Where a process's rows are
    not neighbours, those between are read too.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((n_rows, mesh.shape["context"])).values()
    spans = [index[0].indices(n_rows) for index in held]
    return min(span[0] for span in spans), max(span[1] for span in spans)


def mesh_devices(shape: tuple[int, ...], devices) -> np.ndarray:
    """Orders devices for the mesh: slices of a multi-slice TPU job along `data`, neighbours near each other inside.

    Only `data` crosses the data centre's network then, once a step; the other axes talk in every layer.

    Args:
        shape: sizes in the order of config.AXES.
        devices: of all processes.

    Raises:
        UserError: the slices do not divide `data`.
    """
    devices = list(devices)
    slices = {getattr(device, "slice_index", 0) or 0 for device in devices}
    if devices[0].platform != "tpu" or len(slices) == 1:  # on GPUs it counts hosts, which any axis may cross
        return mesh_utils.create_device_mesh(shape, devices)
    at, count = AXES.index("data"), len(slices)
    if shape[at] % count:
        raise UserError(
            f"mesh.data={shape[at]} and there are {count} slices; only data may cross slices: set mesh.data to a multiple of {count}"
        )
    inner, outer = list(shape), [1] * len(shape)
    inner[at], outer[at] = shape[at] // count, count
    return mesh_utils.create_hybrid_device_mesh(tuple(inner), tuple(outer), devices)


def visible(path: Path, content: str, name: str, seconds: float = 30.0) -> None:
    """Checks that every process sees a file as process 0 wrote it, some time later on a network's file system.

    Raises:
        UserError: one does not: the folder is not shared.
    """
    end = time.monotonic() + seconds
    seen = False
    while not seen and time.monotonic() < end:
        with contextlib.suppress(OSError):
            seen = path.read_text() == content
        if not seen:
            time.sleep(0.2)
    blind = [i for i, text in enumerate(exchange("visible", str(seen))) if text != "True"]
    if blind:
        who = ", ".join(map(str, blind[:8]))
        raise UserError(
            f"{name} is not one folder for all: process {who} does not see {path}, which process 0 wrote; use a folder that all "
            "hosts share"
        )
