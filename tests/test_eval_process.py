"""eval.py as users run it: killed and started again, in two processes, with another checkpoint's pieces beside its own."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.processes import Process, command, run, wait_for, write_corpus

EVALS = "perplexity,routing,context,passkey,lm_eval"
FEW = [
    "--limit=3",
    "--batch_tokens=512",
    "--routing_tokens=300",
    "--context_lengths=32,64",
    "--context_documents=4",
    "--passkey_trials=1",
    "--passkey_depths=0,1",
    "--tasks=local_keywords,local_arithmetic",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A run of some steps."""
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder / "corpus")
    changes = dict(data__source="text", data__path=str(folder / "corpus"), data__cache_dir=str(folder / "cache"))
    changes |= dict(data__tokenizer="bytes", model__vocab_size=272, model__max_seq_len=1024, train__steps=3)
    run(command(folder / "run", **changes))
    return folder / "run"


def line(workdir: Path, out: Path) -> list[str]:
    return [sys.executable, "eval.py", f"--checkpoint={workdir}", f"--evals={EVALS}", f"--out={out}", *FEW]


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())["results"]


@pytest.fixture(scope="module")
def whole(workdir, tmp_path_factory) -> Path:
    """The results of an evaluation that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(line(workdir, out))
    assert (out / "report.html").stat().st_size > 10_000
    assert list(results(out)) == EVALS.split(",")
    return out


def pieces(out: Path) -> int:
    """Lines of finished pieces; -1 before there are any, or when all is done."""
    files = list(out.glob("unfinished/*.jsonl"))
    return sum(path.read_text().count("\n") for path in files) if files else -1


def test_an_evaluation_that_is_killed_again_and_again_gives_the_same(workdir, whole, tmp_path):
    out = tmp_path / "out"
    for goal in (3, 12, 30):
        process = Process(line(workdir, out))
        wait_for(lambda goal=goal: pieces(out) >= goal, process)
        process.stop()
        assert pieces(out) >= goal
    said = run(line(workdir, out))
    assert results(out) == results(whole)
    assert not (out / "unfinished").exists()
    assert "report.html" in said


def test_another_checkpoint_takes_nothing_of_the_finished_pieces(workdir, whole, tmp_path):
    """The same command on other weights, in a folder where the first was killed."""
    out, other = tmp_path / "out", tmp_path / "other"
    process = Process(line(workdir, out))
    wait_for(lambda: pieces(out) >= 30, process)
    process.stop()
    shutil.copytree(workdir, other)
    changes = dict(data__source="text", data__path=str(workdir.parent / "corpus"))
    changes |= dict(data__cache_dir=str(workdir.parent / "cache"), data__tokenizer="bytes")
    run(command(other, **changes, model__vocab_size=272, model__max_seq_len=1024, train__steps=5))
    run(line(other, out))
    run(line(other, tmp_path / "alone"))
    assert results(out) == results(tmp_path / "alone")
    assert results(out)["perplexity"]["loss"] != results(whole)["perplexity"]["loss"]


def test_two_processes_evaluate_as_one(workdir, whole, tmp_path):
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "mixtral_jax.launch", "--processes=2", "--devices_per_process=1", "--"]
    said = run([*launcher, *line(workdir, out)[1:]])
    assert said.count("written to") == 1, "one voice"
    assert_close(results(out), results(whole), "")


def assert_close(got, want, where: str) -> None:
    """Numbers agree to 1e-5, all else is the same."""
    if isinstance(want, dict):
        assert list(got) == list(want), where
        for name in want:
            assert_close(got[name], want[name], f"{where}/{name}")
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for i, (a, b) in enumerate(zip(got, want)):
            assert_close(a, b, f"{where}/{i}")
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6), where
    else:
        assert got == want, where
