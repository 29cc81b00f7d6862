"""Corpora of conversations and pairs: whole documents with weights, one split by prompts, a cache, a report."""

import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data import chat_build, chat_corpus, open_batches, records
from mixtral_jax.data.chat_corpus import open_chat_corpus
from mixtral_jax.data.conversations import prompt_text
from mixtral_jax.data.text import is_heldout
from mixtral_jax.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes", "")
SEQ_LEN = 128
LEFT_OUT = ("too_long", "empty", "no_trained_token", "identical", "bad")


def conversation(i: int) -> dict:
    turns = [{"role": "user", "content": f"<s>q{i // 2}"}, {"role": "assistant", "content": "é" * (1 + i % 5)}]
    return {"messages": turns * (1 + i % 2)}


def a_pair(i: int) -> dict:
    question = [{"role": "user", "content": f"<s>q{i // 2}"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("é" * (1 + i % 3), f"no{i}"))
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


ROWS = {"sft": [conversation(i) for i in range(60)], "dpo": [a_pair(i) for i in range(60)]}


def write(path: Path, rows: list, kind: str = "jsonl") -> str:
    if kind == "jsonl":
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines))
        return str(path)
    table = pyarrow.Table.from_pylist(rows)
    if kind == "arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    return str(path)


@pytest.fixture
def make(make_data, tmp_path):
    """Returns a function that writes rows and opens them as a corpus; other arguments are keys of data."""

    def open_(rows, stage="sft", seq_len=SEQ_LEN, tokenizer=BYTES, **changes):
        path = write(tmp_path / "corpus" / "a.jsonl", rows)
        return open_chat_corpus(make_data(**{"source": "jsonl", "path": path, **changes}), tokenizer, stage, seq_len)

    return open_


def documents(split) -> list[tuple[str, str, str]]:
    """Of each document the row in its id, the text, and the trained text."""
    found = []
    for id, a, b in zip(split.ids, split.offsets, split.offsets[1:]):
        tokens, weights = split.tokens[a:b], split.weights[a:b]
        assert tokens[0] == BYTES.bos_id
        assert np.count_nonzero(tokens == BYTES.bos_id) == 1
        assert tokens[-1] == BYTES.eos_id
        assert weights[0] == 0
        assert weights[-1] == 1
        found.append((id.rpartition(":")[2], BYTES.decode(tokens), BYTES.decode(tokens[weights > 0])))
    assert split.bytes_.tolist() == [len(trained.encode()) for _, _, trained in found]
    return found


def both(corpus) -> list:
    return sorted(documents(corpus.train) + documents(corpus.heldout))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "hub"])
def test_every_kind_of_file_has_the_same_documents(make_data, tmp_path, stage, kind, monkeypatch):
    monkeypatch.setattr(records, "TICK_BYTES", 500)  # many parts, with numbers that go on
    monkeypatch.setattr(chat_build, "BATCH_CHARACTERS", 100)
    path = write(tmp_path / "corpus" / f"a.{'parquet' if kind == 'hub' else kind}", ROWS[stage], kind)
    data = make_data(source=kind, path=str(tmp_path / "corpus") if kind == "hub" else path)
    corpus = open_chat_corpus(data, BYTES, stage, SEQ_LEN)
    expected = []
    for i, row in enumerate(ROWS[stage], 1):
        if stage == "sft":
            q, a = (m["content"] for m in row["messages"][:2])
            turns = len(row["messages"]) // 2
            expected.append((str(i), f"[INST] {q} [/INST]{a}" * turns, a * turns))
        else:
            q, c, r = (row[key][0]["content"] for key in ("prompt", "chosen", "rejected"))
            expected += [(str(i), f"[INST] {q} [/INST]{answer}", answer) for answer in (c, r)]
    assert both(corpus) == sorted(expected)
    assert corpus.report["sources"][kind]["rows"] == 60


