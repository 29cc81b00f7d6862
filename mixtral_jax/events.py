"""TensorBoard's event files: scalars, texts and small histograms, one file for each start of a run.

A file is a sequence of records (length, its checksum, an Event, its checksum). They are written at once and not by a
thread, with nothing of TensorBoard's but its record format and its protocol buffers.
"""

import io
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from mixtral_jax.appending import AppendFile
from mixtral_jax.config import RunError


class EventFile:
    """Writes a new event file beside those of earlier starts."""

    def __init__(self, folder: str | os.PathLike, resume_step: int | None = None, keep_going: bool = False):
        """Creates the file and its folder.

        Args:
            folder: where event files lie; what else lies there is left alone.
            resume_step: the step a run resumes from: events of later steps, which the run will write again, are cut off
                the files of earlier starts. -1 starts afresh. None keeps all.
            keep_going: see AppendFile.

        Raises:
            RunError: a file cannot be written.
        """
        folder = Path(folder)
        if resume_step is not None:
            drop_after(folder, resume_step)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendFile(folder / name, keep_going)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step is not None:
            # A viewer that is open has read the events that were cut off; this makes it forget them.
            start = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=time.time(), step=max(resume_step + 1, 0), session_log=start))

    def write(self, step: int, seconds: float, values: Mapping[str, float | str | Sequence[float]]) -> None:
        """Writes one event.

        Args:
            step: number of optimizer steps done.
            seconds: its time, seconds since 1970.
            values: by tag; a number is a scalar, a string a text, a sequence a histogram whose bar i is its item i.

        Raises:
            RunError: the file cannot be written.
        """
        if values:
            summary = Summary(value=[_value(tag, value) for tag, value in values.items()])
            self._append(Event(wall_time=seconds, step=step, summary=summary))

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())


def _value(tag: str, value: float | str | Sequence[float]) -> Summary.Value:
    if isinstance(value, str):
        # TensorBoard reads a text as Markdown, where an indented line stands as it is.
        text = "\n".join("    " + line for line in value.split("\n"))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[text.encode()])
        plugin = SummaryMetadata.PluginData(plugin_name="text")
        return Summary.Value(tag=tag, tensor=tensor, metadata=SummaryMetadata(plugin_data=plugin))
    if isinstance(value, int | float):
        return Summary.Value(tag=tag, simple_value=value)
    bars = HistogramProto(min=0, max=len(value), num=sum(value), bucket=value, bucket_limit=range(1, len(value) + 1))
    bars.sum = sum((i + 0.5) * x for i, x in enumerate(value))
    bars.sum_squares = sum((i + 0.5) ** 2 * x for i, x in enumerate(value))
    return Summary.Value(tag=tag, histo=bars)


def drop_after(folder: Path, step: int) -> None:
    """Cuts the event files of a folder off before their first event of a later step; one that is left empty goes.

    Steps only grow inside a file, so that what follows is later too. Half a record at the end, which a reader would
    stumble over, goes as well.

    Raises:
        RunError: a file cannot be changed.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        end, content = 0, False
        for record_end, event in read_events(path):
            if event.step > step:
                break
            end, content = record_end, content or event.HasField("summary")
        try:
            if not content:
                path.unlink()
            elif end < path.stat().st_size:
                os.truncate(path, end)
        except OSError as error:
            raise RunError(f"{path} cannot be cut off at step {step}: {error.strerror or error}") from error


def read_events(path: Path) -> Iterator[tuple[int, Event]]:
    """Yields (offset of its end, event) of each record of a file, up to the first that is not whole."""
    with path.open("rb") as file:
        while True:
            header = file.read(12)
            if len(header) < 12:
                return
            (length,) = struct.unpack("<Q", header[:8])
            data = file.read(length + 4) if length < 2**31 else b""
            if len(data) < length + 4:
                return
            try:
                event = Event.FromString(data[:-4])
            except DecodeError:
                return
            yield file.tell(), event
