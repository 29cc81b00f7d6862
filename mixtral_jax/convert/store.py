"""Writes a workdir with a checkpoint of ours, block by block, and never leaves half of one behind."""

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from mixtral_jax import remote
from mixtral_jax.config import Config, UserError
from mixtral_jax.convert import layout
from mixtral_jax.convert.weights import ordered
from mixtral_jax.data.tokenizer import MODEL_FILE, SentencePieceTokenizer
from mixtral_jax.workdir import store_run

IN_FLIGHT = 4  # blocks: one is read and turned while others are compressed and written


@contextlib.contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """Yields an empty directory beside `target` that becomes `target` at the end; after an error nothing is left.

    On an object store, where nothing is renamed, it is `target` itself.

    Raises:
        UserError: target exists and is not an empty directory, or cannot be made.
    """
    if remote.is_remote(target):
        with _new_on_a_store(target) as folder:
            yield folder
        return
    given, target = target, Path(target)
    try:
        target = target.expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"{given}: {error}") from None
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{given} exists already; give a new directory, or remove it first")
    if target == Path.cwd():
        raise UserError(f"{given} is the current directory, which cannot be replaced; give a new directory")
    work = target.with_name(f".{target.name}.{os.getpid()}.partial")
    made = [p for p in target.parents if not p.exists()]
    try:
        work.mkdir(parents=True)
        yield work
        if target.is_dir():
            target.rmdir()
        work.rename(target)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        for parent in made:  # the innermost first
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{given} was not made: {error}") from error
        raise


@contextlib.contextmanager
def _new_on_a_store(target: str | Path) -> Iterator[epath.Path]:
    folder = remote.folder(target)
    try:
        full = folder.is_dir() and any(folder.iterdir())
    except Exception as error:  # each store's library has errors of its own
        raise UserError(f"{target} cannot be read: {remote.first_line(error)}") from error
    if full:
        raise UserError(f"{target} exists already; give a new directory, or remove it first")
    try:
        yield folder
    except BaseException as error:
        with contextlib.suppress(Exception):
            folder.rmtree(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{target} was not made: {remote.first_line(error)}") from error
        raise


class _Streamed:
    """A parameter that is not in memory. Orbax asks for its shape and dtype; its blocks are read when written."""

    def __init__(self, name: str, letters: str, size: dict[str, int], dtype: np.dtype, read: Callable):
        self.name, self.letters, self.size, self.dtype, self._read = name, letters, size, dtype, read
        self.shape = layout.parameter_shape(name, size)
        self.ndim, self.nbytes = len(self.shape), int(np.prod(self.shape)) * dtype.itemsize
        self.chunks = layout.chunk_shape(name, letters, size)

    def blocks(self) -> Iterator[tuple[tuple, Callable[[], np.ndarray]]]:
        """Yields (index in the parameter, function that reads the block)."""
        for block in layout.blocks(self.name, self.letters, self.size):
            index = layout.block_index(self.name, self.letters, block)
            yield index, lambda block=block: self._read(self.name, block)


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Lets Orbax lay out and commit a checkpoint as always; only the writing of an array's content is ours.

    After an error in one parameter the others stop at their next block, and Orbax ends its save in good order; whoever
    called it must look at `error`. Raising in here would end Orbax's event loop under the writes still in flight.
    """

    def __init__(self, advance: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self.error: BaseException | None = None
        self.busy = 0  # parameters being written
        self._advance = advance
        self._slots = asyncio.Semaphore(IN_FLIGHT)

    def typestr(self) -> str:
        return "jax.Array"  # what is restored

    async def _open_and_write(self, value: _Streamed, tspec: dict, ts_context) -> None:
        self.busy += 1
        try:
            tspec["metadata"]["chunks"] = list(value.chunks)
            array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            writes = set()
            for index, read in value.blocks():
                await self._slots.acquire()
                task = asyncio.ensure_future(self._write(array[index], read))
                writes.add(task)
                task.add_done_callback(writes.discard)
            await asyncio.gather(*writes)
        finally:
            self.busy -= 1

    async def _write(self, array, read: Callable[[], np.ndarray]) -> None:
        try:
            if self.error is None:
                data = read()
                await array.write(data, can_reference_source_data_indefinitely=True)
                self._advance(data.nbytes)
        except Exception as error:
            self.error = self.error or error
        finally:
            self._slots.release()


def write_workdir(
    folder: Path,
    config: Config,
    dtypes: dict[str, np.dtype],
    letters: dict[str, str],
    read: Callable[[str, layout.Block], np.ndarray],
    tokenizer: Path | None,
    advance: Callable[[int], None],
) -> None:
    """Writes checkpoints/0 with the parameters, config.json and tokenizer/.

    Args:
        folder: an empty directory.
        config: of the run.
        dtypes: parameter -> dtype in which it is stored.
        letters: parameter -> the letters that its blocks are cut along.
        read: (parameter, block) -> values.
        tokenizer: a SentencePiece model to keep with the run.
        advance: called with the bytes written.

    Raises:
        UserError: the tokenizer is damaged.
    """
    size = layout.sizes(config.model)
    fingerprint = ""
    if tokenizer is not None:
        found = SentencePieceTokenizer(tokenizer.read_bytes(), str(tokenizer))
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer" / MODEL_FILE).write_bytes(tokenizer.read_bytes())
        fingerprint = found.fingerprint
    items = {name: _Streamed(name, letters[name], size, dtypes[name], read) for name in ordered(dtypes)}
    handler = _StreamedHandler(advance)
    registry = ocp.type_handlers.create_type_handler_registry((_Streamed, handler))
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "meta": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    manager = ocp.CheckpointManager(remote.folder(folder) / "checkpoints", item_handlers=handlers, options=options)
    meta = ocp.args.JsonSave({"tokenizer": fingerprint, "step": 0})
    try:
        manager.save(0, args=ocp.args.Composite(params=ocp.args.PyTreeSave(items), meta=meta))
    except BaseException as error:
        # Ctrl-C, or Orbax missing what an error of ours kept from being written: that first error is the one to tell.
        handler.error = handler.error or error
        while handler.busy:  # Orbax's thread must be out of the folder before it is removed
            time.sleep(0.05)
    finally:
        manager.close()
    if handler.error is not None:
        raise handler.error
    store_run(folder, config.to_dict())  # last: without it there is no run