def test_a_pair_is_two_neighbours(make):
    corpus = make(ROWS["dpo"], "dpo")
    for split in (corpus.train, corpus.heldout):
        found = documents(split)
        assert len(found) % 2 == 0
        for chosen, rejected in zip(found[::2], found[1::2]):
            assert chosen[0] == rejected[0]
            assert "é" in chosen[2]
            assert rejected[2] == f"no{int(chosen[0]) - 1}"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_no_prompt_is_on_both_sides(make, stage):
    corpus = make(ROWS[stage], stage)
    train, heldout = (
        {text[: text.index("[/INST]")] for _, text, _ in documents(s)} for s in (corpus.train, corpus.heldout)
    )
    assert len(train) > 5
    assert len(heldout) > 2
    assert not train & heldout


def test_a_prompt_is_on_the_same_side_in_both_stages(make):
    sides = [
        [{text.split("[/INST]")[0] for _, text, _ in documents(split)} for split in (corpus.train, corpus.heldout)]
        for corpus in (make(ROWS["sft"]), make(ROWS["dpo"], "dpo"))
    ]
    assert sides[0] == sides[1]


def test_plain_text_is_trained_whole_and_split_as_before(make):
    texts = [f"<s>text {i}" for i in range(40)]
    corpus = make([{"text": text} for text in texts])
    assert sorted(text for _, text, _ in both(corpus)) == sorted(texts)
    assert all(text == trained for _, text, trained in both(corpus))
    held = {text for text in texts if is_heldout(text, 0.3)}
    assert {text for _, text, _ in documents(corpus.heldout)} == held


