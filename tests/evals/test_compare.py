"""Tuned runs evaluated one by one and side by side, on what they held out; against counts by hand and what training said."""

import dataclasses
import html
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax import cli
from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import UserError
from mixtral_jax.data import TokenFile, encode_chat, encode_conversation, open_chat_corpus
from mixtral_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from mixtral_jax.evals import compare as compare_module
from mixtral_jax.evals import compare_report, run
from mixtral_jax.evals.compare import Entrant, Heldout, _notes, compare
from mixtral_jax.evals.preference import answer_tokens, likelihood_ranking, reward_ranking
from mixtral_jax.evals.questions import choose_questions, chosen_answers
from mixtral_jax.evals.settings import Settings
from mixtral_jax.jsonl import read_jsonl
from mixtral_jax.models import mixtral
from mixtral_jax.reference import score_pairs
from mixtral_jax.resolve import Checkpoint
from mixtral_jax.stages import STAGES
from mixtral_jax.workdir import store_run
from tests.evals.test_perplexity import unigram
from tests.helpers import on_mesh, shard, tiny
from tests.pairs import dpo, random_pairs, swapped
from tests.tuned import SMALL, tune_in, write_rows

PROMPTS = ("Say red 0.", "What else?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and a run of SFT, with random weights, and one of DPO from the latter, which is trained."""
    path = tmp_path_factory.mktemp("compared")
    write_rows(path)
    chat = dict(train__sample_prompts=PROMPTS, train__sample_tokens=4)
    rows = dict(data__source="jsonl", data__path=str(path / "sft.jsonl"))
    plant(path / "base", 0, path, data__source="text", data__path=str(path / "corpus"), train__stage="pretrain")
    plant(path / "sft", 1, path, train__stage="sft", **rows, **chat)
    tuned = dict(train__init_from=str(path / "sft"), optim__learning_rate=1e-2, train__steps=2)
    tune_in(path, "dpo", "dpo", **chat, **tuned)
    return path


def plant(workdir: Path, seed: int, folder: Path, **changes) -> None:
    """A run as training leaves it, at step 1, of random weights."""
    config, mesh = on_mesh(tiny(**SMALL | changes | dict(data__cache_dir=str(folder / "cache"))))
    workdir.mkdir()
    store_run(workdir, config.to_dict())
    ByteTokenizer().save(workdir / "tokenizer")
    corpus = STAGES[config.train.stage].corpus(config, ByteTokenizer())
    checkpoints = Checkpoints(workdir)
    model = shard(mixtral.init(config.model, jax.random.key(seed)), mesh)
    checkpoints.save(1, model, {"count": jax.numpy.zeros(())}, {"step": 1, "identity": {"corpus": corpus.key}})
    checkpoints.close()


@pytest.fixture(scope="module")
def report(folder):
    """The three side by side."""
    return compare([str(folder / name) for name in ("base", "sft", "dpo")], str(folder / "out"), questions=3)


def final(workdir: Path) -> dict[str, float]:
    """What a run said of itself at its end."""
    return [line for line in read_jsonl(workdir / "metrics.jsonl") if line["kind"] == "final"][-1]


def test_a_dpo_run_is_evaluated_against_its_own_reference(folder, report, caplog):
    """As at the end of training, from the cache: what the reference was is noted with the checkpoint."""
    aside = folder / "sft.aside"
    (folder / "sft").rename(aside)
    try:
        with caplog.at_level("INFO", "mixtral_jax"):
            found = run.evaluate(str(folder / "dpo"), None, ["perplexity", "preference"], str(folder / "eval"))
    finally:
        aside.rename(folder / "sft")
    assert "(heldout) from " in caplog.text
    meant = run.fitting("dpo", None, "a run")
    assert {"perplexity", "preference"} <= set(meant), "what means something for the stage"
    assert "baselines" not in meant
    assert found["perplexity"] == pytest.approx(report["results"]["dpo"]["answers"], rel=1e-5)
    said = final(folder / "dpo")
    assert said["margin"] != 0
    for name in ("loss", "accuracy", "accuracy_low", "margin", "chosen_logp", "rejected_reward", "pairs"):
        assert found["preference"][name] == pytest.approx(said[name], rel=1e-5, abs=1e-6), name


def test_a_reference_that_is_not_in_the_cache_is_computed_of_held_out_pairs_alone(folder, caplog):
    cache = folder / "cache" / "reference"
    shutil.move(cache, folder / "reference.aside")
    try:
        with caplog.at_level("INFO", "mixtral_jax"):
            found = run.evaluate(str(folder / "dpo"), None, ["preference"], str(folder / "eval"))
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.move(folder / "reference.aside", cache)
    assert "computing the reference's" in caplog.text
    assert "(train)" not in caplog.text
    assert found["preference"]["margin"] == pytest.approx(final(folder / "dpo")["margin"], rel=1e-4)


def test_an_sft_run_is_evaluated_on_its_answers(folder):
    """Those that its prompts hold out; of it files have no pairs, and nothing is ranked."""
    found = run.evaluate(str(folder / "sft"), None, ["perplexity"], str(folder / "eval"))
    meant = run.fitting("sft", None, "a run")
    assert "perplexity" in meant
    assert not {"baselines", "preference"} & set(meant)
    config = run.stored_config(run.resolve_checkpoint(str(folder / "sft")))
    heldout = STAGES["sft"].corpus(config, ByteTokenizer()).heldout
    assert found["perplexity"]["tokens"] == heldout.weights.sum() < len(heldout.tokens) / 2
    compared = compare([str(folder / "base"), str(folder / "sft")], str(folder / "no_pairs"), questions=0)
    assert compared["results"]["sft"] == {"answers": pytest.approx(found["perplexity"], rel=1e-5)}
    assert compared["data"]["pairs"] == 0
    assert "The data of sft has no pairs, so nothing is ranked." in compared["notes"]


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        (
            "base",
            "preference",
            "train.stage=dpo, and .*base, step 1 is of pretrain; for it there are perplexity, baselines",
        ),
        ("sft", "baselines", "train.stage=pretrain, and .*sft, step 1 is of sft; for it there are perplexity"),
        ("dpo", "baselines", "for it there are perplexity, preference"),
    ],
)
def test_an_evaluation_that_means_nothing_for_the_stage_is_refused(folder, name, asked, words):
    with pytest.raises(UserError, match=f"--evals={asked} is for runs of .*{words}"):
        run.evaluate(str(folder / name), None, ["perplexity", asked], str(folder / "eval"))


