"""Random damage to files: never a crash, and no good row of JSON lines is ever lost or altered."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data import rows
from mixtral_jax.data.cache import build_cache
from mixtral_jax.data.text import BadRows, documents
from mixtral_jax.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes", "unused")


def original(rng) -> list[bytes]:
    """Lines that are all different, of all kinds that are good."""
    lines = []
    for i in range(30):
        text = f"row {i} " + "".join(chr(c) for c in rng.choice([65, 10, 34, 92, 233, 0x2028, 0x1F600], 20))
        record = {"n": i, "text": text, "more": [1.5, None, {"text": "x"}]}
        lines.append(json.dumps(record, ensure_ascii=bool(i % 2)).encode() + b"\r" * (i % 5 == 0))
    return lines


def corrupted(raw: bytes, rng) -> bytes:
    """Flips, deletes, inserts, cuts off or repeats bytes, one to four times."""
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, len(raw) + 1))
        to = min(at + int(rng.integers(1, 40)), len(raw))
        kind = rng.choice(["flip", "delete", "insert", "newline", "truncate", "duplicate"])
        if kind == "flip" and at < len(raw):
            raw = raw[:at] + bytes([raw[at] ^ 1 << int(rng.integers(8))]) + raw[at + 1 :]
        elif kind == "delete":
            raw = raw[:at] + raw[to:]
        elif kind == "insert":
            raw = raw[:at] + rng.bytes(int(rng.integers(1, 6))) + raw[at:]
        elif kind == "newline":
            raw = raw[:at] + b"\n" + raw[at:]
        elif kind == "truncate" and rng.random() < 0.3:
            raw = raw[:at]
        elif kind == "duplicate":
            raw = raw[:to] + raw[at:to] + raw[to:]
    return raw


def reads_as(line: bytes) -> str | None:
    """The text in a line, by the letter of the format; None for a bad row."""
    try:
        record = json.loads(str(line, "utf-8"))
        text = record["text"] if type(record) is dict else None
        return str(bytes(text, "utf-8"), "utf-8") if type(text) is str else None
    except (ValueError, KeyError):
        return None


def check(data, path, seed: int) -> int:
    """Reads one corrupted file with and without a limit; returns the number of its bad rows."""
    rng = np.random.default_rng(seed)
    good = original(rng)
    path.write_bytes(corrupted(b"\n".join(good), rng))
    lines = {f"{path}:{i}": line for i, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()}
    # What must come out whatever a reader thinks of JSON: lines with the very bytes of an original one.
    texts = {line: json.loads(line)["text"] for line in good}
    untouched = {id: texts[line] for id, line in lines.items() if line in texts}
    expected = {id: text for id, line in lines.items() if (text := reads_as(line))}
    bad = [id for id, line in lines.items() if reads_as(line) is None]
    assert untouched.items() <= expected.items()
    bad_rows = BadRows(len(bad))
    if expected:
        assert [(document.id, document.text) for document in documents(data, bad_rows)] == list(expected.items())
    else:
        with pytest.raises(UserError, match="there is no text in it"):
            list(documents(data, bad_rows))
    assert bad_rows.count == len(bad)
    if bad:
        with pytest.raises(UserError, match=rf"^{bad[-1]}: .*(; {len(bad) - 1} bad rows were skipped before it|$)"):
            list(documents(data, BadRows(len(bad) - 1)))
    return len(bad)


@pytest.fixture
def quiet(caplog):
    caplog.set_level("ERROR")


@pytest.mark.usefixtures("quiet")
def test_no_good_row_is_lost_in_a_thousand_corruptions(make_data, tmp_path):
    data, path = make_data(source="jsonl"), tmp_path / "corpus" / "a.jsonl"
    counts = [check(data, path, seed) for seed in range(1000)]
    assert sum(count > 0 for count in counts) > 500
    assert max(counts) > 2


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("seed", range(10))
def test_the_cache_has_the_same_rows(make_data, tmp_path, monkeypatch, seed):
    """The cache reads by another way: in parts, whose rows are numbered later."""
    data = make_data(source="jsonl", max_bad_rows=1000, heldout_fraction=0.5)
    rng = np.random.default_rng(seed)
    path = tmp_path / "corpus" / "a.jsonl"
    path.write_bytes(corrupted(b"\n".join(original(rng)), rng))
    monkeypatch.setattr("mixtral_jax.data.build.SMALLEST_TASK", 300)
    corpus = build_cache(data, BYTES)
    assert len(list(rows.parts(data, [("a", path)], 300))) > 2
    found = [
        (id, BYTES.decode(split.tokens[a:b]))
        for split in (corpus.train, corpus.heldout)
        for id, a, b in zip(split.ids, split.offsets, split.offsets[1:])
    ]
    assert sorted(found) == sorted((document.id, document.text) for document in documents(data, BadRows(1000)))


# In a process of its own, which the damage may end.
ARROW = """
import sys
from collections import Counter
import numpy as np, pyarrow, pyarrow.ipc
from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data.text import BadRows, documents
path, kind = sys.argv[1:]
texts = [f"row {i} \u00e9" * (i % 4 + 1) for i in range(60)]
table = pyarrow.table({"n": range(60), "text": pyarrow.array(texts, getattr(pyarrow, kind.split()[1])())})
new = pyarrow.ipc.new_file if "file" in kind else pyarrow.ipc.new_stream
with new(path, table.schema) as writer:
    writer.write_table(table, max_chunksize=20)
raw = open(path, "rb").read()
rng, found = np.random.default_rng(0), Counter()
for _ in range(400):
    damaged = bytearray(raw)
    for at in rng.integers(0, len(raw), rng.integers(1, 9)):
        damaged[at] = rng.integers(256)
    open(path, "wb").write(damaged)
    try:
        found["read"] += bool(list(documents(SourceConfig("arrow", path, "text", "a", 1.0), BadRows(1000))))
    except UserError as error:
        found["refused"] += 1
        assert str(error).startswith((path, "data.source")), error
print(found)
assert min(found["read"], found["refused"]) > 20
"""


@pytest.mark.parametrize("kind", ["file string", "file large_string", "stream string", "stream large_string"])
def test_no_damage_to_an_arrow_file_ends_the_process(tmp_path, kind):
    command = [sys.executable, "-c", ARROW, str(tmp_path / "a.arrow"), kind]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
