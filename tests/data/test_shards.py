"""Many shards are one corpus: whatever the cut, the number of processes and the accidents on the way."""

import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mixtral_jax.config import RunError, SourceConfig, UserError
from mixtral_jax.data import build, shards
from mixtral_jax.data.cache import build_cache
from mixtral_jax.data.rows import parts, rows_before
from mixtral_jax.data.text import documents, source_files
from mixtral_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from mixtral_jax.data.tokens import ShardedTokens, TokenFile, join

BYTES = load_tokenizer("bytes", "unused")
ROOT = Path(__file__).parents[2]


class Dying(ByteTokenizer):
    """Killed as if it had taken all the memory; only in a worker, because only workers encode into arrays."""

    def encode_array(self, text):
        os.kill(os.getpid(), signal.SIGKILL)


class Refusing(ByteTokenizer):
    """Fails in a worker."""

    def encode_array(self, text):
        raise UserError("no such text, please")


def write_jsonl(path, count=300, seed=0):
    """Documents of very different lengths between blank lines, empty documents and copies of others."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        text = f"row {rng.integers(count)} é " * int(rng.integers(0, 20))
        lines += [json.dumps({"text": text}, ensure_ascii=bool(i % 2))] + [""] * (i % 7 == 0)
    path.write_text("\n".join(lines) + "\n" * (seed % 2))


@pytest.fixture
def data(make_data, tmp_path):
    for i in range(3):
        write_jsonl(tmp_path / "corpus" / f"{i}.jsonl", seed=i)
    return make_data(source="jsonl")


@pytest.fixture
def cut(monkeypatch):
    """Returns a function that sets the size of shards."""
    return lambda size: monkeypatch.setattr(build, "SMALLEST_TASK", size)


def content(corpus):
    """Everything in a corpus, as lists; the texts are decoded from the tokens."""
    found = []
    for split in (corpus.train, corpus.heldout):
        bounds = zip(split.offsets, split.offsets[1:])
        found.append(
            [
                (id, BYTES.decode(split.tokens[a:b]), int(size))
                for id, (a, b), size in zip(split.ids, bounds, split.bytes_)
            ]
        )
    return found


def expected(data):
    """The same from the documents, by the slow way: one after another."""
    found = ([], [])
    for document in documents(data):
        heldout = shards.hash_position(document.text) < data.heldout_fraction
        found[heldout].append((document.id, document.text, len(document.text.encode())))
    return list(found)


def shard_folders(data):
    return sorted(Path(data.cache_dir).glob("corpora/*/shards/*"))


@pytest.mark.parametrize("size", [1, 1000, 20_000, 10**9])
def test_the_cut_does_not_matter(data, cut, size):
    cut(size)
    corpus = build_cache(data, BYTES)
    assert content(corpus) == expected(data)
    assert (len(shard_folders(data)) > 1) == (size < 10**9)
    lines = (Path(data.path) / "1.jsonl").read_bytes().split(b"\n")
    for id, text, _ in content(corpus)[0]:  # the oracle knows nothing of parts
        name, _, line = id.rpartition(":")
        if name.endswith("1.jsonl"):
            assert json.loads(lines[int(line) - 1])["text"] == text


def test_parts_are_whole_lines_with_their_numbers(data):
    source, files = data.sources[0], source_files(data)
    found = list(parts(source, files, 500))
    for name, path in files:
        mine = [part for part in found if part.name == name]
        raw = path.read_bytes()
        assert b"".join(raw[part.begin : part.end] for part in mine) == raw
        assert all(raw[part.begin - 1 : part.begin] in (b"", b"\n") for part in mine)
        assert [rows_before(part) for part in mine] == [raw[: part.begin].count(b"\n") for part in mine]
        assert len(mine) > 10


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_tables_are_cut_by_groups(make_data, tmp_path, cut, kind):
    texts = [f"row {i} " * (i % 9) for i in range(200)]
    for name in "ab":
        table = pyarrow.table({"n": list(range(200)), "text": texts})
        path = tmp_path / "corpus" / f"{name}.{kind.split()[0]}"
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=30)
        else:
            new = pyarrow.ipc.new_file if kind == "arrow file" else pyarrow.ipc.new_stream
            with new(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=30)
    data = make_data(source=kind.split()[0])
    cut(1000)
    assert content(build_cache(data, BYTES)) == expected(data)
    assert len(shard_folders(data)) > 4
    folder = data.path
    assert [(d.id, d.text) for d in documents(data)] == [
        (f"{folder}/{name}.{kind.split()[0]}:{i + 1}", text) for name in "ab" for i, text in enumerate(texts) if text
    ]


def test_processes_do_not_matter(data, cut, monkeypatch):
    cut(4000)
    here = content(build_cache(data, BYTES))
    files = [path for path in Path(data.cache_dir).rglob("*") if path.is_file() and path.suffix in ("", ".tokens")]
    sums = {path.name: path.read_bytes() for path in files}
    monkeypatch.setattr(build, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(build, "cpus", lambda: 2)
    monkeypatch.setattr(build, "_in_this_process", lambda *_: pytest.fail("no processes were started"))
    other = dataclasses.replace(data, cache_dir=data.cache_dir + "2")
    assert content(build_cache(other, BYTES)) == here
    assert sums == {path.name: path.read_bytes() for path in Path(other.cache_dir).rglob("*") if path.name in sums}


@pytest.mark.parametrize(
    ("tokenizer", "error", "message"),
    [(Dying(), RunError, r"processes that tokenise was killed"), (Refusing(), UserError, "no such text")],
)
def test_what_happens_to_a_process_is_told(data, cut, monkeypatch, tokenizer, error, message):
    cut(4000)
    monkeypatch.setattr(build, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(build, "cpus", lambda: 2)
    with pytest.raises(error, match=message):
        build_cache(data, tokenizer)
    assert content(build_cache(data, BYTES)) == expected(data)


def test_tokenizers_travel_to_other_processes(stdlib_tokenizer):
    import pickle

    for tokenizer in (BYTES, stdlib_tokenizer):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert (copy.name, copy.fingerprint) == (tokenizer.name, tokenizer.fingerprint)
        for text in ("  a \u2581 text", "\ud800 no character", "", "plain é text"):
            assert copy.encode(text) == tokenizer.encode(text) == tokenizer.encode_array(text).tolist()


KILLED = """
import sys, time
from mixtral_jax.config import DataConfig
from mixtral_jax.data import build
from mixtral_jax.data.cache import build_cache
from mixtral_jax.data.tokenizer import ByteTokenizer