def test_the_figures_are_those_of_each_run_alone(report, folder):
    """On the last run's chosen answers and pairs."""
    dpo, results = final(folder / "dpo"), report["results"]
    assert list(results) == ["base", "sft", "dpo"]
    assert [*map(set, results.values())] == [
        {"answers", "pairs"},
        {"answers", "pairs"},
        {"answers", "pairs", "preference"},
    ]
    margins = ("margin", "margin_low", "margin_high")
    for name in ("loss", "accuracy", "accuracy_low", "accuracy_high", *margins, "chosen_reward", "rejected_reward"):
        assert results["dpo"]["preference"][name] == pytest.approx(dpo[name], rel=1e-4, abs=1e-6), name
    assert results["dpo"]["preference"]["margin_low"] < dpo["margin"] < results["dpo"]["preference"]["margin_high"]
    for name in ("chosen_logp", "rejected_logp", "pairs"):
        assert results["dpo"]["pairs"][name] == pytest.approx(dpo[name], rel=1e-5), name
    # A sum over answers is the answers' number times their mean: two ways through the code.
    for found in results.values():
        total = found["answers"]["loss"] * found["answers"]["tokens"] / found["pairs"]["pairs"]
        assert found["pairs"]["chosen_logp"] == pytest.approx(-total, rel=1e-4)
    assert len({found["answers"]["loss"] for found in results.values()}) == 3


