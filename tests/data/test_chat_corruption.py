"""Random damage to files of conversations and pairs: an error with file and line, or a corpus in which all is whole."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data.bad_rows import BadRows
from mixtral_jax.data.chat_build import DROPPED, Job, build, open_built
from mixtral_jax.data.records import records
from mixtral_jax.data.tokenizer import load_tokenizer
from tests.data.test_corruption import corrupted

LONGEST = {"sft": 80, "dpo": 85}  # of most good rows
BYTES = load_tokenizer("bytes", "")


def message(role: str, text: str, **more) -> dict:
    return {"role": role, "content": text, **more}


def rows(stage: str, rng) -> list[bytes]:
    """Good rows of every format and one to drop, so that little damage turns one into another."""
    found = []
    for i in range(12):
        text = f"r{i}" + "".join(chr(c) for c in rng.choice([65, 10, 34, 92, 233, 0x2028, 0x1F600], 4))
        question, answer, other = (
            message("user", text),
            message("assistant", "a" + text),
            message("assistant", "b" + text),
        )
        if stage == "sft":
            formats = [
                {"messages": [message("system", "S"), question, message("assistant", "x", weight=0), question, answer]},
                {"prompt": text, "completion": text},
                {"prompt": [question], "completion": [answer]},
                {"text": text},
                {"messages": [message("user", [{"type": "text", "text": text}]), answer]},
                {"prompt": text, "completion": " "},
            ]
        else:
            formats = [
                {"prompt": text, "chosen": "a" + text, "rejected": "b" + text},
                {"prompt": [question], "chosen": [answer], "rejected": [other]},
                {"chosen": [question, answer], "rejected": [question, other]},
                {"prompt": text, "chosen": [question, answer], "rejected": [question, other]},
                {"chosen": text + " yes", "rejected": text + " no"},
                {"prompt": [question], "chosen": [answer], "rejected": [answer]},
            ]
        found.append(json.dumps(formats[i % 6], ensure_ascii=bool(i % 2)).encode())
    return found


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_thousand_corruptions(tmp_path, stage, caplog):
    caplog.set_level("CRITICAL")
    job, source = Job(BYTES, stage, LONGEST[stage], "text", 0.3), SourceConfig("jsonl", "", "text", "a", 1.0)
    files, lines, good = [], {}, set()
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        path = tmp_path / f"{seed:04d}.jsonl"
        originals = rows(stage, rng)
        good.update(originals)
        raw = corrupted(b"\n".join(originals), rng)
        path.write_bytes(raw)
        files.append((path.name, path))
        lines |= {f"{path.name}:{i}": line for i, line in enumerate(raw.split(b"\n"), 1) if line.strip()}
    folder = tmp_path / "built"
    folder.mkdir()
    build(folder, records(source, files, stage), job, BadRows(10**6))
    *splits, entry = open_built(folder)
    report = entry["report"]
    kept = report["conversations" if stage == "sft" else "pairs"]
    assert report["rows"] == len(lines) == kept + sum(report[rule] for rule in (*DROPPED, "bad"))
    for split in splits:
        check_documents(split, stage)
    ids = {id for split in splits for id in split.ids}
    bad = {f"{name}:{number}" for name, number, _ in entry["bad"]}
    assert len(ids) == kept
    assert len(bad) == report["bad"]
    assert ids | bad <= lines.keys()
    assert not ids & bad
    assert not bad & {id for id, line in lines.items() if line in good}
    # Each bad row by itself is an error with its file and line.
    for name, number, _ in entry["bad"][:: len(bad) // 40]:
        earlier = sum(one == name and n < number for one, n, _ in entry["bad"])
        with pytest.raises(UserError, match=rf"^{re.escape(name)}:{number}: "):
            build(folder, records(source, [file for file in files if file[0] == name], stage), job, BadRows(earlier))
    assert len({id.split(":")[0] for id in bad}) > 500
    assert kept > 7000
    assert report["too_long"] > 20
    assert report["no_trained_token" if stage == "sft" else "identical"] > 900


def check_documents(split, stage: str) -> None:
    starts, ends = split.offsets[:-1], split.offsets[1:]
    tokens, weights = np.asarray(split.tokens), split.weights
    assert (tokens[starts] == BYTES.bos_id).all()
    assert np.count_nonzero(tokens == BYTES.bos_id) == len(starts)
    assert (tokens[ends - 1] == BYTES.eos_id).all()
    assert (weights[starts] == 0).all()
    assert np.isfinite(weights).all()
    if len(starts):
        assert (np.add.reduceat(weights, starts) > 0).all()
    positions = np.diff(split.offsets) - 1
    together = positions[0::2] + positions[1::2] if stage == "dpo" else positions
    assert (together <= LONGEST[stage]).all()


# In a process of its own, which the damage may end.
ARROW = """
import sys
from collections import Counter
import numpy as np, pyarrow, pyarrow.ipc
from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data.bad_rows import Unreadable
from mixtral_jax.data.chat_build import Job, read_example
from mixtral_jax.data.records import records
from mixtral_jax.data.sources import source_files
from mixtral_jax.data.tokenizer import load_tokenizer
path, kind = sys.argv[1:]
talk = lambda i: [{"role": "user", "content": f"row {i} \\u00e9" * (i % 4 + 1)}, {"role": "assistant", "content": "a"}]
table = pyarrow.Table.from_pylist([{"messages": talk(i), "prompt": None, "n": i} for i in range(60)])
new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
with new(path, table.schema) as writer:
    writer.write_table(table, max_chunksize=20)
raw = open(path, "rb").read()
job = Job(load_tokenizer("bytes", ""), "sft", 64, "text", 0.1)
source = SourceConfig("arrow", path, "text", "a", 1.0)
rng, found = np.random.default_rng(0), Counter()
for _ in range(400):
    damaged = bytearray(raw)
    for at in rng.integers(0, len(raw), rng.integers(1, 9)):
        damaged[at] = rng.integers(256)
    open(path, "wb").write(damaged)
    try:
        for record in records(source, source_files(source), "sft"):
            if not isinstance(record.content, Unreadable):
                found["rows"] += isinstance(read_example(record.content, job), tuple)
        found["read"] += 1
    except UserError as error:
        found["refused"] += 1
        assert str(error).startswith(path), error
print(found)
assert min(found["read"], found["refused"]) > 20, found
assert found["rows"] > 1000, found
"""


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_no_damage_to_nested_columns_ends_the_process(tmp_path, kind):
    command = [sys.executable, "-c", ARROW, str(tmp_path / "a.arrow"), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
