"""Arrow files and data sets of the hub, the network that local sources never touch, and the memo of files' hashes."""

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data import fingerprint as fingerprint_module
from mixtral_jax.data.cache import build_cache
from mixtral_jax.data.text import BadRows, documents, fingerprint, source_files
from mixtral_jax.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes", "unused")


def pairs(source, **limit):
    """(id without its folder, text) of every document."""
    return [(document.id.rpartition("/")[2], document.text) for document in documents(source, BadRows(**limit))]


@pytest.fixture
def no_network(monkeypatch):
    """Connections fail as if it were unplugged, and are remembered."""
    tried = []

    def refuse(*args, **_):
        tried.append(args)
        raise OSError("the network is unplugged")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


@pytest.fixture
def hub(make_data, monkeypatch, tmp_path):
    """A data set as the hub has them, in a folder: its path. What is fetched goes to a folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets.disable_progress_bars()
    folder = tmp_path / "corpus" / "set"
    folder.mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"n": i, "text": f"{split} {i}" * (i != 2)}) for i in range(20)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    yield str(folder)
    datasets.enable_progress_bars()


def write_arrow(path, new=pyarrow.ipc.new_file, **columns):
    table = pyarrow.table(columns)
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("new", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow(make_data, tmp_path, no_network, new):
    write_arrow(tmp_path / "corpus" / "b[1].arrow", new, n=[1, 2, 3], text=["one", "", "three"])
    write_arrow(tmp_path / "corpus" / "a.arrow", new, text=["zero"])
    data = make_data(source="arrow")
    assert pairs(data) == [("a.arrow:1", "zero"), ("b[1].arrow:1", "one"), ("b[1].arrow:3", "three")]
    assert not no_network


def test_a_folder_of_save_to_disk(make_data, tmp_path, no_network):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(10)]})
    splits = datasets.DatasetDict(train=rows, test=rows.select([1]))
    datasets.disable_progress_bars()
    splits.save_to_disk(tmp_path / "corpus", num_shards={"train": 3, "test": 1})
    with pytest.raises(UserError, match=r"holds the splits train, test; set data\.path to one, as .*/corpus/train"):
        list(documents(make_data_of(make_data, tmp_path / "corpus")))
    shutil.copy(tmp_path / "corpus/test/data-00000-of-00001.arrow", tmp_path / "corpus/train/cache-1234.arrow")
    found = list(documents(make_data_of(make_data, tmp_path / "corpus" / "train")))
    assert [document.text for document in found] == [f"text {i}" for i in range(10)]
    assert found[4].id.endswith("train/data-00001-of-00003.arrow:1")
    assert not no_network


def make_data_of(make_data, path):
    return dataclasses.replace(SourceConfig("arrow", "", "text", "saved", 1.0), path=str(path))


BINARY = pyarrow.array([b"fine", b"\xff\xfe", b"good"]).cast(pyarrow.binary())


def invalid_strings():
    """Arrow's strings are not checked: the second of three is not UTF-8."""
    return pyarrow.StringArray.from_buffers(3, BINARY.buffers()[1], BINARY.buffers()[2])


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (["fine", None, "good"], "'text' is of type NoneType; it must be a string"),
        ([1, 2, 3], "'text' is of type int"),
        (BINARY, "'text' is of type bytes"),
        (invalid_strings(), "'text' is invalid UTF-8"),
    ],
)
@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_bad_rows_of_tables(make_data, tmp_path, kind, column, reason, caplog):
    path = tmp_path / "corpus" / f"a.{kind}"
    table = pyarrow.table({"text": column})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        write_arrow(path, text=table.column("text"))
    data = make_data(source=kind)
    bad = 3 if reason.endswith(("int", "bytes")) else 1
    row = 1 if bad == 3 else 2
    with pytest.raises(UserError, match=rf"a\.{kind}:{row}: {reason}"):
        pairs(data)
    if bad == 1:
        assert [text for _, text in pairs(data, limit=1)] == ["fine", "good"]
        assert f"skipped {path}:2: {reason}" in caplog.text
    else:
        with pytest.raises(UserError, match=rf"a\.{kind}:3: {reason}.*; 2 bad rows were skipped before it"):
            pairs(data, limit=2)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_missing_columns_and_damaged_tables(make_data, tmp_path, kind):
    data, path = make_data(source=kind), tmp_path / "corpus" / f"a.{kind}"
    columns = {"n": [1], "content": ["one"]}
    write_arrow(path, **columns) if kind == "arrow" else pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(UserError, match=rf"a\.{kind}:1: no key 'text'; it has 'n', 'content'; set data\.text_key"):
        pairs(data)
    assert pairs(dataclasses.replace(data, text_key="content")) == [(f"a.{kind}:1", "one")]
    raw = path.read_bytes()
    for broken in (raw[: len(raw) // 2], b"", b"nothing of the kind", raw[:40] + b"\xff" * (len(raw) - 40)):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=rf"a\.{kind}: not readable as {kind.title()}"):
            pairs(dataclasses.replace(data, text_key="content"))


def hub_source(path):
    return SourceConfig("hub", path, "text", "hub", 1.0)


def test_hub(hub, make_data, no_network):
    texts = [(f"set:{i + 1}", f"train {i}") for i in range(20) if i != 2]
    assert pairs(hub_source(hub)) == texts
    assert pairs(hub_source(f"{hub}:default"))[0] == ("set:default:1", "train 0")
    assert pairs(hub_source(f"{hub}::test"))[0] == ("set::test:1", "test 0")
    data = make_data(source="hub", path=hub)
    corpus = build_cache(data, BYTES)
    found = [id for split in (corpus.train, corpus.heldout) for id in split.ids]
    assert sorted(found) == sorted(f"{hub}:{i + 1}" for i in range(20) if i != 2)
    assert fingerprint(hub_source(hub)) == fingerprint(hub_source(hub)) != fingerprint(hub_source(f"{hub}::test"))


def test_hub_rows_are_numbered_through_the_files(hub, monkeypatch):
    import datasets

    (Path(hub) / "train.jsonl").rename(Path(hub) / "train-1.jsonl")
    (Path(hub) / "train-2.jsonl").write_text('{"n": 20, "text": "train 20"}')
    monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", 1)
    assert len(source_files(hub_source(hub))) == 2
    assert [id for id, _ in pairs(hub_source(hub))] == [f"set:{i + 1}" for i in range(21) if i != 2]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}::nope", r"Unknown split \"nope\".*write NAME:SUBSET:SPLIT"),
        ("{}:nope", r"BuilderConfig 'nope' not found.*write NAME:SUBSET"),
        ("{}::train[:5]", r"'train\[:5\]' is no name of a split"),
        ("{}:a:b:c", r"'b:c' is no name of a split"),
        ("/no/such/set", r"Couldn't find any data file.*correct the name"),
        ("not a name", r"Repo id must use.*correct data\.path"),
    ],
)
def test_mistakes_with_the_hub_are_explained(hub, path, message):
    with pytest.raises(UserError, match=message) as caught:
        source_files(hub_source(path.format(hub)))
    assert str(caught.value).startswith("data.path=")