def test_all_that_made_them_is_written(report, folder, capsys):
    out = folder / "out"
    written = json.loads((out / "comparison.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert written["step"] == {"base": 1, "sft": 1, "dpo": 2}
    assert written["checkpoint"]["dpo"] == f"{folder / 'dpo'}, step 2"
    assert written["config"]["sft"]["train"]["stage"] == "sft"
    assert {"jax", "python"} <= written["versions"].keys()
    assert written["data"]["pairs"] == report["results"]["dpo"]["pairs"]["pairs"] == written["data"]["conversations"]
    assert any("base was pretrained on contains these answers is not known" in note for note in written["notes"])
    page, table = (out / "report.md").read_text(), compare_report.table(report)
    for name, found in report["results"].items():
        for text in (page, table):
            assert f"{found['answers']['loss']:.4f}" in text, name
            assert f"{found['pairs']['summed']:.1%}" in text
    whole = (out / "report.html").read_text()
    assert all(html.escape(asked["question"]) in whole for asked in report["questions"])
    assert "http" not in whole.replace("http://www.w3.org", ""), "nothing from elsewhere"
    assert not [path for path in out.iterdir() if path.is_dir() and path.name != "plots"], (
        "no samples, nothing unfinished"
    )
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_every_model_answers_the_same_questions(report, folder):
    asked = report["questions"]
    assert [each["question"] for each in asked[:2]] == list(PROMPTS)
    assert len(asked) == 5
    assert len({each["question"] for each in asked}) == 5
    for each in asked[2:]:
        number = int(each["question"].removesuffix(".").split()[-1])
        assert each["answer"] == ["red", "blue", "green", "grey"][number % 4]
        assert each["held_out"]
    assert all(list(each["answers"]) == ["base", "sft", "dpo"] for each in asked)
    found, model, mesh = run.load(str(folder / "sft"))
    with jax.set_mesh(mesh):
        context = encode_chat(ByteTokenizer(), [{"role": "user", "content": asked[3]["question"]}])
        (alone,) = compare_sample(model, [context], found.train.sample_tokens)
    assert asked[3]["answers"]["sft"] == alone


def compare_sample(model, contexts, tokens):
    from mixtral_jax.generate import generate

    return [done.text for done in generate(model, ByteTokenizer(), contexts, max_tokens=tokens, message=True)]


def test_other_checkpoints_than_fit_together_are_refused(folder, tmp_path):
    base, sft, dpo = (str(folder / name) for name in ("base", "sft", "dpo"))
    out = str(tmp_path / "out")
    for specs, words in (
        ([base], "at least two checkpoints"),
        ([base, str(folder / "none")], "none is no directory"),
        ([base, dpo, dpo], "dpo, step 2 is given 2 times"),
    ):
        with pytest.raises(UserError, match=words):
            compare(specs, out)
    with pytest.raises(UserError, match="--questions=-1"):
        compare([base, dpo], out, questions=-1)

    def changed(name, change):
        copy = shutil.copytree(folder / "base", tmp_path / name)
        values = json.loads((copy / "config.json").read_text())
        change(values, copy)
        (copy / "config.json").write_text(json.dumps(values))
        return str(copy)

    with pytest.raises(UserError, match=r"--evals=preference means nothing .*base is of pretrain, twin is of pretrain"):
        compare([base, changed("twin", lambda values, copy: None)], out, names=["preference"])
    with pytest.raises(UserError, match=r"unknown evaluation mmlu"):
        compare([base, dpo], out, names=["mmlu"])

    def short(values, copy):
        values["model"]["max_seq_len"] = values["train"]["seq_len"] = 32

    with pytest.raises(UserError, match=r"train.seq_len=64 positions and .*max_seq_len=32"):
        compare([changed("short", short), sft], out)

    def other(values, copy):
        shutil.rmtree(copy / "tokenizer")
        text = Path(__file__).read_text()
        SentencePieceTokenizer(train_sentencepiece([text] * 3, 400), "pieces").save(copy / "tokenizer")

    with pytest.raises(
        UserError, match=r"other, step 1 has the tokenizer .* of 400 ids and .*dpo, step 2 has .* of 258"
    ):
        compare([changed("other", other), dpo], out)
    assert not Path(out).exists(), "refused before any work"


def test_data_that_changed_since_is_refused(folder, tmp_path):
    rows = folder / "dpo.jsonl"
    before = rows.read_text()
    rows.write_text(before + '{"prompt": "one more", "chosen": "yes", "rejected": "no"}\n')
    try:
        with pytest.raises(UserError, match="has changed"):
            compare([str(folder / "base"), str(folder / "dpo")], str(tmp_path / "out"))
    finally:
        rows.write_text(before)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 8}], ids=["one device", "eight"])
