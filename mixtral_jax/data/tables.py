"""Tables: Parquet files in row groups, and Arrow files and streams in record batches.

Read by pyarrow rather than `datasets`: local files are then read without a thought of the network, and piece by piece.
"""

from collections.abc import Iterator, Sequence

from mixtral_jax.config import UserError
from mixtral_jax.data.bad_rows import Unreadable, check_text, no_key

ROWS = 1000  # rows that are strings in memory at the same time


def group_sizes(kind: str, name: str, path: str) -> Iterator[tuple[int, int]]:
    """Yields (rows, bytes) of each row group or record batch; no text is read for it.

    Raises:
        UserError: the file is not readable as its format.
    """
    if kind != "parquet":
        for batch in _record_batches(name, path, 0, None):
            yield batch.num_rows, batch.nbytes
        return
    metadata = _open_parquet(name, path).metadata
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        yield group.num_rows, group.total_byte_size


def read_table(
    kind: str, name: str, path: str, begin: int, end: int, text_key: str
) -> Iterator[tuple[int, str | Unreadable]]:
    """Yields (number from 1, text) of the rows in row groups or record batches begin to end - 1.

    Raises:
        UserError: the file is not readable as its format.
    """
    if kind == "parquet":
        # Without the key any rows will do: they are only counted, and the message names what is there.
        columns = [text_key] if text_key in _open_parquet(name, path).schema_arrow.names else None
        batches = _parquet_batches(name, path, begin, end, columns)
    else:
        batches = _record_batches(name, path, begin, end)
    number = 0
    for batch in batches:
        keys = batch.schema.names
        column = batch.column(keys.index(text_key)) if text_key in keys else None
        for start in range(0, batch.num_rows, ROWS):
            rows = range(start, min(start + ROWS, batch.num_rows))
            texts = _strings(column[rows.start : rows.stop], text_key) if column is not None else None
            for text in texts or (no_key(keys, text_key) for _ in rows):
                number += 1
                yield number, text


def read_table_records(
    kind: str, name: str, path: str, begin: int, end: int, keys: Sequence[str]
) -> Iterator[tuple[int, dict | Unreadable]]:
    """Yields (number from 1, record) of the rows in row groups or record batches begin to end - 1.

    Args:
        kind, name, path, begin, end: see read_table.
        keys: the columns to read; the others stand in a record without their values, as None.

    Raises:
        UserError: the file is not readable as its format.
    """
    if kind == "parquet":
        names = _open_parquet(name, path).schema_arrow.names
        batches = _parquet_batches(name, path, begin, end, [key for key in names if key in keys] or None)
    else:
        names, batches = None, _record_batches(name, path, begin, end, nested=True)
    number = 0
    for batch in batches:
        blank = dict.fromkeys(names or batch.schema.names)
        wanted = batch.select([i for i, key in enumerate(batch.schema.names) if key in keys])
        for start in range(0, batch.num_rows, ROWS):
            rows = wanted.slice(start, ROWS)
            for i in range(min(ROWS, batch.num_rows - start)):
                number += 1
                yield number, _record(rows, i, blank)


def _record(rows, i: int, blank: dict) -> dict | Unreadable:
    record = dict(blank)
    for key, column in zip(rows.schema.names, rows.columns):
        try:
            record[key] = column[i].as_py()
        except UnicodeDecodeError as error:  # Arrow does not check its strings
            return Unreadable(f"{key!r} holds invalid UTF-8 ({error.reason} at byte {error.start}); remove the row")
        except (ValueError, OverflowError) as error:  # a time that Python has no date for
            return Unreadable(f"{key!r} cannot be read ({error}); remove the row")
    return record


def _strings(column, text_key: str) -> Iterator[str | Unreadable]:
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check its strings
        values = column
    for value in values:
        try:
            text = value.as_py() if values is column else value
        except UnicodeDecodeError as error:
            yield Unreadable(f"{text_key!r} is invalid UTF-8 ({error.reason} at byte {error.start}); remove the row")
        else:
            yield check_text(text, text_key)


def _open_parquet(name: str, path: str):
    import pyarrow.parquet  # takes a moment; the other kinds do without

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable_table(name, "Parquet", error) from error


def _parquet_batches(name: str, path: str, begin: int, end: int, columns: list[str] | None) -> Iterator:
    import pyarrow

    file = _open_parquet(name, path)
    groups = list(range(begin, end))
    try:
        yield from file.iter_batches(batch_size=ROWS, row_groups=groups, columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable_table(name, "Parquet", error) from error


def _record_batches(name: str, path: str, begin: int, end: int | None, nested: bool = False) -> Iterator:
    """Yields record batches begin to end - 1 of an Arrow file or stream, mapped into memory; `nested`: see _checked."""
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(path) as mapped:
            try:
                reader = pyarrow.ipc.open_file(mapped)
            except pyarrow.ArrowInvalid:
                # A stream, which `datasets` writes, has no index: the batches before are skipped by their headers.
                mapped.seek(0)
                for i, batch in enumerate(pyarrow.ipc.open_stream(mapped)):
                    if end is not None and i >= end:
                        return
                    if i >= begin:
                        yield _checked(batch, nested)
            else:
                for i in range(begin, reader.num_record_batches if end is None else end):
                    yield _checked(reader.get_batch(i), nested)
    except (pyarrow.ArrowException, OSError, SystemError, UnicodeDecodeError) as error:  # the last two of metadata
        raise _unreadable_table(name, "Arrow", error) from error


def _checked(batch, nested: bool):
    """Returns a record batch whose buffers can be read: Arrow trusts a file, and damage would end the process.

    Args:
        batch: the record batch.
        nested: check columns of all types, lists and structs too; else those of strings.

    Raises:
        pyarrow.ArrowInvalid: a length or an offset points to outside of the batch.
    """
    import pyarrow

    batch.validate()
    for column in batch.columns:
        # As bytes, for only the offsets are to be right here: text that is no UTF-8 is one bad row, not a bad file.
        if pyarrow.types.is_string(column.type):
            column.cast(pyarrow.binary()).validate(full=True)
        elif pyarrow.types.is_large_string(column.type):
            column.cast(pyarrow.large_binary()).validate(full=True)
        elif nested:
            column.view(_as_bytes(column.type)).validate(full=True)
    return batch


def _as_bytes(kind):
    """The type of the same memory with bytes for strings, inside of lists and structs too."""
    import pyarrow

    if pyarrow.types.is_string(kind):
        return pyarrow.binary()
    if pyarrow.types.is_large_string(kind):
        return pyarrow.large_binary()
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(_as_bytes(kind.value_type))
    if pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(_as_bytes(kind.value_type))
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([(field.name, _as_bytes(field.type)) for field in kind])
    return kind


def _unreadable_table(name: str, kind: str, error: Exception) -> UserError:
    return UserError(f"{name}: not readable as {kind} ({error}); write it again or leave it out of data.path")