def test_without_a_network_the_hub_is_explained(hub, monkeypatch, no_network):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between retries
    with pytest.raises(
        UserError, match=r"data\.path='some/set': Couldn't reach 'some/set' on the Hub.*; connect to the"
    ):
        source_files(hub_source("some/set"))
    assert no_network  # it was tried


def test_gated_and_private_data_sets_are_explained(monkeypatch):
    import datasets

    def gated(*args, **_):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'some/set' is a gated dataset on the Hub. Visit the page to ask for access."
        )

    def missing(*args, **_):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'some/set' doesn't exist on the Hub or cannot be accessed."
        )

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(UserError, match=r"accept its terms on the hub and log in"):
        source_files(hub_source("some/set"))
    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(UserError, match=r"correct the name, or log in"):
        source_files(hub_source("some/set"))


def test_a_saved_folder_is_no_data_set_of_the_hub(make_data, tmp_path):
    (tmp_path / "corpus" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"written by save_to_disk; read it with data\.source=arrow"):
        source_files(hub_source(str(tmp_path / "corpus")))


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize(
    "saved",
    ["{", '{"foo": 1}', "[]", '{"splits": []}', '{"splits": [3]}', '{"splits": "ab"}']
    + ['{"_data_files": 1}', '{"_data_files": []}', '{"_data_files": [{"filename": 1}]}', "[" * 100_000],
)
def test_a_saved_folder_whose_description_is_damaged(tmp_path, name, saved):
    (tmp_path / name).write_text(saved)
    with pytest.raises(UserError, match=rf"{name} (cannot be read|is not what save_to_disk).*save the data set again"):
        source_files(SourceConfig("arrow", str(tmp_path), "text", "a", 1.0))