def test_a_planted_model_is_scored_as_by_hand(axes):
    """A model that finds a token so likely whatever stands before it; exchanged answers give 1 - accuracy."""
    config, mesh = on_mesh(dpo(model__vocab_size=128), **axes)
    model, loss_V = unigram(config)
    pairs = random_pairs(60, vocab=128)
    want = np.zeros((60, 2))
    for i in range(120):
        span = slice(pairs.offsets[i], pairs.offsets[i + 1])
        want[i // 2, i % 2] = -(loss_V[pairs.tokens[span]] * pairs.weights[span]).sum()
    with jax.set_mesh(mesh):
        model = shard(model, mesh)
        log_probs = score_pairs(config, pairs, model, mesh, "pairs")
        other_way = score_pairs(config, swapped(pairs), model, mesh, "pairs")
    np.testing.assert_allclose(log_probs, want, rtol=1e-5)
    np.testing.assert_allclose(other_way[:, ::-1], log_probs, rtol=1e-5)
    tokens = answer_tokens(pairs)
    assert tokens.sum() == pairs.weights.sum()
    found = likelihood_ranking(log_probs, tokens)
    exchanged = likelihood_ranking(other_way, answer_tokens(swapped(pairs)))
    assert found["summed"] == (want[:, 0] > want[:, 1]).mean()
    assert found["mean"] == ((want / tokens)[:, 0] > (want / tokens)[:, 1]).mean() != found["summed"]
    for name in ("summed", "mean"):
        assert 0 < found[f"{name}_low"] < found[name] < found[f"{name}_high"] < 1
        assert exchanged[name] == pytest.approx(1 - found[name])
        assert exchanged[f"{name}_low"] == pytest.approx(1 - found[f"{name}_high"])


def test_rewards_are_against_the_reference():
    """Two pairs ranked right and one wrong; an untouched policy has none right and no margin."""
    config = dpo(dpo__beta=0.5).dpo
    tokens = np.array([[2, 2], [1, 3], [4, 2]])
    reference = np.array([[-3, -1], [-2, -9], [-5, -5]], np.float32)
    policy = reference + np.array([[1, -1], [2, 0], [-4, 2]], np.float32)
    found = reward_ranking(config, policy, tokens, reference)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["margin"] == pytest.approx(0.5 * np.mean([2, 2, -6]))
    spread = 1.96 * 0.5 * np.std([2, 2, -6], ddof=1) / np.sqrt(3)
    assert found["margin_high"] - found["margin"] == pytest.approx(spread, rel=1e-3)
    untouched = reward_ranking(config, reference, tokens, reference)
    assert (untouched["accuracy"], untouched["margin"]) == (0, 0)
    assert untouched["loss"] == pytest.approx(np.log(2))
    simpo = reward_ranking(dpo(dpo__loss="simpo", dpo__beta=2.0).dpo, policy, tokens, None)
    assert simpo["chosen_reward"] == pytest.approx(2 * (policy / tokens)[:, 0].mean())


def conversations(turns: list[list[tuple[str, str]]]) -> TokenFile:
    """Conversations of (role, content) as the bytes of their ids."""
    encoded = [
        encode_conversation(ByteTokenizer(), [{"role": role, "content": content} for role, content in each])
        for each in turns
    ]
    offsets = np.cumsum([0, *(len(ids) for ids, _ in encoded)])
    tokens, weights = (np.concatenate(parts) for parts in zip(*encoded))
    return TokenFile(tokens, offsets, np.ones(len(turns), np.int64), [str(i) for i in range(len(turns))], weights)


def test_questions_are_asked_once_and_spread_over_the_data():
    file = conversations(
        [[("user", f"Q{i}?"), ("assistant", f"A{i}"), ("user", "And?"), ("assistant", "No")] for i in range(9)]
    )
    longer = conversations([[("user", "long " * 20), ("assistant", "A")]])
    file = dataclasses.replace(
        file,
        tokens=np.concatenate([longer.tokens, file.tokens]),
        weights=np.concatenate([longer.weights, file.weights]),
        offsets=np.concatenate([[0], file.offsets + len(longer.tokens)]),
        ids=["long", *file.ids],
    )

    def chosen(prompts, count, fraction=0.5):
        return choose_questions(file, ByteTokenizer(), prompts, count, fraction, 40)

    found = chosen(("Q0?", "Unknown?"), 3)
    assert [each.text for each in found] == ["Q0?", "Unknown?", "Q1?", "Q4?", "Q8?"] or [
        each.text for each in found
    ] == ["Q0?", "Unknown?", "Q1?", "Q5?", "Q8?"]
    assert [each.answer for each in found[:3]] == ["A0", None, "A1"]
    assert all(each.heldout for each in found[2:])
    assert [each.heldout for each in chosen(("Q0?",), 0, fraction=1e-9)] == [False]
    assert len(chosen((), 100)) == 9
    assert chosen((), 0) == []
    context = encode_chat(ByteTokenizer(), [{"role": "user", "content": "Q1?"}])
    assert found[2].context == context


def test_chosen_answers_are_every_other_document():
    pairs = random_pairs(5)
    file = chosen_answers(pairs)
    assert file.lengths.tolist() == pairs.lengths[0::2].tolist()
    for i in range(5):
        mine, theirs = (slice(f.offsets[j], f.offsets[j + 1]) for f, j in ((file, i), (pairs, 2 * i)))
        np.testing.assert_array_equal(file.tokens[mine], pairs.tokens[theirs])
        np.testing.assert_array_equal(file.weights[mine], pairs.weights[theirs])
    assert len(file.ids) == len(file.bytes_) == 5


def test_who_may_have_read_the_answers_is_said():
    def entrant(name, step=1, **changes):
        return Entrant(name, Checkpoint(Path(name), step), dpo(**changes))

    last = entrant("dpo", data__source="stdlib", data__heldout_fraction=0.1)
    held = Heldout(last.config, "dpo", random_pairs(2), None, [])
    base = entrant("base", train__stage="pretrain", data__source="stdlib")
    less = entrant("less", data__source="stdlib", data__heldout_fraction=0.01)
    notes = _notes([base, less, entrant("alien", None, train__stage="pretrain"), last], held)
    assert "base was pretrained on the standard library's source" in notes[0]
    assert "less held out 0.01 of its prompts, fewer than the 0.1" in notes[1]
    assert "alien" in notes[2]
    assert "no pairs" in notes[3]
    assert len(notes) == 4


def test_nothing_in_the_picture_lies_on_anything_else(report):
    """The widest letters in every answer, and five models of long names."""
    names = [f"a_run_with_a_name_that_is_too_long_{i}" for i in range(5)]
    question = report["questions"][2] | {"answers": dict.fromkeys(names, ("W" * 30 + " $a_1$ ") * 30)}
    results = dict(zip(names, [report["results"]["dpo"]] * 5))
    figure = compare_report.draw(report | {"results": results, "questions": [question] * 2})
    figure.draw_without_rendering()
    renderer, width = figure.canvas.get_renderer(), figure.bbox.width
    boxes = []
    for axes in figure.axes:
        texts = [*axes.texts, *axes.get_xticklabels()] if axes.get_xticks().size == 0 else [*axes.texts]
        boxes += [text.get_window_extent(renderer) for text in texts if text.get_text()]
    assert len(boxes) > 40
    assert all(box.x0 >= 0 and box.x1 <= width for box in boxes)
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-1).overlaps(b.padded(-1))]
    assert not overlaps
    first, second = (axes.get_tightbbox(renderer) for axes in figure.axes[:2])
    assert not first.overlaps(second)