class Slow(ByteTokenizer):
    def encode_array(self, text):
        time.sleep(0.02)
        return super().encode_array(text)

if __name__ == "__main__":
    build.SMALLEST_TASK, build.PARALLEL_BYTES, build.cpus = 4000, 1, lambda: 2
    build_cache(DataConfig("jsonl", sys.argv[1], "text", (), False, 0, "bytes", sys.argv[2], 0.3, 2, True), Slow())
"""


def test_a_killed_build_goes_on_where_it_was(data, cut, tmp_path, caplog):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), data.path, data.cache_dir]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)

    def whole():
        return [path for path in shard_folders(data) if path.name.isdecimal()]

    while len(whole()) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    cut(4000)
    with caplog.at_level(logging.INFO):
        corpus = build_cache(data, BYTES)  # must wait for nobody, and no orphan may still write
    kept = int(caplog.text.split(" shards are there")[0].split("\n")[-1].split(" of ")[0].split()[-1])
    assert kept >= 3
    assert content(corpus) == expected(data)
    assert all(path.name.isdecimal() for path in shard_folders(data))
    until = time.monotonic() + 20
    while True:  # the workers end by themselves
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < until, "workers outlive a killed build"
        time.sleep(0.05)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete file", "delete shard", "swap"])
def test_only_the_damaged_shard_is_built_again(data, cut, damage, caplog, monkeypatch):
    cut(4000)
    before = content(build_cache(data, BYTES))
    folders = shard_folders(data)
    victim = folders[2] / "train.tokens"
    raw = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(raw[:50] + bytes([raw[50] ^ 4]) + raw[51:])
    elif damage == "cut":
        victim.write_bytes(raw[:-2])
    elif damage == "swap":
        for path in folders[2].iterdir():
            path.write_bytes((folders[3] / path.name).read_bytes())
    else:
        for path in folders[2].iterdir() if damage == "delete shard" else [victim]:
            path.unlink()
        if damage == "delete shard":
            folders[2].rmdir()
    written = []
    write = build.write_shard
    monkeypatch.setattr(build, "write_shard", lambda path, *rest: written.append(path) or write(path, *rest))
    after = build_cache(data, BYTES, verify=damage == "flip")
    assert content(after) == before
    assert written == [folders[2]]
    assert str(folders[2]) in caplog.text
    if damage == "cut":
        assert f"train.tokens has {len(raw) - 2} bytes instead of {len(raw)}" in caplog.text


def test_another_cut_replaces_the_shards(data, cut):
    cut(4000)
    many = content(build_cache(data, BYTES))
    (index,) = Path(data.cache_dir).rglob("cache.json")
    build_cache(data, BYTES)
    index.unlink()
    cut(50_000)
    assert content(build_cache(data, BYTES)) == many
    assert len(shard_folders(data)) < 5


def test_a_full_disk_is_explained_and_leaves_whole_shards(data, cut, monkeypatch):
    cut(4000)
    append, count = shards._SplitWriter.append, [0]

    def full(self, *args):
        count[0] += 1
        if count[0] > 200:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, *args)

    monkeypatch.setattr(shards._SplitWriter, "append", full)
    with pytest.raises(
        UserError, match=r"no room in .*: about \d+ MB more are needed and [\d,]+ MB are left.*of \d+ shards"
    ):
        build_cache(data, BYTES)
    assert not list(Path(data.cache_dir).rglob("cache.json"))
    kept = shard_folders(data)
    assert kept
    assert all(path.name.isdecimal() for path in kept)
    monkeypatch.setattr(shards._SplitWriter, "append", append)
    assert content(build_cache(data, BYTES)) == expected(data)


def test_sharded_tokens_are_one_array(tmp_path):
    rng = np.random.default_rng(0)
    counts = [0, 7, 1, 0, 30, 2, 0]
    whole = rng.integers(0, 2**16, sum(counts)).astype(np.uint16)
    pieces = []
    for i, piece in enumerate(np.split(whole, np.cumsum(counts)[:-1])):
        piece.tofile(tmp_path / str(i))
        pieces.append((tmp_path / str(i) if i % 2 else piece, len(piece)))
    tokens = ShardedTokens(pieces, np.uint16)
    assert (len(tokens), tokens.shape, tokens.dtype) == (40, (40,), np.uint16)
    for a in range(-2, 42):
        if a < 40:
            assert tokens[a] == whole[a]
        for b in range(-2, 42):
            np.testing.assert_array_equal(tokens[a:b], whole[a:b])
            np.testing.assert_array_equal(tokens[np.int64(a) : b], whole[a:b])
    np.testing.assert_array_equal(np.asarray(tokens), whole)
    assert np.asarray(tokens, np.int32).dtype == np.int32
    assert tokens[8:30].base is not None  # within a shard: no copy
    assert not tokens[8:30].flags.writeable or isinstance(pieces[4][0], np.ndarray)
    for i in (40, -41):
        with pytest.raises(IndexError):
            tokens[i]
    with pytest.raises(IndexError, match="steps of 2"):
        tokens[::2]
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(tokens, copy=False)


MANY_SHARDS = """
import resource, sys
from pathlib import Path
import numpy as np
from mixtral_jax.data.tokens import ShardedTokens
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 128))
folder = Path(sys.argv[1])
for i in range(300):
    np.full(3, i, np.uint16).tofile(folder / str(i))
