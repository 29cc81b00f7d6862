"""Several processes that work as one: how they find each other, wait for each other, agree, and share a batch's rows.

With one process every function here returns at once. Words travel through the key-value store of jax's coordination
service, which process 0 runs; arrays through XLA's collectives. docs/processes.md tells the whole of it.
"""

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax

from mixtral_jax import clusters, last_words
from mixtral_jax.config import RunError, UserError
from mixtral_jax.sharding import batch_sharding

WAIT_SECONDS = 300  # for the others, at the start
TELL_SECONDS = 15  # until the first word about that
HEARTBEAT_SECONDS = 30  # after so long a silence jax's coordinator gives a process up for dead
LEAVE_SECONDS = 60  # for the others, at the end
DAY_MS = 24 * 3600 * 1000  # a barrier's limit: only a death should end the wait, and the coordinator tells of that


_number = itertools.count()  # of exchanges and barriers; all processes make them in the same order


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
    place = clusters.place_given(flags)
    found = None if place else clusters.cluster()
    if place is not None and place.processes > 1:
        known = dict(zip(("coordinator_address", "num_processes", "process_id"), place, strict=True))
        _initialize(wait_seconds, cluster_detection_method="deactivate", **known)
    elif place is None and (found or clusters.on_tpu_vm()):
        try:
            _initialize(wait_seconds)
        except ValueError as error:
            if found:
                raise RunError(
                    f"{found} started several processes and jax does not find the others: {error}"
                ) from error
    if together() and not speaks():
        last_words.prepare(process_id(), coordinator())


def _initialize(wait_seconds: int, **known) -> None:
    if jax.config.jax_cpu_collectives_implementation == "none":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    timers = [threading.Timer(TELL_SECONDS, _tell), threading.Timer(wait_seconds, _give_up, (wait_seconds,))]
    for timer in timers:
        timer.daemon = True
        timer.start()
    # Python would see Ctrl-C only after jax has returned, and there is nothing to save yet.
    waits = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    waits = waits and threading.current_thread() is threading.main_thread()
    if waits:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
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
        for timer in timers:
            timer.cancel()
        if waits:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _came() -> tuple[str, str]:
    """Who has come, as far as this process can know it, and to where."""
    at, count = coordinator() or "an unknown address", process_count()
    port = at.rpartition(":")[2]
    came = clusters.connections(int(port)) if speaks() and port.isdigit() else None
    return f"{came} of {count} processes came" if came else "not all processes came", at


def _tell() -> None:
    """Says for what this process waits, long before it gives up."""
    who, at = _came()
    name = "" if speaks() else f"process {process_id()}: "
    os.write(2, f"{name}{who} to {at} so far; waiting\n".encode())


def _give_up(seconds: int) -> None:
    """Ends this process, whose main thread waits inside jax for processes that do not come."""
    who, at = _came()
    name = "" if speaks() else f"process {process_id()}: "
    fix = (
        "look whether each host started its process, can reach that address, and was told the same number of processes"
    )
    os.write(2, f"{name}error: {who} within {seconds} s at {at}; {fix}\n".encode())
    os._exit(1)


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
