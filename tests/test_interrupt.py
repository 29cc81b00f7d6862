"""Signals at chosen moments, and files in the way: what is said is so, and nothing good is called damaged.

tests/test_faults.py does the same to real processes, at moments that nobody chooses.
"""

import os
import signal

import orbax.checkpoint as ocp
import pytest

from mixtral_jax import interlude
from mixtral_jax import run as run_module
from mixtral_jax.checkpoint import steps_in
from mixtral_jax.config import RunError, UserError
from mixtral_jax.interrupt import Interrupt, InterruptedRun
from tests.processes import logged


def send(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)


def before(function, act):
    """The function, with something done just before it."""

    def both(*arguments, **named):
        act()
        return function(*arguments, **named)

    return both


def test_the_first_signal_waits_and_the_second_does_not(capfd):
    with Interrupt("start it again") as interrupt:
        with pytest.raises(InterruptedRun, match="before the first step; nothing was lost; start it again"):
            send()
        interrupt.arm()
        send()
        assert interrupt.number == signal.SIGTERM
        assert "saving after this step" in capfd.readouterr().err
        with pytest.raises(InterruptedRun, match="second SIGTERM") as error:
            send()
        assert error.value.status == 143
        with pytest.raises(InterruptedRun, match="after the last step"):
            interrupt.disarm("after the last step")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_signal_while_a_checkpoint_is_read_does_not_condemn_it(fit, tmp_path, monkeypatch):
    fit("run")
    monkeypatch.setattr(ocp.CheckpointManager, "restore", before(ocp.CheckpointManager.restore, send))
    with pytest.raises(InterruptedRun, match="before the first step"):
        fit("run", train__steps=5)
    assert steps_in(tmp_path / "run" / "checkpoints") == [2, 4]
    assert not (tmp_path / "run" / "damaged").exists()


def test_a_signal_during_an_evaluation_is_obeyed_and_the_step_is_saved(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(interlude, "evaluate", before(interlude.evaluate, send))
    with pytest.raises(InterruptedRun, match=r"step 3 is saved in .*checkpoints/3;"):
        fit("run", train__eval_every=3, train__eval_batches=1)
    assert steps_in(tmp_path / "run" / "checkpoints")[-1] == 3
    assert (tmp_path / "run" / "report.png").exists()


@pytest.mark.slow
def test_a_signal_during_the_last_evaluation_stops_it_and_the_next_start_makes_it(fit, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(interlude, "finish", before(interlude.finish, send))
        with pytest.raises(InterruptedRun, match="after the last step, which is saved"):
            fit("run")
    assert not logged(tmp_path / "run", "final")
    assert fit("run")
    assert len(logged(tmp_path / "run", "final")) == len(logged(tmp_path / "run", "heldout")) == 1


@pytest.mark.slow
def test_a_run_stopped_between_its_last_two_lines_writes_each_once(fit, tmp_path):
    fit("run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"kind": "final"' not in line))
    fit("run")
    assert len(logged(tmp_path / "run", "final")) == len(logged(tmp_path / "run", "heldout")) == 1


@pytest.mark.parametrize("name", ["checkpoints", "tokenizer", "tensorboard"])
def test_a_file_where_a_folder_belongs_is_named(fit, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("")
    with pytest.raises((UserError, RunError), match=name):
        fit("run")


def test_a_folder_where_a_file_belongs_is_named(fit, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises((UserError, RunError), match=name):
            fit(name)


def test_a_full_disk_at_the_start_is_the_disks_fault(fit, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "config.json.new")

    monkeypatch.setattr(run_module, "store_run", full)
    with pytest.raises(RunError, match=r"config\.json\.new: No space left on device"):
        fit("run")
