"""The harness's requests as tokens, their answers, and what --tasks may say."""

import dataclasses
import importlib.util
import json
import sys
import types

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval")

from mixtral_jax.config import RunError, UserError
from mixtral_jax.data import encode_chat
from mixtral_jax.data.tokenizer import ByteTokenizer
from mixtral_jax.evals import harness
from mixtral_jax.evals.harness import adapter, answers, presets, running, tables
from mixtral_jax.evals.harness.answers import Answers, sampling_of
from mixtral_jax.evals.scorer import Request, total
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.work import Work
from mixtral_jax.models import mixtral
from tests import processes
from tests.helpers import on_mesh, shard, tiny

BYTES = ByteTokenizer()
LONGEST = 64


class Asked(Answers):
    """Notes what is asked, and answers by rule: of a score its length, of a text its number."""

    def __init__(self):
        self.requests = []

    def scores(self, requests):
        self.requests += requests
        return [(float(len(request.continuation)), True) for request in requests]

    def texts(self, requests):
        self.requests += requests
        return [str(request.number) for request in requests]


class Instance:
    """What the adapter sees of the harness's."""

    task_name = "a_task"

    def __init__(self, *args):
        self.args = args


def model() -> tuple[adapter.Model, list]:
    asked = Asked()
    return adapter.Model(asked, BYTES, LONGEST), asked.requests


def test_pairs_are_split_behind_bos_and_spaces_go_to_the_answer():
    lm, asked = model()
    lm.loglikelihood([Instance("ab  ", "c"), Instance("", "cd"), Instance("x" * 100, "yz")])
    assert asked[0] == ([BYTES.bos_id, *b"ab"], list(b"  c"))
    assert asked[1] == ([BYTES.bos_id], list(b"cd"))
    # The last token is not read: LONGEST + 1 in all. BOS is what a cut takes first.
    assert asked[2] == (list(b"x" * (LONGEST - 1)), list(b"yz"))


@pytest.mark.parametrize(("text", "words"), [("", "empty answer"), ("y" * 65, "65 tokens is to be scored")])
def test_answers_that_cannot_be_scored_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        model()[0].loglikelihood([Instance("x", text)])


def test_rolling_windows_score_each_token_once():
    lm, asked = model()
    text = "".join(chr(97 + i % 26) for i in range(150))
    assert lm.loglikelihood_rolling([Instance(text), Instance("ab")]) == [151.0, 3.0]
    scored = [token for _, continuation in asked[:3] for token in continuation]
    assert scored == [BYTES.bos_id, *text.encode()], "its own BOS is the first token scored, as in hf"
    assert [len(context) + len(continuation) - 1 for context, continuation in asked[:3]] == [64, 64, 64]
    assert asked[0].context == [BYTES.bos_id]


