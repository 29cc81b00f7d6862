"""Bad rows, files, configurations and workdirs, given to the real commands: status 2 and a sentence that helps, each.

The commands run two at a time when the first of the tests needs them.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.processes import ROOT, SMALL, environment, write_corpus

GOOD = json.dumps({"text": "a good row, long enough to be split and trained on"})


def jsonl(folder: Path, *rows: str | bytes) -> list[str]:
    """A build of a file of 20 good rows with these after them."""
    lines = [GOOD.replace("a good", f"good {i}").encode() for i in range(20)]
    (folder / "rows.jsonl").write_bytes(
        b"\n".join([*lines, *(r if isinstance(r, bytes) else r.encode() for r in rows)])
    )
    return build(folder, "jsonl", "rows.jsonl")


def build(folder: Path, source: str, name: str, *more: str) -> list[str]:
    flags = [f"--source={source}", f"--path={folder / name}", "--tokenizer=bytes", "--heldout_fraction=0.3"]
    return ["-m", "mixtral_jax.data", "build", *flags, f"--cache_dir={folder / 'cache'}", *more]


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def parquet(folder: Path, **columns) -> list[str]:
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return build(folder, "parquet", "rows.parquet")


def train(
    folder: Path, *changes: str, workdir: str = "run", config: str = "configs/tiny.py:tiny", more=()
) -> list[str]:
    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    data = ["data.source=text", f"data.path={corpus}", f"data.cache_dir={folder / 'cache'}", "train.steps=3"]
    values = [f"{name}={value}" for name, value in SMALL.items()] + data + list(changes)
    return [
        "train.py",
        f"--config={config}",
        f"--workdir={folder / workdir}",
        *(f"--config.{v}" for v in values),
        *more,
    ]


def trained(folder: Path, *changes: str, **more) -> list[str]:
    """A run of three steps that is whole, and the same run again with changes."""
    subprocess.run([sys.executable, *train(folder)], cwd=ROOT, env=environment(), check=True, capture_output=True)
    return train(folder, *changes, **more)


def evaluated(folder: Path, spoil) -> list[str]:
    """An evaluation of a run that was spoilt."""
    trained(folder)
    spoil(folder / "run")
    return ["eval.py", f"--checkpoint={folder / 'run'}", f"--out={folder / 'out'}"]


def spoil_metrics(folder: Path) -> list[str]:
    line = trained(folder, "train.steps=5")
    path = folder / "run" / "metrics.jsonl"
    path.write_text("{half a line\n" + path.read_text())
    return line


def mixture(folder: Path, *items: dict) -> list[str]:
    line = train(folder, f"data.mixture={items!r}")
    return [flag for flag in line if "data.path=" not in flag and "data.source=" not in flag]


# name -> (the command's arguments, made in a folder of its own; words that its message must hold)
KINDS = {
    # rows
    "not json": (lambda f: jsonl(f, "{half"), ["rows.jsonl:21", "not JSON"]),
    "an array": (lambda f: jsonl(f, "[1, 2]"), ["rows.jsonl:21", "list"]),
    "no such key": (lambda f: jsonl(f, '{"content": "x"}'), ["rows.jsonl:21", "'text'", "'content'"]),
    "not a string": (lambda f: jsonl(f, '{"text": 7}'), ["rows.jsonl:21", "int"]),
    "invalid utf-8": (lambda f: jsonl(f, b'{"text": "\xff"}'), ["rows.jsonl:21", "UTF-8"]),
    "half a surrogate": (lambda f: jsonl(f, '{"text": "\\ud800"}'), ["rows.jsonl:21", "surrogate"]),
    "cut in the middle": (lambda f: jsonl(f, GOOD[:20]), ["rows.jsonl:21", "not JSON"]),
    "too many bad rows": (lambda f: [*jsonl(f, "{", "{", "{"), "--max_bad_rows=2"], ["rows.jsonl:23", "2"]),
    "a null in parquet": (lambda f: parquet(f, text=["a", None]), ["rows.parquet:2", "str"]),
    # files
    "an empty file": (lambda f: build(written(f, "x.jsonl", b"").parent, "jsonl", "x.jsonl"), ["no text"]),
    "no such file": (lambda f: build(f, "jsonl", "none.jsonl"), ["none.jsonl", "matches no file"]),
    "no match": (lambda f: build(f, "text", "*.txt"), ["*.txt", "matches no file"]),
    "text that is none": (
        lambda f: build(written(f, "x.txt", b"\xff\xfe").parent, "text", "x.txt"),
        ["x.txt", "UTF-8"],
    ),
    "parquet that is none": (
        lambda f: build(written(f, "x.parquet", b"PAR1").parent, "parquet", "x.parquet"),
        ["x.parquet"],
    ),
    "parquet without the key": (lambda f: parquet(f, content=["a"]), ["rows.parquet", "'text'", "'content'"]),
    "arrow that is none": (lambda f: build(written(f, "x.arrow", b"ARROW1").parent, "arrow", "x.arrow"), ["x.arrow"]),
    "no such data set": (lambda f: build(f, "hub", "nowhere"), ["nowhere"]),
    "no such tokenizer": (lambda f: [*jsonl(f), "--tokenizer=none.model"], ["none.model"]),
    "a tokenizer that is none": (
        lambda f: [*jsonl(f), f"--tokenizer={written(f, 'x.model', b'junk')}"],
        ["x.model", "not a SentencePiece model"],
    ),
    "a cache that is a file": (
        lambda f: [*jsonl(f), f"--cache_dir={written(f, 'file', b'')}"],
        ["data.cache_dir", "file"],
    ),
    "one document": (lambda f: build(written(f, "x.txt", b"one").parent, "text", "x.txt"), ["heldout_fraction"]),
    # configurations
    "unknown key": (lambda f: train(f, "train.stepz=3"), ["stepz"]),
    "wrong type": (lambda f: train(f, "train.steps=many"), ["many"]),
    "impossible values": (lambda f: train(f, "model.experts_per_token=9"), ["9", "num_experts=8"]),
    "a mesh too large": (lambda f: train(f, "mesh.expert=4", "mesh.fsdp=1"), ["4 devices", "there are 1"]),
    "a vocabulary too small": (lambda f: train(f, "model.vocab_size=64"), ["258", "64"]),
    "a config that is no program": (
        lambda f: train(f, config=str(written(f, "c.py", b"def get_config(:\n"))),
        ["c.py"],
    ),
    "no such config": (lambda f: train(f, config="configs/none.py"), ["none.py"]),
    "a source without weight": (lambda f: mixture(f, dict(source="stdlib")), ["data.mixture[0].weight"]),
    "a weight of zero": (lambda f: mixture(f, dict(source="stdlib", weight=0.0)), ["data.mixture[0]", "weight=0"]),
    "a stream of nothing": (
        lambda f: train(f, "data.streaming=True", f"data.path={written(f, 'x.txt', b'')}"),
        ["data.heldout_fraction"],
    ),
    "a profile of nothing": (lambda f: train(f, more=["--profile=9:3"]), ["--profile=9:3"]),
    "wandb without wandb": (lambda f: train(f, "train.wandb=x"), ["pip install wandb"]),
    # workdirs
    "a workdir that is a file": (
        lambda f: train(f, workdir=written(f, "file", b"").name),
        ["--workdir=", "File exists"],
    ),
    "another model": (lambda f: trained(f, "model.d_ff=64"), ["model.d_ff: checkpoint 48, now 64"]),
    "another seed": (lambda f: trained(f, "train.seed=5"), ["train.seed: checkpoint 0, now 5"]),
    "a run that was longer": (lambda f: trained(f, "train.steps=2"), ["step 3", "train.steps=2"]),
    "metrics with a hole": (spoil_metrics, ["metrics.jsonl, line 1"]),
    "weights from nowhere": (lambda f: train(f, f"train.init_from={f / 'nowhere'}"), ["nowhere"]),
    "weights of another shape": (
        lambda f: trained(f, f"train.init_from={f / 'run'}", "model.d_ff=64", workdir="other"),
        ["w_gate_EDF", "48", "64"],
    ),
    "weights of another tokenizer": (
        lambda f: trained(f, f"train.init_from={f / 'run'}", "data.tokenizer=stdlib:400", workdir="other"),
        ["another tokenizer"],
    ),
    "an evaluation of nothing": (
        lambda f: ["eval.py", f"--checkpoint={f / 'none'}", f"--out={f / 'out'}"],
        ["none"],
    ),
    "half a config.json": (
        lambda f: evaluated(f, lambda run: (run / "config.json").write_text('{"model": ')),
        ["config.json is not valid JSON"],
    ),
    "a step that is not there": (lambda f: [*evaluated(f, lambda run: None), "--step=99"], ["99", "3"]),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """Runs every command; name -> its ending."""

    def ending(name):
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        line = [sys.executable, *KINDS[name][0](folder)]
        env = environment(HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hf"), JAX_ENABLE_COMPILATION_CACHE="false")
        return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(KINDS, pool.map(ending, KINDS)))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_bad_input_ends_with_status_2_and_an_explanation(endings, name):
    done = endings[name]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1], done.stderr
    for word in KINDS[name][1]:
        assert word in done.stderr, f"{word!r} is not in:\n{done.stderr}"
