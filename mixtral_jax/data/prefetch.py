"""Reading ahead: batches are made in threads while the device works."""

import queue
import threading
from collections.abc import Iterator

from mixtral_jax.data.batch import Batch
from mixtral_jax.data.loader import Batches
from mixtral_jax.data.mixture import Mixture
from mixtral_jax.data.windows import WINDOW_ROWS, StreamedBatches

WINDOWS_AHEAD = 4  # 40 MB each at 4,096 positions
CLOSE_SECONDS = 10  # how long closing waits for a thread that is waiting for a disk or a network


def prefetch(
    batches: Batches | Mixture | StreamedBatches,
    first: int,
    last: int,
    workers: int,
    start: int = 0,
    stop: int | None = None,
    state: dict | None = None,
) -> Iterator[tuple[int, Batch, dict]]:
    """Returns a generator of (k, rows start to stop - 1 of batch k, state after it), k from first to last - 1, in order.

    What goes wrong in a thread is raised by the generator, when its batch is due. Closing the generator stops the threads.

    Args:
        batches: indexed or streamed.
        first, last: the batches to read, last excluded.
        workers: threads that read indexed batches; a stream has one, and the tokenizer's own.
        start, stop: the rows of each batch that this process needs (stop None: to its end).
        state: of a stream, what came with batch first - 1, perhaps by way of JSON; None at the beginning.

    Raises:
        ValueError: at once; a stream is to start at a later batch without its state, or with the state of another batch.
    """
    if not isinstance(batches, StreamedBatches):
        return _indexed(batches, first, last, workers, start, stop)
    row = state["row"] if state else 0
    if row != first * batches.batch_size:
        have = f"the state given is that of row {row}" if state else "no state was given"
        raise ValueError(f"a stream is to start at batch {first}, row {first * batches.batch_size}; {have}")
    return _streamed(batches, first, last, start, stop, state)


def _indexed(batches, first, last, workers, start, stop) -> Iterator[tuple[int, Batch, dict]]:
    import grain  # here, because it takes a second that the command line and the tests need not spend

    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    steps = grain.MapDataset.range(first, last)
    iterator = iter(steps.map(lambda k: (int(k), batches.rows(int(k), start, stop), {})).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def _streamed(batches: StreamedBatches, first, last, start, stop, state) -> Iterator[tuple[int, Batch, dict]]:
    # A window is tokenised in one go. Meanwhile the device lives on the batches that wait: a window's rows per source,
    # whose windows may all end together.
    rows = WINDOW_ROWS * min(len(batches.schedule.names), WINDOWS_AHEAD)
    depth = -(-rows // batches.batch_size) + 2
    ready, closed = queue.Queue(maxsize=depth), threading.Event()

    def work():
        try:
            read = batches.read(state, start, stop, closed=closed.is_set)
            for k in range(first, last):
                batch, after = next(read)
                ready.put((k, batch, after))
                if closed.is_set():
                    return
        except BaseException as error:  # whatever it is, it belongs to whoever waits for the batch
            ready.put(error)

    thread = threading.Thread(target=work, name="stream", daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            found = ready.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        closed.set()
        while thread.is_alive() and not ready.empty():  # room for what the thread may be waiting to put
            ready.get_nowait()
        thread.join(CLOSE_SECONDS)
