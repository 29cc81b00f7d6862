"""eval.py from a stored checkpoint to results.json, and its mistakes explained."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import UserError
from mixtral_jax.data import Corpus, build_cache, load_tokenizer
from mixtral_jax.evals import baselines, compare, run
from mixtral_jax.evals.settings import Settings
from mixtral_jax.models import mixtral
from mixtral_jax.sharding import named_leaves
from mixtral_jax.workdir import store_run
from tests.helpers import on_mesh, shard, tiny
from tests.processes import fill

V = 512


def constant(config, steepness: float):
    """A model with the same logits after any text: of loss log V exactly when they are flat."""
    like = mixtral.abstract(config.model)
    leaves = {name: np.zeros(leaf.shape, np.float32) for name, leaf in named_leaves(like).items()}
    leaves["embedding_VD"][:] = leaves["final_norm_D"][:] = 1
    leaves["head_DV"][:] = steepness * np.arange(V) / V
    return jax.tree.unflatten(jax.tree.structure(like), list(leaves.values()))


@pytest.fixture
def workdir(tmp_path):
    """A run as training leaves it, on one device: a flat model at step 2, another at step 4."""
    (tmp_path / "corpus").mkdir()
    for i in range(20):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"document number {i}: " + "the quick brown fox. " * (i + 3))
    config, mesh = on_mesh(
        tiny(
            data__source="text",
            data__path=str(tmp_path / "corpus"),
            data__cache_dir=str(tmp_path / "cache"),
            data__heldout_fraction=0.3,
            model__vocab_size=V,
            train__batch_size=3,
        )
    )
    folder = tmp_path / "run"
    folder.mkdir()
    store_run(folder, config.to_dict())
    load_tokenizer("bytes", "").save(folder / "tokenizer")
    corpus = build_cache(config.data, load_tokenizer("bytes", ""), progress=False)
    checkpoints = Checkpoints(folder, keep=2)
    for step, steepness in ((2, 0.0), (4, 1.0)):
        model = shard(constant(config, steepness), mesh)
        checkpoints.save(
            step, model, {"count": jax.numpy.zeros(())}, {"step": step, "identity": {"corpus": corpus.key}}
        )
    checkpoints.close()
    return folder


def test_results_are_written_with_all_that_made_them(workdir, tmp_path, capsys):
    """A run of one device and batches of 3 is evaluated on 8 devices."""
    out = tmp_path / "reports" / "x"
    found = run.evaluate(str(workdir), 2, ["perplexity", "baselines"], str(out))
    assert found["perplexity"]["loss"] == pytest.approx(np.log(V), rel=1e-6)
    written = json.loads((out / "results.json").read_text())
    assert written["results"] == found
    assert set(found["perplexity"]) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    assert set(found["baselines"]) == {"unigram_bits_per_byte", "bigram_bits_per_byte", "baseline_tokens"}
    # The baselines are counted on the other split: on this one itself they would do better.
    config, *_ = run.load(workdir)
    corpus = build_cache(config.data, load_tokenizer("bytes", ""), progress=False)
    on_itself = baselines(config, Corpus((dataclasses.replace(corpus.sources[0], train=corpus.heldout),)))
    assert found["baselines"] == baselines(config, corpus)
    for name in ("unigram_bits_per_byte", "bigram_bits_per_byte"):
        assert on_itself[name] < found["baselines"][name]
    assert written["config"]["model"]["vocab_size"] == V
    assert written["config"]["mesh"]["fsdp"] == 8
    assert written["checkpoint"] == f"{workdir}, step 2"
    assert {"jax", "flax", "python"} <= written["versions"].keys()
    printed = capsys.readouterr().out
    for word in (str(workdir), "step 2", "bits_per_byte", f"{np.log(V):.4f}", "bigram_bits_per_byte", "results.json"):
        assert word in printed
    for page in ("report.md", "report.html"):
        assert "By word and document: --text=NAME=SOURCE:PATH" in (out / page).read_text(), page
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]


def test_the_newest_checkpoint_is_the_default(workdir):
    config, model, mesh = run.load(workdir)
    assert config.mesh.fsdp == mesh.size == 8
    assert config.train.batch_size == 8
    for name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(leaf, named_leaves(constant(config, 1.0))[name], err_msg=name)


def test_text_that_has_changed_since_is_refused(workdir, tmp_path):
    """Another split might hold out what was trained on."""
    (tmp_path / "corpus" / "new.txt").write_text("one more document")
    with pytest.raises(UserError, match="has changed"):
        run.evaluate(str(workdir), 2, ["perplexity"], str(tmp_path / "out"))


def test_a_step_that_is_not_there_is_refused_with_those_that_are(workdir, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint of step 3 \(there: 2, 4\)"):
        run.evaluate(str(workdir), 3, ["perplexity"], str(tmp_path / "out"))


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    store_run(tmp_path, tiny().to_dict())
    with pytest.raises(UserError, match=r"no checkpoint \(there: none\)"):
        run.load(tmp_path)


@pytest.mark.parametrize("names", [["perplexity", "mmlu"], []])
def test_an_unknown_evaluation_is_refused_before_anything_is_read(tmp_path, names):
    with pytest.raises(UserError, match=r"(mmlu|none given).*there are perplexity, .*baselines"):
        run.evaluate(str(tmp_path / "none"), None, names, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out={0}/out"], ["--checkpoint is missing"]),
        (["--checkpoint={0}/none"], ["--out is missing"]),
        (["--checkpoint={0}/none", "--out={0}/out"], ["none is no directory", "workdir", "hf:DIR"]),
    ],
    ids=["no_checkpoint", "no_out", "no_such_run"],
)
def test_mistakes_end_with_status_2_and_an_explanation(tmp_path, arguments, words):
    command = [sys.executable, "eval.py", *(argument.format(tmp_path) for argument in arguments)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not list(tmp_path.glob("**/results.json"))


@pytest.mark.parametrize("several", [False, True], ids=["one", "compared"])
def test_passkeys_that_no_prompt_fits_are_refused_before_weights_are_read(workdir, tmp_path, monkeypatch, several):
    def read(*arguments):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(run, "load", read)
    settings = Settings(passkey_lengths=(4096, 20))
    specs, out, asked = [f"{workdir}/checkpoints/{step}" for step in (2, 4)], str(tmp_path / "out"), ["passkey"]

    def evaluate():
        if several:
            return compare.compare(specs, out, names=asked, settings=settings)
        return run.evaluate(specs[0], None, asked, out, settings)

    with pytest.raises(UserError, match=r"--passkey_lengths: 20 tokens cannot hold .* give lengths of at least \d\d\d"):
        evaluate()


def test_a_tokenizer_of_another_model_is_refused(workdir, tmp_path):
    values = json.loads((workdir / "config.json").read_text())
    values["model"]["vocab_size"] = 200
    (workdir / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"bytes has 258 ids and the model's vocab_size is 200"):
        run.evaluate(str(workdir), 2, ["perplexity"], str(tmp_path / "out"))


def test_a_checkpoint_of_another_shape_is_refused(workdir, tmp_path):
    values = json.loads((workdir / "config.json").read_text())
    values["model"]["num_layers"] += 1
    (workdir / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"w_gate_EDF"):
        run.evaluate(str(workdir), 2, ["perplexity"], str(tmp_path / "out"))


def test_what_is_finished_stays_when_a_later_evaluation_fails(workdir, tmp_path, monkeypatch):
    """The report of the first is on the disk, and says what is missing; the same command then does the rest."""

    def fails(subject):
        yield "one", 1
        raise UserError("no data set")

    monkeypatch.setitem(run.EVALS, "planted", run.EVALS["baselines"]._replace(run=fails))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no data set"):
        run.evaluate(str(workdir), 2, ["baselines", "planted"], str(out))
    written = json.loads((out / "results.json").read_text())
    assert written["unfinished"] == ["planted"]
    assert set(written["results"]) == {"baselines", "planted"}
    assert written["results"]["planted"] == {"one": 1}, "what it gave before it failed"
    page = (out / "report.html").read_text()
    assert "(unfinished)" in page
    assert "bigram_bits_per_byte" in page
    monkeypatch.setitem(run.EVALS, "planted", run.EVALS["baselines"]._replace(run=lambda subject: iter([("one", 1)])))
    found = run.evaluate(str(workdir), 2, ["baselines", "planted"], str(out))
    written = json.loads((out / "results.json").read_text())
    assert "unfinished" not in written
    assert written["results"]["planted"] == found["planted"] == {"one": 1}


def test_a_full_disk_is_explained_and_harms_nothing(workdir, small_disk, tmp_path):
    out = small_disk / "out"
    found = run.evaluate(str(workdir), 2, ["baselines"], str(out))
    before = (out / "results.json").read_text()
    fill(small_disk / "ballast")
    with pytest.raises(UserError, match=r"No space left on device.*run the same command again"):
        run.evaluate(str(workdir), 2, ["perplexity", "baselines"], str(out))
    assert (out / "results.json").read_text() == before
    assert not list(out.glob("results.json.*")), "nothing half-written"
    (small_disk / "ballast").unlink()
    assert run.evaluate(str(workdir), 2, ["perplexity", "baselines"], str(out))["baselines"] == found["baselines"]


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    run.write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": [None, 1.5],
        "b": {"c": None},
    }
