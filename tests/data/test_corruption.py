"""Random damage to a JSON-lines file: never a crash, and no good row is ever lost or altered."""

import json

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
