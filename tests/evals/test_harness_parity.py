"""The harness through our adapter, and through its own `hf` backend on the exported weights: the same answers and metrics."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.convert.__main__ import main
from mixtral_jax.data.tokenizer import train_sentencepiece
from mixtral_jax.evals import run
from mixtral_jax.evals.harness import presets
from mixtral_jax.evals.settings import Settings
from tests.convert import sources
from tests.golden import reference

pytestmark = pytest.mark.parity
V, LIMIT = 400, 10
DEMO = Path(__file__).parents[2] / "runs" / "demo" / "pretrain"
SPECIAL = 259  # unknown, BOS, EOS and the bytes are the first ids
# What the embedded tasks do not have: contexts that are empty, end in spaces, or are cut; answers of many tokens.
EDGES = {
    "edges_score": (
        {"output_type": "loglikelihood", "doc_to_text": "{{a}}", "doc_to_target": "{{b}}", "target_delimiter": ""},
        [{"name": "acc"}],
        [
            ("", "return"),
            ("def f ", "x"),
            ("x = 3  \n", " y"),
            ("a word " * 200, " of it"),
            ("import", " os" * 30),
            ("", " a b"),
        ],
    ),
    "edges_text": (
        {
            "output_type": "generate_until",
            "doc_to_text": "{{a}}",
            "doc_to_target": "{{b}}",
            "generation_kwargs": {"until": ["e ", "\n\n"], "max_gen_toks": 40, "do_sample": False},
        },
        [{"name": "exact_match"}],
        [("", "x"), ("def f ", "x"), ("a word " * 200, "x"), ("日本", "x")],
    ),
}


def tokenizer(prefix: bool) -> bytes:
    text = Path(presets.__file__).read_text() + Path(run.__file__).read_text()
    if not prefix:
        return train_sentencepiece([text] * 3, V)
    return with_prefix(text)


def with_prefix(text: str) -> bytes:
    """A tokenizer that puts a space before every text, as Mixtral's does."""
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=out,
        vocab_size=V,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return out.getvalue()


def random_run(tmp_path: Path, fit) -> Path:
    """Random weights behind a tokenizer like Mixtral's.

    Single bytes are never the likeliest token: those that are no character SentencePiece and transformers show in two ways.
    """
    shape = reference.BASE | dict(vocab_size=V)
    weights = reference.weights(shape)
    weights["head_DV"][:, :SPECIAL] = 0
    source = sources.write(tmp_path / "hf", sources.tensors(weights), sources.config_json(shape))
    (source / "tokenizer.model").write_bytes(tokenizer(prefix=True))
    assert main(["import", f"--from={source}", f"--to={tmp_path / 'run'}"]) == 0
    return tmp_path / "run"


def trained_run(tmp_path: Path, fit) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer(prefix=False))
    fit(
        "run",
        data__tokenizer=str(path),
        model__vocab_size=V,
        model__num_layers=2,
        model__max_seq_len=128,
        train__seq_len=64,
        train__steps=60,
        train__checkpoint_every=60,
        optim__learning_rate=1e-2,
    )
    return tmp_path / "run"


def demo_run(tmp_path: Path, fit) -> Path:
    """What `make demo` pretrained, where it was."""
    if not DEMO.is_dir():
        pytest.skip(f"{DEMO} is not there; `make demo` makes it")
    return DEMO


def write_edges(folder: Path) -> list[str]:
    folder.mkdir()
    for name, (config, metrics, rows) in EDGES.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in rows))
        task = config | {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "metric_list": [{"metric": metric["name"]} for metric in metrics],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    return list(EDGES)


def theirs(exported: Path, settings: Settings, monkeypatch) -> dict:
    """The harness by itself; its bootstrap in this process, where ours is."""
    import lm_eval

    from mixtral_jax.evals.harness import running

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    catalogue = running.open_catalogue(settings, list(presets.LOCAL))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lm_eval.simple_evaluate(
            "hf",
            model_args={"pretrained": str(exported), "dtype": "float32", "device": "cpu"},
            batch_size=4,
            tasks=[*presets.LOCAL, *EDGES],
            limit=LIMIT,
            task_manager=catalogue,
            bootstrap_iters=running.RESAMPLES,
        )


@pytest.mark.parametrize("make", [random_run, trained_run, demo_run])
def test_answers_and_metrics_are_those_of_the_hf_backend(tmp_path, monkeypatch, fit, make):
    pytest.importorskip("torch")
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    checkpoint = make(tmp_path, fit)
    assert main(["export", f"--from={checkpoint}", f"--to={tmp_path / 'back'}"]) == 0
    edges = write_edges(tmp_path / "edges")
    settings = Settings(tasks=("local", *edges), limit=LIMIT, task_path=(str(tmp_path / "edges"),))
    ours = run.evaluate(str(checkpoint), None, ["lm_eval"], str(tmp_path / "out"), settings)["lm_eval"]
    reference_ = theirs(tmp_path / "back", settings, monkeypatch)
    kinds, texts = set(), []
    for task, lines in reference_["samples"].items():
        written = (tmp_path / "out" / "lm_eval" / f"samples_{task}.jsonl").read_text().splitlines()
        for got, want in zip(map(json.loads, written), lines, strict=True):
            assert got["arguments"] == json.loads(json.dumps(want["arguments"]))
            for a, b in zip(got["resps"], want["resps"], strict=True):
                kinds.add(type(b[0]).__name__)
                if isinstance(b[0], str):
                    assert a == b
                    texts.append(b[0])
                elif isinstance(b[0], tuple):
                    assert a[0][0] == pytest.approx(b[0][0], abs=1e-4, rel=1e-6)
                    assert a[0][1] == b[0][1]
                else:
                    assert a[0] == pytest.approx(b[0], abs=1e-4, rel=1e-6)
    assert kinds == {"str", "tuple", "float"}
    assert len(set(texts)) > 5
    for task, metrics in reference_["results"].items():
        for name, value in metrics.items():
            if name.endswith(",none") and isinstance(value, float):
                ours_ = ours[f"{task}/{name.removesuffix(',none')}"]
                np.testing.assert_allclose(ours_, value, rtol=1e-4, err_msg=f"{task} {name}")