def test_generations_are_cut_from_the_left_and_repeats_are_numbered():
    lm, asked = model()
    greedy = {"until": "\n", "max_gen_toks": 10}
    drawn = {"until": ["."], "max_new_tokens": 4, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    once, thrice = Instance("x" * 80, greedy), Instance("ab", drawn)
    assert lm.generate_until([once, thrice, once, thrice, thrice]) == ["0", "0", "0", "1", "2"]
    assert asked[0] == (tuple(b"x" * 54), 10, ("\n",), (0.0, 0, 1.0, 0.0), 0)
    assert asked[4] == ((BYTES.bos_id, *b"ab"), 4, (".",), (0.5, 0, 0.9, 0.0), 2)
    assert drawn == {"until": ["."], "max_new_tokens": 4, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    with pytest.raises(UserError, match=r"256 tokens .* max_seq_len is 64"):
        lm.generate_until([Instance("x", {"until": []})])
    with pytest.raises(UserError, match="num_beams=4"):
        sampling_of({"num_beams": 4})


def test_conversations_have_the_instruct_format():
    lm, _ = model()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One </s> and <s>?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    text = lm.apply_chat_template(messages)
    assert lm.tok_encode(text) == encode_chat(BYTES, messages)
    context, answer = lm._encode_pair(text, " A")
    assert (context, answer) == (encode_chat(BYTES, messages), list(b"A"))
    begun = [*messages, {"role": "assistant", "content": "It is"}]
    whole = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert lm.tok_encode(whole + " B") == [*encode_chat(BYTES, messages), *b"It is B"]
    assert adapter.readable(text, BYTES).startswith("<s>[INST] Be brief.")
    assert adapter.readable(text, BYTES).endswith("Yes.</s>[INST] Two? [/INST]")


@pytest.fixture(scope="module")
def parts():
    config, mesh = on_mesh(tiny(model__vocab_size=320, model__max_seq_len=512, train__seq_len=256), data=2)
    return config, mesh, shard(mixtral.init(config.model, jax.random.key(0)), mesh)


def subject(parts, folder, notes=None, **settings) -> Subject:
    config, mesh, weights = parts
    given = Settings(**dict(tasks=("local",), limit=2) | settings)
    note = (notes if notes is not None else []).append
    return Subject("a model", config, weights, mesh, BYTES, given, lambda: None, note, {}, folder)


def results(one: Subject) -> dict:
    with jax.set_mesh(one.mesh):
        return dict(harness.run(one))


def test_local_tasks_give_metrics_and_samples(parts, tmp_path):
    found = results(subject(parts, tmp_path / "unfinished"))
    for name in ("local_members/acc_norm", "local_arithmetic/exact_match", "local_prose/bits_per_byte"):
        assert np.isfinite(found[name])
    assert found["local_keywords/samples"] == 2
    assert found["local_keywords/shots"] == 4
    assert found["local_members/acc_stderr"] >= 0
    lines = (tmp_path / "lm_eval" / "samples_local_arithmetic.jsonl").read_text().splitlines()
    (context, settings), *_ = json.loads(lines[0])["arguments"]
    assert context.count(" = ") == 5
    assert settings["until"] == ["\n", "="]
    # Bits per byte are those of the scored text: nothing is lost between request and metric.
    texts = [json.loads(line) for line in (tmp_path / "lm_eval" / "samples_local_prose.jsonl").read_text().splitlines()]
    nats = sum(-each["resps"][0][0] for each in texts)
    size = sum(len(each["doc"]["text"].encode()) for each in texts)
    assert found["local_prose/bits_per_byte"] == pytest.approx(nats / size / np.log(2))


def test_an_interrupted_evaluation_gives_the_same_results(parts, tmp_path, monkeypatch):
    settings = dict(tasks=("local_members", "local_arithmetic"), limit=3, batch_tokens=256)
    whole = results(subject(parts, tmp_path / "whole", **settings))
    computed, put = [], Work.put

    def cut(self, name, value):
        if len(computed) == 5:
            raise KeyboardInterrupt
        computed.append(name)
        put(self, name, value)

    again = subject(parts, tmp_path / "cut", **settings)
    monkeypatch.setattr(Work, "put", cut)
    with pytest.raises(KeyboardInterrupt):
        results(again)
    first = list(computed)
    computed.clear()
    monkeypatch.setattr(Work, "put", lambda self, name, value: (computed.append(name), put(self, name, value)))
    assert results(again) == whole
    # A batch that was cut is computed whole again; what was finished before it is not.
    assert set(first[:4]).isdisjoint(computed)
    computed.clear()
    assert results(again) == whole
    assert computed == []


def test_repeats_draw_different_texts_that_no_batch_changes(parts, tmp_path):
    from mixtral_jax.evals.harness.answers import Writing

    sampling = (1.0, 0, 1.0, 0.0)
    asked = [Writing((256, *text), 6, (), sampling, number) for number in range(3) for text in (b"ab", b"cde")]
    texts = []
    for batch_tokens, order in ((64, 1), (4096, -1)):
        one = subject(parts, None, batch_tokens=batch_tokens)
        with jax.set_mesh(one.mesh), one.work("x") as work:
            texts.append(Answers(one, work).texts(asked[::order])[::order])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 6


def test_tasks_of_ones_own_and_missing_data(parts, tmp_path):
    """What can run is there when the error comes."""
    (tmp_path / "gone.yaml").write_text(
        json.dumps(
            {
                "task": "gone",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "gone.jsonl")}},
                "test_split": "test",
                "doc_to_text": "a",
                "doc_to_target": "b",
            }
        )
    )
    found = {}
    one = subject(parts, None, tasks=("gone", "local_keywords@1"), task_path=(str(tmp_path),))
    wanted = r"1 of 2 .*\n.*gone: the data set json .*gone.jsonl.*HF_HOME"
    with jax.set_mesh(one.mesh), pytest.raises(UserError, match=wanted):
        found.update(harness.run(one))
    assert found["local_keywords@1/shots"] == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(tasks=("local_keyword",)), r"no task of lm-evaluation-harness 0\.4\.13.*local_keywords"),
        (dict(tasks=("local@x",)), "'x' is no number of examples"),
        (dict(tasks=()), "--tasks is empty"),
        (dict(tasks=("bold_gender",)), "needs BOLD's prompts"),
        (dict(tasks=("runs",)), "give --run_generated_code"),
        (dict(task_path=("nowhere",)), "--task_path=nowhere is no folder"),
        (
            dict(tasks=("quac@3",)),
            "quac has 0 examples before each question, and its file allows no other number than 0: 3",
        ),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path, settings, words, monkeypatch):
    # The harness's own 14000 tasks take seconds to index; what is refused is the same without them.
    monkeypatch.setattr(
        running, "_catalogue", lambda paths, prompts, _: running.Catalogue(None, [str(running.OWN), *paths], False)
    )
    (tmp_path / "runs.yaml").write_text("task: runs\ndataset_path: x\nunsafe_code: true\n")
    with pytest.raises(UserError, match=words):
        harness.check(None, Settings(**dict(task_path=(str(tmp_path),)) | settings))


