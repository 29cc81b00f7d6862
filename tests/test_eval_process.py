"""eval.py as real processes: killed again and again, as two, and on a checkpoint that is not the one from before."""

import json
import sys
from pathlib import Path

import pytest

from tests.processes import Process, command, run, wait_for, write_corpus

pytestmark = pytest.mark.slow

EVALS = ("perplexity", "routing", "context", "passkey", "lm_eval")
# Batches of a row or two: every evaluation has many pieces.
ASKED = [
    "--batch_tokens=128",
    "--limit=12",
    "--context_lengths=64,128",
    "--passkey_lengths=440,512",
    "--passkey_depths=0,1",
    "--passkey_trials=4",
    "--tasks=local_members,local_arithmetic@2",
]


class Trained:
    """A run with checkpoints 2 and 4, text to evaluate on, and what an uninterrupted evaluation of 4 gave."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, folder / "run"
        self.cached = dict(
            JAX_COMPILATION_CACHE_DIR=str(folder / "xla"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
        )
        write_corpus(folder / "corpus")
        changes = dict(data__source="text", data__path=str(folder / "corpus"), data__cache_dir=str(folder / "cache"))
        changes |= dict(model__max_seq_len=512, data__tokenizer="bytes", model__vocab_size=264)
        changes |= dict(optim__learning_rate=1e-2, train__steps=4, train__checkpoint_every=2)
        run(command(self.runs, **changes), **self.cached)
        run(self.line(folder / "whole"), **self.cached)
        self.whole = written(folder / "whole")

    def line(self, out: Path, step: int = 4, evals=EVALS) -> list[str]:
        """The command that evaluates a checkpoint into a folder."""
        given = [f"--checkpoint={self.runs}", f"--step={step}", f"--evals={','.join(evals)}", f"--out={out}"]
        return [sys.executable, "eval.py", *given, f"--text=fox=text:{self.folder / 'corpus'}", *ASKED]

    def killed(self, out: Path, evaluation: str, pieces: int, **more) -> dict[str, list[str]]:
        """Starts the command and kills it when so many more pieces of an evaluation are kept; returns what is kept then."""
        before = count(out, evaluation)
        process = Process(self.line(out, **more), **self.cached)
        try:
            wait_for(lambda: count(out, evaluation) >= before + pieces, process)
        finally:
            process.stop()
        return kept(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("lm_eval")
    return Trained(tmp_path_factory.mktemp("evaluated"))


def written(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def kept(out: Path) -> dict[str, list[str]]:
    """The finished pieces in each file of an evaluation that is not."""
    return {
        path.name: path.read_text().split("\n")[1:-1]  # not the file's key, nor a line that was cut
        for path in (out / "unfinished").glob("*.jsonl")
    }


def count(out: Path, evaluation: str) -> int:
    return sum(len(lines) for name, lines in kept(out).items() if name.startswith(evaluation))


def files(out: Path) -> dict[str, int]:
    """Every file of a report."""
    return {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}


def test_kills_in_every_evaluation_change_nothing(trained, tmp_path):
    """To the last digit; and what was kept before a kill is kept after the next."""
    out, before = tmp_path / "killed", {}
    for evaluation, pieces in (*((name, 2) for name in EVALS), ("lm_eval", 5)):
        now = trained.killed(out, evaluation, pieces)
        for name, lines in before.items():
            assert now[name][: len(lines)] == lines
        before = now
    assert all(any(name.startswith(evaluation) for name in before) for evaluation in EVALS)
    # A kill amid a write leaves half a line.
    for path in (out / "unfinished").glob("lm_eval*.jsonl"):
        path.write_text(path.read_text()[:-7])
    run(trained.line(out), **trained.cached)
    assert written(out)["results"] == trained.whole["results"]
    assert "unfinished" not in written(out)
    assert not (out / "unfinished").exists()
    assert files(out).keys() == files(trained.folder / "whole").keys()


def test_two_processes_evaluate_as_one(trained, tmp_path):
    """Killed once on the way: both processes know what process 0 has kept."""
    out = tmp_path / "two"
    launcher = [sys.executable, "-m", "mixtral_jax.launch", "--processes=2", "--devices_per_process=1", "--"]
    said = run([*launcher, *trained.line(out)[1:]], **trained.cached)
    assert said.count(f"written to {out / 'results.json'}") == 1
    assert "process 1:" not in said, "process 0 alone speaks"
    assert files(out).keys() == files(trained.folder / "whole").keys()
    found = written(out)
    assert found["devices"] == "2 x cpu"
    assert_close(found["results"], trained.whole["results"])


def assert_close(got, want, where: str = "results") -> None:
    """Numbers to 1e-5, integers and all else exactly."""
    assert type(got) is type(want), where
    if isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for name, value in want.items():
            assert_close(got[name], value, f"{where}/{name}")
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for i, value in enumerate(want):
            assert_close(got[i], value, f"{where}/{i}")
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5), where
    else:
        assert got == want, where


def test_another_checkpoint_takes_nothing_of_what_the_first_has_kept(trained, tmp_path):
    """In the same folder; its results are those that it has in a folder of its own."""
    evals = EVALS[:3]
    out = tmp_path / "same"
    of_4 = trained.killed(out, "context", 2, evals=evals)
    of_2 = trained.killed(out, "context", 2, evals=evals, step=2)
    assert all(of_2[name][: len(lines)] == lines for name, lines in of_4.items()), "they are there still"
    assert len(of_2) == 2 * len(of_4) == 6
    run(trained.line(out, 2, evals), **trained.cached)
    run(trained.line(tmp_path / "alone", 2, evals), **trained.cached)
    found = written(out)
    assert found["step"] == 2
    assert found["results"] == written(tmp_path / "alone")["results"]
    for evaluation in evals:
        assert found["results"][evaluation] != trained.whole["results"][evaluation]
