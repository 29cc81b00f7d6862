"""SFT, DPO and LoRA as runs: what must not move does not, what is interrupted goes on, and what would be wrong is refused."""

import shutil

import numpy as np
import pytest

from mixtral_jax import frozen, lora_base, reference, trainer
from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import UserError
from mixtral_jax.fingerprint import fingerprints
from mixtral_jax.jsonl import read_jsonl
from mixtral_jax.load import load
from mixtral_jax.sharding import named_leaves
from tests.helpers import tiny
from tests.processes import logged
from tests.tuned import prepare, tune_in

LORA = dict(lora__rank=2, lora__alpha=4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretraining run, `base`, and the rows to tune it on; what is trained from it by several tests is trained once."""
    tmp_path = tmp_path_factory.mktemp("tuning")
    prepare(tmp_path)
    return tmp_path


@pytest.fixture
def tune(folder):
    """Returns a function that trains a stage from the run `base`."""

    def run(name, stage, **changes):
        return tune_in(folder, name, stage, **changes)

    return run


def weights(workdir) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(load(str(workdir))[1]).items()}


def stored(workdir, step: int = 4) -> dict:
    checkpoints = Checkpoints(workdir)
    meta = checkpoints.meta(step)
    checkpoints.close()
    return meta


def stop_after(monkeypatch, step: int):
    """Ends the run as Ctrl-C would, once the metrics of this step are known."""
    log = trainer._log

    def stop(run, now, *rest):
        values = log(run, now, *rest)
        if now == step:
            raise KeyboardInterrupt
        return values

    monkeypatch.setattr(trainer, "_log", stop)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", LORA),
        pytest.param("dpo", LORA, marks=pytest.mark.slow),
        pytest.param("dpo", {"dpo__reference": "on_the_fly"}, marks=pytest.mark.slow),
    ],
    ids=["sft-lora", "dpo-lora", "dpo-on-the-fly"],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tune, folder, monkeypatch, request, stage, changes):
    straight, stopped = (f"{name}-{request.node.callspec.id}" for name in ("straight", "stopped"))
    tune(straight, stage, **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            tune(stopped, stage, **changes)
    tune(stopped, stage, **changes)
    assert logged(folder / stopped) == logged(folder / straight)
    assert stored(folder / stopped)["arrays"] == stored(folder / straight)["arrays"], "the fingerprints of all"


@pytest.mark.slow
def test_where_the_reference_comes_from_changes_nothing(tune, folder, monkeypatch, capfd):
    """Precomputed or on the fly: the same batches in the same order and the same losses; and it stays what it is."""
    before = weights(folder / "base")
    shutil.rmtree(folder / "cache" / "reference", ignore_errors=True)
    tune("stored", "dpo", optim__learning_rate=1e-2)
    assert "computing the reference's log-probabilities of" in capfd.readouterr().err
    runs, start = [], trainer.start
    monkeypatch.setattr(trainer, "start", lambda *a: runs.append(start(*a)) or runs[-1])
    tune("fly", "dpo", optim__learning_rate=1e-2, dpo__reference="on_the_fly")
    assert fingerprints(runs[0].frozen) == runs[0].frozen_meta["fingerprints"], "in memory, after the last step"
    tune("stored", "dpo", optim__learning_rate=1e-2)  # finished; its start reads the reference again
    err = capfd.readouterr().err
    assert "computing" not in err
    assert "reference log-probabilities of" in err
    a, b = logged(folder / "stored"), logged(folder / "fly")
    for x, y in zip(a, b, strict=True):
        assert x["tokens"] == y["tokens"]
        for name in ("preference_loss", "rewards/margins", "logps/chosen", "gradient_norm"):
            assert x[name] == pytest.approx(y[name], rel=1e-4, abs=1e-6), name
    assert a[0]["rewards/margins"] == b[0]["rewards/margins"] == 0
    assert a[0]["preference_loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert a[-1]["rewards/margins"] != 0
    after, trained = weights(folder / "base"), weights(folder / "fly")
    assert all((before[name] == after[name]).all() for name in before)
    assert any((before[name] != trained[name]).any() for name in before)
    noted = [stored(folder / "fly", step)["frozen"] for step in (2, 4)]
    assert noted[0] == noted[1] == stored(folder / "stored")["frozen"]
    assert noted[0]["source"] == str(folder / "base")


@pytest.mark.slow
def test_a_reference_that_was_interrupted_goes_on(tune, folder, monkeypatch, capfd):
    """Killed after its second batch, it begins with the third, and the result is that of one go."""
    shutil.rmtree(folder / "cache" / "reference", ignore_errors=True)
    monkeypatch.setattr(reference, "SAVE_SECONDS", 0.0)
    place, seen = reference.place, []

    def placed(*arguments):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return place(*arguments)

    changes = dict(data__packing=False, train__steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "place", placed)
        with pytest.raises(KeyboardInterrupt):
            tune("interrupted", "dpo", **changes)
    capfd.readouterr()
    tune("interrupted", "dpo", **changes)
    assert "once, from batch 2 on ..." in capfd.readouterr().err
    assert not list((folder / "cache" / "reference").glob("*.partial.npz"))
    first = [np.load(path) for path in sorted((folder / "cache" / "reference").glob("*/log_probs.npy"))]
    shutil.rmtree(folder / "cache" / "reference")
    tune("once", "dpo", **changes)
    second = [np.load(path) for path in sorted((folder / "cache" / "reference").glob("*/log_probs.npy"))]
    assert len(first) == 2
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a < 0).all(), "every pair has its log-probabilities"


@pytest.mark.slow
def test_weights_that_changed_since_are_refused(tune, folder):
    changes = dict(train__init_from=str(folder / "moving"), train__steps=1, train__checkpoint_every=1)
    shutil.copytree(folder / "base", folder / "moving")
    tune("held", "sft", **LORA | changes)
    tune("another", "sft", train__steps=1)
    shutil.rmtree(folder / "moving")
    shutil.copytree(folder / "another", folder / "moving")
    with pytest.raises(UserError, match=r"(?s)other weights than this run began with .* arrays differ"):
        tune("held", "sft", **LORA | changes | dict(train__steps=2))


def test_a_start_that_is_forgotten_or_new_is_refused_before_weights_are_read():
    named, empty = (tiny(lora__rank=2, train__init_from=source) for source in ("runs/base", ""))
    frozen.check_source(named, None)
    frozen.check_source(empty, None)
    frozen.check_source(named, {"source": "runs/base/checkpoints/4"})
    frozen.check_source(empty, {"source": ""})
    with pytest.raises(
        UserError, match=r"train.init_from is empty, and this run began with 'runs/base'; give --config"
    ):
        frozen.check_source(empty, {"source": "runs/base"})
    with pytest.raises(UserError, match=r"train.init_from='runs/base', and this run began with random weights"):
        frozen.check_source(named, {"source": ""})
    now = {"head_DV": "1"}
    assert lora_base.changed(None, {"source": "", "fingerprints": {"head_DV": "2"}}, now) == []
    assert lora_base.changed(None, {"source": "runs/base", "fingerprints": {"head_DV": "1"}}, now) == ["head_DV"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"), [("sft", LORA), ("dpo", LORA), ("dpo", {})], ids=["sft-lora", "dpo-lora", "dpo"]
)
def test_a_run_goes_on_from_what_it_began_with_only(tune, folder, request, stage, changes):
    """Without train.init_from, or on top of its own kind, it would train on beside other weights; nothing is changed."""
    name = f"began-{request.node.callspec.id}"
    once, more = (changes | dict(train__steps=n, train__checkpoint_every=1) for n in (1, 2))
    tune(name, stage, **once)
    before = (folder / name / "config.json").read_text()
    with pytest.raises(UserError, match=rf"train.init_from is empty, and this run began with '{folder}/base'"):
        tune(name, stage, **more, train__init_from="")
    if changes:
        tune("adapted", "sft", **LORA, train__steps=1)  # the same base, and adapters merged into it
        with pytest.raises(UserError, match=r"(?s)other weights than this run began with .* arrays differ"):
            tune(name, stage, **more, train__init_from=str(folder / "adapted"))
    assert (folder / name / "config.json").read_text() == before
    assert len(weights(folder / name)) > 10, "what it has is still read"


def test_frozen_routers_stay(tune, folder):
    tune("routers", "sft", optim__freeze_router=True, optim__weight_decay=0.5)
    before, after = weights(folder / "base"), weights(folder / "routers")
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved == set(before) - {"layers.w_router_DE"}


def test_lora_trains_adapters_only_and_stores_nothing_else(tune, folder):
    tune("lora", "sft", **LORA)
    arrays = stored(folder / "lora")["arrays"]
    assert arrays["params"]
    assert all(".lora_" in name for name in arrays["params"])
    moments = [name for name, leaf in arrays["opt_state"].items() if leaf["shape"]]
    assert moments
    assert all(".lora_" in name for name in moments)
    before, after = weights(folder / "base"), weights(folder / "lora")
    moved = {name.rpartition(".")[2] for name in before if (before[name] != after[name]).any()}
    assert moved == {"w_q_DNH", "w_k_DGH", "w_v_DGH", "w_o_NHD", "w_gate_EDF", "w_up_EDF", "w_down_EFD"}, "merged"


def test_answers_are_shown_before_during_and_after(tune, folder):
    tune(
        "answers",
        "sft",
        train__eval_every=2,
        train__sample_every=2,
        train__sample_prompts=("Say red 0.", "Say blue 1."),
        train__sample_tokens=4,
    )
    lines = read_jsonl(folder / "answers" / "metrics.jsonl")
    samples = [(line["step"], line["number"]) for line in lines if line["kind"] == "sample"]
    assert samples == [(0, 1), (0, 2), (2, 1), (2, 2), (4, 1), (4, 2)]
    assert [line["step"] for line in lines if line["kind"] == "heldout"] == [0, 2, 4]
    assert (folder / "answers" / "report.png").stat().st_size > 10_000


@pytest.mark.slow
def test_tuning_without_weights_to_start_from_is_said(tune, capfd):
    tune("random", "sft", train__init_from="", train__steps=1)
    assert "WARNING: train.init_from is empty, so this tunes random weights" in capfd.readouterr().err


def test_another_stage_in_the_same_workdir_is_refused(tune):
    tune("run", "sft")
    with pytest.raises(UserError, match=r"train.stage: checkpoint sft, now dpo"):
        tune("run", "dpo")
    with pytest.raises(UserError, match=r"lora.rank: checkpoint None, now 2"):
        tune("run", "sft", **LORA)