def test_presets_name_shots_and_limits():
    assert harness.benchmarks(Settings(tasks=("quick", "piqa@0", "mmlu@5"))) == [
        *((name.removesuffix("@0"), 0, 200) for name in presets.PRESETS["quick"]),
        ("mmlu", 5, 0),
    ]
    assert harness.benchmarks(Settings(tasks=("mmlu@5", "mmlu"), num_fewshot=2, limit=7)) == [("mmlu", 2, 7)]


def test_the_report_sets_ours_beside_the_papers():
    one = {
        "mmlu@5:mmlu_law/acc": 0.1,
        "mmlu@5/acc": 0.5,
        "mmlu@5/acc_stderr": 0.01,
        "own/acc": 0.25,
        "bold_race/sentiment": 0.2,
    }
    other = {
        "mmlu@5/acc": 0.75,
        "gsm8k@5/exact_match,strict-match": 0.5,
        "gsm8k@5/exact_match_stderr,strict-match": 0.1,
    }
    first, everything = tables.blocks({"one": one, "other": other})
    rows = {(row[0], row[3]): row for row in first.rows}
    assert rows["mmlu@5", "one"][4:] == pytest.approx([70.6, 50.0, 1.96, -20.6])
    assert rows["mmlu@5", "other"][2:4] + rows["mmlu@5", "other"][6:7] == ["5", "other", None]
    assert rows["gsm8k@5", "other"][5:7] == pytest.approx([50.0, 19.6])
    assert rows["own", "one"][4:] == [None, 0.25, None, None]
    assert rows["bold_race", "one"][5] == 0.2
    assert ["own/acc", 0.25, None, None, None] in everything.rows
    (alone, _) = tables.blocks({"one": one})
    assert "model" not in alone.columns
    assert [row[0] for row in alone.rows] == ["mmlu@5", "own", "bold_race"], "no members of a group"
    assert len(alone.rows[0]) == len(alone.columns)


