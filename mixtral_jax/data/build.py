"""Tokenises a source into its shards: in parallel, keeping the shards that are whole, and with progress."""

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path

from mixtral_jax.config import RunError
from mixtral_jax.data.once import DAMAGE, remove_leftovers
from mixtral_jax.data.rows import Part
from mixtral_jax.data.shards import Job, TooManyBadRows, damage, read_shard, task_key, write_shard
from mixtral_jax.data.shown import Shown

logger = logging.getLogger(__name__)

SHARDS = "shards"
SMALLEST_TASK, LARGEST_TASK, USUAL_TASKS = 8_000_000, 64_000_000, 1000  # bytes of text; tasks of a corpus in between
PARALLEL_BYTES = 32_000_000  # less text is done before the processes have started

Task = tuple[Part, ...]


def task_bytes(corpus_bytes: int) -> int:
    """The text of one shard. It depends on the corpus alone: another machine continues with the same shards."""
    return min(max(corpus_bytes // USUAL_TASKS, SMALLEST_TASK), LARGEST_TASK)


def make_tasks(parts: Iterable[Part], size: int) -> list[Task]:
    """Groups parts, in order, into tasks of at least `size` bytes, the last one perhaps of less."""
    tasks, task, total = [], [], 0
    for part in parts:
        task.append(part)
        total += part.size
        if total >= size:
            tasks.append(tuple(task))
            task, total = [], 0
    return [*tasks, tuple(task)] if task else tasks


def shard_path(folder: Path, i: int) -> Path:
    """The folder of shard i."""
    return folder / SHARDS / f"{i:06d}"


def build_shards(folder: Path, tasks: Sequence[Task], job: Job, progress: bool, verify: bool, complete: bool) -> None:
    """Makes the shards of a cache that are missing or damaged; needs the cache's lock.

    Args:
        folder: of the cache.
        tasks: what each shard is made of.
        job: the rest that matters.
        progress: show a bar on a terminal, log lines elsewhere.
        verify: compare the files of the shards that are there with their hashes too, not only with their sizes.
        complete: all shards were there once, so that a missing one is worth a warning.

    Raises:
        TooManyBadRows: more than job.max_bad_rows in all shards together; the whole shards are kept.
        UserError: a file that is not readable as its format.
        RunError: a process was killed.
        OSError: a full disk.
    """
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder / SHARDS / "*")
    for path in (folder / SHARDS).iterdir():
        if not (path.name.isdecimal() and int(path.name) < len(tasks)) and "building" not in path.name:
            shutil.rmtree(path)
    missing, bad_count = [], 0
    for i, task in enumerate(tasks):
        kept = _keep(shard_path(folder, i), task, verify, complete)
        if kept is None:
            missing.append(i)
        else:
            bad_count += sum(len(part["bad"]) for part in kept["parts"])
    if progress and 0 < len(missing) < len(tasks):
        logger.info("%d of %d shards are there and are kept", len(tasks) - len(missing), len(tasks))
    size = sum(part.size for i in missing for part in tasks[i])
    workers = min(cpus(), len(missing)) if size >= PARALLEL_BYTES else 1
    run = _in_processes if workers > 1 else _in_this_process
    todo = [(shard_path(folder, i), tasks[i]) for i in missing]
    # Closing ends the processes before an error leaves here, and with it the lock.
    with (
        Shown(size, progress, "tokenising", "tokenised") as shown,
        contextlib.closing(run(todo, job, workers, shown)) as results,
    ):
        for bad in results:
            bad_count += len(bad)
            if bad_count > job.max_bad_rows:
                raise TooManyBadRows(*bad[-1])


def cpus() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep(path: Path, task: Task, verify: bool, complete: bool) -> dict | None:
    """Returns the entry of a shard that is whole and made of this task; else None, with what there was removed."""
    if not path.exists():
        if complete:
            logger.warning("%s is missing; building this shard again", path)
        return None
    try:
        entry = read_shard(path)
        found = damage(path, entry["files"], verify)
        if not found and entry["task"] == task_key(task):
            return entry
    except DAMAGE as error:
        found = [str(error)]
    for sentence in found:
        logger.warning("%s; building this shard again", sentence)
    shutil.rmtree(path)
    return None


def _in_this_process(todo: list, job: Job, workers: int, shown: Shown) -> Iterator[list]:
    for path, task in todo:
        yield write_shard(path, task, job, job.tokenizer.encode_many, shown.add)


def _in_processes(todo: list, job: Job, workers: int, shown: Shown) -> Iterator[list]:
    """Yields the bad rows of shards as they are done, each written by a process; nothing else comes back."""
    # Not fork: the parent may run JAX, whose threads would not survive it.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    start = time.perf_counter()
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (job, counter, stop)) as pool:
            try:
                waiting = {pool.submit(_run_worker, path, task) for path, task in todo}
                while waiting:
                    done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                    shown.to(counter.value)
                    for future in done:
                        yield future.result()
            except (
                BaseException
            ):  # leave soon: without the tasks that have not begun, and with those that have unfinished
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise RunError(
            f"one of {workers} processes that tokenise was killed after {time.perf_counter() - start:.0f} s (out of memory? "
            'or a script without `if __name__ == "__main__":`?); the finished shards are kept: run it again'
        ) from error


class _Stopped(Exception):
    """Another worker has failed."""


_worker: tuple = ()  # a worker process's job, counter and stop


def _start_worker(job: Job, counter, stop) -> None:
    global _worker
    _worker = (job, counter, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent tells what to do
    # Nobody else would end a worker whose parent was killed, and the next build may already have the lock.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait_for_end([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run_worker(path: Path, task: Task) -> list:
    job, counter, stop = _worker

    def tick(size: int) -> None:
        if stop.is_set():
            raise _Stopped
        with counter.get_lock():
            counter.value += size

    # One text after another, not encode_many: all cores have a process.
    return write_shard(path, task, job, lambda texts: map(job.tokenizer.encode_array, texts), tick)
