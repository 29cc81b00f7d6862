"""A temporary corpus and its configuration, and a tokenizer trained once for the whole folder."""

import json

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from mixtral_jax.config import DataConfig, SourceConfig
from mixtral_jax.data import stream, windows
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.data.windows import StreamedBatches

KINDS = ["text", "jsonl", "parquet", "arrow", "hub"]
ROW = 32  # positions in a row of make_stream


@pytest.fixture
def make_data(tmp_path):
    """Returns a function that makes a DataConfig, by default of the folder tmp_path/corpus."""
    (tmp_path / "corpus").mkdir()

    def make(**changes):
        keys = {
            "source": "text",
            "path": str(tmp_path / "corpus"),
            "text_key": "text",
            "mixture": (),
            "streaming": False,
            "max_bad_rows": 0,
            "tokenizer": "bytes",
            "cache_dir": str(tmp_path / "cache"),
            "heldout_fraction": 0.3,
            "workers": 2,
            "packing": True,
        }
        return DataConfig(**{**keys, **changes})

    return make


@pytest.fixture(scope="session")
def shared_cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("shared_cache"))


@pytest.fixture(scope="session")
def stdlib_tokenizer(shared_cache_dir):
    return load_tokenizer("stdlib:4096", shared_cache_dir)


def text(i):
    """A text of its own for every i, of 5 to 200 characters."""
    return f"{i:05d}" + "".join(chr(97 + (i * j) % 26) for j in range(i * 7919 % 195))


def write(folder, kind, count=60, first=0, rows_per_file=25):
    """Writes texts as files of a kind, and returns the path to give to data.path."""
    folder.mkdir(exist_ok=True)
    numbers = range(first, first + count)
    if kind == "text":
        for i in numbers:
            (folder / f"{i:05d}.txt").write_text(text(i))
        return str(folder)
    for f, start in enumerate(range(0, count, rows_per_file)):
        texts = [text(i) for i in numbers[start : start + rows_per_file]]
        path = folder / f"{f}.{'parquet' if kind == 'hub' else kind}"
        table = pyarrow.table({"n": list(range(len(texts))), "text": texts})
        if kind == "jsonl":
            # With a blank line here and there, and with and without a newline at the end.
            lines = "".join("\n" * (i % 5 == 0) + json.dumps({"text": one}) + "\n" for i, one in enumerate(texts))
            path.write_text(lines if f else lines.rstrip())
        elif kind == "arrow":
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
        else:
            pyarrow.parquet.write_table(table, path, row_group_size=7)
    return str(folder)


@pytest.fixture
def small(monkeypatch):
    """Windows, parts and chunks so small that a corpus of some kilobytes has many."""
    monkeypatch.setattr(windows, "WINDOW_ROWS", 10)
    monkeypatch.setattr(windows, "CHUNK_CHARACTERS", 700)
    monkeypatch.setattr(stream, "PART_BYTES", 900)
    monkeypatch.setattr(stream, "STATE_ROWS", 7)


@pytest.fixture
def make_stream(make_data, tmp_path, small):
    """Returns a function that writes a corpus of one kind, or a mixture of several, and opens it as streamed batches."""

    def make(*kinds, batch_size=4, seed=0, **changes):
        sources = [
            SourceConfig(kind, write(tmp_path / kind, kind, 60 // len(kinds) + s, 1000 * s), "text", kind, 1.0 + s)
            for s, kind in enumerate(kinds)
        ]
        data = make_data(path="", mixture=tuple(sources), streaming=True, **changes)
        return StreamedBatches(data, load_tokenizer("bytes", ""), batch_size=batch_size, seq_len=ROW, seed=seed)

    return make


def write_bad(folder, bad=(3, 17, 18)):
    """A file of JSON lines of which some, counted from 1, are not JSON."""
    folder.mkdir(exist_ok=True)
    lines = ["{bad" if i in bad else json.dumps({"text": text(i)}) for i in range(1, 41)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return SourceConfig("jsonl", str(folder), "text", "bad", 1.0)