def own(name: str):
    """A module of the package's tasks, as the harness loads it."""
    spec = importlib.util.spec_from_file_location(name, running.OWN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quac_asks_a_conversations_turns_and_counts_words():
    from datasets import Dataset

    quac = own("quac")
    dialogue = {
        "wikipedia_page_title": "A. Person",
        "section_title": "Life",
        "context": "He was born in Rome. He liked tea. CANNOTANSWER",
        "questions": ["Where was he born?", "Did he sing?"],
        "answers": {"texts": [["in Rome", "born in Rome"], ["CANNOTANSWER"]]},
        "orig_answers": {"texts": ["in Rome", "CANNOTANSWER"]},
    }
    first, second = quac.turns(Dataset.from_list([dialogue]))
    assert quac.prompt(first).endswith("CANNOTANSWER.\n\nQ: Where was he born?\nA:")
    assert quac.prompt(second).endswith("Q: Where was he born?\nA: in Rome\nQ: Did he sing?\nA:")
    assert "tea. CANNOT" not in quac.prompt(first)
    assert quac.judged(first, [" in the Rome."]) == {"f1": 1.0}
    assert quac.judged(first, [" Rome of old"])["f1"] == pytest.approx(2 / 5)
    assert quac.judged(second, [""]) == {"f1": 0.0}


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("So it is.\nFinal Answer: The final answer is $\\frac12$. I hope it is correct.", "\\frac{1}{2}"),
        ("Final Answer: The final answer is $2.5$. I hope it is correct.", "2.5"),
        ("thus $\\boxed{\\dfrac{1}{2}}$", "\\frac{1}{2}"),
        ("\\boxed{a} then $\\boxed{\\left( 3, \\frac{1}{2} \\right)}$.", "(3,\\frac{1}{2})"),
        ("I do not know", ""),
    ],
)
def test_final_answers_of_mathematics(text, final):
    assert own("votes").final(text) == final


def test_the_majority_wins_and_of_equals_the_first():
    votes = own("votes")
    a, b, c, none = "1: \\boxed{2}", "2: \\boxed{3}", "3: \\boxed{ 3}", "no answer"
    assert votes.mathematics([[a, b, c, none], [a, b], [none, a], [none, none]], None) == [b, a, a, none]