def test_several_values_of_a_flag_may_follow_it():
    given = ["eval.py", "--compare", "a", "b", "--out=x", "--compare=c", "d", "--questions", "3"]
    assert cli.spelled_out(given, {"compare"}) == [
        "eval.py", "--compare=a", "--compare=b", "--out=x", "--compare=c", "--compare=d", "--questions", "3"
    ]  # fmt: skip
    assert cli.spelled_out(given, set()) == given


@pytest.mark.slow
def test_the_standard_library_gives_conversations_and_pairs(folder, tmp_path):
    """Of a DPO run on it the conversations of SFT are scored, those that its prompts hold out."""
    stdlib = dict(data__source="stdlib", data__path="", train__seq_len=256, model__max_seq_len=256, train__steps=1)
    stdlib |= dict(train__init_from="", data__heldout_fraction=0.02, train__sample_prompts=("def ",))
    for stage in ("pretrain", "dpo"):
        tune_in(tmp_path, stage, stage, **stdlib)
    found = compare([str(tmp_path / "pretrain"), str(tmp_path / "dpo")], str(tmp_path / "out"), questions=1)
    config = run.stored_config(run.resolve_checkpoint(str(tmp_path / "dpo")))
    corpus = open_chat_corpus(config.data, ByteTokenizer(), "sft", 256)
    assert found["data"]["conversations"] == len(corpus.heldout.ids)
    assert "standard library's source" in found["notes"][0]


