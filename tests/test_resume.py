"""Warm starts from another run's weights, and runs that skip steps that are not finite."""

import json

import numpy as np
import pytest

from mixtral_jax import trainer
from mixtral_jax.config import UserError
from mixtral_jax.trainer import NonFiniteError
from tests.processes import logged


def test_a_warm_start_takes_the_weights_and_nothing_else(fit, tmp_path, capfd):
    """From a workdir and from a step's folder: another mixture of data, seed and schedule are free to change."""
    fit("base")
    last = json.loads((tmp_path / "base" / "metrics.jsonl").read_text().splitlines()[-1])
    # A learning rate of 0 leaves the weights as they came, so the new run ends where the old one did.
    final = fit("warm", train__init_from=str(tmp_path / "base"), optim__learning_rate=0.0, train__seed=9)
    assert final["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert f"weights from {tmp_path / 'base'}, a new optimizer, step 0" in capfd.readouterr().err
    assert [line["step"] for line in logged(tmp_path / "warm")] == [1, 2, 3, 4]
    early = fit("early", train__init_from=str(tmp_path / "base/checkpoints/2"), optim__learning_rate=0.0)
    assert early["loss"] > last["loss"], "the folder of a step is that step and not the newest"


@pytest.mark.slow
def test_a_streamed_run_goes_on_where_its_stream_was(fit, tmp_path, monkeypatch):
    changes = dict(data__streaming=True, train__steps=6)
    fit("straight", **changes)
    log = trainer._log

    def stop(run, step, *rest):
        values = log(run, step, *rest)
        if step == 5:
            raise KeyboardInterrupt
        return values

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_log", stop)
        with pytest.raises(KeyboardInterrupt):
            fit("stopped", **changes)
    fit("stopped", **changes)
    assert logged(tmp_path / "stopped") == logged(tmp_path / "straight")


@pytest.mark.slow
def test_a_warm_start_that_was_stopped_goes_on_from_its_own_checkpoint(fit, tmp_path, capfd):
    fit("base")
    fit("warm", train__init_from=str(tmp_path / "base"), train__steps=4)
    capfd.readouterr()
    assert fit("warm", train__init_from=str(tmp_path / "base"), train__steps=4) == {}
    err = capfd.readouterr().err
    assert "resumed from" in err
    assert "weights from" not in err


def test_a_warm_start_from_another_model_is_refused(fit, tmp_path):
    fit("base")
    for changes, words in (
        (dict(model__d_ff=56), "w_gate_EDF"),
        (dict(model__rope_theta=1e4), "model.rope_theta: there 1000000.0, here 10000.0"),
        (dict(train__init_from=str(tmp_path / "nowhere")), "nowhere is no directory"),
    ):
        with pytest.raises(UserError, match=f"(?s){words}"):
            fit("other", **dict(train__init_from=str(tmp_path / "base")) | changes)
    assert not list((tmp_path / "other" / "checkpoints").iterdir())


def spoil(monkeypatch, *steps):
    """Makes the losses of these steps infinite: what a bad document does."""
    place, seen = trainer.place, []

    def placed(batch, mesh, *rows):
        seen.append(1)
        if len(seen) in steps:
            batch = batch | {
                "loss_weights_BT": np.where(batch["segment_ids_BT"] > 0, np.float32(np.inf), np.float32(0))
            }
        return place(batch, mesh, *rows)

    monkeypatch.setattr(trainer, "place", placed)


def test_a_step_that_is_not_finite_is_skipped_where_that_is_allowed(fit, tmp_path, monkeypatch, capfd):
    spoil(monkeypatch, 2)
    fit("run", train__skip_nonfinite=1)
    err = capfd.readouterr().err
    assert "WARNING: step 2 was skipped, number 1 of at most 1: loss" in err
    assert ".txt" in err
    lines = logged(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1]
    assert lines[1]["loss"] is None
    assert all(np.isfinite(line["loss"]) for line in (lines[0], *lines[2:]))


@pytest.mark.slow
def test_a_resumed_run_remembers_what_it_skipped(fit, tmp_path, monkeypatch):
    """The limit is the run's: one step skipped before the restart and one after it are two."""
    with monkeypatch.context() as patch:
        spoil(patch, 2, 4)
        with pytest.raises(
            NonFiniteError, match=r"(?s)step 4: .*checkpoints/2 is the last good one. 1 such steps were skipped"
        ):
            fit("run", train__skip_nonfinite=1)
    spoil(monkeypatch, 2)  # the second step after the resume: step 4
    with pytest.raises(NonFiniteError, match="step 4"):
        fit("run", train__skip_nonfinite=1)
    assert fit("run", train__skip_nonfinite=2)


@pytest.mark.slow
def test_the_step_after_a_skipped_one_is_what_it_would_be_without_it(fit, tmp_path, monkeypatch):
    """The weights and the moments that step 3 starts from are those after step 1, bit for bit."""
    changes = dict(train__steps=2, train__skip_nonfinite=1, train__checkpoint_every=1, optim__schedule="constant")
    with monkeypatch.context() as patch:
        spoil(patch, 2)
        fit("skipped", **changes)
    fit("short", **changes | dict(train__steps=1))
    one, two = (tmp_path / name / "checkpoints" for name in ("short", "skipped"))
    assert (one / "1").is_dir()
    assert (two / "2").is_dir()
    metas = [json.loads((folder / "meta" / "metadata").read_text())["arrays"] for folder in (one / "1", two / "2")]
    assert metas[0] == metas[1], "the fingerprints of all arrays"