def test_a_mixture_of_the_hub_and_local_files_leaves_the_environment_alone(hub, make_data, tmp_path):
    before = dict(os.environ)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"row {i}" for i in range(20)]}), tmp_path / "corpus" / "a.parquet"
    )
    local = SourceConfig("parquet", str(tmp_path / "corpus"), "text", "local", 1.0)
    corpus = build_cache(make_data(path="", mixture=(local, hub_source(hub))), BYTES)
    assert [len(s.train.ids) + len(s.heldout.ids) for s in corpus.sources] == [20, 19]
    assert dict(os.environ) == before


# The memo of files' hashes.


@pytest.fixture
def reads(monkeypatch):
    """Counts the files that are read to be hashed."""
    calls, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: calls.append(file.name) or digest(file, name))
    return calls


@pytest.fixture
def old_files(make_data, tmp_path):
    """Files that have not changed for a while."""
    for name in "ab":
        (tmp_path / "corpus" / f"{name}.txt").write_text(name)
        os.utime(tmp_path / "corpus" / f"{name}.txt", (1e9, 1e9))
    return make_data()


def test_files_are_hashed_once(old_files, reads, tmp_path):
    cache = tmp_path / "cache"
    plain = fingerprint(old_files)
    reads.clear()
    assert fingerprint(old_files, cache_dir=cache) == plain
    assert len(reads) == 2
    assert fingerprint(old_files, cache_dir=cache) == plain
    assert len(reads) == 2
    changed = tmp_path / "corpus" / "b.txt"
    changed.write_text("c")
    os.utime(changed, (1e9 + 1, 1e9 + 1))
    assert fingerprint(old_files, cache_dir=cache) == fingerprint(old_files) != plain
    assert reads[2:] == [str(changed)] + [str(tmp_path / "corpus" / f"{name}.txt") for name in "ab"]


@pytest.mark.parametrize("what", ["size", "time", "inode"])
def test_each_sign_of_a_change_counts(old_files, reads, tmp_path, what):
    path = tmp_path / "corpus" / "a.txt"
    fingerprint(old_files, cache_dir=tmp_path)
    reads.clear()
    if what == "inode":
        shutil.copy(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
    elif what == "size":
        path.write_text("longer")
    os.utime(path, ns=(10**18, 10**18 + (what == "time")))
    fingerprint(old_files, cache_dir=tmp_path)
    assert reads == [str(path)]


def test_files_that_have_just_changed_are_not_remembered(old_files, reads, tmp_path):
    path = tmp_path / "corpus" / "a.txt"
    os.utime(path)
    for _ in range(2):
        fingerprint(old_files, cache_dir=tmp_path)
    assert reads.count(str(path)) == 2
    assert len(reads) == 3


@pytest.mark.parametrize(
    "memo", [b"", b"{", b"[]", b"\xff", b'{"PATH": 5}', b'{"PATH": [1, 1000000000000000000, 1, "xy"]}']
)
def test_a_broken_memo_is_ignored(old_files, tmp_path, memo):
    plain = fingerprint(old_files)
    fingerprint(old_files, cache_dir=tmp_path)
    path = tmp_path / fingerprint_module.MEMO
    name = str(tmp_path / "corpus" / "a.txt").encode()
    path.write_bytes(memo.replace(b"PATH", name))
    assert fingerprint(old_files, cache_dir=tmp_path) == plain
    assert len(json.loads(path.read_bytes())) == 2


def test_processes_add_to_the_memo_and_lose_nothing(make_data, tmp_path):
    sources = []
    for i in range(8):
        path = tmp_path / "corpus" / f"{i}.txt"
        path.write_text(str(i))
        os.utime(path, (1e9, 1e9))
        sources.append(make_data_of(make_data, path))
    threads = [
        threading.Thread(target=fingerprint_module._write_memo, args=(tmp_path / "memo", {str(i): [i, i, i, "0" * 64]}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(fingerprint_module._read_memo(tmp_path / "memo")) == set("01234567")


def test_a_folder_that_cannot_be_written_forgets(old_files, tmp_path):
    (tmp_path / "file").write_text("")
    assert fingerprint(old_files, cache_dir=tmp_path / "file") == fingerprint(old_files)


def test_a_file_that_cannot_be_read_is_named(make_data, tmp_path):
    (tmp_path / "corpus" / "a.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(No such file"):
        fingerprint(make_data(path=f"{tmp_path}/corpus/*.txt"))