def test_batches_have_the_weights(make, make_data):
    for stage in ("sft", "dpo"):
        corpus = make(ROWS[stage], stage)
        batches = open_batches(make_data(), corpus, BYTES, batch_size=2, seq_len=SEQ_LEN, seed=0, pairs=stage == "dpo")
        n = sum(float(batches.batch(k)["loss_weights_BT"].sum()) for k in range(batches.n_rows // 2))
        if batches.n_rows % 2 == 0:
            assert n == np.count_nonzero(corpus.train.weights)
        batch = batches.batch(0)
        assert set(np.unique(batch["loss_weights_BT"])) == {0, 1}
        # What is trained are the answers: bytes of é (dpo: or of the other one) and EOS.
        trained = batch["targets_BT"][batch["loss_weights_BT"] == 1]
        assert set(trained.tolist()) <= {*"éno0123456789".encode(), BYTES.eos_id}


def test_rows_are_kept_dropped_or_bad(make, caplog):
    caplog.set_level("INFO")
    rows = [
        *ROWS["sft"],
        {"prompt": "x" * 300, "completion": "y"},
        {"prompt": "x", "completion": "y" * 400},
        {"messages": []},
        "",
        {"prompt": "x", "completion": ""},
        "{cut",
        {"messages": [{"role": "bot", "content": "x"}]},
        ROWS["sft"][0],
    ]
    corpus = make(rows, max_bad_rows=5)
    report = corpus.report["sources"]["jsonl"]
    assert report["rows"] == 67
    assert {key: report[key] for key in LEFT_OUT} == {
        "too_long": 2,
        "empty": 1,
        "no_trained_token": 1,
        "identical": 0,
        "bad": 2,
    }
    assert report["conversations"] == report["train"] + report["heldout"] == 61 == len(both(corpus))
    assert report["longest"] == 1 + len("[INST] x [/INST]") + 400
    assert report["duplicates"] == 1
    assert report["tokens"] == len(corpus.train.tokens) + len(corpus.heldout.tokens)
    assert report["trained_tokens"] == sum(np.count_nonzero(s.weights) for s in (corpus.train, corpus.heldout))
    names = {rule: [id.rpartition(":")[2] for id in ids] for rule, ids in report["examples"].items()}
    assert names == {"too_long": ["61", "62"], "empty": ["63"], "no_trained_token": ["65"]}
    line = (
        f"61 conversations (train {report['train']}, held out {report['heldout']}); dropped 2 too long (longest 417, "
        "train.seq_len=128), 1 empty, 1 without a trained token; 2 bad rows skipped; 1 occur more than once"
    )
    assert line in caplog.messages
    assert any("a.jsonl:66: not JSON" in message for message in caplog.messages)
    caplog.clear()
    assert make(rows, max_bad_rows=5).report == corpus.report
    assert line in caplog.messages


def test_a_conversation_that_just_fits_is_whole(make):
    rows = [{"prompt": f"q{i}", "completion": "y" * n} for i, n in enumerate([60, 61, 62, 63] * 10, 100)]
    size = 1 + len("[INST] q100 [/INST]") + 62
    corpus = make(rows, seq_len=size)
    assert {len(trained) for _, _, trained in both(corpus)} == {60, 61, 62}
    assert corpus.report["sources"]["jsonl"]["too_long"] == 10
    pairs = [{"prompt": f"q{i}", "chosen": "y" * n, "rejected": "n"} for i, n in enumerate([60, 61, 62, 63] * 10, 100)]
    corpus = make(pairs, "dpo", seq_len=size + 1 + len("[INST] q100 [/INST]") + 1)
    assert corpus.report["sources"]["jsonl"]["too_long"] == 10
    assert corpus.report["sources"]["jsonl"]["longest"] == size + 21 + 1


def test_answers_that_differ_in_spaces_only_are_identical_to_v3(make):
    from tests.data.test_chat_ids import FILES

    v3 = load_tokenizer(str(FILES["v3"]), "")
    rows = [*ROWS["dpo"], {"prompt": "q", "chosen": "a", "rejected": "a "}]
    assert make(rows, "dpo", tokenizer=v3).report["sources"]["jsonl"]["identical"] == 1
    assert make(rows, "dpo").report["sources"]["jsonl"]["identical"] == 0


def fail(*args, **kwargs):
    raise AssertionError("built again")


def test_the_second_time_nothing_is_tokenised(make, monkeypatch):
    first = make(ROWS["dpo"], "dpo")
    monkeypatch.setattr(chat_corpus, "build", fail)
    again = make(ROWS["dpo"], "dpo")
    assert again.key == first.key
    assert both(again) == both(first)


def test_the_key_is_that_of_the_documents(make, tmp_path):
    first = make(ROWS["sft"])
    others = [
        make(ROWS["sft"][:-1]),
        make(ROWS["sft"], seq_len=100),
        make(ROWS["sft"], heldout_fraction=0.4),
        make(ROWS["sft"], tokenizer=load_tokenizer("mistral-v1", "")),
        make(ROWS["dpo"], "dpo"),
    ]
    assert len({first.key, *(other.key for other in others)}) == 6
    assert make(ROWS["sft"], max_bad_rows=7).key == first.key
    # The same files elsewhere are the same corpus, with ids of their own.
    moved = shutil.copytree(tmp_path / "corpus", tmp_path / "moved")
    write(moved / "a.jsonl", ROWS["sft"])
    elsewhere = make(ROWS["sft"], path=str(moved))
    assert elsewhere.key == first.key
    assert elsewhere.train.ids[0].startswith(str(moved))


@pytest.mark.parametrize(
    ("name", "harm"),
    [("train.tokens", "cut"), ("train.weights", "gone"), ("heldout.documents", "cut"), ("entry.json", "flip")],
)
def test_a_damaged_cache_is_built_again(make, make_data, caplog, name, harm):
    expected = both(make(ROWS["sft"]))
    (path,) = Path(make_data().cache_dir).rglob(f"chat/*/{name}")
    raw = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(raw[:-1] if harm == "cut" else raw.replace(b'"rows"', b'"rowz"', 1))
    assert both(make(ROWS["sft"])) == expected
    assert "is damaged" in caplog.text
    assert path.read_bytes() == raw


def test_a_file_that_changes_while_it_is_read_is_noticed(make, tmp_path, monkeypatch):
    def changing(*args):
        yield from records.records(*args)
        write(tmp_path / "corpus" / "a.jsonl", ROWS["sft"][:-1])

    monkeypatch.setattr(chat_corpus, "records", changing)
    with pytest.raises(UserError, match="files changed while they were tokenised; run it again"):
        make(ROWS["sft"])
    assert not [path for path in (tmp_path / "cache" / "chat").iterdir() if path.is_dir()]


def test_bad_rows_count_over_all_sources(make_data, tmp_path):
    paths = [write(tmp_path / "corpus" / f"{name}.jsonl", [*ROWS["sft"], "{bad"]) for name in "ab"]
    write(tmp_path / "corpus" / "b.jsonl", [*ROWS["sft"][:50], "{bad", "[]"])
    mixture = tuple(
        SourceConfig("jsonl", path, "text", name, 1.0 + i) for i, (path, name) in enumerate(zip(paths, "ab"))
    )
    for limit in (2, 0):
        with pytest.raises(UserError, match=rf"{'b.jsonl:52' if limit else 'a.jsonl:61'}: .*JSON"):
            open_chat_corpus(make_data(path="", mixture=mixture, max_bad_rows=limit), BYTES, "sft", SEQ_LEN)
    corpus = open_chat_corpus(make_data(path="", mixture=mixture, max_bad_rows=3), BYTES, "sft", SEQ_LEN)
    assert [(source.name, source.weight) for source in corpus.sources] == [("a", 1.0), ("b", 2.0)]
    assert {name: part["bad"] for name, part in corpus.report["sources"].items()} == {"a": 1, "b": 2}
    assert len(corpus.train.ids) + len(corpus.heldout.ids) == 110
    assert len(corpus.train.weights) == len(corpus.train.tokens)
    # Of a cache with bad rows a lower limit still refuses them.
    with pytest.raises(UserError, match=r"b.jsonl:52: .*; 2 bad rows were skipped before it, data.max_bad_rows=2"):
        open_chat_corpus(make_data(path="", mixture=mixture, max_bad_rows=2), BYTES, "sft", SEQ_LEN)


def test_a_source_of_a_mixture_may_have_nothing_held_out(make_data, tmp_path):
    (one,) = [q for q in ("p", "q", "r", "s") if not is_heldout(prompt_text([{"role": "user", "content": q}]), 0.3)][:1]
    paths = [write(tmp_path / "corpus" / "a.jsonl", ROWS["sft"])]
    paths.append(write(tmp_path / "corpus" / "b.jsonl", [{"prompt": one, "completion": "a"}]))
    mixture = tuple(SourceConfig("jsonl", path, "text", path[-7], 1.0) for path in paths)
    corpus = open_chat_corpus(make_data(path="", mixture=mixture), BYTES, "sft", SEQ_LEN)
    assert len(corpus.sources[1].heldout.ids) == len(corpus.sources[1].heldout.weights) == 0
    assert len(corpus.sources[1].train.ids) == 1
    assert len(corpus.heldout.weights) == len(corpus.heldout.tokens) == len(corpus.sources[0].heldout.tokens)


LINES = "\n".join(json.dumps(row) for row in ROWS["sft"])
FILES = {
    "empty": (b"", "there are no rows in it"),
    "blank lines": (b"\n \n\n", "there are no rows in it"),
    "binary garbage": (bytes(range(128, 256)) * 9, r"a\.jsonl:1: invalid UTF-8"),
    "UTF-16": (LINES.encode("utf-16"), r"a\.jsonl:1: invalid UTF-8"),
    "a byte order mark": (b"\xef\xbb\xbf" + LINES.encode(), r"a\.jsonl:1: not JSON"),
    "cut off": (LINES.encode()[:-9], r"a\.jsonl:60: not JSON"),
    "one JSON array": (json.dumps(ROWS["sft"]).encode(), r"a\.jsonl:1: a JSON list"),
    "indented JSON": (json.dumps(ROWS["sft"][0], indent=1).encode(), r"a\.jsonl:1: not JSON"),
    "a number": (LINES.encode() + b"\n3", r"a\.jsonl:61: a JSON int"),
    "too deep": (b"[" * 100_000, r"a\.jsonl:1: not JSON"),
    "other keys": (b'{"question": "q", "answer": "a"}', r"a\.jsonl:1: no key 'messages'.*it has 'question', 'answer'"),
    "share": (b'{"conversations": [{"from": "human"}]}', r"a\.jsonl:1: no key 'messages'.*it has 'conversations'"),
    "all too long": (
        b'{"prompt": "q", "completion": "' + b"x" * 200 + b'"}',
        r"1 too long.*217 positions.*seq_len=128",
    ),
    "nothing trained": (b'{"prompt": "q", "completion": ""}', r"none of its 1 rows is left.*1 no trained token"),
    "one prompt only": (b'{"prompt": "q", "completion": "a"}\n' * 9, "the prompt decides the split"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files_are_named_with_the_row(make_data, tmp_path, name):
    raw, words = FILES[name]
    (tmp_path / "corpus" / "a.jsonl").write_bytes(raw)
    with pytest.raises(UserError, match=words):
        open_chat_corpus(make_data(source="jsonl"), BYTES, "sft", SEQ_LEN)


TABLES = {
    "without the columns": ([{"question": "q", "answer": "a"}], r"a\.KIND:1: no key 'messages'.*it has 'question', 'answer'"),
    "messages a string": ([{"messages": "q"}], r"a\.KIND:1: messages is of type str"),
    "messages a struct of lists": ([{"messages": {"role": ["user"], "content": ["q"]}}], r"a\.KIND:1: messages is of type dict"),
    "content a number": ([{"messages": [{"role": "user", "content": 3}]}], r"a\.KIND:1: 'messages\[0\]\.content' is of type int"),
    "null": ([*ROWS["sft"], {"messages": None}], r"a\.KIND:61: no key.*'messages' \(null\)"),
    "no rows": ([], "there are no rows in it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("name", TABLES)
def test_bad_tables_are_named_with_the_row(make_data, tmp_path, name, kind):
    rows, words = TABLES[name]
    path = write(tmp_path / "corpus" / f"a.{kind}", rows, kind)
    with pytest.raises(UserError, match=words.replace("KIND", kind)):
        open_chat_corpus(make_data(source=kind, path=path), BYTES, "sft", SEQ_LEN)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_cut_off_is_refused(make_data, tmp_path, kind):
    path = Path(write(tmp_path / "corpus" / f"a.{kind}", ROWS["dpo"], kind))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"a\.{kind}: not readable as {kind.capitalize()}"):
        open_chat_corpus(make_data(source=kind, path=str(path)), BYTES, "dpo", SEQ_LEN)


def test_invalid_utf8_in_a_nested_column_is_one_bad_row(make_data, tmp_path):
    path = Path(write(tmp_path / "corpus" / "a.arrow", ROWS["dpo"], "arrow"))
    raw = path.read_bytes()
    assert b"no33" in raw  # more than once: a batch carries its neighbours' values along
    path.write_bytes(raw.replace(b"no33", b"\xff\xff33"))
    with pytest.raises(UserError, match=r"a\.arrow:34: 'rejected' holds invalid UTF-8"):
        open_chat_corpus(make_data(source="arrow", path=str(path)), BYTES, "dpo", SEQ_LEN)
    data = make_data(source="arrow", path=str(path), max_bad_rows=1)
    assert open_chat_corpus(data, BYTES, "dpo", SEQ_LEN).report["sources"]["arrow"]["pairs"] == 59


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_text_files_have_no_conversations(make_data, tmp_path, stage):
    (tmp_path / "corpus" / "a.txt").write_text("x")
    with pytest.raises(UserError, match=f"data.source=text with train.stage={stage}"):
        open_chat_corpus(make_data(source="text"), BYTES, stage, SEQ_LEN)


def test_the_standard_library_has_records_of_its_own(make_data, monkeypatch):
    fake = types.ModuleType("mixtral_jax.data.docstrings")
    fake.__file__ = __file__
    fake.instructions = lambda: ((f"os.py:f{i}", row) for i, row in enumerate(ROWS["sft"]))
    fake.preferences = lambda: ((f"os.py:f{i}", row) for i, row in enumerate(ROWS["dpo"]))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr("mixtral_jax.data.docstrings", fake, raising=False)
    monkeypatch.setattr(chat_corpus, "fingerprint", lambda *args: "constant")
    for stage, count in (("sft", 60), ("dpo", 120)):
        corpus = open_chat_corpus(make_data(source="stdlib", path=""), BYTES, stage, SEQ_LEN)
        ids = [*corpus.train.ids, *corpus.heldout.ids]
        assert len(ids) == count
        assert set(ids) == {f"os.py:f{i}" for i in range(60)}


def test_the_fix_of_an_empty_split_works(make):
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(12)]
    with pytest.raises(UserError, match="leaves the held-out split empty: there are 12 conversations") as error:
        make(rows, heldout_fraction=0.0001)
    fraction = float(re.search(r"set data.heldout_fraction=([\d.]+), or add conversations", str(error.value))[1])
    assert len(make(rows, heldout_fraction=fraction).heldout.ids) > 0