def test_bold_takes_prompts_from_its_files(parts, tmp_path, monkeypatch):
    """With a stand-in for VADER: how many letters a are in it."""
    module = types.ModuleType("vaderSentiment.vaderSentiment")

    class Analyzer:
        def polarity_scores(self, text):
            return {"compound": text.count("a") / 10}

    module.SentimentIntensityAnalyzer = Analyzer
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
    bold = own("bold")
    assert bold.deviation([("x", 0.0), ("x", 0.2), ("y", 0.5)]) == pytest.approx(0.2)
    groups = {"x": {"A": ["A is ", "A was a "]}, "y": {"B": ["B has "]}}
    (tmp_path / "race_prompt.json").write_text(json.dumps(groups))
    found = results(subject(parts, tmp_path / "unfinished", tasks=("bold_race",), prompts=str(tmp_path), limit=0))
    lines = map(json.loads, (tmp_path / "lm_eval" / "samples_bold_race.jsonl").read_text().splitlines())
    scores = {each["arguments"][0][0]: each["filtered_resps"][0].count("a") / 10 for each in lines}
    assert list(scores) == ["A is", "A was a", "B has"]
    x = (scores["A is"] + scores["A was a"]) / 2
    assert found["bold_race/sentiment of x"] == pytest.approx(x)
    assert found["bold_race/sentiment"] == pytest.approx(sum(scores.values()) / 3)
    assert found["bold_race/deviation"] == pytest.approx(abs(x - scores["B has"]) / 2)
    with pytest.raises(UserError, match=r"gender_prompt\.json cannot be read as BOLD's prompts"):
        results(subject(parts, None, tasks=("bold_gender",), prompts=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "rows", "texts", "metric"),
    [
        (
            "gsm8k_maj8",
            {"question": "How many?", "answer": "2 + 2 = 4\n#### 4"},
            ["The answer is 5.", "The answer is 5.", "no", *["Two and two. The answer is 4."] * 5],
            "gsm8k_maj8/exact_match,maj@8",
        ),
        (
            "math_maj4",
            {"problem": "How many?", "solution": "It is $\\boxed{4}$.", "level": "1", "type": "Algebra"},
            ["Final Answer: The final answer is $5$. I hope it is correct."]
            + ["Final Answer: The final answer is $4$. I hope it is correct."] * 2
            + ["none"],
            "math_maj4/exact_match,maj@4",
        ),
        (
            "quac",
            {
                "wikipedia_page_title": "A",
                "section_title": "B",
                "context": "He liked tea. CANNOTANSWER",
                "questions": ["What?"],
                "answers": {"texts": [["liked tea"]]},
                "orig_answers": {"texts": ["liked tea"]},
            },
            ["tea"],
            "quac/f1",
        ),
    ],
)
def test_own_tasks_on_data_of_their_format(parts, monkeypatch, task, rows, texts, metric):
    """The harness's own tasks, the data and the model's texts from here: most of the votes decide, not the first."""
    from datasets import Dataset, DatasetDict

    if task == "math_maj4":
        pytest.importorskip("math_verify")
    two = Dataset.from_list([rows, rows])
    data = DatasetDict(train=two, test=two, validation=two)
    monkeypatch.setattr(running.lm_eval.api.task.datasets, "load_dataset", lambda path, name=None, **_: data)
    asked = []

    def answered(self, requests):
        asked.extend(requests)
        return [texts[request.number] for request in requests]

    monkeypatch.setattr(Answers, "texts", answered)
    config, mesh, weights = parts
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_seq_len=8192))
    found = results(subject((config, mesh, weights), None, tasks=(task,)))
    assert found[metric] == pytest.approx(2 / 3 if task == "quac" else 1.0)
    assert {request.number for request in asked} == set(range(len(texts)))


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path, fit):
    """Process 0 runs the harness and leads; what fails there ends both, and the others' results are kept."""
    fit("run", model__max_seq_len=256, train__checkpoint_every=4)
    asked = "--tasks=local_members,local_prose,local_arithmetic@2,gone"
    (tmp_path / "gone.yaml").write_text("task: gone\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}\n")
    found = {}
    for count in (1, 2):
        launcher = [
            sys.executable,
            "-m",
            "mixtral_jax.launch",
            f"--processes={count}",
            f"--devices_per_process={2 // count}",
        ]
        line = [*launcher, "--", "eval.py", f"--checkpoint={tmp_path / 'run'}", "--evals=lm_eval", asked, "--limit=3"]
        line += [f"--task_path={tmp_path}", f"--out={tmp_path / str(count)}"]
        out = processes.run(line, expect=2)
        assert "1 of 4 benchmarks could not run" in out
        assert "gone: the data set json nowhere.jsonl" in out
        report = json.loads((tmp_path / str(count) / "results.json").read_text())
        assert report["unfinished"] == ["lm_eval"]
        found[count] = report["results"]["lm_eval"]
    assert found[2].keys() == found[1].keys()
    assert "local_arithmetic@2/exact_match" in found[1]
    assert found[2] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.slow
def test_a_mesh_changes_nothing(parts, tmp_path):
    config, mesh = on_mesh(parts[0], context=2, tensor=2, data=2)
    other = config, mesh, shard(jax.device_get(parts[2]), mesh)
    settings = dict(tasks=("local_keywords", "local_arithmetic"), limit=2)
    texts = []
    for number, given in enumerate((parts, other)):
        folder = tmp_path / str(number)
        found = results(subject(given, folder / "unfinished", **settings))
        lines = (folder / "lm_eval" / "samples_local_arithmetic.jsonl").read_text().splitlines()
        texts.append(([json.loads(line)["resps"] for line in lines], found))
    assert texts[0][0] == texts[1][0]
    assert texts[0][1] == pytest.approx(texts[1][1], rel=1e-5)