@pytest.mark.slow
def test_adapters_are_evaluated_merged(folder, report):
    """Of a DPO run of LoRA the reference is its base; both as training said at its end."""
    lora = dict(lora__rank=2, lora__alpha=4.0, optim__learning_rate=1e-1, train__steps=2)
    tune_in(folder, "lora", "dpo", **lora, train__init_from=str(folder / "sft"))
    found = compare([str(folder / name) for name in ("base", "sft", "lora")], str(folder / "merged"), questions=0)
    said = final(folder / "lora")
    assert said["margin"] != 0
    for name in ("loss", "margin", "accuracy"):
        assert found["results"]["lora"]["preference"][name] == pytest.approx(said[name], rel=1e-4, abs=1e-6), name
    assert found["results"]["sft"]["pairs"] == report["results"]["sft"]["pairs"]


def test_evaluations_stand_side_by_side(folder, tmp_path):
    """Of base models alone too; one that means nothing for a checkpoint's stage is left out for it."""
    specs = [str(folder / name) for name in ("base", "dpo")]
    found = compare(specs, str(tmp_path / "out"), questions=0, names=["baselines", "preference"])
    assert {name: list(each) for name, each in found["evals"].items()} == {"base": ["baselines"], "dpo": ["preference"]}
    assert found["evals"]["dpo"]["preference"]["margin"] == pytest.approx(final(folder / "dpo")["margin"], rel=1e-4)
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"{found['evals']['base']['baselines']['bigram_bits_per_byte']:.5g}" in page
    assert "## preference" in page
    bases = [str(shutil.copytree(folder / "base", tmp_path / name)) for name in ("a", "b")]
    found = compare(bases, str(tmp_path / "two"), names=["baselines"])
    assert found["results"] == {"a": {}, "b": {}}
    assert found["evals"]["a"] == found["evals"]["b"]
    assert found["questions"] == []
    assert not (tmp_path / "two" / "comparison.png").exists()


def test_an_interrupted_comparison_goes_on_where_it_was(folder, tmp_path, monkeypatch, report):
    specs, out = [str(folder / name) for name in ("base", "sft", "dpo")], tmp_path / "out"
    score, calls, measured = compare_module.score_pairs, [], []
    scores = compare_module.Perplexity.__call__

    def fails_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*arguments)

    def counted(self, model):
        measured.append(1)
        return scores(self, model)

    monkeypatch.setattr(compare_module, "score_pairs", fails_third)
    monkeypatch.setattr(compare_module.Perplexity, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(specs, str(out), questions=3)
    assert not (out / "report.html").exists()
    found = compare(specs, str(out), questions=3)
    assert len(calls) == 4, "the first two models' pairs were not scored again"
    assert len(measured) == 3, "nor any model's answers"
    assert found["results"] == report["results"]
    assert found["questions"] == report["questions"]


def test_all_models_read_windows_of_the_same_length(folder, tmp_path):
    """Else the one that was trained with longer rows would score the same text with more context."""
    long = shutil.copytree(folder / "base", tmp_path / "long")
    values = json.loads((long / "config.json").read_text())
    values["train"]["seq_len"] = 32
    (long / "config.json").write_text(json.dumps(values))
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("some words and more of them " * (5 + i))
    settings = Settings(text=(f"t=text:{tmp_path}/*.txt",))
    found = compare([str(folder / "base"), str(long)], str(tmp_path / "out"), names=["perplexity"], settings=settings)
    base, other = (each["perplexity"] for each in found["evals"].values())
    assert base["window"] == other["window"] == 32
    assert base == pytest.approx(other, rel=1e-6)


def test_a_mistake_late_in_a_comparison_leaves_what_was_found(folder, tmp_path, monkeypatch):
    def fails(subject):
        yield "one", 1
        raise UserError("no data set")

    monkeypatch.setitem(run.EVALS, "context", run.EVALS["context"]._replace(run=fails, check=None))
    specs = [str(folder / name) for name in ("base", "dpo")]
    with pytest.raises(UserError, match="no data set"):
        compare(specs, str(tmp_path / "out"), questions=0, names=["baselines", "context"])
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["evals"]["base"]["baselines"]["bigram_bits_per_byte"] > 0
    assert written["unfinished"] == {"base": ["context"], "dpo": ["context"]}
