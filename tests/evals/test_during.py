"""Evaluations of EVALS while a run trains."""

import pytest

from mixtral_jax.config import UserError
from mixtral_jax.evals import during
from mixtral_jax.jsonl import read_jsonl
from tests.helpers import tiny


def lines(workdir, kind):
    return [line for line in read_jsonl(workdir / "metrics.jsonl") if line["kind"] == kind]


def test_they_come_at_their_steps_and_at_the_end(tmp_path, fit):
    fit(
        "run",
        train__steps=5,
        train__evals=("perplexity@2", "baselines@3"),
        train__eval_every=2,
        train__eval_batches=100,
    )
    found = lines(tmp_path / "run", "eval")
    steps = [(line["step"], next(name for name in line if "/" in name).partition("/")[0]) for line in found]
    assert steps == [(2, "perplexity"), (3, "baselines"), (4, "perplexity"), (5, "perplexity"), (5, "baselines")]
    heldout = {line["step"]: line["loss"] for line in lines(tmp_path / "run", "heldout")}
    for line in found:
        if "perplexity/loss" in line:
            assert line["perplexity/loss"] == pytest.approx(heldout[line["step"]], rel=1e-5)
    (final,) = lines(tmp_path / "run", "final")
    assert found[-1]["baselines/bigram_bits_per_byte"] == pytest.approx(final["bigram_bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize(
    ("evals", "words"),
    [
        (("mmlu@5",), "mmlu is no evaluation for train.stage=pretrain; there are perplexity, baselines"),
        (("preference@5",), "preference is no evaluation for train.stage=pretrain"),
    ],
)
def test_an_evaluation_that_cannot_run_is_refused_before_the_run(evals, words):
    with pytest.raises(UserError, match=words):
        during.check(tiny(train__evals=evals))


@pytest.mark.parametrize("item", ["routing", "routing@", "routing@0", "@5", "routing@x"])
def test_what_names_no_step_is_refused(item):
    with pytest.raises(UserError, match="is no NAME@STEPS"):
        tiny(train__evals=(item,))


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(UserError, match="second one of that name"):
        tiny(train__evals=("routing@2", "routing@4"))