splits = [ShardedTokens([(folder / str(i), 3) for i in range(start, start + 150)], np.uint16) for start in (0, 150)]
for _ in range(2):
    for i in np.random.default_rng(0).permutation(450):
        assert [split[i] for split in splits] == [i // 3, 150 + i // 3]
    for start, split in zip((0, 150), splits):
        assert np.array_equal(np.asarray(split), np.repeat(np.arange(start, start + 150), 3))
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (128, 128)
assert 40 < sum(array is not None for split in splits for array in split._arrays) <= 64
"""


def test_more_shards_than_descriptors(tmp_path):
    run = subprocess.run([sys.executable, "-c", MANY_SHARDS, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_joined_splits_keep_their_documents():
    def file(lengths, name):
        offsets = np.cumsum([0, *lengths])
        tokens = np.arange(offsets[-1]).astype(np.uint16)
        return TokenFile(tokens, offsets, np.array(lengths) * 3, [f"{name}{i}" for i in range(len(lengths))])

    files = [file([3, 4], "a"), file([], "b"), file([2, 5, 6], "c")]
    joined = join(files)
    assert list(joined.ids) == ["a0", "a1", "c0", "c1", "c2"]
    assert joined.ids[-1] == joined.ids[4] == "c2"
    assert joined.bytes_.tolist() == [9, 12, 6, 15, 18]
    assert joined.lengths.tolist() == [3, 4, 2, 5, 6]
    assert [joined.tokens[a:b].tolist() for a, b in zip(joined.offsets, joined.offsets[1:])] == [
        f.tokens[a:b].tolist() for f in files for a, b in zip(f.offsets, f.offsets[1:])
    ]


@pytest.fixture
def mixture(data, tmp_path):
    """Two sources; the first holds most of the documents."""
    (tmp_path / "corpus" / "notes").mkdir()
    for i in range(30):
        (tmp_path / "corpus" / "notes" / f"{i}.txt").write_text(f"note {i} " * (i + 1))
    rows = SourceConfig("jsonl", f"{data.path}/*.jsonl", "text", "rows", 3.0)
    notes = SourceConfig("text", f"{data.path}/notes", "text", "notes", 1.0)
    return dataclasses.replace(data, path="", mixture=(rows, notes))


def test_a_mixture_is_its_sources(mixture, monkeypatch):
    corpus = build_cache(mixture, BYTES)
    rows, notes = (build_cache(dataclasses.replace(mixture, mixture=(s,)), BYTES) for s in mixture.mixture)
    assert [(s.name, s.weight) for s in corpus.sources] == [("rows", 3.0), ("notes", 1.0)]
    assert content(corpus) == [a + b for a, b in zip(content(rows), content(notes))]
    assert len({corpus.key, rows.key, notes.key}) == 3
    monkeypatch.setattr(build, "write_shard", lambda *_: pytest.fail("it was tokenised again"))
    first, second = mixture.mixture
    heavier = dataclasses.replace(first, weight=9.0)
    assert build_cache(dataclasses.replace(mixture, mixture=(heavier, second)), BYTES).key == corpus.key
    assert build_cache(dataclasses.replace(mixture, mixture=(second, first)), BYTES).key != corpus.key
    renamed = dataclasses.replace(first, name="other")
    assert build_cache(dataclasses.replace(mixture, mixture=(renamed, second)), BYTES).key == corpus.key


def test_of_a_mixture_the_whole_must_have_heldout_text_and_each_source_training_text(mixture, tmp_path):
    (tmp_path / "corpus" / "one.txt").write_text("one")
    one = SourceConfig("text", f"{tmp_path}/corpus/one.txt", "text", "one", 1.0)
    position = shards.hash_position("one")
    rows = mixture.mixture[0]
    below = dataclasses.replace(mixture, mixture=(rows, one), heldout_fraction=position * 0.9)
    corpus = build_cache(below, BYTES)  # one document, in training: the other source is evaluated
    assert (len(corpus.sources[1].train.ids), len(corpus.sources[1].heldout.ids)) == (1, 0)
    assert len(corpus.heldout.ids) == len(corpus.sources[0].heldout.ids) > 0
    above = dataclasses.replace(below, heldout_fraction=(position + 1) / 2)
    with pytest.raises(
        UserError, match=r"leaves the training split of one empty.*set data\.heldout_fraction="
    ) as caught:
        build_cache(above, BYTES)
    fix = float(str(caught.value).split("heldout_fraction=")[2].split(",")[0])
    build_cache(dataclasses.replace(below, heldout_fraction=fix), BYTES)


BAD = ["{", '{"text": 5}', '{"text": "\\ud800"}', "[]", '{"other": "a"}']


@pytest.fixture
def bad_data(data, tmp_path):
    """Five bad rows in the three files."""
    for i, (number, line) in enumerate(zip([3, 90, 200, 1, 250], BAD)):
        path = tmp_path / "corpus" / f"{i % 3}.jsonl"
        lines = path.read_text().split("\n")
        path.write_text("\n".join([*lines[: number - 1], line, *lines[number - 1 :]]))
    return data


@pytest.mark.parametrize("size", [1000, 10**9])
def test_bad_rows_are_skipped_up_to_the_limit(bad_data, cut, size, caplog):
    cut(size)
    with pytest.raises(UserError, match=r"0\.jsonl:2: a JSON list|0\.jsonl:1: a JSON list"):
        build_cache(bad_data, BYTES)
    some = dataclasses.replace(bad_data, max_bad_rows=4)
    with pytest.raises(
        UserError, match=r"2\.jsonl:\d+: .*lone surrogate.*; 4 bad rows were skipped before it, data.max"
    ):
        build_cache(some, BYTES)
    caplog.clear()
    all_ = dataclasses.replace(bad_data, max_bad_rows=5)
    corpus = build_cache(all_, BYTES)
    good = [
        (f"{path}:{i}", json.loads(line)["text"])
        for path in sorted(Path(all_.path).glob("*.jsonl"))
        for i, line in enumerate(path.read_text().split("\n"), 1)
        if line and line not in BAD and json.loads(line)["text"]
    ]
    assert sorted((id, text) for split in content(corpus) for id, text, _ in split) == sorted(good)
    told = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(told) == 5
    for path in Path(all_.path).glob("*.jsonl"):
        for i, line in enumerate(path.read_text().split("\n"), 1):
            assert any(f"{path}:{i}: " in message for message in told) == (line in BAD)
    # The cache is complete now, and still no corpus for a run that allows fewer.
    with pytest.raises(UserError, match=r"2\.jsonl:\d+: .*4 bad rows were skipped before it"):
        build_cache(some, BYTES)
    assert build_cache(all_, BYTES).key == corpus.key


def test_the_limit_is_that_of_all_sources_together(make_data, tmp_path, caplog):
    sources = []
    for name in "ab":
        lines = ["{", "[]"] + [json.dumps({"text": f"{name} {i}"}) for i in range(20)]
        (tmp_path / "corpus" / f"{name}.jsonl").write_text("\n".join(lines))
        sources.append(SourceConfig("jsonl", f"{tmp_path}/corpus/{name}.jsonl", "text", name, 1.0))
    data = make_data(path="", mixture=tuple(sources), max_bad_rows=3)
    for _ in range(2):  # the first source is built and then only opened
        with pytest.raises(UserError, match=r"b\.jsonl:2: a JSON list.*; 3 bad rows were skipped before it"):
            build_cache(data, BYTES)
    build_cache(dataclasses.replace(data, max_bad_rows=4), BYTES)
    with pytest.raises(UserError, match=r"b\.jsonl:2: a JSON list.*; 3 bad rows were skipped before it"):
        build_cache(data, BYTES)


def test_many_bad_rows_are_counted(make_data, tmp_path, caplog):
    lines = ["{"] * 30 + [json.dumps({"text": f"text {i}"}) for i in range(20)]
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(lines))
    build_cache(make_data(source="jsonl", max_bad_rows=30), BYTES)
    assert caplog.text.count("skipped /") == 20
    assert "30 bad rows were skipped in all" in caplog.text