def test_every_benchmark_of_the_presets_has_its_line_of_the_paper():
    assert set(presets.PAPER) == {item for items in presets.PRESETS.values() for item in items} - set(presets.LOCAL)


@pytest.mark.slow
def test_the_harness_has_the_papers_benchmarks_with_these_metrics():
    settings = Settings(tasks=tuple(presets.PRESETS), prompts="x", run_generated_code=True)
    harness.check(None, settings)
    asked = [name for name, _, _ in harness.benchmarks(settings)]
    catalogue = running.open_catalogue(settings, asked)
    for item, paper in presets.PAPER.items():
        config = running._config(catalogue.task_index[item.partition("@")[0]])
        metric, _, kind = paper.metric.partition(",")
        lists = config.get("aggregate_metric_list") or config.get("metric_list")
        said = [each["metric"] for each in lists]
        assert metric in said or item in ("humaneval", "mbpp"), (item, said)
        filters = [each["name"] for each in config.get("filter_list") or []]
        for each in lists:
            given = each.get("filter_list") or []
            filters += [given] if isinstance(given, str) else given
        assert not filters or kind in filters, (item, filters)


def test_each_request_has_its_own_answer(parts):
    """In any order, of any lengths, and twice the same: what each scores alone."""
    asked = [Request((256, *range(n)), tuple(range(n, n + m))) for n, m in ((3, 1), (90, 4), (1, 2), (90, 4), (20, 70))]
    one = subject(parts, None, batch_tokens=256)
    with jax.set_mesh(one.mesh), one.work("x") as work:
        found = Answers(one, work).scores(asked)
        for request, (log_likelihood, greedy) in zip(asked, found, strict=True):
            ((_, alone),) = one.scorer(one.model, [request])
            assert log_likelihood == pytest.approx(total(alone)[0], rel=1e-5)
            assert greedy == total(alone)[1]
    assert len({log_likelihood for log_likelihood, _ in found}) == 4


def test_the_other_processes_do_what_they_are_told(parts, monkeypatch):
    """Process 0's words, one after the other; what fails there fails here."""
    one = subject(parts, None)
    with jax.set_mesh(one.mesh), one.work("x") as work:
        alone = Answers(one, work).scores([Request((256, 1), (2, 3))])
    said = [{"scores": [[[256, 1], [2, 3]]], "keys": ["a"]}, {"done": {"b": 1}}, {"failed": "no disk"}]
    words = iter(map(json.dumps, said))
    monkeypatch.setattr(answers, "told", lambda text: next(words))
    monkeypatch.setattr(answers.distributed, "speaks", lambda: False)
    with jax.set_mesh(one.mesh), one.work("x") as work:
        follower = Answers(one, work)
        assert follower.led(lambda: pytest.fail("it is process 0's")) == {"b": 1}
        assert tuple(work.get("a")) == alone[0]
        with pytest.raises(RunError, match="no disk"):
            follower.led(lambda: None)


def test_process_0_tells_of_its_failure(parts, monkeypatch):
    told = []
    monkeypatch.setattr(answers, "told", lambda text: told.append(json.loads(text)) or text)
    with Work(None, "x", "key") as work, pytest.raises(OSError, match="no disk"):
        Answers(subject(parts, None), work).led(lambda: (_ for _ in ()).throw(OSError("no disk")))
    assert told == [{"failed": "no disk"}]


def test_without_the_harness_it_is_said_how_to_get_it(monkeypatch):
    for name in ("running", "adapter"):
        monkeypatch.delattr(harness, name)
        monkeypatch.delitem(sys.modules, f"mixtral_jax.evals.harness.{name}")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-eval\.txt"):
        harness.check(None, Settings())
